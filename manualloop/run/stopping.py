"""Requests to end a run: by a signal, or because its time is over."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from manualloop.run.agreement import Agreement

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
        try:
            yield
        finally:
            before = dict(self._previous)
            self._restore()
            outer: Any = before.get(self._received)
            if isinstance(getattr(outer, "__self__", None), Stopping):
                # This run is part of another one, in its evaluation for instance. The signal was
                # meant for the process, so that the other run gets it as well.
                outer(self._received, None)
        if self.cause == "SIGTERM":
            _exit_as_terminated()

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
            os.write(2, b"\nmanualloop: finishing this update; Ctrl-C again ends at once.\n")
        if self._is_evaluating:
            self._is_evaluating = False
            raise EvaluationStopped

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class _Exit:
    """Sets the exit status when Python deletes it, which happens last of all.

    An ``atexit`` function that ended the process would keep those from running that were
    registered before it.
    """

    def __init__(self, status: int) -> None:
        self._status = status

    def __del__(self, _exit: Any = os._exit) -> None:
        _exit(self._status)


_at_exit: list[_Exit] = []


def _exit_as_terminated() -> None:
    atexit.unregister(_set_status)
    atexit.register(_set_status)


def _set_status() -> None:
    if not hasattr(
        sys, "last_value"
    ):  # otherwise an error ended the script, and has set the status
        _at_exit.append(_Exit(128 + signal.SIGTERM))
