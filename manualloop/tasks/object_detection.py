"""Object detection: boxes as a model takes them, what it finds, and the terms of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manualloop.errors import ConfigError, DataError, ModelError
from manualloop.models import config_of, forward_columns, model_name, unwrap_model
from manualloop.notices import say
from manualloop.strategy.accelerated import mean_over_processes
from manualloop.tasks.annotations import (
    NOTHING,
    Objects,
    columns_of,
    read_corners,
    read_objects,
)
from manualloop.tasks.numbers import whole_number
from manualloop.tasks.pixels import (
    SIZE,
    Augment,
    Given,
    augmented,
    cell_of,
    class_numbers,
    image_processor,
    opened,
    processed,
    processor_among,
    sides_of_frame,
    size_of,
)
from manualloop.types import Batch

OBJECTS = "objects"
"""Column with the boxes of each image in its own pixels, by which an evaluation scores."""


def boxes(
    processor: Any = None,
    augment: Augment | None = None,
    *,
    column: str = "image",
    objects: str = "objects",
    box: str = "bbox",
    label: str = "category",
) -> Boxes:
    """Return the transform of rows for object detection: ``pixel_values`` and ``labels``.

    The boxes of an image are a dict of lists, or a list of dicts, as COCO has them: ``bbox`` is
    left, top, width and height in pixels, ``category`` a class, and there may be ``area`` and
    ``iscrowd``. ``labels`` of a row is a dict with the class numbers and the boxes that
    transformers' models train on. Boxes of crowds and without an area are left out, as its
    processors do it. Without an ``augment`` the result is that of the processor, to the bit.

    Args:
        processor: Image processor of a detector; None takes that of ``prepare_dataloaders``.
        augment: ``augment(image, boxes, generator)`` returns another image and its boxes: floats
            ``(boxes, 4)``, left, top, width and height in pixels, as many as it got. What reaches
            out of the image is cut off, and a box that is outside is left out. What it draws from
            the ``torch.Generator`` is a function of seed, epoch and row. A function of image and
            boxes alone works as well.
        column: Column of the images.
        objects: Column of the boxes.
        box: Name of the boxes in it.
        label: Name of their classes in it: numbers, or names.

    Returns:
        A function for ``transform=``. Batches also have the columns ``image_size`` and ``objects``,
        which skip the model, for ``detected``.
    """
    processor, augment = processor_among(processor, augment)
    return Boxes(processor, augment, column, objects, box, label)


@dataclass(frozen=True)
class Boxes:
    """The transform that ``boxes`` returns.

    Attributes:
        processor: As in ``boxes``.
        augment: As in ``boxes``.
        column: As in ``boxes``.
        objects: As in ``boxes``.
        box: As in ``boxes``.
        label: As in ``boxes``.
        num_channels: Number of channels that the model takes.
        num_labels: Number of classes of the model; None if it is unknown.
        names: Names of the classes; None if they have none.
        numbers: Number of each class, by that which it has in the dataset; None for the same.
        made: Columns that skip the model.
    """

    processor: Any
    augment: Augment | None
    column: str
    objects: str
    box: str
    label: str
    num_channels: int = 3
    num_labels: int | None = None
    names: tuple[str, ...] | None = None
    numbers: tuple[int, ...] | None = None
    made: tuple[str, ...] = ()

    def fitted(self, given: Given) -> Boxes:
        """Return the same transform with what ``prepare_dataloaders`` knows.

        Raises:
            ConfigError: There is no processor.
            DataError: A class of the split is not one of the model's.
        """
        own = image_processor(given.processor) if self.processor is None else self.processor
        if own is None:
            raise ConfigError(
                "boxes(...) needs the image processor of the detector: boxes(processor), or "
                "prepare_dataloaders(dataset, processor)."
            )
        config = config_of(given.model) if given.model is not None else None
        if given.is_train and given.model is not None:
            _tell_padding(own, given.model)
        numbers = None
        if given.here is not None and given.names is not None:
            numbers = class_numbers(given.here, given.names, f"{self.objects}.{self.label}")
        return replace(
            self,
            processor=own,
            num_channels=given.num_channels,
            num_labels=getattr(config, "num_labels", None),
            names=given.names,
            numbers=numbers,
            made=(SIZE, OBJECTS) if self.objects in given.columns else (SIZE,),
        )

    def __call__(self, row: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the columns of a row."""
        call = 'boxes(column="...", objects="...")'
        image = opened(cell_of(row, self.column, call), self.num_channels)
        is_labelled = row.get(self.objects) is not None
        found = self._found(row[self.objects]) if is_labelled else NOTHING
        if self.augment is not None:
            image, found = self._augmented(image, found, generator)
        size = size_of(image)
        found = found.moved(found.corners, size)
        more = {"annotations": found.as_coco(row.get("image_id"))} if is_labelled else {}
        made = processed(self.processor, image, **more)
        if is_labelled:
            made["labels"] = dict(made["labels"])
        kept = {
            SIZE: self._frame(made, image, size),
            OBJECTS: found.as_reference() if is_labelled else None,
        }
        return {**made, **{name: kept[name] for name in self.made}}

    def _frame(
        self, made: Mapping[str, Any], image: Any, size: tuple[int, int]
    ) -> tuple[float, float]:
        """Return the size of what the model sees, in pixels of the image."""
        if "pixel_mask" in made or not getattr(self.processor, "do_pad", False):
            return sides_of_frame(made, size)
        # Slow processors of transformers 4 pad and return no mask: a box around all tells the rest.
        whole = Objects(
            np.array([[0.0, 0.0, size[1], size[0]]]),
            np.zeros(1, np.int64),
            np.array([float(size[0] * size[1])]),
            np.zeros(1, np.int64),
        )
        boxes = processed(self.processor, image, annotations=whole.as_coco(0))["labels"]["boxes"]
        width, height = boxes[0, 2:].tolist()
        return size[0] / height, size[1] / width

    def corners_of(self, objects: Any) -> NDArray[np.float64]:
        """Return left, top, width and height of the boxes of an image, float64 ``(boxes, 4)``.

        Raises:
            DataError: They are something else, or missing.
        """
        columns = columns_of(objects, self.objects, self.box, self.label)
        return read_corners(columns[self.box], self.objects, self.box)

    def _found(self, objects: Any) -> Objects:
        """Return the boxes of an image.

        Raises:
            DataError: A part of them is missing, or a class is none of the model's.
        """
        columns = columns_of(objects, self.objects, self.box, self.label)
        corners = read_corners(columns[self.box], self.objects, self.box)
        if columns[self.label] is None:
            raise DataError(
                f"An image has {self.label}=None in {self.objects!r}. Give each box a class, with "
                "dataset.map; an image without boxes has an empty list."
            )
        classes = [self._number(one) for one in columns[self.label]]
        return read_objects(corners, classes, columns.get("area"), columns.get("iscrowd"))

    def _number(self, category: Any) -> int:
        """Return the number of a class in the model."""
        if isinstance(category, str):
            if self.names is None or category not in self.names:
                known = ", ".join((self.names or ())[:10]) or "no names"
                raise DataError(
                    f"The class {category!r} is not one of the model's, which has {known}. Name "
                    "them: from_pretrained(name, id2label={...}, label2id={...})."
                )
            return self.names.index(category)
        number = whole_number(category)
        if number is None:
            raise DataError(
                f"The class {category!r} of a box is no whole number. Number the classes from 0, "
                "with dataset.map."
            )
        if self.numbers is not None and 0 <= number < len(self.numbers):
            number = self.numbers[number]
        if number < 0 or (self.num_labels is not None and number >= self.num_labels):
            raise DataError(
                f"The class {number} is not one of the model's, which has num_labels="
                f"{self.num_labels} (0..{(self.num_labels or 0) - 1}). Number the classes from 0 "
                "without gaps, or load the model with more: "
                f"from_pretrained(name, num_labels={number + 1})."
            )
        return number

    def _augmented(
        self, image: Any, found: Objects, generator: torch.Generator
    ) -> tuple[Any, Objects]:
        """Return an image and its boxes as the user's function changes them."""
        assert self.augment is not None
        pair = augmented(self.augment, generator, image, found.corners.copy())
        corners = None
        if isinstance(pair, list | tuple) and len(pair) == 2:
            image = pair[0]
            corners = np.asarray(pair[1], np.float64)
            corners = corners if corners.size else corners.reshape(-1, 4)
        if corners is None or corners.shape != found.corners.shape:
            what = f"a {type(pair).__name__}" if corners is None else f"{len(corners)} boxes"
            raise DataError(
                f"augment returned {what} for an image with {len(found.corners)} boxes. Let it "
                "return the image and as many boxes: return image, boxes. One that is outside of "
                "the image is left out."
            )
        return image, found.moved(corners, size_of(image))


