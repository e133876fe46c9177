"""The history and the progress bar of a run: losses are read late and averaged by items."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from manualloop.progress import ProgressBar
from manualloop.state import Pace
from manualloop.strategy.transfer import LateTensor
from manualloop.types import Plan, Record, Step

_NUM_UNSTACKED = 256  # a 0-d CUDA tensor occupies 512 bytes


@dataclass
class Interval:
    """Sums over the steps since the last record of training.

    Attributes:
        num_steps: Number of steps.
        num_items: Number of items in them.
        total: Sum of their losses, each times its items.
    """

    num_steps: int = 0
    num_items: float = 0
    total: float = 0.0

    def add(self, losses: Sequence[float], num_items: Sequence[float]) -> None:
        """Add steps, one after the other: the sum has the same bits however they are split."""
        for loss, items in zip(losses, num_items, strict=True):
            self.num_steps += 1
            self.num_items += items
            self.total += loss * items

    @property
    def mean(self) -> float:
        """Mean loss of an item; NaN without items."""
        return self.total / self.num_items if self.num_items else math.nan


class History:
    """Collects steps and evaluations into records.

    A record of training holds ``step``, ``epoch`` (a fraction), ``loss`` (the mean over all items
    since the record before), ``lr``, ``grad_norm`` (of its step; only with ``max_grad_norm``) and
    ``num_items``; one of an evaluation ``step``, ``epoch`` and ``eval_...`` for each metric.

    Attributes:
        records: All records, in the order of the run.
        last_loss: Loss of the newest record that has reached the host, or None.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.last_loss: float | None = None
        self._interval = Interval()  # steps since the last record whose losses were read
        self._losses: list[Tensor] = []  # of the steps after those
        self._num_items: list[float] = []
        self._pending: list[tuple[Record, LateTensor | None, Interval, list[float]]] = []

    def add(self, step: Step) -> None:
        """Remember a step's loss, where it is."""
        loss = step.loss.detach() if step.loss.requires_grad else step.loss  # by a step_fn
        self._losses.append(loss)
        self._num_items.append(step.num_items)
        if len(self._losses) >= _NUM_UNSTACKED:
            self._losses = [torch.cat([loss.reshape(-1) for loss in self._losses])]

    @property
    def num_complete(self) -> int:
        """Number of records before the first whose loss has not landed."""
        if not self._pending:
            return len(self.records)
        first, number = self._pending[0][0], len(self.records) - 1
        while self.records[number] is not first:
            number -= 1
        return number

    def has_open_interval(self) -> bool:
        """Tell whether there were steps since the last record of training."""
        return bool(self._num_items) or self._interval.num_steps > 0

    def close_interval(self, step: Step, epoch: float) -> None:
        """Make a record of the steps since the last one. Its loss is filled in when it lands."""
        record: Record = {"step": step.index, "epoch": epoch, "loss": None, "lr": float(step.lr)}
        late = [loss.reshape(-1) for loss in self._losses]
        if step.grad_norm is not None:
            record["grad_norm"] = None
            late.append(step.grad_norm.reshape(-1))
        record["num_items"] = None
        self.records.append(record)
        landing = LateTensor(torch.cat(late)) if late else None
        self._pending.append((record, landing, self._interval, self._num_items))
        self._interval, self._losses, self._num_items = Interval(), [], []
        self.collect(wait=False)

    def add_evaluation(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Make a record of an evaluation after so many updates."""
        values = {f"eval_{name}": value for name, value in metrics.items()}
        self.records.append({"step": step, "epoch": epoch, **values})

    def open_interval(self) -> dict[str, Any]:
        """Return the sums over the steps since the last record, waiting for their losses."""
        losses = [value for loss in self._losses for value in loss.reshape(-1).tolist()]
        self._interval.add(losses, self._num_items)
        self._losses, self._num_items = [], []
        return asdict(self._interval)

    def restore(self, records: list[Record], interval: Mapping[str, Any]) -> None:
        """Continue from records, and from what ``open_interval`` returned."""
        self.records = records
        if "losses" in interval:  # release 0.1.0 kept each loss
            self._interval = Interval()
            self._interval.add(interval["losses"], interval["num_items"])
        else:
            self._interval = Interval(**interval)

    def collect(self, *, wait: bool) -> None:
        """Fill in the losses that have landed; with ``wait`` all of them."""
        while self._pending and (
            wait or self._pending[0][1] is None or self._pending[0][1].has_landed()
        ):
            record, late, interval, num_items = self._pending.pop(0)
            values = late.read() if late else []
            if "grad_norm" in record:
                record["grad_norm"] = values.pop()
            interval.add(values, num_items)
            record["num_items"] = interval.num_items
            record["loss"] = self.last_loss = interval.mean


class Report:
    """Collects the history of a run and shows its progress.

    Args:
        plan: Length of the run.
        shown: Whether the progress bar is drawn.

    Attributes:
        history: History of the run.
        plan: Length of the run.
    """

    def __init__(self, plan: Plan, *, shown: bool) -> None:
        self.history = History()
        self.plan, self._shown = plan, shown
        self._bar = ProgressBar(plan.num_steps, name="Training", unit="step", shown=False)
        self._step: Step | None = None
        self._position = 0
        self._epoch = 0.0

    def restore(self, notes: Mapping[str, Any], records: list[Record], num_steps: int) -> None:
        """Continue from what ``notes`` returned, after ``num_steps`` steps."""
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
        """Complete the history, and return what ``restore`` needs. Waits for the device."""
        self.history.collect(wait=True)
        return {"interval": self.history.open_interval(), "epoch": self._epoch}

    def add(self, step: Step, pace: Pace, *, closes: bool) -> None:
        """Add a step, after which the run is at ``pace``; with ``closes``, make a record."""
        self._step, self._position = step, step.index
        length = pace.num_steps
        whole = float(step.epoch)
        self._epoch = (pace.epoch * length + pace.num_done) / length if length else whole
        self._bar.total = step.num_steps
        self.history.add(step)
        if closes:
            self.end_interval()
        if self._bar.is_due():
            self._bar.show(step.index, self._facts())

    def end_interval(self) -> None:
        """Make a record of the steps since the last record, if there are any."""
        if self._step is not None and self.history.has_open_interval():
            self.history.close_interval(self._step, self._epoch)

    def add_evaluation(self, num_steps: int, metrics: Mapping[str, float]) -> None:
        """Add an evaluation after ``num_steps`` steps."""
        self.history.add_evaluation(num_steps, self._epoch, metrics)
        found = ends_of_intervals(metrics)
        ends = {end for pair in found.values() for end in pair}
        scores = "  ".join(
            f"{name} {_short(value)}" + _interval(metrics, found.get(name))
            for name, value in metrics.items()
            if _is_short(value) and name not in ends
        )
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


def ends_of_intervals(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the names of the ends of each score's interval, by the name of the score.

    >>> ends_of_intervals({"f1": 0.8, "f1_low": 0.7, "f1_high": 0.9, "loss": 0.4, "lr_low": 1})
    {'f1': ('f1_low', 'f1_high')}
    """
    pairs = ((name, (f"{name}_low", f"{name}_high")) for name in names)
    return {name: ends for name, ends in pairs if all(end in names for end in ends)}


def _interval(metrics: Mapping[str, Any], ends: tuple[str, str] | None) -> str:
    return "" if ends is None else f" ({' to '.join(_short(metrics[end]) for end in ends)})"


def _is_short(value: Any) -> bool:
    return isinstance(value, float | int | str)


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
