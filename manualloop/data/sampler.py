"""In which order a loader reads its rows: a pure function of seed and epoch, and a position."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from manualloop.data.grouping import Ints, budgeted_batches, cut, grouped_order, longest_first
from manualloop.errors import ConfigError, DataError


def order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """Return the rows in the order of one epoch.

    It is the permutation that accelerate's seedable sampler, and so transformers' ``Trainer``,
    draws for the same seed and epoch. Nothing is drawn from the global random generator.

    Args:
        num_rows: Rows in the dataset.
        seed: Of the whole run.
        epoch: From 0.

    >>> order(5, seed=42, epoch=0)
    [2, 4, 3, 0, 1]
    >>> order(5, seed=42, epoch=1)
    [3, 1, 4, 2, 0]
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(num_rows, generator=generator).tolist()


class Made(NamedTuple):
    """Of what the order of an epoch is made, beside its number.

    Attributes:
        seed: Of the whole run.
        batch_size: Rows a batch, by which rows are grouped.
        max_tokens: Tokens a batch; None: batches have ``batch_size`` rows.
        num_ranks: That read a batch each, side by side, if rows are grouped.
    """

    seed: int
    batch_size: int
    max_tokens: int | None
    num_ranks: int


class OrderedBatchSampler:
    """The batches of row numbers that a prepared DataLoader reads: a function of seed and epoch.

    Args:
        num_rows: Rows in the dataset.
        batch_size: Rows a batch; the last one of an epoch may be shorter.
        shuffle: False keeps the dataset's order.
        seed: Of the whole run.
        drop_last: Leave out a shorter last batch.
        split: What the rows are called in messages.
        lengths: Tokens of each row, to put rows of about one length together.
        max_tokens: A batch has as many rows as fit into this budget, instead of ``batch_size``.
        longest_first: Sort the rows, instead of drawing them.

    Attributes:
        epoch: Whose order the next pass takes.
        num_ranks: That read a batch each, side by side; of batches grouped by length.

    >>> sampler = OrderedBatchSampler(5, batch_size=2, shuffle=True, seed=42)
    >>> list(sampler)
    [[2, 4], [3, 0], [1]]
    >>> sampler.start_at(2)  # rows: for the next pass only, and the rows before are never loaded
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
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.split = split
        self.lengths = lengths
        self.max_tokens = max_tokens
        self.longest_first = longest_first
        self.epoch, self.num_ranks = 0, 1
        # A DataLoader draws a seed for its workers at every pass. It is given this generator, so
        # that the draw leaves the global one alone and is a function of (seed, epoch) too.
        self.generator = torch.Generator().manual_seed(seed)
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
                f"Row {row} of {self.split} has {lengths[row]} tokens, and a batch holds "
                f"max_tokens={max_tokens}. Use max_length=, or a larger budget."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next pass takes."""
        if epoch != self.epoch:
            self._under_way = None
        self.epoch = epoch
        self.generator.manual_seed(self.seed + epoch)

    def start_at(self, num_rows: int, made: Made | None = None) -> None:
        """Let the next pass, and only that, begin after so many rows.

        Args:
            num_rows: Rows to leave out.
            made: Of what the order was made in which they were used; None: of the sampler's own.
        """
        self._start, self._made = num_rows, made

    @property
    def own(self) -> Made:
        """Of what the order of an epoch is made, beside its number."""
        return Made(self.seed, self.batch_size, self.max_tokens, self.num_ranks)

    @property
    def made(self) -> Made:
        """Of what the order of the current epoch was made: it may have begun with others."""
        return self._under_way or self.own

    def batches(self, epoch: int | None = None) -> list[list[int]]:
        """Return the row numbers of each batch of a whole pass; None: of the current epoch."""
        is_now = epoch is None or epoch == self.epoch
        made = self.made if is_now else self.own
        return list(self._batches(0, made, self.epoch if epoch is None else epoch))

    def rows(self, epoch: int | None = None) -> list[int]:
        """Return the row numbers of a whole pass, in order; None: of the current epoch."""
        return [row for batch in self.batches(epoch) for row in batch]

    def batch_at(self, num_rows: int, epoch: int | None = None) -> int:
        """Return the number of the batch that begins after so many rows of a pass."""
        return sum(end <= num_rows for end in accumulate(map(len, self.batches(epoch))))

    def num_left(self) -> int:
        """Return the number of batches that the next pass will give."""
        if self.max_tokens is None:
            return self._count(self.num_rows - self._start)
        return sum(1 for _ in self._batches(self._start, self._made or self.own, self.epoch))

    def _count(self, num_rows: int) -> int:
        """Return the number of batches of ``batch_size`` in so many rows."""
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
        """Give the batches after so many rows of an order that may have been made otherwise."""
        if self.shuffle and made.max_tokens is not None and self.lengths is not None:
            batches = budgeted_batches(
                self.lengths, made.max_tokens, made.seed, epoch, made.num_ranks
            )
            ends = list(accumulate(map(len, batches)))
            if made.max_tokens == self.max_tokens and start in (0, *ends):
                yield from batches[bisect_right(ends, start) :]
                return
            rows = [row for batch in batches for row in batch]
        else:
            rows = self._order(made, epoch)
        rows = rows[start:]
        if self.max_tokens is None or self.lengths is None:
            starts = list(range(0, len(rows), self.batch_size))
        else:
            starts = cut(self.lengths[rows], self.max_tokens)
        for begin, end in pairwise([*starts, len(rows)]):
            if not self.drop_last or end - begin == self.batch_size:
                yield rows[begin:end]

    def __iter__(self) -> Iterator[list[int]]:
        # Not before the first batch is asked for: with workers a DataLoader calls iter() twice.
        start, made = self._start, self._made or self.own
        self._start, self._made, self._under_way = 0, None, made
        yield from self._batches(start, made, self.epoch)

    def __len__(self) -> int:
        if self.max_tokens is None:
            return self._count(self.num_rows)
        if self._num_batches is None:  # as many in every epoch
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
    **options: Any,
) -> DataLoader[Any]:
    """Make a loader that reads a dataset by ``order``, or a stream in the stream's own.

    Raises:
        DataError: There would be no batch in it.
    """
    if not hasattr(rows, "__len__"):
        options["generator"] = torch.Generator().manual_seed(seed)
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
    )
    if len(sampler) == 0:
        raise DataError(
            f"{split} has {len(rows)} rows: with batch_size={batch_size} and drop_last it has 0 "
            "batches. Use drop_last=False or a smaller batch_size."
        )
    return DataLoader(rows, batch_sampler=sampler, generator=sampler.generator, **options)


