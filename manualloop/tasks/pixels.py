"""Images on their way to a model: opened, augmented, and turned into tensors by a processor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from manualloop.errors import ConfigError, DataError
from manualloop.models import config_of

Augment: TypeAlias = "Callable[..., Any]"
"""The user's function: of an image and a ``torch.Generator``, or of an image alone."""

SIZE = "image_size"
"""Column with height and width of each image, in pixels, as predictions are to be scaled."""

_CHANNELS = (1, 3, 4)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Given(NamedTuple):
    """What ``prepare_dataloaders`` knows, and a transform of rows asks for.

    Attributes:
        processor: The image processor; None if there is none.
        model: The model; None if it is unknown.
        names: Names of the classes by number; None if they have none.
        here: Names of the classes as this split numbers them; None if it has none.
        is_train: Whether the split is there to be trained on.
        columns: Kind of each column of the split, by its name.
    """

    processor: Any
    model: nn.Module | None
    names: tuple[str, ...] | None = None
    here: tuple[str, ...] | None = None
    is_train: bool = True
    columns: Mapping[str, str] = MappingProxyType({})

    @property
    def num_channels(self) -> int:
        """The number of channels of the images that the model takes."""
        found = getattr(config_of(self.model), "num_channels", 3) if self.model is not None else 3
        return found if found in _CHANNELS else 3


def image_processor(processor: Any) -> Any:
    """Return the image processor that an object is or holds; None if it is or holds none.

    >>> image_processor(len) is None
    True
    """
    for value in (processor, getattr(processor, "image_processor", None)):
        inputs = getattr(value, "model_input_names", None) or [""]
        if callable(value) and not hasattr(value, "pad_token") and inputs[0] == "pixel_values":
            return value
    return None


def processor_among(*arguments: Any) -> tuple[Any, Any]:
    """Return the image processor among two arguments, and the other one."""
    found = [image_processor(argument) for argument in arguments]
    processor = next((one for one in found if one is not None), None)
    others = [a for a, one in zip(arguments, found, strict=True) if one is None and a is not None]
    if len(others) > 1 or any(not callable(other) for other in others):
        names = " and ".join(f"a {type(other).__name__}" for other in others)
        raise ConfigError(
            f"Got {names}, where an image processor of transformers is wanted, or a function of an "
            "image and a generator: images(augment), boxes(processor, augment)."
        )
    return processor, others[0] if others else None


def cell_of(row: Mapping[str, Any], column: str, call: str) -> Any:
    """Return a cell of a row.

    Args:
        row: The row.
        column: Name of the column.
        call: The call that names another one, for the message.

    Raises:
        DataError: The row has no such column, or nothing in it.
    """
    if row.get(column) is None:
        found = "None in" if column in row else "no"
        raise DataError(
            f"The row has {found} column {column!r}. Its columns: {', '.join(row)}. Name another "
            f"one: {call}."
        )
    return row[column]


def opened(cell: Any, num_channels: int) -> Any:
    """Return an image of a dataset with the channels that the model takes.

    Args:
        cell: An image of PIL, an array, a tensor, or nested lists of numbers.
        num_channels: Number of channels: 1, 3 or 4.

    Returns:
        An image of PIL as one in its mode; anything else as an array or a tensor.

    Raises:
        DataError: It is the path of an image, or the bytes of one, or has more than 8 bits.
    """
    if isinstance(cell, str | bytes | Mapping):
        raise DataError(
            f"An image is a {type(cell).__name__}, not an image. Let the dataset open it: "
            'dataset.cast_column("image", datasets.Image()).'
        )
    if is_pil(cell):
        mode = _MODES[num_channels]
        if cell.mode != mode and (cell.mode in ("I", "F") or cell.mode.startswith("I;")):
            raise DataError(
                f"An image has the mode {cell.mode!r} of PIL, more than 8 bits, which would be cut "
                "off. Make an image of 8 bits of it before: dataset.map, with numbers from 0 to "
                "255."
            )
        return cell if cell.mode == mode else cell.convert(mode)
    image = cell if isinstance(cell, Tensor) else np.asarray(cell)
    if image.ndim == 2 and num_channels > 1:
        stack: Any = torch.stack if isinstance(image, Tensor) else np.stack
        return stack([image] * num_channels)
    return image


def is_pil(image: Any) -> bool:
    """Tell whether an object is an image of PIL."""
    return any(kind.__module__ == "PIL.Image" for kind in type(image).__mro__)


def augmented(augment: Augment, generator: torch.Generator, *inputs: Any) -> Any:
    """Call the user's function, with the generator if it takes one beside the inputs."""
    call: Any = augment.forward if isinstance(augment, nn.Module) else augment
    try:
        parameters = inspect.signature(call).parameters
    except ValueError:  # of a function that is written in C
        return augment(*inputs)
    if "generator" in parameters:
        return augment(*inputs, generator=generator)
    needed = [p for p in parameters.values() if p.kind in _POSITIONAL and p.default is p.empty]
    return augment(*inputs, generator) if len(needed) > len(inputs) else augment(*inputs)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def size_of(image: Any) -> tuple[int, int]:
    """Return height and width of an image."""
    if is_pil(image):
        return int(image.height), int(image.width)
    shape = tuple(image.shape)
    if len(shape) == 2:
        return shape[0], shape[1]
    return shape[1:] if _is_first(image) else shape[:2]


