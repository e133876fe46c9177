"""What a metric gets of a table, and how some of its rows are taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manualloop.evaluation.columns import kind_of
from manualloop.evaluation.forms import Rows, Takes
from manualloop.evaluation.predictions import Predictions
from manualloop.evaluation.rows import Ask, Decode
from manualloop.evaluation.scorers import Scorer, as_metric
from manualloop.evaluation.scoring import give, tell_ignored
from manualloop.evaluation.table import Column, Table
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.types import Scores


class Inputs(NamedTuple):
    """What a scorer gets of a table, and the rows it comes from.

    Attributes:
        predictions: Predictions, an array or a list; flat for a scorer of classes or values.
        references: References of the same kind.
        row: Number of the row of each entry, ascending; None for one entry a row.
        kept: Kept columns, for a scorer that takes them; None for others.
        num_rows: Number of rows.
    """

    predictions: Any
    references: Any
    row: NDArray[np.int64] | None
    kept: Mapping[str, Any] | None
    num_rows: int

    def take(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return the arguments of ``add_batch`` for some rows, in this order."""
        places = rows
        if self.row is not None:
            ends = np.searchsorted(self.row, np.arange(self.num_rows + 1))
            numbers = ends[rows + 1] - ends[rows]
            # The entries of a row follow each other: its first place, and as many after it.
            before = np.cumsum(numbers) - numbers
            places = np.repeat(ends[rows] - before, numbers) + np.arange(numbers.sum())
        found = {
            "predictions": take(self.predictions, places),
            "references": take(self.references, places),
        }
        if self.kept is not None:
            found["kept"] = {name: take(column, rows) for name, column in self.kept.items()}
        return found


def take(values: Any, places: NDArray[np.int64]) -> Any:
    """Return some entries of an array, or of a list, which stays of its class."""
    if isinstance(values, list | tuple):
        return type(values)([values[place] for place in places.tolist()])
    return values[places]


class _Recorder:
    """A scorer that keeps what it is given."""

    def __init__(self, name: str, takes: Takes, *, takes_kept: bool = False) -> None:
        self.name, self.takes, self.takes_kept = name, takes, takes_kept
        self.given: dict[str, Any] = {}

    def add_batch(self, **given: Any) -> None:
        self.given = given

    def compute(self) -> Scores:
        return Scores()


def inputs_of(table: Table, scorer: Scorer) -> Inputs:
    """Return what a scorer gets of a table.

    Raises:
        DataError: The rows have no labels.
        MetricError: They are not what the metric scores.
    """
    takes_kept = bool(getattr(scorer, "takes_kept", False))
    recorder = _Recorder(scorer.name, scorer.takes, takes_kept=takes_kept)
    tell_ignored(table, scorer)
    give(table, recorder)
    predictions, references = recorder.given["predictions"], recorder.given["references"]
    row, num_rows = None, len(references)
    if scorer.takes in ("classes", "values") and table.ask.decode is None:
        by_row = _Recorder(scorer.name, "rows")
        give(table, by_row)
        if isinstance(entries := by_row.given["references"], Rows):
            numbers = list(map(np.size, entries))
            row, num_rows = np.repeat(np.arange(len(numbers)), numbers), len(numbers)
    return Inputs(predictions, references, row, recorder.given.get("kept"), num_rows)


def units_of(table: Table, scorer: Scorer) -> tuple[Scorer, Inputs]:
    """Return what is resampled of a table, and the scorer of it.

    They are the rows, unless the metric makes one unit of several of them, as the answer to a
    question of several windows. Such a function has an attribute ``by_unit``, a function of
    predictions and kept columns, which returns the name of a metric, and predictions and references
    for that with one entry a unit.
    """
    inputs = inputs_of(table, scorer)
    by_unit: Any = getattr(scorer, "by_unit", None)
    if by_unit is None:
        return scorer, inputs
    name, predictions, references = by_unit(inputs.predictions, inputs.kept or {})
    units = Inputs(Rows(predictions), Rows(references), None, None, len(predictions))
    return as_metric(name), units


def table_of(predictions: Predictions) -> Table:
    """Return the table that an evaluation makes of the same rows.

    Args:
        predictions: Predictions with references.
    """
    kind = kind_of(predictions)
    predicted: Any = predictions.predictions
    references = predictions.references
    misfit = None
    if kind != "object" and isinstance(references, np.ndarray):
        if predicted.ndim == references.ndim == 2:
            predicted, references = same_width(predicted, references)
        if predicted.shape != references.shape:
            shapes = f"{predicted.shape}, and those of the labels {references.shape}"
            misfit = 0, f"the shape of the predictions is {shapes}"
    columns = {"predictions": predicted, "references": references, "scores": predictions.scores}
    tasks = {"classes": "multi_label_classification", "value": "regression"}
    if isinstance(references, np.ndarray) and references.dtype.kind == "f":
        tasks["class"] = "regression"  # two classes, told by the sign of one logit
    decode: Decode | None = (lambda outputs, batch: []) if kind == "object" else None
    return Table(
        {name: Column([_plain(values)]) for name, values in columns.items() if values is not None},
        {name: Column([list(values)]) for name, values in predictions.kept.items()},
        None,
        predictions.index,
        len(predictions),
        tasks.get(kind, ""),
        predictions.ignored,
        misfit,
        Ask(decode=decode),
    )


def same_width(a: NDArray[Any], b: NDArray[Any]) -> list[NDArray[Any]]:
    """Pad the narrower one of two arrays ``(rows, width)`` with -100."""
    widest = max(a.shape[1], b.shape[1])
    return [
        np.pad(side, ((0, 0), (0, widest - side.shape[1])), constant_values=IGNORE_INDEX)
        for side in (a, b)
    ]


def _plain(values: Any) -> Any:
    is_numbers = isinstance(values, np.ndarray) and values.dtype.kind in "biuf"
    return values if is_numbers else list(values)
