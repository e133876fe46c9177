"""Pictures of a batch: its images with classes, masks and boxes drawn, small enough for a notebook.

They are made of the tensors that the model gets, so a mask or a box that is wrong is seen.
"""

from __future__ import annotations

import colorsys
import io
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_NUM_SHOWN = 4
_SIDE = 192  # pixels of the longer side of a picture
_NUM_NAMED = 6
_IGNORED = (80, 80, 80)

Array = NDArray[Any]


class Part(NamedTuple):
    """A class that occurs in an image.

    Attributes:
        number: Its number; None for pixels that do not count.
        words: Its name, and where or how much of it there is.
    """

    number: int | None
    words: str


class Picture(NamedTuple):
    """One image of a batch.

    Attributes:
        place: Number of the row in the batch.
        size: Height and width of the image, without padding.
        num_channels: Number of its channels.
        least: Smallest number that the model gets.
        most: Largest one.
        parts: The classes that occur in it.
        png: The picture, as the bytes of a PNG file.
    """

    place: int
    size: tuple[int, int]
    num_channels: int
    least: float
    most: float
    parts: tuple[Part, ...]
    png: bytes

    @property
    def line(self) -> str:
        """The image in words."""
        height, width = self.size
        text = f"{height} x {width}, {self.num_channels} channels, {self.least:.2f} to "
        text += f"{self.most:.2f}"
        return f"{text}  ->  {', '.join(self._named())}" if self.parts else text

    def _named(self) -> Iterator[str]:
        yield from (part.words for part in self.parts[:_NUM_NAMED])
        if (more := len(self.parts) - _NUM_NAMED) > 0:
            yield f"{more} more"

    def html(self) -> str:
        """Return the picture with the names of its classes in their colours."""
        data = b64encode(self.png).decode()
        names = "".join(
            f'<div><span style="color: rgb{colour_of(part.number)}">&#9632;</span> '
            f"{escape(part.words)}</div>"
            for part in self.parts[:_NUM_NAMED]
        )
        more = len(self.parts) - _NUM_NAMED
        names += f"<div>{more} more</div>" if more > 0 else ""
        return (
            '<figure style="display: inline-block; margin: 4px; vertical-align: top">'
            f'<img src="data:image/png;base64,{data}" alt="row {self.place}">'
            f'<figcaption style="font-size: small">row {self.place}{names}</figcaption></figure>'
        )


def colour_of(number: int | None) -> tuple[int, int, int]:
    """Return the colour of a class, which is far from those of the numbers beside it.

    >>> colour_of(0), colour_of(1), colour_of(None)
    ((230, 50, 50), (50, 103, 230), (80, 80, 80))
    """
    if number is None:
        return _IGNORED
    red, green, blue = colorsys.hsv_to_rgb(number * 0.6180339887 % 1, 0.78, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def pictures_of(
    batch: Mapping[str, Any], processor: Any, names: Sequence[str] | None
) -> tuple[Picture, ...]:
    """Draw the first images of a batch; none if it has no images, or PIL is not installed.

    Args:
        batch: A batch with ``pixel_values``, ``(rows, channels, height, width)``.
        processor: The image processor, which tells how to undo its normalisation; None: the numbers
            of an image are spread from black to white.
        names: Names of the classes; None: numbers are shown.
    """
    images = batch.get("pixel_values")
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3, 4):
        return ()
    try:
        import PIL  # noqa: F401
    except ImportError:
        return ()
    masks, labels = batch.get("pixel_mask"), batch.get("labels")
    found = []
    for place in range(min(len(images), _NUM_SHOWN)):
        image = images[place].detach().float().cpu()
        size = image.shape[-2:] if masks is None else _size_of(masks[place])
        label = None if labels is None else labels[place]
        inside = image[:, : size[0], : size[1]]
        parts = tuple(_parts(label, names))
        found.append(
            Picture(
                place,
                (int(size[0]), int(size[1])),
                len(image),
                float(inside.min()),
                float(inside.max()),
                parts,
                _png(_seen(image, processor), label, tuple(size), names),
            )
        )
    return tuple(found)


def _size_of(mask: Tensor) -> tuple[int, int]:
    return int(mask.any(1).sum()), int(mask.any(0).sum())


