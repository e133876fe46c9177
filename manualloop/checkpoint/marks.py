"""Marks of values: equal as long as nothing has changed a value, as far as can be told cheaply."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from hashlib import blake2b
from inspect import GEN_CREATED, getgeneratorstate
from itertools import chain, count, cycle, islice
from operator import length_hint
from types import GeneratorType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from manualloop.internals import iterator_of_loaders, num_given
from manualloop.objects import NAMESPACES, is_of_library

_MOST_ENTRIES, _MOST_LEVELS = 5_000, 4
MOST_BYTES = 100_000_000
"""Size of the largest value that is read, and of the largest that is saved beside the weights."""


_Key = TypeVar("_Key")


def marks_of(values: Mapping[_Key, Any]) -> dict[_Key, Any]:
    """Return the mark of each value: see ``mark_of``."""
    return {key: mark_of(value) for key, value in values.items()}


def mark_of(value: Any) -> Any:
    """Return what differs once a value is replaced, or changed in place as far as can be told.

    Containers and objects of the script's own classes are looked into, up to so many entries; other
    objects are marked by themselves.
    """
    budget = iter(range(_MOST_ENTRIES))

    def mark(value: Any, level: int) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return type(value), repr(value)  # NaN is itself
        if isinstance(value, Tensor | np.ndarray):
            return (_digest(value) if can_be_read(value) else None) or _Same(value)
        if level == _MOST_LEVELS:
            return _Same(value)
        if isinstance(value, list | tuple | set | deque):
            marks = [mark(entry, level + 1) for entry, _ in zip(value, budget, strict=False)]
            return type(value), len(value), marks
        if isinstance(value, dict):
            return _Same(type(value)), len(value), pairs(value, level)
        if isinstance(value, PLACES):
            return _Same(value), _place(value)
        names, kind = getattr(value, "__dict__", None), type(value)
        if isinstance(names, dict) and (kind in NAMESPACES or not is_of_library(kind.__module__)):
            return _Same(value), pairs(names, level)
        return _Same(value)

    def pairs(values: dict[Any, Any], level: int) -> list[Any]:
        some = list(zip(values.items(), budget, strict=False))
        return [(key, mark(entry, level + 1)) for (key, entry), _ in some]

    return mark(value, 0)


PLACES: tuple[type, ...] = (
    *(iterator_of_loaders(), GeneratorType, count, cycle, chain, islice, zip, map, filter),
    *(enumerate, type(iter([])), type(iter(())), type(iter(range(0))), type(iter({}))),
)
"""Iterators of torch and of Python, which know a place that no checkpoint holds."""


def _place(iterator: Any) -> Any:
    """Return what differs once an iterator is advanced, without a step of it."""
    if (num_batches := num_given(iterator)) is not None:
        return num_batches
    if isinstance(iterator, count):
        return repr(iterator)
    if isinstance(iterator, GeneratorType) and getgeneratorstate(iterator) == GEN_CREATED:
        return GEN_CREATED
    left = length_hint(iterator, -1)
    return left if left >= 0 else object()  # nothing tells it: it may have been advanced


def _digest(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, blake2b(value.tobytes()).digest()
    data = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
    content = data.view(torch.uint8).numpy().tobytes() if data.numel() else b""
    return value.dtype, value.shape, blake2b(content).digest()


def can_be_read(value: Any) -> bool:
    """Tell whether all numbers of a tensor or an array are looked at."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc" and value.nbytes <= MOST_BYTES
    # Weights are of another class, and are in the state_dict.
    is_plain = value.layout is torch.strided and not value.is_quantized and not value.is_meta
    return is_plain and type(value) is Tensor and value.nbytes <= MOST_BYTES


class _Same:
    """Is equal to another of the very same object, which it keeps."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]
