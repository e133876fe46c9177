"""Semantic segmentation: images with masks, and class maps at the size of each mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manualloop.errors import DataError
from manualloop.models import config_of
from manualloop.notices import say
from manualloop.tasks.maps import View, keeps_whole, map_options, view_of, with_map
from manualloop.tasks.pixels import (
    SIZE,
    Augment,
    Given,
    as_map,
    augmented,
    cell_of,
    image_processor,
    opened,
    processed,
    processor_among,
    size_of,
)
from manualloop.tasks.task import ignored_pixel
from manualloop.types import Batch

MASK = "mask"
"""Column with each mask at its own size, by which an evaluation scores."""

VIEW = "image_view"
"""Column of where each image is in what the model sees: a ``View``."""

_MASKS = ("mask", "annotation", "label", "labels", "segmentation_mask", "semantic_mask")


def images_and_masks(
    augment: Augment | None = None,
    *,
    processor: Any = None,
    column: str = "image",
    mask: str | None = None,
) -> ImagesAndMasks:
    """Return the transform of rows for semantic segmentation: ``pixel_values`` and ``labels``.

    Image and mask are augmented together and given to the image processor, which resizes both, the
    mask by the nearest pixel. Without an ``augment`` the result is that of the processor, to the
    bit. In splits that are not shuffled each mask is also kept at its own size, for ``upsampled``.

    Args:
        augment: ``augment(image, mask, generator)`` returns another image and its mask. What it
            draws from the ``torch.Generator`` is a function of seed, epoch and row. A function of
            image and mask alone works as well. Both are what the dataset has: of PIL for columns
            of images.
        processor: Image processor of transformers; None takes that of ``prepare_dataloaders``.
            False: there is none, and ``augment`` returns what the model gets, a tensor of floats
            and a mask of the same size.
        column: Column of the images.
        mask: Column of the masks, which hold a class number for each pixel; None takes the first
            of mask, annotation, label, labels that there is.

    Returns:
        A function for ``transform=``. A number in a mask that is neither a class of the model nor
        ``config.semantic_loss_ignore_index`` is refused.

    >>> import numpy as np
    >>> row = {"image": np.zeros((3, 1, 2), np.float32), "mask": [[0, 1]]}
    >>> images_and_masks(processor=False)(row, torch.Generator())["labels"]
    tensor([[0, 1]])
    """
    if augment is not None:
        found, augment = processor_among(augment)
        processor = found or processor
    return ImagesAndMasks(augment, processor, column, mask)


@dataclass(frozen=True)
class ImagesAndMasks:
    """The transform that ``images_and_masks`` returns.

    Attributes:
        augment: As in ``images_and_masks``.
        processor: As in ``images_and_masks``.
        column: As in ``images_and_masks``.
        mask: As in ``images_and_masks``.
        num_channels: Number of channels that the model takes.
        num_labels: Number of classes of the model; None if it is unknown.
        ignored: Number of the pixels that do not count.
        made: Columns that skip the model.
        options: What ``map_options`` returns for the processor; None: nobody has asked it.
    """

    augment: Augment | None
    processor: Any
    column: str
    mask: str | None
    num_channels: int = 3
    num_labels: int | None = None
    ignored: int = 255
    made: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = field(default=None, compare=False)

    def mask_among(self, columns: Mapping[str, Any]) -> str | None:
        """Return the column of the masks; None if there is none."""
        if self.mask is not None:
            return self.mask if self.mask in columns else None
        return next((name for name in _MASKS if name in columns and name != self.column), None)

    def fitted(self, given: Given) -> ImagesAndMasks:
        """Return the same transform with what ``prepare_dataloaders`` knows."""
        config = config_of(given.model) if given.model is not None else None
        has_masks = self.mask_among(given.columns) is not None
        processor = image_processor(given.processor) if self.processor is None else self.processor
        is_whole, options = not processor or keeps_whole(processor), None
        if processor and (has_masks or not is_whole):
            options = map_options(processor)
        if not is_whole and not given.is_train and getattr(processor, "do_center_crop", False):
            say(
                f"the {type(processor).__name__} crops images to their centre: class maps, and the "
                "masks that they are scored by, are those of the part that the model sees. For "
                "whole images: processor.do_center_crop = False; processor.size = "
                '{"height": 512, "width": 512}'
            )
        made = (SIZE, MASK) if has_masks and not given.is_train else (SIZE,)
        return replace(
            self,
            processor=processor,
            num_channels=given.num_channels,
            num_labels=getattr(config, "num_labels", None),
            ignored=255 if given.model is None else ignored_pixel(config),
            made=made if is_whole else (*made, VIEW),
            options=options,
        )

    def __call__(self, row: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the columns of a row."""
        call = 'images_and_masks(column="...", mask="...")'
        image = opened(cell_of(row, self.column, call), self.num_channels)
        name = self.mask_among(row)
        cell = None if name is None else row[name]
        if self.augment is not None:
            given = np.full(size_of(image), self.ignored, np.int64) if cell is None else cell
            pair = augmented(self.augment, generator, image, given)
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise DataError(
                    f"augment returned a {type(pair).__name__}. Let it return both, the image and "
                    "its mask: return image, mask."
                )
            image, cell = pair[0], None if cell is None else pair[1]
        size = size_of(image)
        if cell is None:
            return {**processed(self.processor or None, image), **self._kept(image, None)}
        mask = as_map(cell)
        if mask.shape != size:
            raise DataError(
                f"An image is {size[0]} x {size[1]} pixels, and its mask {mask.shape[0]} x "
                f"{mask.shape[1]}. Give both one size, with dataset.map or in augment."
            )
        numbers = self._reduced(mask)
        return {**self._labelled(image, numbers), **self._kept(image, numbers)}

    def _labelled(self, image: Any, numbers: NDArray[np.int32]) -> dict[str, Any]:
        """Return what the model gets of an image and the classes of its pixels."""
        self._check(numbers)
        if not self.processor:
            return {**processed(None, image), "labels": torch.from_numpy(numbers.astype(np.int64))}
        options = map_options(self.processor) if self.options is None else self.options
        return with_map(self.processor, image, numbers, self.ignored, options)

    def _reduced(self, mask: NDArray[Any]) -> NDArray[np.int32]:
        """Return the classes of a mask as the processor numbers them: some leave out the first."""
        numbers = mask.astype(np.int32)
        if self.processor and getattr(self.processor, "do_reduce_labels", False):
            numbers[numbers == 0] = 255
            numbers -= 1
            numbers[numbers == 254] = 255
        return numbers

    def _check(self, mask: NDArray[np.int32]) -> None:
        """Refuse numbers that are no class.

        Raises:
            DataError: There is one.
        """
        if self.num_labels is None or not mask.size:
            return
        largest = max(self.num_labels - 1, 1)  # one output tells two classes by its sign
        if mask.min() >= 0 and (mask.max() <= largest):
            return
        is_wrong = ((mask < 0) | (mask > largest)) & (mask != self.ignored)
        if not is_wrong.any():
            return
        height, width = (int(place) for place in np.argwhere(is_wrong)[0])
        number = int(mask[height, width])
        raise DataError(
            f"The pixel in line {height}, column {width} of a mask is {number}, no class of the "
            f"model, which has num_labels={self.num_labels}, nor {self.ignored}, which its loss "
            "ignores. Correct it, or load the model with more classes: "
            f"from_pretrained(name, num_labels={number + 1}); or, if it means nothing, make "
            f"{self.ignored} of it."
        )

    def _kept(self, image: Any, numbers: NDArray[np.int32] | None) -> dict[str, Any]:
        """Return the columns that skip the model."""
        size = size_of(image)
        kept: dict[str, Any] = {SIZE: size, MASK: numbers}
        if VIEW in self.made:
            view = view_of(self.processor, size, self.options or {})
            top, bottom, left, right = view.part
            part = None if numbers is None else numbers[top:bottom, left:right]
            kept = {SIZE: (bottom - top, right - left), MASK: part, VIEW: view}
        return {name: kept[name] for name in self.made}


