"""The table of predictions, in the dataset's order, and the tables and files made of it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manualloop.errors import DataError
from manualloop.evaluation.inputs import Inputs
from manualloop.tasks.task import IGNORE_INDEX

Kind = Literal["class", "classes", "tokens", "value", "object"]
"""What a row of predictions is: a class number, several labels of a row at once (0 or 1 for each
class), a class number for each token, a number or several, or any Python object."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Predictions:
    """A table of predictions with one row per row of the dataset, in the dataset's order.

    It prints as a few words. ``table[3]`` is a row as a dict, by its place in the table;
    ``table[10:20]`` and ``table[mask]`` are smaller tables. Tables and files have the columns
    ``index``, those of ``kept``, ``prediction`` and ``label`` (its class name), ``reference`` and
    ``reference_label``, and ``score_positive`` for the probability of a class called "positive".
    Columns without content are left out; where there are no names, classes have numbers.

    Attributes:
        index: Row numbers in the dataset, int64 ``(rows,)``; None where nobody knows them, as of a
            stream that several workers read. Rows are then in the order in which they came.
        predictions: Class numbers or values ``(rows,)``; for multi-label ``(rows, classes)``, for
            tokens ``(rows, tokens)``. Rows of batches narrower than the widest are padded with
            -100. A list of one object per row where these were decoded.
        scores: Probability of each class, float32 ``(rows, classes)``; None for a regression, for
            tokens, or with a ``postprocess`` of your own.
        references: The labels, padded as ``predictions`` are; None if the data has none. Those of a
            causal language model are moved by one token, beside what predicts them.
        kept: Columns of the dataset that were kept, by name.
        names: Names of the classes in the order of their numbers; None if they have none.
        inputs: What finds the texts of rows in the dataset, as long as that exists.
        ignored: Label of the references that counts in no metric, such as that of the config for
            pixels of no class; beside -100, which never does.

    >>> table = Predictions(np.arange(3), np.array([1, 0, 1]), None, None, {"id": ["a", "b", "c"]},
    ...                     ("negative", "positive"))
    >>> table
    Predictions(3 rows; index 0 to 2; predictions: int64 (3,) positive 2, negative 1; kept: id)
    >>> table[1]
    {'index': 1, 'id': 'b', 'prediction': 0, 'label': 'negative'}
    >>> table[np.array(table.labels) == "positive"].kept
    {'id': ['a', 'c']}
    """

    index: NDArray[np.int64] | None
    predictions: NDArray[Any] | list[Any]
    scores: NDArray[np.float32] | None
    references: NDArray[Any] | list[Any] | None
    kept: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    inputs: Inputs = field(default_factory=Inputs)
    ignored: int = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.predictions)

    def __repr__(self) -> str:
        parts = [f"{len(self)} row{'s' * (len(self) != 1)}"]
        if self.index is not None and len(self):
            parts.append(f"index {self.index[0]} to {self.index[-1]}")
        parts.append(f"predictions: {_summary(self, self.predictions)}")
        if self.references is not None:
            parts.append(f"references: {_summary(self, self.references)}")
        if self.scores is not None:
            parts.append(f"scores: {self.scores.dtype} {self.scores.shape}")
        if self.kept:
            parts.append(f"kept: {_first(self.kept, 8)}")
        return f"Predictions({'; '.join(parts)})"[:900]

    @property
    def labels(self) -> list[Any] | None:
        """Class name of each prediction; None without names, and for values and objects.

        For several labels a list of the names of a row's labels. For tokens a list of the names of
        a row's tokens, without those whose reference is -100, and without padding.
        """
        return names_of(self, self.predictions)

    @overload
    def __getitem__(self, rows: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, rows: slice | Sequence[Any] | NDArray[Any] | Tensor) -> Predictions: ...
    def __getitem__(self, rows: Any) -> Predictions | dict[str, Any]:
        if isinstance(rows, Integral) and not isinstance(rows, bool):
            place = int(rows)
            if not -len(self) <= place < len(self):  # a loop over the rows ends by this error
                raise IndexError(f"Row {place} of {len(self)}: rows count from 0.")
            place %= len(self)
            columns = columns_of(self[place : place + 1])
            return {
                name: values.tolist()[0] if isinstance(values, np.ndarray) else values[0]
                for name, values in columns.items()
            }
        places = _places(_by_place(rows, self), len(self))
        return replace(
            self,
            index=_take(self.index, places),
            predictions=_take(self.predictions, places),
            scores=_take(self.scores, places),
            references=_take(self.references, places),
            kept={name: _take(values, places) for name, values in self.kept.items()},
        )

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per row.

        Its index is that of the frame that the loader was prepared from, else the number of the row
        in the dataset. So ``frame.join(table.to_pandas()[["prediction"]])`` puts each row beside
        its own.
        """
        from pandas import DataFrame, Series  # a dependency of datasets

        def column(values: Any) -> Any:
            if isinstance(values, np.ndarray):
                return values
            # As objects, where pandas would change them: None to NaN, lists to an array.
            return Series(values, dtype=_dtype(values))

        columns = {name: column(values) for name, values in columns_of(self).items()}
        made = DataFrame(columns)
        if (labels := row_labels(self)) is not None:
            made.index = labels
        return made

    def to_dataset(self) -> Any:
        """Return a ``datasets.Dataset``.

        Raises:
            DataError: Decoded objects cannot be stored in a table.
        """
        from datasets import Dataset

        return Dataset(_to_arrow(self))

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a Parquet file, which keeps the types of all columns.

        Args:
            path: Path of the file.

        Raises:
            DataError: Decoded objects cannot be stored in a table.
        """
        from pyarrow import parquet

        parquet.write_table(_to_arrow(self), os.fspath(path))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a CSV file; lists and dicts are written as JSON.

        Args:
            path: Path of the file.
        """
        from pandas import Series  # a dependency of datasets

        frame = self.to_pandas()
        for name in frame.columns:
            if frame[name].dtype == object:  # and stays: whole numbers beside None are no floats
                cells = [_as_cell(value) for value in frame[name]]
                frame[name] = Series(cells, dtype=object, index=frame.index)
        frame.to_csv(path, index=False)


def row_labels(table: Predictions) -> Any:
    """Return the ``pandas.Index`` of the rows: of their frame, or their numbers; None: no numbers.

    >>> row_labels(Predictions(np.array([1, 2]), np.zeros(2), None, None)).tolist()
    [1, 2]
    """
    from pandas import Index, RangeIndex

    if table.index is None:
        return None
    if table.inputs.frame_index is not None:
        return table.inputs.frame_index.take(table.index)
    if len(table) == 0 or np.array_equal(table.index, np.arange(len(table))):
        return RangeIndex(len(table))
    return Index(table.index)


def _by_place(rows: Any, table: Predictions) -> Any:
    """Return a mask of pandas in the order of the table, as pandas itself finds rows by an index.

    Raises:
        IndexError: Its index is not that of the rows, or counts what may be either.
    """
    if type(rows).__name__ != "Series" or getattr(rows.dtype, "kind", "") != "b":
        return rows
    labels = row_labels(table)
    if labels is None or rows.index.equals(labels):
        return rows.to_numpy()
    fits = len(rows) == len(table) and np.array_equal(rows.index, np.arange(len(rows)))
    has_all = rows.index.is_unique and bool(labels.isin(rows.index).all())
    if has_all and not fits:
        return rows[labels].to_numpy()
    if fits and not has_all:
        return rows.to_numpy()
    raise IndexError(
        "The mask is a Series with another index than the rows. Take it by place, "
        "table[mask.to_numpy()], or by its index, table[mask[table.to_pandas().index].to_numpy()]."
    )


def _places(rows: Any, length: int) -> NDArray[np.int64]:
    """Return the places that a slice, a mask or a list of places selects."""
    if isinstance(rows, slice):
        return np.arange(length)[rows]
    places = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
    if places.ndim == 1 and places.size == 0:
        return np.arange(0)
    if places.ndim != 1 or places.dtype.kind not in "biu":
        raise IndexError(
            f"Predictions are indexed by a number, a slice, a mask or a list of places, got "
            f"{rows!r:.60}. One row: table[3]; rows by a condition: table[table.predictions == 1]."
        )
    if places.dtype.kind == "b" and len(places) != length:
        raise IndexError(f"A mask of {len(places)} for {length} rows: it takes one entry a row.")
    chosen: NDArray[np.int64] = np.arange(length)[places]
    return chosen


def _take(values: Any, places: NDArray[np.int64]) -> Any:
    if values is None or isinstance(values, np.ndarray | Tensor):
        return values if values is None else values[places]
    return [values[place] for place in places.tolist()]


def kind_of(table: Predictions) -> Kind:
    """Tell what a row of predictions is."""
    values = table.predictions
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        return "object"
    if values.dtype.kind == "f":
        return "value"
    if values.ndim == 1:
        return "class"
    scores, references = table.scores, table.references
    if scores is not None and scores.shape == values.shape:
        return "classes"
    # Of a postprocess: 0 or 1 for each class, or numbers of classes, such as those of the best.
    is_wide = values.ndim == 2 and table.names is not None and len(table.names) == values.shape[1]
    if not is_wide or values.max(initial=0) > 1 or values.min(initial=0) < 0:
        return "tokens"
    # Targets of several labels are floats, so that they fit a binary loss.
    is_float = isinstance(references, np.ndarray) and references.dtype.kind == "f"
    is_of_several = is_float or table.inputs.task == "multi_label_classification"
    return "classes" if is_of_several or values.dtype.kind == "b" else "tokens"


def names_of(table: Predictions, values: Any) -> list[Any] | None:
    """Return the class names of predictions or references, row by row.

    Args:
        table: The predictions they belong to.
        values: ``table.predictions``, or ``table.references`` of the same kind.

    Returns:
        A name for each row; for several labels and for tokens a list of names. None if there are no
        names, or the values are no class numbers.
    """
    names, kind = table.names, kind_of(table)
    if names is None or kind in ("object", "value") or not isinstance(values, np.ndarray):
        return None
    if kind == "classes":
        if values.ndim != 2 or values.shape[1] != len(names):
            return None
        return [[names[number] for number in np.flatnonzero(row > 0)] for row in values]
    if values.dtype.kind not in "biu":
        return None
    known = (*names, None)  # an ignored label has no name
    is_named = (values >= 0) & ~is_ignored(table, values)
    if values.max(initial=0, where=is_named) >= len(names):
        return None
    numbers = np.where(is_named, values.astype(np.int64), len(names))
    if kind == "class":
        return [known[number] for number in numbers.tolist()] if values.ndim == 1 else None
    return _each(lambda number: known[number], _kept_positions(table, numbers))


def is_ignored(table: Predictions, labels: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which numbers are padding, or references that count in no metric."""
    found: NDArray[np.bool_] = labels == IGNORE_INDEX
    return found | (labels == table.ignored) if labels is table.references else found


