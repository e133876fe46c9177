"""Batches from Arrow tables to padded tensors, without a Python object for each token.

The tensors equal those of transformers' collators to the bit. Rows that hold anything but numbers
and lists of numbers, or that do not fit together, are passed to these collators.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from manualloop import screen
from manualloop.data.grouping import Ints, round_up
from manualloop.internals import as_kind, rows_as_table, stored_table
from manualloop.tasks.places import POSITIONS, in_batch
from manualloop.tasks.task import IGNORE_INDEX

_ROWS_AT_ONCE = 10_000


@contextmanager
def bars_only_where_seen() -> Iterator[None]:
    """Let datasets draw its progress bars in a block only where they are drawn over.

    In a log file each state of a bar is a line of its own, and our own bars leave them out, too.
    """
    is_seen = screen.is_terminal(sys.stderr) or screen.notebook() is not None
    is_asked_for = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is False
    if is_seen or is_asked_for or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


class TableRows(list[Any]):
    """The rows of a batch as a table, which turns into a list of dicts when it is read.

    Args:
        table: The Arrow table that holds the rows.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table, self._is_read = table, False

    def _read(self) -> None:
        if not self._is_read:
            self._is_read = True
            self.extend(self.table.to_pylist())

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[Any]:
        self._read()
        return super().__iter__()

    def __getitem__(self, place: Any) -> Any:
        self._read()
        return super().__getitem__(place)

    def __contains__(self, row: object) -> bool:
        return row in list(self)

    def __eq__(self, other: object) -> bool:
        return list(self) == other

    def __repr__(self) -> str:
        return repr(list(self))


class Dataset(datasets.Dataset):  # type: ignore[misc]
    """A dataset from which a DataLoader fetches batches as tables, unless it has a format."""

    def __getitems__(self, rows: list[int]) -> Any:
        if self.format["type"] is not None:
            return super().__getitems__(rows)
        return TableRows(rows_as_table(self, rows))

    def lengths(self, names: Sequence[str]) -> Ints | None:
        """Return the length of each row's longest list in some columns, int64 ``(rows,)``.

        The rows are read in parts, because a dataset need not fit into memory.

        Args:
            names: Names of the columns. The result is None unless all hold lists of numbers.
        """
        schema = self.data.schema
        kinds = [schema.field(name).type for name in names]
        if not kinds or any(not _is_list(k) or _is_list(k.value_type) for k in kinds):
            return None
        # Stored rows are read in their own order; querying them by index would be slow.
        stored, numbers = stored_table(self)
        starts = range(0, stored.num_rows, _ROWS_AT_ONCE)
        parts = [stored.table.slice(start, _ROWS_AT_ONCE).select(names) for start in starts]
        lengths = np.concatenate([_longest(part) for part in parts])
        return lengths if numbers is None else lengths[numbers]


def _longest(lists: pa.Table) -> Ints:
    lengths = [pc.list_value_length(column).fill_null(0).to_numpy() for column in lists.columns]
    longest: Ints = np.max(lengths, axis=0).astype(np.int64)
    return longest


def as_tables(rows: datasets.Dataset) -> Dataset:
    """Return the same dataset as one from which DataLoaders fetch tables."""
    kept: Dataset = as_kind(rows, Dataset)
    return kept


def from_frame(frame: Any) -> datasets.Dataset:
    """Return the rows of a ``pandas.DataFrame`` as a dataset, without its index."""
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


def with_classes(features: Any, column: str, names: Sequence[str]) -> Any:
    """Return features whose column, or the lists in it, are classes with names; None of None."""
    if features is None:
        return None
    changed = features.copy()
    changed[column] = _in_lists(features[column], datasets.ClassLabel(names=list(names)))
    return changed


