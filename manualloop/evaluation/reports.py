"""Reports of each class from counts of predicted and right classes, by scikit-learn."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from manualloop.errors import MetricError
from manualloop.evaluation.forms import Array
from manualloop.types import Matrix, Scores


class Counted(NamedTuple):
    """Rows of classes to be scored.

    Attributes:
        predictions: Predictions, ``(rows,)`` or ``(rows, labels)``.
        references: References of the same shape.
        weights: Number of times each row occurred, ``(rows,)``; None for once.
    """

    predictions: Array
    references: Array
    weights: Array | None


def confusion_matrix(
    rows: Counted, names: Sequence[str] | None, *, normalize: str | None = None
) -> Scores:
    """Count the predicted classes of the rows of each right class.

    Args:
        rows: The rows.
        names: Names of the classes by number; None takes the numbers that occur.
        normalize: ``"true"`` for shares of each right class, ``"pred"`` of each predicted one,
            ``"all"`` of all rows.

    Returns:
        No score; the matrix ``confusion_matrix`` beside them.
    """
    from sklearn import metrics

    labels = classes_of(rows, names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label", category=UserWarning)
        matrix = metrics.confusion_matrix(
            rows.references,
            rows.predictions,
            labels=labels,
            sample_weight=rows.weights,
            normalize=normalize,
        )
    shown = tuple(class_name(label, names) for label in labels)
    scores = Scores()
    scores.matrices["confusion_matrix"] = Matrix(matrix, shown, shown, "true, predicted")
    return scores


def classification_report(
    rows: Counted, names: Sequence[str] | None, *, zero_division: float = 0.0
) -> Scores:
    """Return precision, recall, F1 and number of rows of each class, and their averages.

    Keys and values are those of scikit-learn's ``classification_report``: ``cat_precision``,
    ``cat_recall``, ``cat_f1-score``, ``cat_support``, ``accuracy``, ``macro avg_f1-score``, ... . A
    class that does not occur has ``zero_division``, and does not count in the averages.

    Args:
        rows: The rows, of one class or of several labels.
        names: Names of the classes by number; None takes the numbers that occur.
        zero_division: Score where there is nothing to divide by, 0 or 1.
    """
    from sklearn import metrics

    is_multi_label = rows.references.ndim == 2
    present = classes_of(rows, None)
    labels = present if is_multi_label else classes_of(rows, names)

    def score(average: str | None) -> list[Array]:
        found = metrics.precision_recall_fscore_support(
            rows.references,
            rows.predictions,
            labels=present,
            average=average,
            sample_weight=rows.weights,
            zero_division=zero_division,
        )
        return list(found)

    of_classes = np.zeros((len(labels), 4))
    of_classes[:, :3] = zero_division
    of_classes[np.isin(labels, present)] = np.column_stack(score(None))
    table = {class_name(label, names): row for label, row in zip(labels, of_classes, strict=True)}
    averages = (
        ["micro", "macro", "weighted", "samples"] if is_multi_label else ["macro", "weighted"]
    )
    require_apart([*map(partial(class_name, names=names), labels), *(f"{a} avg" for a in averages)])
    for average in averages:
        table[f"{average} avg"] = np.array([*score(average)[:3], of_classes[:, 3].sum()])
    columns = ("precision", "recall", "f1-score", "support")
    scores = Scores()
    if not is_multi_label:
        is_right = rows.references == rows.predictions
        scores["accuracy"] = float(np.average(is_right, weights=rows.weights))
    for row, values in table.items():
        scores |= {f"{row}_{column}": v for column, v in zip(columns, values.tolist(), strict=True)}
    shown = Matrix(np.stack([*table.values()]), tuple(table), columns, "")
    scores.matrices["classification_report"] = shown
    return scores


def require_apart(names: Sequence[str]) -> None:
    """Refuse two classes of one name, of which a result by class would keep one.

    Raises:
        MetricError: There are some.
    """
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise MetricError(
            f"Two rows of a result by class are called {twice[0]!r}. Give each class a name of its "
            "own: names=[...], or id2label in the config of the model."
        )


def classes_of(rows: Counted, names: Sequence[str] | None) -> Array:
    """Return the numbers of the classes that are named or occur, sorted; of labels, all."""
    if rows.references.ndim == 2:
        return np.arange(rows.references.shape[1])
    found = np.union1d(rows.predictions, rows.references)
    return found if names is None else np.union1d(found, np.arange(len(names)))


def class_name(label: Any, names: Sequence[str] | None) -> str:
    """Return the name of a class, or its number where it has none."""
    return str(label) if names is None or not 0 <= label < len(names) else names[int(label)]
