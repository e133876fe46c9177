"""How the batches of a loader are sharded: batch k goes to rank k % world_size.

Whole batches are distributed, so each holds the same rows, padded to the same length, as in a run
of one process. A round is a batch for each rank. If the last round has fewer, the ranks without a
batch get the round's last one as a *spare*: they take part in the update, and no row counts twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, DistributedSampler

from manualloop.batches import num_rows
from manualloop.data.sampler import num_batches
from manualloop.errors import DataError
from manualloop.internals import part_of_stream
from manualloop.notices import say
from manualloop.strategy.base import Strategy


class Shard(NamedTuple):
    """The ranks among which batches are distributed.

    Attributes:
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    rank: int = 0
    world_size: int = 1


def ranks_of(strategy: Strategy | None) -> Shard:
    """Return this rank among all of a strategy; None means that there is one."""
    return Shard() if strategy is None else Shard(strategy.rank, strategy.world_size)


class Round(NamedTuple):
    """A batch for each rank.

    Attributes:
        items: What this process has read of the round, in the loader's order.
        own: Place of this rank's batch among them.
        num_batches: Number of batches in the round; the last one may have fewer than ranks.
        rows_before: Rows in the batches of the ranks before this one.
        rows: Rows in all of the batches; None if nobody has counted them.
        is_spare: Whether the batch is another rank's too, and counts there.
    """

    items: Sequence[Any]
    own: int = 0
    num_batches: int = 1
    rows_before: int = 0
    rows: int | None = None
    is_spare: bool = False


