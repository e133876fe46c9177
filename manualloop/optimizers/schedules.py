"""Schedules of the learning rate, counted in updates.

A schedule that is given by name is a function of its place and of the length of the run. A
checkpoint holds its place; the length is that of the run at hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    MultiStepLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from manualloop.arguments import check_arguments
from manualloop.errors import ConfigError
from manualloop.internals import unwrap_optimizer
from manualloop.notices import say
from manualloop.optimizers.together import as_schedule, class_of, each, for_each

_FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")


class PlannedLR(LambdaLR):
    """A schedule that was given by name: torch's ``LambdaLR`` of one of transformers' functions.

    A checkpoint holds its place. Its name and its numbers stay those that it was made with.

    Args:
        optimizer: Its ``lr`` is the schedule's maximum.
        factor: Function from the place to the factor of the rate.
        settings: Arguments that the function was made of, by their names: ``name``,
            ``num_training_steps``, ``num_warmup_steps``, and others.
    """

    def __init__(
        self, optimizer: Optimizer, factor: Callable[[int], float], settings: Mapping[str, Any]
    ) -> None:
        self.settings = dict(settings)
        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a ``LambdaLR``: the place, and not the settings."""
        state = super().state_dict()
        del state["settings"]
        return state


def prepare_scheduler(
    optimizer: Optimizer,
    name: str = "linear",
    *,
    num_training_steps: int,
    num_warmup_steps: float = 0,
    **kwargs: Any,
) -> LRScheduler:
    """Build a schedule of the learning rate, counted in updates.

    Args:
        optimizer: Its ``lr`` is the schedule's maximum.
        name: One of transformers' ``SchedulerType``: ``"linear"`` (to 0, the Trainer's default),
            ``"cosine"``, ``"constant"``, ``"constant_with_warmup"``, ``"polynomial"``, ...; not
            those that follow a metric.
        num_training_steps: Updates in the run, warm-up included.
        num_warmup_steps: Updates of linear warm-up; a float below 1 is a share of
            ``num_training_steps``, rounded up as in the Trainer.
        **kwargs: Passed to the schedule, such as ``num_cycles`` for ``"cosine"``.

    Returns:
        A ``LambdaLR`` with the rates of transformers' schedule. If it is loaded from a checkpoint
        of a run of another length, the next update has the rate of the new length.

    Raises:
        ConfigError: The name is unknown or follows a metric, the schedule does not take the
            arguments, or a number is out of its range.

    >>> import torch
    >>> from manualloop import prepare_optimizer
    >>> optimizer = prepare_optimizer(torch.nn.Linear(2, 2), lr=1.0)
    >>> lr_scheduler = prepare_scheduler(optimizer, num_training_steps=4)
    >>> for _ in range(3):
    ...     print(lr_scheduler.get_last_lr())
    ...     optimizer.step()
    ...     lr_scheduler.step()
    [1.0]
    [0.75]
    [0.5]
    """
    from transformers import get_scheduler

    check_arguments(
        optimizer=optimizer,
        name=name,
        num_training_steps=num_training_steps,
        num_warmup_steps=num_warmup_steps,
    )
    settings = {
        "name": name,
        "num_training_steps": num_training_steps,
        "num_warmup_steps": num_warmup_steps,
        **{key: value if _is_plain(value) else repr(value) for key, value in kwargs.items()},
    }
    num_warmup = check_schedule(optimizer, name, num_training_steps, num_warmup_steps, **kwargs)
    _tell_earlier_rate(optimizer)
    try:
        made: LRScheduler = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=num_warmup,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler={name!r} does not take these arguments: {error}. Give "
            f"prepare_scheduler what {name!r} wants as keywords."
        ) from error
    if type(made) is not LambdaLR:
        return made
    return PlannedLR(optimizer, made.lr_lambdas[0], settings)


