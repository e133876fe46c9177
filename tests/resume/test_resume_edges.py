"""Resuming where it is easily forgotten: short last batches, streams and loaders of other kinds."""

import itertools
import random

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset as ArrowDataset
from datasets import concatenate_datasets, interleave_datasets
from helpers import tiny_tokenizer
from resume_cases import OwnSampler, Rows, StatelessStream, built
from test_resume import Trained, check_cuts
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import DataCollatorForLanguageModeling

from manualloop.data.sampler import ordered_loader
from manualloop.internals import has_shuffle_buffer

TWO = {"num_workers": 2}
KEPT = {"num_workers": 2, "persistent_workers": True}


class UnevenStream(IterableDataset):
    """13 rows, so that the last batch is short; of two workers one has 8 rows, the other 5.

    Its position is the start again as soon as it has reached the end, as a stream must have it
    that is to be read once more.
    """

    def __init__(self, draws=False):
        self.rows, self.position = Rows(draws, num_rows=13), 0

    def __iter__(self):
        info = get_worker_info()
        first, end = (0, 13) if info is None else ((0, 8), (8, 13))[info.id]
        for row in range(first + self.position, end):
            self.position += 1
            yield self.rows[row]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class SizedStream(UnevenStream):
    def __len__(self):
        return 13


class DealtStream(StatelessStream):
    """A stream that knows nothing of its place, as most are written."""

    def __iter__(self):
        info = get_worker_info()
        step = info.num_workers if info else 1
        rows = range(info.id if info else 0, len(self.rows), step)
        return (self.rows[row] for row in rows)


class UnevenDealtStream(StatelessStream):
    """Of two workers the first has 5 rows, and so is at its end before the other, which has 8."""

    def __iter__(self):
        rows = range(5) if get_worker_info().id == 0 else range(5, 13)
        return (self.rows[row] for row in rows)


class Batches(Dataset):
    """Whole batches, for a loader with batch_size=None."""

    def __len__(self):
        return 7

    def __getitem__(self, number):
        rows = [2 * number, 2 * number + 1]
        return {"id": torch.tensor(rows), "x": torch.rand(2, 4)}


class BatchStream(IterableDataset):
    def __init__(self):
        self.batches, self.position = Batches(), 0

    def __iter__(self):
        for number in range(self.position, 7):
            self.position += 1
            yield self.batches[number]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class OwnWay(DataLoader):
    """A loader of the user's that iterates in a way of its own."""

    def __iter__(self):
        yield from super().__iter__()


class Masked:
    """Collates as masked language modelling does, which draws; the loss of it is that of x."""

    def __init__(self):
        tokenizer = tiny_tokenizer(mask_token="[UNK]")
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)

    def __call__(self, rows):
        tokens = [{"input_ids": [2, 4 + int(row["id"]) % 12, 5, 3]} for row in rows]
        batch = self.collator(tokens)
        ids = torch.stack([row["id"] for row in rows])
        return {"id": ids, "x": (batch["input_ids"] + batch["labels"]) / 10}


def thirteen():
    return [{"x": x.tolist(), "id": row} for row, x in enumerate(Rows(num_rows=13).x)]


def arrow_stream(**options):
    stream = ArrowDataset.from_list(thirteen()).to_iterable_dataset(num_shards=4)
    return DataLoader(stream.with_format("torch"), 2, **options)


def accelerated(loader):
    return Accelerator(cpu=True).prepare_data_loader(loader)


def long(make, **options):
    return pytest.param(lambda: make(**options), marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ordered_loader(
            Rows(draws=True, num_rows=13), "train", 2, shuffle=True, seed=1, drop_last=False
        ),
        lambda: built(Rows(draws=True, num_rows=13)),
        long(lambda: built(Rows(draws=True, num_rows=13), **TWO)),
        lambda: DataLoader(UnevenStream(draws=True), 2),
        lambda: DataLoader(UnevenStream(draws=True), 2, **TWO),
        long(lambda: DataLoader(UnevenStream(draws=True), 2, **KEPT)),
        lambda: DataLoader(SizedStream(draws=True), 2),
        arrow_stream,
        long(arrow_stream, **TWO),
        long(arrow_stream, **KEPT),
    ],
    ids=[
        "prepared",
        "built",
        "built, 2 workers",
        "stream",
        "stream, 2 workers",
        "stream, 2 kept workers",
        "stream with a length",
        "arrow stream",
        "arrow stream, 2 workers",
        "arrow stream, 2 kept workers",
    ],
)
def test_cut_points_where_the_last_batch_is_short(make, cuts, tmp_path):
    check_cuts(make, tmp_path, cuts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Batches(), batch_size=None, shuffle=True),
        long(lambda: DataLoader(Batches(), batch_size=None, shuffle=True, **TWO)),
        lambda: DataLoader(BatchStream(), batch_size=None),
    ],
    ids=["rows", "rows, 2 workers", "stream"],
)
def test_cut_points_of_a_dataset_whose_items_are_batches(make, cuts, tmp_path):
    check_cuts(make, tmp_path, cuts)


