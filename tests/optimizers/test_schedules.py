"""Schedules: the rates of transformers, what they refuse, and runs of another length."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import messages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as torchs
from transformers import (
    Adafactor,
    get_polynomial_decay_schedule_with_warmup,
    get_scheduler,
)
from transformers.optimization import AdafactorSchedule

from manualloop import (
    ConfigError,
    TrainState,
    load_checkpoint,
    prepare_scheduler,
    save_checkpoint,
    train_loop,
    train_steps,
)

NUM_BATCHES = 5
NAMES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 0.1},
}


def lrs(name: str, num_steps: int = 10, lr: float = 2.0, **options: Any) -> list[float]:
    """The learning rate of every update, and the one after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = prepare_scheduler(optimizer, name, num_training_steps=num_steps, **options)
    trace = []
    for _ in range(num_steps):
        trace.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*trace, optimizer.param_groups[0]["lr"]]


@settings(deadline=None)
@given(num_steps=st.integers(1, 50), data=st.data())
def test_linear_is_its_closed_form(num_steps: int, data: st.DataObject) -> None:
    num_warmup = data.draw(st.integers(0, num_steps))
    trace = lrs("linear", num_steps, num_warmup_steps=num_warmup)
    expected = [
        2.0 * t / num_warmup
        if t < num_warmup
        else 2.0 * (num_steps - t) / max(1, num_steps - num_warmup)
        for t in range(num_steps)
    ]
    assert trace[:-1] == pytest.approx(expected)
    assert trace[-1] == 0


@pytest.mark.parametrize(
    ("share", "num_steps", "num_warmup"), [(0.1, 10, 1), (0.25, 10, 3), (0.001, 10, 1), (0.5, 8, 4)]
)
def test_warm_up_as_a_share_is_rounded_up(share: float, num_steps: int, num_warmup: int) -> None:
    trace = lrs("linear", num_steps, num_warmup_steps=share)
    assert trace == lrs("linear", num_steps, num_warmup_steps=num_warmup)
    assert trace[num_warmup] == max(trace) == 2.0


def test_cosine() -> None:
    trace = lrs("cosine", num_warmup_steps=2)
    expected = [1 + math.cos(math.pi * (t - 2) / 8) for t in range(2, 11)]
    assert trace == pytest.approx([0.0, 1.0, *expected])


def test_keywords_reach_the_schedule() -> None:
    whole = lrs("cosine", num_cycles=1.0)
    assert whole == pytest.approx([1 + math.cos(2 * math.pi * t / 10) for t in range(11)])
    lowest = lrs("cosine_with_min_lr", min_lr=0.5)
    assert (lowest[0], lowest[-1]) == (2.0, pytest.approx(0.5))


def test_constant() -> None:
    assert lrs("constant") == [2.0] * 11
    assert lrs("constant_with_warmup", num_warmup_steps=2) == [0.0, 1.0, *[2.0] * 9]


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="lr_scheduler='lineal' is unknown") as caught:
        lrs("lineal")
    message = str(caught.value)
    assert "linear, cosine" in message
    assert "plateau" not in message  # nor is it offered what would be refused
    assert "greedy" not in message


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' follows a metric"):
        lrs(name)


def test_every_name_that_is_offered_can_be_stepped() -> None:
    with pytest.raises(ConfigError) as caught:
        lrs("?")
    names = str(caught.value).rpartition(": ")[2].rstrip(".").split(", ")
    wanted: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 0.1},
    }
    assert len(names) >= 8
    for name in set(names) - {"warmup_stable_decay"}:  # its arguments differ between versions
        trace = lrs(name, num_warmup_steps=0 if name == "constant" else 2, **wanted.get(name, {}))
        assert max(trace) == pytest.approx(2.0)


@pytest.mark.parametrize("num_warmup", [-1, 11, 2.5, math.nan, math.inf, -0.1])
def test_a_warm_up_that_does_not_fit(num_warmup: float) -> None:
    with pytest.raises(ConfigError, match=f"num_warmup_steps={num_warmup}"):
        lrs("linear", num_warmup_steps=num_warmup)