def _each(function: Any, values: list[Any]) -> list[Any]:
    """Call a function with every number in nested lists."""
    return [_each(function, v) if isinstance(v, list) else function(v) for v in values]


def _kept_positions(table: Predictions, values: NDArray[Any]) -> list[Any]:
    """Return the values of each row without positions that are padding or have no reference."""
    masked, references = table.predictions, table.references
    if isinstance(references, np.ndarray) and references.shape == values.shape:
        masked = references
    is_kept = ~is_ignored(table, np.asarray(masked))
    if values.shape != is_kept.shape or values.ndim != 2:
        return list(values.tolist())  # a map of classes keeps its shape
    return [row[kept].tolist() for row, kept in zip(values, is_kept, strict=True)]


def columns_of(table: Predictions) -> dict[str, Any]:
    """Return all columns by name, each an array or a list with one entry for each row.

    A kept column whose name is one of ours gets ``kept_`` before it.
    """
    own: dict[str, Any] = {} if table.index is None else {"index": table.index}
    rest: dict[str, Any] = {}
    for name, title, values in (
        ("prediction", "label", table.predictions),
        ("reference", "reference_label", table.references),
    ):
        if values is not None:
            rest[name] = _entries(table, values)
            if (names := names_of(table, values)) is not None:
                rest[title] = names
    if table.scores is not None and table.scores.ndim == 2:
        titles = _score_titles(table.names, table.scores.shape[1])
        rest |= {title: table.scores[:, number] for number, title in enumerate(titles)}
    kept: dict[str, Any] = {}
    for name, column in table.kept.items():
        while name in own or name in rest or name in kept:
            name = f"kept_{name}"
        kept[name] = [_plain(value) for value in column]
    return {**own, **kept, **rest}


