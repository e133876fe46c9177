"""The mean intersection over union of class maps.

As the ``mean_iou`` script of https://github.com/huggingface/evaluate counts it: Everingham et al.,
"The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from manualloop.errors import MetricError
from manualloop.evaluation.forms import Array, require_kind, to_array
from manualloop.evaluation.reports import Counted, class_name, classes_of
from manualloop.types import Matrix, Scores

IGNORED = (-100, 255)
"""Labels of pixels that do not count: torch's, and that of the configs of transformers."""


def pixels_of(
    predictions: Any, references: Any, batch: int, ignored: Sequence[int]
) -> tuple[Array, Array]:
    """Return the predicted and the right classes of all pixels that count, flat.

    Args:
        predictions: A class map a row.
        references: The right class map of each.
        batch: Number of the batch, for messages.
        ignored: Labels of pixels that do not count.

    Raises:
        MetricError: Two maps have different sizes, or hold no class numbers.
    """
    sides: tuple[list[Array], list[Array]] = ([], [])
    for row, maps in enumerate(zip(predictions, references, strict=True)):
        predicted, right = map(to_array, maps)
        if predicted.shape != right.shape:
            raise MetricError(
                f"mean_iou got a class map of shape {predicted.shape} and a right one of shape "
                f"{right.shape} in row {row} of batch {batch}. Enlarge the logits to the "
                "size of the labels: decode=lambda outputs, batch: list(torch.nn.functional"
                ".interpolate(outputs.logits, batch['labels'].shape[-2:], mode='bilinear')"
                ".argmax(1))."
            )
        require_kind("mean_iou", "predictions", predicted, batch)
        require_kind("mean_iou", "references", right, batch)
        counts = ~np.isin(right, ignored)
        sides[0].append(predicted[counts].astype(np.int64))
        sides[1].append(right[counts].astype(np.int64))
    predicted, right = map(np.concatenate, sides)
    return predicted, right


def mean_iou(pixels: Counted, names: Sequence[str] | None) -> Scores:
    """Return the mean over classes of intersection over union.

    Args:
        pixels: The pixels that count.
        names: Names of the classes by number.

    Returns:
        ``mean_iou``; ``mean_accuracy``, the mean over classes of the share of their pixels that are
        predicted right; and ``overall_accuracy``, that of all pixels. A class that neither occurs
        nor is predicted does not count. Beside them IoU and accuracy of each class.
    """
    labels = classes_of(pixels, names)
    weights = np.ones(len(pixels.references)) if pixels.weights is None else pixels.weights
    is_right = pixels.predictions == pixels.references
    both, predicted, right = (
        np.bincount(np.searchsorted(labels, values), counts, len(labels))
        for values, counts in (
            (pixels.references[is_right], weights[is_right]),
            (pixels.predictions, weights),
            (pixels.references, weights),
        )
    )
    with np.errstate(invalid="ignore"):  # 0 / 0 of a class that does not occur is NaN
        iou, accuracy = both / (predicted + right - both), both / right
        overall = both.sum() / right.sum()
    scores = Scores(
        mean_iou=_mean(iou), mean_accuracy=_mean(accuracy), overall_accuracy=float(overall)
    )
    shown = tuple(class_name(label, names) for label in labels)
    table = np.column_stack([iou, accuracy, right])
    scores.matrices["mean_iou"] = Matrix(table, shown, ("iou", "accuracy", "pixels"), "")
    return scores


def _mean(values: Array) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if found.size else float("nan")
