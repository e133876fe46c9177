"""The order of rows: a function of seed and epoch that draws from no global generator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from helpers import assert_same_batches, labels_of, rows, sizes, tiny_bert, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from manualloop import (
    TrainState,
    inspect_batch,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
    train_steps,
    windows,
)
from manualloop.data.sampler import OrderedBatchSampler, order, set_epoch
from manualloop.data.tables import Dataset as TablesDataset


def test_a_shuffled_stream_is_shuffled_anew_each_epoch():
    stream = rows(input_ids=[[4]] * 16, labels=list(range(16))).to_iterable_dataset()
    loaders = prepare_dataloaders(stream.shuffle(seed=0, buffer_size=16))
    orders = []
    for epoch in (0, 1, 0):
        set_epoch(loaders["train"], epoch)
        orders.append(labels_of(loaders["train"]))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(16))


SEEDS = st.integers(0, 2**32)


EPOCHS = st.integers(0, 50)


@given(num_rows=st.integers(0, 300), seed=SEEDS, epoch=EPOCHS)
def test_an_order_is_a_permutation_and_a_function_of_its_arguments(num_rows, seed, epoch):
    rows = order(num_rows, seed, epoch)
    assert sorted(rows) == list(range(num_rows))
    assert rows == order(num_rows, seed, epoch)
    assert all(type(row) is int for row in rows)


@given(num_rows=st.integers(1, 300), seed=SEEDS, epoch=EPOCHS)
def test_an_order_is_that_of_accelerates_seedable_sampler(num_rows, seed, epoch):
    sampler = SeedableRandomSampler(range(num_rows), data_seed=seed)
    sampler.set_epoch(epoch)
    assert order(num_rows, seed, epoch) == list(sampler)


def test_epochs_and_seeds_differ():
    orders = [order(100, seed, epoch) for seed in (0, 1000) for epoch in range(5)]
    assert len({tuple(rows) for rows in orders}) == 10


@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_a_sampler_is_a_view_of_the_order(num_rows, batch_size, drop_last, shuffle, data):
    sampler = OrderedBatchSampler(
        num_rows, batch_size, shuffle=shuffle, seed=3, drop_last=drop_last
    )
    sampler.set_epoch(2)
    expected = order(num_rows, 3, 2) if shuffle else list(range(num_rows))
    if drop_last:
        expected = expected[: num_rows // batch_size * batch_size]
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert [row for batch in batches for row in batch] == expected == sampler.rows()
    assert all(len(batch) == batch_size for batch in batches[:-1])
    skipped = data.draw(st.integers(0, len(batches)))
    sampler.start_at(skipped * batch_size)
    assert list(sampler) == batches[skipped:]
    assert list(sampler) == batches  # only the next pass began later


def test_the_seed_changes_the_order_and_nothing_else():
    dataset = {"train": rows(30), "dev": rows(30)}
    loaders = {
        seed: prepare_dataloaders(dataset, tiny_tokenizer(), seed=seed, batch_size=30)
        for seed in (42, 7)
    }
    for seed, pair in loaders.items():
        assert labels_of(pair["train"]) == [rows(30)["label"][row] for row in order(30, seed, 0)]
    assert_same_batches(loaders[42]["dev"], loaders[7]["dev"])


def test_iterating_again_without_set_epoch_repeats_the_order_and_training_changes_the_epoch():
    loader = prepare_dataloaders(rows(12), tiny_tokenizer(), batch_size=4)["train"]
    assert_same_batches(loader, list(loader))
    seen = []
    model = tiny_bert()
    loss_fn = lambda model, batch: seen.append(batch["input_ids"]) or model(**batch).loss  # noqa: E731
    train_loop(model, loader, num_epochs=2, loss_fn=loss_fn, progress_bar=False)
    for epoch in (0, 1):
        set_epoch(loader, epoch)
        for batch, ids in zip(loader, seen[3 * epoch : 3 * epoch + 3], strict=True):
            assert torch.equal(batch["input_ids"], ids)


def random_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_drawn_from_the_global_generators(num_workers):
    dataset, tokenizer = rows(20), tiny_tokenizer()
    random.random(), np.random.rand(), torch.rand(1)
    states = random_states()
    splits = {"train": dataset, "validation": dataset}
    loaders = prepare_dataloaders(splits, tokenizer, model=tiny_bert(), num_workers=num_workers)
    assert random_states() == states
    for loader in loaders.values():
        for epoch in range(2):
            set_epoch(loader, epoch)
            assert len(labels_of(loader)) == 20
            assert random_states() == states
        inspect_batch(loader, tokenizer)
        assert random_states() == states


def test_nothing_is_drawn_from_the_global_generators_by_a_stream():
    states = random_states()
    loaders = prepare_dataloaders(rows(20).to_iterable_dataset(), tiny_tokenizer())
    assert len(labels_of(loaders["train"])) == 20
    assert random_states() == states


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_does_not_depend_on_the_global_generators(num_workers):
    torch.manual_seed(1)
    loaders = prepare_dataloaders(rows(20), tiny_tokenizer(), num_workers=num_workers)
    first = list(loaders["train"])
    torch.manual_seed(2)
    assert_same_batches(loaders["train"], first)


def with_noise(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"noise": torch.rand(len(batch))}


def test_random_numbers_of_workers_are_a_function_of_seed_and_epoch():
    dataset = rows(input_ids=[[4]] * 8, labels=[0] * 8)
    loader = prepare_dataloaders(dataset, collate_fn=with_noise, num_workers=1)["train"]
    noise = []
    for epoch in (0, 1, 0):
        set_epoch(loader, epoch)
        noise.append([batch["noise"].tolist() for batch in loader])
    assert noise[0] == noise[2] != noise[1]


@pytest.fixture
def loaded(monkeypatch) -> list[int]:
    """The rows that loaders read from a dataset, in order."""
    numbers: list[int] = []
    fetch = TablesDataset.__getitems__

    def record(self: Dataset, keys: list[int]) -> Any:
        numbers.extend(keys)
        return fetch(self, keys)

    monkeypatch.setattr(TablesDataset, "__getitems__", record)
    return numbers


def test_rows_before_the_start_are_never_loaded(loaded):
    loader = prepare_dataloaders(rows(20), tiny_tokenizer(), batch_size=4)["train"]
    loaded.clear()
    loader.batch_sampler.start_at(12)
    assert sum(sizes(loader)) == 8
    assert loaded == order(20, 42, 0)[12:]
    loaded.clear()
    assert sum(window.num_samples for window in windows(loader, 2, skip=8)) == 12
    assert loaded == order(20, 42, 0)[8:]


def test_resuming_inside_an_epoch_loads_only_the_remaining_rows(loaded):
    loader = prepare_dataloaders(rows(20), tiny_tokenizer(), batch_size=4)["train"]
    model = tiny_bert()
    state = TrainState(model, prepare_optimizer(model))
    loaded.clear()
    for step in train_steps(state, loader, num_epochs=2):
        if step.index == 7:
            break
    assert loaded == order(20, 42, 0) + order(20, 42, 1)[:8]
    loaded.clear()
    for _ in train_steps(state, loader, num_epochs=2):
        pass
    assert loaded == order(20, 42, 1)[8:]
