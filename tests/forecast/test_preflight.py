"""preflight: it leaves no trace, and what it reports is true."""

import math
import re
from dataclasses import replace
from functools import partial
from threading import Thread

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import bert_config, messages, rows, tiny_bert, tiny_tokenizer, token_model
from mistakes import assert_same_bits, bits_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from manualloop import (
    ConfigError,
    DataError,
    ManualLoopError,
    PreflightReport,
    evaluate_loop,
    preflight,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
)
from manualloop.forecast.api import _notes
from manualloop.forecast.chance import Chance, doubt_about_start
from manualloop.forecast.doubts import doubts_about
from manualloop.forecast.splits import SplitSummary, summarize
from manualloop.notices import say
from manualloop.randomness import get_random_state, is_same_random_state
from manualloop.tasks import lm_loss
from manualloop.tasks.task import resolve_task

# Without a trace. -------------------------------------------------------------------------------


class Restless(nn.Module):
    """A model that everything changes: a forward pass draws, counts, averages and writes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)
        )
        self.codebook = nn.Parameter(torch.ones(2), requires_grad=False)
        self.mean = torch.zeros(2)  # no buffer
        self.seen = {"batches": 0, "last": torch.zeros(1)}
        self.noise = torch.Generator().manual_seed(3)
        self.layers[2].eval()  # as somebody may have set it

    def forward(self, x, labels):
        self.seen["batches"] += 1
        self.seen["last"] += x.mean()
        logits = self.layers(x + torch.randn(x.shape, generator=self.noise))
        with torch.no_grad():
            self.codebook.mul_(0.9).add_(logits.mean(0) + self.seen["batches"])
            self.mean.add_(logits.mean(0))
        loss = nn.functional.cross_entropy(logits + self.codebook + self.mean, labels)
        return {"loss": loss, "logits": logits}


class Augmented(torch.utils.data.Dataset):
    """Rows that draw from the global generators of torch and NumPy, and count how often."""

    def __init__(self):
        self.num_read = 0

    def __len__(self):
        return 22

    def __getitem__(self, row):
        self.num_read += 1
        x = torch.randn(3) + np.random.rand() + 0.1 * self.num_read
        return {"x": x.float(), "labels": torch.tensor(row % 2)}


class Stream(IterableDataset):
    """A stream that has a position and a generator of its own."""

    def __init__(self):
        self.rng, self.next = np.random.default_rng(1), 0

    def state_dict(self):
        return {"next": self.next, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.next, self.rng.bit_generator.state = state["next"], state["rng"]

    def __iter__(self):
        for number in range(self.next, 20):
            self.next = (number + 1) % 20
            x = torch.tensor(self.rng.normal(size=3), dtype=torch.float32)
            yield {"x": x, "labels": torch.tensor(number % 2)}


class Wandering:
    """A loss with weights of its own in a list, a counter and a tensor."""

    def __init__(self):
        self.history, self.scale = [], torch.ones(1)

    def __call__(self, model, batch):
        self.scale.mul_(1.01)
        self.history.append(float(self.scale))
        return model(**batch)["loss"] * self.scale.sum() * len(self.history)


def restless_run():
    torch.manual_seed(5)
    np.random.seed(5)
    return Restless(), DataLoader(Augmented(), batch_size=4, shuffle=True), {"num_epochs": 2}


def stream_run():
    torch.manual_seed(5)
    return Restless(), DataLoader(Stream(), batch_size=4), {"max_steps": 8}


def wandering_run():
    model, loader, length = restless_run()
    return model, loader, {**length, "loss_fn": Wandering(), "gradient_accumulation_steps": 3}


def bert_run():
    torch.manual_seed(5)
    model = tiny_bert()
    loaders = prepare_dataloaders(
        {"train": rows(15), "validation": rows(5)}, tiny_tokenizer(), model=model, batch_size=4
    )
    evaluate = partial(evaluate_loop, model, loaders["validation"], "accuracy")
    return model, loaders["train"], {"num_epochs": 1, "evaluate": evaluate}


def own_optimizer_run():
    """An optimizer that has made updates, gradients that are there, and a schedule."""
    model, loader, length = restless_run()
    optimizer = torch.optim.SGD(model.layers.parameters(), lr=0.1, momentum=0.9)
    train_loop(model, loader, optimizer, max_steps=2, progress_bar=False)
    return model, loader, {**length, "optimizer": optimizer, "max_grad_norm": 1.0}


RUNS = [restless_run, stream_run, wandering_run, bert_run, own_optimizer_run]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_a_run_after_a_preflight_has_the_bits_of_one_without(run):
    results = []
    for looks in (False, True):
        model, loader, options = run()
        if looks:
            before, random, grads = bits_of(model), get_random_state(), grads_of(model)
            modes = [module.training for module in model.modules()]
            for _ in range(2):
                preflight(model, {"train": loader, "other": loader}, **options)
            assert_same_bits(model, before)
            assert is_same_random_state(random, get_random_state())
            assert [id(p.grad) for p in model.parameters()] == [id(grad) for grad in grads]
            assert all(map(same_gradient, grads_of(model), grads))
            assert modes == [module.training for module in model.modules()]
        results.append((train_loop(model, loader, progress_bar=False, **options), model, loader))
    (plain, model, loader), (after, other, other_loader) = results
    assert plain.history == after.history
    assert_same_bits(other, bits_of(model))
    assert is_same_random_state(get_random_state(), get_random_state())
    if isinstance(model, Restless):
        assert torch.equal(model.mean, other.mean)
        assert model.seen["batches"] == other.seen["batches"]
    if isinstance(loader.dataset, Augmented):
        assert loader.dataset.num_read == other_loader.dataset.num_read


def grads_of(model):
    return [parameter.grad for parameter in model.parameters()]


def same_gradient(one, other):
    return one is other and (one is None or torch.equal(one, other))


def test_a_refusal_leaves_no_trace_either():
    class Failing(Restless):
        def forward(self, x, labels):
            super().forward(x, labels)
            raise RuntimeError("not today")

    torch.manual_seed(1)
    model, loader = Failing(), DataLoader(Augmented(), batch_size=4, shuffle=True)
    before, random = bits_of(model), get_random_state()
    with pytest.raises(RuntimeError, match="not today"):
        preflight(model, loader, num_epochs=1)
    assert_same_bits(model, before)
    assert is_same_random_state(random, get_random_state())
    assert model.seen["batches"] == loader.dataset.num_read == 0


def test_workers_and_their_iterator_stay_as_they_were():
    torch.manual_seed(5)
    loader = DataLoader(Augmented(), batch_size=4, num_workers=1, persistent_workers=True)
    first = [batch["x"] for batch in loader]
    iterator = loader._iterator
    preflight(Restless(), loader, num_epochs=1)
    assert loader._iterator is iterator
    assert len(list(loader)) == len(first)
    iterator._shutdown_workers()


# What is reported. ------------------------------------------------------------------------------


def prepared(model=None, train=40, **options):
    others = ["the plot was not fine " + "very " * number for number in range(9)]
    validation = rows(sentence=others, label=[number % 2 for number in range(9)])
    splits = {"train": rows(train), "validation": validation}
    return prepare_dataloaders(splits, tiny_tokenizer(), model=model, **options)


def test_the_report_of_a_classifier():
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    loaders = prepared(model, batch_size=4)
    report = preflight(
        model, loaders, num_epochs=3, gradient_accumulation_steps=2, checkpoint_dir="runs/none"
    )
    assert isinstance(report, PreflightReport)
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert report.parameters.num_all == sum(n for n, _ in numbers)
    assert report.parameters.num_trainable == sum(n for n, trained in numbers if trained)
    assert (report.num_steps, report.num_epochs, report.num_steps_per_epoch) == (15, 3, 5)
    assert report.rows_per_step == 8
    assert report.splits["train"].classes == {"0": 20, "1": 20}
    assert report.splits["validation"].classes == {"0": 5, "1": 4}
    assert report.splits["train"].num_cut == 0
    assert report.chance.loss == report.chance.of_shares == math.log(2)
    assert abs(report.loss - math.log(2)) < 0.05
    assert report.seconds[0] <= report.seconds[1]
    masks = [batch["attention_mask"] for batch in loaders["train"]]
    padding = 1 - sum(m.sum() for m in masks) / sum(m.numel() for m in masks)
    assert math.isclose(report.splits["train"].padding, padding, abs_tol=1e-6)
    widest = max(mask.numel() for mask in masks)
    assert report.largest.num_rows * report.largest.num_tokens == widest
    text = str(report)
    for part in (
        *("are frozen; float32", "15 in 3 epochs, 5 in an epoch, of 8 rows", "40 rows in 10"),
        *("0 20 (50%), 1 20 (50%)", "guessing gives 0.6931 (ln 2)", "AdamW at 5e-05, linear"),
    ):
        assert part in text, part
    assert "look at" not in text
    html = report._repr_html_()
    assert html.count("<tr>") == len(text.splitlines())
    assert "<b" not in html
    assert repr(report) == text


def test_the_size_of_a_checkpoint_is_that_on_disk(tmp_path):
    model, loaders = tiny_bert(hidden_size=64), None
    loaders = prepared(model)
    report = preflight(model, loaders, num_epochs=1, checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    result = train_loop(model, loaders["train"], num_epochs=1, checkpoint_dir=tmp_path)
    on_disk = sum(path.stat().st_size for path in result.last_checkpoint.glob("*.safetensors"))
    assert math.isclose(report.checkpoint_bytes, on_disk, rel_tol=0.1)
    moments = [v for of in result.state.optimizer.state.values() for v in of.values()]
    made = sum(v.numel() * v.element_size() for v in moments if v.ndim)
    assert report.optimizer_bytes == made
    assert (report.num_checkpoints, report.free_bytes > 0) == (3, True)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_that_an_optimizer_will_have(name):
    model = nn.Linear(20, 30)
    optimizer = OPTIMIZERS[name](model.parameters())
    loader = [{"x": torch.ones(4, 20)}]
    report = preflight(
        model, loader, optimizer, None, max_steps=1, loss_fn=lambda m, b: m(b["x"]).mean()
    )
    assert name == "Adagrad" or not optimizer.state  # whose state is made with it
    model(torch.ones(4, 20)).mean().backward()
    optimizer.step()
    made = sum(
        v.numel() * 4 for of in optimizer.state.values() for v in of.values()
        if isinstance(v, torch.Tensor) and (v.ndim or name == "Adagrad")
    )  # fmt: skip
    assert report.optimizer_bytes == made


def test_an_optimizer_of_ones_own_is_of_unknown_size(tmp_path):
    class Own(torch.optim.SGD):
        pass

    model = nn.Linear(2, 2)
    report = preflight(
        model,
        [{"x": torch.ones(4, 2)}],
        Own(model.parameters(), lr=0.1),
        max_steps=1,
        checkpoint_dir=tmp_path,
        loss_fn=lambda m, b: m(b["x"]).mean(),
    )
    assert report.optimizer_bytes is report.checkpoint_bytes is None
    assert "of a size that is not known before" in str(report)


def test_a_class_without_a_row_to_train_on_is_noted():
    train = rows(text=["good", "bad"] * 5, label=[0, 1] * 5)
    other = rows(text=["good", "fine"], label=[0, 2])
    loaders = prepare_dataloaders({"train": train, "test": other}, tiny_tokenizer())
    report = preflight(tiny_bert(3), loaders, num_epochs=1)
    (note,) = [note for note in report.notes if "classes" in note]
    assert "No row of train has the classes 2, which other splits have" in note
    assert "stratify_by_column" in note
    assert f"look at        {note}" in str(report)


def test_names_of_classes_and_their_shares():
    labels = ["ham"] * 9 + ["spam"]
    model = tiny_bert()
    loaders = prepare_dataloaders(
        rows(text=["good movie"] * 10, label=labels), tiny_tokenizer(), model=model
    )
    report = preflight(model, loaders, num_epochs=1)
    assert report.splits["train"].classes == {"ham": 9, "spam": 1}
    expected = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert math.isclose(report.chance.of_shares, expected)
    assert "ham 9 (90%), spam 1 (10%)" in str(report)
    assert "by the shares of the classes 0.3251" in str(report)


def test_a_regression_is_judged_by_the_variance_of_its_labels():
    model = tiny_bert(1)
    values = [10.0, 12.0, 14.0, 16.0]
    loaders = prepare_dataloaders(
        rows(text=["good", "bad", "fine", "dull"], label=values), tiny_tokenizer(), model=model
    )
    report = preflight(model, loaders, num_epochs=1)
    assert report.splits["train"].labels == (13.0, 5.0)
    assert report.chance == Chance(5.0, "the variance of the labels")
    (note,) = report.notes
    assert "their mean is 13. Train on standardised labels: (label - 13) / 2.24." in note


def test_language_models_and_tokens_have_a_chance():
    ids = {"input_ids": [[4, 5, 6, 7]] * 6, "labels": [[-100, 9, 8, -100]] * 6}
    model = tiny_bert(kind=BertForMaskedLM)
    loaders = prepare_dataloaders(rows(**ids), tiny_tokenizer(), model=model)
    assert preflight(model, loaders, num_epochs=1).chance.name == "ln 16"
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2))
    assert preflight(decoder, loaders, num_epochs=1, loss_fn=lm_loss).chance.name == "ln 16"
    tags = {"input_ids": [[4, 5, 6, 7]] * 6, "labels": [[-100, 0, 1, -100]] * 6}
    model = token_model()
    loaders = prepare_dataloaders(rows(**tags), tiny_tokenizer(), model=model)
    report = preflight(model, loaders, num_epochs=1)
    assert report.chance.name == "ln 2"
    assert report.splits["train"].classes == {"0": 6, "1": 6}


def test_multi_label_rows_are_counted_by_class():
    model = tiny_bert(3, problem_type="multi_label_classification")
    labels = [[1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    loaders = prepare_dataloaders(
        rows(text=["good", "bad", "fine", "dull"], labels=labels), tiny_tokenizer(), model=model
    )
    report = preflight(model, loaders, num_epochs=1)
    assert report.splits["train"].classes == {"0": 3, "1": 0, "2": 2}
    assert "The model has classes of which train has no row: 1." in report.notes


def test_padding_to_a_multiple_is_counted():
    loaders = prepare_dataloaders(
        rows(42), tiny_tokenizer(), batch_size=2, pad_to_multiple_of=16, keep="sentence"
    )
    masks = [batch["attention_mask"] for batch in loaders["train"]]
    share = 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks)
    report = preflight(tiny_bert(), loaders, num_epochs=1)
    assert report.splits["train"].padding == pytest.approx(share.item(), abs=1e-6)
    assert share > 0.6


def test_padding_of_an_encoder_is_counted_without_the_targets():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 20, (2, 21))
    ids, labels = ([draw.integers(4, 16, n).tolist() for n in side] for side in lengths)
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    loaders = prepare_dataloaders({"train": data}, tiny_tokenizer(), model=model)
    masks = [batch["attention_mask"] for batch in loaders["train"]]
    share = 1 - sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks)
    report = preflight(model, loaders, num_epochs=1)
    assert report.splits["train"].padding == pytest.approx(share.item(), abs=1e-6)


def test_truncated_texts_are_counted():
    model = tiny_bert()
    loaders = prepare_dataloaders(
        rows(text=["good " * 20, "bad", "fine", "dull"], label=[0, 1, 0, 1]),
        tiny_tokenizer(),
        model=model,
        max_length=8,
    )
    text = str(preflight(model, loaders, num_epochs=1))
    assert "25% of the texts cut off at 8 tokens" in text


def test_rows_of_other_splits_that_are_trained_on_are_counted():
    others = rows(sentence=["good", "the plot was dull", "a", "good"], label=[0, 1, 0, 1])
    loaders = prepare_dataloaders({"train": rows(40), "test": others}, tiny_tokenizer())
    known = set(rows(40)["sentence"][:])
    number = sum(text in known for text in others["sentence"][:])
    assert number in (2, 3)
    report = preflight(tiny_bert(), loaders, num_epochs=1)
    assert report.splits["test"].num_in_train == number
    assert f"{number} rows of test ({25 * number}%) have the tokens of a row of train" in str(
        report
    )


def test_parameters_without_gradient_in_no_optimizer_and_shared():
    model = tiny_bert(kind=BertForPreTraining)
    batch = {
        "input_ids": torch.tensor([[4, 5, 6]]),
        "labels": torch.tensor([[-100, 9, -100]]),
        "next_sentence_label": torch.tensor([0]),
    }
    optimizer = prepare_optimizer(model, param_groups=[{"params": [*model.bert.parameters()]}])
    report = preflight(model, [batch], optimizer, num_epochs=1)
    embeddings = model.bert.embeddings.word_embeddings.weight
    assert report.parameters.num_shared >= embeddings.numel()
    assert "cls.seq_relationship.weight" in report.parameters.left_alone
    assert any(note.startswith("no optimizer updates") for note in report.notes)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

    loss = {"loss_fn": lambda model, batch: model.used(batch["x"]).mean()}
    report = preflight(Half(), [{"x": torch.ones(3, 2)}], num_epochs=1, **loss)
    assert report.without_gradient == ("unused.weight", "unused.bias")
    assert "2 trainable parameters got no gradient, the first of them unused.weight" in str(report)


def test_doubts_about_a_start():
    train = SplitSummary(4, 1)
    assert doubt_about_start(0.7, Chance(0.69, "ln 2"), train) is None
    assert "far above the 0.693 of guessing (ln 2)" in doubt_about_start(
        5.0, Chance(math.log(2), "ln 2"), train
    )
    assert "is nan: train_loop would stop" in doubt_about_start(math.nan, None, train)


def test_too_little_disk_is_noted(tmp_path):
    model = tiny_bert()
    report = preflight(model, prepared(model), num_epochs=1, checkpoint_dir=tmp_path)
    assert list(doubts_about(report)) == []
    (note,) = doubts_about(replace(report, free_bytes=1000))
    assert note.startswith("Checkpoints need ")
    assert note.endswith("and 1.0 kB are free. Free some space, or keep fewer: keep_checkpoints=1.")


def test_any_batches_with_a_loss_of_ones_own():
    x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    model = nn.Linear(3, 2)

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    report = preflight(model, loader, num_epochs=2, loss_fn=loss_fn)
    assert (report.num_steps, report.chance, report.largest.num_rows) == (6, None, 8)
    assert math.isclose(report.loss, loss_fn(model, (x, y)).item(), rel_tol=1e-5)
    assert report.splits["train"] == SplitSummary(20, 3)
    listed = preflight(model, [*loader][:1], num_epochs=2, loss_fn=loss_fn)
    assert re.search("^train +1 batch$", str(listed), re.M)  # which is no stream
    assert "  1 row in 1 batch, " in str(replace(report, splits={"train": SplitSummary(1, 1, 0)}))
    slow = replace(report, largest=report.largest._replace(seconds=123.4))
    assert "8 rows: 2 min;" in str(slow)


def test_a_step_fn_is_not_called():
    def step_fn(state, batches, strategy):
        raise AssertionError

    report = preflight(tiny_bert(), prepared(), num_epochs=1, step_fn=step_fn)
    assert report.loss is report.seconds is report.largest is None
    assert report.splits["train"].num_rows == 40


def test_all_arguments_of_train_loop_are_taken_and_checked():
    model = tiny_bert()
    loaders = prepared(model)
    others = {"log_every": 5, "progress_bar": False, "checkpoint_every": "epoch"}
    assert preflight(model, loaders, num_epochs=1, **others).num_steps == 5
    with pytest.raises(ConfigError, match=r"no num_epoch=.* Did you mean num_epochs=\?"):
        preflight(model, loaders, num_epoch=1)
    for name in ("lr", "learning_rate"):
        with pytest.raises(ConfigError, match=r"optimizer=prepare_optimizer\(model, lr=0\.001\)"):
            preflight(model, loaders, num_epochs=1, **{name: 1e-3})
    with pytest.raises(ConfigError) as refused:
        preflight(model, loaders, num_epochs=0, keep_checkpoints=0, patience=2)
    assert len(str(refused.value).splitlines()) == 3
    with pytest.raises(ConfigError) as refused:
        preflight(model, loaders, evaluate_every="often", max_time="long", trackers=5)
    assert len(str(refused.value).splitlines()) == 3
    with pytest.raises(ConfigError, match="evaluate returned no 'f2'"):
        evaluate = partial(evaluate_loop, model, loaders["validation"], "accuracy")
        preflight(model, loaders, num_epochs=1, evaluate=evaluate, best_metric="f2")
    with pytest.raises(DataError, match="No split begins with train: validation"):
        preflight(model, {"validation": loaders["validation"]})


def test_what_is_noted_is_still_logged_when_it_is_refused(caplog):
    model = tiny_bert().bfloat16()
    with pytest.raises(ManualLoopError):
        preflight(model, prepared(), loss_fn=lambda model, batch: torch.zeros(1))
    assert "are bfloat16: small updates are rounded away" in caplog.text
    caplog.clear()
    report = preflight(model, prepared())
    assert "are bfloat16" in report.notes[0]
    assert not [r for r in caplog.records if "bfloat16" in r.getMessage()]


def test_lines_of_a_run_in_another_thread_are_logged(caplog):
    with _notes() as lines:
        other = Thread(target=say, args=("of another run",))
        other.start()
        other.join()
        say("of this one")
    assert lines == ["of this one"]
    assert messages(caplog) == ["of another run"]


def test_classes_of_tables_and_of_batches_are_counted_alike():
    targets = [[1, 0, 1], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    ids = [[5, 6]] * 4
    table = Dataset.from_dict({"input_ids": ids, "labels": targets}).with_format("torch")
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(targets)}]
    names, model = ("a", "b", "c", "d"), tiny_bert(3)
    model.config.problem_type = "multi_label_classification"
    task = resolve_task(model, rows[0])
    for loader in (DataLoader(table, 2), rows):
        found = summarize(loader, names, None, rows, task)
        assert found.classes == {"a": 3, "b": 0, "c": 3, "d": 0}
        assert found.num_counted == 4


def test_the_model_of_a_config_is_left_as_it_is():
    model = tiny_bert(3)
    config = bert_config(num_labels=3).to_dict()
    preflight(model, prepared(), num_epochs=1)
    assert model.config.problem_type is None
    assert model.config.to_dict() == config | {"architectures": None}
