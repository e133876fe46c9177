"""Image classification: from images and labels to the tensors that a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from manualloop.tasks.pixels import (
    Augment,
    Given,
    augmented,
    cell_of,
    image_processor,
    opened,
    processed,
    processor_among,
)


def images(
    augment: Augment | None = None, *, processor: Any = None, column: str = "image"
) -> Images:
    """Return the transform of rows for image classification: ``pixel_values``, and the labels.

    The image is opened, with the channels that the model takes, augmented, and given to the image
    processor. Without an ``augment`` the result is that of the processor, to the bit.

    Args:
        augment: ``augment(image, generator)`` returns another image: of PIL, an array, or a tensor.
            What it draws from the ``torch.Generator`` is a function of seed, epoch and row. A
            function of the image alone works as well. The image is what the dataset has: of PIL
            for a column of images.
        processor: Image processor of transformers; None takes that of ``prepare_dataloaders``.
            False: there is none, and ``augment`` returns what the model gets, a tensor of floats.
        column: Column of the images.

    Returns:
        A function for ``transform=``. Numbers of an image are whole, 0 to 255, or floats of 0 to
        1, which the processor then does not divide by 255; others are refused.

    >>> import numpy as np
    >>> def halves(image):
    ...     return np.float32(image) / 2
    >>> row = {"image": np.ones((1, 2, 2)), "labels": 3}
    >>> images(halves, processor=False)(row, torch.Generator())
    {'pixel_values': tensor([[[0.5000, 0.5000],
             [0.5000, 0.5000]]]), 'labels': 3}
    """
    if augment is not None:
        found, augment = processor_among(augment)
        processor = found or processor
    return Images(augment, processor, column)


@dataclass(frozen=True)
class Images:
    """The transform that ``images`` returns.

    Attributes:
        augment: As in ``images``.
        processor: As in ``images``.
        column: As in ``images``.
        num_channels: Number of channels that the model takes.
    """

    augment: Augment | None
    processor: Any
    column: str
    num_channels: int = 3

    def fitted(self, given: Given) -> Images:
        """Return the same transform with what ``prepare_dataloaders`` knows."""
        own = image_processor(given.processor) if self.processor is None else self.processor
        return replace(self, processor=own, num_channels=given.num_channels)

    def __call__(self, row: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the columns of a row."""
        image = opened(cell_of(row, self.column, 'images(column="...")'), self.num_channels)
        if self.augment is not None:
            image = augmented(self.augment, generator, image)
        made = processed(self.processor or None, image)
        return {**made, "labels": row["labels"]} if "labels" in row else made
