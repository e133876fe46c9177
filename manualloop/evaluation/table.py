"""The table that an evaluation makes: one entry a row, in the order of the dataset.

``evaluate_loop`` and ``predict_loop`` are two ways of reading it. The order in which rows are read,
spare batches and ranks end here: whatever reads a table sees what one process would have made.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, groupby, islice, zip_longest
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manualloop.errors import DataError
from manualloop.evaluation.layout import Layout
from manualloop.evaluation.losses import Losses, Made
from manualloop.evaluation.rows import Entries, MadeBy, Values
from manualloop.tasks.task import IGNORE_INDEX

Order: TypeAlias = "NDArray[np.int64] | None"
"""Numbers of rows in the order in which they are wanted; None leaves them in theirs."""

_JOIN_AT = 512  # batches whose columns wait until they are put into one array


class Column:
    """A column of a table, kept in few arrays: rows of different widths are in different ones.

    Args:
        parts: Rows to begin with: arrays whose first axis is the rows, or lists of objects.
    """

    def __init__(self, parts: Sequence[Values] = ()) -> None:
        self._joined, self._waiting = list(parts), list[Values]()

    def add(self, values: Values) -> None:
        """Add the rows of a batch."""
        self._waiting.append(values)
        if len(self._waiting) >= _JOIN_AT:
            self._join()

    @property
    def parts(self) -> list[Values]:
        """The rows, in the order in which they were added."""
        self._join()
        return self._joined

    def _join(self) -> None:
        for is_array, group in groupby(self._waiting, _form):
            parts: Any = list(group)
            joined = np.concatenate(parts) if is_array else list(chain.from_iterable(parts))
            self._joined.append(joined)
        self._waiting = []

    def _arrays(self) -> list[NDArray[Any]] | None:
        arrays = [part for part in self.parts if isinstance(part, np.ndarray)]
        return arrays if len(arrays) == len(self.parts) else None

    def rows(self, order: Order) -> list[Any]:
        """Return an object or an array for each row."""
        rows = list(chain.from_iterable(self.parts))
        return rows if order is None else [rows[number] for number in order]

    def array(self, order: Order, *, pads: bool = False) -> NDArray[Any] | None:
        """Return the rows as one array; None if they are objects, or differ in shape.

        Args:
            order: The order of the rows.
            pads: Whether rows narrower than the widest are padded with -100.
        """
        arrays = self._arrays()
        if arrays is None:
            return None
        widths = {array.shape[1:] for array in arrays}
        if len(widths) > 1:
            if not pads:
                return None
            widest = [max(sizes) for sizes in zip(*widths, strict=True)]
            arrays = [_pad(array, widest) for array in arrays]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return whole if order is None else whole[order]

    def __len__(self) -> int:
        return sum(map(len, self._joined)) + sum(map(len, self._waiting))

    def flat(self) -> NDArray[Any] | None:
        """Return all numbers in one axis, in the order in which they were added."""
        arrays = self._arrays()
        return None if arrays is None else np.concatenate([array.ravel() for array in arrays])


def _form(values: Values) -> tuple[Any, ...] | None:
    """Return what arrays must share to be put into one; None for lists of objects."""
    return None if isinstance(values, list) else (values.dtype, values.shape[1:])


def _pad(rows: NDArray[Any], widest: Sequence[int]) -> NDArray[Any]:
    ends = [(0, size - own) for size, own in zip(widest, rows.shape[1:], strict=True)]
    return np.pad(rows, [(0, 0), *ends], constant_values=IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of an evaluation.

    Attributes:
        columns: Columns by name: "predictions" (or decoded objects), "references" and "scores".
            The last two are there only if every row has an entry.
        kept: Columns that skipped the model, by name, of which every row has an entry.
        order: Numbers of the rows in the columns, in the order of the dataset; None if it is the
            order in which they were added.
        index: Row numbers in the dataset, in its order; None where nobody knows them.
        num_rows: Number of rows.
        task: Name of the task.
        ignored: The label that counts in no metric.
        misfit: Number of the first batch whose predictions do not stand beside its labels one by
            one, and why they do not; None if there is none.
        made_by: What made the predictions.
        missing: Columns that some rows have, and others do not.
    """

    columns: Mapping[str, Column]
    kept: Mapping[str, Column]
    order: Order
    index: NDArray[np.int64] | None
    num_rows: int
    task: str
    ignored: int
    misfit: tuple[int, str] | None
    made_by: MadeBy = "rule"
    missing: Sequence[str] = ()

    def column(self, name: str) -> Any:
        """Return a column in the order of the dataset; None if there is none.

        It is an array, in which rows narrower than the widest are padded with -100, or a list of
        objects.
        """
        if name not in self.columns:
            return None
        whole = self.columns[name].array(self.order, pads=True)
        return self.columns[name].rows(self.order) if whole is None else whole


def _count_numbers(values: Values) -> int:
    """Count the numbers of predictions; an object that holds no array counts by its length."""
    if isinstance(values, np.ndarray):
        return values.size
    sizes = (v.numel() if isinstance(v, Tensor) else np.size(v) for v in values if _is_array(v))
    others = (len(v) if isinstance(v, list) else 1 for v in values if not _is_array(v))
    return sum(sizes) + sum(others)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


