"""How long a run is: planned before it begins, and counted again at each epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler

from manualloop.arguments import is_count, is_positive, problem_of_call, require_loader
from manualloop.errors import ConfigError, DataError
from manualloop.notices import say
from manualloop.optimizers.schedules import is_planned, move_schedule, require_length, schedules_of
from manualloop.reading.describe import batch_size_of, is_prepared
from manualloop.reading.ranks import num_rounds
from manualloop.reading.reader import Reader
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy
from manualloop.tasks.loss import BOTH_GIVEN
from manualloop.types import LossFn, OnNonfinite, Plan, Terms, Update
from manualloop.update import StepFn


class Settings(NamedTuple):
    """The arguments of ``train_steps`` that an update depends on.

    Attributes:
        gradient_accumulation_steps: Number of batches per update.
        max_grad_norm: Norm to which gradients are clipped, or None.
        loss_fn: Function of a loss, or None.
        terms: Function of the terms of a loss, or None.
        step_fn: Function of a whole update, or None.
        on_nonfinite: Name of the reaction to NaN and infinity.
    """

    gradient_accumulation_steps: int
    max_grad_norm: float | None
    loss_fn: LossFn | None
    terms: Terms | None
    step_fn: StepFn | None
    on_nonfinite: OnNonfinite


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """Take the settings out of all arguments of a call."""
    return Settings(*(arguments[name] for name in Settings._fields))


def plan_run(
    train_dataloader: Any,
    settings: Settings,
    *,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    world_size: int = 1,
) -> Plan:
    """Check the arguments of ``train_steps`` against each other and the data; plan the updates.

    Args:
        train_dataloader: Any iterable of batches, with or without a length.
        settings: Arguments of ``train_steps`` that an update depends on.
        num_epochs: Number of passes over the data; 3 if ``max_steps`` is also None.
        max_steps: Number of updates, over as many epochs as they take.
        world_size: Number of ranks that share the batches.

    Raises:
        ConfigError: The arguments do not fit together; each problem has a line of its own.
        DataError: It is not a loader, or has no batches.

    >>> plan_run(range(5), Settings(4, None, None, None, None, "raise"), num_epochs=2)
    Plan(num_steps=4, num_epochs=2, num_steps_per_epoch=2)
    """
    require_loader(train_dataloader)
    length = num_rounds(train_dataloader, world_size)
    problems = [*_problems_of_length(settings, num_epochs, max_steps), *_problems_of(settings)]
    if length is None and max_steps is None:
        problems.append("A streaming dataset has no length: give max_steps=, the updates to make.")
    if problems:
        raise ConfigError("\n".join(problems))
    if length == 0:
        raise DataError(
            "The training loader has 0 batches. Check the filter of the dataset, and batch_size "
            "with drop_last."
        )
    per_epoch = None if length is None else -(-length // int(settings.gradient_accumulation_steps))
    if max_steps is not None:
        return Plan(int(max_steps), None, per_epoch)
    num_epochs = int(num_epochs or 3)
    return Plan(num_epochs * (per_epoch or 0), num_epochs, per_epoch)


def _problems_of_length(settings: Settings, num_epochs: Any, max_steps: Any) -> Iterator[str]:
    counts = {
        "num_epochs": num_epochs,
        "max_steps": max_steps,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
    }
    for name, count in counts.items():
        if count is not None and not is_count(count):
            yield f"{name} must be a whole number of at least 1, got {count!r}."
    if num_epochs is not None and max_steps is not None:
        yield (
            f"Give num_epochs={num_epochs!r} or max_steps={max_steps!r}, not both: each ends the "
            "run."
        )


def ends_in_lone_row(loader: Any, plan: Plan) -> bool:
    """Tell whether a run will read a last batch of one row in an epoch of batches of several."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    size = batch_size_of(loader)
    if plan.num_epochs is None and plan.num_steps < (plan.num_steps_per_epoch or math.inf):
        return False  # it ends before
    if size is None or size == 1 or getattr(sampler, "drop_last", True):
        return False
    if is_prepared(loader):
        return sampler.max_tokens is None and bool(sampler.num_rows % size == 1)
    is_plain = type(sampler) is BatchSampler and hasattr(sampler.sampler, "__len__")
    return is_plain and len(sampler.sampler) % size == 1


