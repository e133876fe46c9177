"""How a run reads a user's DataLoader: by a copy, so that the loader itself is never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any
from weakref import ref

from torch.utils.data import DataLoader, IterableDataset

from manualloop.batches import begin_pass
from manualloop.internals import copy_loader, shut_down_workers
from manualloop.notices import say
from manualloop.randomness import get_random_state, is_same_random_state, set_random_state
from manualloop.reading.position import Position
from manualloop.reading.ranks import Shard, ShardedSampler
from manualloop.reading.workers import ReportingCollate, WorkerStart, look_after_workers


def iterates_plainly(loader: Any) -> bool:
    """Tell whether a loader is a DataLoader that iterates as torch's own does."""
    return isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__


def reads_by_sampler(loader: Any) -> bool:
    """Tell whether batches can be assigned to ranks before their rows are loaded."""
    return iterates_plainly(loader) and not isinstance(loader.dataset, IterableDataset)


def sampler_name(loader: Any) -> str:
    """Return the attribute that holds the sampler by which a DataLoader reads."""
    return "sampler" if loader.batch_sampler is None else "batch_sampler"


class LoaderCopy:
    """A shallow copy of a loader, for the iterators of one run.

    The user's loader keeps its samplers, its ``collate_fn`` and its workers: its own iterators,
    before, after and during the run, give what they always gave.

    Args:
        loader: The user's loader. One that iterates in a way of its own is read as it is.
        draws_no_seed: Whether nothing depends on the seed that torch draws when a pass begins,
            so that rows may be read without torch's iterator.
    """

    def __init__(self, loader: Any, *, draws_no_seed: bool = False) -> None:
        self._loader, self._draws_no_seed = loader, draws_no_seed
        self._copy: Any = None
        self._iterator: Callable[[], Any] = _do_nothing  # a weak reference to one with workers

    @property
    def keeps_workers(self) -> bool:
        """Whether workers are kept from one pass to the next, and there are some."""
        return self._copy is not None and self._copy.persistent_workers

    @property
    def sharded_sampler(self) -> ShardedSampler | None:
        """The sampler of the pass, if it assigns batches to ranks before they are loaded."""
        if self._copy is None or not reads_by_sampler(self._copy):
            return None
        sampler = getattr(self._copy, sampler_name(self._copy))
        return sampler if isinstance(sampler, ShardedSampler) else None

    @property
    def has_workers(self) -> bool:
        """Whether there is an iterator with workers, which may have ended."""
        return self._iterator() is not None

    def end_workers(self) -> None:
        """End the workers, those that are kept included."""
        iterator = self._iterator()
        if iterator is not None:
            shut_down_workers(iterator, ends_python=False)
        self._copy, self._iterator = None, _do_nothing

    def iterate(
        self, position: Position, shard: Shard, changes: Mapping[str, Any] | None = None
    ) -> Iterator[Any]:
        """Begin a pass in which workers send their states along with the batches.

        Args:
            position: Where the pass begins; empty: at its start, with the workers that are kept.
            shard: This rank's part of the batches.
            changes: Attributes that the copy has instead of the loader's.
        """
        loader = self._loader
        if not iterates_plainly(loader):
            return iter(loader)  # accelerate's loaders, for example, wrap another
        if self.keeps_workers and not position:
            return iter(self._copy)
        self.end_workers()
        changes = dict(changes or {})
        if shard.world_size > 1 and reads_by_sampler(loader):
            name = sampler_name(loader)
            changes[name] = ShardedSampler(changes.get(name) or getattr(loader, name), shard)
        full = loader.batch_size if isinstance(loader.dataset, IterableDataset) else None
        if full is not None or loader.num_workers > 0:
            changes["collate_fn"] = ReportingCollate(loader.collate_fn, full)
        if loader.num_workers > 0:
            changes["worker_init_fn"] = _worker_start(loader, position)
        # A batch that comes when its worker is done has no place that could be resumed from.
        changes["in_order"] = True
        self._copy = copy_loader(loader, changes)
        is_plain = type(loader) is DataLoader and not loader.pin_memory
        if self._draws_no_seed and is_plain and loader.num_workers == 0:
            return read_in_process(self._copy)
        iterator = begin_pass(self._copy)
        if loader.num_workers > 0:
            self._iterator = ref(iterator)
            look_after_workers(iterator)
        return iterator


def read_in_process(loader: Any) -> Iterator[Any]:
    """Fetch and collate the rows of each batch, as a DataLoader without workers does.

    Its own iterator keeps records for the profiler, which take about 15 us a batch.
    """
    dataset = loader.dataset
    fetch: Any = getattr(dataset, "__getitems__", None) or (lambda rows: [dataset[r] for r in rows])
    return map(loader.collate_fn, map(fetch, loader.batch_sampler))


def _worker_start(loader: Any, position: Position) -> WorkerStart:
    states = {int(worker): state for worker, state in position.get("workers", {}).items()}
    last = position.get("last_worker")
    first = 0 if last is None else (last + 1) % loader.num_workers
    return WorkerStart(loader.worker_init_fn, loader.collate_fn, first, states)


class ResumedSampler:
    """A sampler whose first pass leaves out what was used before.

    Args:
        sampler: The loader's own sampler.
        num_used: Number of its entries to leave out.
        num_indices: Number of rows to leave out instead, if they came in batches of another size.
        rewind: Function called before the sampler may draw. What others draw between that call
            and the first entry is undone. None: nothing needs it.
        after: Function called when the order has been drawn, to put back what the rows draw from.
        now: The random state to continue with.
    """

    def __init__(
        self,
        sampler: Any,
        num_used: int,
        num_indices: int | None,
        rewind: Callable[[], None] | None,
        after: Callable[[], None],
        now: Any,
    ) -> None:
        self._sampler, self._num_used, self._num_indices = sampler, num_used, num_indices
        self._rewind, self._after, self._now = rewind, after, now
        self._is_first = True

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        # Not a generator: samplers may draw here, or when the first entry is asked for. A loader
        # with workers calls this twice before it takes any.
        if not self._is_first:
            return iter(self._sampler)
        if self._rewind is None:
            return self._skip(iter(self._sampler), None)
        self._rewind()
        entries = iter(self._sampler)
        return self._skip(entries, get_random_state(devices=False))

    def _skip(self, entries: Iterator[Any], drawn: Any) -> Iterator[Any]:
        self._is_first = False
        after, self._rewind, self._after = self._after, None, _do_nothing  # they hold the loader
        if drawn is not None:
            set_random_state(drawn)
        if self._num_indices is not None:
            entries = self._skip_indices(entries, self._num_indices, after)
        elif self._num_used:
            next(entries, None)
            drawn = get_random_state(devices=False)
            for _ in islice(entries, self._num_used - 1):
                pass
            if not is_same_random_state(drawn, get_random_state(devices=False)):
                say(
                    "not bit-exact, because the sampler draws from the global random generator as "
                    "it goes. Give it a generator of its own."
                )
            set_random_state(self._now)
            after()
        yield from entries

    def _skip_indices(
        self, entries: Iterator[Any], num_indices: int, after: Callable[[], None]
    ) -> Iterator[Any]:
        for entry in entries:
            skipped = min(num_indices, len(entry))
            num_indices -= skipped
            if num_indices == 0 and self._now is not None:
                set_random_state(self._now)
                self._now = None
                after()
            if skipped < len(entry):
                yield entry[skipped:]


def _do_nothing() -> None:
    pass
