"""By what a loader and its data are recognized: in a checkpoint's contract, and in one process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, SequentialSampler

from manualloop.data.sampler import num_batches
from manualloop.types import LoaderFacts, Place

_NUM_SAMPLED = 16


def fingerprint(loader: Iterable[Any]) -> dict[str, Any]:
    """Describe the data of a loader, without a call of code that may draw random numbers.

    Of the datasets of Hugging Face and of tensors sixteen rows are hashed, spread evenly, as they
    are stored. Of others the length and the class are all that is known.

    >>> fingerprint([1, 2, 3])
    {'data': 'list', 'num_batches': 3}
    """
    dataset: Any = getattr(loader, "dataset", None)
    if dataset is None:
        return {"data": type(loader).__name__, "num_batches": num_batches(loader)}
    found: dict[str, Any] = {"data": type(dataset).__name__}
    if hasattr(dataset, "__len__"):
        found["num_rows"] = len(dataset)
    if hasattr(dataset, "features"):
        found["columns"] = ", ".join(dataset.features or ())
    if (rows := _stored_rows(dataset)) is not None:
        found["rows"] = hashlib.sha256(rows).hexdigest()[:16]
    return found


def _stored_rows(dataset: Any) -> bytes | None:
    tensors = getattr(dataset, "tensors", None)
    if isinstance(tensors, tuple) and all(isinstance(tensor, Tensor) for tensor in tensors):
        return repr([tensor[sampled(len(tensor))].tolist() for tensor in tensors]).encode()
    if hasattr(dataset, "with_format") and hasattr(dataset, "select"):
        rows = dataset.with_format("arrow")[sampled(len(dataset))]
        return repr(rows.to_pylist()).encode()
    return None


def sampled(num_rows: int) -> list[int]:
    """Return at most sixteen row numbers, spread evenly.

    >>> sampled(3), len(sampled(1000))
    ([0, 1, 2], 16)
    """
    number = min(num_rows, _NUM_SAMPLED)
    return [i * (num_rows - 1) // max(number - 1, 1) for i in range(number)]


def data_digest(data: Any) -> str | None:
    """Return a digest of rows or batches as they are stored; None: nothing tells what they are.

    No code of the user's is called. Tensors, arrays, lists and tables are sampled. Of other objects
    the attributes are digested: of a dataset that wraps another, such as ``Subset``, also those of
    the other.
    """
    digest = hashlib.sha256()
    parts = 0
    for part in _parts(data, depth=0, seen=set()):
        digest.update(part)
        parts += 1
    return digest.hexdigest()[:16] if parts else None


_PLAIN = (bool, int, float, complex, str, bytes)


def _parts(value: Any, depth: int, seen: set[int]) -> Iterator[bytes]:
    """Give the plain data in an object, piece by piece."""
    if isinstance(value, _PLAIN):
        yield repr(value)[:1000].encode()
    elif isinstance(value, Tensor | np.ndarray):
        yield _of_array(value)
    elif id(value) in seen or depth > _DEPTH:
        return
    elif hasattr(value, "with_format") and hasattr(value, "select"):
        yield _stored_rows(value) or b""
    elif isinstance(value, list | tuple | range):
        seen.add(id(value))
        yield f"{type(value).__name__} {len(value)}".encode()
        for number in sampled(len(value)):
            yield from _parts(value[number], depth + 1, seen)
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for key in list(value)[:_NUM_SAMPLED]:
            yield repr(key)[:1000].encode()
            yield from _parts(value[key], depth + 1, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        seen.add(id(value))
        yield type(value).__qualname__.encode()
        for name, part in vars(value).items():
            yield name.encode()
            yield from _parts(part, depth + 1, seen)


_DEPTH = 6


def _of_array(array: Any) -> bytes:
    """Describe a tensor or an array by shape, dtype and some of its elements."""
    if isinstance(array, Tensor):
        array = array.detach()
    head = f"{tuple(array.shape)} {array.dtype}"
    if 0 in array.shape or getattr(array, "is_meta", False):
        return head.encode()
    rows = array[torch.tensor(sampled(len(array)))] if array.ndim else array
    if rows.ndim > 1:
        rows = rows.reshape(len(rows), -1)
        rows = rows[:, torch.tensor(sampled(rows.shape[1]))]
    return f"{head} {rows.tolist()}".encode()


def batch_size_of(loader: Any) -> int | None:
    """Return the rows of a loader's batches, if they have a fixed number."""
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def place_in(loader: Any, num_samples: int) -> Place:
    """Name the batch of a user's loader that begins after so many rows."""
    size = batch_size_of(loader)
    if size is None:
        return Place("a batch", lambda row: f"row {row} of a batch")
    batch = f"batch {num_samples // size}"
    if isinstance(getattr(loader, "sampler", None), SequentialSampler):
        return Place(batch, lambda row: f"{batch} (row id {num_samples + row})")
    return Place(batch, lambda row: f"row {row} of {batch}")


def row_numbers_of(loader: Any) -> Iterable[int] | None:
    """Return the dataset's numbers of the rows of a user's loader; None: nobody knows them."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader if batch_sampler is None else batch_sampler, "sampler", batch_sampler)
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return count()
    return count() if sampler is None or isinstance(sampler, SequentialSampler) else None


def facts_of(loader: Any) -> LoaderFacts:
    """Describe data and settings of a user's loader."""
    sampler, own = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    return LoaderFacts(
        fingerprint(loader),
        {
            "max_tokens": None,
            "batch_size": getattr(sampler, "batch_size", None),
            "drop_last": getattr(sampler, "drop_last", None),
            "seed": None,
            "shuffle": None if own is None else type(own).__name__,
            "num_workers": getattr(loader, "num_workers", 0),
        },
    )
