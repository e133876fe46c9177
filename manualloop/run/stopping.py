"""What the ranks of a run agree on: to end it, or to do what is due by the clock.

A run ends early at a signal, or because its time is over.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from manualloop.strategy.base import Strategy, altered
from manualloop.types import Step

KINDS = (
    "SIGINT",
    "SIGTERM",
    "SIGUSR1",
    "max_time",
    "evaluate_every",
    "checkpoint_every",
    "log_every",
)
"""What a rank can propose: a reason to stop, or a cadence whose time has come."""


class Agreement:
    """The proposals of this rank, and those of any rank that every rank knows of.

    Clocks and signals differ between ranks, so a rank never acts on its own. It makes a proposal,
    which travels with the item counts of the next update, and every rank acts on it after that
    update. An agreement belongs to one run: a proposal that was never counted ends with it.

    Args:
        rank: Number of this rank.
        world_size: Number of ranks. The proposals of a single one are agreed on at once.

    Attributes:
        is_alone: Whether there is only one rank.
        has_clock: Whether cadences by time follow the clock of this rank.

    >>> agreement = Agreement(rank=1, world_size=2)
    >>> agreement.propose("SIGTERM")
    >>> agreement.has("SIGTERM"), agreement.proposals()
    (False, [0, 1, 0, 0, 0, 0, 0])
    >>> agreement.count([0, 2, 0, 0, 0, 0, 0])
    >>> agreement.has("SIGTERM")
    True
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.is_alone, self.has_clock = world_size == 1, rank == 0
        self._proposed: set[str] = set()
        self._agreed: set[str] = set()

    def propose(self, kind: str) -> None:
        """Propose something to all ranks."""
        (self._agreed if self.is_alone else self._proposed).add(kind)

    def proposals(self) -> list[int]:
        """Return the proposals of this rank as numbers, to be added up over all ranks."""
        return [int(kind in self._proposed) for kind in KINDS]

    def count(self, totals: Sequence[float]) -> None:
        """Agree on everything that at least one rank has proposed, given the sums."""
        for kind, total in zip(KINDS, totals, strict=True):
            if total:
                self._agreed.add(kind)
                self._proposed.discard(kind)

    def has(self, kind: str) -> bool:
        """Tell whether the ranks have agreed on something."""
        return kind in self._agreed

    def first_of(self, kinds: Iterable[str]) -> str | None:
        """Return the first of several that the ranks have agreed on, or None."""
        return next(filter(self.has, kinds), None) if self._agreed else None

    def take(self, kind: str) -> bool:
        """Tell whether the ranks have agreed on something, and forget it."""
        if kind not in self._agreed:
            return False
        self._agreed.remove(kind)
        return True


def agree_at_updates(strategy: Strategy) -> tuple[Agreement, Strategy]:
    """Return the agreement of a new run, and the strategy by which its ranks agree.

    Every update counts its items over all ranks, and the counts carry the proposals along at no
    cost. On a single rank the strategy stays as it is.
    """
    agreement = Agreement(strategy.rank, strategy.world_size)
    if agreement.is_alone:
        return agreement, strategy

    def sum_counts(counts: Sequence[float]) -> list[float]:
        totals = strategy.sum_counts([*counts, *agreement.proposals()])
        agreement.count(totals[len(counts) :])
        return totals[: len(counts)]

    return agreement, altered(strategy, sum_counts=sum_counts)


def counted(
    steps: Iterable[Step | None], strategy: Strategy, step_fn: object
) -> Iterable[Step | None]:
    """Return the steps of a run, such that there is a count before each.

    A ``step_fn`` of the user may do without, so nothing is counted there, which carries the
    proposals.
    """
    if step_fn is None or strategy.world_size == 1:
        return steps
    return _count_before_each(iter(steps), strategy)


def _count_before_each(steps: Iterator[Step | None], strategy: Strategy) -> Iterator[Step | None]:
    while True:
        strategy.sum_counts([])
        try:
            step = next(steps)
        except StopIteration:
            return
        yield step


_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
_TWICE = 2.0  # seconds in which the same signal may come again by another way
_REASONS = ("SIGINT", "SIGTERM", "SIGUSR1", "max_time")


class EvaluationStopped(BaseException):
    """Ends an evaluation because of a signal. It is no Exception, so that no code catches it."""


