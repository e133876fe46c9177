"""A sampler that leaves out what was used before the run was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from manualloop.notices import say
from manualloop.randomness import get_random_state, is_same_random_state, set_random_state


class ResumedSampler:
    """A sampler whose first pass leaves out what was used before.

    Args:
        sampler: That the loader has.
        num_used: Of what it gives, to leave out.
        num_indices: Rows to leave out instead, if they came in batches of another size.
        rewind: Called before the sampler may draw; what is drawn between that and its first
            entry, by others, is undone. None: nothing needs it.
        now: The random state to go on with.
    """

    def __init__(
        self,
        sampler: Any,
        num_used: int,
        num_indices: int | None,
        rewind: Callable[[], None] | None,
        now: Any,
    ) -> None:
        self._sampler, self._num_used, self._num_indices = sampler, num_used, num_indices
        self._rewind, self._now, self._is_first = rewind, now, True

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
        self._rewind = None  # it holds the loader, and so this: workers would end late
        if drawn is not None:
            set_random_state(drawn)
        if self._num_indices is not None:
            entries = self._skip_indices(entries, self._num_indices)
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
        yield from entries

    def _skip_indices(self, entries: Iterator[Any], num_indices: int) -> Iterator[Any]:
        for entry in entries:
            skipped = min(num_indices, len(entry))
            num_indices -= skipped
            if num_indices == 0 and self._now is not None:
                set_random_state(self._now)
                self._now = None
            if skipped < len(entry):
                yield entry[skipped:]


def reads_here(loader: Any) -> bool:
    """Tell whether a loader of batches does nothing but fetch and collate, in this process."""
    return type(loader) is DataLoader and loader.num_workers == 0 and not loader.pin_memory


class Here:
    """The batches of a loader.

    Args:
        loader: With rows that are read in this process.
        batch_sampler: Gives the rows of each batch.
    """

    def __init__(self, loader: DataLoader[Any], batch_sampler: Any) -> None:
        self._index_sampler, self._rows = batch_sampler, iter(batch_sampler)
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._get_many: Any = getattr(loader.dataset, "__getitems__", None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        rows = next(self._rows)
        if self._get_many is None:
            return self._collate([self._dataset[row] for row in rows])
        return self._collate(self._get_many(rows))