def _seen(image: Tensor, processor: Any) -> Array:
    """Return the image as it was before its numbers were normalised, uint8 ``(h, w, 3)``."""
    array = image.numpy().transpose(1, 2, 0)
    mean, std = (getattr(processor, f"image_{name}", None) for name in ("mean", "std"))
    is_normalized = bool(getattr(processor, "do_normalize", False))
    if is_normalized and mean is not None and len(mean) == array.shape[-1]:
        array = array * np.asarray(std) + np.asarray(mean)
    elif array.size and (array.min() < 0 or array.max() > 1):
        array = (array - array.min()) / max(float(array.max() - array.min()), 1e-12)
    array = np.round(array.clip(0, 1) * 255).astype(np.uint8)
    return array[..., :3] if array.shape[-1] >= 3 else np.repeat(array, 3, -1)


def _parts(label: Any, names: Sequence[str] | None) -> Iterator[Part]:
    """Give the classes of an image: its own, those of its pixels, or those of its boxes."""
    if isinstance(label, Mapping):
        boxes = _corners(label)
        for number, (left, top, right, bottom) in zip(
            label["class_labels"].tolist(), boxes.tolist(), strict=True
        ):
            words = f"{_name(number, names)} ({left:.0f}, {top:.0f}) to ({right:.0f}, {bottom:.0f})"
            yield Part(number, words)
    elif isinstance(label, Tensor) and label.ndim == 2:
        numbers, counts = np.unique(label.cpu().numpy(), return_counts=True)
        for place in np.argsort(-counts, kind="stable").tolist():
            number, share = int(numbers[place]), counts[place] / label.numel()
            is_ignored = _is_ignored(number, names)
            name = "ignored" if is_ignored else _name(number, names)
            yield Part(None if is_ignored else number, f"{name} {share:.0%}")
    elif isinstance(label, Tensor) and label.ndim == 1 and label.is_floating_point():
        yield from (Part(n, _name(n, names)) for n, one in enumerate(label.tolist()) if one > 0.5)
    elif isinstance(label, Tensor) and label.ndim == 0:
        number = label.item()
        if isinstance(number, int):
            yield Part(number, _name(number, names))
        else:
            yield Part(None, f"{number:g}")


def _is_ignored(number: int, names: Sequence[str] | None) -> bool:
    return number < 0 or (number == 255 and (names is None or len(names) <= 255))


def _name(number: Any, names: Sequence[str] | None) -> str:
    return names[number] if names is not None and 0 <= number < len(names) else str(number)


def _corners(label: Mapping[str, Any]) -> Array:
    """Return the boxes that the model is trained on in pixels of what it sees."""
    boxes = label["boxes"].double().cpu().numpy()
    height, width = label["size"].tolist() if "size" in label else (1, 1)
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    return np.asarray(corners * (width, height, width, height))


def _png(image: Array, label: Any, size: tuple[int, ...], names: Sequence[str] | None) -> bytes:
    """Return the picture of an image with what its label says, as a PNG file."""
    from PIL import Image, ImageDraw

    if isinstance(label, Tensor) and label.ndim == 2:
        image = _coloured(image, label.cpu().numpy(), names)
    image = np.ascontiguousarray(image[: size[0], : size[1]])
    scale = _SIDE / max(image.shape[:2])
    width, height = (max(round(side * scale), 1) for side in (image.shape[1], image.shape[0]))
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    picture = Image.fromarray(image).resize((width, height), way)
    if isinstance(label, Mapping):
        drawing = ImageDraw.Draw(picture)
        numbers = label["class_labels"].tolist()
        for number, corners in zip(numbers, (_corners(label) * scale).tolist(), strict=True):
            drawing.rectangle(corners, outline=colour_of(number), width=2)
        for number, corners in zip(numbers, (_corners(label) * scale).tolist(), strict=True):
            name, (left, top) = _name(number, names), (max(corners[0], 0), max(corners[1], 0))
            drawing.rectangle(drawing.textbbox((left + 2, top), name), fill=colour_of(number))
            drawing.text((left + 2, top), name, fill=(255, 255, 255))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _coloured(image: Array, mask: Array, names: Sequence[str] | None) -> Array:
    """Return an image with the colours of a mask laid over it; pixels that do not count go dark."""
    if mask.shape != image.shape[:2]:
        rows = np.arange(image.shape[0]) * mask.shape[0] // image.shape[0]
        columns = np.arange(image.shape[1]) * mask.shape[1] // image.shape[1]
        mask = mask[rows][:, columns]
    colours = np.zeros((*mask.shape, 3))
    for number in np.unique(mask).tolist():
        colours[mask == number] = colour_of(None if _is_ignored(number, names) else number)
    mixed: Array = np.round(image * 0.45 + colours * 0.55).astype(np.uint8)
    return mixed
