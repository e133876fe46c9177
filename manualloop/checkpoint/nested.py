"""Nested state as JSON and tensors, and back: no code is run, and nothing guessed.

A ``state_dict`` is a nest of dicts, lists and numbers with tensors in it. ``take_apart`` puts the
tensors aside, under the path at which they stood, and returns the rest as JSON; ``put_together`` is
its inverse, to the last bit and the last type. Whatever JSON does not have is a list that begins
with its tag: ``["tuple", 1, 2]``.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manualloop.batches import Kept
from manualloop.checkpoint.files import TOO_LARGE
from manualloop.errors import CheckpointError


def take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nest as JSON; its tensors go into ``tensors``.

    Args:
        value: Of dicts, lists, tuples, sets, numbers, strings, bytes, None, tensors, and arrays.
        path: Names the value, in messages and as the beginning of its tensors' names.
        tensors: Filled.

    Raises:
        CheckpointError: It holds anything else, which the message names by its path.

    >>> tensors = {}
    >>> take_apart({"step": 3, "betas": (0.9, 0.999), "mean": torch.ones(2)}, "adam", tensors)
    {'step': 3, 'betas': ['tuple', 0.9, 0.999], 'mean': ['tensor', 'adam.mean']}
    >>> tensors
    {'adam.mean': tensor([1., 1.])}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int and abs(value) < TOO_LARGE:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else ["float", repr(value)]
    if isinstance(value, Tensor):
        return ["tensor", _put_aside(value.detach(), path, tensors)]
    if type(value) is np.ndarray and _is_number(value.dtype):  # a masked one would lose its mask
        return ["array", _put_aside(_as_tensor(value), path, tensors), value.dtype.str]
    if isinstance(value, np.generic) and _is_number(value.dtype):
        return ["scalar", take_apart(value.item(), path, tensors), value.dtype.str]
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, torch.dtype | torch.device):
        return [type(value).__name__, str(value).removeprefix("torch.")]
    if isinstance(value, Mapping) and type(value) in _MAPPINGS:
        return _take_mapping_apart(value, path, tensors)
    if type(value) in _SEQUENCES:
        parts = [take_apart(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
        return [_SEQUENCES[type(value)], *parts]
    raise CheckpointError(
        f"{path} holds a {type(value).__name__}, which cannot be saved: a checkpoint is tensors "
        "and JSON, so that loading one never runs code. Let its state_dict() return numbers, "
        "strings, lists, dicts and tensors."
    )


def _put_aside(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    # {"a.b": x, "a": {"b": y}} has one path for two tensors, and {1: x, "1": y} too.
    name, number = path, 2
    while name in tensors:
        name, number = f"{path} ({number})", number + 1
    tensors[name] = tensor
    return name


def _take_mapping_apart(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: take_apart(v, f"{path}.{key}", tensors) for key, v in value.items()}
    pairs = [
        [take_apart(key, f"{path} key", tensors), take_apart(v, f"{path}.{key}", tensors)]
        for key, v in value.items()
    ]
    return [_MAPPINGS[type(value)], *pairs]


def put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the nest that ``take_apart`` took apart.

    Args:
        value: The JSON.
        tensors: Its tensors by name; those that are used are removed, because each has one place.

    Raises:
        CheckpointError: It is not one of those, or a tensor is missing or used twice.

    >>> put_together({"betas": ["tuple", 0.9, 0.999]}, {})
    {'betas': (0.9, 0.999)}
    """
    if isinstance(value, dict):
        return {key: put_together(v, tensors) for key, v in value.items()}
    if not isinstance(value, list):
        return value
    try:
        return _put_list_together(value, tensors)
    except UNREADABLE as error:
        raise CheckpointError(f"The saved state cannot be read: {value!r:.80}.") from error


def _put_list_together(value: list[Any], tensors: dict[str, Tensor]) -> Any:
    tag, *parts = value
    if tag == "tensor":
        return tensors.pop(parts[0])
    if tag == "array":
        return _as_array(tensors.pop(parts[0]), _number_type(parts[1]))
    if tag == "scalar":
        number = put_together(parts[0], tensors)
        if not isinstance(number, bool | int | float):
            raise ValueError(f"a {type(number).__name__} as a scalar")
        return _number_type(parts[1]).type(number)
    if tag == "float":
        return float(parts[0])
    if tag == "bytes":
        return base64.b64decode(parts[0], validate=True)
    if tag == "dtype":
        return _DTYPES[parts[0]]
    if tag == "device":
        return torch.device(parts[0])
    if tag in _MAPPING_OF:
        pairs = [(put_together(k, tensors), put_together(v, tensors)) for k, v in parts]
        return _MAPPING_OF[tag](pairs)
    return _SEQUENCE_OF[tag]([put_together(part, tensors) for part in parts])


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8  # no longer doubles: torch has none


def _number_type(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if not _is_number(dtype):
        raise ValueError(f"{text!r} is not a type of numbers")
    return dtype


def _as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    # torch has few unsigned types; the bytes are what counts, and the dtype is kept beside them.
    # A copy, which is contiguous and may be written to.
    copy = np.array(array, order="C")
    return torch.from_numpy(copy.view(f"i{copy.dtype.itemsize}"))


def _as_array(tensor: Tensor, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    numbers: np.ndarray[Any, Any] = tensor.numpy()
    if numbers.dtype != np.dtype(f"i{dtype.itemsize}"):
        raise ValueError(f"{dtype} was not saved as {numbers.dtype}")
    return numbers.view(dtype)


# RuntimeError: of torch.device. SyntaxError: of np.dtype.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_SEQUENCES: dict[Any, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    torch.Size: "size",
    Kept: "kept",  # in batches of a stream that were read ahead
}
_SEQUENCE_OF: dict[str, Any] = {name: kind for kind, name in _SEQUENCES.items()}
# A defaultdict is saved as a dict: what it makes of missing keys is code.
_MAPPINGS: dict[Any, str] = {
    dict: "dict",
    defaultdict: "dict",
    OrderedDict: "ordered",
    Counter: "counter",
}
_MAPPING_OF: dict[str, Any] = {
    "dict": dict,
    "ordered": OrderedDict,
    "counter": lambda p: Counter(dict(p)),
}
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}


_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TAGS = ("float", "list", "str")


def as_json(value: Any) -> Any:
    """Return a record of numbers, texts, lists and dicts as JSON that people read, too.

    What ``from_json`` would take for something else is a tagged list, as above: ``["float",
    "nan"]``. Arrays and tensors become lists, tuples too; anything else becomes a text.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [as_json(item) for item in value]
        return ["list", *items] if items and items[0] in _TAGS else items
    if isinstance(value, float) and not math.isfinite(value):
        return ["float", repr(float(value))]
    text = value if isinstance(value, str | int | float | None) else str(value)
    return ["str", text] if isinstance(text, str) and text in _NON_FINITE else text


def from_json(value: Any) -> Any:
    """Return the record that ``as_json`` was given. Release 0.1.0 wrote "nan" for NaN.

    >>> from_json(as_json({"loss": math.inf, "names": ["float", "nan"]}))
    {'loss': inf, 'names': ['float', 'nan']}
    """
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        tag, *items = value or [None]
        if tag in ("float", "str") and len(items) == 1 and isinstance(items[0], str):
            return _NON_FINITE.get(items[0], items[0]) if tag == "float" else items[0]
        return [from_json(item) for item in (items if tag == "list" else value)]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
