"""What the body of a loop does a second time is reported, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from manualloop import (
    TrainState,
    prepare_optimizer,
    prepare_scheduler,
    save_checkpoint,
    train_loop,
    train_steps,
)

BATCHES = [{"x": torch.ones(2, 3)}] * 6


def loss_fn(model: nn.Module, batch: Any) -> Any:
    return model(batch["x"]).square().mean()


def make(number: int = 1) -> TrainState:
    model = nn.Linear(3, 2)
    weights = list(model.parameters())[:number]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    schedules = [prepare_scheduler(one, num_training_steps=6) for one in optimizers]
    return TrainState(model, optimizers, schedules)


def by_steps(state: TrainState, body: Callable[[Any], object]) -> None:
    for step in train_steps(state, BATCHES, num_epochs=1, loss_fn=loss_fn):
        body(step)


def by_loop(state: TrainState, body: Callable[[Any], object]) -> None:
    optimizer, schedule = state.optimizer, state.lr_scheduler
    train_loop(
        state.model, BATCHES, optimizer, schedule, num_epochs=1, loss_fn=loss_fn,
        on_step=body, progress_bar=False,
    )  # fmt: skip


@pytest.mark.parametrize("run", [by_steps, by_loop])
@pytest.mark.parametrize("number", [1, 2])
def test_a_second_step_is_told_once(
    run: Any, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    state = make(number)
    run(state, lambda step: state.optimizer.step())
    assert caplog.text.count("the body of the loop has stepped the SGD, whose update was") == 1
    assert "PlannedLR" not in caplog.text
    caplog.clear()
    state = make(number)
    assert state.lr_scheduler is not None
    run(state, lambda step: state.lr_scheduler.step())  # type: ignore[union-attr]
    assert caplog.text.count("the body of the loop has stepped the PlannedLR") == number
    assert "SGD" not in caplog.text


@pytest.mark.parametrize("run", [by_steps, by_loop])
def test_other_bodies_are_not_told(
    run: Any, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    state = make()
    other = torch.optim.SGD(state.model.parameters(), lr=0.1)
    own = torch.optim.lr_scheduler.StepLR(other, 1)

    def body(step: Any) -> None:
        other.step()
        own.step()
        with torch.no_grad():
            state.model.weight.mul_(0.9)  # type: ignore[operator, union-attr]
        if run is by_steps:
            save_checkpoint(tmp_path, state)

    run(state, body)
    assert "the body of the loop" not in caplog.text


def test_a_loop_may_be_left_at_any_step() -> None:
    state = make()
    for place in range(1, 4):
        for step in train_steps(state, BATCHES, num_epochs=1, loss_fn=loss_fn):
            assert step.index == place
            break
    steps = train_steps(state, BATCHES, num_epochs=1, loss_fn=loss_fn)
    assert next(steps).index == 4
    steps.close()
    assert not state.is_training
    assert not state.optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        for _ in train_steps(state, BATCHES, num_epochs=1, loss_fn=loss_fn):
            raise ZeroDivisionError
    assert [step.index for step in train_steps(state, BATCHES, num_epochs=1, loss_fn=loss_fn)] == [
        6
    ]


def train(model: nn.Module, optimizer: Any, *args: Any) -> Any:
    return train_loop(
        model, BATCHES, optimizer, *args, num_epochs=1, loss_fn=loss_fn, progress_bar=False
    )


def test_rates_that_an_earlier_run_has_left_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(3, 2)
    optimizer = prepare_optimizer(model, lr=0.1)
    train(model, optimizer)
    train(model, optimizer)  # from the first rate again
    assert not caplog.text
    before = model.weight.clone()
    train(model, optimizer, None)
    assert "the learning rate of the AdamW is 0, and nothing raises it" in caplog.text
    assert torch.equal(before, model.weight)
    caplog.clear()
    optimizer.param_groups[0]["lr"] = 0.01
    train(model, optimizer)
    assert "begins at initial_lr=0.1, at which an earlier one of this AdamW began" in caplog.text
    line = caplog.text.partition("To begin there: ")[2].partition(".\n")[0]
    optimizer.param_groups[0]["lr"] = 0.01
    exec(line, {"optimizer": optimizer})
    caplog.clear()
    assert train(model, optimizer).history[0]["lr"] == 0.01
    assert not caplog.text
