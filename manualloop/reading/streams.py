"""Loaders that have no row numbers: what was used of them is read again and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from manualloop.batches import num_rows, rebuild
from manualloop.data.sampler import num_batches
from manualloop.internals import has_shuffle_buffer
from manualloop.notices import say
from manualloop.randomness import get_random_state, is_same_random_state, set_random_state
from manualloop.reading.position import Position
from manualloop.reading.ranks import Shard


def read_again(
    loader: Any, items: Iterator[Any], position: Position, now: Any, shard: Shard
) -> tuple[Iterator[Any], int | None]:
    """Read a pass from its start, and drop the batches that were used."""
    num_used, length = position["num_batches"], num_batches(loader)
    left = None if length is None else length - num_used
    if isinstance(loader, Sequence):
        set_random_state(now)
        return islice(items, num_used, None), left
    if not num_used:
        return items, left
    say(
        f"reading the {num_used} batches of this epoch that were used, and dropping them: the "
        "data has neither a sampler nor a state_dict() to resume from."
    )
    next(items, None)
    drawn = get_random_state(devices=False)
    for _ in islice(items, num_used - 1):
        pass
    # A stream is read one round ahead, so that was drawn before the position too.
    ahead = list(islice(items, shard.world_size)) if length is None else []
    if not is_same_random_state(drawn, get_random_state(devices=False)):
        say("not bit-exact, because this data draws random numbers while it is read.")
    set_random_state(now)
    return chain(ahead, items), left


def drop_rows(items: Iterator[Any], num_used: int) -> Iterator[Any]:
    """Drop batches until so many rows are gone."""
    while num_used > 0 and (batch := next(items, None)) is not None:
        num_used -= num_rows(batch)
    yield from items


def forget_start(items: Iterator[Any], dataset: Any) -> Iterator[Any]:
    """Let a stream of datasets begin its next pass at its start, not where this one began."""
    for item in items:
        dataset.load_state_dict({})
        yield item


def cannot_rewind(loader: Any) -> str | None:
    """Name what of a position inside an epoch is lost; None: nothing that can be told."""
    if has_shuffle_buffer(getattr(loader, "dataset", None)):
        return "the stream has a shuffle buffer, which no checkpoint holds"
    return None


def tell_repeated(
    items: Iterator[Any], loader: Any, batch_of: Callable[[Any], Any] = lambda item: item
) -> Iterator[Any]:
    """Give the batches of a pass from its start; report a stream of which each worker gives all.

    The first two batches come from two workers. Where the rows are split among these, they differ.

    Args:
        items: The batches, or what holds them.
        loader: Their loader.
        batch_of: Function from an item to its batch.
    """
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if not is_stream or getattr(loader, "num_workers", 0) < 2 or loader in _TOLD:
        return items
    return _compared(items, loader, batch_of)


_TOLD: WeakSet[Any] = WeakSet()


def _compared(items: Iterator[Any], loader: Any, batch_of: Callable[[Any], Any]) -> Iterator[Any]:
    batches = []
    for item in items:
        batches.append(batch_of(item))
        if len(batches) == 2:
            if _are_same(*map(_tensors_of, batches)):
                _TOLD.add(loader)
                say(
                    f"each of the {loader.num_workers} workers gives the same rows of the stream, "
                    "which are used as often. Split them in its __iter__: info = "
                    "torch.utils.data.get_worker_info(); itertools.islice(rows, info.id, None, "
                    "info.num_workers). Or read it with num_workers=1."
                )
            batches = []
            yield item
            break
        yield item
    yield from items


def _are_same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tell whether two batches hold the same numbers, which are not all one number."""
    is_one = len(first) == len(second) and all(map(torch.equal, first, second))
    return is_one and any(bool((part != part.flatten()[0]).any()) for part in first if part.numel())


def _tensors_of(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(entry: Any) -> Any:
        if isinstance(entry, Tensor):
            found.append(entry)
            return entry
        return rebuild(entry, note, is_whole=False)

    rebuild({"": batch}, note)
    return found