def test_an_optimizer_without_a_learning_rate() -> None:
    optimizer = Adafactor([nn.Parameter(torch.ones(1))], lr=None)
    with pytest.raises(ConfigError, match=r"Adafactor has lr=None .* lr_scheduler=None"):
        prepare_scheduler(optimizer, num_training_steps=3)


def test_no_steps() -> None:
    with pytest.raises(ConfigError, match="num_training_steps=0"):
        lrs("linear", 0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("linear", {"num_cycles": 2}, "num_cycles"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("constant", {"num_warmup_steps": 3}, "would ignore num_warmup_steps"),
        ("constant", {"power": 3}, "would ignore power"),
    ],
)
def test_arguments_that_a_schedule_does_not_take(
    name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        lrs(name, **options)
    assert name in str(caught.value)


# Runs of another length ---------------------------------------------------------------------------


def optimizer_of(model: nn.Module, lr: Any = 1.0) -> torch.optim.Optimizer:
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    return torch.optim.SGD(groups, lr=lr)


def rates(
    num_epochs: int,
    folder: Path | None = None,
    schedule: str | Callable[..., Any] | None = "linear",
    **options: Any,
) -> list[tuple[float, ...]]:
    """The rates of both groups at each update of ``train_loop``."""
    model = nn.Linear(1, 1)
    optimizer, seen = optimizer_of(model), list[tuple[float, ...]]()

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        return model(batch["x"]).mean()

    train_loop(
        model,
        [{"x": torch.ones(4, 1)}] * NUM_BATCHES,
        optimizer,
        schedule(optimizer) if callable(schedule) else schedule,
        num_epochs=num_epochs,
        loss_fn=loss_fn,
        checkpoint_dir=folder,
        progress_bar=False,
        **options,
    )
    return seen


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_has_the_bits_of_transformers(name: str, warmup: int) -> None:
    if name == "constant" and warmup:
        return
    traces = []
    for make in (prepare_scheduler, get_scheduler):
        optimizer = optimizer_of(nn.Linear(1, 1), lr=0.3)
        options = NAMES[name] if make is prepare_scheduler else {}
        more = {} if options else {"scheduler_specific_kwargs": dict(NAMES[name])}
        if make is prepare_scheduler:
            more = dict(options)
        schedule: Any = make(  # type: ignore[operator]
            optimizer=optimizer,
            name=name,
            num_training_steps=11,
            num_warmup_steps=warmup,
            **more,
        )
        trace = []
        for _ in range(14):
            trace.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        traces.append(trace)
    assert traces[0] == traces[1]


@pytest.mark.parametrize("warmup", [0, 3, 0.25])
@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "inverse_sqrt"])
def test_an_extended_run_has_the_rates_of_the_longer_plan(
    name: str, warmup: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"schedule": name, "num_warmup_steps": warmup}
    first = rates(2, tmp_path, **options)
    assert len(first) == 2 * NUM_BATCHES
    with caplog.at_level("INFO", logger="manualloop"):
        rest = rates(4, tmp_path, **options)
    assert rest == rates(4, **options)[2 * NUM_BATCHES :]
    is_told = any("num_steps: 10 -> 20; the new value counts" in one for one in messages(caplog))
    assert is_told == (name != "inverse_sqrt")  # whose rates do not depend on the length


def test_a_run_that_was_cut_is_extended_from_its_first_new_update_on(tmp_path: Path) -> None:
    def cut(step: Any) -> None:
        if step.index == 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        rates(2, tmp_path, checkpoint_every=1, on_step=cut)
    assert rates(6, tmp_path) == rates(6)[7:]


def test_an_unchanged_run_logs_nothing_of_its_schedule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def cut(step: Any) -> None:
        if step.index == 4:
            raise InterruptedError

    for number, schedule in enumerate([*NAMES, *SCHEDULES]):
        make: Any = SCHEDULES.get(schedule, named(schedule) if schedule in NAMES else None)
        folder = tmp_path / str(number)
        whole = rates(2, None, make)
        with pytest.raises(InterruptedError):
            rates(2, folder, make, checkpoint_every=1, on_step=cut)
        caplog.clear()
        with caplog.at_level("INFO", logger="manualloop"):
            assert rates(2, folder, make) == whole[3:], schedule
        assert [line for line in messages(caplog) if "resuming from" not in line] == [], schedule


