"""Workers that die, rows of NaN, losses that overflow."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from manualloop import (
    CheckpointError,
    DataError,
    NonFiniteError,
    SingleDevice,
    TrainState,
    load_checkpoint,
    prepare_scheduler,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.data.sampler import order, ordered_loader

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
NUM_ROWS, BAD_ROW = 24, order(24, seed=1, epoch=0)[13]  # in batch 6: update 3, of batches 4 to 6


class Rows(Dataset):
    """Rows with noise, one of which cannot be read while the file ``cause`` exists."""

    def __init__(self, cause, kind):
        self.cause, self.kind = cause, kind
        self.x = torch.randn(NUM_ROWS, 4, generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return NUM_ROWS

    def __getitem__(self, row):
        x = self.x[row] + 0.1 * torch.rand(4)
        if row == BAD_ROW and Path(self.cause).exists():
            if self.kind == "raise":
                raise KeyError("no such column")
            if self.kind == "NaN":
                return {"x": x * float("nan")}
            os.kill(os.getpid(), self.kind)
        return {"x": x}


def train(folder, cause, kind, *, on_step=None, num_workers=2, timeout=0, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    loader = ordered_loader(
        Rows(str(cause), kind),
        "train",
        2,
        shuffle=True,
        seed=1,
        drop_last=False,
        num_workers=num_workers,
        timeout=timeout,
    )
    return train_loop(
        model,
        loader,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        num_epochs=2,
        gradient_accumulation_steps=3,
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
        strategy=SingleDevice("cpu"),
        checkpoint_dir=folder,
        checkpoint_every=1,
        on_step=on_step,
        log_every=1,
        progress_bar=False,
        **options,
    )


def weights(model):
    return [weight.tolist() for weight in model.parameters()]


def check(tmp_path, kind, error, pattern, **options):
    cause = tmp_path / "cause"
    whole = train(tmp_path / "whole", cause, kind, **options)
    cause.touch()
    with pytest.raises(error, match=pattern) as raised:
        train(tmp_path / "run", cause, kind, **options)
    cause.unlink()
    if kind != signal.SIGSTOP:  # on a busy machine an earlier batch may come too late as well
        assert (tmp_path / "run" / "step-00000002").is_dir()
    result = train(tmp_path / "run", cause, kind, **options)
    assert weights(result.state.model) == weights(whole.state.model)
    assert result.history == whole.history
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("raise", "KeyError: 'no such column'"),
        pytest.param(signal.SIGSTOP, "timed out after 30 seconds", marks=pytest.mark.exhaustive),
    ],
)
def test_f12_a_worker_that_fails_is_explained_and_the_rerun_is_exact(
    kind, pattern, tmp_path, monkeypatch
):
    # By descriptors, torch asks a worker for the memory of a batch that it has sent before, and if
    # that worker is stopped by then, waits for ever: there `timeout` does not count.
    monkeypatch.setattr(torch.multiprocessing, "_sharing_strategy", "file_system")
    timeout = 30 if kind == signal.SIGSTOP else 0
    message = "A worker failed while it read train batch"
    text = check(tmp_path, kind, DataError, message, timeout=timeout)
    assert pattern in text
    rows = re.search(r"of the rows ([\d, ]+)", text)[1]
    assert str(BAD_ROW) in rows.split(", ")
    assert "num_workers=0" in text


@pytest.mark.exhaustive
def test_f12_after_a_worker_was_killed_the_rerun_is_exact(tmp_path):
    # torch raises from its handler of SIGCHLD, wherever the main process is at that moment: while
    # it waits for a batch the rows are named, in a save it is the reason, elsewhere it is torch's.
    cause = tmp_path / "cause"
    whole = train(tmp_path / "whole", cause, signal.SIGKILL)
    cause.touch()
    # On a busy machine it may look at its workers before that signal comes.
    pattern = "is killed by signal: Killed|exited unexpectedly"
    with pytest.raises((DataError, CheckpointError, RuntimeError), match=pattern):
        train(tmp_path / "run", cause, signal.SIGKILL)
    cause.unlink()
    result = train(tmp_path / "run", cause, signal.SIGKILL)
    assert weights(result.state.model) == weights(whole.state.model)
    assert result.history == whole.history


def test_f12_without_workers_a_row_that_cannot_be_read_keeps_its_own_error(tmp_path):
    check(tmp_path, "raise", KeyError, "no such column", num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_f13_a_row_of_nan_stops_before_the_update_and_is_named(num_workers, tmp_path):
    text = check(
        tmp_path, "NaN", NonFiniteError, "The loss is nan at step 3", num_workers=num_workers
    )
    assert "epoch 0" in text
    assert f"row id {BAD_ROW}" in text


def test_f13_the_weights_are_those_of_the_checkpoint_before(tmp_path):
    cause = tmp_path / "cause"
    cause.touch()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    loader = ordered_loader(
        Rows(str(cause), "NaN"), "train", 2, shuffle=True, seed=1, drop_last=False
    )
    seen = []
    with pytest.raises(NonFiniteError):
        train_loop(
            model,
            loader,
            torch.optim.SGD(model.parameters(), lr=0.1),
            num_epochs=1,
            loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
            checkpoint_dir=tmp_path / "run",
            checkpoint_every=1,
            on_step=lambda step: seen.append(weights(model)),
            progress_bar=False,
        )
    assert len(seen) == 6
    assert weights(model) == seen[-1]
    other = torch.nn.Linear(4, 1)
    state = TrainState(other, torch.optim.SGD(other.parameters(), lr=0.1))
    state.lr_scheduler = prepare_scheduler(state.optimizer, num_training_steps=12)
    assert load_checkpoint(tmp_path / "run", state).step == 6
    assert weights(other) == seen[-1]


def fp16_on_the_cpu(scale=2.0**16):
    """fp16's loss scale, on a device whose autocast computes in bfloat16."""
    strategy = SingleDevice("cpu")
    strategy.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return strategy


