"""The kinds of loaders: how a pass begins at a position, and what the position is.

Of a loader of ``prepare_dataloaders`` the position is a number of rows: the order is a function of
seed and epoch. Of a ``DataLoader`` that the user built it is the random state in which the pass
began: the sampler draws the same order from it again, and what was used is skipped before it is
loaded. Of a stream it is what the dataset's ``state_dict`` returns, and of a stateful loader what
its own returns. Any other iterable is read again from its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias, cast

from torch.utils.data import DataLoader, IterableDataset

from manualloop.data.sampler import Made, OrderedBatchSampler, num_batches
from manualloop.internals import has_shuffle_buffer, is_stream_of_datasets
from manualloop.notices import say
from manualloop.randomness import get_random_state, set_random_state
from manualloop.reading.dataloader import (
    LoaderCopy,
    ResumedSampler,
    iterates_plainly,
    sampler_name,
)
from manualloop.reading.describe import (
    batch_size_of,
    facts_of,
    is_prepared,
    place_in,
    row_numbers_of,
)
from manualloop.reading.generators import (
    order_states,
    restore_order,
    row_generators_of,
)
from manualloop.reading.position import Position, require_inside
from manualloop.reading.ranks import Shard
from manualloop.reading.streams import drop_rows, forget_start, read_again
from manualloop.reading.workers import is_stateful
from manualloop.types import LoaderFacts, Place


class Pass(NamedTuple):
    """A pass that has begun.

    Attributes:
        items: The batches from the position on, some of them ``WorkerBatch``.
        left: Number of these batches; None if nobody knows.
        start: What a later pass needs to begin as this one did.
        num_used: Batches before the position, in batches of the loader's size.
    """

    items: Iterator[Any]
    left: int | None
    start: Position
    num_used: int = 0


class Source:
    """A loader whose passes can begin at a position.

    Args:
        loader: The user's loader.
        kind: Name of the kind of loader, as positions have it: "prepared" for one of
            ``prepare_dataloaders``, "dataloader" for one of the user's over a dataset with row
            numbers, "stream" over an ``IterableDataset``, "stateful" for one with a ``state_dict``
            of its own, such as torchdata's, "iterable" for anything else.

    Attributes:
        copy: The copy of the loader that is read.
        generators: The generators that its rows draw from.
    """

    def __init__(self, loader: Any, kind: str) -> None:
        self.loader, self.kind = loader, kind
        self.copy = LoaderCopy(loader, draws_no_seed=kind == "prepared")
        self.generators = row_generators_of(loader)

    def open(self, position: Position, shard: Shard) -> Pass:
        """Begin a pass; an empty position, or one of another kind, is the start of a first pass."""
        if self.kind == "prepared":
            return _open_prepared(self, position, shard)
        return _open(self, position, shard, _RESUME[self.kind])

    def position(self, start: Position, num_used: int) -> Position:
        """Describe the position behind so many batches of a pass; an empty start: between two."""
        position = _position(self, num_used)
        if self.kind == "prepared":
            order = cast("Position", self.loader.batch_sampler.made._asdict())
            return position | order | _rows_here(self)
        position |= _start(self, start)
        if self.kind == "stateful" and num_used:
            return position | Position(loader=self.loader.state_dict())
        if self.kind == "stream" and not num_used:
            return position
        return position | _rows_here(self)

    def place(self, num_samples: int, epoch: int | None = None) -> Place:
        """Name the batch that begins after so many rows; epoch None: of the one under way."""
        return place_in(self.loader, num_samples, epoch)

    def row_numbers(self) -> Iterable[int] | None:
        """Return the dataset's numbers of the rows of a pass, in order; None: nobody knows them."""
        return row_numbers_of(self.loader)

    @cached_property
    def facts(self) -> LoaderFacts:
        """Data and settings for the contract of a checkpoint, as they were when first asked for."""
        return facts_of(self.loader)


def source_of(loader: Any) -> Source:
    """Find the kind of a loader."""
    if is_prepared(loader):
        return Source(loader, "prepared")
    # Loaders of accelerate have the methods always, and a state only if they were told to.
    if is_stateful(loader) and getattr(loader, "use_stateful_dataloader", True):
        return Source(loader, "stateful")
    # A subclass that iterates in a way of its own is an iterable like any other.
    if not iterates_plainly(loader):
        return Source(loader, "iterable")
    is_stream = isinstance(loader.dataset, IterableDataset)
    return Source(loader, "stream" if is_stream else "dataloader")