def _in_lists(feature: Any, kind: Any) -> Any:
    # In datasets a list is a List, a LargeList, a Sequence(feature) (before 4.0) or [feature].
    if isinstance(feature, list):
        return [_in_lists(feature[0], kind)]
    item = getattr(feature, "feature", None)
    return kind if item is None else datasets.Sequence(_in_lists(item, kind))


class Lists(NamedTuple):
    """A column of lists of numbers.

    Attributes:
        values: Numbers of all lists, one list after the other.
        lengths: Length of each list, int64 ``(rows,)``.
    """

    values: NDArray[Any]
    lengths: Ints


class TableCollate:
    """A ``collate_fn`` that pads a table in the way transformers' collators pad rows.

    Args:
        tokenizer: Tokenizer whose padding token and padding side are used.
        collate: Function that makes a batch from rows as dicts, for tables that cannot be padded.
        labels: Length to which lists of labels are padded with -100: the number of "tokens", or
            the "longest" list of labels. None does not pad them.
        pad_to_multiple_of: Number of which each padded length is a multiple.
        float_labels: Whether the loss needs ``labels`` in float32.
    """

    def __init__(
        self,
        tokenizer: Any,
        collate: Callable[[list[Any]], dict[str, Any]],
        *,
        labels: Literal["tokens", "longest"] | None,
        pad_to_multiple_of: int | None,
        float_labels: bool,
    ) -> None:
        self._tokenizer, self._collate = tokenizer, collate
        self._labels, self._multiple = labels, pad_to_multiple_of or 1
        self._float_labels = float_labels

    def __call__(self, rows: Any) -> dict[str, Any]:
        """Return the batch of some rows."""
        batch = self._pad(rows.table) if isinstance(rows, TableRows) else None
        return self._collate(list(rows)) if batch is None else batch

    def padded_lengths(self, dataset: Any) -> Ints | None:
        """Return the smallest padded length of each row, int64 ``(rows,)``.

        None means that results may depend on which rows are in a batch together, or that the number
        of tokens does not describe the size of a row.
        """
        lengths = self._lengths(dataset, self._counted())
        if lengths is None or lengths.min() == 0:
            return None  # rows without tokens would form a batch of width 0
        return round_up(lengths, self._multiple)

    def input_lengths(self, dataset: Any) -> tuple[Ints, Ints] | None:
        """Return the number of tokens of each row without its labels, and the same when padded.

        None where ``padded_lengths`` returns None.
        """
        tokens = self._lengths(dataset, self._counted()[:1])
        return None if tokens is None else (tokens, round_up(tokens, self._multiple))

    def _lengths(self, dataset: Any, names: Sequence[str]) -> Ints | None:
        tokenizer = self._tokenizer
        hides_padding = "attention_mask" in tokenizer.model_input_names
        if not hides_padding or tokenizer.padding_side != "right":
            return None  # padding on the left would shift the positions
        padded = [name for name in self._padded() if name in getattr(dataset, "column_names", ())]
        if not isinstance(dataset, Dataset) or tokenizer.model_input_names[0] not in padded:
            return None
        schema = dataset.data.schema
        others = [name for name in dataset.column_names if name not in (*padded, "labels")]
        if any(pa.types.is_nested(schema.field(name).type) for name in others):
            return None  # the size of an image, for example, is not that of its text
        return dataset.lengths([name for name in padded if name in names])

    def _counted(self) -> list[str]:
        """Return the columns whose lists determine the length of a row."""
        return [self._tokenizer.model_input_names[0], *(["labels"] if self._labels else [])]

    def _padded(self) -> list[str]:
        extra = ["token_type_ids", "special_tokens_mask", "attention_mask"]
        return [*self._counted(), *extra]

    def _pad(self, table: pa.Table) -> dict[str, Tensor] | None:
        """Return the batch; None if a column cannot be padded here or the lists do not fit."""
        tokenizer = self._tokenizer
        columns: dict[str, Any] = {
            name: read_column(table.column(name)) for name in table.column_names
        }
        if any(column is None for column in columns.values()):
            return None
        main = tokenizer.model_input_names[0]
        if not isinstance(tokens := columns.get(main), Lists) or not tokens.lengths.all():
            return None
        if tokens.values.dtype.kind != "i":
            return None
        ends = {
            main: tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
        }
        needs_mask = "attention_mask" in tokenizer.model_input_names
        if needs_mask:
            ends["attention_mask"] = 0
            ones = Lists(np.ones(len(tokens.values), dtype=np.int64), tokens.lengths)
            columns = {**columns, "attention_mask": columns.get("attention_mask", ones)}
        if self._labels is not None and "labels" in columns:
            columns["labels"] = columns.pop("labels")  # last, as in transformers
        width = round_up(int(tokens.lengths.max()), self._multiple)
        is_left = tokenizer.padding_side == "left"
        batch = {}
        for name, column in columns.items():
            if not isinstance(column, Lists):
                if name in ends or (name == "labels" and self._labels):
                    return None
                batch[name] = _tensor(column)
                if name in POSITIONS and column.dtype.kind == "i":
                    lengths = _tensor(tokens.lengths)
                    batch[name] = in_batch(batch[name], lengths, width, pads_left=is_left)
            elif column.values.dtype.kind == "b" and (name in ends or name == "labels"):
                return None  # the padding value is not a bool
            elif name in ends or (name == "labels" and self._labels == "tokens"):
                if not np.array_equal(column.lengths, tokens.lengths):
                    return None
                batch[name] = pad(column, width, ends.get(name, IGNORE_INDEX), is_left)
            elif name == "labels" and self._labels == "longest":
                longest = round_up(int(column.lengths.max()), self._multiple)
                batch[name] = pad(column, longest, IGNORE_INDEX, is_left)
            elif (column.lengths == column.lengths[0]).all():
                shape = len(column.lengths), int(column.lengths[0])
                batch[name] = _tensor(column.values.reshape(shape))
            else:
                return None
        if "labels" in batch:
            batch["labels"] = self._with_dtype(batch["labels"])
        return batch

    def _with_dtype(self, labels: Tensor) -> Tensor:
        if self._float_labels:
            return labels.float()
        return labels.long() if labels.dtype == torch.bool or self._labels else labels


