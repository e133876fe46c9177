"""Batches by a budget of tokens: every row once, as many batches in every epoch, resumable."""

import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import rows, tiny_bert, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from manualloop import (
    CheckpointError,
    ConfigError,
    DataError,
    SingleDevice,
    TrainState,
    prepare_dataloaders,
    train_loop,
    train_steps,
)
from manualloop.data.grouping import budgeted_batches, cut
from manualloop.data.sampler import OrderedBatchSampler


def interrupt_at(last):
    """Return an ``on_step`` that ends the run with a checkpoint, as Ctrl-C does."""
    return lambda step: step.index == last and signal.raise_signal(signal.SIGINT)


lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=400).map(np.array)
budgets = st.integers(60, 500)


@given(lengths_of, st.integers(1, 200))
def test_a_cut_takes_as_many_rows_as_fit(lengths, max_tokens):
    ends = [*cut(lengths, max_tokens), len(lengths)]
    assert ends[0] == 0
    for begin, end in pairwise(ends):
        assert begin < end
        assert end - begin == 1 or lengths[begin:end].max() * (end - begin) <= max_tokens
        if end < len(lengths):
            assert lengths[begin : end + 1].max() * (end + 1 - begin) > max_tokens


@given(lengths_of, budgets, st.integers(0, 50))
def test_every_row_once_within_the_budget_and_always_as_many_batches(lengths, max_tokens, seed):
    epochs = [budgeted_batches(lengths, max_tokens, seed, epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert all(lengths[batch].max() * len(batch) <= max_tokens for batch in batches)
        assert lengths[batches[0][0]] == lengths.max()
    assert len({len(batches) for batches in epochs}) == 1
    assert epochs[0] == budgeted_batches(lengths, max_tokens, seed, 0)


def make_sampler(lengths, max_tokens):
    return OrderedBatchSampler(
        len(lengths), 8, shuffle=True, lengths=lengths, max_tokens=max_tokens
    )


@given(lengths_of, budgets, st.data())
def test_the_rest_of_a_pass_is_that_of_the_whole(lengths, max_tokens, data):
    sampler = make_sampler(lengths, max_tokens)
    sampler.set_epoch(1)
    whole = list(sampler)
    assert len(sampler) == len(whole)
    number = data.draw(st.integers(0, len(whole)))
    used = sum(map(len, whole[:number]))
    assert sampler.batch_at(used) == number
    sampler.start_at(used)
    assert sampler.num_left() == len(whole) - number
    assert list(sampler) == whole[number:]
    other = make_sampler(lengths, data.draw(budgets))
    other.set_epoch(1)
    other.start_at(used, sampler.made)
    num_left = other.num_left()
    rest = list(other)
    assert len(rest) == num_left
    assert [row for batch in rest for row in batch] == [r for b in whole[number:] for r in b]
    assert all(lengths[batch].max() * len(batch) <= other.max_tokens for batch in rest)


def test_epochs_differ_inside_batches_and_between_them_and_little_is_padding():
    lengths = np.random.default_rng(0).geometric(0.1, size=5000) + 2
    sampler = make_sampler(lengths, 512)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert len({frozenset(batch) for batch in first} & {frozenset(b) for b in second}) < 20
    assert [len(batch) for batch in first] != [len(batch) for batch in second]
    padded = sum(lengths[batch].max() * len(batch) for batch in first)
    assert padded / lengths.sum() < 1.02
    for world_size in (2, 4, 8):  # nobody waits long for the rank with the largest batch
        sampler.num_ranks = world_size
        batches = list(sampler)[: len(first) // world_size * world_size]
        sizes = np.array([lengths[batch].max() * len(batch) for batch in batches])
        at_once = sizes.reshape(-1, world_size)
        assert at_once.max(axis=1).sum() / at_once.mean(axis=1).sum() < 1.05


@pytest.mark.parametrize("multiple", [None, 4])
def test_prepared_batches_hold_no_more_tokens(multiple):
    data = {"train": rows(40), "validation": rows(10)}
    loaders = prepare_dataloaders(
        data, tiny_tokenizer(), max_tokens=24, pad_to_multiple_of=multiple
    )
    for loader in loaders.values():
        sizes = [batch["input_ids"].shape for batch in loader]
        assert all(size.numel() <= 24 for size in sizes)
        assert len(loader) == len(sizes)
        assert len({size[0] for size in sizes}) > 1
    assert sum(len(batch["labels"]) for batch in loaders["train"]) == 40
    labels = torch.cat([batch["labels"] for batch in loaders["validation"]])
    assert labels.tolist() == data["validation"]["label"]


def test_a_run_is_that_of_a_plain_loop_over_the_same_batches():
    def make():
        loader = prepare_dataloaders(rows(40), tiny_tokenizer(), max_tokens=24)["train"]
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return loader, model, torch.optim.SGD(model.parameters(), lr=0.1)

    loader, model, optimizer = make()
    state = TrainState(model, optimizer)
    steps = train_steps(state, loader, num_epochs=2, strategy=SingleDevice("cpu"))
    losses = [float(step.loss) for step in steps]
    loader, plain, optimizer = make()
    plain.train()
    expected = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            loss = plain(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(float(loss.detach()))
    assert losses == expected
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("before", "after"), [(24, 24), (24, 40), (40, 24)])
def test_another_budget_resumes_with_the_remaining_rows(before, after, tmp_path, caplog):
    seen = []

    def run(max_tokens, stop_after=None):
        loader = prepare_dataloaders(rows(40), tiny_tokenizer(), max_tokens=max_tokens)["train"]
        collate = loader.collate_fn

        def recording(fetched):
            seen.extend(row["input_ids"] for row in fetched)
            return collate(fetched)

        recording.padded_lengths = collate.padded_lengths
        loader.collate_fn = recording
        return train_loop(
            tiny_bert(),
            loader,
            num_epochs=1,
            on_step=interrupt_at(stop_after),
            strategy=SingleDevice("cpu"),
            checkpoint_dir=tmp_path,
            progress_bar=False,
        )

    with pytest.raises(KeyboardInterrupt):
        run(before, stop_after=3)
    with caplog.at_level("INFO", logger="manualloop"):
        run(after)
    tokens = tiny_tokenizer()(list(rows(40)["sentence"]))["input_ids"]
    assert sorted(seen) == sorted(tokens)
    assert (f"max_tokens: {before} -> {after}" in caplog.text) == (before != after)


CHANGES = {
    "a larger budget": ({"max_tokens": 24}, {"max_tokens": 40}),
    "a smaller budget": ({"max_tokens": 40}, {"max_tokens": 24}),
    "another seed": ({"max_tokens": 24, "seed": 1}, {"max_tokens": 24, "seed": 2}),
    "grouped, larger batches": (
        {"group_by_length": True, "batch_size": 4},
        {"group_by_length": True, "batch_size": 8},
    ),
    "another seed, not grouped": ({"batch_size": 4, "seed": 1}, {"batch_size": 4, "seed": 2}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_settings_changed_inside_an_epoch_lose_no_row_in_two_more_stops(name, tmp_path):
    seen = []

    def run(options, stop_after=None):
        data = Dataset.from_dict({**rows(40).to_dict(), "number": list(range(40))})
        tokenizer = tiny_tokenizer()
        tokenizer.model_input_names = [*tokenizer.model_input_names, "number"]
        loader = prepare_dataloaders(data, tokenizer, **options)["train"]
        model = tiny_bert()

        def loss_fn(model, batch):
            seen.extend(batch.pop("number").tolist())
            return model(**batch).loss

        return train_loop(
            model,
            loader,
            None,
            None,
            num_epochs=2,
            on_step=interrupt_at(stop_after),
            loss_fn=loss_fn,
            strategy=SingleDevice("cpu"),
            checkpoint_dir=tmp_path,
            progress_bar=False,
        )

    before, after = CHANGES[name]
    for options, stop_after in ((before, 2), (after, 4), (after, 5)):
        with pytest.raises(KeyboardInterrupt):
            run(options, stop_after)
    run(after)
    assert sorted(seen[:40]) == list(range(40))
    assert sorted(seen[40:]) == list(range(40))


def test_other_lengths_are_another_order_and_refused(tmp_path):
    def run(multiple, max_steps):
        loader = prepare_dataloaders(
            rows(40), tiny_tokenizer(), max_tokens=24, pad_to_multiple_of=multiple
        )["train"]
        options = {"checkpoint_dir": tmp_path, "progress_bar": False}
        train_loop(
            tiny_bert(), loader, max_steps=max_steps, strategy=SingleDevice("cpu"), **options
        )

    run(None, 2)
    with pytest.raises(CheckpointError, match="row_lengths: "):
        run(4, 4)


def test_the_length_of_a_row_is_that_of_its_tokens():
    labels = [[number % 2] * 30 for number in range(40)]
    data = Dataset.from_dict({"sentence": rows(40)["sentence"], "label": labels})
    loader = prepare_dataloaders(data, tiny_tokenizer(), max_tokens=24)["train"]
    assert max(batch["input_ids"].numel() for batch in loader) <= 24
    assert max(len(batch["input_ids"]) for batch in loader) > 2
    nested = Dataset.from_dict({"input_ids": [[[5, 6], [7]]] * 4, "labels": [0, 1, 0, 1]})
    with pytest.raises(ConfigError, match="no column of lists of numbers"):
        prepare_dataloaders(nested, tiny_tokenizer(), task="multiple_choice", max_tokens=24)
    empty = Dataset.from_dict({"input_ids": [[5], []], "labels": [0, 1]})
    with pytest.raises(DataError, match=r'Row 1 of train has no tokens.*row\["input_ids"\]'):
        prepare_dataloaders(empty, tiny_tokenizer(), group_by_length=True)


def test_impossible_budgets_are_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=r"Row 4 of train has 7 tokens.*max_tokens=6"):
        prepare_dataloaders(rows(8), tokenizer, max_tokens=6)
    with pytest.raises(ConfigError, match="max_tokens must be a whole number"):
        prepare_dataloaders(rows(8), tokenizer, max_tokens=0)
    with pytest.raises(ConfigError, match=r"drop_last=True .* max_tokens"):
        prepare_dataloaders(rows(8), tokenizer, max_tokens=60, drop_last=True)
    with pytest.raises(ConfigError, match=r"max_tokens=60 needs the number of tokens .* train"):
        prepare_dataloaders(rows(8).to_iterable_dataset(), tokenizer, max_tokens=60)
