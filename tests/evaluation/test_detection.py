"""mAP: equal to pycocotools driven directly, to a plain loop, and to torchmetrics where it runs."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.detection import mean_average_precision
from manualloop.evaluation.metrics import load_metric

Images = list[dict[str, Any]]


def boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    """Corners of boxes of all three sizes, in float32."""
    start = rng.uniform(0, 100, (number, 2))
    size = rng.choice([10.0, 50.0, 150.0], (number, 1)) * rng.uniform(0.5, 1, (number, 2))
    return np.concatenate([start, start + size], 1).astype(np.float32)


def images(seed: int, num_images: int | None = None, crowds: bool = True) -> tuple[Images, Images]:
    """Images with and without boxes on either side; some are found nearly, with equal scores."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    num_classes = int(rng.choice([1, 3]))
    for _ in range(num_images or rng.integers(1, 4)):
        right = boxes(rng, int(rng.choice([0, 1, 2, 5])))
        labels = rng.integers(0, num_classes, len(right))
        near = right + rng.normal(0, 2, right.shape) * rng.choice([0, 1, 4])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        found = np.concatenate(
            [near[: rng.integers(0, len(near) + 1)], boxes(rng, rng.choice([0, 1, 3]))]
        )
        guessed = rng.integers(0, num_classes, len(found))
        guessed[: len(labels)] = labels[: len(guessed)]
        predictions.append(
            {
                "boxes": found.astype(np.float32),
                "scores": rng.choice([0.1, 0.5, 0.9, rng.random()], len(found)).astype(np.float32),
                "labels": guessed,
            }
        )
        references.append({"boxes": right, "labels": labels})
        if crowds and seed % 3 == 0:
            references[-1]["iscrowd"] = rng.integers(0, 2, len(right))
    return predictions, references


