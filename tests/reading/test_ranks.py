"""Rows that the user has split over the ranks: resumed exactly, or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from manualloop import DataError, TrainState, prepare_strategy, train_steps
from manualloop.reading.position import Position
from manualloop.reading.reader import Reader
from manualloop.reading.sources import source_of
from manualloop.types import Window

NUM_ROWS, BATCH_SIZE = 24, 2


def stream(rank: int, world_size: int, num_shards: int = 4) -> DataLoader[Any]:
    rows = Dataset.from_dict({"x": list(range(NUM_ROWS))}).to_iterable_dataset(num_shards)
    whole = rows.with_format("torch")
    if world_size > 1:
        whole = split_dataset_by_node(whole, rank, world_size)
    return DataLoader(whole, BATCH_SIZE)


def sampled(rank: int, world_size: int) -> DataLoader[Any]:
    rows = [{"x": torch.tensor(row)} for row in range(NUM_ROWS)]
    if world_size == 1:
        return DataLoader(rows, BATCH_SIZE)
    sampler: Any = DistributedSampler(rows, world_size, rank, shuffle=False)
    return DataLoader(rows, BATCH_SIZE, sampler=sampler)


def reader_of(loader: Any, rank: int, world_size: int, position: Any = None) -> Reader:
    """A rank's reader. Nothing is exchanged where the ranks have parts of their own."""
    strategy: Any = SimpleNamespace(rank=rank, world_size=world_size)
    return Reader(source_of(loader), position, strategy)


def rows_of(window: Window) -> list[int]:
    rows: list[int] = window.batches[0]["x"].tolist()
    return rows


def take(reader: Reader, num_batches: int) -> tuple[list[int], Position]:
    rows: list[int] = []
    windows = reader.windows(1)
    for _ in range(num_batches):
        rows += rows_of(next(windows))
        reader.settle()
    return rows, reader.position()


@pytest.mark.parametrize("make", [stream, sampled])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_same_ranks_use_every_row_once(make: Any, world_size: int) -> None:
    rows: list[int] = []
    for rank in range(world_size):
        used, position = take(reader_of(make(rank, world_size), rank, world_size), 2)
        left = reader_of(make(rank, world_size), rank, world_size, position).windows(1)
        rows += used + [row for window in left for row in rows_of(window)]
    assert sorted(rows) == list(range(NUM_ROWS))


@pytest.mark.parametrize("make", [stream, sampled])
@pytest.mark.parametrize(("before", "now"), [(2, 3), (2, 1), (4, 2), (1, 2)])
def test_other_ranks_are_refused_inside_an_epoch(make: Any, before: int, now: int) -> None:
    reader = Reader(source_of(make(0, 1))) if before == 1 else reader_of(make(0, before), 0, before)
    _, position = take(reader, 2)
    with pytest.raises(DataError, match="rows would be used twice, or never"):
        reader_of(make(0, now), 0, now, position)
    del position["num_parts"]  # as an older version has saved it
    reader_of(make(0, now), 0, now, position)


@pytest.mark.parametrize("make", [stream, sampled])
def test_other_ranks_begin_the_next_epoch(make: Any) -> None:
    reader = reader_of(make(0, 2), 0, 2)
    for window in reader.windows(1):
        reader.settle(ends_epoch=window.ends_epoch)
    rows: list[int] = []
    for rank in range(3):
        begun = reader_of(make(rank, 3), rank, 3, reader.position())
        rows += [row for window in begun.windows(1) for row in rows_of(window)]
    assert sorted(rows) == list(range(NUM_ROWS))


@pytest.mark.parametrize("make", [stream, sampled])
def test_a_part_that_is_not_this_ranks_is_refused(make: Any) -> None:
    for part, of_rank in (((0, 2), (1, 2)), ((0, 4), (0, 2)), ((1, 2), (1, 4))):
        with pytest.raises(DataError, match=f"reads part {part[0]} of {part[1]} of the rows"):
            reader_of(make(*part), *of_rank)


@pytest.mark.parametrize("make", [stream, sampled])
def test_one_process_that_reads_a_part_is_told(make: Any, caplog: Any) -> None:
    caplog.set_level("INFO", "manualloop")
    _, position = take(Reader(source_of(make(1, 2))), 2)
    assert "one process reads part 1 of 2 of the rows" in caplog.text
    with pytest.raises(DataError, match="used twice, or never"):
        Reader(source_of(make(0, 1)), position)


def test_a_run_is_refused_before_its_first_update() -> None:
    def new_state() -> TrainState:
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def train(state: TrainState, loader: Any) -> Any:
        return train_steps(
            state,
            loader,
            max_steps=4,
            loss_fn=lambda model, batch: model(batch["x"].float()[:, None]).mean(),
            strategy=prepare_strategy("cpu"),
        )

    state, other = new_state(), new_state()
    next(train(state, stream(0, 2)))
    other.load_state_dict(state.state_dict())
    before = other.model.weight.clone()  # type: ignore[operator]
    with pytest.raises(DataError, match="used twice, or never"):
        next(train(other, stream(0, 1)))
    assert torch.equal(other.model.weight, before)  # type: ignore[arg-type]
