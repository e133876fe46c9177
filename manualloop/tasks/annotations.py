"""The boxes of an image, as datasets have them and as processors and metrics take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manualloop.errors import DataError


def columns_of(objects: Any, column: str, box: str, label: str) -> Mapping[str, Any]:
    """Return the boxes of an image as a dict of lists.

    Args:
        objects: A dict of lists, or a list of dicts.
        column: Name of their column, for messages.
        box: Name of the boxes among them.
        label: Name of the classes among them.

    Raises:
        DataError: Boxes or classes are not among them.
    """
    columns: Mapping[str, Any] = objects
    if not isinstance(objects, Mapping):
        listed = list(objects)
        names = listed[0] if listed else (box, label)
        columns = {name: [one[name] for one in listed] for name in names}
    if missing := [name for name in (box, label) if name not in columns]:
        raise DataError(
            f"{column!r} has no {missing[0]!r}, only {', '.join(columns)}. Name boxes and classes: "
            'boxes(processor, box="bbox", label="category").'
        )
    return columns


def read_corners(boxes: Any, column: str, box: str) -> NDArray[np.float64]:
    """Return left, top, width and height of boxes, float64 ``(boxes, 4)``.

    Args:
        boxes: The boxes, as the dataset has them.
        column: Name of their column, for messages.
        box: Their name in it.

    Raises:
        DataError: They are something else, or missing.
    """
    try:
        corners = np.asarray(boxes, np.float64)
    except (TypeError, ValueError):  # lists of other lengths, or no numbers
        corners = np.full(1, np.nan)
    if not corners.size:
        return corners.reshape(0, 4)
    if corners.ndim != 2 or corners.shape[1] != 4 or not np.isfinite(corners).all():
        raise DataError(
            f"An image has {box}={boxes!r:.120} in {column!r}. A box is a list of four numbers: "
            "left, top, width and height in pixels. Make it so with dataset.map; an image without "
            "boxes has an empty list."
        )
    if (corners[:, 2:] < 0).any():
        raise DataError(
            f"An image has the boxes {corners.tolist()!r:.200}, of which one has a negative size. "
            "A box is left, top, width and height: make it so with dataset.map."
        )
    return corners


def read_objects(
    corners: NDArray[np.float64], classes: Sequence[int], areas: Any, crowds: Any
) -> Objects:
    """Return the boxes of an image with what belongs to each.

    Args:
        corners: The boxes.
        classes: Their class numbers.
        areas: Their areas; None for those of the boxes, also of a single one.
        crowds: Marks of areas of many objects; None for no mark, also of a single one.

    Raises:
        DataError: There are more or fewer of one than of another.
    """
    sizes = (corners[:, 2] * corners[:, 3]).tolist()
    areas, crowds = _listed(areas, sizes), _listed(crowds, [0] * len(corners))
    if not len(corners) == len(classes) == len(areas) == len(crowds):
        raise DataError(
            f"An image has {len(corners)} boxes and {len(classes)} classes, {len(areas)} areas and "
            f"{len(crowds)} marks of crowds. Give each box one of each."
        )
    pairs = zip(areas, sizes, strict=True)
    return Objects(
        corners,
        np.asarray(classes, np.int64),
        np.asarray([area if _is_given(area) else size for area, size in pairs], np.float64),
        np.asarray([_is_given(crowd) and bool(crowd) for crowd in crowds], np.int64),
    )


def _listed(values: Any, default: list[Any]) -> list[Any]:
    if values is None:
        return default
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _is_given(value: Any) -> bool:
    """Tell whether an area or a mark is there: neither None nor NaN."""
    return value is not None and value == value


@dataclass(frozen=True)
class Objects:
    """The boxes of an image.

    Attributes:
        corners: Left, top, width and height, float64 ``(boxes, 4)``.
        classes: Class numbers, int64 ``(boxes,)``.
        areas: Areas in pixels, float64 ``(boxes,)``.
        crowds: 1 for areas of many objects, int64 ``(boxes,)``.
    """

    corners: NDArray[np.float64]
    classes: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowds: NDArray[np.int64]

    def as_coco(self, image_id: Any) -> dict[str, Any]:
        """Return what processors of transformers read."""
        listed = zip(
            *(part.tolist() for part in (self.corners, self.classes, self.areas, self.crowds)),
            strict=True,
        )
        return {
            "image_id": int(image_id) if isinstance(image_id, Integral) else 0,
            "annotations": [
                {"bbox": corner, "category_id": number, "area": area, "iscrowd": crowd}
                for corner, number, area, crowd in listed
            ],
        }

    def as_reference(self) -> dict[str, Any]:
        """Return what ``"map"`` scores by: corners in pixels."""
        ends = self.corners[:, :2] + self.corners[:, 2:]
        return {
            "boxes": np.concatenate([self.corners[:, :2], ends], 1).tolist(),
            "labels": self.classes.tolist(),
            "area": self.areas.tolist(),
            "iscrowd": self.crowds.tolist(),
        }

    def moved(self, corners: NDArray[np.float64], size: tuple[int, int]) -> Objects:
        """Return the same objects with other boxes, as far as they are in the image."""
        limits = size[::-1]
        starts = corners[:, :2].clip(0, limits)
        ends = (corners[:, :2] + corners[:, 2:]).clip(0, limits)
        is_cut = (starts != corners[:, :2]) | (ends != corners[:, :2] + corners[:, 2:])
        sides = np.where(is_cut, ends - starts, corners[:, 2:])
        before = self.corners[:, 2] * self.corners[:, 3]
        after = sides[:, 0] * sides[:, 1]
        scale = np.divide(after, before, out=np.ones_like(after), where=before > 0)
        is_inside = after > 0
        return Objects(
            np.concatenate([starts, sides], 1)[is_inside],
            self.classes[is_inside],
            (self.areas * scale)[is_inside],
            self.crowds[is_inside],
        )


NOTHING = Objects(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
