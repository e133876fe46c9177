"""Batches of any kind: their rows, copies with other entries, smaller batches, and spares.

A batch is whatever a loader gives: a mapping of columns, a list or tuple of tensors, a list of
rows, texts, a dataclass, a namespace, or an object of the user's, nested in any way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import is_dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

from manualloop.errors import ConfigError, DataError

_ARRAYS = (Tensor, np.ndarray)
_SCALARS = (str, bytes, int, float, complex, np.generic, type(None))
_WITHOUT_FIELDS = (type, nn.Module, list, tuple, *_ARRAYS, *_SCALARS)
_DEPTH = 8  # no batch is nested so deeply, and objects may refer to each other


def begin_pass(loader: Any) -> Iterator[Any]:
    """Return an iterator over the batches of a loader.

    Raises:
        ConfigError: The workers of a ``DataLoader`` are fresh processes, and what they read by
            cannot be sent to them.
    """
    try:
        return iter(loader)
    except Exception as error:  # of many classes: whatever an object of the user's raises
        if getattr(loader, "num_workers", 0) == 0 or not _NOT_SENT.search(f"{error!r}"):
            raise
        raise ConfigError(
            f"The workers of the loader are fresh processes, and its dataset or functions cannot "
            f"be sent to them: {error}. Define these outside of other functions, with def or "
            "class instead of lambda, or read without workers: num_workers=0."
        ) from error


_NOT_SENT = re.compile("[Pp]ickle|local object")


class Kept(list[Any]):
    """A column that skips the model: an entry for each row, as the dataset gives it.

    >>> Kept(["a", "b", "c"])[1:], model_inputs({"x": 1, "id": Kept(["a"])})
    (Kept(['b', 'c']), {'x': 1})
    """

    __slots__ = ()

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return Kept(found) if isinstance(place, slice) else found

    def __repr__(self) -> str:
        return f"Kept({super().__repr__()})"


def model_inputs(batch: Any) -> Any:
    """Return the columns that a model is called with: a batch without those that are kept."""
    if isinstance(batch, Mapping) and Kept in map(type, batch.values()):
        return {name: column for name, column in batch.items() if type(column) is not Kept}
    return batch


def fields_of(value: Any, *, is_whole: bool = True) -> Mapping[str, Any] | None:
    """Return the named entries of a batch, or of an entry of one; None if it has none.

    Args:
        value: A mapping, a named tuple, a dataclass, a namespace, or another object.
        is_whole: Whether it is a whole batch. Among the entries of one, an object of another class
            is followed only if it holds a tensor itself: it may be a tokenizer or a data set.
    """
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, _WITHOUT_FIELDS):
        return None
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__"))]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    found |= getattr(value, "__dict__", {})
    is_data = is_whole or is_dataclass(value) or isinstance(value, SimpleNamespace)
    if not is_data and not any(isinstance(entry, Tensor) for entry in found.values()):
        return None
    return found or None


def columns_of(batch: Any) -> Mapping[str, Any]:
    """Return the columns of a batch by name; those of a list or tuple by their number.

    >>> columns_of((1, 2))
    {'0': 1, '1': 2}
    """
    listed = batch if isinstance(batch, list | tuple) else ()
    return fields_of(batch) or {str(number): one for number, one in enumerate(listed)}


def _names(slots: Any) -> Iterable[str]:
    names = (slots,) if isinstance(slots, str) else slots or ()
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def num_rows(batch: Any) -> int:
    """Count the rows of a batch as its position in the data does.

    It is the length of the first tensor, or else of the first list. A batch that has neither counts
    as one row. ``shared_rows`` is strict instead.
    """
    is_list = isinstance(batch, list | tuple)
    values = batch.values() if isinstance(batch, Mapping) else batch if is_list else (batch,)
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]  # len() of a tensor is slow
    if is_list and not any(isinstance(entry, _ARRAYS) for entry in batch):
        return len(batch)
    return next(_lengths(batch), 1)


def shared_rows(batch: Any) -> int | None:
    """Count the rows of a batch whose tensors and lists all have one entry for each of them.

    Returns:
        The length that they share along axis 0. None if they share none, or if it is not clear
        whether a list holds rows or columns: then nothing tells how many rows there are.

    >>> import torch
    >>> shared_rows({"x": torch.zeros(4, 2), "texts": ["a", "b", "c", "d"], "scale": 0.5})
    4
    >>> shared_rows({"x": torch.zeros(4, 2), "class_weights": torch.ones(3)}) is None
    True
    """
    found = -1
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in values if isinstance(batch, Mapping | list | tuple) else (None,):
        if type(value) is not Tensor or not value.ndim:
            break  # to be looked at more closely
        if found not in (-1, length := value.shape[0]):
            return None
        found = length
    else:
        if found >= 0:
            return found
    lengths = set(_lengths(batch))
    return lengths.pop() if len(lengths) == 1 else None


def _lengths(batch: Any) -> Iterator[int]:
    """Yield the lengths along axis 0 of the columns of a batch."""
    if not isinstance(batch, list | tuple) or hasattr(batch, "_fields"):
        yield from _column_lengths(batch, 0)
    elif any(isinstance(entry, _ARRAYS) for entry in batch):
        for entry in batch:  # columns
            yield from _column_lengths(entry, 1)
    elif batch:
        yield len(batch)  # rows, as far as one can see
        if all(isinstance(entry, list | tuple) for entry in batch):
            yield from {len(entry) for entry in batch} if len({*map(len, batch)}) == 1 else ()
        elif not isinstance(batch[0], _SCALARS):
            # If all that the entries hold has one length, they may as well be groups of columns.
            inner = [length for entry in batch for length in _column_lengths(entry, 1)]
            if len(set(inner)) == 1 and not any(_has_scalar(entry) for entry in batch):
                yield inner[0]


def _column_lengths(value: Any, depth: int) -> Iterator[int]:
    if isinstance(value, _ARRAYS):
        if value.ndim:
            yield value.shape[0]
    elif isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        yield len(value)
    elif depth < _DEPTH and (fields := fields_of(value, is_whole=depth == 0)):
        for entry in fields.values():
            yield from _column_lengths(entry, depth + 1)


def _has_scalar(row: Any) -> bool:
    """Tell whether an entry holds one value, as a row does and a column does not."""
    entries = (fields_of(row) or {}).values()
    return any(isinstance(e, _SCALARS) or (isinstance(e, _ARRAYS) and not e.ndim) for e in entries)


def rebuild(batch: Any, function: Callable[[Any], Any], is_whole: bool = True) -> Any:
    """Return a copy of a batch, or of an entry of one, with a function applied to what it holds.

    What holds nothing, or nothing that the function changes, is returned as it is.
    """
    if isinstance(batch, Mapping):
        return {name: function(entry) for name, entry in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(function, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(function, batch))
    fields = fields_of(batch, is_whole=is_whole) or {}
    pairs = [(name, entry, function(entry)) for name, entry in fields.items()]
    if all(after is before for _, before, after in pairs):
        return batch
    copied = copy(batch)
    for name, _, after in pairs:
        object.__setattr__(copied, name, after)  # a dataclass may be frozen
    return copied


def split_batch(batch: Any, max_rows: int) -> list[Any]:
    """Split a batch into batches of at most ``max_rows`` rows, which keep their padding.

    Every column with one entry a row is split, whether it is a tensor or a list, also inside of
    other mappings and objects. What has another length is left whole.

    Raises:
        DataError: Nothing tells how many rows there are.

    >>> import torch
    >>> split_batch({"x": torch.tensor([1, 2, 3]), "texts": ["a", "b", "c"], "scale": 2}, 2)[1]
    {'x': tensor([3]), 'texts': ['c'], 'scale': 2}
    """
    rows = shared_rows(batch)
    if rows is None and isinstance(batch, Mapping):  # the labels tell
        rows = next(_column_lengths(batch.get("labels"), 1), None)
    if rows is None:
        lengths = ", ".join(map(str, dict.fromkeys(_lengths(batch)))) or "none"
        raise DataError(
            f"A {type(batch).__name__} cannot be split into smaller batches: nothing tells how "
            f"many rows it has (lengths along axis 0: {lengths}). Let collate_fn return a dict in "
            "which every tensor and list has one entry for each row."
        )
    if rows <= max_rows:
        return [batch]
    parts = [
        _rows_of(batch, rows, slice(start, start + max_rows)) for start in range(0, rows, max_rows)
    ]
    return [as_spare(part) for part in parts] if is_spare(batch) else parts


def _rows_of(batch: Any, rows: int, part: slice) -> Any:
    if isinstance(batch, _ARRAYS):
        return batch[part]
    is_list = isinstance(batch, list | tuple) and not hasattr(batch, "_fields")
    if is_list and not any(isinstance(entry, _ARRAYS) for entry in batch):
        return batch[part]  # a list of rows
    return rebuild(batch, partial(_part_of, rows=rows, part=part))


def _part_of(entry: Any, rows: int, part: slice) -> Any:
    if isinstance(entry, _ARRAYS):
        return entry[part] if entry.ndim and entry.shape[0] == rows else entry
    is_list = isinstance(entry, list | tuple) and not hasattr(entry, "_fields")
    if is_list and len(entry) == rows:
        return entry[part]  # of a list of another length, what it holds may have the rows
    return rebuild(entry, partial(_part_of, rows=rows, part=part), is_whole=False)


def is_plain(value: Any) -> bool:
    """Tell whether a batch consists of tensors, arrays, numbers and texts, in dicts and lists."""
    if type(value) is dict:
        return all(is_plain(entry) for entry in value.values())
    if type(value) in (list, tuple, Kept):
        return all(map(is_plain, value))
    return isinstance(value, _ARRAYS + _SCALARS)


class Spare:
    """The mark of a batch whose rows count on another rank."""

    __slots__ = ()


@cache
def _spare_class(kind: Any) -> Any:
    return type(f"Spare{kind.__name__}", (kind, Spare), {"__slots__": ()})


def as_spare(batch: Any) -> Any:
    """Mark a batch whose rows count on another rank: it has no items, whatever its labels say.

    Returns:
        A copy, whose class is a subclass of the batch's.

    Raises:
        DataError: Its class can have no subclass.
    """
    kind: Any = type(batch)
    try:
        if isinstance(batch, Tensor):
            return batch.as_subclass(_spare_class(kind))
        if isinstance(batch, tuple):
            return tuple.__new__(_spare_class(kind), batch)
        if kind in (dict, list, str):
            return _spare_class(kind)(batch)
        if isinstance(batch, SimpleNamespace):
            return _spare_class(kind)(**vars(batch))
        copied = copy(batch)
        object.__setattr__(copied, "__class__", _spare_class(kind))
        return copied
    except TypeError:
        if isinstance(batch, Mapping):
            return _spare_class(dict)(batch)
    raise DataError(
        f"The last batches of the epoch are fewer than the ranks, and a {kind.__name__} cannot be "
        "marked as one that counts elsewhere. Let collate_fn return a dict, a list, or an object "
        "of a class of yours."
    )


def is_spare(batch: Any) -> bool:
    """Tell whether ``as_spare`` has made a batch."""
    return isinstance(batch, Spare)