def longest_first_view(loader: Any, *, fills_batches: bool) -> DataLoader[Any] | None:
    """Return a loader of the same rows that gives the longest first, in batches of about one size.

    None: it might give other numbers. It takes a prepared loader, and an attention mask that hides
    the padding from the model.

    Args:
        loader: That gives the rows in any order.
        fills_batches: Whether a batch holds as many tokens as the loader's largest can; else as
            many as its batches have on average, without padding. A CPU is up to a fifth faster if
            what it computes stays in its caches.
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


def rows_before(loader: Iterable[Any], number: int) -> int:
    """Return how many rows of a pass come before a batch; 0 where nothing tells."""
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, OrderedBatchSampler):
        return sum(map(len, sampler.batches()[:number]))
    size = getattr(sampler, "batch_size", None)
    return number * size if isinstance(size, int) else 0


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tell a loader which epoch begins, by the ecosystem's convention.

    ``set_epoch`` of the loader itself (accelerate's loaders pass it on), or else of its batch
    sampler, its sampler and its dataset, wherever there is one.
    """
    parts: list[Any] = [loader]
    if not hasattr(loader, "set_epoch"):
        parts = [getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset")]
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def num_batches(loader: Iterable[Any]) -> int | None:
    """Return the number of batches of a pass, or None for a stream that has no length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
