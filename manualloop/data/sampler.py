"""The order in which a loader reads its rows: a pure function of seed and epoch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain, pairwise, starmap
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from manualloop.data.grouping import Ints, budgeted_batches, cut, grouped_order, longest_first
from manualloop.data.packing import cut_sums, packed_batches
from manualloop.errors import ConfigError, DataError


def order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """Return the rows in the order of one epoch.

    It is the permutation that accelerate's seedable sampler, and so transformers' ``Trainer``,
    draws for the same seed and epoch. Nothing is drawn from the global random generator.

    Args:
        num_rows: Number of rows in the dataset.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.

    >>> order(5, seed=42, epoch=0)
    [2, 4, 3, 0, 1]
    >>> order(5, seed=42, epoch=1)
    [3, 1, 4, 2, 0]
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(num_rows, generator=generator).tolist()


class Made(NamedTuple):
    """The settings that, with the number of an epoch, determine its order.

    Attributes:
        seed: Seed of the run.
        batch_size: Number of rows per batch.
        max_tokens: Most tokens per batch; None means ``batch_size`` rows per batch.
        num_ranks: Number of ranks that read a batch each, which matters if rows are grouped.
    """

    seed: int
    batch_size: int
    max_tokens: int | None
    num_ranks: int


_NUM_NAMED = 16


class RowNumbers(list[int]):
    """The row numbers of a batch, with the epoch in which the rows are read.

    Args:
        rows: The row numbers.
        epoch: Number of the epoch.

    >>> from copy import deepcopy  # by the way in which numbers are sent to workers
    >>> numbers = RowNumbers([4, 1, 3], epoch=2)
    >>> [part.epoch for part in (numbers[1:], numbers + [5], deepcopy(numbers))]
    [2, 2, 2]
    """

    def __init__(self, rows: Iterable[int], epoch: int) -> None:
        super().__init__(rows)
        self.epoch = epoch

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return RowNumbers(found, self.epoch) if isinstance(place, slice) else found

    def __add__(self, other: Any) -> Any:
        return RowNumbers(super().__add__(other), self.epoch)

    def __reduce__(self) -> Any:
        return RowNumbers, (list(self), self.epoch)


