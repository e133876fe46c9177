"""Class maps as an image processor changes them: by the nearest pixel, whatever their numbers are.

Processors of transformers take maps of the numbers 0 to 255 alone, some of them interpolate between
classes, and what they put around a map is class 0. A map therefore goes through a processor as the
places of its classes in a list, which has no place 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from manualloop.errors import DataError
from manualloop.tasks.pixels import processed

_MOST = 254  # places: 0 and 255 are what processors put around a map
_DIGIT = 250
_WIDEST = 1 << 16
_WHOLE = (
    *("do_convert_rgb", "do_flip_channel_order", "do_grayscale", "do_normalize"),
    *("do_reduce_labels", "do_rescale", "do_resize"),
)
"""Switches of processors that keep the whole image, and put nothing around it."""


def map_options(processor: Any) -> dict[str, Any]:
    """Return the arguments with which each pixel of a processed map is one of the map's.

    Args:
        processor: An image processor.

    Raises:
        DataError: It takes no maps, or changes their numbers.
    """
    name = type(processor).__name__
    if "segmentation_maps" not in inspect.signature(processor.preprocess).parameters:
        raise DataError(
            f"The {name} takes no masks. Use one for segmentation, such as SegformerImageProcessor;"
            " or let augment return what the model gets, with images_and_masks(augment, "
            "processor=False)."
        )
    from PIL import Image

    image = Image.new("RGB", _PROBED)
    probe = (np.indices(_PROBED[::-1]).sum(0) // 4 % 2 * 200 + 1).astype(np.uint8)
    options = {"do_reduce_labels": False} if getattr(processor, "do_reduce_labels", False) else {}
    for more in ({}, {"resample": Image.Resampling.NEAREST}):
        labels = processed(processor, image, segmentation_maps=probe, **options, **more).get(
            "labels"
        )
        if isinstance(labels, torch.Tensor) and np.isin(labels, (0, 1, 201, 255)).all():
            if not keeps_whole(processor):
                _require_aligned(processor, {**options, **more})
            return {**options, **more}
    raise DataError(
        f"The {name} makes of a mask something else than the class of each pixel. Use a processor "
        "for semantic segmentation, such as SegformerImageProcessor; or let augment return what "
        "the model gets, with images_and_masks(augment, processor=False)."
    )


_PROBED = (29, 23)


def _require_aligned(processor: Any, options: Mapping[str, Any]) -> None:
    """Refuse a processor that puts other margins around a map than around its image.

    Raises:
        DataError: It does, as DPT's of transformers 4.
    """
    from PIL import Image

    white, ones = Image.new("RGB", _PROBED, "white"), np.ones(_PROBED[::-1], np.uint8)
    plain = {"do_normalize": False, "do_rescale": False}
    made = processed(processor, white, segmentation_maps=ones, **options, **plain)
    is_image, is_map = np.asarray(made["pixel_values"]).max(0) > 0, np.asarray(made["labels"]) == 1
    if is_image.shape == is_map.shape and (is_image == is_map).all():
        return
    raise DataError(
        f"The {type(processor).__name__} of transformers {_version()} puts other margins around a "
        "mask than around its image, so that classes would lie beside their pixels. Switch them "
        "off, processor.do_pad = False with a processor.size that the model takes, or use a newer "
        "transformers."
    )


def _version() -> str:
    from importlib.metadata import version

    return version("transformers")


def with_map(
    processor: Any, image: Any, numbers: NDArray[Any], outside: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a processor makes of an image, with the class map as ``labels``.

    Args:
        processor: The processor.
        image: The image.
        numbers: Class of each pixel ``(height, width)``.
        outside: Class of what the processor puts around the image.
        options: What ``map_options`` returns for the processor.

    Raises:
        DataError: The map has more classes than a processor takes.
    """
    classes, places = _listed(numbers)
    if len(classes) > _MOST:
        raise DataError(
            f"A mask has {len(classes)} classes, and image processors of transformers take "
            f"{_MOST} of them in an image. Let augment return what the model gets, with "
            "images_and_masks(augment, processor=False)."
        )
    made = _processed(processor, image, places, options)
    known = np.full(256, outside, np.int64)
    known[1 : len(classes) + 1] = classes
    return {**made, "labels": torch.from_numpy(known[np.asarray(made["labels"])])}


