"""What the user asked to change in the cells: empty ones are filled, columns of labels joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from manualloop.arguments import Checks
from manualloop.data.columns import find_label, require_columns
from manualloop.data.judge import check_missing
from manualloop.data.mapping import Fill, Join, is_empty
from manualloop.data.splits import Split, reference_of
from manualloop.data.values import empty_in, values_of
from manualloop.errors import ConfigError, DataError
from manualloop.mistakes import as_map


def fill_cells(
    splits: dict[Any, Split],
    fill: Mapping[str, Any],
    label_column: str | Sequence[str] | None,
    check: Checks,
) -> dict[Any, Split]:
    """Fill the empty cells of all splits."""
    known = {name for split in splits.values() for name in split.kinds}
    for name in fill:
        if splits and name not in known:
            first = reference_of(splits)
            check(require_columns, first.name, first.kinds, [name], "fill=")
    return {key: _fill_split(split, fill, label_column, check) for key, split in splits.items()}


def _fill_split(
    split: Split,
    fill: Mapping[str, Any],
    label_column: str | Sequence[str] | None,
    check: Checks,
) -> Split:
    kinds = split.kinds
    labels = [label_column] if isinstance(label_column, str) else label_column
    labels = labels or [find_label(kinds) or ""]
    values = {}
    for name, value in fill.items():
        if name not in kinds:
            continue
        check(_check_filling, split, name, value)
        is_cell_empty = empty_in(split, name)
        if is_cell_empty is None:  # a stream
            is_hidden = name in labels and is_empty(split.first[name])
        else:
            is_hidden = name in labels and bool(is_cell_empty.all())
        if not is_hidden and (is_cell_empty is None or is_cell_empty.any()):
            values[name] = value
    if not (values and check.ok):
        return split
    are_typed = all(getattr(split.feature(name), "dtype", "") != "null" for name in values)
    return split.map(Fill(values), types={} if are_typed else None)


_FILLINGS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "int": (Integral,),
    "class": (Integral,),
    "float": (Real,),
    "list": (list, tuple),
    "texts": (list, tuple),
}


def _check_filling(split: Split, column: str, value: Any) -> None:
    kind = split.kinds[column]
    if not isinstance(value, _FILLINGS.get(kind, (object,))):
        raise ConfigError(
            f"fill={{{column!r}: {value!r}}} does not fit column {column!r} of {split.name}, which "
            f"holds values of kind {kind!r}. Pass a value of that kind."
        )


def one_label_column(
    splits: dict[Any, Split],
    label_column: str | Sequence[str] | None,
    keep: Sequence[str],
    check: Checks,
) -> tuple[dict[Any, Split], str | None]:
    """Make one column of labels of several; return the splits and the name of the column.

    Args:
        splits: The splits.
        label_column: One column of labels, or several.
        keep: Columns that stay as they are, too.
        check: Keeps the errors.
    """
    if label_column is None or isinstance(label_column, str):
        return splits, label_column
    names = tuple(label_column)
    if len(names) == 1:
        return splits, names[0]
    first = reference_of(splits)
    if check(require_columns, first.name, first.kinds, names) is None and not check.ok:
        return splits, None
    joined = {}
    for key, split in splits.items():
        joined[key] = split
        if not set(names) & set(split.kinds):
            continue  # rows without labels
        for name in names:
            check(require_columns, split.name, split.kinds, [name])
            if name in split.kinds:
                check(_check_zeros_and_ones, split, name)
        if check.ok:
            joined[key] = split.map(Join(names), remove=[n for n in names if n not in keep])
    return joined, "labels"


def _check_zeros_and_ones(split: Split, column: str) -> None:
    """Refuse one of several columns of labels that holds anything but 0, 1 and -100.

    Raises:
        DataError: A value is missing, or is not 0 to 1.
    """
    if (values := values_of(split, column)) is None or values.hidden_as():
        return
    kind = split.kinds[column]
    if kind not in ("class", "int", "float"):
        raise DataError(
            f"Column {column!r} of {split.name} holds values of kind {kind!r}, but several columns "
            "of labels are one multi-label target of 0 and 1 each. Name one column: "
            f'label_column="{column}".'
        )
    check_missing(split, values, column)
    is_wrong = values.has_number & ((values.least < 0) | (values.most > 1))
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        call = as_map(column, f'int(row["{column}"] > 0)')
        raise DataError(
            f"Target {values.least[row]:g} in row {row} of {split.name}, column {column!r}, but "
            f"several columns of labels are one multi-label target of 0 and 1 each. If more than "
            f"0 means 1: {split.fix(call)}."
        )
