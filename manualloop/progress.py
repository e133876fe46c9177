"""The progress bar: a bar in a terminal or notebook, lines in a log file.

At each step it only compares the clock with the time of its next update, and it redraws at most ten
times a second. It shows what the host already knows and never reads from the device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from typing import Literal, NamedTuple

from manualloop import screen

_SECONDS_BETWEEN_REDRAWS = 0.1
_SECONDS_BETWEEN_UPDATES = 0.25  # of a notebook, to which each one is sent as a message
_SECONDS_BETWEEN_LINES = 10.0

_paused: ContextVar[ProgressBar | None] = ContextVar("paused", default=None)
"""The bar whose steps wait for what happens now, such as an evaluation."""


def is_watched() -> bool:
    """Tell whether a bar that is shown waits for what happens now."""
    return _paused.get() is not None


class Above(NamedTuple):
    """What a notebook shows above a bar.

    Attributes:
        html: It as HTML.
        text: It as text, for front ends without HTML.
    """

    html: str = ""
    text: str = ""


class ProgressBar:
    """Progress through a known or unknown number of steps.

    A bar that is made while another one is paused belongs to that one: it is drawn below it, and is
    gone when it is closed.

    Args:
        total: Number of steps; None if it is unknown.
        initial: Number of steps that were done before.
        name: Name of the activity, such as "Training".
        unit: Name of what is counted, such as "step".
        shown: Whether anything is drawn.
        above: Function that returns what a notebook shows above the bar. A bar that has one does
            not belong to another.
        seconds_due: Function of the position and the seconds that a step takes. It returns how long
            the pauses take that are still to come.
        max_seconds: Seconds after which the steps end; None for no limit.

    Attributes:
        total: Number of steps, which may change on the way.
        kind: Where it is drawn: "notebook", "terminal" or "log"; None if it is not.
        nested: Bar that is drawn below it in a notebook; None for none.
        pauses: Seconds of each pause that is over, by the name of what was done in it.
    """

    def __init__(
        self,
        total: int | None,
        *,
        name: str,
        unit: str,
        initial: int = 0,
        shown: bool = True,
        above: Callable[[], Above] | None = None,
        seconds_due: Callable[[int, float], float] | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self.total, self.name, self.unit = total, name, unit
        self.kind: Literal["notebook", "terminal", "log"] | None = None
        self.pauses: dict[str, list[float]] = {}
        self._above, self._seconds_due, self._max_seconds = above, seconds_due, max_seconds
        self._facts: tuple[str, ...] = ()
        self._initial = self._position = initial
        self._first: tuple[int, float] | None = None  # when it was first shown
        self._pause, self._pause_began, self._seconds_paused = "", 0.0, 0.0
        self._is_over = False
        self._bar: screen.TerminalBar | None = None
        self._output: screen.NotebookOutput | None = None
        self.nested: ProgressBar | None = None
        self._parent = None if above is not None else _paused.get()
        self._started = time.monotonic()
        self._due, self._interval = float("inf"), _SECONDS_BETWEEN_LINES
        if shown:
            self._open()

    def _open(self) -> None:
        stream = next(filter(screen.is_terminal, (sys.stderr, sys.stdout)), None)
        if (shell := screen.notebook()) is not None:
            self.kind, self._interval = "notebook", _SECONDS_BETWEEN_UPDATES
            if self._parent is None:
                self._output = screen.NotebookOutput(shell)
            else:
                self._parent.nested = self
        elif stream is not None:
            self.kind, self._interval = "terminal", _SECONDS_BETWEEN_REDRAWS
            self._bar = screen.TerminalBar(stream, self.name, leaves=self._parent is None)
        else:
            self.kind = "log"
        self._due = self._started + (self._interval if self.kind == "log" else 0.0)
        self.redraw()

    @property
    def seconds(self) -> float:
        """Seconds since the bar was made."""
        return time.monotonic() - self._started

    def is_due(self) -> bool:
        """Tell whether enough time has passed for ``show``."""
        return time.monotonic() >= self._due

    def show(self, position: int, *facts: str) -> None:
        """Draw the position, with facts such as "loss=0.61" and "lr=4.8e-05" beside it."""
        self._due = time.monotonic() + self._interval
        self._move(position, facts)
        if self.kind == "log":
            screen.write(self.line())
        else:
            self.redraw()

    def _move(self, position: int, facts: tuple[str, ...]) -> None:
        self._position = min(position, self.total or position)
        self._facts = facts
        if self._first is None and position > self._initial:
            self._first = position, self.seconds - self._seconds_paused

    @contextmanager
    def paused_for(self, what: str, position: int, *facts: str) -> Iterator[None]:
        """Show what is done in a block instead of steps. Its time does not count as that of steps.

        Args:
            what: Name of it, such as "evaluating".
            position: Position of the bar.
            facts: As in ``show``.
        """
        if self.kind is None:
            yield
            return
        self._move(position, facts)
        self._pause, self._pause_began = what, time.monotonic()
        token = _paused.set(self)
        try:
            self.redraw()
            yield
            self.pauses.setdefault(what, []).append(time.monotonic() - self._pause_began)
        finally:
            _paused.reset(token)
            self._seconds_paused += time.monotonic() - self._pause_began
            self._pause = ""
            self.redraw()

    def redraw(self) -> None:
        """Draw the bar where one is drawn, and what is above it."""
        if self._bar is not None:
            self._bar.draw(self._position, self.total, self._texts())
            if self._parent is not None:  # whose time passes
                self._parent.redraw()
        elif self._output is not None:
            above, bars = Above() if self._above is None else self._above(), [self]
            if self.nested is not None:
                bars.append(self.nested)
            html = above.html + "".join(bar.html() for bar in bars)
            lines = [above.text, *(bar.line() for bar in bars)]
            self._output.draw(html, "\n".join(filter(None, lines)))
        elif self._parent is not None and self.kind is not None:
            self._parent.redraw()

    def close(self, position: int, *facts: str) -> None:
        """Draw the last position and stop. Nothing is drawn afterwards."""
        if self.kind is None:
            return
        self._due, self._is_over = float("inf"), True
        self._move(position, facts)
        if self._parent is not None:  # which shows the result
            self._parent.nested = None
        elif self.kind == "log" and position > self._initial:
            screen.write(self.line())
        self.redraw()
        self.kind = None
        if self._bar is not None:
            self._bar.close()

    def _seconds_per_step(self) -> float | None:
        """Return how long a step takes: after the first, which may have compiled the model."""
        trained = self.seconds - self._seconds_paused
        if self._pause:
            trained -= time.monotonic() - self._pause_began
        begin, before = self._first or (self._initial, 0.0)
        if self._position == begin:
            begin, before = self._initial, 0.0
        num_steps = self._position - begin
        return max(trained - before, 1e-9) / num_steps if num_steps > 0 else None

    def _left(self) -> float | None:
        """Return the seconds that are left, pauses included; None if nobody knows."""
        each = self._seconds_per_step()
        if not self.total or each is None or self._is_over:
            return None
        left = max(self.total - self._position, 0) * each
        if self._seconds_due is not None:
            left += self._seconds_due(self._position, each)
        if self._pause and (before := self.pauses.get(self._pause)):
            left += max(typical(before) - (time.monotonic() - self._pause_began), 0.0)
        return left if self._max_seconds is None else min(left, self._max_seconds - self.seconds)

    def _rate(self) -> str:
        each = self._seconds_per_step()
        if each is None:
            return ""
        return f"{1 / each:.2f} {self.unit}/s" if each <= 1 else f"{each:.2f} s/{self.unit}"

    def _texts(self) -> list[str]:
        """Return what a terminal shows beside the bar, the most important first."""
        left = self._left()
        times = clock(self.seconds) + ("" if left is None else f"<{clock(left)}")
        return list(filter(None, [times, self._pause] if self._pause else self._parts(times)))

    def _parts(self, times: str) -> list[str]:
        return [times, *self._facts, self._rate()]

    def _place(self) -> str:
        """Return the position as text, such as "30/40 (75%)"."""
        if not self.total:
            return str(self._position)
        return f"{self._position}/{self.total} ({percent(self._position, self.total)}%)"

    def line(self) -> str:
        """Return the bar as a line of text."""
        left = self._left()
        parts = [f"{self.name}: {self.unit} {self._place()}", *self._facts, self._rate()]
        parts.append(f"{clock(self.seconds)} gone")
        parts.append("" if left is None else f"{clock(left)} left")
        return ", ".join(filter(None, [*parts, self._pause]))

    def html(self) -> str:
        """Return the bar as HTML."""
        is_stopped = self._is_over and self.total and self._position < self.total
        left = self._left()
        times = clock(self.seconds) + ("" if left is None else f", {clock(left)} left")
        parts = [self._place(), times, self._pause]
        parts += [] if self._pause else [*self._facts, self._rate()]
        value = f' value="{self._position}" max="{self.total}"' if self.total else ""
        if self._is_over and not self.total:
            value = ' value="1" max="1"'  # else it would move for ever
        text = " \N{MIDDLE DOT} ".join(filter(None, parts))
        name = f"{self.name} stopped" if is_stopped else self.name
        return (
            f'<div style="{_BAR}"><span style="{_NAME}">{escape(name)}</span> '
            f'<progress{value} aria-label="{escape(name)}" style="{_METER}"></progress> '
            f"<span>{escape(text)}</span></div>"
        )


_BAR = "margin: 4px 0; font-variant-numeric: tabular-nums"
_NAME = "display: inline-block; min-width: 6em"
_METER = "width: 240px; margin: 0 8px; vertical-align: middle; accent-color: #2f81f7"


def typical(seconds: Sequence[float]) -> float:
    """Return the mean without the first, in which libraries are imported, if there are others."""
    later = seconds[1:] or seconds
    return sum(later) / len(later)


def percent(position: int, total: int) -> int:
    """Return a share in percent, which is 100 for the whole alone."""
    return 100 * position // total


def clock(seconds: float) -> str:
    """Return a time as text: "01:05" or "2:01:05"."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