def _processed(
    processor: Any, image: Any, places: NDArray[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    given = {**options, "segmentation_maps": places}
    if "resample" not in options:
        return processed(processor, image, **given)
    return processed(processor, image) | {"labels": processed(processor, image, **given)["labels"]}


def _listed(numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Return the numbers that occur, and the place of each pixel's among them, from 1."""
    least = int(numbers.min())
    if int(numbers.max()) - least >= _WIDEST:
        classes, inverse = np.unique(numbers, return_inverse=True)
        return classes, (inverse.reshape(numbers.shape) + 1).astype(np.uint8)
    shifted = numbers.astype(np.int64) - least  # counting takes a tenth of the time of sorting
    found = np.flatnonzero(np.bincount(shifted.ravel()))
    places = np.zeros(found[-1] + 1, np.uint8)
    places[found] = np.arange(1, len(found) + 1)
    return found + least, places[shifted]


class View(NamedTuple):
    """What of an image a model sees, and where: top, bottom, left and right.

    Attributes:
        part: The part of the image, in its pixels.
        frame: Where that part is in what the model sees, in pixels of that.
        seen: Height and width of what the model sees.
    """

    part: tuple[int, int, int, int]
    frame: tuple[int, int, int, int]
    seen: tuple[int, int]


def keeps_whole(processor: Any) -> bool:
    """Tell whether a processor keeps the whole image and puts nothing around it."""
    names = {name for name in dir(processor) if name.startswith("do_")}
    return not any(getattr(processor, name) for name in names.difference(_WHOLE))


def view_of(processor: Any, size: tuple[int, int], options: Mapping[str, Any]) -> View:
    """Find what a model sees of an image, by sending the numbers of its lines through a processor.

    Args:
        processor: The processor.
        size: Height and width of the image.
        options: What ``map_options`` returns for the processor.
    """
    # Its settings, which may change, are in what it prints.
    return _find_view(processor, repr(processor), size, tuple(options.items()))


@lru_cache(maxsize=256)
def _find_view(
    processor: Any, settings: str, size: tuple[int, int], options: tuple[tuple[str, Any], ...]
) -> View:
    from PIL import Image

    image, given = Image.new("RGB", size[::-1]), {**dict(options), "do_normalize": False}
    sides: list[tuple[int, int, int, int]] = []
    for axis in (0, 1):
        lines = np.indices(size)[axis]
        high, low = (
            np.asarray(processed(processor, image, segmentation_maps=digit, **given)["labels"])
            for digit in ((part + 1).astype(np.uint8) for part in np.divmod(lines, _DIGIT))
        )
        is_inside = (low > 0) & (low < 255)
        places = np.flatnonzero(is_inside.any(1 - axis))
        found = np.where(is_inside, (high - 1) * _DIGIT + low - 1, 0).max(1 - axis)[places]
        sides.append((*_edges(found, size[axis]), int(places[0]), int(places[-1]) + 1))
    (top, bottom, first, last), (left, right, start, end) = sides
    return View((top, bottom, left, right), (first, last, start, end), is_inside.shape)


def _edges(found: NDArray[Any], length: int) -> tuple[int, int]:
    """Return where the part begins and ends that lines were taken from, one for each pixel.

    >>> _edges(np.array([1, 3, 5]), 6), _edges(np.array([3, 5]), 8)
    ((0, 6), (2, 6))
    """
    number = len(found)
    for middle in (0.5, 0.0):  # of a pixel, or its beginning: what the nearest one is nearest to
        distance = (np.arange(number) + middle) * length / number - found
        if distance.min() > -_ROUNDING and distance.max() < 1 + _ROUNDING:
            return 0, length
    step = (found[-1] - found[0]) / (number - 1) if number > 1 else length
    start, end = found[0] + (1 - step) / 2, found[-1] + (1 + step) / 2
    # Less than half a pixel of the result is a matter of rounding.
    return (
        0 if start < step / 2 else round(start),
        length if length - end < step / 2 else round(end),
    )


_ROUNDING = 0.02
