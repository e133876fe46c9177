"""Batches of any kind: their rows, smaller batches, and spares."""

import collections
import copy
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from manualloop import (
    ConfigError,
    DataError,
    TrainState,
    evaluate_loop,
    load_checkpoint,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.batches import (
    as_spare,
    begin_pass,
    is_spare,
    num_rows,
    rebuild,
    shared_rows,
    split_batch,
)
from manualloop.strategy.transfer import move


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    names: list = field(default_factory=list)


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Columns(NamedTuple):
    x: torch.Tensor
    y: Any


class Graph:
    """A batch of graphs: nodes, edges and labels have rows of their own."""

    def __init__(self, num_nodes, num_edges, num_graphs):
        self.x = torch.zeros(num_nodes, 2)
        self.edge_index = torch.zeros(2, num_edges, dtype=torch.int64)
        self.y = torch.zeros(num_graphs)


def rows_of(n):
    return {"x": torch.arange(n * 2.0).reshape(n, 2), "y": torch.arange(n)}


CLEAR = {
    "tensor": torch.zeros(3, 7),
    "array": np.zeros((3, 7)),
    "dict": {"scale": torch.tensor(2.0), "x": torch.zeros(3, 2)},
    "texts": ["a", "b", "c"],
    "texts in a dict": {"texts": ["a", "b", "c"], "n": 7},
    "list of columns": [torch.zeros(3), torch.zeros(3, 5)],
    "columns of two kinds": [torch.zeros(3, 2), ["a", "b", "c"]],
    "nested": {"in": {"x": torch.zeros(3, 2)}, "out": [1, 2, 3]},
    "detection": {"pixels": torch.zeros(3, 1, 4, 4), "labels": [{"boxes": torch.zeros(5, 4)}] * 3},
    "dataclass": Pair(torch.zeros(3, 2), torch.zeros(3)),
    "named tuple": Columns(torch.zeros(3, 2), ["a", "b", "c"]),
    "namespace": SimpleNamespace(x=torch.zeros(3), meta={"y": torch.zeros(3)}, name="train"),
    "slots": Slotted(torch.zeros(3), torch.zeros(3, 1)),
    "encoding": BatchEncoding({"input_ids": torch.zeros(3, 4)}),
    "list of rows": [{"x": torch.zeros(7), "label": 1}] * 3,
    "rows without tensors": [{"text": "a"}] * 3,
    "ragged rows": [{"x": torch.zeros(n)} for n in (4, 7, 2)],
    "rows of two lengths": [{"x": torch.zeros(7), "y": torch.zeros(2)}] * 3,
}  # fmt: skip
UNCLEAR = {
    "class weights": {"x": torch.zeros(4, 2), "weight": torch.ones(3)},
    "class weights first": {"weight": torch.ones(3), "x": torch.zeros(4, 2)},
    "two lengths": (torch.zeros(3), torch.zeros(5)),
    "graph": Graph(7, 12, 3),
    "rows, or groups of columns": [{"x": torch.zeros(7)}] * 3,
    "pairs of fields, or columns": [(torch.zeros(2), 1)] * 3,
    "numbers": {"note": "text", "n": 3},
    "nothing": {},
    "another kind": 5,
}


@pytest.mark.parametrize("kind", CLEAR)
def test_rows_that_are_clear(kind):
    assert shared_rows(CLEAR[kind]) == 3
    assert num_rows(CLEAR[kind]) == 3


@pytest.mark.parametrize("kind", UNCLEAR)
def test_rows_that_nothing_tells(kind):
    assert shared_rows(UNCLEAR[kind]) is None
    assert num_rows(UNCLEAR[kind]) >= 1  # a position counts something in any case
    with pytest.raises(DataError, match="nothing tells how many rows"):
        split_batch(UNCLEAR[kind], 2)


def test_objects_that_refer_to_each_other_have_an_end():
    one, other = SimpleNamespace(), SimpleNamespace()
    one.other, other.other = other, one
    assert shared_rows(one) is None


SPLIT = ["tensor", "array", "dict", "texts", "list of columns", "columns of two kinds", "nested",
         "detection", "dataclass", "named tuple", "namespace", "slots", "encoding",
         "list of rows"]  # fmt: skip


@pytest.mark.parametrize("kind", SPLIT)
@pytest.mark.parametrize("size", [1, 2])
def test_every_column_is_split_and_nothing_else(kind, size):
    parts = split_batch(CLEAR[kind], size)
    assert [shared_rows(part) for part in parts] == {1: [1, 1, 1], 2: [2, 1]}[size]
    if kind == "named tuple":
        assert [part.y for part in split_batch(CLEAR[kind], 2)] == [["a", "b"], ["c"]]
    if kind in ("dataclass", "namespace", "slots"):
        assert all(type(part) is type(CLEAR[kind]) for part in parts)
        assert len(CLEAR[kind].x) == 3, "the batch itself stays whole"


@given(st.integers(1, 12), st.integers(1, 13))
def test_parts_make_up_the_batch(num, size):
    batch = rows_of(num) | {"rows": [{"points": torch.zeros(n)} for n in range(num)]}
    parts = split_batch(batch, size)
    for name in ("x", "y"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert [len(row["points"]) for part in parts for row in part["rows"]] == list(range(num))


def test_labels_tell_the_rows_of_a_batch_with_columns_of_other_lengths():
    batch = {"labels": torch.arange(4), "x": torch.zeros(4, 2), "weight": torch.ones(3)}
    parts = split_batch(batch, 3)
    assert [len(part["labels"]) for part in parts] == [3, 1]
    assert all(part["weight"] is batch["weight"] for part in parts)


SPARE = {
    "dict": rows_of(2),
    "ordered": collections.OrderedDict(rows_of(2)),
    "default": collections.defaultdict(list, rows_of(2)),
    "encoding": BatchEncoding(rows_of(2)),
    "list": [torch.zeros(2), torch.zeros(2)],
    "tuple": (torch.zeros(2), torch.zeros(2)),
    "named tuple": Columns(torch.zeros(2), torch.zeros(2)),
    "dataclass": Pair(torch.zeros(2), torch.zeros(2)),
    "frozen": Frozen(torch.zeros(2)),
    "namespace": SimpleNamespace(x=torch.zeros(2)),
    "slots": Slotted(torch.zeros(2), torch.zeros(2)),
    "object": Graph(4, 3, 2),
    "tensor": torch.zeros(2),
    "text": "a text",
}


@pytest.mark.parametrize("kind", SPARE)
def test_a_spare_is_used_as_the_batch_is(kind):
    batch = SPARE[kind]
    spare = as_spare(batch)
    assert is_spare(spare)
    assert not is_spare(batch)
    if kind not in ("default", "ordered"):
        assert isinstance(spare, type(batch))
    assert shared_rows(spare) == shared_rows(batch)
    assert is_spare(as_spare(copy.copy(batch)))
    if isinstance(batch, dict | BatchEncoding):
        assert torch.equal(spare["x"], batch["x"])
    elif hasattr(batch, "x"):
        assert spare.x is batch.x


class Numbers(torch.utils.data.IterableDataset):
    """A stream that knows its position."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        while self.number < 23:
            self.number += 1
            yield float(self.number)
        self.number = 0

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


@pytest.mark.parametrize("as_objects", [True, False])
def test_a_stream_of_objects_resumes_exactly(tmp_path, as_objects):
    """No checkpoint holds the object that was read ahead: the stream is read again."""

    def collate(rows):
        x = torch.tensor(rows)[:, None] / 23
        return SimpleNamespace(x=x) if as_objects else {"x": x}

    def train(max_steps, folder):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, collate_fn=collate)
        train_loop(
            model, loader, torch.optim.SGD(model.parameters(), lr=0.1), None, max_steps=max_steps,
            gradient_accumulation_steps=2, checkpoint_dir=folder, checkpoint_every=1,
            loss_fn=lambda m, b: m(b.x if as_objects else b["x"]).square().mean(),
            progress_bar=False, resume="auto",
        )  # fmt: skip
        return model.weight

    whole = train(8, tmp_path / "whole")
    state = TrainState(model := torch.nn.Linear(1, 1), torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(0)
    model.reset_parameters()
    weights = []
    for number in range(2):  # each in a new loader, as in a new process
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, collate_fn=collate)
        steps = train_steps(
            state, loader, max_steps=8, gradient_accumulation_steps=2,
            loss_fn=lambda m, b: m(b.x if as_objects else b["x"]).square().mean(),
        )  # fmt: skip
        for step in steps:
            save_checkpoint(tmp_path / "parts", state)
            if step.index == 4 and not number:
                break
        steps.close()
        state = TrainState(
            model := torch.nn.Linear(1, 1), torch.optim.SGD(model.parameters(), lr=0.1)
        )
        load_checkpoint(tmp_path / "parts", state)
        weights.append(model.weight)
    assert torch.equal(weights[-1], whole)


def test_what_has_no_subclass_is_refused_as_a_spare():
    with pytest.raises(DataError, match="a bool cannot be marked"):
        as_spare(True)


@pytest.mark.parametrize("kind", [*CLEAR, *UNCLEAR])
def test_batches_of_any_kind_are_moved(kind):
    """To the meta device, whose tensors tell that they were moved."""
    batch = (CLEAR | UNCLEAR)[kind]
    tensors = []

    def collect(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value.device.type)
        else:
            rebuild(value, collect)
        return value

    moved = move(batch, torch.device("meta"))
    assert isinstance(moved, dict | BatchEncoding) or type(moved) is type(batch)
    collect(moved)
    assert set(tensors) <= {"meta"}
    tensors.clear()
    collect(batch)
    if kind != "encoding":  # which moves itself in place
        assert set(tensors) <= {"cpu"}, "the batch itself stays where it is"


def test_a_batch_that_moves_itself_in_place_is_kept():
    class Own:
        def __init__(self):
            self.x = torch.zeros(2)

        def to(self, device):
            self.x = self.x.to(device)

    batch = Own()
    assert move(batch, torch.device("meta")) is batch
    assert batch.x.device.type == "meta"


def test_helpers_that_travel_in_a_batch_are_not_copied():
    class Tokenizer:
        def __init__(self):
            self.vocabulary = {"table": torch.zeros(2)}

    helper = Tokenizer()
    moved = move({"x": torch.zeros(2), "tokenizer": helper}, torch.device("meta"))
    assert moved["tokenizer"] is helper
    assert helper.vocabulary["table"].device.type == "cpu"


def test_tensors_in_a_list_that_is_no_list_of_rows_are_split():
    batch = {"inputs": {"a": torch.arange(4), "b": [torch.arange(4)]}, "labels": torch.arange(4)}
    parts = split_batch(batch, 3)
    assert [part["inputs"]["b"][0].tolist() for part in parts] == [[0, 1, 2], [3]]


def collate(rows):
    return torch.utils.data.default_collate(rows)


@pytest.mark.filterwarnings("ignore:Got pickle error:UserWarning")
def test_what_cannot_be_sent_to_new_workers_is_refused():
    """torch's own error does not tell what to write."""

    class Local(torch.utils.data.Dataset):
        __len__ = list.__len__

    class Net(torch.nn.Linear):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) - labels).square().mean()}

    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 4
    spawn = partial(DataLoader, num_workers=1, multiprocessing_context="spawn")
    model = Net(1, 1)
    calls = (
        lambda loader: train_loop(model, loader, num_epochs=1, progress_bar=False),
        lambda loader: evaluate_loop(model, loader),
    )
    for loader in (
        spawn(rows, 2, collate_fn=lambda rows: collate(rows)),
        spawn(rows, 2, worker_init_fn=lambda number: None),
        spawn(Local()),
        spawn([*rows, (n for n in rows)], 2),
    ):
        with pytest.raises(ConfigError, match=r"cannot be sent to them.*num_workers=0"):
            begin_pass(loader)
    for call in calls:
        with pytest.raises(ConfigError, match="cannot be sent to them"):
            call(spawn(rows, 2, collate_fn=lambda rows: collate(rows)))
    with pytest.raises(TypeError, match="object is not iterable"):
        begin_pass(3)