def _tell_earlier_rate(optimizer: Optimizer) -> None:
    """Report a rate that was set after an earlier schedule, whose first rate torch takes."""
    for group in optimizer.param_groups:
        first, now = group.get("initial_lr"), group["lr"]
        if type(first) is type(now) is float and first != now and now > 1e-3 * first:
            say(
                f"the schedule begins at initial_lr={first:g}, at which an earlier one of this "
                f"{type(optimizer).__name__} began, and not at lr={now:g}. To begin there: "
                'for group in optimizer.param_groups: group["initial_lr"] = group["lr"].'
            )
            return


def check_schedule(
    optimizer: Optimizer,
    name: str,
    num_training_steps: int,
    num_warmup_steps: float,
    **kwargs: Any,
) -> int:
    """Check the arguments of ``prepare_scheduler``; return the number of warm-up updates.

    Raises:
        ConfigError: As in ``prepare_scheduler``.
    """
    from transformers.trainer_utils import SchedulerType

    names = [str(kind.value) for kind in SchedulerType if kind.value not in _FOLLOW_A_METRIC]
    if name in _FOLLOW_A_METRIC:
        raise ConfigError(
            f"lr_scheduler={name!r} follows a metric, and a schedule is stepped after every "
            "update, without one. Step it in a loop over train_steps after each evaluation, or "
            f"use one of: {', '.join(names)}."
        )
    if name not in names:
        raise ConfigError(
            f"lr_scheduler={name!r} is unknown. Use None (constant), a scheduler object, or one "
            f"of: {', '.join(names)}."
        )
    if 0 < num_warmup_steps < 1:
        num_warmup_steps = math.ceil(num_warmup_steps * num_training_steps)
    is_whole = math.isfinite(num_warmup_steps) and num_warmup_steps == int(num_warmup_steps)
    if num_training_steps < 1 or not is_whole or not 0 <= num_warmup_steps <= num_training_steps:
        raise ConfigError(
            f"A schedule of num_training_steps={num_training_steps} updates cannot have "
            f"num_warmup_steps={num_warmup_steps}. Give a whole number, 0 <= num_warmup_steps <= "
            "num_training_steps, or a share such as 0.1."
        )
    if name == "constant" and (num_warmup_steps or kwargs):
        ignored = ", ".join((["num_warmup_steps"] if num_warmup_steps else []) + list(kwargs))
        raise ConfigError(
            f'lr_scheduler="constant" would ignore {ignored}. Use "constant_with_warmup".'
        )
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise ConfigError(
            f"{type(optimizer).__name__} has lr=None and finds its own learning rates. Pass "
            "lr_scheduler=None, or give it an lr."
        )
    return int(num_warmup_steps)


def own_schedule(lr_scheduler: Any) -> Any:
    """Take off accelerate's wrapper, which steps a schedule once for every process."""
    is_wrapped = type(lr_scheduler).__name__ == "AcceleratedScheduler"
    return lr_scheduler.scheduler if is_wrapped else lr_scheduler


def require_schedules(lr_scheduler: Any, optimizer: Any) -> LRScheduler | None:
    """Refuse schedules that do not fit; return them without accelerate's wrapper.

    Args:
        lr_scheduler: One schedule, or one for each of several optimizers.
        optimizer: One or several.

    Raises:
        ConfigError: As in ``require_schedule``, or there are more of one than of the other.
    """
    schedules = [own_schedule(one) for one in for_each(optimizer, lr_scheduler)]
    for schedule, own in zip(schedules, each(optimizer), strict=True):
        require_schedule(schedule, own)
    return as_schedule(schedules)


def tell_rates_of_zero(lr_scheduler: Any, optimizer: Any) -> None:
    """Report learning rates of 0 that stay so, as an earlier schedule leaves them."""
    for own, schedule in zip(each(optimizer), for_each(optimizer, lr_scheduler), strict=True):
        rates = [group.get("lr") for group in own.param_groups]
        # A class of the user's own may compute rates that are no multiples of the first ones.
        scales = type(schedule).__module__.startswith(("torch.", "manualloop."))
        stays = schedule is None or (scales and not any(getattr(schedule, "base_lrs", (1,))))
        if any(group.get("relative_step") for group in own.param_groups):
            continue  # Adafactor computes its rates itself
        if stays and all(type(rate) is float and rate == 0 for rate in rates):
            say(
                f"the learning rate of the {class_of(own)} is 0, and nothing raises it: no weight "
                "will change. A schedule of an earlier run leaves it there. Set it: "
                'for group in optimizer.param_groups: group["lr"] = 5e-5.'
            )