def _problems_of(settings: Settings) -> Iterator[str]:
    _, max_grad_norm, loss_fn, terms, step_fn, on_nonfinite = settings
    if max_grad_norm is not None and not is_positive(max_grad_norm):
        yield f"max_grad_norm must be above 0, got {max_grad_norm!r}; None does not clip."
    for name, function, arguments in (
        ("loss_fn", loss_fn, "model, batch"),
        ("terms", terms, "outputs, batch"),
        ("step_fn", step_fn, "state, batches, strategy"),
    ):
        if function is not None and not callable(function):
            kind = type(function).__name__
            yield f"{name} is a {kind}. Pass a function: {name}=lambda {arguments}: ...."
        elif function is not None and (problem := problem_of_call(name, function)) is not None:
            yield problem
    if step_fn is not None and any(x is not None for x in (loss_fn, terms, max_grad_norm)):
        yield (
            "step_fn replaces the whole update, so loss_fn, terms and max_grad_norm would be "
            "ignored. Use them inside step_fn: functools.partial(apply_update, max_grad_norm=1.0)."
        )
    if loss_fn is not None and terms is not None:
        yield BOTH_GIVEN
    if step_fn is not None and on_nonfinite == "skip":
        yield (
            'on_nonfinite="skip" cannot skip what step_fn has made already. Skip inside step_fn: '
            'functools.partial(apply_update, on_nonfinite="skip"), and pass on_nonfinite="ignore".'
        )
    if on_nonfinite not in ("raise", "skip", "ignore"):
        yield f'on_nonfinite={on_nonfinite!r} is none of "raise", "skip", "ignore".'


