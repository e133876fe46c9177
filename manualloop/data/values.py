"""The values of a column, described row by row in one pass over the stored table.

Everything that is judged about a column is judged by this description: which rows have no value,
whether labels are hidden, whether a class is out of range, whether lists have one length.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manualloop.data.grouping import Ints
from manualloop.data.splits import TEXT_KINDS, Split
from manualloop.internals import stored_table
from manualloop.tasks.task import IGNORE_INDEX

_ROWS_AT_ONCE = 10_000
_MOST_CLASSES = 1_000_000


class Values(NamedTuple):
    """The values of a column, row by row.

    Attributes:
        is_missing: Rows without a value: None, NaN, or a list that holds one of these; bool.
        is_nan: Those of them with NaN; bool.
        is_blank: Rows with an empty string, or a list that holds one; bool.
        least: Smallest number in each row, without -100; the largest possible one where there is
            none.
        most: Largest number in each row, without -100; the smallest possible where there is none.
        lengths: Number of values in each row.
        texts: The strings that occur, without the empty one, sorted.
    """

    is_missing: NDArray[np.bool_]
    is_nan: NDArray[np.bool_]
    is_blank: NDArray[np.bool_]
    least: NDArray[Any]
    most: NDArray[Any]
    lengths: Ints
    texts: tuple[str, ...] = ()

    @property
    def has_number(self) -> NDArray[np.bool_]:
        """The rows with a number that is not -100."""
        found: NDArray[np.bool_] = self.least <= self.most
        return found

    def hidden_as(self) -> tuple[str, ...]:
        """Return the forms in which labels are hidden; none unless every label is.

        Labels are hidden as -1, None, NaN or an empty string, or in several of these forms.
        """
        is_minus = self.has_number & (self.least == -1) & (self.most == -1)
        is_empty = ~self.has_number & (self.is_missing | self.is_blank)
        if self.texts or not (is_minus | is_empty).all():
            return ()
        found = {
            "None": (self.is_missing & ~self.is_nan).any(),
            "NaN": self.is_nan.any(),
            '""': self.is_blank.any(),
            "-1": is_minus.any(),
        }
        return tuple(form for form, occurs in found.items() if occurs)


def values_of(split: Split, column: str) -> Values | None:
    """Describe the values of a column; None for a stream, whose batches are checked later."""
    if split.is_stream:
        return None
    whole, numbers = _stored(split, column)
    if numbers is not None and split.kinds[column] in TEXT_KINDS:
        whole, numbers = whole.take(pa.array(numbers)), None  # else the texts of others count too
    parts = [_describe(part) for part in _in_parts(whole)]
    kept: Any = slice(None) if numbers is None else numbers
    return Values(
        np.concatenate([part.is_missing for part in parts])[kept],
        np.concatenate([part.is_nan for part in parts])[kept],
        np.concatenate([part.is_blank for part in parts])[kept],
        np.concatenate([part.least for part in parts])[kept],
        np.concatenate([part.most for part in parts])[kept],
        np.concatenate([part.lengths for part in parts])[kept],
        tuple(sorted({text for part in parts for text in part.texts})),
    )


def missing_in(split: Split, column: str) -> NDArray[np.bool_] | None:
    """Return the rows whose cell is None or a list that holds None; None for a stream."""
    if split.is_stream:
        return None
    whole, numbers = _stored(split, column)
    is_missing = np.concatenate([_walk(part).is_missing for part in _in_parts(whole)])
    return is_missing if numbers is None else is_missing[numbers]


def empty_in(split: Split, column: str) -> NDArray[np.bool_] | None:
    """Return the rows whose cell is None, NaN or an empty string; None for a stream."""
    if split.is_stream:
        return None
    whole, numbers = _stored(split, column)
    found = []
    for part in _in_parts(whole):
        is_empty = _is_null(part)
        if pa.types.is_floating(part.type) and (floats := _numbers(part)) is not None:
            is_empty = is_empty | np.isnan(floats)
        elif _is_text(part.type):
            is_blank = pc.equal(part, "").fill_null(False)
            is_empty = is_empty | is_blank.to_numpy(zero_copy_only=False)
        found.append(is_empty)
    is_empty = np.concatenate(found)
    return is_empty if numbers is None else is_empty[numbers]


def distinct_in(split: Split, column: str) -> NDArray[Any]:
    """Return the numbers that occur in a column, sorted, with those inside its lists."""
    whole, numbers = _stored(split, column)
    if numbers is not None:
        whole = whole.take(pa.array(numbers))
    found = [_numbers(_walk(part).leaves) for part in _in_parts(whole)]
    kept = [part[~np.isnan(part)] for part in found if part is not None]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *kept]))


def count_true(split: Split, column: str) -> int:
    """Count the rows whose cell in a column of truth values is true."""
    whole, numbers = _stored(split, column)
    if numbers is not None:
        whole = whole.take(pa.array(numbers))
    return int(pc.sum(whole).as_py() or 0)


def count_classes(split: Split, column: str, *, is_by_column: bool) -> Ints | None:
    """Count the labels of each class in a column of class numbers, or of lists of these.

    Args:
        split: The split.
        column: The column.
        is_by_column: Whether each row has a 0 or a 1 for each class instead.

    Returns:
        A count for each class number up to the greatest that occurs; None if rows of 0 and 1 differ
        in length, or the column holds no numbers, or such as can be no classes.
    """
    total = np.zeros(0, np.int64)
    for part in _parts_of(split, column):
        found = _walk(part)
        if (leaves := _numbers(found.leaves)) is None:
            return None
        if is_by_column:
            width = int(found.lengths[0]) if len(found.lengths) else 0
            if not width or (found.lengths != width).any():
                return None
            counts = (leaves.reshape(-1, width) > 0.5).sum(axis=0)
        elif leaves.max(initial=0) > _MOST_CLASSES:
            return None
        else:
            counts = np.bincount(leaves[leaves >= 0].astype(np.int64))
        longer, shorter = sorted((total, counts), key=len, reverse=True)
        total = longer + np.pad(shorter, (0, len(longer) - len(shorter)))
    return total


def count_texts(split: Split, column: str) -> Counter[str]:
    """Count how often each string occurs in a column of strings, or of lists of these."""
    total: Counter[str] = Counter()
    for part in _parts_of(split, column):
        for found in pc.value_counts(_walk(part).leaves).to_pylist():
            total[found["values"]] += found["counts"]
    return total


def numbers_in(split: Split, column: str) -> NDArray[np.float64]:
    """Return the numbers in a column, without missing ones."""
    found = [_walk(part).leaves.drop_null() for part in _parts_of(split, column)]
    numbers = [part for leaves in found if (part := _numbers(leaves)) is not None]
    return np.concatenate([np.zeros(0), *numbers])


def _parts_of(split: Split, column: str) -> list[pa.Array]:
    whole, numbers = _stored(split, column)
    return _in_parts(whole if numbers is None else whole.take(pa.array(numbers)))


def count_ignored(split: Split, column: str) -> tuple[int, int, int]:
    """Count the labels in a column that are -100, all labels, and the rows whose labels all are."""
    whole, numbers = _stored(split, column)
    ignored, lengths = [], []
    for part in _in_parts(whole):
        found = _walk(part)
        leaves = _numbers(found.leaves)
        is_ignored = np.zeros(0, bool) if leaves is None else leaves == IGNORE_INDEX
        ignored.append(np.bincount(found.rows[is_ignored], minlength=len(part)))
        lengths.append(found.lengths)
    kept: Any = slice(None) if numbers is None else numbers
    of_rows, of_all = np.concatenate(ignored)[kept], np.concatenate(lengths)[kept]
    num_empty = int(np.count_nonzero((of_rows == of_all) & (of_all > 0)))
    return int(of_rows.sum()), int(of_all.sum()), num_empty


def _stored(split: Split, column: str) -> tuple[pa.ChunkedArray, Ints | None]:
    # Stored rows are read in their own order; querying those of a selection would be slow.
    stored, numbers = stored_table(split.rows)
    return stored.table.column(column), numbers


def _in_parts(whole: pa.ChunkedArray) -> list[pa.Array]:
    # A dataset need not fit into memory.
    starts = range(0, len(whole), _ROWS_AT_ONCE)
    return [whole.slice(start, _ROWS_AT_ONCE).combine_chunks() for start in starts]


class _Leaves(NamedTuple):
    """The innermost values of a column of lists, or the values themselves.

    Attributes:
        leaves: The values.
        rows: Number of the row that each is in, sorted.
        is_missing: Rows that are None, or hold None.
        lengths: Number of values in each row.
    """

    leaves: pa.Array
    rows: Ints
    is_missing: NDArray[np.bool_]
    lengths: Ints


def _walk(array: pa.Array) -> _Leaves:
    num_rows, rows = len(array), np.arange(len(array))
    is_missing = np.zeros(num_rows, dtype=bool)
    is_list = is_list_type(array.type)
    while True:
        if array.null_count:
            is_missing[rows[_is_null(array)]] = True
        if not is_list_type(array.type):
            break
        rows = np.repeat(rows, pc.list_value_length(array).fill_null(0).to_numpy())
        array = array.flatten()
    lengths = np.bincount(rows, minlength=num_rows) if is_list else np.ones(num_rows, np.int64)
    return _Leaves(array, rows, is_missing, lengths)


def _is_null(array: pa.Array) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = array.is_null().to_numpy(zero_copy_only=False)
    return found


def _describe(array: pa.Array) -> Values:
    num_rows = len(array)
    array, rows, is_missing, lengths = _walk(array)
    is_blank, is_nan = np.zeros(num_rows, dtype=bool), np.zeros(num_rows, dtype=bool)
    if _is_text(array.type):
        is_blank[rows[pc.equal(array, "").fill_null(False).to_numpy(zero_copy_only=False)]] = True
        texts = tuple(text for text in pc.unique(array).to_pylist() if text)
        return Values(is_missing, is_nan, is_blank, *_no_bounds(num_rows), lengths, texts)
    if (numbers := _numbers(array)) is None:
        return Values(is_missing, is_nan, is_blank, *_no_bounds(num_rows), lengths)
    is_nan[rows[np.isnan(numbers)]] = True
    kept = ~np.isnan(numbers) & ~_is_null(array) & (numbers != IGNORE_INDEX)
    least, most = _bounds(num_rows, rows[kept], numbers[kept])
    return Values(is_missing | is_nan, is_nan, is_blank, least, most, lengths)


def _bounds(num_rows: int, rows: Ints, numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the smallest and the largest number of each row; ``rows`` are sorted."""
    least, most = _no_bounds(num_rows, numbers.dtype)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    if starts.size:
        least[rows[starts]] = np.minimum.reduceat(numbers, starts)
        most[rows[starts]] = np.maximum.reduceat(numbers, starts)
    return least, most