def named(name: str) -> Callable[[Any], Any]:
    return lambda optimizer: prepare_scheduler(
        optimizer, name, num_training_steps=10, **NAMES[name]
    )


def halves(step: int) -> float:
    return 0.5**step


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: torchs.StepLR(optimizer, 2, gamma=0.5),
    "MultiStepLR": lambda optimizer: torchs.MultiStepLR(optimizer, [2, 5]),
    "ExponentialLR": lambda optimizer: torchs.ExponentialLR(optimizer, 0.9),
    "LambdaLR": lambda optimizer: torchs.LambdaLR(optimizer, halves),
    "MultiplicativeLR": lambda optimizer: torchs.MultiplicativeLR(optimizer, lambda step: 0.9),
    "ConstantLR": lambda optimizer: torchs.ConstantLR(optimizer, 0.5, total_iters=4),
    "LinearLR": lambda optimizer: torchs.LinearLR(optimizer, total_iters=6),
    "PolynomialLR": lambda optimizer: torchs.PolynomialLR(optimizer, total_iters=10),
    "CosineAnnealingLR": lambda optimizer: torchs.CosineAnnealingLR(optimizer, 10),
    "WarmRestarts": lambda optimizer: torchs.CosineAnnealingWarmRestarts(optimizer, 2, T_mult=2),
    "OneCycleLR": lambda optimizer: torchs.OneCycleLR(optimizer, 1.0, total_steps=10),
    "CyclicLR": lambda optimizer: torchs.CyclicLR(
        optimizer, 0.1, 1.0, step_size_up=3, cycle_momentum=False
    ),
    "SequentialLR": lambda optimizer: sequential(optimizer, 10),
    "ChainedScheduler": lambda optimizer: torchs.ChainedScheduler(
        [torchs.ConstantLR(optimizer, 0.5, 4), torchs.ExponentialLR(optimizer, 0.9)]
    ),
    "transformers": lambda optimizer: get_scheduler("cosine", optimizer, 2, 10),
}