def _tell_padding(processor: Any, model: nn.Module) -> None:
    """Report that a model sees some of the padding that depends on the batch."""
    size = getattr(processor, "size", None)
    height = size.get("height") if isinstance(size, Mapping) else getattr(size, "height", None)
    pads = getattr(processor, "do_pad", False) and not getattr(processor, "pad_size", None)
    if pads and height is None and "pixel_mask" in forward_columns(model):
        say(
            "images of different sizes are padded to the largest of their batch, and "
            f"{model_name(model)} sees some of the padding: what it finds depends on the batch. "
            'For exactness give all one size: processor.pad_size = {"height": ..., "width": ...}.'
        )


def detected(processor: Any, *, threshold: float = 0.0) -> Detected:
    """Return the function for ``decode=`` that turns a detector's outputs into boxes.

    They are those of the processor's ``post_process_object_detection``, in pixels of the image as
    it was before the processor resized it.

    Args:
        processor: Image processor of the detector.
        threshold: Score above which a box counts. Mean average precision takes all boxes, by their
            scores, so leave it at 0 for ``"map"``.

    Raises:
        ConfigError: The processor is not that of a detector.
    """
    found = image_processor(processor)
    if not hasattr(found, "post_process_object_detection"):
        raise ConfigError(
            f"detected(...) needs the image processor of a detector, and a "
            f"{type(processor).__name__} has no post_process_object_detection. Load it: "
            "AutoImageProcessor.from_pretrained(name)."
        )
    return Detected(found, threshold)


