"""How far probabilities can be believed: predictions by their confidence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from manualloop.evaluation.predictions import Kind, Predictions
from manualloop.report.svg import Bin

NUM_BINS = 10
SOURCE = (
    "ECE is the expected calibration error of Naeini, Cooper and Hauskrecht (2015) and of Guo, "
    "Pleiss, Sun and Weinberger, “On Calibration of Modern Neural Networks” (2017): the mean over "
    "all predictions of the distance between accuracy and mean confidence in their bin, of ten "
    "bins of equal width."
)


def calibration_bins(
    confidence: NDArray[Any], is_right: NDArray[Any], num_bins: int = NUM_BINS
) -> list[Bin]:
    """Sort predictions into bins of equal width by their confidence.

    A bin holds its upper end, as in the papers.

    >>> bins = calibration_bins(np.array([0.55, 0.6, 0.95]), np.array([1, 0, 1]), num_bins=2)
    >>> bins[1].num_rows, round(bins[1].confidence, 3), round(bins[1].accuracy, 3)
    (3, 0.7, 0.667)
    """
    edges = np.linspace(0, 1, num_bins + 1)
    places = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, num_bins - 1)
    counts = np.bincount(places, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        means = np.bincount(places, confidence.astype(np.float64), num_bins) / counts
        shares = np.bincount(places, is_right.astype(np.float64), num_bins) / counts
    return [
        Bin(float(edges[n]), float(edges[n + 1]), int(counts[n]), float(means[n]), float(shares[n]))
        for n in range(num_bins)
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Return the expected calibration error of bins.

    >>> calibration_error([Bin(0, 0.5, 0, np.nan, np.nan), Bin(0.5, 1, 4, 0.9, 0.75)])
    0.15
    """
    total = sum(entry.num_rows for entry in bins)
    gaps = [
        entry.num_rows * abs(entry.accuracy - entry.confidence) for entry in bins if entry.num_rows
    ]
    return round(sum(gaps) / total, 12) if total else float("nan")


def confidences(table: Predictions, kind: Kind) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return the confidence of each prediction, and whether it is right; None without these.

    Of classes, the confidence is the probability of the predicted one. Of several labels a row, it
    is the probability of each label, which is right where the row has the label.

    Args:
        table: The predictions.
        kind: What a row of them is.
    """
    scores, references = table.scores, table.references
    predictions = table.predictions
    if scores is None or not isinstance(references, np.ndarray) or scores.ndim != 2:
        return None
    if not isinstance(predictions, np.ndarray) or not len(scores):
        return None
    if kind == "class" and references.ndim == predictions.ndim == 1:
        places = predictions.clip(0, scores.shape[1] - 1).astype(np.int64)
        found, right = scores[np.arange(len(scores)), places], predictions == references
        is_known = references >= 0
    elif kind == "classes" and references.shape == scores.shape:
        found, right, is_known = scores, references > 0.5, references >= 0
    else:
        return None
    is_known = is_known & np.isfinite(found) & (found >= 0) & (found <= 1 + 1e-6)
    return (found[is_known], right[is_known]) if is_known.any() else None