def sequential(optimizer: Any, num_steps: int) -> Any:
    parts = [
        torchs.LinearLR(optimizer, total_iters=3),
        torchs.CosineAnnealingLR(optimizer, num_steps - 3),
    ]
    return torchs.SequentialLR(optimizer, parts, [3])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda o, n: torchs.CosineAnnealingLR(o, n),
            "T_max: 10 -> 20; the checkpoint's 10 counts",
        ),
        (lambda o, n: torchs.PolynomialLR(o, n), "total_iters: 10 -> 20; the checkpoint's 10"),
        (lambda o, n: torchs.MultiStepLR(o, [n // 2, n - 1]), "schedule.milestones"),
        (sequential, "schedule.schedulers.1.T_max: 7 -> 17; the checkpoint's 7"),
        (
            lambda o, n: torchs.ChainedScheduler(
                [torchs.ConstantLR(o, 0.5, 2), torchs.PolynomialLR(o, n)]
            ),
            "schedule.schedulers.1.total_iters: 10 -> 20; the checkpoint's 10",
        ),
        (
            lambda o, n: torchs.SequentialLR(
                o, [torchs.ConstantLR(o), torchs.ExponentialLR(o, 0.9)], [n // 2]
            ),
            "milestones: [5] -> [10]; the checkpoint's [5]",
        ),
        (lambda o, n: Foreign(o, n), "num_training_steps: 10 -> 20; the checkpoint's 10"),
    ],
)
def test_what_a_schedule_of_the_user_keeps_of_another_length_is_logged(
    make: Any, line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rates(2, tmp_path, lambda optimizer: make(optimizer, 10))
    with caplog.at_level("INFO", logger="manualloop"):
        rates(4, tmp_path, lambda optimizer: make(optimizer, 20))
    assert any(line in one for one in messages(caplog)), messages(caplog)


class Foreign(torchs.LRScheduler):
    """A schedule of somebody else's, with a counter of its own."""

    def __init__(self, optimizer: Any, num_training_steps: int) -> None:
        self.num_training_steps, self.counter = num_training_steps, 0
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        self.counter += 1
        return [base / self.counter for base in self.base_lrs]


def test_functions_of_the_user_count_from_the_next_update_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not in the state of a LambdaLR, whose place is that of the checkpoint."""

    def make(num_steps: int) -> Callable[[Any], Any]:
        return lambda optimizer: get_scheduler("linear", optimizer, 0, num_steps)

    rates(2, tmp_path, make(10))
    with caplog.at_level("INFO", logger="manualloop"):
        assert rates(4, tmp_path, make(20)) == rates(4)[10:]
    assert any("num_steps: 10 -> 20; the new value counts" in one for one in messages(caplog))


def test_a_rate_that_the_script_changes_after_the_schedule_stays(tmp_path: Path) -> None:
    """It differs from what the schedule's function gives, and the function is the same."""

    def run(folder: Path | None, stop: int | None) -> list[Any]:
        model, seen = nn.Linear(1, 1), []
        optimizer = optimizer_of(model)

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            seen.append(optimizer.param_groups[0]["lr"])
            return model(batch["x"]).mean()

        def on_step(step: Any) -> None:
            if step.index == stop:
                raise InterruptedError
            optimizer.param_groups[0]["lr"] *= 0.5

        with contextlib.suppress(InterruptedError):
            train_loop(
                model,
                [{"x": torch.ones(4, 1)}] * NUM_BATCHES,
                optimizer,
                num_epochs=2,
                loss_fn=loss_fn,
                on_step=on_step,
                checkpoint_dir=folder,
                checkpoint_every=1,
                progress_bar=False,
            )
        return seen

    whole = run(None, None)
    assert run(tmp_path, 5) + run(tmp_path, None) == whole[:5] + whole[4:]


# OneCycleLR: it raises when it is stepped beyond its end


def one_cycle(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: torchs.OneCycleLR(optimizer, 1.0, total_steps=total)


def late_cycle(total: int) -> Callable[[Any], Any]:
    """Three updates of warm-up, then a OneCycleLR."""
    return lambda optimizer: torchs.SequentialLR(
        optimizer,
        [torchs.ConstantLR(optimizer, 1.0), torchs.OneCycleLR(optimizer, 1.0, total_steps=total)],
        [3],
    )


def chained_cycle(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: torchs.ChainedScheduler(
        [torchs.OneCycleLR(optimizer, 1.0, total_steps=total), torchs.ConstantLR(optimizer, 0.5)]
    )


@pytest.mark.parametrize(
    ("make", "enough"), [(one_cycle, 10), (late_cycle, 7), (chained_cycle, 10)]
)
def test_a_cycle_that_ends_before_the_run_is_refused_before_the_first_update(
    make: Any, enough: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"total_steps={enough - 1}"):
        rates(2, tmp_path / "short", make(enough - 1))
    assert not list((tmp_path / "short").glob("step-*"))
    assert len(rates(2, tmp_path, make(enough))) == 10
    seen: list[Any] = []
    with pytest.raises(ConfigError, match=rf"total_steps={enough}, of which .* can be extended"):
        rates(4, tmp_path, make(enough + 10), on_step=seen.append)
    assert seen == []
    assert [path.name for path in sorted(tmp_path.glob("step-*"))][-1] == "step-00000010"


def test_a_cycle_that_is_over_before_the_next_part_is_not_refused() -> None:
    def make(optimizer: Any) -> Any:
        parts = [
            torchs.OneCycleLR(optimizer, 1.0, total_steps=4),
            torchs.ConstantLR(optimizer, 1.0),
        ]
        return torchs.SequentialLR(optimizer, parts, [5])

    assert len(rates(2, None, make)) == 10


# Level 2


def steps(state: TrainState, **options: Any) -> Iterator[Any]:
    yield from train_steps(
        state,
        [{"x": torch.ones(4, 1)}] * NUM_BATCHES,
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
        **options,
    )


def state_for(num_steps: int, warmup: float = 0) -> TrainState:
    model = nn.Linear(1, 1)
    optimizer = optimizer_of(model)
    schedule = prepare_scheduler(
        optimizer, "cosine", num_training_steps=num_steps, num_warmup_steps=warmup
    )
    return TrainState(model, optimizer, schedule)


@pytest.mark.parametrize("warmup", [0, 0.3])
@pytest.mark.parametrize("by_file", [True, False])
def test_an_extended_run_of_train_steps(warmup: float, by_file: bool, tmp_path: Path) -> None:
    whole = [step.lr for step in steps(state_for(20, warmup), max_steps=20)]
    first = state_for(10, warmup)
    assert len(list(steps(first, max_steps=10))) == 10
    second = state_for(20, warmup)
    if by_file:
        save_checkpoint(tmp_path, first)
        load_checkpoint(tmp_path, second)
    else:
        second.load_state_dict(first.state_dict())
    assert [step.lr for step in steps(second, max_steps=20)] == whole[10:]


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_checkpoint_between_the_parts_of_a_sequence(cut: int, tmp_path: Path) -> None:
    """Parts that have not begun count from -1, as torch leaves them."""

    def state_of() -> TrainState:
        model = nn.Linear(1, 1)
        optimizer = optimizer_of(model)
        parts = [
            torchs.LinearLR(optimizer, 0.1, total_iters=2),
            torchs.ConstantLR(optimizer, 0.5, total_iters=1),
            torchs.CosineAnnealingLR(optimizer, 4),
        ]
        return TrainState(model, optimizer, torchs.SequentialLR(optimizer, parts, [2, 4]))

    whole = [step.lr for step in steps(state_of(), max_steps=8)]
    first, second = state_of(), state_of()
    assert len(list(steps(first, max_steps=cut))) == cut
    save_checkpoint(tmp_path, first)
    load_checkpoint(tmp_path, second)
    assert [step.lr for step in steps(second, max_steps=8)] == whole[cut:]
    load_checkpoint(tmp_path, second)  # back, from a sequence that has begun
    assert [step.lr for step in steps(second, max_steps=8)] == whole[cut:]


class Falling(torchs.LRScheduler):
    """A schedule whose rates are no multiples of the first, with numbers that become others."""

    def __init__(self, optimizer: Any) -> None:
        self.worst, self.scale, self.T_cur = 0.0, -1.0, -1
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch > 0:
            self.worst = torch.tensor(-1.0)  # type: ignore[assignment]
        self.scale -= 1
        return [1 / (self.last_epoch + 2) for _ in self.base_lrs]


def relative(model: nn.Module) -> Any:
    return Adafactor(model.parameters(), lr=None, relative_step=True, warmup_init=True)


@pytest.mark.parametrize(
    ("build", "schedule"),
    [
        (relative, AdafactorSchedule),
        (relative, None),
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.0), Falling),
    ],
)
def test_a_schedule_of_another_library_is_resumed(
    build: Any, schedule: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its numbers may be negative or become tensors, and its rates need not follow the first."""

    def train(folder: Path, cut: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        optimizer = build(model)

        def stop(step: Any) -> None:
            if step.index == cut:
                raise KeyError

        with contextlib.suppress(KeyError):
            train_loop(
                model,
                [{"x": torch.ones(4, 1)}] * NUM_BATCHES,
                optimizer,
                schedule and schedule(optimizer),
                num_epochs=1,
                loss_fn=lambda model, batch: model(batch["x"]).mean(),
                checkpoint_dir=folder,
                checkpoint_every=1,
                on_step=stop,
                progress_bar=False,
            )
        return model.weight.detach()

    with caplog.at_level("INFO", logger="manualloop"):
        whole = train(tmp_path / "whole")
        train(tmp_path / "cut", cut=3)
        assert torch.equal(train(tmp_path / "cut"), whole)
    assert not any("learning rate" in line for line in messages(caplog))


def test_a_checkpoint_that_knows_nothing_of_its_plan(tmp_path: Path) -> None:
    """As those of release 0.1.0, whose schedule was a plain LambdaLR."""
    model = nn.Linear(1, 1)
    optimizer = optimizer_of(model)
    old = TrainState(model, optimizer, get_scheduler("cosine", optimizer, 0, 10))
    assert len(list(steps(old, max_steps=6))) == 6
    save_checkpoint(tmp_path, old)
    for num_steps in (10, 20):
        state = state_for(num_steps)
        load_checkpoint(tmp_path, state)
        whole = [step.lr for step in steps(state_for(num_steps), max_steps=num_steps)]
        assert [step.lr for step in steps(state, max_steps=num_steps)] == whole[6:]


def test_a_rate_that_is_a_tensor(tmp_path: Path) -> None:
    def make(num_steps: int) -> TrainState:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(1.0))
        schedule = prepare_scheduler(optimizer, num_training_steps=num_steps)
        return TrainState(model, optimizer, schedule)

    first, second = make(10), make(20)
    assert len(list(steps(first, max_steps=10))) == 10
    second.load_state_dict(first.state_dict())
    rate = second.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor)
    assert [step.lr for step in steps(second, max_steps=12)] == pytest.approx([0.5, 0.45])


class Decay:
    """Falls with each call, whatever it is called with."""

    def __init__(self) -> None:
        self.rate = 1.0

    def __call__(self, step: int) -> float:
        self.rate *= 0.5
        return self.rate


def test_an_object_of_a_lambda_lr_is_loaded_and_not_called() -> None:
    def state_of() -> TrainState:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torchs.LambdaLR(optimizer, Decay())
        return TrainState(model, optimizer, schedule)

    def step(state: TrainState) -> Any:
        state.optimizer.step()
        state.lr_scheduler.step()
        return state.lr_scheduler.get_last_lr()

    state, resumed = state_of(), state_of()
    step(state)
    resumed.load_state_dict(state.state_dict())
    assert resumed.lr_scheduler.get_last_lr() == [0.25]
    assert step(resumed) == step(state) == [0.125]


# A schedule that was built for fewer updates than the run has. ------------------------------------


def of_length(name: str, total: int) -> Callable[[Any], Any]:
    """A schedule of transformers, by its own function and by ours."""
    if name.startswith("ours "):
        return lambda o: prepare_scheduler(o, name.removeprefix("ours "), num_training_steps=total)
    return lambda o: get_scheduler(name, o, 0, total)


def train_ten(make: Callable[[Any], Any], folder: Path | None = None, **length: Any) -> Any:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train_loop(
        model,
        [{"x": torch.ones(2, 1)}] * 10,
        optimizer,
        make(optimizer),
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
        progress_bar=False,
        checkpoint_dir=folder,
        **(length or {"num_epochs": 1}),
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "ours linear", "ours cosine", "polynomial"])
def test_a_schedule_for_less_than_the_run_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="num_training_steps=5 updates, and the run has 10") as e:
        train_ten(of_length(name, 5))
    line = str(e.value).partition("for all of them: ")[2].partition(", or name it")[0]
    assert name.removeprefix("ours ") in line or name == "polynomial"
    names = {"prepare_scheduler": prepare_scheduler}
    assert train_ten(lambda optimizer: eval(line, {**names, "optimizer": optimizer}))


def test_a_schedule_that_is_a_little_short_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert train_ten(of_length("linear", 9))
    assert "was built for num_training_steps=9 updates, and the run has 10." in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        of_length("linear", 10),
        of_length("linear", 30),
        of_length("constant", 1),
        of_length("constant_with_warmup", 5),
        of_length("inverse_sqrt", 5),
        lambda optimizer: torchs.LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: torchs.StepLR(optimizer, 2),
        lambda optimizer: None,
    ],
)
def test_other_schedules_are_taken(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert train_ten(make)
    assert "was built for" not in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "batches", "told"),
    [
        ("linear", {"gradient_accumulation_steps": 2}, 10, "ends at 50% of the rate"),
        ("ours cosine", {"gradient_accumulation_steps": 4, "num_epochs": 2}, 20, "of 4 batches"),
        ("linear", {"gradient_accumulation_steps": 2}, 5, None),
        ("linear", {"gradient_accumulation_steps": 2}, 30, None),  # longer on purpose, perhaps
        (
            "linear",
            {"gradient_accumulation_steps": 2, "max_steps": 5, "num_epochs": None},
            10,
            None,
        ),
        ("constant_with_warmup", {"gradient_accumulation_steps": 2}, 10, None),
        ("inverse_sqrt", {"gradient_accumulation_steps": 2}, 10, None),
        ("linear", {}, 30, None),
    ],
)
def test_a_schedule_for_the_batches_of_a_run_is_told(
    name: str, options: Any, batches: int, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    train_ten(of_length(name, batches), **{"num_epochs": 1, **options})
    lines = [line for line in messages(caplog) if "was built for" in line]
    assert lines == [] if told is None else told in lines[0]


def held(step: int, *, num_training_steps: int) -> float:
    """A function of one's own, which stays at half of the rate."""
    return max(0.5, 1 - step / num_training_steps)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: get_polynomial_decay_schedule_with_warmup(o, 0, 5, lr_end=0.01),
        lambda o: torchs.LambdaLR(o, partial(held, num_training_steps=5)),
    ],
)
def test_a_schedule_that_stays_at_its_last_rate_is_told(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    result = train_ten(make)
    assert result.history[-1]["lr"] >= 0.01
    assert "was built for num_training_steps=5 updates, and the run has 10." in caplog.text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 0.25}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("cosine_with_min_lr", {"min_lr": 0.01}),
        ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ],
)
@pytest.mark.parametrize("is_ours", [False, True])
def test_the_line_builds_the_schedule_that_was_built(
    name: str, options: dict[str, Any], is_ours: bool
) -> None:
    def make(optimizer: Any, total: int = 5) -> Any:
        if is_ours:
            length = {"num_training_steps": total, "num_warmup_steps": 2}
            return prepare_scheduler(optimizer, name, **length, **options)
        return get_scheduler(name, optimizer, 2, total, scheduler_specific_kwargs=options)

    with pytest.raises(ConfigError, match="num_training_steps=5 updates, and the run has 10") as e:
        train_ten(make)
    line = str(e.value).partition("for all of them: ")[2].removesuffix(".")

    def rates(schedule: Any) -> list[float]:
        return [schedule.lr_lambdas[0](step) for step in range(10)]

    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    names = {"prepare_scheduler": prepare_scheduler, "optimizer": optimizer}
    assert rates(eval(line, names)) == pytest.approx(rates(make(optimizer, 10)))


