"""How often something is due: ``evaluate_every``, ``checkpoint_every``, ``log_every``."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

from manualloop.errors import ConfigError
from manualloop.run.agreement import Agreement
from manualloop.times import SECONDS, TIME_OR_EPOCHS
from manualloop.types import Step

Cadence: TypeAlias = int | str


def parse_cadence(
    name: str, cadence: Cadence, num_steps_per_epoch: int | None, agreement: Agreement | None = None
) -> Callable[[Step], bool]:
    """Turn a cadence into a function that tells whether a step is due.

    Args:
        name: Name of the argument, for messages.
        cadence: Updates as an int, ``"epoch"``, ``"0.25 epoch"``, or time as ``"30 s"``,
            ``"10 min"``, ``"2 h"``.
        num_steps_per_epoch: Updates per epoch; None if the data has no length.
        agreement: The agreement by which all ranks act on time after the same step; None for a
            single rank.

    Returns:
        A function that tells whether a step is due. For updates and parts of epochs that depends
        on the index of the step alone, so that a resumed run acts after the same steps.

    Raises:
        ConfigError: The cadence cannot be read, or it is a part of an epoch and the data has no
            length.

    >>> parse_cadence("log_every", "2 fortnights", None)
    Traceback (most recent call last):
    manualloop.errors.ConfigError: log_every='2 fortnights' is not a cadence. Write a number of \
updates (200), "epoch", "0.25 epoch", or a time ("10 min").
    """
    if isinstance(cadence, int) and not isinstance(cadence, bool) and cadence > 0:
        return lambda step: step.index % cadence == 0
    parts = TIME_OR_EPOCHS.fullmatch(cadence) if isinstance(cadence, str) else None
    amount = Fraction(parts[1] or 1) if parts else Fraction(0)
    if parts is None or amount == 0:
        raise ConfigError(
            f"{name}={cadence!r} is not a cadence. Write a number of updates (200), "
            '"epoch", "0.25 epoch", or a time ("10 min").'
        )
    if parts[2] in SECONDS:
        seconds = float(amount * SECONDS[parts[2]])
        return _every_seconds(name, seconds, agreement or Agreement())
    if amount == 1:
        return _every_epoch()
    if num_steps_per_epoch is None:
        raise ConfigError(
            f"{name}={cadence!r} needs to know how long an epoch is, and this data has no "
            f"length. Give a number of updates: {name}=500."
        )
    period = amount * num_steps_per_epoch
    return lambda step: step.index // period > (step.index - 1) // period


def _every_epoch() -> Callable[[Step], bool]:
    last: Step | None = None

    def is_due(step: Step) -> bool:
        nonlocal last
        # If the last update of an epoch was skipped, the next step is due instead.
        is_late = last is not None and step.epoch > last.epoch and not last.ends_epoch
        last = step
        return step.ends_epoch or is_late

    return is_due


def _every_seconds(name: str, seconds: float, agreement: Agreement) -> Callable[[Step], bool]:
    last = time.monotonic()

    def is_due(step: Step) -> bool:
        nonlocal last
        now = time.monotonic()
        if agreement.has_clock and now - last >= seconds:
            last = now
            agreement.propose(name)
        return agreement.take(name)

    return is_due
