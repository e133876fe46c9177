"""The batches of a run, pass after pass, and the position in them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from manualloop.arguments import check_arguments, require_loader
from manualloop.batches import as_spare, is_plain, num_rows
from manualloop.data.collate import explain_rows
from manualloop.data.sampler import count_packed, packs_rows, set_epoch
from manualloop.errors import DataError
from manualloop.notices import say
from manualloop.randomness import get_random_state, set_random_state
from manualloop.reading.dataloader import iterates_plainly, reads_by_sampler
from manualloop.reading.describe import (
    digest_of,
    identify,
    report_different_batches,
    require_same_data,
)
from manualloop.reading.generators import order_states, restore_order
from manualloop.reading.position import Position, WorkerState, keeps_pending
from manualloop.reading.ranks import (
    Round,
    Shard,
    is_sharded,
    num_parts,
    ranks_of,
    require_same_parts,
    rounds_of,
)
from manualloop.reading.sources import Source, source_of
from manualloop.reading.streams import tell_repeated
from manualloop.reading.workers import WorkerBatch, states_between_passes
from manualloop.strategy.base import Strategy
from manualloop.types import Window


class Reader:
    """Gives the windows of pass after pass over a loader, and knows its position in them.

    Args:
        source: A loader of any kind.
        position: What another reader's ``position`` returned: where the first pass begins.
        strategy: Strategy whose ranks share the batches; None: there is one rank. A loader that
            is sharded already gives each rank its own.
        count_rows: Function that counts the rows of a batch; None: that of the loader's kind.

    Attributes:
        source: The loader.
        num_samples: Rows of the pass that were used, on all ranks.

    >>> from manualloop.reading.sources import source_of
    >>> batches = [{"x": [1, 2]}, {"x": [3, 4]}, {"x": [5]}]
    >>> reader = Reader(source_of(batches))
    >>> next(reader.windows(2)).batches, reader.settle()
    ([{'x': [1, 2]}, {'x': [3, 4]}], None)
    >>> list(Reader(source_of(batches), reader.position()).windows(2))
    [Window(batches=[{'x': [5]}], num_samples=1, ends_epoch=True, starts=[4])]
    """

    def __init__(
        self,
        source: Source,
        position: Position | None = None,
        strategy: Strategy | None = None,
        count_rows: Callable[[Any], int] | None = None,
    ) -> None:
        self.source, self._strategy = source, strategy
        self._count_rows = count_rows or (count_packed if packs_rows(source.loader) else num_rows)
        self._facts = source.facts
        self._identity = identify(source.loader, self._facts)
        self._ranks = ranks_of(strategy)
        self._shard, self._copies = Shard(), 1
        if self._ranks.world_size > 1:
            if is_sharded(source.loader):
                self._copies = self._ranks.world_size  # rows there are for one that is read here
            else:
                self._shard = self._ranks
        self._num_parts = num_parts(source.loader, self._ranks)
        if position and position.get("num_samples"):
            require_same_parts(position.get("num_parts"), self._num_parts)
        self._loaded = position or None
        self.num_samples = position.get("num_samples", 0) if position else 0
        self._start: Position = {}
        self._num_used = 0  # batches of this pass
        self._workers: dict[str, WorkerState] = {}
        self._last_worker: int | None = None
        self._is_renumbered = self._is_checked = self._compares = False
        self._close_pass()

    def _close_pass(self) -> None:
        self._rounds: Iterator[Round] = iter(())
        self._left: int | None = None  # rounds of this pass that were not given; None: unknown
        self._unused: list[Round] = []  # given, and no update has been made of them
        self._ahead: deque[Round] = deque()  # read, and not given
        self._next_start = self.num_samples  # rows before the next batch
        self._is_open = self._is_read = self._is_at_end = self._has_more = False
        self._has_failed = False

    @property
    def num_rounds_left(self) -> int | None:
        """Number of batches that the pass has left for this rank; None if nobody knows."""
        return self._left

    def windows(self, size: int, epoch: int | None = None) -> Iterator[Window]:
        """Give the batches of this rank, in windows, to the end of the pass. Collective.

        A pass that was left is continued: what was given and not settled is given again. Of data
        without a length one batch is read ahead: nothing else tells that it ended. Batches whose
        rows count on another rank are marked.

        Args:
            size: Number of batches in a window; the last one may have fewer.
            epoch: Number of the epoch, which the loader is told when a pass begins.

        Raises:
            DataError: The loader gave another number of batches than its ``len()``, rows that
                cannot be stacked, or a worker of it failed.
        """
        if self._is_at_end:
            self._read_to_end()
        elif self._is_open:
            self._ahead.extendleft(reversed(self._unused))
            self._left = None if self._left is None else self._left + len(self._unused)
            self._unused, self._next_start = [], self.num_samples
            return self._group(size)
        elif self._has_failed:
            self._loaded = self.position()  # reading has failed, or was interrupted
        self._open(epoch)
        return self._group(size)

    def _open(self, epoch: int | None) -> None:
        loader, position = self.source.loader, self._loaded or Position()
        if epoch is not None:
            set_epoch(loader, epoch)
        if not self._is_checked and epoch is not None:
            _tell_order(loader)
        if self._shard.world_size > 1 and self._strategy:
            if not self._is_checked:
                require_same_data(loader, self._facts, self._strategy)
                self._compares = not reads_by_sampler(loader)  # else each reads its own alone
            if not position.get("num_batches"):
                begin_in_common(self.source, self._strategy)
        self._is_checked = True
        begun = self.source.open(position, self._shard)
        items = begun.items
        if not position.get("num_batches"):
            items = tell_repeated(items, loader, _batch_of)
        self._close_pass()
        self._loaded, self._start, self._num_used = None, begun.start, begun.num_used
        if position.get("num_workers") == getattr(loader, "num_workers", 0):
            self._workers |= position.get("workers", {})
            self._last_worker = position.get("last_worker")
        self._is_renumbered = self._last_worker is not None
        if self._shard.world_size == 1:
            self._rounds = map(Round, zip(items, strict=True))
        else:
            sampler = self.source.copy.sharded_sampler
            self._rounds = rounds_of(items, sampler, self._shard)
        self._left = None if begun.left is None else -(-begun.left // self._shard.world_size)
        self._is_open = True

    def _group(self, size: int) -> Iterator[Window]:
        window: list[Any] = []
        starts: list[int] = []
        num_samples, has_length, is_last = 0, self._left is not None, False
        while taken := self._ahead.popleft() if self._ahead else self._fetch():
            if self._left is not None:
                self._left -= 1
                is_last = self._left == 0
            elif not self._ahead and (ahead := self._fetch()):
                self._ahead.append(ahead)
            else:
                is_last = not self._ahead
            item = taken.items[taken.own]
            batch = item.batch if type(item) is WorkerBatch else item
            if taken.is_spare:
                batch = as_spare(batch)
            rows = self._count_rows(batch) * self._copies if taken.rows is None else taken.rows
            window.append(batch)
            starts.append(self._next_start + taken.rows_before)
            num_samples += rows
            self._next_start += rows
            self._unused.append(taken)
            if is_last or len(window) == size:
                yield Window(window, num_samples, is_last, starts)
                window, starts, num_samples = [], [], 0
            if is_last and has_length and self._read_to_end():
                raise DataError(self._length_message())
        if self._left:
            raise DataError(self._length_message())

    def _fetch(self) -> Round | None:
        """Read the next round; None: the pass is at its end."""
        if self._is_read:
            return None
        try:
            fetched = next(self._rounds, None)
        except BaseException as error:
            self._is_open, self._has_failed = False, True
            if isinstance(error, _OF_LOADERS) and not isinstance(error, DataError):
                self._explain(error)
            raise
        self._is_read = fetched is None
        if self._compares and self._strategy:
            self._compares = False
            batches = map(_batch_of, fetched.items) if fetched else ()
            report_different_batches(list(batches), self._strategy)
        return fetched

    def _explain(self, error: Exception) -> None:
        """Raise, from an error out of the loader, what is known of its reason."""
        loader = self.source.loader
        has_died = "DataLoader worker (pid" in str(error) or "DataLoader timed out" in str(error)
        # A row that has killed a worker, or stopped it, must not be read in this process as well.
        if not has_died and (reason := _explain_stack(loader)):
            raise DataError(reason) from error
        if isinstance(loader, DataLoader) and "DataLoader" in str(error):
            place = self.source.place(self._next_start).batch
            numbers, first = self.source.row_numbers() or (), self._next_start
            rows = list(islice(numbers, first, first + _NUM_ROWS_NAMED))
            raise DataError(_worker_message(place, rows, error)) from error

    def _length_message(self) -> str:
        length = len(self.source.loader)
        given = self._num_used + sum(round.num_batches for round in self._unused)
        found = given if self._left else f"more than {length}"
        return (
            f"The loader gave {found} batches, but its len() is {length}, and updates and "
            "schedule were planned by it. Fix __len__, or leave it out and give max_steps=; "
            "if the run was begun with another batch_size, continue with that."
        )

    def _read_to_end(self) -> bool:
        """Read past the last batch, as a plain `for` would; tell whether there was another.

        A sampler may have work to do there: torch's RandomSampler draws once more.
        """
        if not self._is_read and self._is_open:
            self._has_more = self._fetch() is not None
            self._is_read = True
        return self._has_more

    def settle(self, *, ends_epoch: bool = False) -> None:
        """Count what was given so far as used: an update has been made of it."""
        for used in self._unused:
            self._num_used += used.num_batches
            for item in used.items:
                if isinstance(item, WorkerBatch):
                    self._last_worker = item.worker
                    if item.state is not None:
                        known = self._workers.get(str(item.worker), WorkerState())
                        self._workers[str(item.worker)] = known | item.state
        self._unused.clear()
        self.num_samples, self._is_at_end = self._next_start, ends_epoch
        if ends_epoch:
            self._end_pass()

    def _end_pass(self) -> None:
        self.num_samples = self._next_start = self._num_used = 0
        self._start, self._last_worker = {}, None
        self._ahead.clear()
        loader = self.source.loader
        self._workers = states_between_passes(loader, self._workers)
        if self._is_renumbered and getattr(loader, "persistent_workers", False):
            self._loaded = self.position()  # torch counts them from 0 again, so we must too

    def position(self) -> Position:
        """Return the position behind the last batch that was counted as used."""
        if self._loaded is not None:
            return self._loaded  # no batch was asked for yet
        if self._is_at_end:
            self._read_to_end()
        position = self.source.position(self._start, self._num_used)
        position["num_samples"], position["num_parts"] = self.num_samples, self._num_parts
        position["data"] = digest_of(self._facts, self.source.loader)
        if getattr(self.source.loader, "num_workers", 0):
            position["workers"], position["last_worker"] = dict(self._workers), self._last_worker
        if keeps_pending(position):
            items = [item for round in (*self._unused, *self._ahead) for item in round.items]
            if items and isinstance(items[-1], WorkerBatch):
                position["is_at_end"] = True  # and the dataset may be at its start again
            batches = map(_batch_of, items)
            position["pending"] = [dict(b) if isinstance(b, Mapping) else b for b in batches]
            if position["kind"] == "stream" and not is_plain(position["pending"]):
                # No checkpoint holds objects: what was used is read again, up to the position.
                for name in ("pending", "dataset", "row_generators", "workers", "is_at_end"):
                    position.pop(name, None)  # type: ignore[misc]
        return position

    def close(self) -> None:
        """End the workers of the loader. A later pass begins at the position, with new ones."""
        copy, is_reading = self.source.copy, self._is_open and not self._is_read
        if not copy.has_workers or not (copy.keeps_workers or is_reading):
            return
        with suppress(Exception):  # of a sampler, perhaps: another error may be on its way
            self._loaded = self.position()
        self._close_pass()
        self._has_failed = self._loaded is None  # then the position is asked for again
        copy.end_workers()

    def continues(self, source: Source, strategy: Strategy | None) -> Reader | None:
        """Return the reader that continues with a loader; None: the loader is another one.

        The same loader is continued where it was left. One that was built again, of the same data
        with the same settings, takes over the position.
        """
        is_same = source.loader is self.source.loader
        if not is_same and not self._identity.matches(identify(source.loader, source.facts)):
            return None
        if is_same and ranks_of(strategy) == self._ranks:
            return self
        return Reader(source, self.position(), strategy, self._count_rows)


def windows(loader: Iterable[Any], size: int, *, skip: int = 0) -> Iterator[Window]:
    """Group the batches of one pass over a loader into the windows of its updates.

    A window ends with the pass, so the last one may be shorter. Batches are not moved to another
    device. A loader with a length is read one window at a time and never ahead; a stream is read
    one batch ahead, because nothing else tells where it ends.

    Args:
        loader: Any iterable of batches.
        size: Number of micro-batches per window (``gradient_accumulation_steps``).
        skip: Number of rows to leave out at the start of the pass, which must be those of whole
            windows. A prepared loader never loads them; other loaders read and drop them.

    Raises:
        DataError: The number of batches differs from the loader's ``len()``, or rows cannot be
            stacked.

    >>> import torch
    >>> batches = [{"x": torch.zeros(2)}, {"x": torch.zeros(2)}, {"x": torch.zeros(1)}]
    >>> [(len(window.batches), window.num_samples) for window in windows(batches, 2)]
    [(2, 4), (1, 1)]
    """
    check_arguments(size=size, skip=skip)
    require_loader(loader)
    return _windows(Reader(source_of(loader), {"num_samples": int(skip)}), int(size))


def _windows(reader: Reader, size: int) -> Iterator[Window]:
    for window in reader.windows(size):
        yield window
        reader.settle()  # otherwise it would keep every batch


def begin_in_common(source: Source, strategy: Strategy) -> None:
    """Let every rank draw the same order from random generators: those of rank 0.

    Not of a prepared loader, which draws nothing.
    """
    if source.kind == "prepared":
        return
    by_sampler = reads_by_sampler(source.loader)  # else every rank reads, and draws for, all rows
    found = get_random_state(devices=False), order_states(source.loader, rows=not by_sampler)
    random, of_order = strategy.gather(found)[0]
    set_random_state(random)
    restore_order(source.loader, of_order)


def _tell_order(loader: Any) -> None:
    """Report what becomes of batches that would come as the workers finish them."""
    if getattr(loader, "in_order", True) or not getattr(loader, "num_workers", 0):
        return
    if iterates_plainly(loader):
        say(
            "reading batches in order, as with in_order=True: a checkpoint could not tell which "
            "ones were used if they came as the workers finish them."
        )
    else:
        say(
            "not bit-exact after a resume, because of in_order=False: batches come as the workers "
            "finish them, so that rows may be lost or used twice. Use in_order=True."
        )


_OF_LOADERS = (LookupError, OSError, RuntimeError, TypeError, ValueError)


def _batch_of(item: Any) -> Any:
    return item.batch if isinstance(item, WorkerBatch) else item


def _explain_stack(loader: Any) -> str | None:
    """Look for the reason of a failed fetch in the first rows of the loader's dataset.

    Only of collators that do nothing but stack: one of the user's may fail for reasons of its own.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collator = getattr(getattr(loader, "collate_fn", None), "__name__", "")
    if collator not in ("default_collate", "default_data_collator"):
        return None
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    with suppress(Exception):  # one of them may be what cannot be read
        return explain_rows([dataset[number] for number in range(min(len(dataset), 100))])
    return None


def _worker_message(place: str, rows: Sequence[int], error: Exception) -> str:
    """Say which rows the workers were reading when one failed, was killed or did not answer."""
    if rows:
        named = ", ".join(map(str, rows))
        place = f"{place} or one soon after it, of the rows {named}, ..."
    return (
        f"A worker failed while it read {place}: {error}\nThe weights are those after the last "
        "update, and the run can be resumed from its checkpoint. To see the error where it "
        "happens: num_workers=0. Workers that do not answer are given up after "
        "DataLoader(timeout=seconds)."
    )


_NUM_ROWS_NAMED = 16