@dataclass(frozen=True)
class Detected:
    """The function that ``detected`` returns.

    Attributes:
        processor: As in ``detected``.
        threshold: As in ``detected``.
    """

    processor: Any
    threshold: float

    def __call__(self, outputs: Any, batch: Batch) -> list[Any] | tuple[list[Any], list[Any]]:
        """Return ``{"scores", "labels", "boxes"}`` of each image, and what is right beside it."""
        labels, objects = batch.get("labels"), batch.get(OBJECTS)
        sizes = batch.get(SIZE)
        if sizes is None:
            if labels is None or "orig_size" not in labels[0]:
                raise DataError(
                    "The batch does not tell the size of its images. Make it with "
                    "prepare_dataloaders(transform=boxes(processor)), or let it have a column "
                    f"{SIZE!r} with height and width of each."
                )
            sizes = [tuple(map(float, row["orig_size"])) for row in labels]
        found = self.processor.post_process_object_detection(
            outputs, threshold=self.threshold, target_sizes=[tuple(size) for size in sizes]
        )
        if objects is not None and all(one is not None for one in objects):
            return found, list(objects)
        if labels is None:
            return list(found)
        return found, [_in_pixels(*pair) for pair in zip(labels, sizes, strict=True)]


def _in_pixels(label: Mapping[str, Any], size: tuple[float, float]) -> dict[str, Any]:
    """Return the boxes that a model was trained on, as corners in pixels."""
    height, width = size
    center, sides = label["boxes"][:, :2], label["boxes"][:, 2:]
    corners = torch.cat([center - sides / 2, center + sides / 2], 1)
    scale = torch.tensor([width, height, width, height], dtype=corners.dtype, device=corners.device)
    return {"boxes": corners * scale, "labels": label["class_labels"]}