def require_schedule(lr_scheduler: object, optimizer: Optimizer) -> None:
    """Refuse a scheduler that cannot be stepped once an update, or that drives another optimizer.

    Raises:
        ConfigError: It is none, it follows a metric, or it belongs to another optimizer.
    """
    if lr_scheduler is None:
        return
    name = type(lr_scheduler).__name__
    lr_scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate's wrapper
    if isinstance(lr_scheduler, ReduceLROnPlateau):
        raise ConfigError(
            f"{name} follows a metric, and a schedule is stepped after every update, without one. "
            "Pass lr_scheduler=None and step it yourself after each evaluation: "
            'scheduler.step(scores["loss"]).'
        )
    if not hasattr(lr_scheduler, "step"):
        raise ConfigError(
            f"lr_scheduler is a {name}, which has no step(). Build one: "
            'prepare_scheduler(optimizer, "linear", num_training_steps=...).'
        )
    driven = getattr(lr_scheduler, "optimizer", optimizer)
    if unwrap_optimizer(driven) is not unwrap_optimizer(optimizer):
        raise ConfigError(
            f"The {name} drives another optimizer than the {type(optimizer).__name__} that is "
            "given, so the learning rate would never move. Pass both: train_loop(model, loader, "
            "optimizer, lr_scheduler)."
        )


def follow_functions(lr_scheduler: Any) -> None:
    """Give the next update the rate of the schedules' functions, once a state was loaded.

    The functions of a ``LambdaLR`` are not in its state, which has the last rate of those before,
    perhaps of another length. Objects with attributes are in the state, and are not called: a call
    may change them. A script that has only changed ``base_lrs`` has the functions of before.
    """
    for schedule in map(own_schedule, schedules_of(lr_scheduler)):
        if type(schedule) not in (LambdaLR, PlannedLR):
            continue
        if any(map(_is_in_state, schedule.lr_lambdas)):
            continue
        factors = [function(schedule.last_epoch) for function in schedule.lr_lambdas]
        first = [group["initial_lr"] for group in schedule.optimizer.param_groups]
        was = [*map(float, schedule.get_last_lr())]
        now, of_first = (
            [float(base * factor) for base, factor in zip(bases, factors, strict=False)]
            for bases in (schedule.base_lrs, first)
        )
        if was in (now, of_first):
            continue
        if type(schedule) is LambdaLR or schedule.base_lrs != first:
            say(
                f"not bit-exact, because rates of the {type(schedule).__name__} after update "
                f"{schedule.last_epoch}: {was} -> {now}; the new value counts from now on."
            )
        move_schedule(schedule, schedule.last_epoch)


def _is_in_state(function: object) -> bool:
    """Tell whether the state of a ``LambdaLR`` has the attributes of one of its functions."""
    return not isinstance(function, FunctionType) and bool(getattr(function, "__dict__", None))


def move_schedule(schedule: LambdaLR, place: int) -> None:
    """Let the next update have the rate of a place of the schedule."""
    functions, groups = list(schedule.lr_lambdas), schedule.optimizer.param_groups
    first = [group["initial_lr"] for group in groups]
    for group, base in zip(groups, schedule.base_lrs, strict=False):
        group["initial_lr"] = base  # the script may have changed it
    LambdaLR.__init__(schedule, schedule.optimizer, functions, place - 1)
    for group, rate in zip(groups, first, strict=True):
        group["initial_lr"] = rate


def schedules_of(lr_scheduler: Any) -> list[Any]:
    """Return the schedules of a run, of which there may be none, one, or several."""
    return [schedule for schedule in each(lr_scheduler) if schedule is not None]


