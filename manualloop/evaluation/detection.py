"""Mean average precision of boxes, as COCO counts it.

pycocotools matches the boxes (Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014,
arXiv:1405.0312). Keys, thresholds and values are those of torchmetrics'
``MeanAveragePrecision(iou_type="bbox", backend="pycocotools")``, which needs torchvision.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.forms import load_extra

BOX_FORMATS = ("xyxy", "xywh", "cxcywh")
_AREAS = ("", "_small", "_medium", "_large")  # below 32 x 32 pixels, to 96 x 96, above


def mean_average_precision(
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    box_format: str = "xyxy",
    iou_thresholds: Sequence[float] | None = None,
    rec_thresholds: Sequence[float] | None = None,
    max_detection_thresholds: Sequence[int] = (1, 10, 100),
    class_metrics: bool = False,
    average: str = "macro",
) -> dict[str, float]:
    """Score the boxes that were found in images.

    Args:
        predictions: For each image ``{"boxes": (n, 4), "scores": (n,), "labels": (n,)}``.
        references: For each image ``{"boxes": (n, 4), "labels": (n,)}``; ``"iscrowd"`` marks areas
            of many objects, ``"area"`` is a size other than that of the box. Boxes of both sides
            are in pixels of the same image.
        names: Names of the classes by number.
        box_format: Four numbers of a box: ``"xyxy"`` corners, ``"xywh"`` corner and size,
            ``"cxcywh"`` center and size.
        iou_thresholds: Overlaps from which a box is found; None takes 0.5, 0.55, ..., 0.95.
        rec_thresholds: Recalls at which precision is read; None takes 0, 0.01, ..., 1.
        max_detection_thresholds: Three numbers of boxes an image, of which the best are scored.
        class_metrics: Whether to add ``map_per_class_...`` and ``mar_100_per_class_...``.
        average: ``"macro"`` is the mean over classes, ``"micro"`` leaves classes out of account.

    Returns:
        ``map``, ``map_50``, ``map_75``, by size ``map_small``, ``map_medium``, ``map_large``, and
        the recall ``mar_1``, ``mar_10``, ``mar_100``, ``mar_small``, ``mar_medium``, ``mar_large``;
        -1 where there is nothing to find.
    """
    check_detection(box_format=box_format, average=average, maxima=max_detection_thresholds)
    images = [
        (
            _Boxes(prediction, "predictions", row, box_format),
            _Boxes(right, "references", row, box_format),
        )
        for row, (prediction, right) in enumerate(zip(predictions, references, strict=True))
    ]
    # As torchmetrics makes them, in float32: some recalls lie on the other side of a threshold.
    ious = iou_thresholds or torch.linspace(0.5, 0.95, 10).tolist()
    recalls = rec_thresholds or torch.linspace(0.0, 1.0, 101).tolist()
    maxima = sorted(max_detection_thresholds)
    found = _evaluate(images, ious, recalls, maxima, by_class=average == "macro")
    scores = found.scores(ious, maxima)
    if class_metrics:
        if average == "micro":
            found = _evaluate(images, ious, recalls, maxima, by_class=True)
        for place, label in enumerate(found.labels):
            name = names[label] if names is not None and 0 <= label < len(names) else label
            scores[f"map_per_class_{name}"] = _mean(found.precision[:, :, place, 0, -1])
            scores[f"mar_{maxima[-1]}_per_class_{name}"] = _mean(found.recall[:, place, 0, -1])
    return scores


def check_detection(
    *, box_format: str = "xyxy", average: str = "macro", maxima: Sequence[int] = (1, 10, 100)
) -> None:
    """Check the options of ``mean_average_precision``.

    Raises:
        ConfigError: One of them is unknown.
    """
    if box_format not in BOX_FORMATS or average not in ("macro", "micro") or len(maxima) != 3:
        raise ConfigError(
            f"map got box_format={box_format!r}, average={average!r} and "
            f"max_detection_thresholds={list(maxima)}. box_format is one of "
            f"{', '.join(BOX_FORMATS)}, average is 'macro' or 'micro', and there are three "
            "thresholds: [1, 10, 100]."
        )


class _Boxes:
    """The boxes of one side of an image, as COCO wants them: corner and size."""

    def __init__(self, image: Any, role: str, row: int, box_format: str) -> None:
        columns = ("boxes", "labels", "scores") if role == "predictions" else ("boxes", "labels")
        if not isinstance(image, Mapping) or not all(column in image for column in columns):
            has = list(image) if isinstance(image, Mapping) else f"{image!r:.60}"
            raise MetricError(
                f"map wants {', '.join(columns)} of each image, and row {row} of the {role} has "
                f"{has}. Let decode return two lists: the processor's "
                "post_process_object_detection(...), and {'boxes': ..., 'labels': ...} in pixels."
            )
        self.labels = _array(image["labels"]).reshape(-1).astype(np.int64).tolist()
        boxes = _array(image["boxes"]).reshape(-1, 4)
        scores = _array(image.get("scores", np.ones(len(self.labels)))).reshape(-1)
        if not len(boxes) == len(self.labels) == len(scores):
            raise MetricError(
                f"Row {row} of the {role} has {len(boxes)} boxes, {len(self.labels)} labels and "
                f"{len(scores)} scores. Give map one of each for a box."
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise MetricError(
                f"Row {row} of the {role} has a box or a score that is not finite, which cannot be "
                "put in order. Leave it out: boxes[boxes.isfinite().all(1)]."
            )
        self.scores: list[float] = scores.tolist()
        self.boxes = _corner_and_size(boxes, box_format).tolist()
        if role == "references" and any(min(width, height) < 0 for *_, width, height in self.boxes):
            raise MetricError(
                f"Row {row} of the references has a box that ends before it begins, read as "
                f"{box_format}. Name the format: load_metric('map', box_format='xywh')."
            )
        none = np.zeros(len(self.labels))
        self.crowds: list[float] = _array(image.get("iscrowd", none)).reshape(-1).tolist()
        self.areas: list[float] = _array(image.get("area", none)).reshape(-1).tolist()
        if role == "predictions":
            self.crowds, self.areas = none.tolist(), none.tolist()


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _corner_and_size(boxes: NDArray[Any], box_format: str) -> NDArray[Any]:
    """Convert boxes in their own precision, as torchvision's ``box_convert`` does."""
    if box_format == "cxcywh":
        half = 0.5 * boxes[:, 2:]
        boxes = np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1)
    if box_format == "xywh":
        return boxes
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


