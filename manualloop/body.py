"""What the body of a loop does once more, though the loop has done it: found in its first step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from manualloop.internals import unwrap_optimizer
from manualloop.notices import say
from manualloop.optimizers.schedules import schedules_of
from manualloop.optimizers.together import each
from manualloop.state import TrainState

_T = TypeVar("_T")


def watch_first(steps: Generator[_T, None, None], state: TrainState) -> Iterator[_T]:
    """Yield steps, and look at what the body of the loop does with the first."""
    with closing(steps):
        for step in steps:
            with watching_body(state):
                yield step
            break
        yield from steps


@contextmanager
def watching_body(state: TrainState) -> Iterator[None]:
    """Report an optimizer or a schedule of the state that is stepped in the meantime."""
    stepped: list[str] = []

    def note(optimizer: Any, *call: Any) -> None:
        stepped.append(type(optimizer).__name__)

    optimizers = [unwrap_optimizer(one) for one in each(state.optimizer)]
    hooks = [hook for one in optimizers if (hook := _hooked(one, note)) is not None]
    schedules = schedules_of(state.lr_scheduler)
    places = [getattr(schedule, "last_epoch", None) for schedule in schedules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for name in dict.fromkeys(stepped):
        say(
            f"the body of the loop has stepped the {name}, whose update was made before: with the "
            "same gradients it makes another one. Remove optimizer.step()."
        )
    for schedule, place in zip(schedules, places, strict=True):
        if getattr(schedule, "last_epoch", None) != place:
            say(
                f"the body of the loop has stepped the {type(schedule).__name__}, which is stepped "
                "after every update: the rate moves twice as fast. Remove schedule.step(). To step "
                "it yourself, pass None in its place."
            )


def _hooked(optimizer: Any, note: Callable[..., None]) -> Any:
    try:
        return optimizer.register_step_post_hook(note)
    except AttributeError:  # it is no torch optimizer, or one that was not made as such
        return None
