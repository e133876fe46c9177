"""Evaluation: the same numbers however rows are batched, and nothing else is changed by it."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import IterableDataset
from helpers import rows, tiny_bert, tiny_tokenizer
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers import BertForTokenClassification

from manualloop import (
    DataError,
    ModelError,
    SingleDevice,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
)

NUM_ROWS = 100
SIZES = [1, 7, 64]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and most of all on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_rows(label: Callable[[int, int], Tensor], num_rows: int = NUM_ROWS) -> list[Any]:
    """Rows of 2 to 12 tokens; ``label(row, length)`` makes the labels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(num_rows):
        length = 2 + (number * 7) % 11
        ids = torch.randint(4, 16, (length,), generator=generator)
        made.append({"input_ids": ids, "labels": label(number, length)})
    return made


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = pad_sequence([row["input_ids"] for row in batch], batch_first=True)
    made = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if "labels" in batch[0]:
        labels = [row["labels"] for row in batch]
        ragged = labels[0].ndim == 1 and not labels[0].is_floating_point()
        made["labels"] = (
            pad_sequence(labels, batch_first=True, padding_value=-100)
            if ragged
            else torch.stack(labels)
        )
    return made


def load(data: list[Any], batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size, collate_fn=collate, **options)  # type: ignore[arg-type]


def by_class(number: int, length: int) -> Tensor:
    return torch.tensor(number % 3)


def by_token(number: int, length: int) -> Tensor:
    """The first and the last token have no label; some rows have many that do not count."""
    labels = (torch.arange(length) + number) % 3
    labels[0] = labels[-1] = -100
    if number % 4 == 0:
        labels[2:] = -100
    return labels


def logits_by_row(model: nn.Module, data: list[Any]) -> list[Tensor]:
    """Each row alone through the model: the reference of everything here."""
    model.eval()
    with torch.no_grad():
        return [model(**collate([{"input_ids": row["input_ids"]}])).logits[0] for row in data]


class Wide(nn.Module):
    """Logits that are wide enough to be missed if somebody keeps them."""

    def __init__(self, width: int = 1000) -> None:
        super().__init__()
        self.linear = nn.Linear(1, width)
        self.logits: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.alive.append(sum(ref() is not None for ref in self.logits))
        logits = self.linear(x)
        self.logits.append(weakref.ref(logits))
        return {"logits": logits, "loss": logits.mean()}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)
        self.num_calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.num_calls += 1
        return {"logits": self.linear(x)}


# The numbers --------------------------------------------------------------------------------------


def test_sequence_classification_does_not_depend_on_the_batch_size() -> None:
    model, data = tiny_bert(num_labels=3), make_rows(by_class)
    results = [evaluate_loop(model, load(data, size), ["accuracy", "f1/macro"]) for size in SIZES]
    logits = torch.stack(logits_by_row(model, data))
    labels = torch.stack([row["labels"] for row in data])
    assert len(logits.argmax(-1).unique()) > 1  # else batching could not show
    for result in results:
        assert list(result) == ["loss", "accuracy", "f1_macro"]
        assert all(type(value) is float for value in result.values())
        assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
        assert result["accuracy"] == (logits.argmax(-1) == labels).double().mean().item()
    assert results[0]["f1_macro"] == results[1]["f1_macro"] == results[2]["f1_macro"]


def test_token_classification_is_a_mean_over_tokens_not_of_means() -> None:
    model = tiny_bert(num_labels=3, kind=BertForTokenClassification)
    data = make_rows(by_token)
    logits = torch.cat(logits_by_row(model, data))
    labels = torch.cat([row["labels"] for row in data])
    kept = labels != -100
    total = F.cross_entropy(logits, labels, reduction="sum").item()
    with torch.no_grad():
        means = [model(**batch).loss.item() for batch in load(data, 7)]
    expected = total / int(kept.sum())
    assert abs(sum(means) / len(means) - expected) > 1e-4 * expected  # the usual bug would show
    for size in SIZES:
        result = evaluate_loop(model, load(data, size), "accuracy")
        assert result["loss"] == pytest.approx(expected, rel=1e-6)
        correct = logits[kept].argmax(-1) == labels[kept]
        assert result["accuracy"] == correct.double().mean().item()