def test_a_run_that_is_extended_goes_beyond_its_schedule_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_ten(of_length("linear", 10), tmp_path)
    train_ten(of_length("linear", 10), tmp_path, num_epochs=2)
    assert "was built for num_training_steps=10 updates, and the run has 20." in caplog.text


def train_epochs(make: Callable[[Any], Any], num_epochs: int = 10, **options: Any) -> list[float]:
    """Train epochs of 20 updates; return the rate of each update."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule, rates = make(optimizer), []
    then = options.pop("on_step", lambda step, schedule: None)

    def on_step(step: Any) -> None:
        rates.append(step.lr)
        then(step, schedule)

    train_loop(
        model,
        [{"x": torch.ones(2, 1)}] * 20,
        optimizer,
        None if options else schedule,
        num_epochs=num_epochs,
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
        progress_bar=False,
        extras=options.get("extras", lambda schedule: {})(schedule),
        on_step=on_step,
    )
    return rates


def warmed_up(then: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda o: torchs.SequentialLR(o, [torchs.LinearLR(o, 0.1, total_iters=2), then(o)], [2])


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda o: torchs.StepLR(o, 7), "half of them have at most 1e-14 of its rate"),
        (lambda o: torchs.ExponentialLR(o, 0.9), "half of them have at most 3e-05 of its rate"),
        (lambda o: torchs.LambdaLR(o, lambda epoch: 0.9**epoch), "of its rate"),
        (lambda o: torchs.MultiStepLR(o, [3, 6]), "its last milestone is 6"),
        (lambda o: torchs.CosineAnnealingLR(o, 10), "with T_max=10 the rate goes down and up"),
        (lambda o: torchs.PolynomialLR(o, 10), "half of them have at most 0e+00 of its rate"),
        (warmed_up(lambda o: torchs.StepLR(o, 3)), "of its rate"),
        (warmed_up(lambda o: torchs.CosineAnnealingLR(o, 8)), "with T_max=8 the rate goes down"),
    ],
)
def test_a_schedule_that_counts_epochs_is_told(
    make: Any, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    train_epochs(make)
    assert "is stepped after every update, of which the run has 200" in caplog.text
    assert what in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torchs.StepLR(o, 60),
        lambda o: torchs.MultiStepLR(o, [100, 150]),
        lambda o: torchs.ExponentialLR(o, 0.99),
        lambda o: torchs.ExponentialLR(o, 1.1),  # to find a rate
        lambda o: torchs.LambdaLR(o, lambda step: min(1, step / 20)),
        lambda o: torchs.LambdaLR(o, lambda step: [1.0, 0.5][step // 150]),
        lambda o: torchs.CosineAnnealingLR(o, 200),
        lambda o: torchs.CosineAnnealingWarmRestarts(o, 50),
        lambda o: torchs.PolynomialLR(o, 200),
        lambda o: torchs.OneCycleLR(o, 0.1, total_steps=200),
        lambda o: torchs.LinearLR(o),
        warmed_up(lambda o: torchs.CosineAnnealingLR(o, 198)),
        warmed_up(lambda o: torchs.CosineAnnealingWarmRestarts(o, 50)),
    ],
)
def test_a_schedule_that_counts_updates_is_taken(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train_epochs(make)
    assert "is stepped after every update" not in caplog.text


def test_the_line_about_epochs_steps_the_schedule_after_each() -> None:
    rates = train_epochs(
        lambda o: torchs.StepLR(o, 2),
        num_epochs=6,
        extras=lambda schedule: {"schedule": schedule},
        on_step=lambda step, schedule: schedule.step() if step.ends_epoch else None,
    )
    wanted = [0.1 * 0.1 ** (epoch // 2) for epoch in range(6) for _ in range(20)]
    assert rates == pytest.approx(wanted)


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("at", [(3,), (2, 4)])
def test_first_rates_that_the_script_changes_stay(
    is_named: bool, at: tuple[int, ...], tmp_path: Path
) -> None:
    def state_of() -> TrainState:
        model = nn.Linear(1, 1)
        optimizer = optimizer_of(model)
        schedule = prepare_scheduler(optimizer, "linear", num_training_steps=8)
        own = torchs.LambdaLR(optimizer, lambda place: 0.9**place)
        return TrainState(model, optimizer, schedule if is_named else own)

    def rates(state: TrainState) -> list[float]:
        found = []
        for step in steps(state, max_steps=8):
            found.append(float(step.lr))
            if step.index in at:
                schedule: Any = state.lr_scheduler
                schedule.base_lrs = [rate / 2 for rate in schedule.base_lrs]
            save_checkpoint(tmp_path / str(step.index), state)
        return found

    whole = rates(state_of())
    for cut in (at[0], 5):
        state = state_of()
        load_checkpoint(tmp_path / str(cut), state)
        assert [float(step.lr) for step in steps(state, max_steps=8)][:1] == whole[cut : cut + 1]
        if len(at) == 1:
            load_checkpoint(tmp_path / str(cut), state := state_of())
            assert [float(step.lr) for step in steps(state, max_steps=8)] == whole[cut:]


def test_a_function_that_gives_another_rate_after_a_resume_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def state_of(scale: dict[str, float]) -> TrainState:
        model = nn.Linear(1, 1)
        optimizer = optimizer_of(model)
        schedule = torchs.LambdaLR(optimizer, lambda place: scale["factor"])
        return TrainState(model, optimizer, schedule)

    state = state_of(scale := {"factor": 1.0})
    for step in steps(state, max_steps=4):
        scale["factor"] = 0.5
        if step.index == 3:
            save_checkpoint(tmp_path, state)
            break
    caplog.clear()
    load_checkpoint(tmp_path, state_of({"factor": 1.0}))
    assert any("rates of the LambdaLR after update 3: " in line for line in messages(caplog))
