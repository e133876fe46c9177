"""What a metric gets of a table: it depends on what the metric takes, never on shapes."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manualloop.errors import DataError, MetricError
from manualloop.evaluation.forms import Array, Rows, Scorer
from manualloop.evaluation.metrics import Metric
from manualloop.evaluation.table import Column, Order, Table
from manualloop.tasks.task import IGNORE_INDEX


class Given(NamedTuple):
    """What a scorer is given, and the rows that it comes from.

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
            "predictions": _take(self.predictions, places),
            "references": _take(self.references, places),
        }
        if self.kept is not None:
            found["kept"] = {name: _take(column, rows) for name, column in self.kept.items()}
        return found


def _take(values: Any, places: NDArray[np.int64]) -> Any:
    """Return some entries of an array, or of a list, which stays of its class."""
    if isinstance(values, list | tuple):
        return type(values)([values[place] for place in places.tolist()])
    return values[places]


def given_by(table: Table, scorer: Scorer) -> Given:
    """Return what a table gives to a scorer, and which row each entry comes from.

    Raises:
        DataError: The rows have no labels.
        MetricError: They are not what the metric scores.
    """
    arguments = arguments_for(table, scorer)
    predictions, references = arguments["predictions"], arguments["references"]
    row, num_rows = None, len(references)
    if scorer.takes in ("classes", "values") and table.made_by != "decode":
        _, of_rows, _ = _by_row(table)
        if isinstance(of_rows, Rows):
            numbers = list(map(np.size, of_rows))
            row, num_rows = np.repeat(np.arange(len(numbers)), numbers), len(numbers)
    return Given(predictions, references, row, arguments.get("kept"), num_rows)


def arguments_for(table: Table, scorer: Scorer) -> dict[str, Any]:
    """Return the arguments of a scorer's ``add_batch``: the rows of a table in the form it takes.

    Raises:
        DataError: The rows have no labels, or classes of them are left out.
        MetricError: They are not what the metric scores.
    """
    kept: dict[str, list[Any]] = {}
    if isinstance(scorer, Metric) and table.ignored != IGNORE_INDEX:
        scorer.ignored = (table.ignored,)  # which counts in no class map
    if scorer.takes == "rows":
        predictions, references, kept = _by_row(table)
    elif scorer.takes == "scores":
        predictions, references, kept = _scores(table, scorer)
    elif scorer.takes == "maps":
        predictions, references = _maps(table)
    elif table.made_by == "decode":
        predictions, references = _numbers(table, scorer)
    else:
        predictions, references = _flat(table, scorer)
    more = {"kept": kept} if getattr(scorer, "takes_kept", False) else {}
    return {"predictions": predictions, "references": references, **more}


class _Labels(NamedTuple):
    """The references of a table.

    Attributes:
        column: Their column.
        whole: All of them as one array in the dataset's order, where there is one label a row, or
            one number for each of several classes; None for labels by token and for objects.
        kept: Which rows are not ignored, where there is one label a row; None for all.
        by_token: Whether each row has a label for each token, some of which may be ignored.
    """

    column: Column
    whole: Array | None
    kept: Array | None
    by_token: bool


def _labels_of(table: Table) -> _Labels:
    column = table.columns.get("references")
    if column is None:
        raise DataError(
            "The metric needs labels, and some batches have none. Leave their rows out, or use "
            "predict_loop."
        )
    whole, parts = column.array(table.order), column.parts
    has_matrix = table.task in ("multi_label_classification", "regression")
    is_int = all(isinstance(part, np.ndarray) and part.dtype.kind in "biu" for part in parts)
    by_token = is_int and not has_matrix and max(map(np.ndim, parts)) > 1
    if whole is None or by_token:
        return _Labels(column, None, None, by_token)
    if table.task == "multi_label_classification":
        whole = _as_classes(whole)
    kept = None
    if whole.ndim == 1 and is_int and (is_ignored := whole == table.ignored).any():
        kept = ~is_ignored
    return _Labels(column, whole, kept, by_token)


def _as_classes(labels: Array) -> Array:
    """Return multi-label targets as integers, if all of them are 0 or 1."""
    if (labels == IGNORE_INDEX).any():
        raise DataError(
            f"Labels of {IGNORE_INDEX} leave classes of a row out of the loss, but the metric "
            "compares whole rows. Leave the metric out: evaluate_loop(model, loader) computes "
            "the loss, and predict_loop gives predictions and references."
        )
    return labels.astype(np.int32) if ((labels == 0) | (labels == 1)).all() else labels


