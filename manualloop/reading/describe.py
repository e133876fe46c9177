"""By what a loader and its data are recognized: in a checkpoint's contract, and in one process."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, SequentialSampler

from manualloop.data.kept import inner_collate, trained_data
from manualloop.data.labels import origin_of
from manualloop.data.sampler import OrderedBatchSampler, num_batches, packs_rows
from manualloop.data.transform import transform_of
from manualloop.errors import DataError
from manualloop.internals import stored_table
from manualloop.notices import say
from manualloop.passing import is_clock, without_root
from manualloop.randomness import find_generators, seed_of
from manualloop.reading.ranks import part_of
from manualloop.strategy.base import Strategy
from manualloop.types import LoaderFacts, Place, SplitNotes

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
    dataset = trained_data(loader)
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


def all_facts(source: Any) -> LoaderFacts:
    """Return the facts about a loader, with a digest of all its rows, for the contract of a run.

    Of datasets of Hugging Face, of ``TensorDataset`` and of lists the digest tells the data. Of
    other datasets it covers the tensors, arrays and lists among their attributes, which may be
    others in the same data, so that a difference is not refused.
    """
    facts: LoaderFacts = source.facts
    same, exact = dict(facts.same), dict(facts.exact)
    data: Any = trained_data(source.loader)
    if isinstance(data, list | tuple) or _stored_rows(data) is not None:
        same["all rows"] = rows_digest(data)
    else:
        exact["contents of the dataset"] = _first_digest(data)
    if source.kind != "prepared":  # whose order is a function of its seed
        samplers = (getattr(source.loader, name, None) for name in ("sampler", "batch_sampler"))
        exact["contents of the sampler"] = ", ".join(
            _first_digest([p for name, p in vars(s).items() if name not in _DATA], owner=s) or ""
            for s in samplers
            if hasattr(s, "__dict__")
        )
        generators = find_generators(loader=source.loader)
        exact["seeds"] = {path: seed_of(generator) for path, generator in generators.items()}
    return facts._replace(same=same, exact=exact)


_DATA = ("data_source", "sampler", "dataset")


# By object: as it was when it was first used. Reading may fill caches in it.
_first_digests: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def _first_digest(data: Any, owner: Any = None) -> str | None:
    owner = data if owner is None else owner
    if isinstance(owner, Tensor):  # two of them are not equal or unequal
        return rows_digest(data)
    try:
        if owner not in _first_digests:
            _first_digests[owner] = rows_digest(data)
        return _first_digests[owner]
    except TypeError:  # it has no hash, or cannot be referred to weakly
        return rows_digest(data)


def digests_of_loaders(values: Iterable[Any]) -> list[str | None]:
    """Return digests of the rows of those values that are loaders, for a comparison."""
    datasets = [value.dataset for value in values if hasattr(value, "dataset")]
    return [_first_digest(dataset) for dataset in datasets]


def rows_digest(data: Any, max_bytes: int = 1 << 28) -> str | None:
    """Return a digest of all rows as they are stored; None: nothing tells what they are.

    Args:
        data: A dataset, or a list of batches.
        max_bytes: Number of bytes up to which everything is digested. Of more, as many bytes in
            parts that are spread evenly.
    """
    if isinstance(data, Iterator):
        return None
    digest = hashlib.sha256()
    room = _Room(max_bytes, _MAX_OBJECTS)
    for part in _parts(data, depth=0, seen=set(), settings=False, room=room):
        digest.update(part)
    return digest.hexdigest()[:16]


_MAX_OBJECTS = 200_000


class _Room:
    """The number of bytes and objects that are still digested one by one.

    Args:
        num_bytes: Number of bytes.
        num_objects: Number of objects.
    """

    def __init__(self, num_bytes: int, num_objects: int) -> None:
        self.num_bytes, self.num_objects = num_bytes, num_objects

    def take(self, num_bytes: int) -> bool:
        """Tell whether there is room for so many bytes, and take it."""
        if num_bytes > self.num_bytes:
            return False
        self.num_bytes -= num_bytes
        return True

    def num_keys(self) -> int:
        """Return the number of keys of a dict that are digested."""
        return max(_NUM_SAMPLED, self.num_objects)

    def rows(self, size: int) -> Iterable[int]:
        """Return the numbers of a list's rows that are digested: all, or some spread evenly."""
        number = min(size, self.num_keys())
        self.num_objects -= number
        return (i * (size - 1) // max(number - 1, 1) for i in range(number))


def _table_parts(dataset: Any, room: _Room) -> Iterator[bytes]:
    """Give the rows of a dataset of Hugging Face, whatever parts they are stored in."""
    stored, numbers = stored_table(dataset)
    table, num_rows = stored.table, len(dataset)
    size = table.nbytes * num_rows // max(table.num_rows, 1)
    num_blocks = -(-num_rows // _ROWS_AT_ONCE)
    every = 1 if room.take(size) else -(-size // max(room.num_bytes, 1))
    for block in range(0, num_blocks, max(1, min(every, num_blocks // 4))):
        first = block * _ROWS_AT_ONCE
        if numbers is None:
            part = table.slice(first, _ROWS_AT_ONCE)
        else:
            part = table.take(numbers[first : first + _ROWS_AT_ONCE])
        for name, column in zip(part.column_names, part.combine_chunks().columns, strict=True):
            yield f"{name} {column.type} {len(column)}".encode()
            for chunk in column.chunks:
                yield from _column_parts(chunk)


_ROWS_AT_ONCE = 1000


def _column_parts(column: Any) -> Iterator[bytes]:
    """Give the values of a pyarrow array: lists as lengths and values, texts as one text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if column.null_count:
        yield column.is_null().to_numpy(zero_copy_only=False).tobytes()
    if isinstance(column, pa.ExtensionArray):
        yield from _column_parts(column.storage)
    elif pa.types.is_fixed_size_list(kind):
        yield from _column_parts(column.flatten())
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False).tobytes()
        yield from _column_parts(column.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        yield pc.binary_length(column).fill_null(-1).to_numpy(zero_copy_only=False).tobytes()
        texts = column.drop_null().to_pylist()
        yield b"".join(t if isinstance(t, bytes) else str(t).encode() for t in texts)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        filled = column.drop_null() if column.null_count else column
        yield filled.to_numpy(zero_copy_only=False).tobytes()
    elif pa.types.is_struct(kind):
        for part in column.flatten():
            yield from _column_parts(part)
    else:
        yield repr(column.to_pylist()).encode()


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
    functions: Any = inner_collate(getattr(loader, "collate_fn", None)), transform_of(loader)
    names = [getattr(f, "__qualname__", type(f).__qualname__) for f in functions]
    settings = repr((type(loader).__qualname__, facts.exact, seeds, names))
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


def report_different_batches(batches: Sequence[Any], strategy: Strategy) -> None:
    """Report that ranks which each read the batches of all have read different ones.

    A stream that asks for its rank and splits itself cannot be told by its attributes. Call on
    every rank.
    """
    found = strategy.gather(data_digest(list(batches)))
    if any(of_rank != found[0] for of_rank in found):
        say(
            "the ranks read different batches where each should read those of all, and uses its "
            "own of them. If the stream splits its rows by rank itself, most of them are left out: "
            "let it give all rows on every rank. If its rows only draw random numbers that differ "
            "from rank to rank, none is lost."
        )


def _parts(
    value: Any, depth: int, seen: set[int], settings: bool, room: _Room | None = None
) -> Iterator[bytes]:
    """Give the plain data in an object, piece by piece: all of it, if there is room for it."""
    if value is None or isinstance(value, _PLAIN):
        yield repr(value)[:1000].encode() if room is None else repr(without_root(value)).encode()
    elif isinstance(value, np.ndarray) and value.dtype.kind == "O":
        yield from _parts(value.reshape(-1).tolist(), depth + 1, seen, settings, room)
    elif isinstance(value, Tensor | np.ndarray):
        yield _of_array(value, room)
    elif id(value) in seen or depth > _DEPTH:
        return
    elif hasattr(value, "with_format") and hasattr(value, "select"):
        if room is None:
            yield _stored_rows(value) or b""
        else:
            yield from _table_parts(value, room)
    elif isinstance(value, list | tuple | range):
        seen.add(id(value))
        base: Any = next(base for base in (list, tuple, range) if isinstance(value, base))
        size = base.__len__(value)  # a subclass may count, or give, something else
        yield f"{type(value).__name__} {size}".encode()
        for number in sampled(size) if room is None else room.rows(size):
            yield from _parts(base.__getitem__(value, number), depth + 1, seen, settings, room)
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for key in list(value)[: _NUM_SAMPLED if room is None else room.num_keys()]:
            yield repr(key)[:1000].encode()
            yield from _parts(value[key], depth + 1, seen, settings, room)
    elif type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "to_numpy"):
        yield _of_pandas(value)
    elif isinstance(value, logging.Logger) or _is_file_system(value):
        return
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        seen.add(id(value))
        yield type(value).__qualname__.encode()
        for name, part in vars(value).items():
            if name.endswith("__hffs_cache") or is_clock(part):  # another one in each process
                continue
            if isinstance(part, SplitNotes):
                continue
            if settings or not isinstance(part, _PLAIN):
                yield name.encode()
                yield from _parts(part, depth + 1, seen, settings, room)


_DEPTH = 20


def _is_file_system(value: Any) -> bool:
    # Its token is another in each process.
    return any(base.__module__.partition(".")[0] == "fsspec" for base in type(value).__mro__)


def _of_array(array: Any, room: _Room | None) -> bytes:
    """Describe a tensor or an array by shape, dtype and some of its elements, or all of them."""
    if isinstance(array, Tensor):
        array = array.detach()
    head = f"{tuple(array.shape)} {array.dtype}"
    if 0 in array.shape or getattr(array, "is_meta", False):
        return head.encode()
    if room is not None and _has_plain_memory(array) and room.take(array.nbytes):
        if isinstance(array, Tensor):
            array = array.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return head.encode() + hashlib.sha256(np.ascontiguousarray(array).data).digest()
    rows = array[sampled(len(array))] if array.ndim else array
    if rows.ndim > 1:
        rows = rows.reshape(len(rows), -1)
        rows = rows[:, sampled(rows.shape[1])]
    return f"{head} {rows.tolist()}".encode()


def _of_pandas(table: Any) -> bytes:
    from pandas.util import hash_pandas_object

    try:
        return bytes(hash_pandas_object(table, index=False).to_numpy().tobytes())
    except TypeError:  # of lists, which have no hash
        return repr(table.shape).encode()


def _has_plain_memory(array: Any) -> bool:
    if isinstance(array, Tensor):
        is_subclass = type(array) not in (Tensor, torch.nn.Parameter)
        return array.layout is torch.strided and not array.is_quantized and not is_subclass
    return array.dtype.kind in "biufcSU"


def batch_size_of(loader: Any) -> int | None:
    """Return the rows of a loader's batches, if they have a fixed number."""
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def is_prepared(loader: Any) -> bool:
    """Tell whether a loader is one of ``prepare_dataloaders``."""
    return isinstance(getattr(loader, "batch_sampler", None), OrderedBatchSampler)


def place_in(loader: Any, num_samples: int, epoch: int | None) -> Place:
    """Name the batch of a loader that begins after so many rows; epoch None: of the present one.

    Rows are named by their number in the dataset where it is known.
    """
    size, is_ours, origin = batch_size_of(loader), is_prepared(loader), origin_of(loader)
    if is_ours:
        sampler: OrderedBatchSampler = loader.batch_sampler

        def find_batch() -> str:
            return f"{sampler.split} batch {sampler.batch_at(num_samples, epoch)}"

        def name_row(row: int) -> str:
            return f"{find_batch()} ({sampler.row_name(num_samples, row, epoch)})"

        return Place(find_batch, name_row, origin)
    if size is None:
        return Place(lambda: "a batch", lambda row: f"row {row} of a batch", origin)
    batch = f"batch {num_samples // size}"
    if isinstance(getattr(loader, "sampler", None), SequentialSampler):
        return Place(lambda: batch, lambda row: f"{batch} (row id {num_samples + row})", origin)
    return Place(lambda: batch, lambda row: f"row {row} of {batch}", origin)


def row_numbers_of(loader: Any) -> Iterable[int] | None:
    """Return the dataset's numbers of the rows of a loader, in order; None: nobody knows them."""
    if packs_rows(loader):
        return None
    if is_prepared(loader):
        rows: Iterable[int] = loader.batch_sampler.rows()
        return rows
    batch_sampler, dataset = (getattr(loader, n, None) for n in ("batch_sampler", "dataset"))
    sampler = getattr(loader if batch_sampler is None else batch_sampler, "sampler", batch_sampler)
    if isinstance(dataset, IterableDataset):
        num_workers = min(loader.num_workers, getattr(dataset, "num_shards", loader.num_workers))
        return count() if num_workers <= 1 and part_of(loader) is None else None
    return count() if sampler is None or isinstance(sampler, SequentialSampler) else None


def facts_of(loader: Any) -> LoaderFacts:
    """Describe data, order and settings of a loader."""
    if is_prepared(loader):
        return _facts_of_prepared(loader)
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


def _facts_of_prepared(loader: Any) -> LoaderFacts:
    sampler, same = loader.batch_sampler, fingerprint(loader)
    if sampler.lengths is not None:
        by_tokens = "group_by_length" if sampler.max_tokens is None else "max_tokens"
        same["order"] = "packs" if sampler.packs else by_tokens
        same["row_lengths"] = hashlib.sha256(sampler.lengths.tobytes()).hexdigest()[:16]
    return LoaderFacts(
        same,
        {
            "max_tokens": sampler.max_tokens,
            "batch_size": sampler.batch_size if sampler.max_tokens is None else None,
            "drop_last": sampler.drop_last,
            "seed": sampler.seed,
            "shuffle": sampler.shuffle,
            "num_workers": getattr(loader, "num_workers", 0),
        },
    )