def detection_terms(
    outputs: Any, batch: Batch, *, eos_coefficient: float = 0.1
) -> list[tuple[Tensor, float]]:
    """Return the loss of YOLOS, DETR or Table Transformer as two means, for ``terms=``.

    The classes are a mean over all queries, in which those without an object weigh
    ``config.eos_coefficient``; the boxes are a mean over the boxes of the batch. The auxiliary
    losses of the decoder's layers are included. Weighed by these items, any split of a batch into
    micro-batches is the same update, also with images without boxes.

    Args:
        outputs: What the model returned.
        batch: The batch; ``labels`` is a dict a row, with ``class_labels``.
        eos_coefficient: Weight of a query without an object. The loops take it from the config of
            the model; ``detection_terms.of_model(model)`` does it by hand.

    Returns:
        The loss of the classes with the weight of all queries, and that of the boxes with their
        number.
    """
    classes = sum(
        (loss for name, loss in outputs.loss_dict.items() if name.startswith("loss_ce")),
        torch.zeros((), device=outputs.logits.device),
    )
    num_boxes = _count_boxes(batch)
    # transformers divides the sums over boxes by the mean number of boxes of all processes.
    divisor = max(mean_over_processes(num_boxes, outputs.logits.device), 1)
    in_boxes = (outputs.loss - classes) * (divisor / max(num_boxes, 1))
    of_queries = _weigh_queries(batch, outputs.logits.shape[1], eos_coefficient)
    return [(classes, of_queries), (in_boxes, num_boxes)]


def terms_of_model(model: nn.Module) -> partial[list[tuple[Tensor, float]]]:
    """Return ``detection_terms`` with the weights of a model, which declare their items.

    Args:
        model: The model, wrapped or not.

    Raises:
        ModelError: Its loss is another sum.
    """
    names = {kind.__name__ for kind in type(unwrap_model(model)).__mro__}
    if names.isdisjoint(_WITH_THESE_TERMS):
        raise ModelError(
            f"The loss of {model_name(model)} is not that of YOLOS, DETR or Table Transformer, "
            "whose terms detection_terms returns. Pass its means, each with its items: "
            "terms=lambda outputs, batch: [(mean, num_items), ...]."
        )
    config: Any = config_of(model)
    num_queries = getattr(config, "num_detection_tokens", None) or config.num_queries
    weights = {"eos_coefficient": config.eos_coefficient}
    terms = partial(detection_terms, **weights)
    terms.items = partial(_items, num_queries, **weights)  # type: ignore[attr-defined]
    return terms


detection_terms.of_model = terms_of_model  # type: ignore[attr-defined]

_WITH_THESE_TERMS = (
    "DetrForObjectDetection",
    "DetrForSegmentation",
    "TableTransformerForObjectDetection",
    "YolosForObjectDetection",
)


def _items(num_queries: int, batch: Batch, *, eos_coefficient: float) -> list[float]:
    return [_weigh_queries(batch, num_queries, eos_coefficient), _count_boxes(batch)]


def _count_boxes(batch: Batch) -> int:
    return sum(len(row["class_labels"]) for row in batch["labels"])


def _weigh_queries(batch: Batch, num_queries: int, eos_coefficient: float) -> float:
    """Return the sum of the weights of all queries."""
    num_boxes = _count_boxes(batch)
    return num_boxes + eos_coefficient * (num_queries * len(batch["labels"]) - num_boxes)
