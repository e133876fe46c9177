"""Each limit that docs/limits.md lists is told to the user, in the words of the page."""

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_styles import tokenizer_for
from datasets import Dataset
from helpers import piece_tokenizer, questions, rows, tagged_words, tiny_bert, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from resume_cases import Rows, StatelessStream, built
from tiny_language_models import llama, of_kind, padded, rows_of
from tiny_scenes import processor, scenes, tiny_detr, tiny_segformer
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from transformers import FNetConfig, FNetForSequenceClassification

from manualloop import (
    ConfigError,
    NonFiniteError,
    TrainState,
    accumulate_gradients,
    evaluate_loop,
    load_checkpoint,
    predict_loop,
    prepare_dataloaders,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.notices import say
from manualloop.reading.ranks import unsharded
from manualloop.tasks import (
    answer_windows,
    boxes,
    chat,
    cut,
    fill_in_middle,
    images_and_masks,
    tag_words,
)
from manualloop.tracking import tensorboard

PAGE = Path(__file__).parents[2] / "docs/limits.md"
ENTRY = re.compile(r"^\| \*\*(.*?)\*\*.*?\| `(.*)` \|.*\|$", re.MULTILINE)
LIMITS = dict(ENTRY.findall(PAGE.read_text() if PAGE.exists() else ""))


def loss_fn(model: nn.Module, batch: Any) -> Any:
    return model(batch["x"]).square().mean()


def state_of(model: nn.Module | None = None) -> TrainState:
    torch.manual_seed(0)
    model = model or nn.Linear(4, 1)
    return TrainState(model, SGD(model.parameters(), lr=0.1, momentum=0.9))


def step_once(state: TrainState, loader: Any, index: int, **options: Any) -> None:
    """Train up to the update of a number."""
    for step in train_steps(state, loader, max_steps=9, **{"loss_fn": loss_fn, **options}):
        if step.index == index:
            break


def resume(
    folder: Path, first: Any, second: Any = None, model: Any = lambda: None, **options: Any
) -> None:
    """Train for two updates, save, and make a third one from the checkpoint with a new state."""
    state = state_of(model())
    step_once(state, first(), 2, **options)
    save_checkpoint(folder, state)
    state = state_of(model())
    load_checkpoint(folder, state)
    step_once(state, (second or first)(), 3, **options)


class Drawing(Sampler[int]):
    """Draws each row number when it is asked for."""

    def __len__(self) -> int:
        return 14

    def __iter__(self) -> Any:
        return iter(int(torch.randint(14, ())) for _ in range(14))


class Prefetching(DataLoader[Any]):
    """A loader that cannot be read in another way than its own."""

    def __iter__(self) -> Any:
        return super().__iter__()


class Holding(nn.Linear):
    """Holds an object that is another one after each call."""

    def forward(self, x: Any) -> Any:
        self.held = object()
        return super().forward(x)


def drawing_stream(folder: Path) -> None:
    resume(folder, lambda: DataLoader(StatelessStream(draws=True), 2))


def shuffle_buffer(folder: Path) -> None:
    stream = rows(14, x=[[1.0] * 4] * 14).to_iterable_dataset().shuffle(seed=1, buffer_size=5)
    train_loop(
        nn.Linear(4, 1),
        DataLoader(stream.with_format("torch"), 2),
        max_steps=2,
        loss_fn=loss_fn,
        checkpoint_dir=folder,
        progress_bar=False,
    )


def drawing_sampler(folder: Path) -> None:
    resume(folder, lambda: built(sampler=Drawing(), shuffle=None))


def any_order(folder: Path) -> None:
    step_once(state_of(), Prefetching(Rows(), 2, num_workers=1, in_order=False), 1)


def closure(rng: Any) -> Any:
    return lambda model, batch: loss_fn(model, batch) + 0 * rng.random()


def unsaved_generator(folder: Path) -> None:
    step_once(state_of(), built(), 1, loss_fn=closure(random.SystemRandom()))


def new_generator(folder: Path) -> None:
    state = state_of()
    step_once(state, built(), 2)
    save_checkpoint(folder, state)
    load_checkpoint(folder, state)
    step_once(state, built(), 3, loss_fn=closure(random.Random(1)))


def shared_generator(folder: Path) -> None:
    rng = torch.Generator()

    def noisy(model: nn.Module, batch: Any) -> Any:
        return loss_fn(model, batch) + 0 * torch.rand((), generator=rng)

    step_once(state_of(), built(generator=rng, num_workers=1), 1, loss_fn=noisy)


def unsaved_attribute(folder: Path) -> None:
    resume(folder, built, model=lambda: Holding(4, 1))


def second_loader(folder: Path) -> None:
    more = iter(built())
    resume(folder, built, loss_fn=lambda model, batch: loss_fn(model, next(more)))


def changed_setting(folder: Path) -> None:
    config = {"margin": 1.0}
    state = state_of()
    own = {"loss_fn": lambda model, batch: loss_fn(model, batch) + config["margin"]}
    for _ in train_steps(state, built(), max_steps=2, **own):
        config["margin"] *= 0.5
    save_checkpoint(folder, state)


def another_group(folder: Path) -> None:
    state = state_of()
    for _ in train_steps(state, built(), max_steps=1, loss_fn=loss_fn):
        state.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    save_checkpoint(folder, state)


def curriculum(folder: Path) -> None:
    loader = built()
    loader.dataset.stage = 1
    state = state_of()
    for step in train_steps(state, loader, max_steps=2, loss_fn=loss_fn):
        loader.dataset.stage += step.index
    save_checkpoint(folder, state)


class Shuffling(Sampler[int]):
    """Shuffles its list of rows in place."""

    def __init__(self) -> None:
        self.rows = list(range(14))

    def __len__(self) -> int:
        return 14

    def __iter__(self) -> Any:
        random.Random(len(self.rows)).shuffle(self.rows)
        return iter(self.rows)


def shuffled_in_place(folder: Path) -> None:
    resume(folder, lambda: built(sampler=Shuffling(), shuffle=False))


def schedule_of_the_loop(folder: Path) -> None:
    state = state_of()
    schedule = torch.optim.lr_scheduler.ExponentialLR(state.optimizer, 0.9)
    for _ in train_steps(state, built(), max_steps=2, loss_fn=loss_fn):
        schedule.step()
    save_checkpoint(folder, state)


def other_surroundings(folder: Path) -> None:
    num_threads = torch.get_num_threads()
    state = state_of()
    try:
        torch.set_num_threads(1)
        step_once(state, built(), 2)
        save_checkpoint(folder, state)
        torch.set_num_threads(2)
        load_checkpoint(folder, state)
        step_once(state, built(), 3)
    finally:
        torch.set_num_threads(num_threads)


def other_memory(folder: Path) -> None:
    def convolution() -> nn.Module:
        return nn.Conv2d(3, 4, 3)

    def loss(model: nn.Module, batch: Any) -> Any:
        return model(batch).square().mean()

    batches = [torch.ones(2, 3, 5, 5)] * 4
    state = state_of(convolution().to(memory_format=torch.channels_last))
    step_once(state, batches, 2, loss_fn=loss)
    save_checkpoint(folder, state)
    load_checkpoint(folder, state_of(convolution()))


class FSDPModule(nn.Linear):
    """A model that is taken for a sharded one, by the name that torch gives to those."""


def sharded_average(folder: Path) -> None:
    model = FSDPModule(4, 1)
    train_loop(
        model,
        [{"x": torch.ones(2, 4)}],
        SGD(model.parameters(), lr=0.1),
        num_epochs=1,
        loss_fn=loss_fn,
        extras={"average": AveragedModel(model)},
        evaluate=lambda: {"score": 1.0},
        progress_bar=False,
    )


UNEVEN = [
    {"x": torch.ones(2, 4), "more": torch.ones(3)},
    {"x": torch.ones(1, 4), "more": torch.ones(2)},
]


def untold_items(folder: Path) -> None:
    step_once(state_of(), UNEVEN, 1, gradient_accumulation_steps=2)


class Weighted(nn.Linear):
    """Returns a loss with class weights."""

    def forward(self, x: Any, labels: Any = None) -> Any:
        logits, weight = super().forward(x), torch.tensor([1.0, 9.0])
        return {"loss": nn.functional.cross_entropy(logits, labels, weight), "logits": logits}


def weighted_inside(folder: Path) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 3), "labels": torch.tensor([0, 0, 0, 1])}
    model = Weighted(3, 2)
    train_loop(model, [batch, batch], gradient_accumulation_steps=2, progress_bar=False)


