"""Several runs in the same ranks: what one rank wishes ends one run, on all ranks, and no other."""

import contextlib
import io
import os
import signal
import time
from itertools import pairwise

import torch

from manualloop import (
    TrainState,
    apply_update,
    evaluate_loop,
    prepare_strategy,
    train_loop,
    train_steps,
)

NUM_STEPS = 8


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


def batches(strategy):
    return [{"x": torch.full((2, 4), float(k))} for k in range(strategy.world_size * NUM_STEPS)]


def train(strategy, folder=None, model=None, **options):
    """Train; return the steps that were made, and what ended the run (None: an exception)."""
    seen, then = [], options.pop("on_step", lambda step: None)
    model = torch.nn.Linear(4, 1) if model is None else model
    if "step_fn" not in options:
        options["loss_fn"] = loss_fn

    def on_step(step):
        seen.append(step.index)
        then(step)

    try:
        result = train_loop(
            model,
            batches(strategy),
            torch.optim.SGD(model.parameters(), lr=0.001),
            num_epochs=1,
            checkpoint_dir=folder,
            on_step=on_step,
            strategy=strategy,
            **{"progress_bar": False, **options},
        )
    except (KeyboardInterrupt, SystemExit, ValueError):
        return seen, None
    return seen, result.stopped_by


def same_on_all(strategy, value):
    values = strategy.gather(value)
    assert values == [values[0]] * strategy.world_size, values
    return value


WHOLE = list(range(1, NUM_STEPS + 1))


def check_max_time(strategy, folder):
    limit = 0.001 if strategy.rank == 1 else 3600.0
    seen, stopped_by = same_on_all(strategy, train(strategy, folder / "time", max_time=limit))
    assert stopped_by == "max_time"
    assert 1 <= len(seen) < NUM_STEPS, seen
    again, stopped_by = same_on_all(strategy, train(strategy, folder / "time", max_time=3600.0))
    assert (seen + again, stopped_by) == (WHOLE, "num_epochs")
    assert same_on_all(strategy, train(strategy)) == (WHOLE, "num_epochs")


def check_signal_at(strategy, folder, at):
    def strike(step):
        if step.index == at and strategy.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    model = torch.nn.Linear(4, 1)
    seen, _ = same_on_all(strategy, train(strategy, folder / f"at {at}", model, on_step=strike))
    assert seen == WHOLE[: at + 1]  # all ranks know after the next update
    assert same_on_all(strategy, train(strategy, folder / f"after {at}", model))[0] == WHOLE


def check_exception(strategy, folder):
    """An exception comes between a proposal and its count, and after its count."""
    for at in (3, 4):

        def fail(step, at=at):
            if step.index == 3 and strategy.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if step.index == at:
                raise ValueError("on every rank")

        seen, _ = same_on_all(strategy, train(strategy, folder / f"raises {at}", on_step=fail))
        assert seen == WHOLE[:at]
        assert same_on_all(strategy, train(strategy, folder / f"whole {at}"))[0] == WHOLE


def check_clock(strategy):
    """A time that has come in one run, and was never acted on, is not due in the next."""
    calls = []

    def evaluate():
        calls.append(1)
        return {"score": 1.0}

    def fail(step):
        time.sleep(0.002)
        if step.index == 2:
            raise ValueError("counted, and not acted on")

    train(strategy, evaluate=evaluate, evaluate_every="0.001 s", on_step=fail)
    assert calls == []
    train(strategy, evaluate=evaluate, evaluate_every="1 h")
    assert calls == [1]  # that of the end
    train(strategy, evaluate=evaluate, evaluate_every="0.001 s", on_step=lambda s: time.sleep(0.01))
    assert same_on_all(strategy, len(calls)) > 3


