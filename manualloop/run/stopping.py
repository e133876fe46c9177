"""Requests to end a run: by a signal, or because its time is over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from manualloop.run.agreement import Agreement
from manualloop.strategy.base import Strategy

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
        reason = next(filter(self._agreement.has, _REASONS), None)
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