def is_planned(lr_scheduler: object, num_steps: int) -> bool:
    """Tell whether a schedule was given by name for a run of so many updates."""
    if not isinstance(lr_scheduler, PlannedLR):
        return False
    return bool(lr_scheduler.settings["num_training_steps"] == num_steps)


def require_length(lr_scheduler: Any, num_left: int) -> None:
    """Refuse a schedule that cannot be stepped as often as a run needs it.

    Raises:
        ConfigError: A ``OneCycleLR``, perhaps inside of another schedule, ends before the run, or
            a schedule was built for less than nine tenths of it.
    """
    if not isinstance(lr_scheduler, LRScheduler):
        return
    place = getattr(lr_scheduler, "last_epoch", 0)
    _compare_lengths(lr_scheduler, place, place + num_left)
    if not place and (what := _seems_by_epoch(lr_scheduler, num_left)) is not None:
        say(
            f"{type(lr_scheduler).__name__} is stepped after every update, of which the run has "
            f"{num_left}: {what}. If it counts epochs, count updates instead. Or pass None in its "
            'place, extras={"schedule": schedule} so that it is saved, and step it yourself: '
            "on_step=lambda step: schedule.step() if step.ends_epoch else None."
        )
    for end, total in _ends(lr_scheduler.state_dict(), place, place + num_left):
        if end <= total:
            continue
        if (num_done := end - num_left) <= 0:
            raise ConfigError(
                f"OneCycleLR has total_steps={total}, and the run has {end} updates. Build it for "
                f"all of them: OneCycleLR(optimizer, max_lr, total_steps={end})."
            )
        raise ConfigError(
            f"OneCycleLR has total_steps={total}, of which {num_done} are done, and the run has "
            f"{num_left} more updates. It cannot be stepped beyond its end, and a checkpoint keeps "
            "its total_steps. Train with these weights in another run and checkpoint_dir: "
            f"load_checkpoint(folder, model), then OneCycleLR(optimizer, max_lr, total_steps="
            f'{num_left}). A schedule given by name, such as "cosine", can be extended: see '
            "docs/resume.md."
        )


def _compare_lengths(schedule: LRScheduler, place: int, end: int) -> None:
    """Compare the length that a schedule of transformers was built for with that of the run.

    Beyond its length it gives a rate of 0, or begins again. A difference of a few updates, as of
    epochs that were rounded down, that of a resumed run, and a rate that is held are reported.
    """
    if not isinstance(schedule, LambdaLR):
        return
    functions = {
        total: function
        for function in schedule.lr_lambdas
        if isinstance(total := getattr(function, "keywords", {}).get("num_training_steps"), int)
    }
    total = min(functions, default=end)
    if total >= end:
        return
    fix = f"num_training_steps={end}"
    if (call := _call_of(schedule, functions[total])) is not None:
        name, options = call
        fix = f'prepare_scheduler(optimizer, "{name}", num_training_steps={end}{options})'
        fix += "" if options else f', or name it: lr_scheduler="{name}"'
    message = (
        f"The schedule was built for num_training_steps={total} updates, and the run has {end}. "
        f"Build it for all of them: {fix}."
    )
    if not place and total < 0.9 * end and not _holds(functions[total], total, end):
        raise ConfigError(message)
    say(message)


_OFTEN_BY_EPOCH = (
    *(CosineAnnealingLR, ExponentialLR, MultiStepLR, PolynomialLR, SequentialLR, StepLR),
)