def begin_epoch(
    state: TrainState,
    plan: Plan,
    reader: Reader,
    window_size: int,
    strategy: Strategy,
    is_resized: bool | None,
) -> int:
    """Count the updates of an epoch whose pass has begun, and those of the run.

    The epoch at hand tells how many there are. Where it has as many as the first one, the count is
    that of the plan.

    Args:
        state: State of the run, whose ``pace`` is set.
        plan: Plan that was made before the first epoch.
        reader: Reader whose pass has begun.
        window_size: Number of batches per update.
        strategy: Strategy whose ranks share the batches.
        is_resized: Whether the updates before were of another size; None after the first epoch of
            a call.

    Returns:
        The number of updates that the run will have made, skipped ones included.

    Raises:
        ConfigError: A schedule ends before the run.
        DataError: A schedule was planned for epochs of another length.
    """
    progress, pace, window_size = state.progress, state.pace, int(window_size)
    num_over = progress.num_steps + progress.num_skipped
    num_left = num_steps = _windows_left(reader, window_size, strategy, progress.num_samples)
    if progress.num_samples and num_left is not None:  # the pass begins inside of the epoch
        rounds = num_rounds(reader.source.loader, strategy.world_size)
        num_steps = max(num_left, -(-(rounds or 0) // window_size))
    pace.begin(progress.epoch, num_steps, 0 if num_steps is None else num_steps - (num_left or 0))
    if plan.num_epochs is None:
        num_over, num_left = progress.num_steps, plan.num_steps - progress.num_steps
    elif num_steps is None or num_left is None:
        num_left = max(plan.num_steps - num_over, 1)
    else:
        if num_steps != plan.num_steps_per_epoch:
            _require_no_plan(state, plan, num_steps)
        num_left += (plan.num_epochs - progress.epoch - 1) * num_steps
    if is_resized is not None:
        if not progress.num_steps:
            for schedule in schedules_of(state.lr_scheduler):
                _tell_batches_counted(schedule, plan, window_size * strategy.world_size)
        _fit_schedules(state, plan, num_left, is_resized=is_resized)
    return num_over + num_left


def _windows_left(
    reader: Reader, window_size: int, strategy: Strategy, num_samples: int
) -> int | None:
    left, loader, world_size = reader.num_rounds_left, reader.source.loader, strategy.world_size
    if left is None:  # perhaps because the pass was begun in batches of another size
        rounds, size = num_rounds(loader, world_size), batch_size_of(loader)
        if rounds is None or size is None:
            return None
        left = max(rounds - num_samples // (size * world_size), 0)
    return -(-left // window_size)


def _require_no_plan(state: TrainState, plan: Plan, num_steps: int) -> None:
    for schedule in schedules_of(state.lr_scheduler):
        if is_planned(schedule, plan.num_steps):
            raise DataError(
                f"Epoch {state.progress.epoch} has {num_steps} updates, and the schedule "
                f"{schedule.settings['name']!r} was planned for {plan.num_epochs} epochs of "
                f"{plan.num_steps_per_epoch}, as the loader's len() was before the first. Give the "
                "run a length that is known: max_steps=1000. Or pass a schedule that does not "
                "depend on it: lr_scheduler=None, or prepare_scheduler(optimizer, "
                "num_training_steps=...) with the updates of all epochs."
            )


def _fit_schedules(state: TrainState, plan: Plan, num_left: int, *, is_resized: bool) -> None:
    """Let the schedules fit the updates that are left, or refuse those that cannot.

    If updates have another size than those before, a schedule given by name goes to the place that
    belongs to the share of the data that is done. It then ends with the run.

    Args:
        state: State of the run.
        plan: Plan of the run, in updates of the present size.
        num_left: Number of updates that are left.
        is_resized: Whether the updates before were of another size.

    Raises:
        ConfigError: A schedule ends before the run.
    """
    schedules = schedules_of(state.lr_scheduler)
    if is_resized:
        moved = [s for s in schedules if plan.num_epochs and is_planned(s, plan.num_steps)]
        for schedule in moved:
            move_schedule(schedule, max(plan.num_steps - num_left, 0))
        _tell_size(state, plan, num_left, moved)
    for schedule in schedules:
        require_length(schedule, num_left)


def _tell_batches_counted(lr_scheduler: Any, plan: Plan, num_batches: int) -> None:
    """Report a schedule of transformers that was built for the batches of a run, not its updates.

    A schedule that is longer by any other number may be so on purpose, for a run in several parts.

    Args:
        lr_scheduler: The schedule, at its start.
        plan: How long the run is.
        num_batches: Number of batches per update, over all ranks.
    """
    per_epoch, end = plan.num_steps_per_epoch, plan.num_steps
    if num_batches == 1 or not per_epoch or not plan.num_epochs:
        return
    for function in getattr(lr_scheduler, "lr_lambdas", ()):
        total = getattr(function, "keywords", {}).get("num_training_steps")
        if not isinstance(total, int) or total <= end:
            continue
        counts_batches = per_epoch - 1 < total / plan.num_epochs / num_batches <= per_epoch
        if counts_batches and not math.isclose(last := function(end), function(total)):
            say(
                f"the schedule was built for num_training_steps={total}, the batches of the run, "
                f"and is stepped after each of its {end} updates of {num_batches} batches: the run "
                f"ends at {last:.0%} of the rate. Build it for updates: num_training_steps={end}."
            )
            return


def _tell_size(state: TrainState, plan: Plan, num_left: int, moved: list[Any]) -> None:
    others = [type(s).__name__ for s in schedules_of(state.lr_scheduler) if s not in moved]
    if plan.num_epochs is None:
        what = f"max_steps={plan.num_steps} counts updates of either size"
    else:
        share = 1 - num_left / max(plan.num_steps, 1)
        parts = ["epochs", "end", *(["learning rate"] if moved else [])]
        what = f"{share:.0%} of the data is done, and {', '.join(parts)} follow that share"
    if others:
        what += f"; {', '.join(others)} counts updates, whatever their size"
    say(
        f"the updates have another size than the {state.progress.num_steps} before: {what}. To "
        "keep them equal, keep batch_size x gradient_accumulation_steps x ranks."
    )


def has_other_size(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Tell by the contracts of two runs over the same data whether their updates differ in size."""
    if before is None or before["same"] != now["same"]:
        return False
    lengths = [contract.get("ends", {}) for contract in (before, now)]
    if all(ends.get("num_epochs") and ends.get("num_steps") for ends in lengths):
        per_epoch = [ends["num_steps"] / ends["num_epochs"] for ends in lengths]
        if per_epoch[0] != per_epoch[1]:
            return True
    old, new = ({**contract.get("settings", {}), **contract["exact"]} for contract in (before, now))
    return any(old[name] != new[name] for name in _SIZES if name in old and name in new)


_SIZES = ("batch_size", "max_tokens", "drop_last", "gradient_accumulation_steps", "world_size")


class Skips:
    """Counts updates that were skipped, and ends a run that makes no other.

    Args:
        strategy: Strategy of the run; with a loss scale, a skipped update may lower that.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._scales_losses = strategy.scales_losses
        self._num_steps = -1
        self._num_in_row, self._is_scaling, self._has_items = 0, True, False

    def add(self, state: TrainState, update: Update) -> None:
        """Count a skipped update.

        Raises:
            DataError: There were many in a row, and the data has no length.
        """
        if state.progress.num_steps != self._num_steps:
            self._num_in_row, self._is_scaling, self._has_items = 0, True, False
        self._num_steps = state.progress.num_steps
        self._num_in_row += 1
        self._has_items |= bool(update.num_items)
        self._is_scaling &= (
            self._scales_losses and bool(update.num_items) and update.is_finite is not False
        )
        if self._num_in_row >= _TOO_MANY and state.pace.num_steps is None:
            raise DataError(self._message(f"the last {self._num_in_row} updates"))

    def require_applied(self, epoch: int) -> None:
        """Refuse to continue after an epoch without an applied update.

        Raises:
            DataError: It was not for the search of a loss scale alone.
        """
        if not self._is_scaling or self._num_in_row >= _TOO_MANY_SCALES:
            raise DataError(self._message(f"all updates of epoch {epoch}"))

    def _message(self, which: str) -> str:
        reason = "their windows hold no label to learn from"
        if self._has_items:
            reason = "their losses or gradients are not finite, or step_fn has not applied them"
        return (
            f"Nothing was learned: {which} were skipped, because {reason}. Look at the data with "
            'inspect_batch(loader), or let on_nonfinite="raise" name the rows.'
        )


_TOO_MANY = 1000  # of data that never ends
_TOO_MANY_SCALES = 200  # a loss scale falls below any float in fewer