def scaled_run(folder, stop_after=None, resumes=False):
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer, prepare_scheduler(optimizer, num_training_steps=8))
    strategy = fp16_on_the_cpu()
    if resumes:
        load_checkpoint(folder, state, strategy=strategy)
    rates, scales = [], []
    # In the fourth window the gradient overflows once scaled, so that update is skipped.
    batches = [{"x": torch.ones(2, 1) * (1e38 if n == 3 else 1.0)} for n in range(8)]
    for step in train_steps(
        state,
        batches,
        num_epochs=1,
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
        strategy=strategy,
    ):
        rates.append(step.lr)
        scales.append(strategy.scaler.get_scale())
        save_checkpoint(folder, state, strategy=strategy)
        if step.index == stop_after:
            break
    return rates, scales, weights(model), state.progress


def test_f15_an_overflow_skips_the_update_and_moves_no_schedule(tmp_path):
    rates, scales, _, progress = scaled_run(tmp_path)
    assert progress.num_skipped == 1
    assert progress.num_steps == 7
    assert rates == pytest.approx([0.1 * (1 - n / 8) for n in range(7)])
    assert scales[2] == 2.0**17
    assert scales[3] == 2.0**16, "it fell after the overflow, and had not grown again"


@pytest.mark.parametrize("cut", range(1, 7))
def test_f15_the_loss_scale_is_restored(cut, tmp_path):
    rates, scales, end, progress = scaled_run(tmp_path / "whole")
    first = scaled_run(tmp_path / "cut", stop_after=cut)
    second = scaled_run(tmp_path / "cut", resumes=True)
    assert first[0] + second[0] == rates
    assert first[1] + second[1] == scales
    assert second[2:] == (end, progress)


def test_a_worker_outlives_the_signals_of_its_group_and_obeys_a_second_sigterm(tmp_path):
    from manualloop.reading.ranks import Shard
    from manualloop.reading.sources import source_of

    loader = ordered_loader(
        Rows(str(tmp_path / "no"), "raise"),
        "train",
        2,
        shuffle=True,
        seed=1,
        drop_last=False,
        num_workers=1,
    )
    begun = source_of(loader).open({}, Shard())
    next(begun.items)
    (worker,) = begun.items._workers
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, number)
    worker.join(0.3)
    assert worker.is_alive()
    deadline = time.monotonic() + 600
    while worker.exitcode is None and time.monotonic() < deadline:
        with suppress(RuntimeError):  # torch raises it when a worker has ended
            os.kill(worker.pid, signal.SIGTERM)
            worker.join(0.05)
    assert worker.exitcode == -signal.SIGTERM
