"""Scores of weighted rows, for many vectors of weights at once.

Each function takes the rows once and returns a function from weights ``(resamples, rows)`` to
scores ``(resamples,)``: those that the built-in metric of the same key gives for the rows, each
repeated as often as its weight tells. NaN marks a score that is not defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manualloop.evaluation.reports import class_name
from manualloop.evaluation.resampling import Floats, Weighted

Sums = Callable[[Floats], list[Floats]]
"""From weights to three counts of entries, each ``(resamples, classes)``: those that are predicted
rightly, by class; those of each predicted class; those of each class."""


@dataclass(frozen=True, eq=False)
class Entries:
    """What a metric scores, and the rows it comes from.

    Attributes:
        predictions: Class numbers, values, or probabilities, ``(entries, ...)``.
        references: Those they are compared with.
        row: Number of the row of each entry: a row of tokens has several.
        num_rows: Number of rows.
    """

    predictions: NDArray[Any]
    references: NDArray[Any]
    row: NDArray[np.int64]
    num_rows: int

    @cached_property
    def classes(self) -> NDArray[Any]:
        """The classes that occur, sorted; of several labels of a row, all."""
        if self.predictions.ndim == 2:
            return np.arange(self.predictions.shape[1])
        return np.union1d(self.predictions, self.references)

    @cached_property
    def sums(self) -> Sums:
        """Counts by class, which several scores are made of."""
        return _sums(self)


def group_rows(*columns: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the rows that are the same in all columns.

    Returns:
        The number of one row of each group, and how often it occurs.

    >>> group_rows(np.array([1, 0, 1, 1]), np.array([0, 0, 0, 1]))
    (array([1, 0, 3]), array([1, 2, 1]))
    """
    table = np.column_stack([column.reshape(len(column), -1) for column in columns])
    order = np.lexsort(table.T[::-1])
    table = table[order]
    starts = np.flatnonzero(np.append(True, (table[1:] != table[:-1]).any(1)))
    return order[starts], np.diff(np.append(starts, len(table)))


def _sums(entries: Entries) -> Sums:
    predictions, references = entries.predictions, entries.references
    if predictions.ndim == 2:  # several labels of a row
        parts = [(predictions > 0) & (references > 0), predictions > 0, references > 0]
        table: Any = np.concatenate(parts, axis=1).astype(np.float64)
    else:
        from scipy.sparse import csr_array

        number = len(entries.classes)
        predicted, actual = (np.searchsorted(entries.classes, s) for s in (predictions, references))
        is_right = predicted == actual
        column = np.concatenate([actual[is_right], number + predicted, 2 * number + actual])
        row = np.concatenate([entries.row[is_right], entries.row, entries.row])
        table = csr_array((np.ones(len(row)), (row, column)), (entries.num_rows, 3 * number))
        if table.shape[0] * table.shape[1] < 100_000:
            table = table.toarray()
    seen: list[Any] = [None, None]

    def sums(weights: Floats) -> list[Floats]:
        if seen[0] is not weights:  # several scores are made of the same counts
            seen[:] = weights, np.split(np.asarray(weights @ table), 3, axis=1)
        return list(seen[1])

    return sums


def _share(part: Floats, whole: Floats) -> Floats:
    """Divide; 0 / 0 is 0, as in scikit-learn."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def _defined(part: Floats, whole: Floats) -> Floats:
    """Divide; NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _f1(right: Floats, predicted: Floats, actual: Floats) -> Floats:
    return _share(2 * right, predicted + actual)


def _precision(right: Floats, predicted: Floats, actual: Floats) -> Floats:
    return _share(right, predicted)


def _recall(right: Floats, predicted: Floats, actual: Floats) -> Floats:
    return _share(right, actual)


_Counted = Callable[[Floats, Floats, Floats], Floats]
_COUNTED: dict[str, _Counted] = {"f1": _f1, "precision": _precision, "recall": _recall}


def _mean(values: NDArray[Any]) -> Weighted:
    """The mean of a number a row."""
    return lambda weights: np.asarray(weights @ values) / weights.sum(1)


def _accuracy(entries: Entries) -> Weighted:
    if entries.predictions.ndim == 2:
        return _mean((entries.predictions == entries.references).all(1).astype(np.float64))
    is_right = entries.predictions == entries.references
    right = np.bincount(entries.row, is_right, minlength=entries.num_rows)
    number = np.bincount(entries.row, minlength=entries.num_rows).astype(np.float64)
    return lambda weights: (weights @ right) / (weights @ number)