class ShardedSampler:
    """One rank's entries of a sampler; the rows of other ranks are never loaded.

    Args:
        sampler: Sampler of row numbers, or of batches of them.
        shard: The rank, and the number of ranks.

    Attributes:
        rounds: Number of batches, rows before, number of rows and spare flag of each entry that
            was drawn and is not used yet.

    >>> sampler = ShardedSampler([[0, 1], [2, 3], [4]], Shard(rank=1, world_size=2))
    >>> list(sampler), list(sampler.rounds)
    ([[2, 3], [4]], [(2, 2, 4, False), (1, 0, 1, True)])
    """

    def __init__(self, sampler: Any, shard: Shard) -> None:
        self._sampler, self._shard = sampler, shard
        self.rounds: deque[tuple[int, int, int, bool]] = deque()

    def __len__(self) -> int:
        return -(-len(self._sampler) // self._shard.world_size)

    def __iter__(self) -> Iterator[Any]:
        rank, world_size = self._shard
        entries = iter(self._sampler)
        self.rounds.clear()  # a DataLoader with workers begins twice
        while taken := list(islice(entries, world_size)):
            own = min(rank, len(taken) - 1)
            sizes = [len(entry) if hasattr(entry, "__len__") else 1 for entry in taken]
            self.rounds.append((len(taken), sum(sizes[:own]), sum(sizes), own < rank))
            yield taken[own]


def rounds_of(
    items: Iterator[Any], sampler: ShardedSampler | None, shard: Shard
) -> Iterator[Round]:
    """Give the rounds of a pass on several ranks.

    Args:
        items: The batches that the loader gives: this rank's alone if there is a ``sampler``, else
            those of all ranks.
        sampler: The sampler by which the loader reads.
        shard: This rank's part of the batches.
    """
    if sampler is not None:
        for item in items:
            yield Round((item,), 0, *sampler.rounds.popleft())
        return
    rank, world_size = shard
    while taken := list(islice(items, world_size)):
        own = min(rank, len(taken) - 1)
        sizes = [num_rows(getattr(item, "batch", item)) for item in taken]
        before, rows = sum(sizes[:own]), sum(sizes)
        yield Round(taken, own, len(taken), before, rows, is_spare=own < rank)


def is_sharded(loader: Any) -> bool:
    """Tell whether a loader already gives each rank other rows: by accelerate, or a sampler."""
    samplers = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    inner = getattr(samplers[1], "sampler", None)
    if any(hasattr(part, "num_replicas") for part in (*samplers, inner)):
        return True  # torch's DistributedSampler, and those that look like it
    if type(loader).__module__.startswith("accelerate."):
        return True
    try:
        return part_of_stream(getattr(loader, "dataset", None)) is not None
    except AttributeError:
        say(
            "nothing tells whether split_dataset_by_node has split this stream. If it has, rows "
            "are left out: pass the whole stream."
        )
        return False


def part_of(loader: Any) -> tuple[int, int] | None:
    """Return which part of the rows a loader reads, and of how many; None: all, or nothing tells.

    >>> part_of(DataLoader(range(4), sampler=DistributedSampler(range(4), 2, 1)))
    (1, 2)
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    own = getattr(loader, "sampler", None)
    for sampler in (own, batch_sampler, getattr(batch_sampler, "sampler", None)):
        part = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
        if isinstance(part[0], int) and isinstance(part[1], int):
            return part  # type: ignore[return-value]
    with suppress(AttributeError):
        return part_of_stream(getattr(loader, "dataset", None))
    return None


def num_parts(loader: Any, shard: Shard) -> int:
    """Return into how many parts somebody else has split the rows of a loader, one for each rank.

    Raises:
        DataError: The part is that of another rank, or the ranks are not as many.
    """
    part = part_of(loader)
    if part is None:
        return shard.world_size if shard.world_size > 1 and is_sharded(loader) else 1
    if part != shard:
        found = f"part {part[0]} of {part[1]} of the rows"
        if shard.world_size > 1:
            raise DataError(
                f"Rank {shard.rank} of {shard.world_size} reads {found}: other parts would be read "
                "twice, or never. Split by the ranks that there are, "
                "split_dataset_by_node(stream, strategy.rank, strategy.world_size), or give every "
                "rank all rows: each is then used once."
            )
        if part[1] > 1:
            say(f"one process reads {found}. To read all rows, do not split them by rank.")
    return part[1]


def require_same_parts(before: int | None, now: int) -> None:
    """Refuse to resume inside an epoch whose rows were split into another number of parts.

    Args:
        before: Number of parts when the position was saved; None: an older version did not tell.
        now: Number of parts.

    Raises:
        DataError: The numbers differ.
    """
    if before is None or before == now:
        return
    were, are = (
        "read all rows together" if number == 1 else f"had a part of the rows each, of {number}"
        for number in (before, now)
    )
    raise DataError(
        f"The checkpoint was saved inside an epoch in which the ranks {were}, and now they {are}: "
        "rows would be used twice, or never. Resume with the same number of ranks. A loader of all "
        "rows on every rank, without split_dataset_by_node and DistributedSampler, resumes with "
        "any number."
    )


def unsharded(loader: Any) -> Any:
    """Return a loader of all rows, where accelerate or a sampler shards them.

    Each rank would read some rows twice, or another number of batches than the others. What
    somebody else has sharded is returned as it is, with a message that rows may come twice.
    """
    if not is_sharded(loader):
        return loader
    sampler: Any = getattr(loader, "batch_sampler", None)
    if type(sampler).__name__ == "BatchSamplerShard" and not sampler.split_batches:
        return _loader_like(loader, batch_sampler=sampler.batch_sampler)
    is_plain = type(loader) is DataLoader and not loader.drop_last
    if is_plain and loader.batch_size and isinstance(loader.sampler, DistributedSampler):
        return _loader_like(loader, batch_size=loader.batch_size)
    say(
        "the loader was sharded by rank before, and may give rows to two ranks: they count twice. "
        "Pass one that was not sharded: from prepare_dataloaders, or a plain DataLoader."
    )
    return loader


def _loader_like(loader: Any, **options: Any) -> DataLoader[Any]:
    """Make a loader of the same dataset that reads it as another loader does."""
    return DataLoader(
        loader.dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        **options,
    )


def num_rounds(loader: Iterable[Any], world_size: int) -> int | None:
    """Return the number of batches that each rank gets in a pass; None for a stream."""
    length = num_batches(loader)
    return length if length is None or is_sharded(loader) else -(-length // world_size)
