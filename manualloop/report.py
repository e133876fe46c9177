"""What a run tells while it goes: the history, and the bar above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manualloop.history import History, Record
from manualloop.progress import ProgressBar
from manualloop.training import Plan
from manualloop.types import Step


class Report:
    """Collects the history of a run and shows its progress.

    Args:
        plan: How long the run is.
        shown: Whether there is a bar.

    Attributes:
        history: Of the run.
        plan: As given.
    """

    def __init__(self, plan: Plan, *, shown: bool) -> None:
        self.history = History()
        self.plan, self._shown = plan, shown
        self._bar = ProgressBar(plan.num_steps, name="Training", unit="step", shown=False)
        self._step: Step | None = None
        self._position = 0
        self._epoch = 0.0

    def restore(self, notes: Mapping[str, Any], records: list[Record], num_steps: int) -> None:
        """Go on from what ``notes`` returned, after so many steps."""
        self.history.restore(records, notes["interval"])
        self._epoch, self._position = notes["epoch"], num_steps

    def open(self) -> None:
        """Show the bar."""
        self._bar = ProgressBar(
            self.plan.num_steps,
            name="Training",
            unit="step",
            initial=self._position,
            shown=self._shown,
        )

    def notes(self) -> dict[str, Any]:
        """Complete the history, and return what it needs to go on. Waits for the device."""
        self.history.collect(wait=True)
        return {"interval": self.history.open_interval(), "epoch": self._epoch}

    def add(self, step: Step, *, closes: bool) -> None:
        """Take note of a step; ``closes``: and make a record of those since the last one."""
        self._step, self._position = step, step.index
        per_epoch = self.plan.num_steps_per_epoch
        self._epoch = step.index / per_epoch if per_epoch else float(step.epoch)
        self.history.add(step)
        if closes:
            self.end_interval()
        if self._bar.is_due():
            self._bar.show(step.index, self._facts())

    def end_interval(self) -> None:
        """Make a record of the steps since the last one, if there are any."""
        if self._step is not None and self.history.has_open_interval():
            self.history.close_interval(self._step, self._epoch)

    def add_evaluation(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation after so many steps."""
        self.history.add_evaluation(num_steps, self._epoch, metrics)
        scores = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        self._bar.write(f"step {num_steps}  epoch {self._epoch:.2f}  {scores}")

    def close(self) -> None:
        """Complete the history and close the bar."""
        self.history.collect(wait=True)
        self._bar.close(self._position, self._facts())

    def _facts(self) -> str:
        if self._step is None:
            return ""
        loss = self.history.last_loss
        shown = "" if loss is None else f"loss={loss:.4f}, "
        return f"{shown}lr={float(self._step.lr):.2e}"


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
