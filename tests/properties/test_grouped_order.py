"""Rows grouped by length: every row once, a pure function, little padding, resumable anywhere."""

import numpy as np
import pytest
from datasets import Dataset
from helpers import rows, tiny_bert, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from manualloop import (
    CheckpointError,
    ConfigError,
    SingleDevice,
    prepare_dataloaders,
    train_loop,
)
from manualloop.data.grouping import grouped_order
from manualloop.data.sampler import OrderedBatchSampler

lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=400).map(np.array)


def padding(lengths, batches):
    """Tokens with padding, for each token without."""
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    return padded / lengths[np.concatenate(batches)].sum()


@given(lengths_of, st.integers(1, 9), st.integers(0, 50), st.integers(0, 3))
def test_every_row_once_the_longest_first_and_always_the_same(lengths, batch_size, seed, epoch):
    found = grouped_order(lengths, batch_size, seed, epoch)
    assert sorted(found) == list(range(len(lengths)))
    assert lengths[found[0]] == lengths.max()
    assert found == grouped_order(lengths, batch_size, seed, epoch)


@given(lengths_of, st.integers(1, 9), st.data())
def test_the_rest_of_a_pass_is_that_of_the_whole(lengths, batch_size, data):
    sampler = OrderedBatchSampler(len(lengths), batch_size, shuffle=True, lengths=lengths)
    whole = list(sampler)
    number = data.draw(st.integers(0, len(whole)))
    sampler.start_at(number * batch_size)
    assert list(sampler) == whole[number:]
    other = OrderedBatchSampler(len(lengths), batch_size + 2, shuffle=True, lengths=lengths)
    other.start_at(number * batch_size, sampler.made)
    rest = [row for batch in other for row in batch]
    assert rest == [row for batch in whole[number:] for row in batch]


def test_epochs_and_seeds_differ_and_little_is_padding():
    draws = np.random.default_rng(0)
    lengths = draws.geometric(0.1, size=20_000) + 2
    samplers = [
        OrderedBatchSampler(20_000, 32, shuffle=True, seed=seed, lengths=lengths) for seed in (1, 2)
    ]
    first = list(samplers[0])
    samplers[0].set_epoch(1)
    assert list(samplers[0]) != first != list(samplers[1])
    random = list(OrderedBatchSampler(20_000, 32, shuffle=True, seed=1))
    assert padding(lengths, first) < 1.06 < 2.5 < padding(lengths, random)


def test_few_rows_meet_others_in_every_epoch():
    """Sorted as a whole, 320 rows of 320 lengths would be in the same batches for ever."""
    lengths = np.arange(1, 321)
    sampler = OrderedBatchSampler(320, 8, shuffle=True, lengths=lengths)
    met = [set(), set()]
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        for batch in sampler:
            met[epoch] |= {(row, other) for row in batch for other in batch if row != other}
    assert len(met[0] & met[1]) < 0.4 * len(met[0])


def test_the_rows_that_are_dropped_are_not_the_shortest():
    lengths = np.arange(1, 1001)
    sampler = OrderedBatchSampler(1000, 32, shuffle=True, lengths=lengths, drop_last=True)
    dropped = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        dropped += set(range(1000)) - set(sampler.rows())
    assert len(dropped) == 20 * (1000 % 32)
    assert 400 < lengths[dropped].mean() < 600


@pytest.mark.parametrize(("world_size", "most"), [(2, 1.05), (4, 1.1), (8, 1.2)])
def test_batches_that_ranks_read_at_once_are_about_as_long(world_size, most):
    lengths = np.random.default_rng(0).geometric(0.1, size=8 * 192 * 4) + 2
    sampler = OrderedBatchSampler(len(lengths), 8, shuffle=True, lengths=lengths)
    sampler.num_ranks = world_size
    batches = list(sampler)
    widths = np.array([lengths[batch].max() for batch in batches]).reshape(-1, world_size)
    # No rank waits long for the one with the widest batch.
    assert widths.max(axis=1).sum() / widths.mean(axis=1).sum() < most


def test_prepared_loaders_group_training_rows_only():
    data = {"train": rows(160), "validation": rows(10)}
    loaders = prepare_dataloaders(data, tiny_tokenizer(), batch_size=4, group_by_length=True)
    padded = sum(batch["attention_mask"].numel() for batch in loaders["train"])
    assert padded < 1.1 * loaders["train"].batch_sampler.lengths.sum()
    assert loaders["validation"].batch_sampler.lengths is None
    assert loaders["validation"].batch_sampler.rows() == list(range(10))
    lengths = loaders["train"].batch_sampler.lengths
    tokens = tiny_tokenizer()(list(data["train"]["sentence"]))["input_ids"]
    assert lengths.tolist() == [len(row) for row in tokens]


def test_rows_without_lengths_are_refused():
    stream = rows(6).to_iterable_dataset()
    with pytest.raises(ConfigError, match=r"group_by_length=True needs the number .* train"):
        prepare_dataloaders({"train": stream}, tiny_tokenizer(), group_by_length=True)
    numbers = Dataset.from_dict({"x": [0.5, 1.5], "labels": [0, 1]})
    with pytest.raises(ConfigError, match="no column of lists"):
        prepare_dataloaders(numbers, group_by_length=True)


def test_a_grouped_run_is_not_resumed_in_another_order(tmp_path):
    def run(group_by_length, max_steps):
        loaders = prepare_dataloaders(
            rows(20), tiny_tokenizer(), batch_size=4, group_by_length=group_by_length
        )
        return train_loop(
            tiny_bert(),
            loaders["train"],
            max_steps=max_steps,
            strategy=SingleDevice("cpu"),
            checkpoint_dir=tmp_path,
            progress_bar=False,
        )

    run(True, 3)
    with pytest.raises(CheckpointError, match="order: group_by_length -> None"):
        run(False, 6)
    assert run(True, 6).state.progress.num_steps == 6
