"""The progress bar: a bar in a terminal or notebook, lines in a log file.

At each step it only compares the clock with the time of its next update, and it redraws at most ten
times a second. It shows what the host already knows and never reads from the device.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

_SECONDS_BETWEEN_REDRAWS = 0.1
_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Progress through a known or unknown number of steps.

    Args:
        total: Number of steps; None if it is unknown.
        initial: Number of steps that were done before.
        name: Name of the activity, such as "Training".
        unit: Name of what is counted, such as "step".
        shown: Whether anything is drawn.

    Attributes:
        total: Number of steps, which may change on the way.
    """

    def __init__(
        self, total: int | None, *, name: str, unit: str, initial: int = 0, shown: bool = True
    ) -> None:
        self.total, self.name, self.unit = total, name, unit
        self._bar: Any = None
        self._initial = self._position = initial
        self._started = time.monotonic()
        self._due = float("inf")
        self._interval = _SECONDS_BETWEEN_LINES
        if not shown:
            return
        with warnings.catch_warnings():
            # tqdm warns that its choice between terminal and notebook is experimental.
            warnings.filterwarnings("ignore", category=Warning, module="tqdm")
            warnings.filterwarnings("ignore", message=".*IProgress not found.*")
            from tqdm.autonotebook import tqdm
        self._in_notebook = "notebook" in tqdm.__module__
        if self._in_notebook or sys.stderr.isatty():
            self._interval = _SECONDS_BETWEEN_REDRAWS
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=name,
                unit=unit,
                dynamic_ncols=True,
                mininterval=0,
                miniters=0,
            )
        self._due = self._started if self._bar is not None else self._started + self._interval

    def is_due(self) -> bool:
        """Tell whether enough time has passed for ``show``."""
        return time.monotonic() >= self._due

    def show(self, position: int, facts: str = "") -> None:
        """Draw the position, with facts such as "loss=0.61, lr=4.8e-05" beside it."""
        self._due = time.monotonic() + self._interval
        if self._bar is not None:
            self._bar.total = self.total  # an epoch may turn out to be longer than the first
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(position - self._position)
        else:
            print(self._line(position, facts), file=sys.stderr, flush=True)
        self._position = position

    def write(self, text: str) -> None:
        """Write a separate line above the bar."""
        if self._due == float("inf"):
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout if self._in_notebook else sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self, position: int, facts: str = "") -> None:
        """Draw the last position and stop. Nothing is drawn afterwards."""
        if self._due == float("inf"):
            return
        if self._bar is not None or position > self._initial:
            self.show(position, facts)
        self._due = float("inf")
        if self._bar is not None:
            self._bar.close()

    def _line(self, position: int, facts: str) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (position - self._initial) / seconds
        parts = [f"{self.name}: {self.unit} {position}"]
        if self.total:
            parts = [f"{parts[0]}/{self.total} ({position / self.total:.0%})"]
        parts += [facts] if facts else []
        parts.append(f"{rate:.2f} {self.unit}/s, {_clock(seconds)} gone")
        if self.total and rate > 0:
            parts.append(f"{_clock((self.total - position) / rate)} left")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
