"""The table of a run's evaluations: its columns, and how it is written as text and as HTML."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from manualloop.checkpoint.manifest import metric_name, score
from manualloop.progress import Above, clock
from manualloop.types import num_cells

_MOST_METRICS = 8
_MOST_ROWS = 50  # so many are kept: a notebook is sent all of them again and again
_ROWS_PER_HEADER = 25
_LONGEST_TEXT = 12
_FAMILY = 4  # so many metrics whose names differ in one word are those of classes
_OF_ALL = {
    *("macro", "micro", "weighted", "overall", "mean", "avg", "average", "samples", "total"),
    *("small", "medium", "large"),
}
"""Words in the names of metrics that are not those of a class."""


class Row(NamedTuple):
    """An evaluation in the table.

    Attributes:
        step: Number of updates before it.
        epoch: Number of epochs before it, a fraction.
        loss: Mean loss of the training since the evaluation before; None if nobody knows.
        metrics: Results of the evaluation.
        lr: Learning rate of the last update; None if nobody knows.
        seconds: Seconds that the process had trained; None for an evaluation of an earlier one.
        is_best: Whether it is the best one so far.
    """

    step: int
    epoch: float
    loss: float | None
    metrics: Mapping[str, Any]
    lr: float | None
    seconds: float | None
    is_best: bool


class Columns(NamedTuple):
    """The columns of a table.

    Attributes:
        names: Names of the columns, from the left to the right.
        intervals: Names of the metrics whose intervals are shown.
        num_hidden: Number of metrics that have no column.
    """

    names: tuple[str, ...]
    intervals: frozenset[str]
    num_hidden: int


HEADINGS = {
    "step": "Step",
    "epoch": "Epoch",
    "train loss": "Training loss",
    "eval loss": "Evaluation loss",
    "lr": "Learning rate",
    "time": "Time",
}
"""Names of the columns that are no metrics, and their headings in a notebook."""

_WIDTHS = {"step": 5, "epoch": 5, "lr": 8, "time": 7}  # at least


class Table:
    """The evaluations of a run as a table.

    Args:
        best_metric: As in ``train_loop``; without it no row is the best.

    Attributes:
        rows: The newest evaluations, oldest first.
        number: Number of evaluations.
        best: The best of all; None without a ``best_metric``.
    """

    def __init__(self, best_metric: str | None) -> None:
        self.rows: list[Row] = []
        self.number = 0
        self.best: Row | None = None
        self._best_metric = best_metric
        self._deciding = None if best_metric is None else _own_name(metric_name(best_metric))
        self._best_value = 0.0
        self._above: Above | None = None
        self._header, self._num_since_header = "", 0

    def add(
        self,
        step: int,
        epoch: float,
        metrics: Mapping[str, Any],
        *,
        loss: float | None,
        lr: float | None,
        seconds: float | None,
    ) -> Row:
        """Add an evaluation; the arguments are the attributes of ``Row``."""
        value, metrics = self._value(metrics), {_own_name(n): v for n, v in metrics.items()}
        is_best = value is not None and (self.best is None or value > self._best_value)
        row = Row(step, epoch, loss, metrics, lr, seconds, is_best)
        self.rows, self.number = [*self.rows[1 - _MOST_ROWS :], row], self.number + 1
        if is_best:
            self.best, self._best_value = row, value or 0.0
        self._above = None
        return row

    def _value(self, metrics: Mapping[str, Any]) -> float | None:
        """Return how good an evaluation is; None if nothing tells."""
        name = self._best_metric
        if name is None or not isinstance(metrics.get(metric_name(name)), int | float):
            return None
        return score(metrics, name)

    def columns(self, rows: Sequence[Row], width: float = math.inf) -> Columns:
        """Return the columns of some rows, as many as have room."""
        metrics, num_hidden = choose_metrics([row.metrics for row in rows], self._deciding)
        names = [name for name in HEADINGS if name not in ("lr", "time")]
        if not any("loss" in row.metrics for row in rows):
            names.remove("eval loss")
        columns = Columns((*names, *metrics, "lr", "time"), frozenset(metrics), num_hidden)
        for smaller in _from_wide_to_narrow(columns, metrics, self._deciding):
            columns = smaller
            if sum(_widths(columns, rows)) + 2 * len(columns.names) <= width:
                break
        return columns

    def lines(self, rows: Sequence[Row], width: float, *, colours: bool) -> list[str]:
        """Return rows as aligned lines, the first below a header unless that still stands there."""
        columns = self.columns(self.rows, width)
        widths = _widths(columns, self.rows)
        header = _aligned(columns.names, widths)
        if num_cells(header) + len(_more(columns)) <= width:
            header += _more(columns)
        lines = []
        for row in rows:
            if header != self._header or self._num_since_header >= _ROWS_PER_HEADER:
                lines.append(f"\x1b[1m{header}\x1b[0m" if colours else header)
                self._header, self._num_since_header = header, 0
            line = _aligned(_cells(row, columns).values(), widths)
            mark = "\x1b[1;32m*\x1b[0m" if colours else "*"
            lines.append(f"{line} {mark}" if row.is_best else line)
            self._num_since_header += 1
        return lines

    def forget_header(self) -> None:
        """Let the next line come below a header again, as other lines stand in between."""
        self._header = ""

    def log_line(self, row: Row) -> str:
        """Return a row as a line that can be read on its own."""
        columns = self.columns(self.rows)
        parts = [f"{name} {cell}" for name, cell in _cells(row, columns).items() if cell]
        return "  ".join([*parts, *(["best so far"] if row.is_best else [])]) + _more(columns)

    def above(self) -> Above:
        """Return the table as HTML and as text, made again only if there are new rows."""
        if self._above is None and self.rows:
            rows = self.rows
            if self.best is not None and self.best not in rows:
                rows = [self.best, *rows]
            columns = self.columns(rows)
            widths = _widths(columns, rows)
            lines = [_aligned(columns.names, widths)]
            for row in rows:
                line = _aligned(_cells(row, columns).values(), widths)
                lines.append(f"{line} *" if row is self.best else line)
            notes = _notes(columns, self.number - len(rows))
            html = _html(columns, rows, self.best, notes)
            self._above = Above(html, "\n".join([*lines, *notes]))
        return self._above or Above()


def _own_name(metric: str) -> str:
    """Return the name of a metric's column, which no other column has."""
    return f"eval_{metric}" if metric in HEADINGS else metric