class OrderedBatchSampler:
    """A batch sampler whose order is a function of seed and epoch.

    Args:
        num_rows: Number of rows in the dataset.
        batch_size: Number of rows per batch; the last one of an epoch may be shorter.
        shuffle: Whether rows are shuffled; False keeps the dataset's order.
        seed: Seed of the run.
        drop_last: Whether to drop a shorter last batch.
        split: Name of the split in messages.
        lengths: Number of tokens of each row, by which rows are grouped; None does not group them.
        max_tokens: Most tokens per batch, instead of ``batch_size`` rows.
        longest_first: Whether to sort rows by length instead of shuffling them.
        packs: Whether the rows of a batch become one row of at most ``max_tokens`` tokens.

    Attributes:
        packs: As the argument.
        epoch: Epoch of the next pass.
        num_ranks: Number of ranks that read a batch each, for batches that are grouped by length.
        tells_epoch: Whether batches are ``RowNumbers``, for rows that depend on the epoch.
        epoch_of_rows: Epoch in which rows are read; None means ``epoch``.

    >>> sampler = OrderedBatchSampler(5, batch_size=2, shuffle=True, seed=42)
    >>> list(sampler)
    [[2, 4], [3, 0], [1]]
    >>> sampler.start_at(2)  # a number of rows, for the next pass only; they are not loaded
    >>> list(sampler), list(sampler)
    ([[3, 0], [1]], [[2, 4], [3, 0], [1]])
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 42,
        drop_last: bool = False,
        split: str = "train",
        lengths: Ints | None = None,
        max_tokens: int | None = None,
        longest_first: bool = False,
        packs: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
        self.num_rows = num_rows
        self.batch_size = int(batch_size)  # perhaps of NumPy, which JSON has not
        self.shuffle = shuffle
        self.seed = int(seed)
        self.drop_last = drop_last
        self.split = split
        self.lengths = lengths
        self.max_tokens = None if max_tokens is None else int(max_tokens)
        self.longest_first, self.packs = longest_first, packs
        self.epoch, self.num_ranks = 0, 1
        self.tells_epoch = False
        self.epoch_of_rows: int | None = None
        # A DataLoader draws a seed for its workers at every pass. With this generator the draw is
        # a function of (seed, epoch), too, and leaves the global generator alone.
        self.generator = torch.Generator().manual_seed(self.seed)
        self._start: int = 0
        self._made: Made | None = None
        self._under_way: Made | None = None
        self._num_batches: int | None = None
        if max_tokens is not None and lengths is not None and not longest_first:
            self._refuse_too_long(lengths, max_tokens)

    def _refuse_too_long(self, lengths: Ints, max_tokens: int) -> None:
        row = int(lengths.argmax())
        if lengths[row] > max_tokens:
            raise ConfigError(
                f"Row {row} of {self.split} has {lengths[row]} tokens, but a batch holds at "
                f"most max_tokens={max_tokens}. Use max_length={max_tokens} or a larger max_tokens."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass takes."""
        if epoch != self.epoch:
            self._under_way = None
        self.epoch = epoch
        self.generator.manual_seed(self.seed + epoch)

    def start_at(self, num_rows: int, made: Made | None = None) -> None:
        """Skip rows at the start of the next pass.

        Args:
            num_rows: Number of rows to skip.
            made: Settings of the order in which these rows were used; None means the sampler's own.
        """
        self._start, self._made = num_rows, made

    @property
    def own(self) -> Made:
        """The sampler's own settings, which determine the order of a new epoch."""
        return Made(self.seed, self.batch_size, self.max_tokens, self.num_ranks)

    @property
    def made(self) -> Made:
        """The settings of the current epoch, which may have begun with other ones."""
        return self._under_way or self.own

    def batches(self, epoch: int | None = None) -> list[list[int]]:
        """Return the row numbers of each batch of an epoch; None means the current one."""
        is_now = epoch is None or epoch == self.epoch
        made = self.made if is_now else self.own
        return list(self._batches(0, made, self.epoch if epoch is None else epoch))

    def rows(self, epoch: int | None = None) -> list[int]:
        """Return the row numbers of an epoch in their order; None means the current one."""
        return [row for batch in self.batches(epoch) for row in batch]

    def batch_at(self, num_rows: int, epoch: int | None = None) -> int:
        """Return the number of the batch that begins after ``num_rows`` rows of a pass."""
        return sum(end <= num_rows for end in accumulate(map(len, self.batches(epoch))))

    def row_name(self, num_rows: int, row: int, epoch: int | None = None) -> str:
        """Name a row of the batch that begins after ``num_rows`` rows of a pass."""
        if not self.packs:
            return f"row id {self.rows(epoch)[num_rows + row]}"
        numbers = self.batches(epoch)[self.batch_at(num_rows, epoch)]  # of which nobody knows which
        more = ", ..." if len(numbers) > _NUM_NAMED else ""
        return f"row ids {', '.join(map(str, numbers[:_NUM_NAMED]))}{more}"

    def num_left(self) -> int:
        """Return the number of batches in the next pass."""
        if self.max_tokens is None:
            return self._count(self.num_rows - self._start)
        return sum(1 for _ in self._batches(self._start, self._made or self.own, self.epoch))

    def _count(self, num_rows: int) -> int:
        """Return the number of batches of ``batch_size`` in ``num_rows`` rows."""
        whole, rest = divmod(max(num_rows, 0), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def _order(self, made: Made, epoch: int) -> list[int]:
        if self.longest_first and self.lengths is not None:
            return longest_first(self.lengths)
        if not self.shuffle:
            return list(range(self.num_rows))
        if self.lengths is None:
            return order(self.num_rows, made.seed, epoch)
        return grouped_order(self.lengths, made.batch_size, made.seed, epoch, made.num_ranks)

    def _batches(self, start: int, made: Made, epoch: int) -> Iterator[list[int]]:
        """Return the batches after ``start`` rows of an order with the settings ``made``."""
        if self.shuffle and made.max_tokens is not None and self.lengths is not None:
            plan = packed_batches if self.packs else budgeted_batches
            batches = plan(self.lengths, made.max_tokens, made.seed, epoch, made.num_ranks)
            ends = list(accumulate(map(len, batches)))
            if made.max_tokens == self.max_tokens and start in (0, *ends):
                return iter(batches[bisect_right(ends, start) :])
            rows = [row for batch in batches for row in batch]
        else:
            rows = self._order(made, epoch)
        rows = rows[start:]
        if self.max_tokens is None or self.lengths is None:
            starts = list(range(0, len(rows), self.batch_size))
        else:
            starts = (cut_sums if self.packs else cut)(self.lengths[rows], self.max_tokens)
        bounds: Iterable[tuple[int, int]] = pairwise([*starts, len(rows)])
        if self.drop_last:
            bounds = [(begin, end) for begin, end in bounds if end - begin == self.batch_size]
        return map(rows.__getitem__, starmap(slice, bounds))

    def __iter__(self) -> Iterator[list[int]]:
        # A DataLoader with workers calls iter() twice, so nothing happens before the first batch.
        return chain.from_iterable(self._passes())

    def _passes(self) -> Iterator[Iterator[list[int]]]:
        """Give one pass, whose order is made when its first batch is asked for."""
        start, made = self._start, self._made or self.own
        self._start, self._made, self._under_way = 0, None, made
        batches = self._batches(start, made, self.epoch)
        if self.tells_epoch:
            of_rows = self.epoch if self.epoch_of_rows is None else self.epoch_of_rows
            batches = map(partial(RowNumbers, epoch=of_rows), batches)
        yield batches

    def __len__(self) -> int:
        if self.max_tokens is None:
            return self._count(self.num_rows)
        if self._num_batches is None:  # the same in every epoch
            self._num_batches = sum(1 for _ in self._batches(0, self.own, self.epoch))
        return self._num_batches


def ordered_loader(
    rows: Any,
    split: str,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    lengths: Ints | None = None,
    max_tokens: int | None = None,
    tells_epoch: bool = False,
    packs: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """Make a loader that reads a dataset in the order of ``order``, or a stream in its own.

    Raises:
        DataError: The loader would have no batch.
    """
    if not hasattr(rows, "__len__"):
        options["generator"] = torch.Generator().manual_seed(int(seed))
        return DataLoader(rows, batch_size=batch_size, drop_last=drop_last, **options)
    sampler = OrderedBatchSampler(
        len(rows),
        batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
        split=split,
        lengths=lengths,
        max_tokens=max_tokens,
        packs=packs,
    )
    sampler.tells_epoch = tells_epoch
    if len(sampler) == 0:
        raise DataError(
            f"{split} has {len(rows)} rows: with batch_size={batch_size} and drop_last it has 0 "
            "batches. Use drop_last=False or a smaller batch_size."
        )
    return DataLoader(rows, batch_sampler=sampler, generator=sampler.generator, **options)


def longest_first_view(loader: Any, *, fills_batches: bool) -> DataLoader[Any] | None:
    """Return a loader of the same rows, the longest first, in batches of about one size.

    None means that results might differ. A view needs a prepared loader, and an attention mask that
    hides the padding from the model.

    Args:
        loader: Loader of the rows in any order.
        fills_batches: Whether batches hold as many tokens as the loader's largest batch can. Else
            they hold the number of its average batch without padding: a CPU is up to a fifth faster
            if its data stay in its caches.
    """
    sampler = getattr(loader, "batch_sampler", None)
    if type(loader) is not DataLoader or not isinstance(sampler, OrderedBatchSampler):
        return None
    find: Any = getattr(loader.collate_fn, "padded_lengths", None)
    lengths: Ints | None = None if find is None else find(loader.dataset)
    if lengths is None or sampler.drop_last:
        return None
    num_tokens = int(lengths.max() if fills_batches else lengths.mean())
    view = OrderedBatchSampler(
        sampler.num_rows,
        sampler.batch_size,
        split=sampler.split,
        lengths=lengths,
        max_tokens=sampler.max_tokens or sampler.batch_size * num_tokens,
        longest_first=True,
    )
    return DataLoader(
        loader.dataset,
        batch_sampler=view,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=view.generator,
    )


@contextmanager
def rows_fixed(loader: Iterable[Any]) -> Iterator[None]:
    """Let rows that depend on the epoch be those of the first, so that scores can be compared."""
    parts = [getattr(loader, name, None) for name in ("batch_sampler", "dataset")]
    part: Any = next((part for part in parts if hasattr(part, "epoch_of_rows")), None)
    if part is None:
        yield
        return
    before, part.epoch_of_rows = part.epoch_of_rows, 0
    try:
        yield
    finally:
        part.epoch_of_rows = before


def rows_before(loader: Iterable[Any], number: int) -> int:
    """Return the number of rows before a batch of a pass; 0 if it is unknown."""
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, OrderedBatchSampler):
        return sum(map(len, sampler.batches()[:number]))
    size = getattr(sampler, "batch_size", None)
    return number * size if isinstance(size, int) else 0


def count_packed(batch: Any) -> int:
    """Return the number of rows in a pack, whose positions begin at 0 in each."""
    return int((batch["position_ids"] == 0).sum())


def packs_rows(loader: Any) -> bool:
    """Tell whether a loader is a prepared one whose batches are packs."""
    sampler = getattr(loader, "batch_sampler", None)
    return isinstance(sampler, OrderedBatchSampler) and sampler.packs


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Call ``set_epoch`` of a loader, which is the convention for announcing an epoch.

    If the loader has none, it is called on its batch sampler, its sampler and its dataset, where
    these have one. accelerate's loaders pass it on.
    """
    parts: list[Any] = [loader]
    if not hasattr(loader, "set_epoch"):
        parts = [getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset")]
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def num_batches(loader: Iterable[Any]) -> int | None:
    """Return the number of batches in a pass; None for a stream without a length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
