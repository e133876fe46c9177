"""Metrics of the probabilities of classes; scikit-learn computes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.forms import Array


def roc_auc(
    scores: Any,
    references: Any,
    *,
    names: Sequence[str] | None = None,
    average: str | None = "macro",
    max_fpr: float | None = None,
    multi_class: str = "ovr",
) -> dict[str, float]:
    """Return the area under the curve of true positive against false positive rate.

    Args:
        scores: Probabilities ``(rows, classes)``; of two classes the second is scored.
        references: Right classes ``(rows,)``, or labels ``(rows, classes)``.
        names: Names of the classes by number.
        average: ``"macro"``, ``"weighted"``, ``"micro"`` or ``"samples"``; None for each class.
        max_fpr: Rate of false positives up to which the area counts; two classes only.
        multi_class: ``"ovr"`` compares each class with the others, ``"ovo"`` pairs of classes.

    Returns:
        ``roc_auc``, or ``roc_auc_cat`` of each class; NaN where a class has no rows, or all.

    >>> roc_auc([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]], [0, 1, 0])
    {'roc_auc': 0.5}
    """
    from sklearn import metrics

    found, right = _sides("roc_auc", scores, references)
    labels = _as_labels(right, found)
    # Each curve is of a class, of a row, or of all labels together.
    is_binary = right.ndim == 1 and found.shape[1] == 2
    axis = 0 if is_binary else {"samples": 1, "micro": None}.get(str(average), 0)
    has_both = np.atleast_1d(np.any(labels, axis) & ~np.all(labels, axis))
    options: dict[str, Any] = {"max_fpr": max_fpr, "multi_class": multi_class}
    if average is None:
        if multi_class == "ovo":
            raise ConfigError(
                "roc_auc has no area for each class where multi_class='ovo' compares pairs of "
                "classes. Leave out average=None, or multi_class='ovo'."
            )
        area = partial(metrics.roc_auc_score, **options)
        return _by_class("roc_auc", area, found, labels, has_both, names)
    options["average"] = average
    if is_binary:
        found, right = found[:, 1], labels[:, 1]
    elif right.ndim == 1:
        options["labels"] = np.arange(found.shape[1])
    if not (has_both.all() and np.isfinite(found).all()):
        return {"roc_auc": float("nan")}
    return {"roc_auc": float(metrics.roc_auc_score(right, found, **options))}


def average_precision(
    scores: Any,
    references: Any,
    *,
    names: Sequence[str] | None = None,
    average: str | None = "macro",
) -> dict[str, float]:
    """Return the mean of the precisions at each threshold, weighted by the gain in recall.

    Args:
        scores: Probabilities ``(rows, classes)``; of two classes the second is scored.
        references: Right classes ``(rows,)``, or labels ``(rows, classes)``.
        names: Names of the classes by number.
        average: ``"macro"``, ``"weighted"``, ``"micro"`` or ``"samples"``; None for each class.

    Returns:
        ``average_precision``, or ``average_precision_cat`` of each class; NaN where a class has no
        rows, without which a mean over classes is not defined.
    """
    from sklearn import metrics

    found, right = _sides("average_precision", scores, references)
    labels = _as_labels(right, found)
    occurs = np.any(labels, axis=0)
    score = metrics.average_precision_score
    if average is None:
        return _by_class("average_precision", score, found, labels, occurs, names)
    if right.ndim == 1 and found.shape[1] == 2:
        found, labels, occurs = found[:, 1], labels[:, 1], occurs[1:]
    is_defined = occurs.all() if average == "macro" or labels.ndim == 1 else occurs.any()
    if not (is_defined and np.isfinite(found).all()):
        return {"average_precision": float("nan")}
    with warnings.catch_warnings():
        # Of a row without a label, where the average is over rows: 0, as scikit-learn has it.
        warnings.filterwarnings("ignore", message="No positive class", category=UserWarning)
        return {"average_precision": float(score(labels, found, average=average))}


def log_loss(scores: Any, references: Any, *, normalize: bool = True) -> dict[str, float]:
    """Return the mean negative logarithm of the probability of the right class.

    Args:
        scores: Probabilities ``(rows, classes)``.
        references: Right classes ``(rows,)``, or labels ``(rows, classes)``, each of which counts
            as a question of its own.
        normalize: Whether to return the mean; False returns the sum.

    >>> log_loss([[0.5, 0.5], [0.5, 0.5]], [0, 1])  # the logarithm of 2
    {'log_loss': 0.6931471805599453}
    """
    from sklearn import metrics

    found, right = _sides("log_loss", scores, references)
    if right.ndim == 2:
        found, right = np.stack([1 - found.ravel(), found.ravel()], 1), right.ravel()
    if not np.isfinite(found).all():
        return {"log_loss": float("nan")}
    labels = np.arange(found.shape[1])
    loss = metrics.log_loss(right, found, labels=labels, normalize=normalize)
    return {"log_loss": float(loss)}


def _sides(name: str, scores: Any, references: Any) -> tuple[Array, Array]:
    """Return probabilities and right classes as arrays.

    Raises:
        MetricError: They are something else.
    """
    found, right = np.asarray(scores), np.asarray(references)
    if found.dtype.kind != "f" or found.ndim != 2 or right.dtype.kind not in "biu":
        raise MetricError(
            f"{name} scores probabilities of shape (rows, classes) beside class numbers, and got "
            f"{found.dtype.name} of shape {found.shape} beside {right.dtype.name}. Give it the "
            "probabilities of all classes: logits.softmax(-1)."
        )
    num_classes = found.shape[1]
    if right.shape not in (found.shape[:1], found.shape):
        raise MetricError(
            f"{name} got probabilities of shape {found.shape} and references of shape "
            f"{right.shape}. Give it one class a row, or {num_classes} labels of 0 and 1."
        )
    if right.ndim == 1 and right.size and not 0 <= right.min() <= right.max() < num_classes:
        raise MetricError(
            f"{name} got probabilities of {num_classes} classes and references from "
            f"{right.min()} to {right.max()}. Give each class a column of its own."
        )
    return found, right


def _as_labels(right: Array, found: Array) -> Array:
    """Return the right classes as truth values ``(rows, classes)``."""
    if right.ndim == 2:
        return right.astype(bool)
    labels: Array = right[:, None] == np.arange(found.shape[1])
    return labels


def _by_class(
    key: str,
    score: Callable[[Array, Array], float],
    found: Array,
    labels: Array,
    is_defined: Array,
    names: Sequence[str] | None,
) -> dict[str, float]:
    scores = {}
    for label in range(found.shape[1]):
        name = names[label] if names is not None and label < len(names) else label
        column = found[:, label]
        known = is_defined[label] and np.isfinite(column).all()
        value = float(score(labels[:, label], column)) if known else float("nan")
        scores[f"{key}_{name}"] = value
    return scores