def choose_metrics(
    found: Iterable[Mapping[str, Any]], deciding: str | None
) -> tuple[list[str], int]:
    """Choose the metrics that get a column: numbers and short texts, the deciding one first.

    Where there are many, those of single classes are left out, unless there are no others.

    Args:
        found: Results of evaluations.
        deciding: Name of the metric that decides which one is the best.

    Returns:
        Names of the metrics, and the number of those that were left out.

    >>> scores = {"loss": 0.5, "accuracy": 0.8, "overall_f1": 0.7}
    >>> scores |= {f"{name}_f1": 0.6 for name in ("dog", "cat", "cow", "hen", "pig", "rat", "emu")}
    >>> choose_metrics([scores], None)
    (['accuracy', 'overall_f1'], 7)
    """
    names: dict[str, None] = {}
    for metrics in found:
        ends = {end for pair in ends_of_intervals(metrics).values() for end in pair}
        names |= {n: None for n, value in metrics.items() if _has_room(value) and n not in ends}
    names.pop("loss", None)
    chosen = list(names)
    if len(chosen) > _MOST_METRICS:
        of_classes = _of_classes(chosen)
        chosen = [n for n in chosen if n not in of_classes or n == deciding] or chosen
        if deciding in chosen:
            chosen = [deciding, *(n for n in chosen if n != deciding)]
        chosen = chosen[:_MOST_METRICS]
    return chosen, len(names) - len(chosen)


def _of_classes(names: Sequence[str]) -> set[str]:
    """Return names of which many differ in their first or in their last words alone."""
    names = [name for name in names if not _OF_ALL & set(re.split(r"[ _/-]", name))]
    found: set[str] = set()
    for kind in (r".+_([^_]+)", r"(.+?)_.+"):
        kinds = {name: match[1] for name in names if (match := re.fullmatch(kind, name))}
        sizes = Counter(kinds.values())
        found |= {name for name, kind in kinds.items() if sizes[kind] >= _FAMILY}
    return found


