"""One pass over a loader, begun at its start or where another process stood.

What tells the place depends on the loader. Of a prepared one it is the number of rows used: the
order is a function of seed and epoch. Of a ``DataLoader`` that the user built it is the random
state in which the pass began: the sampler draws the same order from it again, and what was used is
skipped before it is loaded. Of a stream it is what the dataset says of itself. Anything else is
read again from its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from manualloop.data.sampler import Made, OrderedBatchSampler, num_batches
from manualloop.notices import say
from manualloop.randomness import (
    DATASETS,
    SAMPLERS,
    get_generator_states,
    get_random_state,
    is_same_random_state,
    set_generator_states,
    set_random_state,
)
from manualloop.reading.dataloader import Here, ResumedSampler, reads_here
from manualloop.reading.ranks import Deal, DealtSampler, deals_rows
from manualloop.reading.workers import (
    CarryingCollate,
    WorkerStart,
    dataset_state,
    is_stateful,
    set_dataset_state,
    shut_down_at_exit,
)
from manualloop.strategy.base import Strategy
from manualloop.tasks.items import num_rows

Position = Mapping[str, Any]
"""A place in a pass, as ``place_in`` describes it; empty: the start of a first pass."""


_ALONE = Deal()
_OF_WORKERS = ("workers", "last_worker", "dataset", "pending", "is_at_end")


class Pass(NamedTuple):
    """A pass that has begun.

    Attributes:
        items: The batches from the place on, some of them ``Carried``.
        left: How many they are; None if nobody knows.
        start: What a later pass needs to begin as this one did.
        num_used: Batches before the place, in batches of today's size.
        sampler: That deals the batches before they are loaded; None: all of them come.
    """

    items: Iterator[Any]
    left: int | None
    start: dict[str, Any]
    num_used: int = 0
    sampler: DealtSampler | None = None


def open_pass(loader: Iterable[Any], skip: int, position: Position, deal: Deal = _ALONE) -> Pass:
    """Begin a pass over a loader.

    Args:
        loader: Any iterable of batches.
        skip: Rows at its start that were used before.
        position: Where they ended; empty if nothing tells.
        deal: To whom its batches are dealt. ``left`` counts rounds then.
    """
    begun = _open_pass(loader, skip, position, deal)
    left = None if begun.left is None else -(-begun.left // deal.world_size)
    # Of the iterator, not of this pass: workers that are kept read by the sampler of their first.
    sampler = getattr(begun.items, "_index_sampler", None)
    return begun._replace(left=left, sampler=sampler if isinstance(sampler, DealtSampler) else None)


def begin_in_common(loader: Iterable[Any], strategy: Strategy) -> None:
    """Let every rank draw the same order from random generators: those of rank 0.

    Not of a prepared loader, which draws nothing.
    """
    if _kind_of(loader) == "prepared":
        return
    dataset = getattr(loader, "dataset", None) if not deals_rows(loader) else None
    found = (_beginning(loader), get_generator_states(dataset, DATASETS))
    beginning, of_dataset = strategy.gather(found)[0]
    set_random_state(beginning["random"])
    set_generator_states(loader, SAMPLERS, beginning["generators"])
    set_generator_states(dataset, DATASETS, of_dataset)


def _open_pass(loader: Iterable[Any], skip: int, position: Position, deal: Deal) -> Pass:
    kind = _kind_of(loader)
    start = {**_beginning(loader), "reuses_workers": _reuses_workers(loader)}
    if position.get("num_workers", 0) != getattr(loader, "num_workers", 0):
        position = {key: position[key] for key in position if key not in _OF_WORKERS}
    if kind == "prepared":
        items, left = _open_prepared(loader, skip, position, deal)
        return Pass(items, left, {}, position.get("num_batches", 0))
    if not position or position["kind"] != kind:
        if not skip:
            return Pass(_iterate(loader, {}, deal), num_batches(loader), start)
        say(
            "going on inside an epoch, and nothing tells the place but the number of rows used: "
            "they are read again and dropped, and if the loader shuffles, others are than were "
            "used before."
        )
        return Pass(_drop_rows(iter(loader), skip), None, start)
    start |= {key: position[key] for key in start if key in position}
    now = get_random_state(devices=False)
    set_random_state(start["random"])
    set_generator_states(loader, SAMPLERS, start["generators"])
    rest, num_left = _OPEN[kind](loader, {**position, **start}, now, deal)
    num_used = position["num_batches"]
    if _has_other_size(loader, position):
        # The rest of the batch in which the place is will be given as one, so this is its number.
        num_used = num_used * position["batch_size"] // _batch_size(loader)
    return Pass(rest, num_left, start, num_used)


def place_in(loader: Iterable[Any], start: dict[str, Any], num_used: int) -> dict[str, Any]:
    """Describe the place in a pass behind so many batches: what ``open_pass`` asks for.

    Args:
        loader: That gives the batches.
        start: Of the pass; empty between two of them.
        num_used: Batches of the pass.
    """
    kind = _kind_of(loader)
    sampler: Any = getattr(loader, "batch_sampler", None)
    place = {
        "kind": kind,
        "num_batches": num_used,
        "num_workers": getattr(loader, "num_workers", 0),
        "batch_size": _batch_size(loader),
    }
    if kind == "prepared":
        place |= sampler.made._asdict()
    elif not start:
        # The random state in which the next pass begins is that of its time, not of now.
        place["generators"] = _beginning(loader)["generators"]
        place["reuses_workers"] = _reuses_workers(loader)
    place |= start
    if num_used and kind == "stateful":
        place["loader"] = loader.state_dict()  # type: ignore[attr-defined]
    elif _has_dataset_here(loader) and (num_used or kind != "stream"):
        place |= dataset_state(loader.dataset)  # type: ignore[attr-defined]
    return place


def is_read_ahead(position: Position) -> bool:
    """Tell whether batches that were read but not used are behind the place, so must be kept."""
    return "loader" in position or (position["kind"] == "stream" and "dataset" in position)


def has_shuffle_buffer(loader: Any) -> bool:
    """Tell whether a loader reads a stream of datasets through a buffer that no state holds."""
    parts = [getattr(getattr(loader, "dataset", None), "_ex_iterable", None)]
    while parts:
        part = parts.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        if part is not None:
            parts += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return False


def workers_matter(position: Position) -> bool:
    """Tell whether the batches depend on how many processes read them."""
    states = position.get("workers", {}).values()
    return position.get("kind") == "stream" or any("random" in state for state in states)


def _kind_of(loader: Any) -> str:
    if isinstance(getattr(loader, "batch_sampler", None), OrderedBatchSampler):
        return "prepared"
    # Loaders of accelerate have the methods always, and a state only if they were told to.
    if is_stateful(loader) and getattr(loader, "use_stateful_dataloader", True):
        return "stateful"
    # A subclass that iterates in a way of its own is an iterable like any other.
    if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
        return "stream" if isinstance(loader.dataset, IterableDataset) else "dataloader"
    return "iterable"


def _open_prepared(
    loader: Any, skip: int, position: Position, deal: Deal
) -> tuple[Iterator[Any], int]:
    sampler: OrderedBatchSampler = loader.batch_sampler
    sampler.num_ranks = deal.world_size
    own = sampler.own._asdict()
    # Inside an epoch its order stays what it was made of; the next one is of today's settings.
    made = Made(**{name: position.get(name, value) for name, value in own.items()})
    sampler.start_at(skip, made if skip else None)
    left = sampler.num_left()
    if _has_dataset_here(loader):
        set_dataset_state(loader.dataset, position)
    if deal.rank:  # workers draw other numbers on every rank
        sampler.generator.manual_seed(sampler.seed + sampler.epoch + (deal.rank << 40))
    return _iterate(loader, position, deal), left


def _open_stateful(
    loader: Any, position: Position, now: Any, deal: Deal
) -> tuple[Iterator[Any], int | None]:
    length = num_batches(loader)
    if "loader" not in position:
        set_random_state(now)
        return iter(loader), length
    loader.load_state_dict(position["loader"])
    items = chain(position.get("pending", ()), iter(loader))
    set_random_state(now)
    return items, None if length is None else length - position["num_batches"]


def _open_dataloader(
    loader: Any, position: Position, now: Any, deal: Deal
) -> tuple[Iterator[Any], int | None]:
    if _has_dataset_here(loader):
        set_dataset_state(loader.dataset, position)
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    left: int | None = len(loader) - position["num_batches"]
    num_indices = None
    if position["num_batches"] and _has_other_size(loader, position):
        num_indices, left = position["num_batches"] * position["batch_size"], None

    def rewind() -> None:
        set_random_state(position["random"])
        set_generator_states(loader, SAMPLERS, position["generators"])

    sampler = ResumedSampler(
        getattr(loader, name),
        position["num_batches"],
        num_indices,
        # Workers that go on from the epoch before cost no draw; new ones do.
        rewind if position["reuses_workers"] else None,
        now,
    )
    return _iterate(loader, position, deal, {name: sampler}), left


def _open_stream(
    loader: Any, position: Position, now: Any, deal: Deal
) -> tuple[Iterator[Any], int | None]:
    if position["num_batches"] and has_shuffle_buffer(loader):
        say("not bit-exact, because what was in the stream's shuffle buffer is lost.")
    is_known = is_stateful(loader.dataset) and ("workers" in position or "dataset" in position)
    if position["num_batches"] and not is_known:
        states = position.get("workers", {}).values()
        if getattr(loader, "persistent_workers", False) and any("random" in s for s in states):
            say("not bit-exact, because this data draws random numbers in workers that are kept.")
        return _reread(loader, position, now, deal)
    length = num_batches(loader)
    if position.get("is_at_end"):
        set_random_state(now)
        return iter(position["pending"]), None
    if _has_dataset_here(loader):
        set_dataset_state(loader.dataset, position)
    items = _iterate(loader, position, deal)
    if position["num_batches"] or position["reuses_workers"]:
        set_random_state(now)
    if _has_dataset_here(loader) and hasattr(loader.dataset, "_starting_state_dict"):
        items = _forget_start(items, loader.dataset)
    items = chain(position.get("pending", ()), items)
    return items, None if length is None else length - position["num_batches"]


def _forget_start(items: Iterator[Any], dataset: Any) -> Iterator[Any]:
    # The streams of datasets would begin there again with every later pass of the same epoch.
    for item in items:
        dataset._starting_state_dict = None
        yield item


def _reread(
    loader: Any, position: Position, now: Any, deal: Deal
) -> tuple[Iterator[Any], int | None]:
    num_used, length = position["num_batches"], num_batches(loader)
    left = None if length is None else length - num_used
    if isinstance(loader, Sequence):
        set_random_state(now)
        return islice(iter(loader), num_used, None), left
    items = iter(loader)
    if not num_used:
        return items, left
    say(
        f"reading the {num_used} batches of this epoch that were used, and dropping them: the "
        "data has neither a sampler nor a state_dict() to go on from."
    )
    next(items, None)
    drawn = get_random_state(devices=False)
    for _ in islice(items, num_used - 1):
        pass
    # A stream is read one round ahead, so that was drawn before the place too.
    ahead = list(islice(items, deal.world_size)) if length is None else []
    if not is_same_random_state(drawn, get_random_state(devices=False)):
        say("not bit-exact, because this data draws random numbers while it is read.")
    set_random_state(now)
    return chain(ahead, items), left


_OPEN: dict[str, Callable[[Any, Position, Any, Deal], tuple[Iterator[Any], int | None]]] = {
    "stateful": _open_stateful,
    "dataloader": _open_dataloader,
    "stream": _open_stream,
    "iterable": _reread,
}


def _iterate(
    loader: Any, position: Position, deal: Deal, changes: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Begin to iterate over a loader whose workers carry home what they know."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return iter(loader)  # accelerate's, for example, which wrap another
    changes = dict(changes or {})
    if deal.world_size > 1 and deals_rows(loader):
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        changes[name] = DealtSampler(changes.get(name) or getattr(loader, name), deal)
    full = loader.batch_size if isinstance(loader.dataset, IterableDataset) else None
    if full is not None or loader.num_workers > 0:
        changes["collate_fn"] = CarryingCollate(loader.collate_fn, full)
    if loader.num_workers > 0:
        states = {int(worker): state for worker, state in position.get("workers", {}).items()}
        last = position.get("last_worker")
        first = 0 if last is None else (last + 1) % loader.num_workers
        changes["worker_init_fn"] = WorkerStart(loader.worker_init_fn, first, states)
    if position:
        loader._iterator = None  # workers that are there already are elsewhere
    # For the time of iter() only, and past __setattr__, which forbids to change a sampler: the
    # iterator keeps what it was made with.
    if _kind_of(loader) == "prepared" and reads_here(loader):
        return Here(loader, changes.get("batch_sampler", loader.batch_sampler))
    kept = {name: vars(loader)[name] for name in changes}
    vars(loader).update(changes)
    try:
        iterator: Iterator[Any] = iter(loader)
    finally:
        vars(loader).update(kept)
    if loader.num_workers > 0:
        shut_down_at_exit(iterator)
    return iterator


def _beginning(loader: Any) -> dict[str, Any]:
    return {
        "random": get_random_state(devices=False),
        "generators": get_generator_states(loader, SAMPLERS),
    }


def _reuses_workers(loader: Any) -> bool:
    return bool(getattr(loader, "persistent_workers", False)) and loader._iterator is not None


def _has_dataset_here(loader: Any) -> bool:
    """Tell whether the rows are read in this process, by the dataset that the loader holds."""
    return isinstance(loader, DataLoader) and loader.num_workers == 0


def _has_other_size(loader: Any, position: Position) -> bool:
    sizes = position["batch_size"], _batch_size(loader)
    return None not in sizes and sizes[0] != sizes[1]


def _batch_size(loader: Any) -> int | None:
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _drop_rows(items: Iterator[Any], num_used: int) -> Iterator[Any]:
    while num_used > 0 and (batch := next(items, None)) is not None:
        num_used -= num_rows(batch)
    yield from items