class Stopping:
    """The requests to end one run.

    Args:
        max_seconds: Seconds after which the run ends; None for no limit.
        agreement: The agreement by which all ranks end after the same update; None for a single
            rank.

    Attributes:
        cause: Name of the signal that has come, such as "SIGINT" for Ctrl-C; None for none.
    """

    def __init__(
        self, max_seconds: float | None = None, agreement: Agreement | None = None
    ) -> None:
        self.cause: str | None = None
        self._agreement = agreement or Agreement()
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._is_evaluating, self._since = False, 0.0
        self._previous: dict[int, Any] = {}
        self._received = 0  # the number of the signal; 0 for none
        self._is_inner = False

    def reason(self) -> str | None:
        """Return what ends the run: the name of a signal, "max_time", or None for nothing."""
        if self.cause is not None:
            self._agreement.propose(self.cause)
        elif self._deadline is not None and time.monotonic() >= self._deadline:
            self._agreement.propose("max_time")
        reason = self._agreement.first_of(_REASONS)
        if reason != "max_time" and self.cause is None:
            self.cause = reason  # a signal to another rank
        return reason

    @contextmanager
    def watching_signals(self) -> Iterator[None]:
        """Let SIGINT, SIGTERM and SIGUSR1 request the end of the run; restore their handlers.

        The second signal does what it did before the run: it raises KeyboardInterrupt, or ends the
        process. Only Python's main thread can set handlers. In other threads signals stay as
        they are.
        """
        if threading.current_thread() is threading.main_thread():
            # None stands for a handler that was not set from Python, and cannot be restored from
            # it. A signal that the process ignores, as Ctrl-C under nohup, stays ignored.
            previous = {number: signal.getsignal(number) for number in _SIGNALS}
            left = (None, signal.SIG_IGN)
            self._previous = {n: handler for n, handler in previous.items() if handler not in left}
            for number in self._previous:
                signal.signal(number, self._handle)
        owners = (getattr(handler, "__self__", None) for handler in self._previous.values())
        self._is_inner = any(isinstance(owner, Stopping) for owner in owners)
        try:
            yield
        finally:
            outer: Any = self._previous.get(self._received)
            self._restore()
            if isinstance(getattr(outer, "__self__", None), Stopping):
                # This run is part of another one, in its evaluation for instance. The signal was
                # meant for the process, so that the other run gets it as well.
                outer(self._received, None)

    def raise_signal(self, message: str, strategy: Strategy) -> None:
        """Raise what stands for the signal that has ended the run, if one has, on all ranks.

        A run inside another one returns instead: the other one was told, and ends after its update.

        Args:
            message: Text of the exception, where it can have one.
            strategy: Strategy of the run: one rank alone may have got a signal after the last step.

        Raises:
            KeyboardInterrupt: SIGINT.
            SystemExit: SIGTERM or SIGUSR1, with the status 128 + number.
        """
        if not self._agreement.is_alone:
            self.cause = next(filter(None, strategy.gather(self.cause)), None)
        if self.cause is None or self._is_inner:
            return
        if self.cause == "SIGINT":
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + getattr(signal, self.cause))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let a signal raise ``EvaluationStopped`` in this block, since evaluations can be long.

        On several ranks it does not: an evaluation takes all of them.
        """
        if not self._agreement.is_alone:
            yield
            return
        self._is_evaluating = True
        try:
            if self.cause is not None:
                raise EvaluationStopped
            yield
        finally:
            self._is_evaluating = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.cause is not None:
            if not self._agreement.is_alone and time.monotonic() - self._since < _TWICE:
                return  # from a launcher, after the scheduler has sent it to every process
            self._restore()
            os.kill(os.getpid(), number)
            return
        self.cause, self._received = signal.Signals(number).name, number
        self._since = time.monotonic()
        if number == signal.SIGINT:  # not by a log record, whose lock may be held
            terminal_or_log = 2 if os.isatty(2) else 1  # a notebook shows the former in red
            os.write(
                terminal_or_log,
                b"\nmanualloop: finishing this update; Ctrl-C again ends at once.\n",
            )
        if self._is_evaluating:
            self._is_evaluating = False
            raise EvaluationStopped

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