def _matthews(entries: Entries) -> Weighted:
    sums = entries.sums

    def score(weights: Floats) -> Floats:
        right, predicted, actual = sums(weights)
        number = actual.sum(1)
        together = right.sum(1) * number - (predicted * actual).sum(1)
        spread = (number**2 - (predicted**2).sum(1)) * (number**2 - (actual**2).sum(1))
        return _share(together, np.sqrt(spread))

    return score


def _averaged(counted: _Counted, average: str, entries: Entries) -> Weighted:
    has_labels = entries.predictions.ndim == 2
    if average == "samples":
        predicted, actual = entries.predictions > 0, entries.references > 0
        sides = (predicted & actual, predicted, actual)
        return _mean(counted(*(side.sum(1).astype(np.float64) for side in sides)))
    if average == "binary":
        others = (entries.predictions != 1), (entries.references != 1)
        entries = replace(entries, predictions=~others[0], references=~others[1])
    sums = entries.sums
    is_missing = average == "binary" and not (entries.predictions | entries.references).any()

    def score(weights: Floats) -> Floats:
        right, predicted, actual = sums(weights)
        if average == "binary":  # the last of the two classes is True
            of_positive = counted(right, predicted, actual)[:, -1]
            return np.zeros_like(of_positive) if is_missing else of_positive
        if average == "micro":
            return counted(right.sum(1), predicted.sum(1), actual.sum(1))
        of_classes = counted(right, predicted, actual)
        if average == "weighted":
            return _share((of_classes * actual).sum(1), actual.sum(1))
        if has_labels:
            return np.asarray(of_classes.mean(1))
        # A class that a resample does not hold is not in its average.
        return np.asarray(of_classes.sum(1) / ((predicted + actual) > 0).sum(1))

    return score


def _squared(entries: Entries) -> Weighted:
    differences = (entries.predictions.astype(np.float64) - entries.references) ** 2
    return _mean(differences.reshape(len(differences), -1).mean(1))


def _absolute(entries: Entries) -> Weighted:
    differences = np.abs(entries.predictions.astype(np.float64) - entries.references)
    return _mean(differences.reshape(len(differences), -1).mean(1))


def _pearson(entries: Entries) -> Weighted:
    sides = [np.asarray(side, np.float64) for side in (entries.predictions, entries.references)]
    # Moments are exact enough only near 0.
    x, y = (side - side.mean() for side in sides)
    x, y = (side / scale if (scale := np.abs(side).max()) > 0 else side for side in (x, y))
    moments = np.stack([x, y, x * x, y * y, x * y], axis=1)

    def score(weights: Floats) -> Floats:
        means = weights @ moments / weights.sum(1, keepdims=True)
        x, y, xx, yy, xy = means.T
        spreads = xx - x * x, yy - y * y
        is_constant = (spreads[0] <= 1e-14 * xx) | (spreads[1] <= 1e-14 * yy)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (xy - x * y) / np.sqrt(spreads[0] * spreads[1])
        return np.where(is_constant, np.nan, np.clip(found, -1, 1))

    return score


class _Sorted:
    """Rows in the order of a column, by its distinct values."""

    def __init__(self, column: NDArray[Any]) -> None:
        _, codes = np.unique(column, return_inverse=True)
        self.codes = codes.reshape(-1)
        self._order = np.argsort(self.codes, kind="stable")
        self._starts = np.flatnonzero(np.diff(self.codes[self._order], prepend=-1))

    def sums(self, weights: Floats) -> Floats:
        """Return the weight of each distinct value, from the lowest to the highest."""
        return np.asarray(np.add.reduceat(weights[:, self._order], self._starts, axis=1))


def _spearman(entries: Entries) -> Weighted:
    sides = [_Sorted(side) for side in (entries.predictions, entries.references)]

    def centred_ranks(side: _Sorted, weights: Floats) -> Floats:
        number = side.sums(weights)
        ranks = np.cumsum(number, axis=1) - number / 2 - number.sum(1, keepdims=True) / 2
        return np.asarray(ranks[:, side.codes])

    def score(weights: Floats) -> Floats:
        x, y = (centred_ranks(side, weights) for side in sides)
        spread = (weights * x * x).sum(1) * (weights * y * y).sum(1)
        together = (weights * x * y).sum(1)
        return _defined(together, np.sqrt(spread))

    return score


def area_under_curve(scores: NDArray[Any], is_positive: NDArray[np.bool_]) -> Weighted:
    """The area under the ROC curve of one class: how often a positive row has the higher score."""
    ordered = _Sorted(scores)

    def score(weights: Floats) -> Floats:
        positive, negative = (ordered.sums(weights * side) for side in (is_positive, ~is_positive))
        below = np.cumsum(negative, axis=1) - negative / 2
        pairs = positive.sum(1) * negative.sum(1)
        found = (positive * below).sum(1)
        return _defined(found, pairs)

    return score


