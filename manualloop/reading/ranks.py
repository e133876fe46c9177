"""How the batches of a loader are dealt to the ranks: batch k is rank k % world_size's.

Whole batches, so that each is made of the same rows, and padded to the same length, as in a run of
one process. A round is a batch for each rank. Where the last one has fewer, the ranks without one
get its last batch as a *spare*: they take part in the update, and none of its rows counts twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from manualloop.data.sampler import num_batches
from manualloop.errors import DataError
from manualloop.notices import say
from manualloop.tasks.items import num_rows


class Deal(NamedTuple):
    """To whom batches are dealt.

    Attributes:
        rank: The one that this process is.
        world_size: Number of ranks.
    """

    rank: int = 0
    world_size: int = 1


class Round(NamedTuple):
    """A batch for each rank.

    Attributes:
        item: This rank's: what the loader gave.
        items: All that this process has read for the round.
        num_batches: In the round; the last one may have fewer than ranks.
        rows_before: In the batches of the ranks before this one.
        rows: In all of them; None: nobody has counted them, in a round of one batch.
        is_spare: Whether the batch is another rank's too, and counts there.
    """

    item: Any
    items: list[Any]
    num_batches: int = 1
    rows_before: int = 0
    rows: int | None = None
    is_spare: bool = False


class DealtSampler:
    """The entries of a sampler that are one rank's: the others' rows are never loaded.

    Args:
        sampler: Of batches of row numbers, or of row numbers.
        deal: To whom.

    Attributes:
        rounds: Of the entries given and not asked for yet: batches, rows before, rows, spare.

    >>> dealt = DealtSampler([[0, 1], [2, 3], [4]], Deal(rank=1, world_size=2))
    >>> list(dealt), list(dealt.rounds)
    ([[2, 3], [4]], [(2, 2, 4, False), (1, 0, 1, True)])
    """

    def __init__(self, sampler: Any, deal: Deal) -> None:
        self._sampler, self._deal = sampler, deal
        self.rounds: deque[tuple[int, int, int, bool]] = deque()

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._deal.world_size)

    def __iter__(self) -> Iterator[Any]:
        rank, world_size = self._deal
        entries = iter(self._sampler)
        self.rounds.clear()  # a DataLoader with workers begins twice
        while dealt := list(islice(entries, world_size)):
            own = min(rank, len(dealt) - 1)
            sizes = [len(entry) if hasattr(entry, "__len__") else 1 for entry in dealt]
            self.rounds.append((len(dealt), sum(sizes[:own]), sum(sizes), own < rank))
            yield dealt[own]


def rounds_of(items: Iterable[Any], sampler: DealtSampler | None, deal: Deal) -> Iterator[Round]:
    """Give the rounds of a pass.

    Args:
        items: What the loader gives: this rank's alone if there is a ``sampler``, else all.
        sampler: That the loader reads by.
        deal: To whom.
    """
    if sampler is not None:
        for item in items:
            yield Round(item, [item], *sampler.rounds.popleft())
        return
    items, (rank, world_size) = iter(items), deal
    if world_size == 1:
        for item in items:
            yield Round(item, [item])
        return
    while dealt := list(islice(items, world_size)):
        own = min(rank, len(dealt) - 1)
        sizes = [num_rows(getattr(item, "batch", item)) for item in dealt]
        yield Round(
            dealt[own], dealt, len(dealt), sum(sizes[:own]), sum(sizes), is_spare=own < rank
        )


def is_dealt(loader: Any) -> bool:
    """Tell whether a loader already gives each rank something else: by accelerate, or a sampler."""
    samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    inner = getattr(samplers[1], "sampler", None)
    if any(hasattr(part, "num_replicas") for part in (*samplers, inner)):
        return True  # torch's DistributedSampler, and those that look like it
    if type(loader).__module__.startswith("accelerate."):
        return True
    return getattr(getattr(loader, "dataset", None), "_distributed", None) is not None


def undealt(loader: Any) -> Any:
    """Return a loader of all batches, where accelerate has dealt them: it gives some rows twice.

    What somebody else has dealt is returned as it is, and it is said that rows may come twice.
    """
    dealt: Any = getattr(loader, "batch_sampler", None)
    if type(dealt).__name__ == "BatchSamplerShard" and not dealt.split_batches:
        return DataLoader(
            loader.dataset,
            batch_sampler=dealt.batch_sampler,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )
    if is_dealt(loader):
        say(
            "the loader was dealt to the ranks before, and may give rows to two of them: they "
            "count twice. Pass one that was not: prepare_dataloaders, or a plain DataLoader."
        )
    return loader


def num_rounds(loader: Iterable[Any], world_size: int) -> int | None:
    """Return the number of batches that each rank gets in a pass; None for a stream."""
    length = num_batches(loader)
    return length if length is None or is_dealt(loader) else -(-length // world_size)


def deals_rows(loader: Any) -> bool:
    """Tell whether batches are dealt before they are loaded: the loader reads by a sampler."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
    )


class SpareDict(dict[str, Any]):
    """A batch of columns whose rows count on another rank."""


class SpareList(list[Any]):
    """A batch of tensors whose rows count on another rank."""


def as_spare(batch: Any) -> Any:
    """Mark a batch whose rows count on another rank: it has no items, whatever its labels say.

    Raises:
        DataError: It is neither a mapping nor a list or tuple.
    """
    if isinstance(batch, Mapping):
        return SpareDict(batch)
    if isinstance(batch, list | tuple):
        return SpareList(batch)
    raise DataError(
        f"The last batches of the epoch are fewer than the ranks, and a {type(batch).__name__} "
        "cannot be marked as one that counts elsewhere. Let collate_fn return a dict or a list of "
        "tensors."
    )


def is_spare(batch: Any) -> bool:
    """Tell whether ``as_spare`` has made a batch."""
    return isinstance(batch, SpareDict | SpareList)