def statistics(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    step_once(state_of(model), built(), 1, gradient_accumulation_steps=2)


def untold_evaluation(folder: Path) -> None:
    evaluate_loop(nn.Linear(4, 1), UNEVEN, loss_fn=loss_fn, progress_bar=False)


def spoilt_means(folder: Path) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    batches = [{"x": torch.full((2, 4), math.nan)}, {"x": torch.randn(2, 4)}]
    step_once(state_of(model), batches, 1, on_nonfinite="skip")


def nan_gradient(folder: Path) -> None:
    state, ones = state_of(), {"x": torch.ones(2, 4)}
    batches = [ones, ones, ones, {"x": torch.zeros(2, 4)}]
    with pytest.raises(NonFiniteError) as error:
        list(train_steps(state, batches, num_epochs=1, loss_fn=nan_at_zero))
    say(str(error.value))


def overflown_average(folder: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"]).square().mean() * 1e30

    model = nn.Linear(4, 1)
    state = TrainState(model, torch.optim.Adam(model.parameters()))
    list(train_steps(state, [{"x": torch.ones(2, 4)}], num_epochs=1, loss_fn=loss))


def nan_at_zero(model: nn.Module, batch: Any) -> Any:
    """A loss that is finite, with a gradient of NaN on a batch of zeros."""
    outputs = model(batch["x"])
    return outputs.square().mean() if batch["x"].any() else (outputs * 0).sqrt().mean()


def nan_logits(folder: Path) -> None:
    model = tiny_bert()
    nn.init.constant_(model.classifier.bias, math.nan)
    dataset = rows(text=["good", "bad"], label=[0, 1])
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["train"]
    predict_loop(model, loader, progress_bar=False)


def some_rows_draw(folder: Path) -> None:
    def transform(row: Any, generator: Any) -> Any:
        return {"x": row["x"] + (random.random() if row["x"] > 4 else 0)}

    dataset = rows(x=[float(number) for number in range(9)])
    list(prepare_dataloaders({"dev": dataset}, transform=transform, batch_size=4)["dev"])


def own_generator(folder: Path) -> None:
    own = random.Random(0)
    prepare_dataloaders(
        rows(x=[1.0, 2.0]), transform=lambda row, generator: {"x": row["x"] + own.random()}
    )


def random_loader(folder: Path) -> None:
    def collate(found: Any) -> Any:
        return {"x": torch.rand(len(found), 4)}

    evaluate_loop(nn.Linear(4, 1), DataLoader(Rows(), 4, collate_fn=collate), loss_fn=loss_fn)


def random_model(folder: Path) -> None:
    def noisy_loss(model: nn.Module, batch: Any) -> Any:
        return model(batch["x"] + torch.rand(())).square().mean()

    evaluate_loop(nn.Linear(4, 1), [{"x": torch.ones(2, 4)}], loss_fn=noisy_loss)


def left_alone(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    step_once(TrainState(model, SGD(model[1].parameters(), lr=0.1)), built(), 1)


def intervals_by_calls(folder: Path) -> None:
    evaluate_loop(*scored(), lambda p, r: float((p == r).mean()), confidence=0.95)


def loss_of_no_row(folder: Path) -> None:
    def smoothed(model: nn.Module, batch: Any) -> Any:
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)

    evaluate_loop(*scored(), loss_fn=smoothed, confidence=0.95)


def no_width(folder: Path) -> None:
    evaluate_loop(*scored(labels=[0] * 6), "f1", confidence=0.95)


def undefined_resamples(folder: Path) -> None:
    evaluate_loop(*scored(labels=[0, 0, 0, 0, 0, 1]), "roc_auc", confidence=0.95)


def scored(labels: Any = (0, 1, 0, 1, 0, 1)) -> tuple[Any, Any]:
    model = tiny_bert()
    nn.init.constant_(model.classifier.bias[:1], 1.0)  # else all losses are the logarithm of 2
    dataset = rows(text=["good", "bad movie"] * 3, label=list(labels))
    return model, prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["train"]


def sharded_loader(folder: Path) -> None:
    dataset = Rows()
    sampler = DistributedSampler(dataset, num_replicas=2, rank=0)
    unsharded(DataLoader(dataset, 2, sampler=sampler, drop_last=True))


def stream_without_numbers(folder: Path) -> None:
    model = tiny_bert()
    dataset = rows(8, text=["good"] * 8, label=[0] * 8)
    stream = dataset.to_iterable_dataset(num_shards=2)
    loader = prepare_dataloaders(stream, tiny_tokenizer(), model=model, num_workers=2)["train"]
    predict_loop(model, loader, progress_bar=False)


def transformed_by_workers(folder: Path) -> None:
    stream = rows(4, x=[[1.0]] * 4).to_iterable_dataset()
    with pytest.raises(ConfigError) as error:
        prepare_dataloaders(stream, transform=lambda row, generator: row, num_workers=1)
    say(str(error.value))


def ignored_nan(folder: Path) -> None:
    model = nn.Linear(4, 1)
    step_once(
        state := state_of(model),
        [{"x": torch.full((2, 4), torch.nan)}] * 2,
        1,
        on_nonfinite="ignore",
    )
    save_checkpoint(folder, state)


def beside_an_adapter(folder: Path) -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    model.base_model.model.classifier.requires_grad_(True)
    save_checkpoint(folder, state_of(model))


def another_reference(folder: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        reference = nn.Linear(4, 1)
        state = state_of(nn.Linear(4, 1))
        if seed == 2:
            load_checkpoint(folder, state)

        def loss_fn(model: nn.Module, batch: Any, reference: nn.Module = reference) -> Any:
            return (model(batch["x"]) - reference(batch["x"]).detach()).square().mean()

        step_once(state, [{"x": torch.ones(2, 4)}] * 2, seed, loss_fn=loss_fn)
        save_checkpoint(folder, state)


def longer_rows(folder: Path) -> None:
    tokenizer = tiny_tokenizer(eos_token="[SEP]")
    tokenizer.add_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], special_tokens=True)
    options = {"preprocess": cut(tokenizer, 40), "transform": fill_in_middle(tokenizer)}
    data = Dataset.from_dict({"text": ["good bad movie"] * 9})
    prepare_dataloaders(data, tokenizer, task="causal_lm", max_tokens=64, **options)


def longest_row(folder: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = llama(rope_scaling=rope, max_position_embeddings=8)
    evaluate_loop(model, [padded(rows_of((12, 5)))], "perplexity")


def mixed_padding(folder: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    model = FNetForSequenceClassification(FNetConfig(**sizes))
    data = {"test": rows(text=["a", "a good movie"], label=[0, 1])}
    prepare_dataloaders(data, tiny_tokenizer(), model=model)


def balanced_experts(folder: Path) -> None:
    model = of_kind("Mixtral", num_local_experts=2, output_router_logits=True).float()
    evaluate_loop(model, [padded(rows_of((6, 5)))], "perplexity")


class OfOneLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any = None) -> Any:
        logits = self.layer(input_ids.float())
        return {"loss": logits.mean(), "logits": logits}


def untried_padding(folder: Path, model: type[nn.Module] = OfOneLength) -> None:
    rows = torch.tensor([[0, 4, 5], [3, 4, 5]])
    batch = {"input_ids": rows, "labels": rows, "attention_mask": (rows > 0).long()}
    accumulate_gradients(model(), [batch])


def sharded_padding(folder: Path) -> None:
    untried_padding(folder, type("FSDPModule", (OfOneLength,), {}))


def lost_words(folder: Path) -> None:
    tokenizer = piece_tokenizer()
    data = Dataset.from_dict(tagged_words(6))
    preprocess = tag_words(tokenizer, max_length=8)
    prepare_dataloaders(data, tokenizer, preprocess=preprocess)


def padded_by_batch(folder: Path) -> None:
    tokenizer = piece_tokenizer()
    preprocess = answer_windows(tokenizer, max_length=40, stride=4, pad=False)
    prepare_dataloaders(Dataset.from_dict(questions(6)), tokenizer, preprocess=preprocess)


def lost_answers(folder: Path) -> None:
    tokenizer = piece_tokenizer()
    data = Dataset.from_dict(questions(40, none=0.0))
    preprocess = answer_windows(tokenizer, max_length=20, stride=0)
    prepare_dataloaders(data, tokenizer, preprocess=preprocess)


CHAT = [{"role": "user", "content": "2+2 is"}, {"role": "assistant", "content": "four."}]


def long_chat(folder: Path) -> None:
    tokenizer = tokenizer_for("chatml")
    data = Dataset.from_dict({"messages": [CHAT * 3]})
    prepare_dataloaders(data, tokenizer, preprocess=chat(tokenizer, max_length=20))


def dated_chat(folder: Path) -> None:
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
    data = Dataset.from_dict({"messages": [CHAT]})
    prepare_dataloaders(data, tokenizer, preprocess=chat(tokenizer))


def unprobed_pack(folder: Path) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, input_ids: Any, position_ids: Any, labels: Any) -> Any:
            return {"loss": self.weight * input_ids.sum()}

    row = torch.tensor([[3, 4, 5]])
    batch = {"input_ids": row, "labels": row, "position_ids": torch.tensor([[0, 1, 0]])}
    accumulate_gradients(Summed(), [batch])


def padded_images(folder: Path) -> None:
    own = processor("Detr", size={"shortest_edge": 32, "longest_edge": 64})
    prepare_dataloaders(scenes(2), own, model=tiny_detr(), transform=boxes())


def tracked(folder: Path, tracker: Any, num_steps: int = 4) -> None:
    model = nn.Linear(4, 1)
    train_loop(
        model,
        [{"x": torch.ones(2, 4)}] * 8,
        SGD(model.parameters(), lr=0.1),
        max_steps=num_steps,
        loss_fn=loss_fn,
        evaluate=lambda: {"answer": "yes"},
        checkpoint_dir=folder / "run",
        checkpoint_every=2,
        trackers=[tracker],
        progress_bar=False,
    )


def text_metric(folder: Path) -> None:
    tracked(folder, tensorboard(folder / "events"))


def failing_tracker(folder: Path) -> None:
    def send(record: Any) -> None:
        raise ConnectionError

    tracked(folder, send)


def damaged_newest(folder: Path) -> None:
    def show(record: Any) -> None:
        print(record)

    tracked(folder, show)
    (folder / "run" / "step-00000004" / "model.safetensors").unlink()
    tracked(folder, show)


def prepare_masks(mask: Any, own: Any) -> None:
    data = scenes(2).select_columns(["image"]).add_column("mask", [mask] * 2)
    transform = images_and_masks()
    prepare_dataloaders({"dev": data}, own, model=tiny_segformer(5), transform=transform)


def cropped_images(folder: Path) -> None:
    prepare_masks([[0] * 16 + [1] * 16] * 32, processor("MobileViT"))


def black_and_white(folder: Path) -> None:
    prepare_masks([[0] * 16 + [255] * 16] * 32, processor("Segformer"))


TOLD = {
    "a stream that draws without a state": drawing_stream,
    "a shuffle buffer": shuffle_buffer,
    "a sampler that draws as it goes": drawing_sampler,
    "batches as the workers finish them": any_order,
    "a generator that cannot be saved": unsaved_generator,
    "a generator that the checkpoint does not know": new_generator,
    "a generator shared with a loader that reads ahead": shared_generator,
    "a transform that draws at some rows alone": some_rows_draw,
    "a transform with a generator of its own": own_generator,
    "a loader that draws in an evaluation": random_loader,
    "a model that draws in evaluation mode": random_model,
    "an attribute that no checkpoint holds": unsaved_attribute,
    "weights and groups of the optimizer that are added or removed during the run": another_group,
    "the place of an iterator": second_loader,
    "a setting that the loop changes": changed_setting,
    "what the loop changes in its loader or its schedule": curriculum,
    "a list that is shuffled in place": shuffled_in_place,
    "a schedule that the loop steps itself": schedule_of_the_loop,
    "other surroundings": other_surroundings,
    "scored weights of a sharded model": sharded_average,
    "weights that PEFT does not read": beside_an_adapter,
    "another reference of a loss": another_reference,
    "weights in another memory order": other_memory,
    "items that nothing tells": untold_items,
    "a loss of a module of your own that is no mean over what is counted": weighted_inside,
    "batch normalisation under accumulation, or on several ranks": statistics,
    "an evaluation loss that nothing weighs": untold_evaluation,
    "a gradient of NaN with a finite loss": nan_gradient,
    "an optimizer's average that has overflowed": overflown_average,
    "running means after a batch of NaN": spoilt_means,
    "NaN logits": nan_logits,
    "weights that no optimizer updates": left_alone,
    "intervals by calls of a metric": intervals_by_calls,
    "a loss of rows that nothing tells": loss_of_no_row,
    "an interval without width": no_width,
    "resamples without a score": undefined_resamples,
    "a loader that was sharded by somebody else": sharded_loader,
    "rows that a transform makes longer": longer_rows,
    "padding on the left in a model that cannot be tried": untried_padding,
    "padding on the left in a sharded model": sharded_padding,
    "positions for the longest row of a batch": longest_row,
    "a model that mixes padding into its tokens": mixed_padding,
    "a loss that balances experts": balanced_experts,
    "words that are cut off": lost_words,
    "answers that no window holds whole": lost_answers,
    "windows padded by batch": padded_by_batch,
    "answers that do not fit": long_chat,
    "a chat template with today's date": dated_chat,
    "packed documents in a model that cannot be probed": unprobed_pack,
    "a stream that several processes read": stream_without_numbers,
    "a `transform` of a stream that workers read": transformed_by_workers,
    'weights of NaN that `on_nonfinite="ignore"` lets pass': ignored_nan,
    "images that are padded to the largest of their batch": padded_images,
    "metrics that are no numbers": text_metric,
    "a tracker that fails": failing_tracker,
    "records that a backend cannot take back": damaged_newest,
    "images that a processor crops": cropped_images,
    "masks of 0 and 255 alone": black_and_white,
}


@pytest.mark.skipif(not PAGE.exists(), reason="the installed wheel is tested without the checkout")
def test_every_limit_of_the_page_has_a_test():
    assert LIMITS.keys() == TOLD.keys()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.")  # read by peft
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_told(name, tmp_path, caplog):
    with caplog.at_level("INFO", logger="manualloop"):
        TOLD[name](tmp_path)
    assert LIMITS[name] in caplog.text