def _score_titles(names: Sequence[str] | None, number: int) -> list[str]:
    titles = list(map(str, range(number))) if names is None or len(names) != number else list(names)
    twice = {title for title, times in Counter(titles).items() if times > 1}
    return [
        f"score_{title}" if title not in twice else f"score_{title}_{place}"
        for place, title in enumerate(titles)
    ]


def _entries(table: Predictions, values: Any) -> Any:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        return [_plain(value) for value in values]
    if values.ndim == 1:
        return values
    is_of_tokens = kind_of(table) == "tokens" and values.dtype.kind in "biu"
    return _kept_positions(table, values) if is_of_tokens else values.tolist()


def _plain(value: Any) -> Any:
    """Return a value without tensors and arrays, which no file can hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _as_cell(value: Any) -> Any:
    """Return a value as a CSV file has it: lists and dicts as JSON, others as they are."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _dtype(values: list[Any]) -> Any:
    kinds = {type(value) for value in values}
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in values):
        return np.int64
    return kinds.pop() if kinds in ({float}, {bool}) else object


def _to_arrow(table: Predictions) -> Any:
    """Return a ``pyarrow.Table``.

    Raises:
        DataError: A column holds what Arrow cannot hold, or would change.
    """
    import pyarrow as pa

    arrays = {}
    for name, values in columns_of(table).items():
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise _unstorable(name, str(error)) from error
        if not isinstance(values, np.ndarray) and len(forms := _forms(values)) > 1:
            shown = " and ".join(sorted(str(sorted(form))[:60] for form in forms)[:2])
            raise _unstorable(name, f"dicts with other keys: {shown}")
    return pa.table(arrays)


