"""How often something is due: ``evaluate_every``, ``checkpoint_every``, ``log_every``."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import TypeAlias

from manualloop.errors import ConfigError
from manualloop.run.agreement import Agreement
from manualloop.state import Pace
from manualloop.times import SECONDS, TIME_OR_EPOCHS
from manualloop.types import Step

Cadence: TypeAlias = int | str


def parse_cadence(
    name: str, cadence: Cadence, num_steps_per_epoch: int | None, agreement: Agreement | None = None
) -> Callable[[Step | None, Pace], bool]:
    """Turn a cadence into a function that tells whether an update is due.

    Args:
        name: Name of the argument, for messages.
        cadence: Updates as an int, ``"epoch"``, ``"0.25 epoch"``, or time as ``"30 s"``,
            ``"10 min"``, ``"2 h"``.
        num_steps_per_epoch: Updates per epoch; None if the data has no length.
        agreement: The agreement by which all ranks act on time after the same step; None for a
            single rank.

    Returns:
        A function of a step and the place behind it, which tells whether it is due. The step is
        None for an update that was skipped: parts of an epoch are due there as well. For updates
        and parts of epochs it depends on the step and the place alone, so that a resumed run acts
        after the same ones.

    Raises:
        ConfigError: The cadence cannot be read, or it is a part of an epoch and the data has no
            length.

    >>> parse_cadence("log_every", "2 fortnights", None)
    Traceback (most recent call last):
    manualloop.errors.ConfigError: log_every='2 fortnights' is not a cadence. Write a number of \
updates (200), "epoch", "0.25 epoch", or a time ("10 min").
    """
    if isinstance(cadence, int) and not isinstance(cadence, bool) and cadence > 0:
        return lambda step, pace: step is not None and step.index % cadence == 0
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
        return lambda step, pace: pace.is_over
    if num_steps_per_epoch is None:
        raise ConfigError(
            f"{name}={cadence!r} needs to know how long an epoch is, and this data has no "
            f"length. Give a number of updates: {name}=500."
        )
    return partial(_is_behind, amount.denominator, amount.numerator)


def _is_behind(parts: int, epochs: int, step: Step | None, pace: Pace) -> bool:
    """Tell whether an update is the first behind a multiple of ``epochs / parts`` epochs.

    The epoch at hand counts, whose length may differ from those before it.
    """
    if pace.num_steps is None:  # only its end is known
        length, place = 1, pace.epoch + 1
        is_known = pace.is_over
    else:
        length, place = pace.num_steps, pace.epoch * pace.num_steps + pace.num_done
        is_known = True
    period = epochs * length
    return is_known and place * parts // period > (place - 1) * parts // period


def _every_seconds(
    name: str, seconds: float, agreement: Agreement
) -> Callable[[Step | None, Pace], bool]:
    last = time.monotonic()

    def is_due(step: Step | None, pace: Pace) -> bool:
        nonlocal last
        now = time.monotonic()
        if agreement.has_clock and now - last >= seconds:
            last = now
            agreement.propose(name)
        return agreement.take(name)

    return is_due
