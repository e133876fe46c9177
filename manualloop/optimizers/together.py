"""Several optimizers, or several schedules, that act as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manualloop.errors import ConfigError
from manualloop.internals import step_optimizer, unwrap_optimizer


class Optimizers(tuple[Optimizer, ...]):
    """Several optimizers of one model: a tuple that is used like a single optimizer.

    It has what loops, strategies and ``torch.amp.GradScaler`` use of an optimizer, so that one
    loss scale, one gradient norm and one decision to skip an update hold for all of them.
    """

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in their order."""
        return [group for optimizer in self for group in optimizer.param_groups]

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of each optimizer, under its class name."""
        return {
            f"{class_of(optimizer)}.{name}": value
            for optimizer in self
            for name, value in optimizer.defaults.items()
        }

    def step(self, *, is_unscaled: bool = False) -> None:
        """Let each optimizer make its update.

        Args:
            is_unscaled: Whether a loss scale was divided out already, which accelerate's wrappers
                would do again.
        """
        for optimizer in self:
            step_optimizer(unwrap_optimizer(optimizer) if is_unscaled else optimizer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients of all parameters to None."""
        for optimizer in self:
            optimizer.zero_grad(set_to_none)


class Schedules(tuple[LRScheduler | None, ...]):
    """The schedules of several optimizers, in their order; None where the rate is constant."""

    def step(self) -> None:
        """Advance each schedule by one update."""
        for schedule in self:
            if schedule is not None:
                schedule.step()

    def get_last_lr(self) -> list[Any]:
        """Return the learning rates of all schedules, in their order."""
        return [lr for schedule in self if schedule is not None for lr in schedule.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each schedule."""
        return {"schedules": [schedule and schedule.state_dict() for schedule in self]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ValueError: It is of other schedules.
        """
        states = state["schedules"]
        if [saved is None for saved in states] != [schedule is None for schedule in self]:
            raise ValueError(f"{len(states)} schedules were saved, or for other optimizers")
        for schedule, saved in zip(self, states, strict=True):
            if schedule is not None:
                schedule.load_state_dict(saved)


def class_of(optimizer: Any) -> str:
    """Return the name of an optimizer's class; of several: ``"Muon + AdamW"``."""
    return " + ".join(type(unwrap_optimizer(one)).__name__ for one in each(optimizer))


def each(value: Any) -> tuple[Any, ...]:
    """Return one or several optimizers or schedules as a tuple; None is an empty one."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return () if value is None else (value,)


def as_optimizer(optimizer: Optimizer | Sequence[Optimizer]) -> Optimizer:
    """Return one optimizer as it is, and several as ``Optimizers``.

    Raises:
        ConfigError: There is none, one is no optimizer, or a parameter would be updated twice.
    """
    if isinstance(optimizer, Optimizers):
        return cast("Optimizer", optimizer)
    if not isinstance(optimizer, list | tuple):
        if not hasattr(optimizer, "param_groups"):
            raise ConfigError(
                f"optimizer is a {type(optimizer).__name__}. Pass an optimizer of the model: "
                "prepare_optimizer(model, lr=5e-5)."
            )
        return cast("Optimizer", optimizer)
    if not optimizer:
        raise ConfigError(
            "optimizer is an empty list. Pass an optimizer of the model: prepare_optimizer(model)."
        )
    owner: dict[int, int] = {}
    for number, one in enumerate(optimizer):
        if not hasattr(one, "param_groups"):
            raise ConfigError(
                f"optimizer[{number}] is a {type(one).__name__}. Pass optimizers of the model: "
                "[torch.optim.Muon(matrices), torch.optim.AdamW(others)]."
            )
        if any(unwrap_optimizer(one) is unwrap_optimizer(other) for other in optimizer[:number]):
            raise ConfigError(
                f"optimizer[{number}] is the same {class_of(one)} as one before it, and would make "
                "each update twice. List each optimizer once."
            )
        for parameter in (p for group in one.param_groups for p in group["params"]):
            if (first := owner.setdefault(id(parameter), number)) != number:
                raise ConfigError(
                    f"A parameter of shape {tuple(parameter.shape)} is both in optimizer[{first}] "
                    f"({class_of(optimizer[first])}) and in optimizer[{number}] ({class_of(one)}), "
                    "and would be updated twice. Give each parameter to one optimizer."
                )
    return cast("Optimizer", optimizer[0] if len(optimizer) == 1 else Optimizers(optimizer))


def as_schedule(
    lr_scheduler: LRScheduler | Sequence[LRScheduler | None] | None,
) -> LRScheduler | None:
    """Return one schedule as it is, several as ``Schedules``, and None if there is none."""
    if isinstance(lr_scheduler, Schedules) or not isinstance(lr_scheduler, list | tuple):
        return cast("LRScheduler | None", lr_scheduler)
    if all(schedule is None for schedule in lr_scheduler):
        return None
    return cast(
        "LRScheduler",
        lr_scheduler[0] if len(lr_scheduler) == 1 else Schedules(lr_scheduler),
    )


def for_each(optimizer: Any, lr_scheduler: Any) -> tuple[Any, ...]:
    """Return the schedule, or the name of one, of each optimizer.

    Args:
        optimizer: One or several.
        lr_scheduler: A name for all of them, or one schedule or name for each; None for constant
            learning rates.

    Raises:
        ConfigError: There are more of one than of the other.
    """
    number = len(each(optimizer))
    if lr_scheduler is None or isinstance(lr_scheduler, str):
        return (lr_scheduler,) * number
    schedules = each(lr_scheduler)
    if len(schedules) != number:
        example = ", ".join(["first_schedule", *["None"] * (number - 1)])
        raise ConfigError(
            f"lr_scheduler has {len(schedules)} of the {number} entries that {number} optimizers "
            f"({class_of(optimizer)}) need. List one for each, in their order, and None for a "
            f"constant rate: lr_scheduler=[{example}]."
        )
    return schedules