def _open_prepared(source: Source, position: Position, shard: Shard) -> Pass:
    """Begin after ``num_samples`` rows, which are never loaded."""
    sampler: OrderedBatchSampler = source.loader.batch_sampler
    skip = position.get("num_samples", 0)
    require_inside(skip, sampler.num_rows)
    position = _without_other_workers(position, source.loader)
    sampler.num_ranks = shard.world_size
    own = sampler.own
    # Inside an epoch its order stays what it was made of; the next has today's settings.
    made = Made(
        position.get("seed", own.seed),
        position.get("batch_size") or own.batch_size,
        position.get("max_tokens", own.max_tokens),
        position.get("num_ranks", own.num_ranks),
    )
    sampler.start_at(skip, made if skip else None)
    left = sampler.num_left()
    _restore_rows(source, position)
    if shard.rank:  # workers draw other numbers on every rank
        sampler.generator.manual_seed(sampler.seed + sampler.epoch + (shard.rank << 40))
    items = source.copy.iterate(position, shard)
    return Pass(items, left, {}, position.get("num_batches", 0))


def _resume_built(
    source: Source, position: Position, start: Position, now: Any, shard: Shard
) -> tuple[Iterator[Any], int | None]:
    loader, num_used = source.loader, position["num_batches"]
    if not num_used:  # else when the order has been drawn, from the same generator perhaps
        _restore_rows(source, position)
    length = num_batches(loader)  # None: a sampler that never ends
    left = None if length is None else length - num_used
    if length is not None and not _has_other_size(loader, position):
        require_inside(num_used, length, "batches")
    num_indices = None
    if num_used and _has_other_size(loader, position):
        num_indices, left = num_used * (position["batch_size"] or 0), None

    def rewind() -> None:
        set_random_state(start["random"])
        restore_order(loader, start["generators"])

    name = sampler_name(loader)
    sampler = ResumedSampler(
        getattr(loader, name),
        num_used,
        num_indices,
        # Workers that were kept from the epoch before cost no draw; new ones do.
        rewind if start["reuses_workers"] else None,
        partial(_restore_all, source, position),
        now,
    )
    return source.copy.iterate(position, shard, {name: sampler}), left


def _resume_stream(
    source: Source, position: Position, start: Position, now: Any, shard: Shard
) -> tuple[Iterator[Any], int | None]:
    loader, num_used = source.loader, position["num_batches"]
    if num_used and has_shuffle_buffer(loader.dataset):
        say("not bit-exact, because what was in the stream's shuffle buffer is lost.")
    is_known = is_stateful(loader.dataset) and ("workers" in position or "dataset" in position)
    if num_used and not is_known:
        states = position.get("workers", {}).values()
        if loader.persistent_workers and any("random" in state for state in states):
            say("not bit-exact, because this data draws random numbers in kept workers.")
        source.copy.end_workers()
        items = source.copy.iterate({}, shard)
        return read_again(loader, items, position, now, shard)
    length = num_batches(loader)
    if position.get("is_at_end"):
        set_random_state(now)
        return iter(position["pending"]), None
    _restore_rows(source, position)
    items = source.copy.iterate(position, shard)
    if num_used or start["reuses_workers"]:
        set_random_state(now)
    if loader.num_workers == 0 and is_stream_of_datasets(loader.dataset):
        items = forget_start(items, loader.dataset)
    items = chain(position.get("pending", ()), items)
    return items, None if length is None else length - num_used


def _resume_stateful(
    source: Source, position: Position, start: Position, now: Any, shard: Shard
) -> tuple[Iterator[Any], int | None]:
    loader, length = source.loader, num_batches(source.loader)
    if "loader" not in position:
        set_random_state(now)
        return iter(loader), length
    loader.load_state_dict(position["loader"])
    items = chain(position.get("pending", ()), iter(loader))
    set_random_state(now)
    return items, None if length is None else length - position["num_batches"]


def _resume_iterable(
    source: Source, position: Position, start: Position, now: Any, shard: Shard
) -> tuple[Iterator[Any], int | None]:
    return read_again(source.loader, iter(source.loader), position, now, shard)


_Resume: TypeAlias = Callable[
    [Source, Position, Position, Any, Shard], tuple[Iterator[Any], int | None]
]
_RESUME: dict[str, _Resume] = {
    "dataloader": _resume_built,
    "stream": _resume_stream,
    "stateful": _resume_stateful,
    "iterable": _resume_iterable,
}
"""How a pass is resumed, by the kind of loader."""