def average_precision(scores: NDArray[Any], is_positive: NDArray[np.bool_]) -> Weighted:
    """The average precision of one class; NaN without a positive row."""
    ordered = _Sorted(-np.asarray(scores, np.float64))

    def score(weights: Floats) -> Floats:
        positive, all_rows = ordered.sums(weights * is_positive), ordered.sums(weights)
        precision = _share(np.cumsum(positive, axis=1), np.cumsum(all_rows, axis=1))
        number = positive.sum(1)
        found = (positive * precision).sum(1)
        return _defined(found, number)

    return score


def _by_class(area: Callable[[NDArray[Any], NDArray[np.bool_]], Weighted]) -> _Maker:
    """Score each class against all others, and take the mean; of two classes score the second."""

    def make(entries: Entries) -> Weighted:
        found, right = entries.predictions, entries.references
        labels = right > 0 if right.ndim == 2 else right[:, None] == np.arange(found.shape[1])
        classes = [1] if right.ndim == 1 and found.shape[1] == 2 else range(found.shape[1])
        of_classes = [area(found[:, number], labels[:, number]) for number in classes]
        return lambda weights: np.asarray(np.mean([one(weights) for one in of_classes], axis=0))

    return make


def _log_loss(entries: Entries) -> Weighted:
    found, right = entries.predictions, entries.references
    if right.ndim == 2:
        chosen = np.where(right > 0, found, 1 - found)
    else:
        chosen = np.take_along_axis(found, right[:, None], axis=1)
    least = np.finfo(found.dtype).eps
    return _mean(-np.log(np.clip(chosen.astype(np.float64), least, 1 - least)).mean(1))


_Maker = Callable[[Entries], Weighted]
BY_KEY: dict[str, _Maker] = {
    "accuracy": _accuracy,
    "matthews_correlation": _matthews,
    **{name: partial(_averaged, counted, "binary") for name, counted in _COUNTED.items()},
    **{
        f"{name}_{average}": partial(_averaged, counted, average)
        for name, counted in _COUNTED.items()
        for average in ("macro", "micro", "weighted", "samples")
    },
    "mse": _squared,
    "mae": _absolute,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "roc_auc": _by_class(area_under_curve),
    "average_precision": _by_class(average_precision),
    "log_loss": _log_loss,
}
"""What makes the weighted score of a built-in metric, by the key of the score."""


def of_classes(
    name: str, names: Sequence[str] | None, entries: Entries
) -> dict[str, Callable[[], Weighted]]:
    """Return what makes the scores of each class, and the averages of a report, by their keys.

    Args:
        name: ``"f1/none"``, ``"classification_report"``, or the like; others have no such scores.
        names: Names of the classes by number.
        entries: The rows.
    """
    is_report = name == "classification_report"
    rates = {"precision": "precision", "recall": "recall", "f1": "f1-score"} if is_report else {}
    if name.endswith("/none"):
        rates = {name.removesuffix("/none"): name.removesuffix("/none")}
    found: dict[str, Callable[[], Weighted]] = {}
    for label in np.union1d(entries.classes, np.arange(len(names or ()))) if rates else ():
        shown = class_name(label, names)
        for rate, column in rates.items():
            key = f"{shown}_{column}" if is_report else f"{column}_{shown}"
            found[key] = partial(_of_class, _COUNTED[rate], label, names, entries)
        if is_report:
            found[f"{shown}_support"] = partial(_of_class, _support, label, names, entries)
    for average in ("micro", "macro", "weighted", "samples") if is_report else ():
        for rate, column in rates.items():
            found[f"{average} avg_{column}"] = partial(_averaged, _COUNTED[rate], average, entries)
        found[f"{average} avg_support"] = partial(_averaged, _support, "micro", entries)
    return found


def _support(right: Floats, predicted: Floats, actual: Floats) -> Floats:
    return actual


def _of_class(
    counted: _Counted, label: Any, names: Sequence[str] | None, entries: Entries
) -> Weighted:
    place = int(np.searchsorted(entries.classes, label))
    occurs = place < len(entries.classes) and entries.classes[place] == label
    # A class without a name that a resample does not hold has no score there.
    is_listed = entries.predictions.ndim == 2 or 0 <= label < len(names or ())

    def score(weights: Floats) -> Floats:
        if not occurs:
            return np.zeros(len(weights))
        sides = [side[:, place] for side in entries.sums(weights)]
        found = counted(*sides)
        return found if is_listed else np.where(sides[1] + sides[2] > 0, found, np.nan)

    return score