def _seems_by_epoch(schedule: LRScheduler, end: int) -> str | None:
    """Describe what a run makes of a schedule that counts epochs, as in most loops by hand.

    Returns:
        None if nothing shows that it does.
    """
    if type(schedule) is LambdaLR and isinstance(schedule.lr_lambdas[0], FunctionType):
        factor: Any = schedule.lr_lambdas[0]
    elif type(schedule) in _OFTEN_BY_EPOCH:
        factor = partial(_factor, schedule.state_dict())
    else:
        return None
    try:
        factors = [abs(float(factor(end * part // 16))) for part in range(16)]
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError):
        return None  # not known, or a function of places that are no part of the run
    if max(factors[8:]) <= 1e-3 * max(factors) and max(factors) > 0:
        return f"half of them have at most {max(factors[8:]) / max(factors):.0e} of its rate"
    state = schedule.state_dict()
    if "_milestones" in state:
        end, state = end - state["_milestones"][-1], state["_schedulers"][-1]
    if state.get("T_max", end) <= end / 2:
        return f"with T_max={state['T_max']} the rate goes down and up again and again"
    milestones = state.get("milestones") or [end]
    if (last := max(milestones)) <= end / 10:
        return f"its last milestone is {last}"
    return None


def _factor(state: Mapping[str, Any], place: int) -> float:
    """Return what a schedule of torch makes of the rate at a place, by what its state holds."""
    if "_milestones" in state:
        begins = [0, *state["_milestones"]]
        number = sum(begin <= place for begin in begins) - 1
        return _factor(state["_schedulers"][number], place - begins[number])
    if "T_max" in state:
        return (1 + math.cos(math.pi * place / state["T_max"])) / 2
    if "power" in state:
        left: float = 1 - min(place / state["total_iters"], 1)
        return float(left ** state["power"])
    if "step_size" in state:
        place //= state["step_size"]
    elif "milestones" in state:
        place = sum(number for at, number in state["milestones"].items() if at <= place)
    return float(state.get("gamma", 1.0) ** place)  # of others inside of a sequence nothing is said


def _holds(function: Any, total: int, end: int) -> bool:
    """Tell whether a schedule stays at a rate beyond its length, of at least a hundredth."""
    first, *others = (function(place) for place in (total, (total + end) // 2, end - 1))
    return bool(first >= 0.01) and all(math.isclose(first, other) for other in others)


def _call_of(schedule: LRScheduler, function: Any) -> tuple[str, str] | None:
    """Return name and options with which a schedule is built; None of a function of one's own."""
    settings = getattr(schedule, "settings", None)
    if settings is None:
        settings = dict(function.keywords)
        found = _NAME.match(getattr(function.func, "__name__", ""))
        settings["name"] = None if found is None else _NAMES.get(found[1])
        if settings["name"] == "cosine" and settings.get("min_lr_rate"):
            settings["name"] = "cosine_with_min_lr"
    if settings["name"] is None:
        return None
    given = {name: settings[name] for name in _OPTIONS if settings.get(name)}
    options = [f", {name}={v!r}" for name, v in given.items() if v not in _OPTIONS[name]]
    return settings["name"], "".join(options)


_NAME = re.compile(r"_get_([a-z_]+?)_schedule_with_warmup_lr_lambda")
_NAMES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_hard_restarts": "cosine_with_restarts",
    "polynomial_decay": "polynomial",
}
_OPTIONS: dict[str, tuple[float, ...]] = {
    "num_warmup_steps": (),
    "num_cycles": (0.5, 1),
    "lr_end": (1e-7,),
    "power": (1.0,),
    "min_lr": (),
    "min_lr_rate": (),
}
"""Options of schedules, with the values that they have by themselves."""


def _ends(state: Mapping[str, Any], place: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the last place that a run needs of each ``OneCycleLR``, and the last that it has."""
    if "_schedule_phases" in state:
        yield end, state["total_steps"]
    inner = state.get("_schedulers", ())
    if "_milestones" not in state:
        for one in inner:  # all of them are stepped
            own = one.get("last_epoch", place)
            yield from _ends(one, own, own + end - place)
        return
    begins = [0, *state["_milestones"]]
    for one, begin, after in zip(inner, begins, [*begins[1:], end + 1], strict=True):
        last = min(after - 1, end)
        if last >= max(begin, place):
            yield from _ends(one, max(place - begin, 0), last - begin)


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str | None)
