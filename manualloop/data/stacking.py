"""Batches of images: stacked, and padded to the largest where the model is told so by a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manualloop.errors import DataError

_PADDED = ("pixel_values", "pixel_mask")


def collate_images(
    rows: Sequence[Mapping[str, Any]], *, collate: Callable[[list[Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Make a batch of images and what belongs to each.

    Images of different sizes are padded with 0 at the right and at the bottom, as transformers'
    processors pad them. A column of dicts, such as the boxes of each image, stays a list.

    Args:
        rows: The rows.
        collate: Function that stacks the other columns.

    Raises:
        DataError: Rows have different columns, or images different sizes without a mask.
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    for name in columns:
        if missing := [place for place, row in enumerate(rows) if name not in row]:
            raise DataError(
                f"{len(missing)} of the {len(rows)} rows of a batch have no {name}, the first of "
                f"them number {missing[0]} in it. Give all rows of a split {name}, or none."
            )
    batch: dict[str, Any] = {}
    others = []
    for name in columns:
        cells = [row[name] for row in rows]
        if isinstance(cells[0], Mapping):
            batch[name] = cells
        elif name in _PADDED and isinstance(cells[0], Tensor):
            batch[name] = _stacked(cells, "pixel_mask" in columns)
        else:
            others.append(name)
    if not others:
        return batch
    return {**batch, **collate([{name: row[name] for name in others} for row in rows])}


def _stacked(images: Sequence[Tensor], has_mask: bool) -> Tensor:
    shapes = list(dict.fromkeys(tuple(image.shape) for image in images))
    if len(shapes) == 1:
        return torch.stack(list(images))
    if not has_mask or len({shape[:-2] for shape in shapes}) > 1:
        height, width = (max(shape[axis] for shape in shapes) for axis in (-2, -1))
        raise DataError(
            f"The images of a batch have the shapes {', '.join(map(str, shapes[:3]))}, and the "
            "model takes no pixel_mask that would tell it the padding. Give all images one size, "
            f'with the processor (processor.size = {{"height": {height}, "width": {width}}}; of a '
            f'detector also processor.pad_size = {{"height": {height}, "width": {width}}}, at '
            "least as large as the largest image) or in augment."
        )
    height, width = (max(shape[axis] for shape in shapes) for axis in (-2, -1))
    stacked = images[0].new_zeros((len(images), *shapes[0][:-2], height, width))
    for place, image in zip(stacked, images, strict=True):
        place[..., : image.shape[-2], : image.shape[-1]] = image
    return stacked