def _unstorable(name: str, reason: str) -> DataError:
    return DataError(
        f"The column {name!r} cannot be stored in a table: {reason[:200]}. Let decode return "
        "values of one form for all rows: texts, numbers, lists, or dicts with the same keys. "
        "to_pandas() takes any object, and to_csv(path) writes lists and dicts as JSON."
    )


def _forms(values: Sequence[Any]) -> set[frozenset[Any]]:
    """Return the sets of keys of the dicts in a column, also of those in lists."""
    found: set[frozenset[Any]] = set()
    for value in values:
        if isinstance(value, Mapping):
            found.add(frozenset(value))
        elif isinstance(value, list):
            found |= _forms(value)
    return found


def _summary(table: Predictions, values: Any) -> str:
    kind = kind_of(table)
    if kind == "object" or not isinstance(values, np.ndarray):
        kinds = Counter(type(value).__name__ for value in values)
        example = f", such as {values[0][:40]!r}" if len(values) and type(values[0]) is str else ""
        return _first((f"{number} {name}" for name, number in kinds.most_common()), 4) + example
    shape = f"{values.dtype} {values.shape}"
    if values.size == 0:
        return shape
    if values.dtype.kind == "f" and kind != "classes":
        sound = values[~np.isnan(values)]
        num_nan = f", NaN {values.size - sound.size}" if sound.size < values.size else ""
        between = f" from {sound.min():.4g} to {sound.max():.4g}" if sound.size else ""
        return f"{shape}{between}{num_nan}"
    if kind == "classes":
        numbers, counts = np.arange(values.shape[-1]), (values > 0).sum(0)
    else:
        numbers, counts = np.unique(values[~is_ignored(table, values)], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:6]
    names = table.names or ()
    shown = [
        f"{names[n][:24] if 0 <= n < len(names) else n} {count}"
        for n, count in zip(numbers[order].tolist(), counts[order].tolist(), strict=True)
    ]
    return f"{shape} {', '.join(shown)}{', ...' if len(counts) > len(order) else ''}"


def _first(entries: Any, number: int) -> str:
    entries = [str(entry)[:24] for entry in entries]
    return ", ".join(entries[:number]) + (", ..." if len(entries) > number else "")
