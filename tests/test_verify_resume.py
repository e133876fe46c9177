"""verify_resume and compare_runs: proofs that find what is wrong, and say where."""

import itertools
import multiprocessing
import pickle
import random
import sys
import time
import types
from functools import partial

import numpy as np
import processes
import pytest
import torch
from bench import CONTEXT
from torch.utils.data import DataLoader, Dataset

from manualloop import (
    CheckpointError,
    ConfigError,
    compare_runs,
    train_loop,
    verify,
    verify_resume,
)


@pytest.fixture(autouse=True)
def imported_before(request, monkeypatch):
    """Fork the processes from one that has torch imported; one case starts new interpreters."""
    if "new interpreters" not in request.node.name:
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: CONTEXT)


class Rows(Dataset):
    """Twenty-two rows with noise; with ``counts`` also the number of rows read so far."""

    def __init__(self, counts):
        self.numbers = itertools.count() if counts else itertools.repeat(0)

    def __len__(self):
        return 22

    def __getitem__(self, row):
        return row * torch.rand(2) + next(self.numbers)


def train(counts=False, lr=0.1, seed=0, num_epochs=2, **options):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    return train_loop(
        model,
        DataLoader(Rows(counts), 4, shuffle=True),
        torch.optim.AdamW(model.parameters(), lr=lr),
        num_epochs=num_epochs,
        gradient_accumulation_steps=2,
        loss_fn=lambda model, batch: model(batch).square().mean(),
        evaluate=lambda: {"weight": model[0].weight.sum().item()},
        log_every=4,
        progress_bar=False,
        **options,
    )


def train_on_rows_that_count(**options):
    return train(counts=True, **options)


def train_without_options(**options):
    return train()


def train_with_an_error(**options):
    raise KeyError("no such column")


def train_without_a_seed(**options):
    return train(seed=time.time_ns(), **options)


def train_from_another_start(**options):
    # A part of the run that no checkpoint holds: a schedule of the process's own.
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    scale = itertools.count(1)
    return train_loop(
        model,
        [torch.ones(2, 1)] * 6,
        torch.optim.SGD(model.parameters(), lr=0.01),
        num_epochs=1,
        loss_fn=lambda model, batch: model(batch).square().mean() * next(scale),
        progress_bar=False,
        **options,
    )


@pytest.mark.parametrize(
    "processes", ["forked", pytest.param("new interpreters", marks=pytest.mark.exhaustive)]
)
def test_a_run_that_is_restored_is_equal_to_the_last_bit(processes):
    report = verify_resume(train, at=2)
    assert report.is_exact
    assert report.num_steps == 6
    assert str(report) == (
        "6 steps, interrupted after step 2 and resumed: equal to the last bit: batches, losses, "
        "history, weights, optimizer."
    )


def test_data_that_keep_count_are_found_at_the_first_step_after_the_resume():
    report = verify_resume(train_on_rows_that_count, at=4)
    assert not report.is_exact
    assert report.difference.startswith("step 5: batches ")


def test_a_loss_that_keeps_count_is_found_too():
    report = verify_resume(train_from_another_start, at=3)
    assert report.difference.startswith("step 4: loss ")


def test_a_run_that_is_not_seeded_is_told_from_one_that_is_not_restored():
    report = verify_resume(train_without_a_seed, at=3)
    assert report.difference.startswith("step 1: ")
    assert "differs every time. Set its seeds" in report.difference


def test_what_cannot_be_verified_is_said():
    with pytest.raises(ConfigError, match="at must be a whole number of at least 1, got 0"):
        verify_resume(train, at=0)
    with pytest.raises(ConfigError, match="at=6 is not inside the run: it has 6 steps"):
        verify_resume(train, at=6)
    with pytest.raises(RuntimeError, match="has not passed its options on"):
        verify_resume(train_without_options, at=1)
    with pytest.raises(RuntimeError, match="KeyError: 'no such column'"):
        verify_resume(train_with_an_error, at=1)


class Unsendable:
    def __init__(self):
        self.lines = open(__file__)  # noqa: SIM115  # closed with this object

    def __call__(self, **options):
        return train(**options)


def test_a_function_that_no_process_can_get_is_refused_before_one_is_started(monkeypatch):
    def nested(**options):
        return train(**options)

    unsendable = Unsendable()
    main = types.ModuleType("__main__")
    main.__file__ = __file__  # a process of pytest-xdist has none, as a notebook
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(multiprocessing, "get_context", None)
    for function in (nested, lambda **options: train(**options), partial(nested), unsendable):
        with pytest.raises(ConfigError, match=r"cannot be sent.*def train") as error:
            verify_resume(function, at=2)
        assert len(str(error.value).splitlines()) == 1
    unsendable.lines.close()


def test_functions_of_a_notebook_are_forked(monkeypatch):
    def nested(**options):
        return train(**options)

    def of_notebook(**options):
        return train(**options)

    of_notebook.__module__, of_notebook.__qualname__ = "__main__", "of_notebook"
    main = types.ModuleType("__main__")
    main.of_notebook = of_notebook
    monkeypatch.setitem(sys.modules, "__main__", main)
    for function in (of_notebook, nested, partial(of_notebook)):
        assert verify._sent(function) is None
        with monkeypatch.context() as patch:
            patch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
            with pytest.raises(ConfigError, match=r"into a file|cannot be sent"):
                verify._sent(function)
    assert pickle.loads(verify._sent(train)) is train


