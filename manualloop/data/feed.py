"""The batches of a run, pass after pass, and the place in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader

from manualloop.data.collate import explain_rows
from manualloop.data.order import OrderedBatchSampler
from manualloop.data.passes import is_read_ahead, open_pass, place_in
from manualloop.data.workers import Carried, states_between_passes
from manualloop.errors import DataError

_END = object()


class Feed:
    """Gives the batches of pass after pass over a loader, and keeps the place.

    Args:
        loader: Any iterable of batches.
        position: What ``state_dict`` of another feed returned: where the first pass begins.

    >>> batches = ["a", "b", "c"]
    >>> feed = Feed(batches)
    >>> given = feed.batches()
    >>> next(given), next(given), feed.settle()
    (('a', False), ('b', False), None)
    >>> list(Feed(batches, feed.state_dict()).batches())
    [('c', True)]
    """

    def __init__(self, loader: Iterable[Any], position: Mapping[str, Any] | None = None) -> None:
        self._loader = loader
        self._resumed = dict(position) if position else None
        self._start: dict[str, Any] = {}
        self._num_used = 0  # batches of this pass
        self._unused: list[Any] = []  # given, and no update has been made of them yet
        self._ahead: Any = _END
        self._workers: dict[str, dict[str, Any]] = {}
        self._last_worker: int | None = None
        self._is_renumbered = False
        self._items: Iterator[Any] = iter(())
        self._is_read = self._is_at_end = self._has_more = False

    def batches(self, skip: int = 0) -> Iterator[tuple[Any, bool]]:
        """Make one pass: give each batch, and whether it is the last one.

        Of data without a length one batch is read ahead: nothing else tells that it ended.

        Args:
            skip: Rows at its start that were used before.

        Raises:
            DataError: The loader gave another number of batches than its ``len()``, rows that
                cannot be stacked, or a worker of it failed.
        """
        position = self._resumed or {}
        begun = open_pass(self._loader, skip, position)
        self._resumed, self._start = None, begun.start
        self._num_used = begun.num_used
        if position.get("num_workers") == getattr(self._loader, "num_workers", 0):
            self._workers |= position.get("workers", {})
            self._last_worker = position.get("last_worker")
        self._is_renumbered = self._last_worker is not None
        self._is_read = self._is_at_end = False
        self._items = items = _fetch(begun.items, self._loader, skip)
        if begun.left is None:
            yield from self._read_ahead(items)
            return
        number = 0
        for number, item in enumerate(items, start=1):
            self._unused.append(item)
            yield _batch_of(item), number == begun.left
            if number == begun.left:
                number += self._read_to_end()
        if number != begun.left:
            length = len(self._loader)  # type: ignore[arg-type]
            found = length - begun.left + number if number < begun.left else f"more than {length}"
            raise DataError(
                f"The loader gave {found} batches, but its len() is {length}, and updates and "
                "schedule were planned by it. Mend __len__, or leave it out and give max_steps=; "
                "if the run was begun with another batch_size, go on with that."
            )

    def _read_to_end(self) -> bool:
        """Read past the last batch, as a plain `for` would; tell whether there was another.

        A sampler may have work to do there: torch's RandomSampler draws once more.
        """
        if not self._is_read:
            self._is_read, self._has_more = True, next(self._items, _END) is not _END
        return self._has_more

    def _read_ahead(self, items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        ahead = next(items, _END)
        while ahead is not _END:
            item, self._ahead = ahead, _END
            self._unused.append(item)
            self._ahead = ahead = next(items, _END)
            yield _batch_of(item), ahead is _END

    def settle(self, *, ends_epoch: bool = False) -> None:
        """Count what was given so far as used: an update has been made of it."""
        self._num_used += len(self._unused)
        for item in self._unused:
            if isinstance(item, Carried):
                self._last_worker = item.worker
                if item.state is not None:
                    known = self._workers.get(str(item.worker), {})
                    self._workers[str(item.worker)] = known | item.state
        self._unused.clear()
        self._is_at_end = ends_epoch
        if ends_epoch:
            self._num_used, self._start, self._ahead, self._last_worker = 0, {}, _END, None
            self._workers = states_between_passes(self._loader, self._workers)
            if self._is_renumbered and getattr(self._loader, "persistent_workers", False):
                self._resumed = self.state_dict()  # torch counts them from 0 again, so we must too

    def state_dict(self) -> dict[str, Any]:
        """Return the place behind the last batch that was counted as used."""
        if self._resumed is not None:
            return self._resumed  # no batch was asked for yet
        if self._is_at_end:
            self._read_to_end()
        position = place_in(self._loader, self._start, self._num_used)
        if getattr(self._loader, "num_workers", 0):
            position |= {"workers": dict(self._workers), "last_worker": self._last_worker}
        if is_read_ahead(position):
            if isinstance(self._ahead, Carried):
                position["is_at_end"] = True  # and the dataset may be at its start again
            batches = [_batch_of(item) for item in (*self._unused, self._ahead) if item is not _END]
            position["pending"] = [dict(b) if isinstance(b, Mapping) else b for b in batches]
        return position


def _batch_of(item: Any) -> Any:
    return item.batch if isinstance(item, Carried) else item


def _fetch(items: Iterator[Any], loader: Any, num_used: int) -> Iterator[Any]:
    number = 0
    try:
        for item in items:
            yield item
            number += 1
    except (LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        has_died = "DataLoader worker (pid" in str(error) or "DataLoader timed out" in str(error)
        # A row that has killed a worker, or stopped it, must not be read here as well.
        if not has_died and (reason := _explain_stack(loader)):
            raise DataError(reason) from error
        if isinstance(loader, DataLoader) and "DataLoader" in str(error):
            raise DataError(_worker_message(loader, num_used, number, error)) from error
        raise


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


def _worker_message(loader: DataLoader[Any], skip: int, number: int, error: Exception) -> str:
    """Say which rows the workers were reading when one failed, was killed or did not answer."""
    sampler = loader.batch_sampler
    place = f"what comes after batch {number} of this pass"
    if isinstance(sampler, OrderedBatchSampler):
        begin = skip + number * sampler.batch_size
        rows = sampler.rows()[begin : begin + loader.num_workers * sampler.batch_size]
        place = (
            f"{sampler.split} batch {begin // sampler.batch_size} or one soon after it, of the "
            f"rows {', '.join(map(str, rows[:16]))}{', ...' if len(rows) > 16 else ''}"
        )
    return (
        f"A worker failed while it read {place}: {error}\nThe weights are those after the last "
        "update, and the run can go on from its checkpoint. To see the error where it happens: "
        "num_workers=0. Workers that do not answer are given up after DataLoader(timeout=seconds)."
    )