def _no_bounds(num_rows: int, dtype: Any = np.int64) -> tuple[NDArray[Any], NDArray[Any]]:
    limits: Any = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    return np.full(num_rows, limits.max, dtype), np.full(num_rows, limits.min, dtype)


def _numbers(array: pa.Array) -> NDArray[Any] | None:
    """Return numbers as int64 or float64; what is null is 0. None for anything else."""
    kind = array.type
    if pa.types.is_float16(kind):
        array = array.cast(pa.float32())
    elif pa.types.is_boolean(kind):
        array = array.cast(pa.int8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    numbers: NDArray[Any] = array.fill_null(0).to_numpy(zero_copy_only=False)
    return numbers.astype(np.float64 if numbers.dtype.kind == "f" else np.int64)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_list_type(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type is one of lists."""
    is_fixed = pa.types.is_fixed_size_list(kind)
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or is_fixed)


def lengths_of(split: Split, column: str) -> Ints | None:
    """Return the length of each row's list, without reading what is in it; None for a stream."""
    if split.is_stream:
        return None
    stored, numbers = stored_table(split.rows)
    lengths = pc.list_value_length(stored.table.column(column)).fill_null(0).to_numpy()
    found: Ints = lengths.astype(np.int64)
    return found if numbers is None else found[numbers]


def longest_in(split: Split, column: str) -> Ints:
    """Return the length of the longest of the lists in each row of a column; 0 without lists."""
    stored, numbers = stored_table(split.rows)
    lists = stored.table.column(column).combine_chunks()
    num_lists = pc.list_value_length(lists).fill_null(0).to_numpy()
    lengths = pc.list_value_length(lists.flatten()).fill_null(0).to_numpy()
    found: Ints = np.zeros(len(lists), np.int64)
    np.maximum.at(found, np.repeat(np.arange(len(lists)), num_lists), lengths)
    return found if numbers is None else found[numbers]
