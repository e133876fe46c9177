"""A position belongs to the loader it was taken from, and a user's loader stays as it was."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from datasets import Dataset as ArrowDataset
from resume_cases import OwnSampler, StatefulLoader, Stream, built
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from manualloop import SingleDevice, TrainState, predict_loop, train_steps
from manualloop.data.sampler import ordered_loader


def seed_all(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def new_state():
    model = nn.Linear(1, 1)
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0))


def ids_of(batch):
    values = batch["id"] if isinstance(batch, dict) else batch[0]
    return values.flatten().tolist()


class Run:
    """A state, and the ids of the rows that its updates have used."""

    def __init__(self):
        self.state, self.ids = new_state(), []

    def train(self, loader, steps=None, **options):
        all_ids = self.ids  # the state keeps loss_fn, which must not keep the state

        def loss_fn(model, batch):
            all_ids.append(ids_of(batch))
            return model(torch.ones(1, 1)).mean()

        begin, first = len(self.ids), self.state.progress.num_steps
        options = options or {"max_steps": 10_000}
        for step in train_steps(
            self.state, loader, loss_fn=loss_fn, strategy=SingleDevice("cpu"), **options
        ):
            if steps is not None and step.index == first + steps:
                break
        return self.ids[begin:]


def numbers(first, num_rows=12, batch_size=3, seed=None, **options):
    rows = TensorDataset(torch.arange(first, first + num_rows)[:, None])
    if seed is not None:
        options |= {"shuffle": True, "generator": torch.Generator().manual_seed(seed)}
    return DataLoader(rows, batch_size, **options)


def prepared(first=0, num_rows=12, batch_size=3, seed=1):
    rows = TensorDataset(torch.arange(first, first + num_rows)[:, None])
    return ordered_loader(rows, "train", batch_size, shuffle=True, seed=seed, drop_last=False)


def batches_of(first, num_batches=4):
    return [{"id": torch.tensor([first + number])} for number in range(num_batches)]


def arrow_stream(first):
    rows = ArrowDataset.from_dict({"id": list(range(first, first + 8))})
    return DataLoader(rows.to_iterable_dataset(num_shards=2).with_format("torch"), 2)


def whole(loader):
    return [ids_of(batch) for batch in loader]


OTHERS = {
    "other rows": (lambda: numbers(0), lambda: numbers(100)),
    "other length": (lambda: numbers(0), lambda: numbers(0, num_rows=20)),
    "other batch size": (lambda: numbers(0), lambda: numbers(0, batch_size=2)),
    "other generator": (lambda: numbers(0, seed=1), lambda: numbers(100, seed=2)),
    "other seed, same rows": (lambda: numbers(0, seed=1), lambda: numbers(0, seed=2)),
    "prepared, other rows": (prepared, lambda: prepared(100)),
    "prepared, other seed": (prepared, lambda: prepared(seed=2)),
    "prepared, then built": (prepared, lambda: numbers(0, seed=3)),
    "built, then prepared": (lambda: numbers(0, seed=3), prepared),
    "lists": (lambda: batches_of(0), lambda: batches_of(100)),
    "generators": (lambda: iter(batches_of(0)), lambda: iter(batches_of(100))),
    "streams": (lambda: arrow_stream(0), lambda: arrow_stream(100)),
    "list, then stream": (lambda: batches_of(0), lambda: arrow_stream(0)),
    "stateful, then list": (StatefulLoader, lambda: batches_of(100)),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_another_loader_begins_at_its_start_with_its_own_random_state(name, steps, caplog):
    first, second = OTHERS[name]
    seed_all(1)
    expected = whole(second())
    seed_all(1)
    run = Run()
    run.train(first(), steps)
    loader, total = second(), steps + len(expected)
    with caplog.at_level("INFO", logger="manualloop"):
        found = run.train(loader, max_steps=total)
    assert found == expected
    assert "another loader than that of the last updates" in caplog.text
    assert (run.state.progress.epoch, run.state.progress.num_samples) == (1, 0)


def test_a_loader_that_was_left_for_another_begins_anew():
    one, other = numbers(0), numbers(100)
    run = Run()
    assert run.train(one, 2) == whole(one)[:2]
    assert run.train(other, 3) == whole(other)[:3]
    assert run.train(one, 1) == whole(one)[:1]
    assert run.train(other, 1) == whole(other)[:1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: numbers(0, seed=4),
        prepared,
        lambda: batches_of(0),
        lambda: iter(batches_of(0)),
        lambda: arrow_stream(0),
        lambda: DataLoader(Stream(), 2),
        StatefulLoader,
        lambda: built(num_workers=2),
        lambda: built(num_workers=2, persistent_workers=True),
    ],
    ids=["built", "prepared", "list", "generator", "arrow", "stream", "stateful", "2", "kept"],
)
def test_entered_again_a_loader_is_continued_and_nothing_is_lost(make):
    seed_all(1)
    expected = whole(make())
    run, loader = Run(), make()
    seed_all(1)
    while run.state.progress.epoch == 0:
        run.train(loader, 1)
    assert run.ids == expected


@pytest.mark.parametrize(
    "make",
    [prepared, lambda: numbers(0, seed=4), lambda: batches_of(0), lambda: arrow_stream(0)],
    ids=["prepared", "built", "list", "arrow"],
)
def test_a_loader_that_was_built_again_takes_over_the_position_and_that_is_logged(make, caplog):
    run = Run()
    found = run.train(make(), 2)
    with caplog.at_level("INFO", logger="manualloop"):
        found += run.train(make(), max_steps=4)
    assert found == whole(make())
    assert "the loader was built again" in caplog.text


def test_two_states_read_one_loader_alternately():
    loader = built(num_workers=1, persistent_workers=True, shuffle=False)
    one, other = Run(), Run()
    for _ in range(7):
        one.train(loader, 1)
        other.train(loader, 1)
    assert one.ids == other.ids == whole(loader)


def test_a_stage_that_is_done_leaves_the_position_to_the_next_one():
    first, second = batches_of(0), batches_of(100)
    run = Run()
    run.train(first, max_steps=2)
    run.train(second, 1, max_steps=6)
    saved = copy.deepcopy(run.state.state_dict())
    again = Run()
    again.state.load_state_dict(saved)
    assert again.train(first, max_steps=2) == []
    assert again.train(second, max_steps=6) == whole(second)[1:]


def test_a_loaded_position_is_not_used_for_other_data(caplog):
    run = Run()
    run.train(numbers(0), 2)
    again = Run()
    again.state.load_state_dict(copy.deepcopy(run.state.state_dict()))
    with caplog.at_level("INFO", logger="manualloop"):
        assert again.train(numbers(100), num_epochs=1) == whole(numbers(100))
    assert "another loader" in caplog.text


def noted(loader):
    return {name: value for name, value in vars(loader).items() if name != "_iterator"}


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("make", [built, prepared], ids=["built", "prepared"])
def test_the_loader_is_as_it_was_during_and_after_a_run(make, num_workers):
    loader = built(
        make().dataset,
        collate_fn=torch.utils.data.default_collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        shuffle=False,
    )
    before, expected = noted(loader), whole(loader)
    run = Run()
    for _ in range(2):
        run.train(loader, 1)
        assert whole(loader) == expected, "beside the run"
        assert noted(loader) == before
    run.train(loader, num_epochs=1)
    assert run.ids == expected
    assert whole(loader) == expected, "after the run"
    assert Run().train(loader, num_epochs=1) == expected, "in a second run"


def test_batches_in_the_order_of_the_workers_are_read_in_order_and_that_is_logged(caplog):
    loader = built(num_workers=2, shuffle=False, in_order=False)
    with caplog.at_level("INFO", logger="manualloop"):
        found = Run().train(loader, num_epochs=1)
    assert found == whole(built(shuffle=False))
    assert "in_order" in caplog.text
    assert loader.in_order is False


class Jitter:
    def __init__(self, seed):
        self.generators = {"x": [np.random.default_rng(seed), random.Random(seed)]}

    def __call__(self, x):
        return x + self.generators["x"][0].normal() + self.generators["x"][1].random()


class Points(Dataset):
    def __init__(self, seed):
        self.transform = Jitter(seed)

    def __len__(self):
        return 7

    def __getitem__(self, row):
        return {"x": self.transform(torch.zeros(1)), "id": row}


def noisy_collate(seed):
    noise = torch.Generator().manual_seed(seed)

    def collate(rows):
        batch = torch.utils.data.default_collate(rows)
        return batch | {"x": batch["x"] + torch.rand(batch["x"].shape, generator=noise)}

    return collate


class InsideSampler(OwnSampler):
    """A sampler whose order comes from a sampler inside it."""

    def __init__(self, seed):
        self.inner = OwnSampler(random.Random(seed))

    def __iter__(self):
        return iter(self.inner)


DRAWING = {
    "nested datasets": lambda **o: built(
        ConcatDataset([Subset(Points(1), range(7)), Points(2)]), **o
    ),
    "closure of collate_fn": lambda **o: built(collate_fn=noisy_collate(3), **o),
    "all": lambda **o: built(
        ConcatDataset([Points(1), Points(2)]),
        collate_fn=noisy_collate(3),
        generator=torch.Generator().manual_seed(4),
        **o,
    ),
    "sampler inside a sampler": lambda **o: built(
        sampler=InsideSampler(5), shuffle=None, collate_fn=noisy_collate(3), **o
    ),
}


NEW, KEPT = {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}


def is_sampled(name, options, cut):
    """Workers take long to start; "all" has what the first two have."""
    return not options or (
        name in ("all", "sampler inside a sampler") and (options, cut) in ((NEW, 9), (KEPT, 2))
    )


@pytest.mark.parametrize(
    ("name", "options", "cut"),
    [
        pytest.param(*case, marks=() if is_sampled(*case) else pytest.mark.exhaustive)
        for case in itertools.product(DRAWING, ({}, NEW, KEPT), (2, 9))
    ],
    ids=str,
)
def test_generators_wherever_they_are_resume_bit_equal(name, options, cut):
    def run(state, loader, steps=None):
        seen, first = [], state.progress.num_steps

        def loss_fn(model, batch):
            seen.append((batch["id"].tolist(), batch["x"].tolist()))
            return model(torch.ones(1, 1)).mean()

        for step in train_steps(
            state, loader, max_steps=14, loss_fn=loss_fn, strategy=SingleDevice("cpu")
        ):
            if steps is not None and step.index == first + steps:
                break
        return seen

    seed_all(1)
    expected = run(new_state(), DRAWING[name](**options))
    seed_all(1)
    first = new_state()
    found = run(first, DRAWING[name](**options), cut)
    saved, drawn = copy.deepcopy(first.state_dict()), torch.get_rng_state()
    seed_all(9)
    again, loader = new_state(), DRAWING[name](**options)
    again.load_state_dict(saved)
    torch.set_rng_state(drawn)
    assert found + run(again, loader) == expected


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return {"logits": x + self.bias}


def scored(num_rows=8):
    x = [[float(row), 3.5] for row in range(num_rows)]
    return ArrowDataset.from_dict({"x": x})


@pytest.mark.parametrize(
    ("num_shards", "num_workers", "is_known"),
    [(2, 2, False), (1, 2, True), (4, 1, True), (4, 0, True)],
)
@pytest.mark.filterwarnings("ignore:Too many dataloader workers")
def test_the_rows_of_a_stream_have_numbers_only_where_one_process_reads_them(
    num_shards, num_workers, is_known, caplog
):
    stream = scored().to_iterable_dataset(num_shards=num_shards).with_format("torch")
    loader = DataLoader(stream, 2, num_workers=num_workers)
    with caplog.at_level("INFO", logger="manualloop"):
        table = predict_loop(Half(), loader, strategy=SingleDevice("cpu"))
    assert len(table) == 8
    assert ("Predictions.index is None" in caplog.text) == (not is_known)
    if is_known:
        assert table.index.tolist() == list(range(8))
        assert table.predictions.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    else:
        assert table.index is None
        assert sorted(table.predictions.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]


class Waiting(Dataset):
    """The first batch comes late, by a wait for the second one's file."""

    def __init__(self, file):
        self.file = file

    def __len__(self):
        return 8

    def __getitem__(self, row):
        if row == 2:
            self.file.touch()
        while row == 0 and not self.file.exists():
            pass
        return {"x": torch.tensor([float(row), 3.5])}


def test_predictions_are_in_order_where_workers_finish_in_another(tmp_path):
    loader = DataLoader(Waiting(tmp_path / "second"), 2, num_workers=2, in_order=False)
    table = predict_loop(Half(), loader, strategy=SingleDevice("cpu"))
    assert table.index.tolist() == list(range(8))
    assert table.predictions.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_rows_filtered_before_are_numbered_as_the_loader_has_them():
    kept = scored().filter(lambda row: row["x"][0] % 2 == 0).with_format("torch")
    table = predict_loop(Half(), DataLoader(kept, 3), strategy=SingleDevice("cpu"))
    assert table.index.tolist() == [0, 1, 2, 3]
    assert table.predictions.tolist() == [1, 1, 0, 0]
