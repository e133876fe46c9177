"""The columns of ``Predictions`` as plain values, and the tables and files made of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from manualloop.errors import DataError
from manualloop.tasks.task import IGNORE_INDEX

if TYPE_CHECKING:
    from manualloop.evaluation.predictions import Predictions

Kind = Literal["class", "classes", "tokens", "value", "object"]
"""What a row of predictions is: a class number, several labels of a row at once (0 or 1 for each
class), a class number for each token, a number or several, or any Python object."""


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
    # Of a postprocess: targets of several labels are floats, so that they fit a binary loss.
    is_wide = values.ndim == 2 and table.names is not None and len(table.names) == values.shape[1]
    is_float = isinstance(references, np.ndarray) and references.dtype.kind == "f"
    return "classes" if is_wide and (is_float or values.dtype.kind == "b") else "tokens"


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


def to_pandas(table: Predictions) -> Any:
    """Return a ``pandas.DataFrame``."""
    from pandas import DataFrame, Series  # a dependency of datasets

    columns = columns_of(table)
    # As objects, where pandas would change them: None to NaN, lists of one length to an array.
    return DataFrame(
        {
            name: values if isinstance(values, np.ndarray) else Series(values, dtype=_dtype(values))
            for name, values in columns.items()
        }
    )


def _dtype(values: list[Any]) -> Any:
    kinds = {type(value) for value in values}
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in values):
        return np.int64
    return kinds.pop() if kinds in ({float}, {bool}) else object


def to_arrow(table: Predictions) -> Any:
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


def to_dataset(table: Predictions) -> Any:
    """Return a ``datasets.Dataset``."""
    from datasets import Dataset

    return Dataset(to_arrow(table))


def to_parquet(table: Predictions, path: str | os.PathLike[str]) -> None:
    """Write a Parquet file."""
    from pyarrow import parquet

    parquet.write_table(to_arrow(table), os.fspath(path))


def to_csv(table: Predictions, path: str | os.PathLike[str]) -> None:
    """Write a CSV file: texts and numbers as they are, lists and dicts as JSON."""
    frame = to_pandas(table)
    for name in frame.columns:
        if frame[name].dtype == object:
            frame[name] = [
                json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
                for value in frame[name]
            ]
    frame.to_csv(path, index=False)


def describe(table: Predictions) -> str:
    """Describe predictions in a line of at most 1000 characters."""
    parts = [f"{len(table)} row{'s' * (len(table) != 1)}"]
    if table.index is not None and len(table):
        parts.append(f"index {table.index[0]} to {table.index[-1]}")
    parts.append(f"predictions: {_summary(table, table.predictions)}")
    if table.references is not None:
        parts.append(f"references: {_summary(table, table.references)}")
    if table.scores is not None:
        parts.append(f"scores: {table.scores.dtype} {table.scores.shape}")
    if table.kept:
        parts.append(f"kept: {_first(table.kept, 8)}")
    return f"Predictions({'; '.join(parts)})"[:900]


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