class Share:
    """The rows that one rank reads, in the order in which it reads them.

    Attributes:
        losses: The terms of the loss of each batch.
        layout: The axis of the classes in the logits.
        columns: Columns by name.
        kept: Columns that skip the model, by name.
        sizes: Number of rows of each batch.
        num_waiting: Number of predictions.
        num_nan: Number of rows with logits that are NaN.
        task: Name of the task.
        ignored: The label that counts in no metric.
        misfit: As in ``Table``.
        made_by: What makes the predictions.
    """

    def __init__(self, losses: Losses, made_by: MadeBy) -> None:
        self.losses, self.made_by = losses, made_by
        self.layout, self.num_nan = Layout(), 0
        self.task, self.ignored = "", IGNORE_INDEX
        self.misfit: tuple[int, str] | None = None
        self._are_objects: bool | None = None
        self._forget()

    def add(self, made: Made, entries: Entries) -> None:
        """Add the rows of a batch."""
        self.sizes.append(entries.num_rows)
        self.num_nan += entries.num_nan
        self.task, self.ignored = made.task.name, made.task.ignored
        if entries.misfit is not None and self.misfit is None:
            self.misfit = made.number, entries.misfit
        self.columns["predictions"].add(entries.predictions)
        if entries.references is not None:
            are_objects = isinstance(entries.references, list)
            if self._are_objects not in (None, are_objects):
                raise _other_kind(made.number, are_objects=are_objects)
            self._are_objects = are_objects
            self.columns["references"].add(entries.references)
        if entries.scores is not None:
            self.columns["scores"].add(entries.scores)
        for name, values in entries.kept.items():
            self.kept[name].add(values)
        self.num_waiting += _count_numbers(entries.predictions)

    def take(self) -> Table:
        """Return the rows added so far, and forget them."""
        table = table_of([self], None)
        self._forget()
        return table

    def _forget(self) -> None:
        self.columns: defaultdict[str, Column] = defaultdict(Column)
        self.kept: defaultdict[str, Column] = defaultdict(Column)
        self.sizes, self.num_waiting = array("q"), 0


def _other_kind(number: int, *, are_objects: bool) -> DataError:
    """Return the error about a ``decode`` that returns references for some batches alone."""
    return DataError(
        f"The references of batch {number} are {'objects' if are_objects else 'labels'}, "
        "and those of the batches before it are not. Let decode return two lists, "
        "predictions and references, for every batch or for none."
    )


COLUMNS = ("predictions", "references", "scores")


def table_of(shares: Sequence[Share], numbers: Iterable[int] | None) -> Table:
    """Make a table of the rows of all ranks.

    Args:
        shares: The rows of each rank.
        numbers: The dataset's numbers of the rows in the order of the loader; None: nobody knows.
    """
    places = _places([share.sizes for share in shares])
    num_rows = len(places)
    index: NDArray[np.int64] | None = None
    if isinstance(numbers, count):
        index = places
    elif numbers is not None:
        listed = np.fromiter(islice(numbers, num_rows), np.int64)
        index = listed[places] if len(listed) == num_rows else None
    order = _order_of(places if index is None else index, places)
    columns = {name: _joined([share.columns for share in shares], name) for name in COLUMNS}
    names = {name for share in shares for name in share.kept}
    kept = {name: _joined([share.kept for share in shares], name) for name in sorted(names)}
    named = [share for share in shares if share.task]
    return Table(
        {name: column for name, column in columns.items() if len(column) == num_rows},
        {name: column for name, column in kept.items() if len(column) == num_rows},
        order,
        index if index is None or order is None else index[order],
        num_rows,
        *((named[0].task, named[0].ignored) if named else ("", IGNORE_INDEX)),
        min((share.misfit for share in shares if share.misfit is not None), default=None),
        shares[0].made_by,
        tuple(name for name, column in columns.items() if 0 < len(column) < num_rows),
    )


def _order_of(index: NDArray[np.int64], places: NDArray[np.int64]) -> Order:
    """Return the order in which rows are sorted; None if they are.

    Args:
        index: The number of each row.
        places: Where one process reads it, which decides between rows of one number.
    """
    is_after = (index[1:] > index[:-1]) | ((index[1:] == index[:-1]) & (places[1:] > places[:-1]))
    return None if is_after.all() else np.lexsort((places, index))


def _places(of_ranks: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return the places of the rows of each rank, one after the other, in the loader's order.

    Args:
        of_ranks: Sizes of the batches of each rank: batch k is on rank k % world_size.
    """
    sizes = [size for turn in zip_longest(*of_ranks) for size in turn if size is not None]
    starts = np.cumsum([0, *sizes])
    world_size = len(of_ranks)
    if world_size == 1:
        return np.arange(starts[-1])
    places = [
        np.arange(starts[number], starts[number + 1])
        for rank in range(world_size)
        for number in range(rank, len(sizes), world_size)
    ]
    return np.concatenate(places) if places else np.empty(0, np.int64)


def _joined(of_ranks: Sequence[Mapping[str, Column]], name: str) -> Column:
    return Column([part for columns in of_ranks if name in columns for part in columns[name].parts])
