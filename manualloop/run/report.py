"""The history and the progress of a run: losses are read late and averaged by items."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from manualloop import screen
from manualloop.progress import ProgressBar, typical
from manualloop.run.cadence import Cadence, num_due
from manualloop.run.table import Row, Table
from manualloop.state import Pace
from manualloop.strategy.transfer import LateTensor
from manualloop.types import Plan, Record, Step, is_training, metrics_of

_NUM_UNSTACKED = 256  # a 0-d CUDA tensor occupies 512 bytes
_NUM_EARLIER = 20  # evaluations of earlier processes that are shown


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
        self._since = Interval()  # the same since the last evaluation
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
        self._since = Interval()

    def open_interval(self) -> dict[str, Any]:
        """Return the sums over the steps since the last record, waiting for their losses."""
        losses = [loss.reshape(-1) for loss in self._losses]
        values = torch.cat(losses).tolist() if losses else []
        for interval in (self._interval, self._since):
            interval.add(values, self._num_items)
        self._losses, self._num_items = [], []
        return asdict(self._interval)

    def since_evaluation(self) -> Interval:
        """Return the sums over the steps since the last evaluation, waiting for their losses."""
        self.collect(wait=True)
        self.open_interval()
        return self._since

    def restore(
        self,
        records: list[Record],
        interval: Mapping[str, Any],
        since: Mapping[str, Any] | None = None,
    ) -> None:
        """Continue from records, and from what ``open_interval`` returned.

        Args:
            records: The records.
            interval: The sums since the last record.
            since: The sums since the last evaluation.
        """
        self.records = records
        self._since = Interval(**(since or {}))
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
            self._since.add(values, num_items)
            interval.add(values, num_items)
            record["num_items"] = interval.num_items
            record["loss"] = self.last_loss = interval.mean


def report_of(
    plan: Plan, max_seconds: float | None, arguments: Mapping[str, Any], *, is_main: bool
) -> Report:
    """Make the report of a run by the arguments of ``train_loop``."""
    pauses = {"evaluating": "evaluate_every", "saving": "checkpoint_every"}
    return Report(
        plan,
        max_seconds,
        shown=arguments["progress_bar"] and is_main,
        best_metric=arguments["best_metric"],
        pauses={what: arguments[name] for what, name in pauses.items()},
    )


class Report:
    """Collects the history of a run and shows its progress, and its evaluations as a table.

    Args:
        plan: Length of the run.
        max_seconds: Seconds after which the run ends; None for no limit.
        shown: Whether anything is shown.
        best_metric: As in ``train_loop``.
        pauses: How often steps wait for "evaluating" and for "saving".

    Attributes:
        history: History of the run.
        plan: Length of the run.
    """

    def __init__(
        self,
        plan: Plan,
        max_seconds: float | None = None,
        *,
        shown: bool,
        best_metric: str | None = None,
        pauses: Mapping[str, Cadence] | None = None,
    ) -> None:
        self.history = History()
        self.plan, self._shown = plan, shown
        self._pauses, self._max_seconds = pauses or {}, max_seconds
        self._table = Table(best_metric)
        self._bar = ProgressBar(plan.num_steps, name="Training", unit="step", shown=False)
        self._step: Step | None = None
        self._lr_before: float | None = None  # of the last step of an earlier process
        self._position = self._num_written = 0
        self._epoch = 0.0

    def restore(self, notes: Mapping[str, Any], records: list[Record], num_steps: int) -> None:
        """Continue from what ``notes`` returned, after ``num_steps`` steps."""
        self.history.restore(records, notes["interval"], notes.get("since"))
        self._epoch, self._position, self._lr_before = notes["epoch"], num_steps, notes.get("lr")
        known = {step: (loss, lr) for step, loss, lr in notes.get("rows", ())}
        for record in records:
            if not is_training(record):
                step, epoch, metrics = record["step"], record["epoch"], metrics_of(record)
                loss, lr = known.get(step, (None, None))
                self._table.add(step, epoch, metrics, loss=loss, lr=lr, seconds=None)

    def open(self) -> None:
        """Show the evaluations of earlier processes, and the bar."""
        rows = self._table.rows[-_NUM_EARLIER:]
        if self._shown and screen.notebook() is None and rows:
            if len(rows) < self._table.number:
                screen.write(f"({self._table.number - len(rows)} earlier evaluations)")
            self._write(rows)
        self._bar = ProgressBar(
            self.plan.num_steps,
            name="Training",
            unit="step",
            initial=self._position,
            shown=self._shown,
            above=self._table.above,
            seconds_due=self._seconds_due,
            max_seconds=self._max_seconds,
        )

    def notes(self) -> dict[str, Any]:
        """Complete the history, and return what ``restore`` needs. Waits for the device."""
        self.history.collect(wait=True)
        interval = self.history.open_interval()
        rows = self._table.rows[-_NUM_EARLIER:]
        if self._table.best is not None and self._table.best not in rows:
            rows = [self._table.best, *rows]
        return {
            "interval": interval,
            "epoch": self._epoch,
            "since": asdict(self.history.since_evaluation()),
            "rows": [[row.step, row.loss, row.lr] for row in rows],
            "lr": self._lr,
        }

    @property
    def _lr(self) -> float | None:
        return self._lr_before if self._step is None else float(self._step.lr)

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
            self._bar.show(step.index, *self._facts())

    def end_interval(self) -> None:
        """Make a record of the steps since the last record, if there are any."""
        if self._step is not None and self.history.has_open_interval():
            self.history.close_interval(self._step, self._epoch)

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Show that steps wait for "evaluating" or "saving" in a block."""
        with self._bar.paused_for(what, self._position, *self._facts()):
            yield

    def add_evaluation(self, num_steps: int, metrics: Mapping[str, Any]) -> None:
        """Add an evaluation after ``num_steps`` steps, and show it."""
        since = self.history.since_evaluation()
        self.history.add_evaluation(num_steps, self._epoch, metrics)
        row = self._table.add(
            num_steps,
            self._epoch,
            metrics,
            loss=since.mean if since.num_steps else None,
            lr=self._lr,
            seconds=self._bar.seconds,
        )
        if self._bar.kind == "notebook":
            self._bar.redraw()
        elif self._bar.kind is not None:
            self._write([row])

    def _write(self, rows: Sequence[Row]) -> None:
        """Write rows of the table: aligned in a terminal, lines that stand alone in a log."""
        if screen.num_written() != self._num_written:
            self._table.forget_header()
        if screen.is_terminal(sys.stdout):
            width, colours = screen.num_columns(sys.stdout), screen.has_colours(sys.stdout)
            lines = self._table.lines(rows, width, colours=colours)
        else:
            lines = [self._table.log_line(row) for row in rows]
        screen.write("\n".join(lines))
        self._num_written = screen.num_written()

    def close(self) -> None:
        """Complete the history and close the bar."""
        self.history.collect(wait=True)
        self._bar.close(self._position, *self._facts())

    def _facts(self) -> tuple[str, ...]:
        if self._step is None:
            return ()
        loss = self.history.last_loss
        return (*(() if loss is None else (f"loss={loss:.4f}",)), f"lr={float(self._step.lr):.2e}")

    def _seconds_due(self, position: int, seconds_per_step: float) -> float:
        """Return how long the evaluations and saves take that are still to come."""
        total = 0.0
        for what, cadence in self._pauses.items():
            if before := self._bar.pauses.get(what):
                length = self.plan.num_steps_per_epoch
                number = num_due(cadence, position, self._bar.total, length, seconds_per_step)
                total += number * typical(before)
        return total