def ends_of_intervals(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the names of the ends of each score's interval, by the name of the score.

    >>> ends_of_intervals({"f1": 0.8, "f1_low": 0.7, "f1_high": 0.9, "loss": 0.4, "lr_low": 1})
    {'f1': ('f1_low', 'f1_high')}
    """
    pairs = ((name, (f"{name}_low", f"{name}_high")) for name in names)
    return {name: ends for name, ends in pairs if all(end in names for end in ends)}


def _from_wide_to_narrow(
    columns: Columns, metrics: Sequence[str], deciding: str | None
) -> Iterator[Columns]:
    """Yield columns that need less and less room, and lack what matters least."""
    first = deciding if deciding in metrics else next(iter(metrics), None)

    def without(name: str) -> Columns:
        names = tuple(other for other in columns.names if other != name)
        return columns._replace(names=names, num_hidden=columns.num_hidden + (name in metrics))

    yield columns
    yield (columns := columns._replace(intervals=columns.intervals & {first}))
    for name in ("lr", "time"):
        yield (columns := without(name))
    yield (columns := columns._replace(intervals=frozenset()))
    for name in reversed(metrics):
        if name != first:
            yield (columns := without(name))
    for name in ("epoch", "train loss"):
        yield (columns := without(name))


def _cells(row: Row, columns: Columns) -> dict[str, str]:
    """Return the texts of a row, by the names of their columns."""
    lr, time = row.lr, row.seconds
    found = {
        "step": str(row.step),
        "epoch": f"{row.epoch:.2f}",
        "train loss": short(row.loss),
        "eval loss": short(row.metrics.get("loss")),
        "lr": "" if lr is None or math.isnan(lr) else f"{lr:.2e}",
        "time": "" if time is None else clock(time),
    }
    ends = ends_of_intervals(row.metrics)
    for name in columns.names:
        if name not in HEADINGS:
            found[name] = short(row.metrics.get(name))
            if name in ends and name in columns.intervals:
                found[name] += f" ({_interval(row.metrics, ends[name])})"
    return {name: found[name] for name in columns.names}


def _interval(metrics: Mapping[str, Any], ends: tuple[str, str]) -> str:
    return " to ".join(short(metrics[end]) for end in ends)


def _widths(columns: Columns, rows: Sequence[Row]) -> list[int]:
    cells = [_cells(row, columns) for row in rows]
    return [
        max(num_cells(name), _WIDTHS.get(name, 6), *(num_cells(row[name]) for row in cells))
        for name in columns.names
    ]


def _aligned(cells: Iterable[str], widths: Sequence[int]) -> str:
    pairs = zip(cells, widths, strict=True)
    return "  ".join(" " * (width - num_cells(cell)) + cell for cell, width in pairs)


def _more(columns: Columns) -> str:
    return f"  (+ {columns.num_hidden} metrics)" if columns.num_hidden else ""


def _has_room(value: Any) -> bool:
    return isinstance(value, float | int) or (
        isinstance(value, str) and len(value) <= _LONGEST_TEXT
    )


def short(value: Any) -> str:
    """Return a value with about four digits.

    >>> [short(value) for value in (0.81234, 1234.5678, 0.0000123, 12, float("nan"), None)]
    ['0.8123', '1234.57', '1.23e-05', '12', 'nan', '']
    """
    if value is None or not isinstance(value, float):
        return "" if value is None else str(value)
    if math.isnan(value) or value == 0 or 1e-3 <= abs(value) < 100:
        return f"{value:.4f}"
    return f"{value:.2f}" if 100 <= abs(value) < 1e6 else f"{value:.2e}"


def _notes(columns: Columns, num_left_out: int) -> list[str]:
    found = []
    if num_left_out:
        found.append(f"{num_left_out} more evaluations are in result.history.")
    if columns.num_hidden:
        found.append(f"{columns.num_hidden} more metrics are in result.metrics.")
    return found


# Colours that are readable on white and on black; everything else is as the notebook has it.
_CELL = (
    "text-align: right; padding: 2px 10px; white-space: nowrap; font-variant-numeric: tabular-nums"
)
_BEST = "background: rgba(46, 160, 67, 0.2); font-weight: bold"


def _html(columns: Columns, rows: Sequence[Row], best: Row | None, notes: Sequence[str]) -> str:
    headings = [HEADINGS.get(name, name) for name in columns.names]
    head = "".join(f'<th scope="col" style="{_CELL}">{escape(text)}</th>' for text in headings)
    body = ""
    plain = columns._replace(intervals=frozenset())
    for row in rows:
        ends = ends_of_intervals(row.metrics)
        cells = ""
        for name, text in _cells(row, plain).items():
            content = escape(text)
            if name in ends or (name == "eval loss" and "loss" in ends):
                found = _interval(row.metrics, ends["loss" if name == "eval loss" else name])
                content += f"<br><small>{escape(found)}</small>"
            cells += f'<td style="{_CELL}">{content}</td>'
        mark = f'<td style="{_CELL}">{"best" if row is best else ""}</td>' if best else ""
        cells += mark
        body += f'<tr style="{_BEST}">{cells}</tr>' if row is best else f"<tr>{cells}</tr>"
    head += "<th></th>" if best else ""
    below = "".join(f"<div><small>{escape(note)}</small></div>" for note in notes)
    style = "font-variant-numeric: tabular-nums"
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<table style="{style}">{table}</table>{below}'