def _maps(table: Table) -> tuple[Rows, Rows]:
    """Return predictions and labels row by row."""
    sides = (table.columns["predictions"], _labels_of(table).column)
    predictions, references = (Rows(side.rows(table.order)) for side in sides)
    return predictions, references


def _flat(table: Table, scorer: Scorer) -> tuple[Array, Array]:
    """Return predictions and labels one beside the other, without those that are ignored."""
    labels, column = _labels_of(table), table.columns["predictions"]
    if table.misfit is not None:
        number, reason = table.misfit
        fix = "Let postprocess"
        if table.made_by == "postprocess":
            fix = "Leave postprocess out, or let it"
        raise MetricError(
            f"{scorer.name} scores a prediction for each label, and in batch {number} {reason}. "
            f'{fix} return predictions in the shape of batch["labels"], or pass the '
            "metric as a function of predictions and references, which gets them row by row."
        )
    if labels.by_token:
        if table.order is None:
            found, wanted = column.flat(), labels.column.flat()
        else:
            found, wanted = (_flat_rows(side, table.order) for side in (column, labels.column))
        assert found is not None
        assert wanted is not None
        kept = wanted != table.ignored
        if table.ignored != IGNORE_INDEX:
            kept &= wanted != IGNORE_INDEX  # of maps of several sizes
        return found[kept], wanted[kept]
    found, wanted = column.array(table.order), labels.whole
    if found is None or wanted is None:
        raise MetricError(
            f"{scorer.name} scores the same number of values in each row, and the rows differ. "
            "Pass a function of predictions and references, which gets them row by row."
        )
    if wanted.shape[1:] == (1,) == found.shape[1:]:
        found, wanted = found[:, 0], wanted[:, 0]
    if scorer.takes == "classes" and table.task == "regression":
        found, wanted = _classes_of_floats(table, scorer, found, wanted)
    return (found, wanted) if labels.kept is None else (found[labels.kept], wanted[labels.kept])


def _classes_of_floats(
    table: Table, scorer: Scorer, found: Array, wanted: Array
) -> tuple[Array, Array]:
    """Return classes and their labels, which are floats so that they fit a binary loss.

    Raises:
        MetricError: The predictions are numbers.
    """
    if found.dtype.kind == "f" and table.made_by != "postprocess":
        is_share = ((found >= 0) & (found <= 1)).all()
        what, bound = ("probability", 0.5) if is_share else ("logit", 0)
        raise MetricError(
            f"{scorer.name} scores classes, and labels that are floats make this a regression. "
            f"Score numbers by mse or mae. For one {what} that tells two classes: "
            "postprocess=lambda outputs, batch: "
            f'((outputs if hasattr(outputs, "dtype") else outputs["logits"]) > {bound}).long().'
        )
    is_class = found.dtype.kind in "biu" and ((wanted == 0) | (wanted == 1)).all()
    return (found, wanted.astype(np.int32)) if is_class else (found, wanted)


def _flat_rows(column: Column, order: Order) -> Array:
    flat: Array = np.concatenate([np.ravel(row) for row in column.rows(order)])
    return flat


def _numbers(table: Table, scorer: Scorer) -> tuple[Array, Array]:
    """Return decoded objects that are one number a row, and their references."""
    labels = _labels_of(table)
    found = _as_numbers(table.columns["predictions"].rows(table.order), scorer, "predictions")
    wanted = labels.whole
    if wanted is None:
        if labels.by_token:
            raise MetricError(
                f"{scorer.name} scores one number a row, and the labels are several. Let decode "
                "return two lists: predictions and references."
            )
        wanted = _as_numbers(labels.column.rows(table.order), scorer, "references")
    return (found, wanted) if labels.kept is None else (found[labels.kept], wanted[labels.kept])


def _as_numbers(values: list[Any], scorer: Scorer, role: str) -> Array:
    kind, noun = (Integral, "class") if scorer.takes == "classes" else (Real, "number")
    for row, value in enumerate(values):
        if not isinstance(value, kind):
            raise MetricError(
                f"{scorer.name} scores one {noun} a row, and decode made a {type(value).__name__} "
                f"of row {row} of the {role}: {value!r:.60}. Score objects with a metric of "
                f"{role} such as a function, or leave decode out for {scorer.name}."
            )
    return np.array(values)


