"""By what a loader and its data are recognized: in a checkpoint's contract, and in one process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, SequentialSampler

from manualloop.data.sampler import num_batches
from manualloop.errors import DataError
from manualloop.internals import is_one_ranks_stream
from manualloop.randomness import find_generators
from manualloop.strategy.base import Strategy
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


def data_digest(data: Any, *, settings: bool = True) -> str | None:
    """Return a digest of rows or batches as they are stored; None: nothing tells what they are.

    No code of the user's is called. Tensors, arrays, lists and tables are sampled. Of other objects
    the attributes are digested: of a dataset that wraps another, such as ``Subset``, also those of
    the other.

    Args:
        data: A dataset, or a list of batches.
        settings: Whether attributes that are numbers or texts count, such as a path or a seed.
    """
    if isinstance(data, Iterator):
        return None
    digest = hashlib.sha256()
    for part in _parts(data, depth=0, seen=set(), settings=settings):
        digest.update(part)
    return digest.hexdigest()[:16]


def digest_of(facts: LoaderFacts, loader: Any) -> str:
    """Return a digest of a loader's data, by which another process recognizes it."""
    contents = data_digest(loader) if isinstance(loader, list | tuple) else None
    return hashlib.sha256(repr((facts.same, contents)).encode()).hexdigest()[:16]


class Identity(NamedTuple):
    """By what a loader that was built again is recognized in the same process.

    Attributes:
        data: The dataset, or the loader itself.
        digest: Digest of the data; None: nothing tells what they are.
        settings: Settings of the loader and the seeds of its generators.
    """

    data: Any
    digest: str | None
    settings: str

    def matches(self, other: Identity) -> bool:
        """Tell whether two loaders give the same rows in the same order."""
        has_same_data = self.digest is not None and self.digest == other.digest
        return (has_same_data or self.data is other.data) and self.settings == other.settings


def identify(loader: Any, facts: LoaderFacts) -> Identity:
    """Return by what a loader is recognized."""
    data = getattr(loader, "dataset", loader)
    generators = find_generators(loader=loader)
    seeds = {path: g.initial_seed() for path, g in generators.items() if hasattr(g, "initial_seed")}
    collate: Any = getattr(loader, "collate_fn", None)
    name = getattr(collate, "__qualname__", type(collate).__qualname__)
    settings = repr((type(loader).__qualname__, facts.exact, seeds, name))
    return Identity(data, data_digest(data), settings)


def require_same_data(loader: Any, facts: LoaderFacts, strategy: Strategy) -> None:
    """Refuse ranks whose loaders read different rows: they were sharded before.

    Call on every rank.

    Raises:
        DataError: On every rank.
    """
    digest = data_digest(getattr(loader, "dataset", loader), settings=False)
    found = strategy.gather((facts.same, digest))
    if all(of_rank == found[0] for of_rank in found):
        return
    rows = [same.get("num_rows", same.get("num_batches")) for same, _ in found]
    raise DataError(
        f"The {len(rows)} ranks have loaders of different rows ({', '.join(map(str, rows))} of "
        "them): they were split by rank before, and the library would split them again and leave "
        "most of them out. Give every rank a loader of all rows, without split_dataset_by_node, "
        "shard() or a Subset by rank: each row is then used once, on one of the ranks."
    )


_PLAIN = (bool, int, float, complex, str, bytes)


def _parts(value: Any, depth: int, seen: set[int], settings: bool) -> Iterator[bytes]:
    """Give the plain data in an object, piece by piece."""
    if value is None or isinstance(value, _PLAIN):
        yield repr(value)[:1000].encode()
    elif isinstance(value, Tensor | np.ndarray):
        yield _of_array(value)
    elif id(value) in seen or depth > _DEPTH:
        return
    elif hasattr(value, "with_format") and hasattr(value, "select"):
        yield _stored_rows(value) or b""
    elif isinstance(value, list | tuple | range):
        seen.add(id(value))
        base: Any = next(base for base in (list, tuple, range) if isinstance(value, base))
        size = base.__len__(value)  # a subclass may count, or give, something else
        yield f"{type(value).__name__} {size}".encode()
        for number in sampled(size):
            yield from _parts(base.__getitem__(value, number), depth + 1, seen, settings)
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for key in list(value)[:_NUM_SAMPLED]:
            yield repr(key)[:1000].encode()
            yield from _parts(value[key], depth + 1, seen, settings)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        seen.add(id(value))
        yield type(value).__qualname__.encode()
        for name, part in vars(value).items():
            if settings or not isinstance(part, _PLAIN):
                yield name.encode()
                yield from _parts(part, depth + 1, seen, settings)


_DEPTH = 20


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
    batch_sampler, dataset = (
        getattr(loader, "batch_sampler", None),
        getattr(loader, "dataset", None),
    )
    sampler = getattr(loader if batch_sampler is None else batch_sampler, "sampler", batch_sampler)
    if isinstance(dataset, IterableDataset):
        num_workers = min(loader.num_workers, getattr(dataset, "num_shards", loader.num_workers))
        return count() if num_workers <= 1 and not is_one_ranks_stream(dataset) else None
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