def by_pycocotools(
    predictions: Images, references: Images, thresholds: Any, recalls: Any
) -> list[float]:
    """pycocotools as its own demo calls it, with the numbers that it prints."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def dataset(side: Images) -> dict[str, Any]:
        annotations = []
        for image, row in enumerate(side):
            for i, (x1, y1, x2, y2) in enumerate(row["boxes"]):
                box = [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "category_id": int(row["labels"][i]),
                        "iscrowd": int(row["iscrowd"][i]) if "iscrowd" in row else 0,
                        "score": float(row["scores"][i]) if "scores" in row else 1.0,
                    }
                )
        labels = {int(label) for row in predictions + references for label in row["labels"]}
        return {
            "info": {},
            "images": [{"id": number} for number in range(len(side))],
            "categories": [{"id": label} for label in sorted(labels)],
            "annotations": annotations,
        }

    with contextlib.redirect_stdout(io.StringIO()):
        right, found = COCO(), COCO()
        right.dataset, found.dataset = dataset(references), dataset(predictions)
        right.createIndex()
        found.createIndex()
        evaluation = COCOeval(right, found, "bbox")
        evaluation.params.iouThrs, evaluation.params.recThrs = thresholds, recalls
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


KEYS = [
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
]


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 1000), marks=pytest.mark.exhaustive)]
)
def test_sets_of_images_equal_pycocotools(seeds: range) -> None:
    # torchmetrics makes both in float32.
    thresholds = np.array(torch.linspace(0.5, 0.95, 10).tolist())
    recalls = np.array(torch.linspace(0, 1, 101).tolist())
    for seed in seeds:
        predictions, references = images(seed)
        found = mean_average_precision(predictions, references)
        expected = by_pycocotools(predictions, references, thresholds, recalls)
        assert list(found) == KEYS
        assert list(found.values()) == pytest.approx(expected, rel=0, abs=1e-9), seed


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    sides = [min(a[2 + i], b[2 + i]) - max(a[i], b[i]) for i in (0, 1)]
    both = max(sides[0], 0.0) * max(sides[1], 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both)


def plain_map(predictions: Images, references: Images, threshold: float) -> float:
    """Average precision at one overlap, written as the definition says, mean over the classes."""
    classes = {int(label) for row in references for label in row["labels"]}
    scores = []
    for label in sorted(classes):
        found = [
            (-float(row["scores"][i]), image, row["boxes"][i])
            for image, row in enumerate(predictions)
            for i in np.argsort(-row["scores"], kind="stable")
            if row["labels"][i] == label
        ]
        found.sort(key=lambda one: one[0])  # stable: equal scores stay in the images' order
        taken: set[tuple[int, int]] = set()
        hits = []
        for _, image, box in found:
            row = references[image]
            best, at = min(threshold, 1 - 1e-10), None
            for i, right in enumerate(row["boxes"]):
                if row["labels"][i] == label and (image, i) not in taken:
                    value = overlap(box.astype(float), right.astype(float))
                    if value >= best:
                        best, at = value, i
            hits.append(at is not None)
            if at is not None:
                taken.add((image, at))
        number = sum(int((row["labels"] == label).sum()) for row in references)
        right_so_far = np.cumsum(hits) if hits else np.zeros(0)
        precision = right_so_far / np.arange(1, len(hits) + 1)
        recall = right_so_far / number
        points = [
            max((p for p, r in zip(precision, recall, strict=True) if r >= wanted), default=0.0)
            for wanted in np.array(torch.linspace(0, 1, 101).tolist())
        ]
        scores.append(np.mean(points))
    return float(np.mean(scores)) if scores else -1.0


def test_average_precision_equals_a_plain_loop() -> None:
    for seed in range(60):
        predictions, references = images(seed, crowds=False)
        found = mean_average_precision(predictions, references)
        expected = plain_map(predictions, references, 0.5)
        assert found["map_50"] == pytest.approx(expected, rel=0, abs=1e-9), seed


def test_torchmetrics_gives_the_same() -> None:
    pytest.importorskip("torchvision")
    detection = pytest.importorskip("torchmetrics.detection")
    for seed in range(1000):
        predictions, references = images(seed)
        for average in ("macro", "micro"):
            theirs = detection.MeanAveragePrecision(class_metrics=True, average=average)
            tensors = [
                [{key: torch.as_tensor(value) for key, value in row.items()} for row in side]
                for side in (predictions, references)
            ]
            theirs.update(*tensors)
            expected = theirs.compute()
            found = mean_average_precision(
                predictions, references, class_metrics=True, average=average
            )
            for key in KEYS:
                assert np.float32(found[key]) == expected[key].numpy(), (seed, key)
            for label, value in zip(
                expected["classes"].reshape(-1).tolist(),
                expected["map_per_class"].reshape(-1).tolist(),
                strict=True,
            ):
                assert np.float32(found[f"map_per_class_{label}"]) == np.float32(value)


def test_formats_devices_and_names() -> None:
    predictions, references = images(7, 5)
    expected = mean_average_precision(predictions, references)
    assert expected["map"] > 0.1
    sizes = [
        [
            {
                **row,
                "boxes": np.concatenate(
                    [row["boxes"][:, :2], row["boxes"][:, 2:] - row["boxes"][:, :2]], 1
                ),
            }
            for row in side
        ]
        for side in (predictions, references)
    ]
    assert mean_average_precision(*sizes, box_format="xywh") == expected
    centers = [
        [
            {
                **row,
                "boxes": np.concatenate(
                    [row["boxes"][:, :2] + row["boxes"][:, 2:] / 2, row["boxes"][:, 2:]], 1
                ),
            }
            for row in side
        ]
        for side in sizes
    ]
    found = mean_average_precision(*centers, box_format="cxcywh")
    assert found == pytest.approx(expected, abs=1e-3)
    tensors = [
        [{key: torch.as_tensor(value) for key, value in row.items()} for row in side]
        for side in (predictions, references)
    ]
    metric = load_metric("map", class_metrics=True, names=["cat", "dog", "ox"])
    for prediction, reference in zip(*tensors, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    found = metric.compute()
    assert {key: found[key] for key in expected} == expected
    assert found["map"] == pytest.approx(
        np.mean([v for k, v in found.items() if k.startswith("map_per_class") and v > -1])
    )


def test_nothing_to_find() -> None:
    nothing: dict[str, list[Any]] = {"boxes": [], "scores": [], "labels": []}
    assert set(mean_average_precision([nothing], [nothing]).values()) == {-1.0}
    found = {"boxes": [[0, 0, 9, 9]], "scores": [0.5], "labels": [1]}
    assert mean_average_precision([found], [nothing])["map"] == -1.0
    assert mean_average_precision([nothing], [found])["map"] == 0.0
    assert mean_average_precision([found], [found])["map"] == pytest.approx(1.0)


GOOD = {"boxes": [[0.0, 0.0, 9.0, 9.0]], "scores": [0.5], "labels": [1]}


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({"boxes": []}, GOOD, r"row 0 of the predictions has \['boxes'\]\. Let decode return two"),
        (GOOD, {"class_labels": [1], "boxes": [[0, 0, 1, 1]]}, r"row 0 of the references has"),
        ([1, 2], GOOD, r"row 0 of the predictions has \[1, 2\]"),
        ({**GOOD, "labels": [1, 2]}, GOOD, r"Row 0 of the predictions has 1 boxes, 2 labels and 1"),
        ({**GOOD, "scores": [np.nan]}, GOOD, r"a box or a score that is not finite"),
        (GOOD, {**GOOD, "boxes": [[5, 5, 2, 2]]}, r"ends before it begins.*box_format='xywh'"),
    ],
)
def test_what_are_no_boxes_is_refused(prediction: Any, reference: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        load_metric("map").compute(predictions=[prediction], references=[reference])


@pytest.mark.parametrize(
    "options", [{"box_format": "yxyx"}, {"average": "all"}, {"max_detection_thresholds": [1, 10]}]
)
def test_options_are_checked_when_the_metric_is_loaded(options: Any) -> None:
    with pytest.raises(ConfigError, match="box_format is one of xyxy, xywh, cxcywh"):
        load_metric("map", **options)