def test_multi_label() -> None:
    model = tiny_bert(num_labels=4, problem_type="multi_label_classification")
    model.classifier.weight.data.mul_(50)  # so that some scores are above 0.5, some below
    data = make_rows(
        lambda number, length: torch.tensor([float(number >> bit & 1) for bit in range(4)])
    )
    logits = torch.stack(logits_by_row(model, data))
    labels = torch.stack([row["labels"] for row in data])
    predicted = (logits.sigmoid() > 0.5).int()
    assert 0 < predicted.double().mean() < 1
    loss = F.binary_cross_entropy_with_logits(logits, labels).item()
    f1 = f1_score(labels.int().numpy(), predicted.numpy(), average="macro", zero_division=0)
    for size in SIZES:
        result = evaluate_loop(model, load(data, size), "f1/macro")
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["f1_macro"] == pytest.approx(f1, abs=1e-12)
    table = predict_loop(model, load(data, 7))
    assert table.predictions.tolist() == predicted.tolist()
    np.testing.assert_allclose(table.scores, logits.sigmoid().numpy(), atol=1e-6)


def test_regression() -> None:
    model = tiny_bert(num_labels=1)
    data = make_rows(lambda number, length: torch.tensor(number / 10))
    values = torch.cat(logits_by_row(model, data))
    labels = torch.stack([row["labels"] for row in data])
    loss = F.mse_loss(values, labels).item()
    for size in SIZES:  # 100 = 14 * 7 + 2 = 64 + 36: the last batch is another size
        result = evaluate_loop(model, load(data, size), ["mse", "pearson"])
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        assert result["mse"] == pytest.approx(loss, rel=1e-6)
        expected = np.corrcoef(values, labels)[0, 1]
        assert result["pearson"] == pytest.approx(expected, abs=1e-6)


def test_a_causal_model_is_scored_on_the_next_token() -> None:
    class EchoForCausalLM(nn.Module):
        """Predicts that every token comes again."""

        def forward(self, input_ids: Tensor, labels: Tensor, **other: Tensor) -> dict[str, Tensor]:
            logits = F.one_hot(input_ids, 9).float()
            shifted = logits[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1)
            return {"logits": logits, "loss": F.cross_entropy(*shifted)}

    ids = torch.tensor([[5, 5, 6, 6, 7], [8, 8, 8, 8, 8]])
    labels = ids.masked_fill(torch.tensor([[False] * 5, [False] * 3 + [True] * 2]), -100)
    batch = {"input_ids": ids, "labels": labels}
    # Of the next tokens 5, 6, 6, 7 and 8, 8 four are the token itself.
    assert evaluate_loop(EchoForCausalLM(), [batch], "accuracy")["accuracy"] == 4 / 6
    batch["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=-100)
    batch["labels"] = torch.zeros_like(labels)  # these do not count then
    assert evaluate_loop(EchoForCausalLM(), [batch], "accuracy")["accuracy"] == 4 / 6


def test_rows_labelled_minus_100_count_neither_in_the_loss_nor_in_the_metric() -> None:
    model = tiny_bert(num_labels=3)
    data = make_rows(lambda n, length: torch.tensor(-100 if n % 5 == 0 or n < 16 else n % 3))
    kept = [row for row in data if row["labels"] != -100]
    result = evaluate_loop(model, load(data), "accuracy")  # the first two batches are all -100
    assert result == pytest.approx(evaluate_loop(model, load(kept), "accuracy"), rel=1e-6)


def test_the_numbers_of_bf16_are_those_of_the_hand_written_autocast_loop() -> None:
    model, data = tiny_bert(num_labels=3), make_rows(by_class)
    model.eval()
    total, num_correct = 0.0, 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in load(data):
            outputs = model(**batch)
            total += outputs.loss.item() * len(batch["labels"])
            num_correct += int((outputs.logits.argmax(-1) == batch["labels"]).sum())
    result = evaluate_loop(
        model, load(data), "accuracy", strategy=SingleDevice(mixed_precision="bf16")
    )
    assert result["loss"] == pytest.approx(total / NUM_ROWS, rel=1e-12)
    assert result["accuracy"] == num_correct / NUM_ROWS


# loss_fn, postprocess, metric ---------------------------------------------------------------------


def xy(num_rows: int = 10, batch_size: int = 4) -> list[dict[str, Tensor]]:
    x = torch.arange(num_rows, dtype=torch.float32)[:, None]
    labels = torch.arange(num_rows) % 2
    return [
        {"x": x[i : i + batch_size], "labels": labels[i : i + batch_size]}
        for i in range(0, num_rows, batch_size)
    ]


@pytest.mark.parametrize("with_count", [False, True])
def test_loss_fn_makes_the_only_forward_pass(with_count: bool) -> None:
    model = Counting()

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        mean = F.cross_entropy(model(batch["x"])["logits"], batch["labels"])
        return (mean, torch.tensor(len(batch["x"]))) if with_count else mean

    result = evaluate_loop(model, xy(), "accuracy", loss_fn=loss_fn)
    assert model.num_calls == 3
    whole = xy(batch_size=10)[0]
    logits = model(whole["x"])["logits"]
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, whole["labels"]).item())
    correct = logits.argmax(-1) == whole["labels"]
    assert result["accuracy"] == correct.double().mean().item()
    assert not model._forward_hooks