class _Found:
    """Precision and recall of a set of images, by threshold, class, size and number of boxes."""

    def __init__(self, labels: list[int], evaluation: Any) -> None:
        self.labels = labels
        self.precision: NDArray[Any] = evaluation.eval["precision"]
        self.recall: NDArray[Any] = evaluation.eval["recall"]

    def scores(self, ious: Sequence[float], maxima: Sequence[int]) -> dict[str, float]:
        scores = {"map": _mean(self.precision[..., 0, -1])}
        for overlap in (0.5, 0.75):
            chosen = np.flatnonzero(np.asarray(ious) == overlap)
            scores[f"map_{overlap * 100:.0f}"] = _mean(self.precision[chosen][..., 0, -1])
        for size, area in enumerate(_AREAS[1:], start=1):
            scores["map" + area] = _mean(self.precision[..., size, -1])
        for place, most in enumerate(maxima):
            scores[f"mar_{most}"] = _mean(self.recall[..., 0, place])
        for size, area in enumerate(_AREAS[1:], start=1):
            scores["mar" + area] = _mean(self.recall[..., size, -1])
        return scores


def _mean(values: NDArray[Any]) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _evaluate(
    images: list[tuple[_Boxes, _Boxes]],
    ious: Sequence[float],
    recalls: Sequence[float],
    maxima: Sequence[int],
    *,
    by_class: bool,
) -> _Found:
    """Match the boxes of all images."""
    coco = load_extra("pycocotools.coco", "map").COCO
    cocoeval = load_extra("pycocotools.cocoeval", "map").COCOeval
    labels = sorted({label for image in images for side in image for label in side.labels})
    labels = labels if by_class else [0]
    with redirect_stdout(io.StringIO()):  # it prints what it is doing
        sides = []
        for place in range(2):
            side = coco()
            side.dataset = _as_coco([image[place] for image in images], labels, by_class)
            side.createIndex()
            sides.append(side)
        predicted, right = sides
        evaluation = cocoeval(right, predicted, iouType="bbox")
        evaluation.params.iouThrs = np.array(ious, np.float64)
        evaluation.params.recThrs = np.array(recalls, np.float64)
        evaluation.params.maxDets = list(maxima)
        evaluation.evaluate()
        evaluation.accumulate()
    return _Found(labels, evaluation)


def _as_coco(images: list[_Boxes], labels: list[int], by_class: bool) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        rows = zip(image.boxes, image.labels, image.scores, image.crowds, image.areas, strict=True)
        annotations += [
            {
                "id": len(annotations) + place,  # COCOeval takes 0 for no match
                "image_id": number,
                "category_id": label if by_class else 0,
                "bbox": box,
                "area": area if area > 0 else box[2] * box[3],
                "iscrowd": int(crowd),
                "score": score,
            }
            for place, (box, label, score, crowd, area) in enumerate(rows, start=1)
        ]
    return {
        "info": {},
        "images": [{"id": number} for number in range(len(images))],
        "categories": [{"id": label, "name": str(label)} for label in labels],
        "annotations": annotations,
    }
