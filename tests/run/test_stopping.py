"""A wish to stop belongs to one run: the next one in the process trains."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manualloop import SingleDevice, TrainResult, TrainState, train_loop, train_steps

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

NUM_STEPS = 12
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Handlers of the test's own, which must be in place again after every run."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    found = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == [signal.default_int_handler] * len(SIGNALS)


def make() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(4, 1)


def train(*args: Any, **options: Any) -> TrainResult | None:
    """Train; None if the run ended by an exception that stands for its signal."""
    try:
        return run(*args, **options)
    except (KeyboardInterrupt, SystemExit):
        return None


def run(
    model: nn.Module, folder: Path | None = None, seen: list[int] | None = None, **options: Any
) -> TrainResult:
    then = options.pop("on_step", lambda step: None)

    def on_step(step: Any) -> None:
        if seen is not None:
            seen.append(step.index)
        then(step)

    return train_loop(
        model,
        [{"x": torch.ones(2, 4)}] * NUM_STEPS,
        torch.optim.SGD(model.parameters(), lr=0.1),
        num_epochs=1,
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
        checkpoint_dir=folder,
        on_step=on_step,
        progress_bar=False,
        **options,
    )


def strike(number: int, at: int) -> Callable[[Any], None]:
    return lambda step: os.kill(os.getpid(), number) if step.index == at else None


@pytest.mark.parametrize("number", SIGNALS)
def test_the_same_call_again_resumes(number: int, tmp_path: Path) -> None:
    model, strategy = nn.Linear(4, 1), SingleDevice("cpu")
    first: list[int] = []
    second: list[int] = []
    train(model, tmp_path, first, strategy=strategy, on_step=strike(number, 5))
    train(model, tmp_path, second, strategy=strategy)
    assert first == [1, 2, 3, 4, 5]
    assert second == [6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("number", SIGNALS)
def test_what_stands_for_the_signal_is_raised_once_the_update_is_saved(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 1)
    wanted: Any = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(wanted) as stop, caplog.at_level("INFO", logger="manualloop"):
        run(model, tmp_path, on_step=strike(number, 5))
    if wanted is SystemExit:
        assert stop.value.code == 128 + number
    else:
        assert str(tmp_path) in str(stop.value)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000005"]
    name = signal.Signals(number).name
    line = f"{name}: ended after step 5. The same command resumes there, from {tmp_path}."
    assert line in caplog.messages


def test_a_cell_that_is_interrupted_and_run_again(tmp_path: Path) -> None:
    """The second time the cell builds everything anew and resumes; the third time it is over."""
    whole = run(make(), tmp_path / "whole")
    ends = []
    for at in (5, 9, 99):
        model, seen = make(), list[int]()
        try:
            result = run(model, tmp_path / "cell", seen, on_step=strike(signal.SIGINT, at))
        except KeyboardInterrupt:
            ends.append(("interrupted", seen))
        else:
            ends.append((result.stopped_by, seen))
    assert ends == [
        ("interrupted", [1, 2, 3, 4, 5]),
        ("interrupted", [6, 7, 8, 9]),
        ("num_epochs", [10, 11, 12]),
    ]
    assert result.history == whole.history
    assert torch.equal(result.state.model.weight, whole.state.model.weight)


def test_a_signal_that_comes_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    """It comes while the last evaluation is made, while the last checkpoint is written, ..."""

    def evaluate() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"score": 1.0}

    with pytest.raises(SystemExit):
        run(make(), tmp_path / "evaluation", evaluate=evaluate)
    result = run(make(), tmp_path / "evaluation", evaluate=lambda: {"score": 2.0})
    assert result.metrics == {"score": 2.0}

    class Slow(nn.Linear):
        is_over = False

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            if self.is_over:
                self.is_over = False
                os.kill(os.getpid(), signal.SIGTERM)
            return super().state_dict(*args, **kwargs)

    model = Slow(4, 1)

    def on_step(step: Any) -> None:
        model.is_over = step.is_last

    with pytest.raises(SystemExit):
        run(model, tmp_path / "save", checkpoint_every=1000, on_step=on_step)
    assert (tmp_path / "save" / f"step-{NUM_STEPS:08}").is_dir()


@pytest.mark.parametrize("shared", ["model", "strategy", "both", "neither"])
@pytest.mark.parametrize("has_folder", [False, True])
def test_whatever_two_runs_share(shared: str, has_folder: bool, tmp_path: Path) -> None:
    model, strategy = nn.Linear(4, 1), SingleDevice("cpu")
    train(model, tmp_path / "a", strategy=strategy, on_step=strike(signal.SIGTERM, 3))
    other = model if shared in ("model", "both") else nn.Linear(4, 1)
    options = {"strategy": strategy} if shared in ("strategy", "both") else {}
    seen: list[int] = []
    train(other, tmp_path / "b" if has_folder else None, seen, **options)
    assert seen == list(range(1, NUM_STEPS + 1))


def test_each_run_of_a_sweep_has_its_own_time() -> None:
    strategy, ends = SingleDevice("cpu"), []
    for pause in (0.1, 0.0, 0.1, 0.0):
        result = train(
            nn.Linear(4, 1),
            strategy=strategy,
            max_time=0.05 if pause else 3600,
            on_step=lambda step, pause=pause: time.sleep(pause),
        )
        assert result is not None
        ends.append(result.stopped_by)
    assert ends == ["max_time", "num_epochs"] * 2


def test_a_run_that_ends_at_the_step_of_the_signal(tmp_path: Path) -> None:
    model, seen = nn.Linear(4, 1), list[int]()
    train(model, tmp_path / "a", on_step=strike(signal.SIGUSR1, NUM_STEPS))
    train(model, tmp_path / "b", seen)
    assert len(seen) == NUM_STEPS


def test_a_run_that_ends_by_patience_at_the_step_of_the_signal(tmp_path: Path) -> None:
    model, seen, strategy = nn.Linear(4, 1), list[int](), SingleDevice("cpu")
    train(
        model,
        tmp_path / "a",
        strategy=strategy,
        evaluate=lambda: {"score": 1.0},
        evaluate_every=2,
        best_metric="score",
        patience=2,
        on_step=strike(signal.SIGTERM, 6),
    )
    train(model, tmp_path / "b", seen, strategy=strategy)
    assert len(seen) == NUM_STEPS


def test_an_exception_after_the_signal(tmp_path: Path) -> None:
    model, seen, strategy = nn.Linear(4, 1), list[int](), SingleDevice("cpu")

    def fail(step: Any) -> None:
        if step.index == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("after the signal")

    with pytest.raises(ValueError, match="after the signal"):
        train(model, tmp_path, strategy=strategy, checkpoint_every=2, on_step=fail)
    train(model, tmp_path, seen, strategy=strategy)
    assert seen == list(range(3, NUM_STEPS + 1))


def test_a_signal_in_an_evaluation(tmp_path: Path) -> None:
    model, calls, seen = nn.Linear(4, 1), list[int](), list[int]()

    def evaluate() -> dict[str, float]:
        calls.append(len(seen))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"score": float(len(calls))}

    options = {"evaluate": evaluate, "evaluate_every": 3, "strategy": SingleDevice("cpu")}
    train(model, tmp_path, seen, **options)
    assert seen == [1, 2, 3, 4, 5, 6]
    result = train(model, tmp_path, seen, **options)
    assert seen == list(range(1, NUM_STEPS + 1))
    assert calls == [3, 6, 6, 9, 12]  # the one that was cut short is made first
    assert result is not None
    assert result.stopped_by == "num_epochs"


@pytest.mark.parametrize("where", ["evaluate", "on_step"])
def test_a_signal_in_a_run_inside_of_another_ends_both(where: str, tmp_path: Path) -> None:
    strategy, inner, outer = SingleDevice("cpu"), list[int](), list[int]()

    def nested(step: Any = None) -> dict[str, float]:
        if step is None or step.index == 4:
            strikes = strike(signal.SIGTERM, 7) if not inner else lambda step: None
            probe = nn.Linear(4, 1)
            train(probe, tmp_path / "in", inner, strategy=strategy, on_step=strikes)
        return {"score": 1.0}

    options: dict[str, Any] = {"on_step": nested}
    if where == "evaluate":
        options = {"evaluate": nested, "evaluate_every": 4}
    model = nn.Linear(4, 1)
    train(model, tmp_path / "out", outer, strategy=strategy, **options)
    assert inner == [1, 2, 3, 4, 5, 6, 7]
    assert outer == [1, 2, 3, 4]
    train(model, tmp_path / "out", outer, strategy=strategy, **options)
    assert outer == list(range(1, NUM_STEPS + 1))
    if where == "evaluate":
        assert inner[:12] == list(range(1, NUM_STEPS + 1))


def test_a_nested_run_that_is_over_in_time_does_not_end_the_other() -> None:
    strategy, outer = SingleDevice("cpu"), list[int]()

    def evaluate() -> dict[str, float]:
        result = train(
            nn.Linear(4, 1),
            strategy=strategy,
            max_time=0.01,
            on_step=lambda step: time.sleep(0.02),
        )
        assert result is not None
        assert result.stopped_by == "max_time"
        return {"score": 1.0}

    result = train(nn.Linear(4, 1), None, outer, strategy=strategy, evaluate=evaluate)
    assert len(outer) == NUM_STEPS
    assert result is not None
    assert result.stopped_by == "num_epochs"


def test_a_time_that_came_in_a_run_before_is_not_due_in_the_next(tmp_path: Path) -> None:
    strategy, calls = SingleDevice("cpu"), list[int]()

    def wait_and_fail(step: Any) -> None:
        time.sleep(0.02)
        raise ValueError("between the clock and the evaluation")

    options: dict[str, Any] = {
        "strategy": strategy,
        "evaluate": lambda: calls.append(1) or {"score": 1.0},
    }
    with pytest.raises(ValueError, match="between"):
        train(nn.Linear(4, 1), evaluate_every="0.01 s", on_step=wait_and_fail, **options)
    train(nn.Linear(4, 1), evaluate_every="1 h", **options)
    assert len(calls) == 1  # that of the end


def test_level_2_after_level_1(tmp_path: Path) -> None:
    model, strategy = nn.Linear(4, 1), SingleDevice("cpu")
    train(model, tmp_path, strategy=strategy, on_step=strike(signal.SIGINT, 2))
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    steps = train_steps(
        state,
        [{"x": torch.ones(2, 4)}] * NUM_STEPS,
        num_epochs=1,
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
        strategy=strategy,
    )
    assert len(list(steps)) == NUM_STEPS