def test_a_loss_fn_weighs_by_the_items_it_counts() -> None:
    counts = iter([1, 0, 3])
    means = iter([5.0, float("nan"), 1.0])

    def loss_fn(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return torch.tensor(next(means)), next(counts)

    assert evaluate_loop(Counting(), xy(), loss_fn=loss_fn) == {"loss": 2.0}


def test_hooks_of_a_failing_loss_fn_are_removed() -> None:
    model = Counting()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        evaluate_loop(model, xy(), loss_fn=loss_fn)
    assert not model._forward_hooks


def test_postprocess_makes_the_predictions() -> None:
    def always_one(outputs: Any, batch: Any) -> Tensor:
        assert outputs["logits"].shape == (len(batch["x"]), 2)
        return torch.ones(len(batch["x"]), dtype=torch.long)

    assert evaluate_loop(Counting(), xy(), "accuracy", postprocess=always_one) == {"accuracy": 0.5}
    table = predict_loop(Counting(), xy(), postprocess=always_one)
    assert table.predictions.tolist() == [1] * 10
    assert table.scores is None


def test_forms_of_a_metric() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    model = Counting()
    with torch.no_grad():
        predicted = torch.cat([model(batch["x"])["logits"] for batch in xy()]).argmax(-1).numpy()
    references = np.arange(10) % 2
    accuracy = (predicted == references).mean()

    class Module:  # what `evaluate.load` returns
        name = "module"

        def __init__(self) -> None:
            self.correct: list[Any] = []

        def add_batch(self, *, predictions: Any, references: Any) -> None:
            self.correct += list(np.asarray(predictions) == np.asarray(references))

        def compute(self) -> dict[str, float]:
            return {"accuracy": float(np.mean(self.correct))}

    def own(predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": (predictions == references).mean()}

    torch_metric = torchmetrics.Accuracy(task="binary")
    for metric in ("accuracy", Module(), own):
        assert evaluate_loop(model, xy(), metric) == {"accuracy": accuracy}
    for _ in range(2):  # it can be used again, here and in a loop of one's own
        result = evaluate_loop(model, xy(), torch_metric)
        assert result == {"binary_accuracy": pytest.approx(accuracy)}
        torch_metric.update(torch.tensor([1]), torch.tensor([1]))
    several = evaluate_loop(model, xy(), ["accuracy", torch_metric])
    assert several == {"accuracy": accuracy, "binary_accuracy": pytest.approx(accuracy)}


def test_a_metric_needs_no_loss() -> None:
    assert list(evaluate_loop(Counting(), xy(), "accuracy")) == ["accuracy"]


# What must stay as it was -------------------------------------------------------------------------


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def failing(loader: Any, after: int) -> Iterator[Any]:
    yield from itertools.islice(loader, after)
    raise ConnectionError("the disk is gone")


def test_modes_are_put_back() -> None:
    model, loader = tiny_bert(num_labels=3), load(make_rows(by_class))
    model.train()
    model.bert.encoder.eval()
    before, during = modes(model), []
    model.register_forward_hook(lambda module, *args: during.extend(modes(module).values()))
    evaluate_loop(model, loader)
    assert modes(model) == before
    predict_loop(model, loader)
    assert modes(model) == before
    assert during
    assert not any(during)
    for loop in (evaluate_loop, predict_loop):
        with pytest.raises(ConnectionError):
            loop(model, failing(loader, after=2))
        assert modes(model) == before
    assert len(set(before.values())) == 2
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_gradients_are_left_alone() -> None:
    model, loader = tiny_bert(num_labels=3), load(make_rows(by_class))
    model.bert.embeddings.requires_grad_(False)
    model(**next(iter(loader))).loss.backward()
    before = {
        name: (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone(), p._version)
        for name, p in model.named_parameters()
    }
    assert any(grad is not None for _, grad, *_ in before.values())
    evaluate_loop(model, loader, "accuracy")
    predict_loop(model, loader)
    for name, parameter in model.named_parameters():
        requires_grad, grad, values, version = before[name]
        assert parameter.requires_grad is requires_grad
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, values)
        assert parameter._version == version
        assert not parameter.is_inference()


def test_it_runs_without_gradients_and_not_in_inference_mode() -> None:
    seen = []

    def postprocess(outputs: Any, batch: Any) -> Tensor:
        seen.append(not outputs["logits"].requires_grad and not outputs["logits"].is_inference())
        return outputs["logits"].argmax(-1)

    evaluate_loop(Counting(), xy(), "accuracy", postprocess=postprocess)
    predict_loop(Counting(), xy(), postprocess=postprocess)
    assert seen == [True] * 6


class Drawing(torch.utils.data.Dataset[Any]):
    """Augments: draws from every generator there is."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = random.random() + np.random.rand() + torch.rand(1)
        return {"x": noise.float(), "labels": torch.tensor(index % 2)}


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def test_random_states_are_left_alone() -> None:
    loader = DataLoader(Drawing(), batch_size=4, shuffle=True)
    model = Counting()
    before = random_states()
    evaluate_loop(model, loader, "accuracy")
    predict_loop(model, DataLoader(Drawing(), batch_size=4))
    with pytest.raises(ConnectionError):
        evaluate_loop(model, failing(loader, after=2), "accuracy")
    assert random_states() == before
    next(iter(loader))
    assert random_states() != before  # it would have shown


@pytest.fixture
def _few_objects() -> Iterator[None]:
    """Hide what is there already, so that ``live_bytes`` need not look at it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """The memory of all tensors that Python can see."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_no_logits_are_kept() -> None:
    batches = xy(num_rows=40, batch_size=4)
    for loop in (evaluate_loop, predict_loop):
        model = Wide()
        loop(model, batches)
        evaluate = [] if loop is predict_loop else ["accuracy"]
        loop(model, batches, *evaluate)
        num_tried = 3 if loop is evaluate_loop else 0  # a batch and its halves: the loss is unknown
        assert model.alive == [0] * (20 + num_tried)  # not even those of the batch before
        assert not any(ref() is not None for ref in model.logits)


@pytest.mark.usefixtures("_few_objects")
@pytest.mark.parametrize("loop", ["evaluate", "predict", "predict a view"])
def test_memory_does_not_grow_with_the_batches(loop: str) -> None:
    def peak(num_batches: int) -> int:
        model = Wide(width=4 if loop == "predict" else 10_000)
        batches = xy(num_rows=4 * num_batches)
        before, seen = live_bytes(), [0]

        def look(*args: Any) -> None:
            if len(model.alive) in (2, num_batches):
                seen.append(live_bytes() - before)

        model.register_forward_hook(look)
        if loop == "evaluate":
            evaluate_loop(model, batches, "accuracy")
        elif loop == "predict":
            predict_loop(model, batches)
        else:  # what remains of the outputs is one number a row, but a view of all of them
            predict_loop(model, batches, postprocess=lambda outputs, batch: outputs["logits"][:, 0])
        assert len(seen) == 3
        return max(seen)

    few, many = peak(4), peak(40)
    assert many - few <= 36 * 4 * 64  # bytes a row that predictions take; logits: 40 000


# predict_loop -------------------------------------------------------------------------------------


def test_predictions_come_in_the_order_of_the_dataset() -> None:
    class Parity(nn.Module):
        """A class that depends on the row, and not on the padding."""

        def forward(self, input_ids: Tensor, **other: Tensor) -> dict[str, Tensor]:
            return {"logits": F.one_hot(input_ids.sum(-1) % 2, 2).float()}

    model = Parity()
    loaders = prepare_dataloaders(
        {"train": rows(23), "validation": rows(23)}, tiny_tokenizer(), batch_size=4
    )
    sampler: Any = loaders["train"].batch_sampler
    sampler.set_epoch(3)
    assert sampler.rows() != sorted(sampler.rows())
    shuffled = predict_loop(model, loaders["train"])
    straight = predict_loop(model, loaders["validation"])
    assert shuffled.index.tolist() == straight.index.tolist() == list(range(23))
    assert shuffled.index.dtype == np.int64
    assert shuffled.references is not None
    assert shuffled.references.tolist() == [number % 2 for number in range(23)]
    assert shuffled.predictions.tolist() == straight.predictions.tolist()
    unsorted = shuffled.predictions[sampler.rows()]
    assert shuffled.predictions.tolist() != unsorted.tolist()  # else the order could not show
    assert shuffled.scores is not None
    assert straight.scores is not None
    np.testing.assert_allclose(shuffled.scores, straight.scores, rtol=1e-6)
    np.testing.assert_allclose(shuffled.scores.sum(axis=1), 1, rtol=1e-6)
    assert (shuffled.scores.argmax(axis=1) == shuffled.predictions).all()
    assert shuffled.scores.dtype == np.float32
    assert len(shuffled) == 23


def test_dropped_rows_have_no_prediction() -> None:
    loaders = prepare_dataloaders(rows(10), tiny_tokenizer(), batch_size=4, drop_last=True)
    table = predict_loop(tiny_bert(), loaders["train"])
    sampler: Any = loaders["train"].batch_sampler
    assert table.index.tolist() == sorted(sampler.rows())
    assert len(table) == 8
    assert table.references is not None
    assert table.references.tolist() == [number % 2 for number in table.index]


@pytest.mark.parametrize("kind", ["shuffle", "batches", "subset", "weighted", "list"])
def test_an_order_that_cannot_be_undone_is_refused(kind: str) -> None:
    data = make_rows(by_class, 12)
    options: dict[str, Any] = {
        "shuffle": {"batch_size": 4, "shuffle": True},
        "batches": {"batch_sampler": BatchSampler(RandomSampler(data), 4, False)},
        "subset": {"batch_size": 4, "sampler": SubsetRandomSampler(range(12))},
        "weighted": {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * 12, 12)},
        "list": {"batch_size": 4, "sampler": [3, 2, 1, 0]},
    }[kind]
    loader: Any = DataLoader(data, collate_fn=collate, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="order") as caught:
        predict_loop(tiny_bert(num_labels=3), loader)
    assert "shuffle=False" in str(caught.value)
    evaluate_loop(tiny_bert(num_labels=3), loader)  # where order does not matter


@pytest.mark.parametrize("kind", ["loader", "unbatched", "stream", "list", "generator"])
def test_orders_that_are_taken_as_they_are(kind: str) -> None:
    model = Counting()
    data = [{"x": torch.tensor([float(number)])} for number in range(10)]
    stream = IterableDataset.from_generator(lambda: iter([{"x": [float(n)]} for n in range(10)]))
    whole = {"x": torch.arange(10.0)[:, None]}
    loader: Any = {
        "loader": lambda: DataLoader(data, batch_size=4),  # type: ignore[arg-type]
        "unbatched": lambda: DataLoader([whole], batch_size=None),  # type: ignore[arg-type]
        "stream": lambda: DataLoader(stream.with_format("torch"), batch_size=4),
        "list": lambda: [whole],
        "generator": lambda: iter([whole]),
    }[kind]()
    table = predict_loop(model, loader)
    assert table.index.tolist() == list(range(10))
    assert table.references is None
    with torch.no_grad():
        expected = model(whole["x"])["logits"].softmax(-1).numpy()
    np.testing.assert_allclose(table.scores, expected, rtol=1e-6)


def test_tokens_of_ragged_batches_are_padded_with_minus_100() -> None:
    model = tiny_bert(num_labels=3, kind=BertForTokenClassification)
    data = make_rows(by_token, 20)
    table = predict_loop(model, load(data, 3))
    assert table.scores is None
    assert table.references is not None
    widest = max(len(row["labels"]) for row in data)
    assert table.predictions.shape == table.references.shape == (20, widest)
    for number, (row, logits) in enumerate(zip(data, logits_by_row(model, data), strict=True)):
        length = len(row["labels"])
        assert table.predictions[number, :length].tolist() == logits.argmax(-1).tolist()
        assert table.references[number, :length].tolist() == row["labels"].tolist()
        assert (table.references[number, length:] == -100).all()


def test_predictions_in_bfloat16_become_float32() -> None:
    model = tiny_bert(num_labels=1)
    data = make_rows(lambda number, length: torch.tensor(0.5), 10)
    table = predict_loop(model, load(data), strategy=SingleDevice(mixed_precision="bf16"))
    assert table.predictions.dtype == np.float32
    exact = torch.cat(logits_by_row(model, data)).numpy()
    np.testing.assert_allclose(table.predictions, exact, atol=0.02)


def test_predictions_that_are_not_one_a_row_are_refused() -> None:
    with pytest.raises(DataError, match="8 predictions for a batch of 4 rows"):
        predict_loop(
            Counting(), xy(), postprocess=lambda outputs, batch: outputs["logits"].reshape(-1)
        )


# The strategy -------------------------------------------------------------------------------------


def test_an_unprepared_model_is_moved() -> None:
    class Recording(SingleDevice):
        def __init__(self) -> None:
            super().__init__("cpu")
            self.models: list[nn.Module] = []

        def prepare_model(self, model: nn.Module) -> nn.Module:
            self.models.append(model)
            return super().prepare_model(model)

    strategy, model = Recording(), Counting()
    evaluate_loop(model, xy(), "accuracy", strategy=strategy)
    predict_loop(model, xy())
    assert strategy.models == [model, model]  # it was found again


def test_a_model_that_has_been_moved_since_is_moved_back() -> None:
    strategy, model = SingleDevice("meta"), nn.Linear(2, 2)
    assert strategy.prepare_model(model) is model
    assert model.weight.device.type == "meta"
    model.to_empty(device="cpu")
    strategy.prepare_model(model)
    assert model.weight.device.type == "meta"


def test_the_precision_of_the_strategy_that_prepared_the_model_is_used() -> None:
    dtypes = []
    model = Counting()
    model.linear.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    evaluate_loop(model, xy(batch_size=10), "accuracy")
    SingleDevice(mixed_precision="bf16").prepare_model(model)
    gc.collect()  # nobody else holds the strategy
    evaluate_loop(model, xy(batch_size=10), "accuracy")
    predict_loop(model, xy(batch_size=10))
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]


# Mistakes -----------------------------------------------------------------------------------------


def test_an_empty_loader() -> None:
    for loop in (evaluate_loop, predict_loop):
        with pytest.raises(DataError, match="0 batches"):
            loop(Counting(), [])
        read = iter(xy())
        list(read)
        with pytest.raises(DataError, match="generator"):
            loop(Counting(), read)


def test_a_metric_without_labels() -> None:
    with pytest.raises(DataError, match="needs labels: the batch has only x"):
        evaluate_loop(Counting(), [{"x": torch.ones(2, 1)}], "accuracy")
    with pytest.raises(DataError, match="needs labels: the batch has only list"):
        evaluate_loop(
            Counting(),
            [[torch.ones(2, 1), torch.ones(2)]],
            "accuracy",
            loss_fn=lambda model, batch: model(batch[0])["logits"].mean(),
        )


def test_neither_loss_nor_metric() -> None:
    with pytest.raises(ModelError, match="loss_fn"):
        evaluate_loop(nn.Linear(1, 1), [{"input": torch.ones(2, 1), "labels": torch.ones(2)}], None)
    data = [{"input_ids": row["input_ids"]} for row in make_rows(by_class, 4)]
    with pytest.raises(DataError, match="predict_loop"):
        evaluate_loop(tiny_bert(), load(data))


def test_outputs_without_logits() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"pooled": x}

    with pytest.raises(ModelError, match="postprocess="):
        evaluate_loop(Pooled(), xy(), "accuracy")


def test_labels_that_are_all_ignored() -> None:
    data = make_rows(lambda number, length: torch.tensor(-100))
    with pytest.raises(DataError, match="every label of the loader is -100"):
        evaluate_loop(tiny_bert(), load(data))


def test_an_error_of_the_model_is_explained_by_its_batch() -> None:
    data = make_rows(by_class, 8)  # class 2
    with pytest.raises(DataError, match=r"Label 2 in batch 0 \(row id 2\)") as caught:
        evaluate_loop(tiny_bert(num_labels=2), load(data))
    assert isinstance(caught.value.__cause__, IndexError)
    data = [{"input_ids": torch.tensor([4, 99])}]
    with pytest.raises(DataError, match="Token id 99"):
        predict_loop(tiny_bert(), load(data))


def test_other_errors_pass_as_they_are_also_without_labels() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> None:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        predict_loop(Broken(), [{"x": torch.ones(2)}])


def test_a_metric_that_draws_leaves_the_random_states_as_they_were():
    """So does a library that draws when the first evaluation imports it."""

    def noisy(predictions, references):
        return {"noise": random.random() + float(np.random.rand()) + float(torch.rand(()))}

    model = tiny_bert()
    loader = prepare_dataloaders({"dev": rows(4)}, tiny_tokenizer(), model=model)["dev"]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate_loop(model, loader, noisy, progress_bar=False)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