def _scores(table: Table, scorer: Scorer) -> tuple[Array, Array, dict[str, list[Any]]]:
    """Return the probabilities of each row, its label, and the kept columns."""
    labels, column = _labels_of(table), table.columns.get("scores")
    found = None if column is None else column.array(table.order)
    wanted = labels.whole
    if wanted is None and not labels.by_token:
        wanted = _as_numbers(labels.column.rows(table.order), scorer, "references")
    if wanted is not None and (own := _processed_scores(table)) is not None:
        found, wanted = _beside_labels(own, wanted)
    if found is None or wanted is None:
        raise MetricError(
            f"{scorer.name} scores probabilities of classes, and the rows have none, or not one "
            "label each."
        )
    kept = {name: values.rows(table.order) for name, values in table.kept.items()}
    if labels.kept is None:
        return found, wanted, kept
    return found[labels.kept], wanted[labels.kept], _some(kept, labels.kept)


def _processed_scores(table: Table) -> Array | None:
    """Return the numbers that ``postprocess`` made; None if it made classes, or is none.

    Raises:
        MetricError: They are no probabilities.
    """
    found = None
    if table.made_by == "postprocess":
        found = table.columns["predictions"].array(table.order)
    if found is None or found.dtype.kind != "f":
        return None
    if ((found < 0) | (found > 1)).any():  # NaN is told elsewhere
        raise MetricError(
            "The metric scores probabilities of classes, and postprocess returned numbers from "
            f"{np.nanmin(found):.4g} to {np.nanmax(found):.4g}. Let it return probabilities, such "
            "as outputs.logits.sigmoid(), or class numbers: then the probabilities are made of the "
            "logits."
        )
    return found


def _beside_labels(found: Array, labels: Array) -> tuple[Array, Array]:
    """Return probabilities ``(rows, classes)`` and their labels.

    One for each row is that of the second of two classes.
    """
    if ((labels == 0) | (labels == 1)).all():
        labels = labels.astype(np.int32)
    if labels.shape[1:] == (1,):
        labels = labels[:, 0]
    if found.ndim == 1 or found.shape[1:] == (1,):
        second = found.reshape(-1)
        return np.stack([1 - second, second], 1), labels
    if labels.ndim == 1 and (np.abs((sums := found.sum(-1)) - 1) > _ROUNDING).any():
        raise MetricError(
            "The metric scores the probabilities of classes of which each row has one, and those "
            f"of postprocess add up to between {np.nanmin(sums):.4g} and {np.nanmax(sums):.4g} in "
            "a row, not to 1. Let it return outputs.logits.softmax(-1)."
        )
    return found, labels


_ROUNDING = 0.02  # of probabilities in bfloat16


def _some(kept: dict[str, list[Any]], is_one: Array) -> dict[str, list[Any]]:
    """Return some rows of kept columns."""
    rows = np.flatnonzero(is_one).tolist()
    return {name: [values[row] for row in rows] for name, values in kept.items()}


def _by_row(table: Table) -> tuple[Any, Any, dict[str, list[Any]]]:
    """Return predictions, references and kept columns with one entry a row."""
    column, order = table.columns["predictions"], table.order
    kept = {name: values.rows(order) for name, values in table.kept.items()}
    if "references" not in table.columns and "references" not in table.missing:
        nothing = Rows([None] * table.num_rows)
        return _entries(column, order, is_list=True), nothing, kept
    labels, is_decoded = _labels_of(table), table.made_by == "decode"
    found = _entries(column, order, is_list=is_decoded or labels.by_token)
    wanted: Any
    if labels.by_token:
        wanted = Rows(np.ravel(row) for row in labels.column.rows(order))
        is_labelled = [row != table.ignored for row in wanted]
        if table.misfit is None and table.made_by == "rule":
            pairs = zip(found, is_labelled, strict=True)
            found = Rows(np.ravel(row)[is_one] for row, is_one in pairs)
        wanted = Rows(row[is_one] for row, is_one in zip(wanted, is_labelled, strict=True))
        return found, wanted, kept
    wanted = Rows(labels.column.rows(order)) if labels.whole is None else labels.whole
    if labels.kept is not None:
        rows, kept = np.flatnonzero(labels.kept), _some(kept, labels.kept)
        wanted = wanted[rows]
        found = found[rows] if isinstance(found, np.ndarray) else Rows(found[row] for row in rows)
    if is_decoded and isinstance(wanted, np.ndarray):
        wanted = Rows(wanted.tolist() if wanted.ndim == 1 else wanted)
    return found, wanted, kept


def _entries(column: Column, order: Order, *, is_list: bool) -> Array | Rows:
    """Return one entry a row: as an array, unless a list is wanted or shapes differ."""
    whole = None if is_list else column.array(order)
    return Rows(column.rows(order)) if whole is None else whole