def _is_first(image: Any) -> bool:
    """Tell whether the channels are the first axis: of a tensor if they may be, else if not last.

    Tensors have them first by custom, arrays last.
    """
    first, last = image.shape[0] in _CHANNELS, image.shape[-1] in _CHANNELS
    return first if isinstance(image, Tensor) else first and not last


def processed(processor: Any, image: Any, **more: Any) -> dict[str, Any]:
    """Return what a processor makes of one image, or the image itself if there is no processor.

    Args:
        processor: An image processor; None: the image is what the model gets.
        image: The image, as the user's function returned it.
        more: Further arguments of the processor.

    Raises:
        DataError: The processor cannot read the image, or there is none for an unfinished image.
    """
    if processor is None:
        return {"pixel_values": _finished(image)}
    image, options = _readable(image)
    try:
        made = processor(image, return_tensors="pt", **options, **more)
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"The {type(processor).__name__} cannot read {_shown(image)}: {error!s:.200}"
        ) from error
    return {name: column[0] for name, column in made.items()}


def _finished(image: Any) -> Tensor:
    is_array = isinstance(image, Tensor | np.ndarray)
    tensor = torch.as_tensor(image) if is_array else torch.empty(0, dtype=torch.uint8)
    if not tensor.is_floating_point():
        raise DataError(
            f"There is no processor, and the transform made {_shown(image)}, not a tensor of "
            "floats. Pass the processor: prepare_dataloaders(dataset, processor); or let augment "
            "return what the model takes, float32 (channels, height, width)."
        )
    return tensor


def _readable(image: Any) -> tuple[Any, dict[str, Any]]:
    """Return an image as a processor reads it, and the arguments that tell how.

    A processor divides by 255, whatever the numbers are.
    """
    if is_pil(image):
        if image.mode == "L":  # transformers 4 does not read a gray image without its channel
            # A copy: newer torch warns about arrays that cannot be written to.
            return np.array(image)[..., None], {"input_data_format": "channels_last"}
        return image, {}
    if not isinstance(image, Tensor | np.ndarray):
        raise DataError(
            f"augment returned a {type(image).__name__}, not an image: one of PIL, an array or a "
            "tensor."
        )
    image = image[None] if image.ndim == 2 else image
    if str(image.dtype).endswith("bool"):  # black and white
        image = image * np.uint8(255) if isinstance(image, np.ndarray) else image.byte() * 255
    layout = {"input_data_format": "channels_first" if _is_first(image) else "channels_last"}
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    least, most = (array.min(), array.max()) if array.size else (0, 0)
    if array.dtype.kind in "biu" and least >= 0 and most <= 255:
        return array.astype(np.uint8), layout
    if array.dtype.kind == "f" and least >= 0 and most <= 1:
        return array.astype(np.float32), {**layout, "do_rescale": False}
    raise DataError(
        f"An image has numbers of {array.dtype} from {least} to {most}. A processor wants whole "
        "ones from 0 to 255, or floats from 0 to 1. Let augment return such an image; or, if the "
        "model shall get these numbers, leave the processor out: processor=False."
    )


def _shown(image: Any) -> str:
    if is_pil(image):
        return f"an image of mode {image.mode} and size {image.size}"
    if isinstance(image, Tensor | np.ndarray):
        return f"a {type(image).__name__} of {image.dtype} {tuple(image.shape)}"
    return f"a {type(image).__name__}"


def sides_of_frame(made: Mapping[str, Any], size: tuple[int, int]) -> tuple[float, float]:
    """Return the size of what the model sees, in pixels of the image: with the padding around it.

    Boxes are fractions of what the model sees. An image that the processor pads is a part of it.

    Args:
        made: What the processor made of the image.
        size: Height and width of the image.
    """
    mask = made.get("pixel_mask")
    if mask is None or bool(mask.all()):
        return size
    height, width = mask.shape
    inside = int(mask[:, 0].sum()), int(mask[0].sum())
    return size[0] * height / inside[0], size[1] * width / inside[1]


def as_map(mask: Any) -> NDArray[Any]:
    """Return a mask as an array of class numbers ``(height, width)``.

    Raises:
        DataError: It has several channels, or holds no whole numbers.
    """
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.dtype.kind == "f" and (array == np.round(array)).all():
        array = array.astype(np.int64)
    if array.ndim != 2 or array.dtype.kind not in "biu":
        raise DataError(
            f"A mask is {_shown(mask)}, not a map of class numbers (height, width). If it has "
            "colours, make numbers of them before, with dataset.map."
        )
    return array.astype(np.uint8) if array.dtype.kind == "b" else array


def class_numbers(here: Sequence[str], names: Sequence[str], what: str) -> tuple[int, ...] | None:
    """Return the number of each class of a split; None if they are those that it has.

    Raises:
        DataError: A class of the split is not among the names.
    """
    if missing := [name for name in here if name not in names]:
        raise DataError(
            f"{what} has the class {missing[0]!r}, which is not one of the model's or of the "
            f"training split's: {', '.join(names[:10])}. Name classes alike, or load the model "
            "with these: from_pretrained(name, id2label={...})."
        )
    numbers = tuple(names.index(name) for name in here)
    return None if numbers == tuple(range(len(numbers))) else numbers
