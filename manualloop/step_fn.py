"""What a ``step_fn`` of the user returns, checked at every update."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor

from manualloop.errors import ConfigError
from manualloop.notices import say
from manualloop.schedules import schedules_of
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy
from manualloop.types import Update
from manualloop.update import StepFn


def checked(step_fn: StepFn) -> StepFn:
    """Return a ``step_fn`` whose updates are checked.

    A schedule that the first update has not moved by one is reported.
    """
    places: list[Any] = []  # of the schedules before the first update
    return partial(_make, step_fn=step_fn, places=places)


def _make(
    state: TrainState,
    batches: list[Any],
    strategy: Strategy,
    *,
    step_fn: StepFn,
    places: list[Any],
) -> Update:
    if not places:
        places.append([_place(schedule) for schedule in schedules_of(state.lr_scheduler)])
    update: Any = step_fn(state, batches, strategy)
    if problem := _problem_of(update):
        raise ConfigError(
            f"step_fn returned {problem}. Return what it did: manualloop.Update(loss.detach(), "
            "num_items), with the mean loss as a tensor of one number and the number of items as "
            "a number; applied=False if the weights were left as they were."
        )
    if update.loss.requires_grad or update.loss.ndim:
        update.loss = update.loss.detach().reshape(())  # else the history keeps its graph
    if places[0] is not None and update.applied:
        _tell_schedules(state, places[0])
        places[0] = None
    made: Update = update
    return made


def _problem_of(update: Any) -> str | None:
    if not isinstance(update, Update):
        return f"a {type(update).__name__}" if update is not None else "None"
    loss, norm, items = update.loss, update.grad_norm, update.num_items
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        return f"an Update whose loss is a {type(loss).__name__}{shape}"
    if not isinstance(items, Real) or isinstance(items, bool) or not items >= 0:
        return f"an Update whose num_items is {items!r:.40}, a {type(items).__name__}"
    if norm is not None and not (isinstance(norm, Tensor) and norm.numel() == 1):
        return f"an Update whose grad_norm is a {type(norm).__name__}"
    if update.applied is not True and update.applied is not False:
        return f"an Update whose applied is a {type(update.applied).__name__}"
    return None


def _place(schedule: Any) -> Any:
    """Return what moves when a schedule is stepped: a number, or all of its state."""
    place = getattr(schedule, "last_epoch", None)
    return place if isinstance(place, int) else repr(getattr(schedule, "state_dict", dict)())


def _tell_schedules(state: TrainState, before: list[Any]) -> None:
    for schedule, place in zip(schedules_of(state.lr_scheduler), before, strict=True):
        name, now = type(schedule).__name__, _place(schedule)
        if now == place:
            say(
                f"step_fn has not stepped the schedule: the {name} stays where it is. Call "
                "state.lr_scheduler.step() in step_fn after the update, or pass lr_scheduler=None."
            )
        elif isinstance(place, int) and now != place + 1:
            say(f"step_fn has moved the schedule by {now - place} in one update ({name}).")