class QuietRows(Dataset):
    """Rows with generators that nobody seeds, and that draw nothing before row 12.

    Args:
        counts: Whether the rows from 12 on also depend on the number of rows read so far.
    """

    def __init__(self, counts):
        self.generators = [np.random.default_rng(), random.Random()]
        self.counts, self.num_read = counts, 0

    def __len__(self):
        return 20

    def __getitem__(self, row):
        self.num_read += 1
        return torch.full((2,), row + self.counts * (row >= 12) * self.num_read)


class Holder:
    average = torch.ones(())


class Averaging(torch.nn.Module):
    """A layer that divides by a moving average.

    Args:
        is_saved: Whether it is in a buffer, or in an object that nothing can save.
    """

    def __init__(self, is_saved):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.holder = None if is_saved else Holder()
        self.register_buffer("average", torch.ones(()))

    def forward(self, x):
        x, holder = self.layer(x), self.holder or self
        holder.average = (0.9 * holder.average + 0.1 * x.detach().abs().mean()).detach()
        return x / holder.average


def train_quietly(counts=False, is_saved=True, **options):
    model = Averaging(is_saved)
    return train_loop(
        model,
        DataLoader(QuietRows(counts), 2),
        torch.optim.SGD(model.parameters(), lr=0.001),
        max_steps=6,
        loss_fn=lambda model, batch: model(batch.float()).square().mean(),
        progress_bar=False,
        **options,
    )


def train_with_a_lost_average(**options):
    return train_quietly(is_saved=False, **options)


def train_on_rows_that_count_later(**options):
    return train_quietly(counts=True, **options)


def test_a_run_that_draws_nothing_and_seeds_nothing_is_exact_inside_an_epoch():
    report = verify_resume(train_quietly, at=4)
    assert report.is_exact, report


class Slow(torch.optim.SGD):
    """Leaves its moments out of its state_dict."""

    def state_dict(self):
        return super().state_dict() | {"state": {}}


def never(record):
    raise AssertionError("a proof is no run that a tracker should show")


never.open_run = never


def train_with_two(second=torch.optim.SGD, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    return train_loop(
        model,
        DataLoader(Rows(False), 4, shuffle=True),
        [
            torch.optim.AdamW(model[0].parameters(), lr=0.1),
            second(model[2].parameters(), lr=1e-3, momentum=0.9),
        ],
        ["linear", "cosine"],
        num_epochs=2,
        loss_fn=lambda model, batch: model(batch).square().mean(),
        trackers=[never],
        progress_bar=False,
        **options,
    )


def train_with_two_of_which_one_forgets(**options):
    return train_with_two(Slow, **options)


def test_several_optimizers_are_compared_each():
    report = verify_resume(train_with_two, at=3)
    assert report.is_exact
    assert "optimizer" in str(report)
    report = verify_resume(train_with_two_of_which_one_forgets, at=3)
    assert report.difference.startswith("step 5: loss ")


def test_weights_that_no_state_dict_has_are_found():
    report = verify_resume(train_with_a_lost_average, at=4)
    assert report.difference.startswith("step 5: loss ")


def test_a_position_that_only_shows_in_the_batches_after_the_last_step_is_found():
    report = verify_resume(train_on_rows_that_count_later, at=4)
    assert report.difference.startswith("batch 1 after the last step: ")


def test_equal_runs_compare_equal(tmp_path):
    for name in "ab":
        train(checkpoint_dir=tmp_path / name)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    assert comparison.is_same
    assert comparison.settings == []
    assert str(comparison) == "The same in all 5 records."


def test_the_first_step_that_differs_and_what_was_set_up_otherwise_are_named(tmp_path):
    train(checkpoint_dir=tmp_path / "a")
    train(checkpoint_dir=tmp_path / "b", lr=0.2)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (comparison.step, comparison.names, comparison.num_records) == (1, ["lr"], 0)
    assert comparison.settings == ["lr: 0.1 -> 0.2"]
    assert "Different from step 1 on" in str(comparison)
    assert "lr 0.1 -> 0.2" in str(comparison)


def test_a_run_that_goes_on_longer_differs_where_the_other_ends(tmp_path):
    train(checkpoint_dir=tmp_path / "a", lr_scheduler=None)
    train(checkpoint_dir=tmp_path / "b", lr_scheduler=None, num_epochs=3)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    # The last step of a run always makes a record, so the shorter run has one of its own there.
    assert comparison.step == 6
    assert "loss" in comparison.first
    assert "eval_weight" in comparison.second


def test_a_folder_without_a_run_is_refused(tmp_path):
    train(checkpoint_dir=tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty holds no run"):
        compare_runs(tmp_path / "a", tmp_path / "empty")


SCRIPT = """
from functools import partial
from manualloop import verify_resume

print(verify_resume(partial(dict, rows=bytes(1_000_000)), at=1))
"""


@pytest.mark.exhaustive  # both interpreters import everything
def test_a_script_without_a_guard_in_new_interpreters_ends_with_the_advice(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = processes.run(path, is_merged=False)
    assert done.returncode == 1
    assert done.errors.strip().endswith('verify_resume under if __name__ == "__main__":')