@pytest.mark.parametrize(
    "make",
    [lambda: built(collate_fn=Masked()), long(lambda: built(collate_fn=Masked(), **TWO))],
    ids=["in the process", "2 workers"],
)
def test_cut_points_of_the_masking_collator_of_transformers(make, cuts, tmp_path):
    check_cuts(make, tmp_path, cuts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DealtStream(), 2),
        lambda: DataLoader(DealtStream(), 2, **TWO),
        lambda: DataLoader(UnevenDealtStream(), 2, **TWO),
    ],
    ids=["in the process", "2 workers", "2 workers, one of which ends first"],
)
def test_cut_points_of_a_stream_without_a_state(make, cuts, tmp_path, caplog):
    with caplog.at_level("INFO", logger="manualloop"):
        check_cuts(make, tmp_path, cuts)
    assert "has neither a sampler nor a state_dict()" in caplog.text


def test_a_stream_without_a_state_that_draws_in_workers_is_exact_or_says_that_it_is_not(
    tmp_path, caplog
):
    def make():
        return DataLoader(DealtStream(draws=True), 2, **KEPT)

    whole = Trained(make, tmp_path / "whole")
    expected = whole.end()
    Trained(make, tmp_path / "cut", stop_after=5)
    with caplog.at_level("INFO", logger="manualloop"):
        second = Trained(make, tmp_path / "cut", seed=5)
    assert second.ids == whole.ids[11:]
    assert second.end() == expected or "not bit-exact" in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda: ordered_loader(Rows(), "train", 2, shuffle=True, seed=1, drop_last=False),
        built,
        lambda: built(generator=torch.Generator().manual_seed(random.getrandbits(30))),
        lambda: built(sampler=OwnSampler(random.Random(random.random())), shuffle=None),
    ],
    ids=["prepared", "built", "own generator", "own sampler"],
)
def test_cut_points_of_a_loader_that_accelerate_has_prepared(make, cuts, tmp_path):
    check_cuts(lambda: accelerated(make()), tmp_path, cuts)


@pytest.mark.parametrize("options", [{}, TWO], ids=["in the process", "2 workers"])
def test_cut_points_of_a_loader_of_a_class_of_the_users(options, cuts, tmp_path):
    check_cuts(lambda: OwnWay(Rows(), 2, shuffle=True, **options), tmp_path, cuts)


class Endless(OwnSampler):
    """Shuffles again and again, and has no length: an epoch never ends."""

    __len__ = None

    def __iter__(self):
        while True:
            yield from super().__iter__()


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}], ids=["in the process", "1 worker"])
def test_cut_points_of_a_sampler_without_an_end(options, cuts, tmp_path):
    def make():
        return built(sampler=Endless(random.Random(2)), shuffle=None, **options)

    check_cuts(make, tmp_path, cuts)


def test_an_evaluation_that_draws_and_then_fails_is_made_again_with_the_same_draws(tmp_path):
    calls = itertools.count()

    def run(folder, fails, seed=1):
        def evaluate():
            drawn = torch.rand(()).item(), random.random()
            if fails and next(calls) == 0:
                raise ZeroDivisionError("no such metric")
            return {"drawn": sum(drawn)}

        return Trained(built, folder, evaluate=evaluate, seed=seed)

    expected = run(tmp_path / "whole", fails=False).end()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut", fails=True)
    assert run(tmp_path / "cut", fails=True, seed=5).end() == expected