def pad(lists: Lists, width: int, end: int, is_left: bool) -> Tensor:
    """Return lists as the rows of a padded matrix.

    >>> pad(Lists(np.array([1, 2, 3]), np.array([2, 1])), width=2, end=0, is_left=False)
    tensor([[1, 2],
            [3, 0]])
    """
    values = _tensor(lists.values).numpy()
    padded = np.full((len(lists.lengths), width), end, dtype=values.dtype)
    places = np.arange(width)
    lengths = lists.lengths[:, None]
    padded[places >= width - lengths if is_left else places < lengths] = values
    return torch.from_numpy(padded)


def read_column(column: pa.ChunkedArray) -> NDArray[Any] | Lists | None:
    """Return a column of numbers or of lists of numbers; None for others and for missing values."""
    array = column.combine_chunks()
    if not _is_list(array.type):
        return _numbers(array)
    lengths = np.diff(array.offsets.to_numpy()).astype(np.int64)
    values = _numbers(array.flatten())
    return None if values is None or array.null_count else Lists(values, lengths)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _numbers(array: pa.Array) -> NDArray[Any] | None:
    kind = array.type
    is_number = pa.types.is_signed_integer(kind) or pa.types.is_floating(kind)
    if array.null_count or not (is_number or pa.types.is_boolean(kind)):
        return None
    numbers: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return numbers


def _tensor(numbers: NDArray[Any]) -> Tensor:
    """Return the tensor that ``torch.tensor`` makes of a list of the same numbers."""
    dtype: Any = {"i": np.int64, "f": np.float32, "b": np.bool_}[numbers.dtype.kind]
    return torch.from_numpy(numbers.astype(dtype))
