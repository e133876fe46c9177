"""How often something is due: ``evaluate_every``, ``checkpoint_every``, ``log_every``."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import TypeAlias

from manualloop.errors import ConfigError
from manualloop.run.stopping import Agreement
from manualloop.state import Pace
from manualloop.times import SECONDS, TIME_OR_EPOCHS
from manualloop.types import Step

Cadence: TypeAlias = int | str
"""A number of updates, ``"epoch"``, ``"0.25 epoch"``, or a time such as ``"10 min"``."""


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


def num_due(
    cadence: Cadence,
    done: int,
    total: int | None,
    num_steps_per_epoch: int | None,
    seconds_per_step: float,
) -> int:
    """Estimate how often something is still due in a run, of which the last update always is.

    Args:
        cadence: A cadence that ``parse_cadence`` takes.
        done: Number of updates that are done.
        total: Number of updates of the whole run; None if it is unknown.
        num_steps_per_epoch: Updates per epoch; None if the data has no length.
        seconds_per_step: Seconds that an update takes.

    >>> num_due(200, 500, 1000, None, 0.1), num_due("epoch", 500, 1000, 300, 0.1)
    (3, 3)
    >>> num_due("10 s", 500, 1000, None, 0.1)
    6
    """
    if total is None or done >= total:
        return 0
    parts = None if isinstance(cadence, int) else TIME_OR_EPOCHS.fullmatch(cadence)
    amount = Fraction(parts[1] or 1) if parts else Fraction(cadence)
    if parts and parts[2] in SECONDS:
        seconds = float(amount * SECONDS[parts[2]])
        return int((total - done) * seconds_per_step / seconds) + 1
    if parts:
        amount *= num_steps_per_epoch or total
    is_last_due = total % amount == 0
    return int(total // amount) - int(done // amount) + (not is_last_due)


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