@pytest.mark.parametrize("every", ["0.5 epoch", "0.7 epoch", "epoch"])
def test_parts_of_epochs_fall_due_at_the_same_steps_after_a_resume(every, tmp_path):
    options = {"evaluate_every": every, "log_every": every, "checkpoint_every": every}
    whole = Trained(built, tmp_path / "whole", **options)
    expected = whole.end()
    for stop in (2, 4, 6):
        Trained(built, tmp_path / str(stop), stop_after=stop, **options)
        assert Trained(built, tmp_path / str(stop), **options).end() == expected


def test_steps_made_again_after_the_last_checkpoint_are_in_the_history_once(tmp_path):
    options = {"checkpoint_every": 3, "log_every": 1}
    expected = Trained(built, tmp_path / "whole", **options).end()
    for stop in (3, 5, 6):
        first = Trained(built, tmp_path / str(stop), stop_after=stop, **options)
        second = Trained(built, tmp_path / str(stop), **options)
        assert len(first.losses) + len(second.losses) > 6, "some were made twice"
        assert second.end() == expected


def test_a_finished_run_does_not_evaluate_again(tmp_path):
    calls = []

    def evaluate():
        calls.append("evaluation")
        return {"f1": len(calls)}

    first = Trained(built, tmp_path, evaluate=evaluate)
    num_calls = len(calls)
    again = Trained(built, tmp_path, evaluate=evaluate)
    assert again.ids == again.losses == []
    assert len(calls) == num_calls > 0
    assert again.result.metrics == first.result.metrics


@pytest.mark.parametrize("batch_size", [5, 12])
def test_larger_batches_that_leave_nothing_of_the_epoch_end_it(batch_size, tmp_path):
    def make(size=2):
        return ordered_loader(Rows(), "train", size, shuffle=True, seed=1, drop_last=True)

    options = {"num_epochs": None, "max_steps": 8, "gradient_accumulation_steps": 1}
    first = Trained(make, tmp_path, stop_after=7, **options)
    assert len({row for ids in first.ids[:6] for row in ids}) == 12
    second = Trained(lambda: make(batch_size), tmp_path, **options)
    assert [len(ids) for ids in second.ids] == [batch_size] * 2
    assert second.result.history[-1]["step"] == 8
    progress = second.result.state.progress
    assert (progress.epoch, progress.num_samples) == (2 if batch_size == 5 else 3, 0)


def test_the_number_of_workers_matters_only_to_what_depends_on_it(tmp_path, caplog):
    for name, draws, number in (("plain", False, 2), ("drawing", True, 1)):
        folder = tmp_path / name
        whole = Trained(lambda d=draws: built(Rows(d), **TWO), folder / "whole")
        expected = whole.end()
        Trained(lambda d=draws: built(Rows(d), **TWO), folder / "cut", stop_after=3)
        caplog.clear()
        with caplog.at_level("INFO", logger="manualloop"):
            second = Trained(
                lambda d=draws, n=number: built(Rows(d), num_workers=n % 2), folder / "cut"
            )
        assert second.ids == whole.ids[6:]
        assert ("not bit-exact, because num_workers" in caplog.text) == draws
        assert (second.end() == expected) == (not draws)


def shuffled():
    stream = ArrowDataset.from_list(thirteen()).to_iterable_dataset(num_shards=2)
    return stream.shuffle(seed=1, buffer_size=5)


def plain_stream():
    return ArrowDataset.from_list(thirteen()).to_iterable_dataset(num_shards=2)


@pytest.mark.parametrize(
    "make",
    [
        shuffled,
        lambda: shuffled().map(dict),
        lambda: shuffled().filter(bool).take(6),
        lambda: shuffled().with_format("torch"),
        lambda: concatenate_datasets([plain_stream(), shuffled()]),
        lambda: interleave_datasets([shuffled(), plain_stream()]),
        lambda: interleave_datasets([plain_stream(), concatenate_datasets([shuffled()] * 2)]),
    ],
    ids=["shuffled", "mapped", "taken", "formatted", "concatenated", "interleaved", "nested"],
)
def test_a_shuffle_buffer_is_found_wherever_it_is(make):
    assert has_shuffle_buffer(make())


def test_a_stream_without_a_shuffle_buffer_has_none():
    for stream in (plain_stream(), interleave_datasets([plain_stream()] * 2), UnevenStream()):
        assert not has_shuffle_buffer(stream)
    assert not has_shuffle_buffer([1, 2])
