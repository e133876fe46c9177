"""Calibration equals torchmetrics' and a loop written out."""

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from manualloop import Predictions
from manualloop.report.calibration import calibration_bins, calibration_error, confidences


def test_the_error_is_that_of_torchmetrics_and_of_its_definition():
    draw = np.random.default_rng(0)
    for _ in range(20):
        scores = draw.dirichlet(np.ones(4), 200).astype(np.float32)
        right = draw.integers(0, 4, 200)
        table = Predictions(np.arange(200), scores.argmax(1), scores, right)
        found, is_right = confidences(table, "class")
        ours = calibration_error(calibration_bins(found, is_right))
        theirs = multiclass_calibration_error(
            torch.tensor(scores), torch.tensor(right), num_classes=4, n_bins=10, norm="l1"
        )
        assert abs(ours - float(theirs)) < 1e-6
        total = 0.0
        for low in np.arange(10) / 10:
            inside = (found > low) & (found <= low + 0.1)
            if inside.any():
                total += abs(is_right[inside].mean() - found[inside].mean()) * inside.mean()
        assert abs(ours - total) < 1e-6


def test_rows_without_a_label_or_with_nan_do_not_count():
    scores = np.array([[0.9, 0.1], [np.nan, np.nan], [0.2, 0.8], [0.7, 0.3]], np.float32)
    table = Predictions(np.arange(4), np.array([0, 0, 1, 0]), scores, np.array([0, 0, -100, 1]))
    found, is_right = confidences(table, "class")
    assert found.tolist() == [np.float32(0.9), np.float32(0.7)]
    assert is_right.tolist() == [True, False]
    logits = Predictions(np.arange(1), np.array([0]), np.array([[5.0, -5.0]]), np.array([0]))
    assert confidences(logits, "class") is None
    no_labels = Predictions(np.arange(1), np.array([0]), scores[:1], None)
    assert confidences(no_labels, "class") is None
