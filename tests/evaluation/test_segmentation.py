"""Mean IoU: equal to a plain loop over pixels, counted batch by batch."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import A_THOUSAND

from manualloop.errors import MetricError
from manualloop.evaluation.metrics import Metric, load_metric


def maps(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Class maps of any sizes: with ignored pixels, only of those, or all of one class."""
    rng = np.random.default_rng(seed)
    kind, num_classes = seed % 5, int(rng.choice([2, 5, 150]))
    right = [rng.integers(0, num_classes, rng.integers(1, 7, 2)) for _ in range(rng.integers(1, 4))]
    if kind == 0:
        right = [np.full_like(one, 1) for one in right]
    predicted = [
        np.where(rng.random(one.shape) < 0.6, one, rng.integers(0, num_classes, one.shape))
        for one in right
    ]
    share = [0.0, 0.3, 1.0][seed % 3]
    ignored = 255 if seed % 2 else -100
    right = [np.where(rng.random(one.shape) < share, ignored, one) for one in right]
    return predicted, right


def plain_loop(predicted: list[np.ndarray], right: list[np.ndarray]) -> dict[str, float]:
    both: dict[int, int] = {}
    either: dict[int, int] = {}
    total: dict[int, int] = {}
    for found, wanted in zip(predicted, right, strict=True):
        for p, r in zip(found.ravel().tolist(), wanted.ravel().tolist(), strict=True):
            if r in (255, -100):
                continue
            total[r] = total.get(r, 0) + 1
            both[r] = both.get(r, 0) + (p == r)
            for one in {p, r}:
                either[one] = either.get(one, 0) + 1
    iou = [both.get(one, 0) / either[one] for one in either]
    accuracy = [both[one] / total[one] for one in total]
    pixels = sum(total.values())
    return {
        "mean_iou": sum(iou) / len(iou) if iou else math.nan,
        "mean_accuracy": sum(accuracy) / len(accuracy) if accuracy else math.nan,
        "overall_accuracy": sum(both.values()) / pixels if pixels else math.nan,
    }


@A_THOUSAND
def test_sets_of_maps_equal_a_plain_loop(seeds: range) -> None:
    for seed in seeds:
        predicted, right = maps(seed)
        found = load_metric("mean_iou").compute(predictions=predicted, references=right)
        expected = plain_loop(predicted, right)
        assert list(found) == list(expected)
        assert found == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True), seed


def test_counts_are_merged_and_do_not_depend_on_batches_or_order() -> None:
    rng = np.random.default_rng(0)
    right = rng.integers(0, 4, (30, 8, 8))
    predicted = np.where(rng.random(right.shape) < 0.5, right, rng.integers(0, 4, right.shape))
    expected = load_metric("mean_iou").compute(predictions=predicted, references=right)
    parts = [load_metric("mean_iou") for _ in range(2)]
    for i in reversed(range(30)):
        parts[i % 2].add_batch(
            predictions=torch.tensor(predicted[i : i + 1]), references=[right[i].tolist()]
        )
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    assert parts[0].compute() == expected


def test_memory_does_not_grow_with_the_images() -> None:
    metric = Metric("mean_iou")
    image = np.random.default_rng(1).integers(0, 150, (64, 64))
    for _ in range(20):
        metric.add_batch(predictions=[image], references=[image])
        assert sum(map(len, metric._rows)) <= 150 + 64 * 64


def test_names_ignored_pixels_and_the_table_of_classes() -> None:
    predicted, right = [[[0, 1, 1, 2]]], [[[0, 1, 2, 9]]]
    metric = load_metric("mean_iou", ignore_index=9, names=["sky", "tree", "road", "car"])
    scores = metric.compute(predictions=predicted, references=right)
    assert scores == {"mean_iou": 0.5, "mean_accuracy": 2 / 3, "overall_accuracy": 2 / 3}
    table = scores.matrices["mean_iou"]
    assert table.rows == ("sky", "tree", "road", "car")
    expected = [[1, 1, 1], [0.5, 1, 1], [0, 0, 1], [math.nan, math.nan, 0]]
    np.testing.assert_array_equal(table.values, expected)


@pytest.mark.parametrize(
    ("predicted", "right", "message"),
    [
        (np.zeros((1, 2, 2), int), np.zeros((1, 4, 4), int),
         r"shape \(2, 2\) and a right one of shape \(4, 4\) in row 0 of batch 0.*interpolate"),
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 2), int), r"expects integers, got float scores"),
    ],
)  # fmt: skip
def test_what_are_no_maps_is_refused(predicted: Any, right: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        load_metric("mean_iou").compute(predictions=predicted, references=right)