def _open(source: Source, position: Position, shard: Shard, resume: _Resume) -> Pass:
    """Begin a pass of a loader that is not a prepared one."""
    loader, skip = source.loader, position.get("num_samples", 0)
    start = _beginning(source)
    position = _without_other_workers(position, loader)
    if position.get("kind") != source.kind:
        if not skip:
            return Pass(source.copy.iterate({}, shard), num_batches(loader), start)
        say(
            "resuming inside an epoch, and nothing tells the place but the number of rows used: "
            "they are read again and dropped. If the loader shuffles, the remaining batches may "
            "repeat rows that were already used."
        )
        return Pass(drop_rows(iter(loader), skip), None, start)
    for name in ("random", "generators", "reuses_workers"):
        if name in position:
            start[name] = position[name]
    now = get_random_state(devices=False)
    set_random_state(start["random"])
    restore_order(loader, start["generators"])
    items, left = resume(source, position, start, now, shard)
    num_used, other = position["num_batches"], batch_size_of(loader)
    if other is not None and _has_other_size(loader, position):
        # The rest of the batch in which the place is will be given as one, so this is its number.
        num_used = num_used * (position["batch_size"] or 0) // other
    return Pass(items, left, start, num_used)


def _beginning(source: Source) -> Position:
    return Position(
        random=get_random_state(devices=False),
        generators=order_states(source.loader),
        reuses_workers=source.copy.keeps_workers,
    )


def _start(source: Source, start: Position) -> Position:
    """Return what the next pass needs, if none has begun: its random state is that of its time."""
    if start:
        return start
    found = _beginning(source)
    del found["random"]
    return found


def _position(source: Source, num_used: int) -> Position:
    return Position(
        kind=source.kind,
        num_batches=num_used,
        num_workers=getattr(source.loader, "num_workers", 0),
        batch_size=batch_size_of(source.loader),
    )


def _rows_here(source: Source) -> Position:
    """Return the states of dataset and row generators, if rows are read in this process."""
    if not _reads_here(source.loader):
        return {}
    states = source.generators.states()
    if source.kind != "prepared":  # whose generator is seeded anew in every epoch, on every rank
        # With those of the samplers, which others may share: a loss function that draws noise.
        states = order_states(source.loader, rows=False) | states
    position, dataset = Position(row_generators=states), source.loader.dataset
    if is_stateful(dataset):
        position["dataset"] = dataset.state_dict()
    return position


def _restore_rows(source: Source, position: Position) -> None:
    """Put back what ``_rows_here`` returned."""
    if not _reads_here(source.loader):
        return
    if states := position.get("row_generators"):
        source.generators.restore({p: s for p, s in states.items() if not p.startswith("loader")})
    if "dataset" in position and is_stateful(source.loader.dataset):
        source.loader.dataset.load_state_dict(position["dataset"])


def _restore_all(source: Source, position: Position) -> None:
    """Put back what ``_rows_here`` returned once the order has been drawn again."""
    if _reads_here(source.loader):
        states = position.get("row_generators", {})
        own = {path: state for path, state in states.items() if path.startswith("loader")}
        restore_order(source.loader, own)
    _restore_rows(source, position)


def _reads_here(loader: Any) -> bool:
    """Tell whether a DataLoader reads its rows in this process."""
    return isinstance(loader, DataLoader) and loader.num_workers == 0


def _without_other_workers(position: Position, loader: Any) -> Position:
    """Leave out what workers reported, if the loader has another number of them."""
    if position.get("num_workers", 0) == getattr(loader, "num_workers", 0):
        return position
    kept = copy(position)
    for name in ("workers", "last_worker", "dataset", "row_generators", "pending", "is_at_end"):
        kept.pop(name, None)  # type: ignore[misc]
    return kept


def _has_other_size(loader: Any, position: Position) -> bool:
    sizes = position["batch_size"], batch_size_of(loader)
    return None not in sizes and sizes[0] != sizes[1]


def workers_matter(position: Position) -> bool:
    """Tell whether the batches depend on how many processes read them."""
    draws = bool(position.get("row_generators"))
    draws |= any({"random", "generators"} & set(s) for s in position.get("workers", {}).values())
    return position.get("kind") == "stream" or draws