def upsampled(outputs: Any, batch: Batch) -> list[Any] | tuple[list[Any], list[Any]]:
    """Return a class map for each image, at the size of its mask, for ``decode=``.

    The logits are enlarged by bilinear interpolation, as ``post_process_semantic_segmentation`` of
    transformers does it. Rows without a mask get a map of the size of their image. Of images that
    the processor crops, maps are those of the part that the model sees; what it puts around images
    is left out.

    Args:
        outputs: What the model returned: ``logits`` ``(rows, classes, height, width)``.
        batch: The batch.

    Returns:
        The maps, tensors of whole numbers ``(height, width)``; and the masks beside them, where the
        batch has them at their own size. For ``"mean_iou"``.

    >>> from types import SimpleNamespace
    >>> outputs = SimpleNamespace(logits=torch.tensor([[[[0.0]], [[1.0]]]]))
    >>> upsampled(outputs, {"labels": torch.zeros(1, 1, 2)})
    [tensor([[1, 1]])]
    """
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    masks, labels = batch.get(MASK) or [], batch.get("labels")
    has_masks = len(masks) > 0 and all(mask is not None for mask in masks)
    views = batch.get(VIEW) or [None] * len(logits)
    if has_masks:
        sizes = [mask.shape for mask in masks]
    elif labels is not None:
        sizes, views = [label.shape[-2:] for label in labels], [None] * len(logits)
    else:
        sizes = batch.get(SIZE) or [batch["pixel_values"].shape[-2:]] * len(logits)
    maps = [_class_map(*of_row) for of_row in zip(logits, sizes, views, strict=True)]
    return (maps, list(masks)) if has_masks else maps


def _class_map(logits: Tensor, size: Sequence[int], view: View | None) -> Tensor:
    """Return the class of each pixel of one image; of the part that the model sees."""
    if view is not None and view.frame != (0, view.seen[0], 0, view.seen[1]):
        top, bottom, left, right = view.frame
        logits = _scaled(logits, view.seen)[:, top:bottom, left:right]
    scaled = _scaled(logits, size)
    return (scaled[0] > 0).long() if len(scaled) == 1 else scaled.argmax(0)


def _scaled(logits: Tensor, size: Sequence[int]) -> Tensor:
    return torch.nn.functional.interpolate(
        logits[None], size=tuple(size), mode="bilinear", align_corners=False
    )[0]