def check_step_fn(strategy, folder):
    """A step_fn that counts nothing, and uses the strategy that it gets as it is used to."""

    def step_fn(state, batches, given):
        assert given.accelerator is strategy.accelerator
        assert (given.rank, repr(given)) == (strategy.rank, repr(strategy))
        return apply_update(state, batches, given, loss_fn=loss_fn)

    limit = 0.001 if strategy.rank == 1 else 3600.0
    seen, stopped_by = same_on_all(
        strategy, train(strategy, folder / "own", step_fn=step_fn, max_time=limit)
    )
    assert stopped_by == "max_time"
    again, stopped_by = train(strategy, folder / "own", step_fn=step_fn)
    assert (seen + again, stopped_by) == (WHOLE, "num_epochs")


class Unwritable:
    """A tracker that cannot be opened."""

    def open_run(self, run):
        raise OSError("read-only file system")

    def __call__(self, record):
        raise AssertionError(record)


def check_trackers(strategy, folder):
    """Rank 0 alone calls them. That one cannot be opened there ends the run on all ranks."""
    seen = []
    trackers = [seen.append] if strategy.is_main else []  # as a script may write it
    train(strategy, folder / "tracked", trackers=trackers, log_every=2)
    train(strategy, folder / "again", trackers=[seen.append] if strategy.rank else [], log_every=2)
    expected = [1, 2, 4, 6, 8] if strategy.is_main else []
    assert [record["step"] for record in seen] == expected
    assert same_on_all(strategy, train(strategy, trackers=[Unwritable()])) == ([], None)


def check_nested(strategy):
    ends = []

    def evaluate():
        limit = 0.001 if strategy.rank == 0 else 3600.0
        ends.append(train(strategy, max_time=limit)[1])
        return {"score": 1.0}

    seen, stopped_by = same_on_all(strategy, train(strategy, evaluate=evaluate, evaluate_every=3))
    assert (seen, stopped_by) == (WHOLE, "num_epochs")
    assert ends == ["max_time"] * 3


def check_table(strategy):
    """Rank 0 shows each evaluation once, whatever evaluates it; the others show nothing."""
    model, shown = torch.nn.Linear(4, 1), io.StringIO()

    def evaluate():
        return evaluate_loop(model, batches(strategy), loss_fn=loss_fn, strategy=strategy)

    with contextlib.redirect_stdout(shown):
        train(strategy, model=model, evaluate=evaluate, evaluate_every=3, progress_bar=True)
    lines = [line.split("  ")[0].partition(",")[0] for line in shown.getvalue().splitlines()]
    rows = ["step 3", "step 6", "step 8", "Training: step 8/8 (100%)"]
    assert lines == (rows if strategy.is_main else []), shown.getvalue()


def check_collectives(strategy):
    """A run needs as many reductions a step as train_steps, and leaves it none of its own."""
    counts, inner = [0], torch.distributed.all_reduce

    def all_reduce(*args, **kwargs):
        counts[0] += 1
        return inner(*args, **kwargs)

    def differences(found):
        return [after - before for before, after in pairwise(found)]

    def at_level_1():
        found = []
        train(strategy, on_step=lambda step: found.append(counts[0]))
        return differences(found)

    def at_level_2():
        model = torch.nn.Linear(4, 1)
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.001))
        options = {"num_epochs": 1, "loss_fn": loss_fn, "strategy": strategy}
        steps = train_steps(state, batches(strategy), **options)
        return differences([counts[0] for _ in steps])

    torch.distributed.all_reduce = all_reduce
    try:
        first = at_level_1()
        assert len(first) == NUM_STEPS - 1
        assert first == at_level_2()
    finally:
        torch.distributed.all_reduce = inner


def main(folder):
    strategy = prepare_strategy()
    before = set(vars(strategy))
    check_max_time(strategy, folder)
    for at in (3, NUM_STEPS):
        check_signal_at(strategy, folder, at)
    check_exception(strategy, folder)
    check_clock(strategy)
    check_step_fn(strategy, folder)
    check_trackers(strategy, folder)
    check_nested(strategy)
    check_table(strategy)
    check_collectives(strategy)
    assert set(vars(strategy)) == before
