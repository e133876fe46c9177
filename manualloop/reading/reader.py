"""The batches of a run, pass after pass, and the place in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from manualloop.data.collate import explain_rows
from manualloop.data.sampler import OrderedBatchSampler
from manualloop.errors import DataError
from manualloop.reading.ranks import Deal, Round, as_spare, is_dealt, rounds_of
from manualloop.reading.sources import begin_in_common, is_read_ahead, open_pass, place_in
from manualloop.reading.workers import Carried, states_between_passes
from manualloop.strategy.base import Strategy
from manualloop.tasks.items import num_rows

_END = object()


class Given(NamedTuple):
    """A batch of this rank, and its place among those of the round: see ``Round``.

    Attributes:
        batch: What the loader gave; marked, if it is a spare.
        is_last: Whether it is the last one of its pass.
        rows_before: In the batches of the ranks before this one.
        rows: In those of all ranks; None: so many as in this one, times ``num_copies``.
        num_copies: Ranks that have a batch like it, which nobody has seen here.
    """

    batch: Any
    is_last: bool
    rows_before: int = 0
    rows: int | None = None
    num_copies: int = 1

    def num_rows(self) -> int:
        """Count the rows of the round."""
        return num_rows(self.batch) * self.num_copies if self.rows is None else self.rows


class Feed:
    """Gives the batches of pass after pass over a loader, and keeps the place.

    Args:
        loader: Any iterable of batches.
        position: What ``state_dict`` of another feed returned: where the first pass begins.
        strategy: Whose ranks the batches are dealt to; None: there is one. A loader that is dealt
            already gives each rank its own.

    >>> batches = [{"x": [1, 2]}, {"x": [3, 4]}, {"x": [5]}]
    >>> feed = Feed(batches)
    >>> given = feed.batches()
    >>> next(given).batch, next(given).batch, feed.settle()
    ({'x': [1, 2]}, {'x': [3, 4]}, None)
    >>> list(Feed(batches, feed.state_dict()).batches())
    [Given(batch={'x': [5]}, is_last=True, rows_before=0, rows=None, num_copies=1)]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        position: Mapping[str, Any] | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        self._loader, self._strategy = loader, strategy
        self._deal, self._copies = Deal(), 1
        if strategy is not None and strategy.world_size > 1:
            if is_dealt(loader):
                self._copies = strategy.world_size  # rows there are for one that is here
            else:
                self._deal = Deal(strategy.rank, strategy.world_size)
        self._resumed = dict(position) if position else None
        self._start: dict[str, Any] = {}
        self._num_used = 0  # batches of this pass
        self._unused: list[Round] = []  # given, and no update has been made of them yet
        self._ahead: Any = _END
        self._workers: dict[str, dict[str, Any]] = {}
        self._last_worker: int | None = None
        self._is_renumbered = False
        self._rounds: Iterator[Round] = iter(())
        self._is_read = self._is_at_end = self._has_more = False

    def batches(self, skip: int = 0) -> Iterator[Given]:
        """Make one pass: give each batch of this rank. On several ranks every one must.

        Of data without a length one batch is read ahead: nothing else tells that it ended.

        Args:
            skip: Rows at its start that were used before.

        Raises:
            DataError: The loader gave another number of batches than its ``len()``, rows that
                cannot be stacked, or a worker of it failed.
        """
        position = self._resumed or {}
        is_beginning = not position.get("num_batches")
        if self._deal.world_size > 1 and is_beginning and self._strategy is not None:
            begin_in_common(self._loader, self._strategy)
        begun = open_pass(self._loader, skip, position, self._deal)
        self._resumed, self._start = None, begun.start
        self._num_used = begun.num_used
        if position.get("num_workers") == getattr(self._loader, "num_workers", 0):
            self._workers |= position.get("workers", {})
            self._last_worker = position.get("last_worker")
        self._is_renumbered = self._last_worker is not None
        self._is_read = self._is_at_end = False
        items = _fetch(begun.items, self._loader, skip)
        self._rounds = rounds = rounds_of(items, begun.sampler, self._deal)
        if begun.left is None:
            yield from self._read_ahead(rounds)
            return
        number = 0
        for number, dealt in enumerate(rounds, start=1):
            self._unused.append(dealt)
            yield self._give(dealt, is_last=number == begun.left)
            if number == begun.left:
                number += self._read_to_end()
        if number != begun.left:
            length = len(self._loader)  # type: ignore[arg-type]
            given = self._num_used + sum(dealt.num_batches for dealt in self._unused)
            found = given if number < begun.left else f"more than {length}"
            raise DataError(
                f"The loader gave {found} batches, but its len() is {length}, and updates and "
                "schedule were planned by it. Mend __len__, or leave it out and give max_steps=; "
                "if the run was begun with another batch_size, go on with that."
            )

    def _give(self, dealt: Round, *, is_last: bool) -> Given:
        batch = _batch_of(dealt.item)
        if dealt.is_spare:
            batch = as_spare(batch)
        return Given(batch, is_last, dealt.rows_before, dealt.rows, self._copies)

    def _read_to_end(self) -> bool:
        """Read past the last batch, as a plain `for` would; tell whether there was another.

        A sampler may have work to do there: torch's RandomSampler draws once more.
        """
        if not self._is_read:
            self._is_read, self._has_more = True, next(self._rounds, _END) is not _END
        return self._has_more

    def _read_ahead(self, rounds: Iterator[Round]) -> Iterator[Given]:
        ahead = next(rounds, _END)
        while ahead is not _END:
            dealt: Any = ahead
            self._ahead = _END
            self._unused.append(dealt)
            self._ahead = ahead = next(rounds, _END)
            yield self._give(dealt, is_last=ahead is _END)

    def settle(self, *, ends_epoch: bool = False) -> None:
        """Count what was given so far as used: an update has been made of it."""
        for dealt in self._unused:
            self._num_used += dealt.num_batches
            for item in dealt.items:
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
            rounds = [*self._unused, *([] if self._ahead is _END else [self._ahead])]
            if rounds and isinstance(rounds[-1].items[-1], Carried):
                position["is_at_end"] = True  # and the dataset may be at its start again
            batches = [_batch_of(item) for dealt in rounds for item in dealt.items]
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
        first = sampler.batch_at(skip) + number
        read = sampler.batches()[first : first + loader.num_workers]
        rows = [row for batch in read for row in batch]
        place = (
            f"{sampler.split} batch {first} or one soon after it, of the "
            f"rows {', '.join(map(str, rows[:16]))}{', ...' if len(rows) > 16 else ''}"
        )
    return (
        f"A worker failed while it read {place}: {error}\nThe weights are those after the last "
        "update, and the run can go on from its checkpoint. To see the error where it happens: "
        "num_workers=0. Workers that do not answer are given up after DataLoader(timeout=seconds)."
    )
