"""What a ``step_fn`` of the user returns, and what it leaves out."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers import messages
from torch import Tensor, nn
from torch.optim import lr_scheduler as torchs
from torch.utils.data import DataLoader, TensorDataset

from manualloop import (
    ConfigError,
    NonFiniteError,
    TrainState,
    Update,
    apply_update,
    prepare_scheduler,
    train_loop,
    train_steps,
)
from manualloop import update as update_module

ROWS = [{"x": torch.full((4, 2), float(number))} for number in range(1, 6)]


def make(make_schedule: Any = None) -> TrainState:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return TrainState(model, optimizer, make_schedule(optimizer) if make_schedule else None)


def step(state: TrainState, batches: list[Any], scale: float = 1.0) -> Tensor:
    """An update as a user writes it."""
    state.optimizer.zero_grad()
    inputs = batches[0]["x"] if isinstance(batches[0], dict) else batches[0][0]
    loss: Tensor = state.model(inputs).square().mean() * scale
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    return loss


def run(state: TrainState, result_of: Any, rows: Any = ROWS, **options: Any) -> list[Any]:
    def step_fn(state: TrainState, batches: list[Any], strategy: Any) -> Any:
        return result_of(step(state, batches))

    return list(train_steps(state, rows, num_epochs=1, step_fn=step_fn, **options))


# What it returns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result_of", "found"),
    [
        (lambda loss: loss, "returned a Tensor"),
        (lambda loss: None, "returned None"),
        (lambda loss: (loss, 4), "returned a tuple"),
        (lambda loss: {"loss": loss}, "returned a dict"),
        (lambda loss: Update(loss.item(), 4), "whose loss is a float"),
        (lambda loss: Update(loss.expand(3), 4), r"whose loss is a Tensor of shape \(3,\)"),
        (lambda loss: Update(loss, torch.tensor(4)), "whose num_items is tensor"),
        (lambda loss: Update(loss, None), "whose num_items is None"),
        (lambda loss: Update(loss, -1), "whose num_items is -1"),
        (lambda loss: Update(loss, math.nan), "whose num_items is nan"),
        (lambda loss: Update(loss, 4, grad_norm=1.0), "whose grad_norm is a float"),
        (lambda loss: Update(loss, 4, applied=None), "whose applied is a NoneType"),
        (lambda loss: Update(loss, 4, applied=torch.tensor(True)), "whose applied is a Tensor"),
    ],
)
def test_a_wrong_return_is_named(result_of: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=f"step_fn returned .*{found.removeprefix('returned ')}"):
        run(make(), result_of)


def test_a_loss_with_its_graph_and_an_axis_is_taken() -> None:
    losses = [one.loss for one in run(make(), lambda loss: Update(loss.reshape(1), 4))]
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)
    assert len(losses) == 5


# A loss that is not finite ------------------------------------------------------------------------


def bad_rows(is_dict: bool) -> Any:
    x = torch.ones(20, 2)
    x[13, 1] = math.nan
    table = TensorDataset(x)
    if is_dict:
        return DataLoader([{"x": row} for row in x], 4)
    return DataLoader(table, 4)


@pytest.mark.parametrize("is_dict", [True, False])
@pytest.mark.parametrize("on_device", [True, False])
def test_a_loss_that_is_not_finite_raises_and_names_the_rows(
    is_dict: bool, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:  # where the host may not read at once
        monkeypatch.setattr(update_module, "reads_at_once", lambda tensor: False)
    with pytest.raises(NonFiniteError) as caught:
        run(make(), lambda loss: Update(loss.detach(), 4), bad_rows(is_dict))
    message = str(caught.value)
    assert "The loss that step_fn returned is nan at step 4 (epoch 0)" in message
    assert "batch 3" in message
    assert "row 13" in message or "row id 13" in message or "row 1 " in message
    assert "step_fn has already made its update" in message


def test_a_loss_that_no_row_explains_names_the_batch() -> None:
    state = make()

    def step_fn(state: TrainState, batches: list[Any], strategy: Any) -> Update:
        return Update(step(state, batches, math.inf).detach(), 4)

    with pytest.raises(NonFiniteError, match=r"is inf at step 1 .*nothing in a batch is NaN"):
        list(train_steps(state, ROWS, num_epochs=1, step_fn=step_fn))


def test_ignoring_is_possible_and_skipping_is_refused() -> None:
    steps = run(
        make(), lambda loss: Update(loss.detach() * math.nan, 4), ROWS, on_nonfinite="ignore"
    )
    assert len(steps) == 5
    with pytest.raises(ConfigError, match="cannot skip what step_fn has made"):
        run(make(), lambda loss: Update(loss.detach(), 4), ROWS, on_nonfinite="skip")


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(batch["x"]).mean()
    return loss


def test_the_fix_that_is_printed_skips() -> None:
    """functools.partial(apply_update, on_nonfinite="skip") beside on_nonfinite="ignore"."""
    rows = [*ROWS, {"x": torch.full((4, 2), math.nan)}]
    state = make()
    steps = train_steps(
        state,
        rows,
        num_epochs=1,
        step_fn=partial(apply_update, loss_fn=loss_fn, on_nonfinite="skip"),
        on_nonfinite="ignore",
    )
    assert len(list(steps)) == 5
    assert state.progress.num_skipped == 1
    assert all(bool(torch.isfinite(weight).all()) for weight in state.model.parameters())


def test_apply_update_inside_of_a_step_fn_leaves_the_weights_as_before() -> None:
    rows = [{"x": torch.full((4, 2), math.nan)}]
    state = make()
    before = state.model.weight.clone()
    with pytest.raises(NonFiniteError, match="The weights are those from before this step"):
        list(train_steps(state, rows, num_epochs=1, step_fn=partial(apply_update, loss_fn=loss_fn)))
    assert torch.equal(state.model.weight, before)


# A schedule ---------------------------------------------------------------------------------------

STAYS = "step_fn has not stepped the schedule"


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: prepare_scheduler(optimizer, num_training_steps=5),
        lambda optimizer: torchs.StepLR(optimizer, 100),  # whose rate would not move at first
        lambda optimizer: torchs.OneCycleLR(optimizer, 1e-3, total_steps=5),
        lambda optimizer: torchs.ChainedScheduler([torchs.ExponentialLR(optimizer, 0.9)]),
        lambda optimizer: torchs.SequentialLR(
            optimizer,
            [torchs.ConstantLR(optimizer), torchs.ExponentialLR(optimizer, 0.9)],
            [2],
        ),
    ],
)
@pytest.mark.parametrize("steps_it", [True, False])
def test_a_schedule_that_nobody_steps_is_told_once(
    schedule: Any, steps_it: bool, caplog: pytest.LogCaptureFixture
) -> None:
    state = make(schedule)

    def result_of(loss: Tensor) -> Update:
        if steps_it:
            state.lr_scheduler.step()  # type: ignore[union-attr]
        return Update(loss.detach(), 4)

    with caplog.at_level("INFO", logger="manualloop"):
        run(state, result_of)
    assert sum(STAYS in line for line in messages(caplog)) == (not steps_it)


def test_a_schedule_after_updates_that_were_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """It has to move with the first applied update, not before."""
    state = make(lambda optimizer: prepare_scheduler(optimizer, num_training_steps=5))
    numbers = iter(range(5))

    def result_of(loss: Tensor) -> Update:
        if next(numbers) < 2:
            return Update(loss.detach(), 4, applied=False)
        state.lr_scheduler.step()  # type: ignore[union-attr]
        return Update(loss.detach(), 4)

    with caplog.at_level("INFO", logger="manualloop"):
        run(state, result_of)
    assert messages(caplog) == []


def test_a_schedule_that_is_stepped_twice(caplog: pytest.LogCaptureFixture) -> None:
    state = make(lambda optimizer: prepare_scheduler(optimizer, num_training_steps=10))

    def result_of(loss: Tensor) -> Update:
        state.lr_scheduler.step()  # type: ignore[union-attr]
        state.lr_scheduler.step()  # type: ignore[union-attr]
        return Update(loss.detach(), 4)

    with caplog.at_level("INFO", logger="manualloop"):
        run(state, result_of)
    assert messages(caplog) == ["step_fn has moved the schedule by 2 in one update (PlannedLR)."]


def test_level_1(caplog: pytest.LogCaptureFixture) -> None:
    state = make()

    def step_fn(state: TrainState, batches: list[Any], strategy: Any) -> Update:
        return Update(step(state, batches).detach(), 4)

    with caplog.at_level("INFO", logger="manualloop"):
        train_loop(
            state.model, ROWS, state.optimizer, num_epochs=1, step_fn=step_fn, progress_bar=False
        )
    assert [STAYS in line for line in messages(caplog)] == [True]
