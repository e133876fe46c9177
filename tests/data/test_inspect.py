"""``inspect_batch``: what it shows, and that it changes nothing."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from helpers import rows, tiny_tokenizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from manualloop import DataError, inspect_batch, prepare_dataloaders
from manualloop.data.sampler import set_epoch


def test_inspect_batch_describes_the_first_batch():
    dataset = {"dev": rows(text=["good movie", "bad <b>plot</b> was very dull"], label=[1, 0])}
    tokenizer = tiny_tokenizer()
    report = inspect_batch(prepare_dataloaders(dataset, tokenizer)["dev"], tokenizer)
    assert list(report.columns) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    assert report.columns["labels"] == ((2,), "int64")
    num_tokens = report.columns["input_ids"][0][1]
    assert report.num_rows == 2
    assert report.padding == pytest.approx((num_tokens - 4) / (2 * num_tokens))
    assert report.rows[0] == {"input_ids": "[CLS] good movie [SEP]", "labels": 1}
    assert str(report) == repr(report)
    assert "padding" in str(report)
    assert f"(2, {num_tokens}) int64" in str(report)
    assert "[CLS] good movie [SEP]  ->  1" in str(report)
    assert report._repr_html_().startswith("<table>")


def test_inspect_batch_escapes_html_and_shows_numbers_without_a_tokenizer():
    batch = {"input_ids": torch.tensor([[4, 5], [6, 0]]), "a<b": torch.ones(2)}
    report = inspect_batch([batch])
    assert report.padding is None
    assert report.rows == [{"input_ids": [4, 5]}, {"input_ids": [6, 0]}]
    assert "a&lt;b" in report._repr_html_()
    assert "a<b" not in report._repr_html_()


def test_inspect_batch_shows_values_that_are_no_tensors():
    report = inspect_batch([{"text": ["good", "bad"], "labels": torch.tensor([1, 0]), "n": 3}])
    assert report.columns == {
        "labels": ((2,), "int64"),
        "n": ((), "int, no tensor"),
        "text": ((2,), "list of str, no tensor"),
    }
    assert "text    (2,) list of str, no tensor" in str(report)
    assert report.rows == [{"labels": 1}, {"labels": 0}]


@pytest.mark.parametrize(("loader", "got"), [([], "no batch"), ([[1, 2]], "a list")])
def test_inspect_batch_names_what_it_got_instead(loader, got):
    with pytest.raises(DataError, match=f"The loader gave {got}, not a dict of tensors"):
        inspect_batch(loader)


def test_inspect_batch_changes_no_later_batch():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, row: int) -> dict[str, Any]:
            noise = random.random() + np.random.rand() + torch.rand(()).item()
            return {"labels": row, "noise": noise}

    def passes(look: bool, **options: Any) -> list[Any]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True, **options)
        if look:
            inspect_batch(loader)
        return [(batch["labels"].tolist(), batch["noise"].tolist()) for batch in loader]

    assert passes(look=True) == passes(look=False)
    with_generator = [
        passes(look, generator=torch.Generator().manual_seed(1)) for look in (True, False)
    ]
    assert with_generator[0] == with_generator[1]


class Rows(torch.utils.data.Dataset):
    """Rows that draw, count and remember, in all ways that a dataset of somebody may."""

    total = 0

    def __init__(self, size: int = 12) -> None:
        self.size, self.numpy, self.python = size, np.random.default_rng(0), random.Random(0)
        self.late: Any = None
        self.num_read, self.seen, self.cache = 0, [], {}
        self.counts = count_rows()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> dict[str, Any]:
        if self.late is None:
            self.late = torch.Generator().manual_seed(3)
        self.num_read += 1
        type(self).total += 1
        self.seen.append(row)
        drawn = self.numpy.random() + self.python.random() + self.cache.setdefault(row, 1)
        late = torch.rand((), generator=self.late).item()
        counted = self.num_read + len(self.seen) + self.counts() + len(self.cache) + self.total
        return {"x": torch.tensor([row, drawn, late, counted])}


def count_rows() -> Any:
    number = 0

    def count() -> int:
        nonlocal number
        number += 1
        return number

    return count


class Stream(torch.utils.data.IterableDataset):
    """A stream that continues at its position."""

    def __init__(self) -> None:
        self.position, self.rng = 0, random.Random(1)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def __iter__(self) -> Any:
        while self.position < 20:
            self.position += 1
            yield {"x": torch.tensor(self.position + self.rng.random())}
        self.position = 0


class OwnLoader:
    """A loader with a state, like torchdata's, which keeps the iterator of the pass under way."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"place": [0]}
        self.num_passes, self.under_way = 0, None

    def state_dict(self) -> dict[str, Any]:
        return {"place": list(self.state["place"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state

    def __iter__(self) -> Any:
        self.num_passes += 1
        self.under_way = self.batches(self.num_passes)
        return self.under_way

    def batches(self, number: int) -> Any:
        for place in range(self.state["place"][0], 6):
            self.state["place"][0] += 1
            yield {"x": torch.tensor([[place, number]])}
        self.state["place"][0] = 0


class EpochSampler(torch.utils.data.Sampler):
    """A sampler that counts its passes and draws by them."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter(
            torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        )

    def __len__(self) -> int:
        return 12


def prepared(**options: Any) -> DataLoader[Any]:
    rows = Dataset.from_dict({"x": list(range(12))}).with_format("torch")
    return prepare_dataloaders({"train": rows}, **options)["train"]


def streamed() -> DataLoader[Any]:
    rows = Dataset.from_dict({"x": list(range(12))}).to_iterable_dataset(num_shards=3)
    mapped = rows.shuffle(seed=1, buffer_size=4).map(
        random_row, fn_kwargs={"rng": random.Random(1)}
    )
    return DataLoader(mapped.with_format("torch"), batch_size=2)


def random_row(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return {"x": row["x"] + rng.random()}


LOADERS = {
    "rows": lambda: DataLoader(Rows(), batch_size=2, shuffle=True),
    "rows in workers": lambda: DataLoader(Rows(), batch_size=2, shuffle=True, num_workers=2),
    "nested rows": lambda: DataLoader(
        torch.utils.data.ConcatDataset([torch.utils.data.Subset(Rows(), [1, 3, 5]), Rows()]), 2
    ),
    "generator": lambda: DataLoader(Rows(), 2, shuffle=True, generator=torch.Generator()),
    "own sampler": lambda: DataLoader(Rows(), 2, sampler=EpochSampler()),
    "stream": lambda: DataLoader(Stream(), 2),
    "stream in a worker": lambda: DataLoader(Stream(), 2, num_workers=1),
    "own loader": OwnLoader,
    "prepared": lambda: prepared(batch_size=2),
    "prepared, in workers": lambda: prepared(batch_size=2, num_workers=1),
    "stream of datasets": streamed,
    "list": lambda: [{"x": torch.tensor([[i]])} for i in range(4)],
}


def read(loader: Any, num: int) -> list[Any]:
    Rows.total = 0
    return [batch["x"].tolist() for batch in itertools.islice(loader, num)]


@pytest.mark.parametrize(
    ("name", "num_before"),
    [
        pytest.param(
            name, number, marks=pytest.mark.exhaustive if "worker" in name and number != 2 else ()
        )
        for name in LOADERS
        for number in (0, 2, 100)
    ],
)
def test_a_look_changes_nothing_in_any_loader(name: str, num_before: int) -> None:
    def passes(looks: bool) -> list[Any]:
        torch.manual_seed(0)
        loader, found = LOADERS[name](), []
        found.append(read(loader, num_before))
        for _ in range(2):
            if looks:
                inspect_batch(loader)
                inspect_batch(loader)
            found.append(read(loader, 100))
        return [*found, Rows.total]

    assert passes(looks=True) == passes(looks=False)


def test_a_look_inside_a_pass_leaves_the_pass_alone() -> None:
    def passes(looks: bool) -> list[Any]:
        torch.manual_seed(0)
        loader, found = DataLoader(Rows(), batch_size=2, shuffle=True), []
        Rows.total = 0
        for batch in loader:
            found.append(batch["x"].tolist())
            if looks:
                inspect_batch(loader)
        return found

    assert passes(looks=True) == passes(looks=False)


def test_a_look_leaves_an_epoch_and_a_start_of_a_prepared_loader_alone() -> None:
    loader = prepared(batch_size=2)
    set_epoch(loader, 3)
    sampler: Any = loader.batch_sampler
    expected = sampler.batches()
    sampler.start_at(4)
    inspect_batch(loader)
    assert sampler.epoch == 3
    assert list(sampler) == expected[2:]


def test_a_look_neither_starts_nor_moves_workers_that_are_kept() -> None:
    loader = DataLoader(Stream(), 2, num_workers=1, persistent_workers=True)
    before = multiprocessing.active_children()  # of other tests
    inspect_batch(loader)
    assert loader._iterator is None
    assert set(multiprocessing.active_children()) <= set(before)
    first = next(iter(loader))["x"].tolist()
    inspect_batch(loader)
    again = DataLoader(Stream(), 2, num_workers=1, persistent_workers=True)
    assert first == next(iter(again))["x"].tolist()
    assert next(iter(loader))["x"].tolist() == next(iter(again))["x"].tolist()


def batches() -> Any:
    for place in range(3):
        yield {"x": torch.full((2, 1), place)}


class SharedIterator:
    def __init__(self) -> None:
        self.batches = batches()

    def __iter__(self) -> Any:
        return self.batches


class Wrapped:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        yield from self.inner


ONCE = {
    "generator": batches,
    "iterator of a list": lambda: iter(list(batches())),
    "iterator of a loader": lambda: iter(DataLoader([{"x": 1}, {"x": 2}, {"x": 3}], 1)),
    "map": lambda: map(dict, list(batches())),
    "islice": lambda: itertools.islice(list(batches()), 3),
    "shared": SharedIterator,
    "wrapped": lambda: Wrapped(batches()),
    "progress bar": lambda: tqdm(batches(), disable=True),
}


@pytest.mark.parametrize("name", ONCE)
def test_what_can_be_read_only_once_is_refused_and_keeps_its_batches(name: str) -> None:
    loader = ONCE[name]()
    with pytest.raises(DataError, match=r"read only once.*batches = list\(batches\)"):
        inspect_batch(loader)
    left = list(loader)
    assert len(left) == 3
    inspect_batch(left)


def test_a_failing_look_changes_nothing_either() -> None:
    rng = random.Random(1)

    def collate(rows: list[Any]) -> Any:
        raise ValueError(rng.random())

    rows = Rows()
    with pytest.raises(ValueError, match=r"0\.13"):
        inspect_batch(DataLoader(rows, 2, collate_fn=collate))
    assert (rng.random(), rows.num_read) == (random.Random(1).random(), 0)


def named(feature: Any, labels: list[Any], **columns: Any) -> Any:
    table = rows(**columns, labels=labels)
    return {"dev": table.cast_column("labels", feature)}


def test_inspect_batch_shows_classes_ignored_labels_and_texts_that_are_cut_off():
    texts = ["good movie bad plot", "bad", "good", "fine"]
    dataset = named(ClassLabel(names=["bad", "very good"]), [1, 0, -100, 1], text=texts)
    report = inspect_batch(prepare_dataloaders(dataset, tiny_tokenizer(), max_length=4)["dev"])
    assert report.classes == {"bad": 1, "very good": 2}
    assert report.ignored == 0.25
    assert (report.cut, report.max_length) == (0.25, 4)
    lines = str(report).split("\n")
    assert "classes         0 bad        1" in lines
    assert "                1 very good  2" in lines
    assert "ignored         25.0% of the labels, which are -100" in lines
    assert "cut off         25.0% of all texts of the split, at 4 tokens" in lines
    assert [line.rpartition("->  ")[2] for line in lines[-3:]] == ["1 very good", "0 bad", "-100"]
    assert "<th>classes</th>" in report._repr_html_()


def test_inspect_batch_names_the_classes_of_rows_and_of_tokens():
    feature = datasets.Sequence(ClassLabel(names=["a", "b", "c"]))
    several = named(feature, [[0, 2], [], [2]], text=["good", "bad", "fine"])
    report = inspect_batch(prepare_dataloaders(several, tiny_tokenizer())["dev"])
    assert report.classes == {"a": 1, "b": 0, "c": 2}
    assert [line.rpartition("->  ")[2] for line in str(report).split("\n")[-3:]] == [
        "[a, c]",
        "[]",
        "[c]",
    ]
    tokens = named(feature, [[0, 2, -100], [1]], input_ids=[[4, 5, 6], [7]])
    report = inspect_batch(prepare_dataloaders(tokens, tiny_tokenizer())["dev"])
    assert report.classes == {"a": 1, "b": 1, "c": 1}
    assert report.ignored == 0.25  # of four tokens; padding does not count
    assert str(report).endswith("->  [b, -100, -100]")


def test_inspect_batch_shows_the_most_frequent_of_many_classes():
    names = [f"class {number}" for number in range(40)]
    dataset = named(ClassLabel(names=names), [39, 7, 39], text=["good", "bad", "fine"])
    report = inspect_batch(prepare_dataloaders(dataset, tiny_tokenizer())["dev"])
    lines = str(report).split("\n")
    assert "classes         39 class 39  2" in lines
    assert "                 7 class 7   1" in lines
    assert "                ... (40 classes)" in lines
    assert len(report.classes) == 40


def test_inspect_batch_has_no_classes_where_nobody_named_any():
    report = inspect_batch(
        [{"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[70_000, -100]])}]
    )
    assert report.classes == {}
    assert report.ignored == 0.5
    assert "classes" not in str(report)


@pytest.mark.parametrize("tokenizer", [None, tiny_tokenizer()], ids=["numbers", "text"])
@pytest.mark.parametrize(
    ("mask", "padding"),
    [
        (torch.ones(2, 3, 3).tril().long(), None),  # of pairs of tokens
        (torch.zeros(2, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -1e9), None),
        (torch.tensor([[0.0, 0.0, -1e9], [0.0, 0.0, 0.0]]), None),  # added to the scores
        (torch.ones(2, 8).long(), None),  # of a prefix, too
        (torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), 1 / 6),
    ],
)
def test_masks_of_any_kind(mask: torch.Tensor, padding: float | None, tokenizer: Any) -> None:
    batch = {"input_ids": torch.tensor([[4, 5, 0], [6, 7, 8]]), "attention_mask": mask}
    report = inspect_batch([batch], tokenizer)
    assert report.padding == (None if padding is None else pytest.approx(padding))
    assert len(str(report).splitlines()) == 4 + (padding is not None)


def test_tokens_without_text_are_numbers() -> None:
    batch = {"input_ids": torch.tensor([[2, 4, -100], [2, 4, 5]]), "labels": torch.tensor(1)}
    report = inspect_batch([batch], tiny_tokenizer())
    assert [row["input_ids"] for row in report.rows] == ["2 4 -100", "[CLS] good bad"]
    assert "labels     () int64" in str(report)
    assert inspect_batch([{"input_ids": torch.zeros(2, 0).long()}], tiny_tokenizer()).num_rows == 2
