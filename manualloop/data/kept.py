"""Columns that skip the model: they reach the batch as the dataset gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from copy import copy
from typing import TYPE_CHECKING, Any

from manualloop.batches import Kept
from manualloop.data.columns import Columns, column_filter, find_label, require_columns
from manualloop.data.functions import RAW, Functions
from manualloop.data.mapping import Copy
from manualloop.data.splits import TEXT_KINDS, Split, reference_of
from manualloop.data.transform import NumberedRows, TransformedRows
from manualloop.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class KeepingCollate:
    """A ``collate_fn`` that adds kept columns to the batch that another one makes.

    Args:
        collate_fn: Function that makes the batch. It gets rows without the columns that are kept.
        kept: The kept columns by name, and the column of the rows that holds each: itself, or
            ``labels``.

    Attributes:
        collate_fn: As the argument.
        skips: Columns of the rows that ``collate_fn`` does not get.
    """

    def __init__(self, collate_fn: Callable[[Any], Any], kept: Mapping[str, str]) -> None:
        self.collate_fn, self._kept = collate_fn, dict(kept)
        self.skips = frozenset(kept.values()) - {"labels"}

    def __call__(self, rows: Any) -> Any:
        """Return the batch of some rows.

        Raises:
            ConfigError: ``collate_fn`` returned no dict.
        """
        table: Any = getattr(rows, "table", None)  # of TableRows
        if table is not None:
            kept = {name: Kept(table.column(held).to_pylist()) for name, held in self._kept.items()}
            rows = type(rows)(table.select([n for n in table.column_names if n not in self.skips]))
        else:
            kept = {name: Kept([row[held] for row in rows]) for name, held in self._kept.items()}
            left = [{n: cell for n, cell in row.items() if n not in self.skips} for row in rows]
            numbers: Any = getattr(rows, "numbers", None)
            rows = left if numbers is None else NumberedRows(left, numbers)
        batch = self.collate_fn(rows)
        if type(batch) is dict:
            return batch | kept
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"keep= adds {', '.join(kept)} to each batch, but collate_fn returned a "
                f"{type(batch).__name__}. Let it return a dict of columns."
            )
        if not isinstance(batch, MutableMapping):
            return {**batch, **kept}
        batch = copy(batch)  # a class of the user's, which may move itself to a device
        batch.update(kept)
        return batch

    def padded_lengths(self, dataset: Any) -> Any:
        """Return the padded lengths of rows, as ``TableCollate`` does; None if they are unknown."""
        find: Any = getattr(self.collate_fn, "padded_lengths", None)
        return None if find is None else find(without_columns(dataset, self.skips))

    def input_lengths(self, dataset: Any) -> Any:
        """Return the lengths of rows without labels, as ``TableCollate`` does; or None."""
        find: Any = getattr(self.collate_fn, "input_lengths", None)
        return None if find is None else find(without_columns(dataset, self.skips))


def inner_collate(collate_fn: Any) -> Any:
    """Return the function that makes a loader's batches, without the columns that are kept."""
    return collate_fn.collate_fn if isinstance(collate_fn, KeepingCollate) else collate_fn


def trained_data(loader: Any) -> Any:
    """Return the dataset of a loader, without the columns that skip the model."""
    dataset = getattr(loader, "dataset", loader)
    dataset = dataset.rows if isinstance(dataset, TransformedRows) else dataset
    dataset = getattr(dataset, "streamed_rows", dataset)
    collate = getattr(loader, "collate_fn", None)
    skips = collate.skips if isinstance(collate, KeepingCollate) else frozenset()
    return without_columns(dataset, skips)


def columns_read(loader: Any, names: Iterable[str]) -> Any:
    """Return the dataset of a loader with some kept columns alone; None: it keeps none of them.

    Args:
        loader: The loader.
        names: Names of columns, such as those that a loss declares to read.
    """
    collate = getattr(loader, "collate_fn", None)
    skips = collate.skips if isinstance(collate, KeepingCollate) else frozenset()
    dataset: Any = getattr(loader, "dataset", None)
    dataset = dataset.rows if isinstance(dataset, TransformedRows) else dataset
    found = [name for name in names if name in skips]
    return dataset.select_columns(found) if found and hasattr(dataset, "select_columns") else None


def without_columns(dataset: Any, names: frozenset[str]) -> Any:
    """Return a dataset without some of its columns."""
    found = [name for name in getattr(dataset, "column_names", None) or () if name in names]
    return dataset.remove_columns(found) if found else dataset


def with_raw_labels(
    before: Mapping[Any, Split],
    after: Mapping[Any, Split],
    label: str | None,
    functions: Mapping[Any, Functions],
) -> dict[Any, Split] | None:
    """Return splits whose labels are numbered with a second column of them; None: nothing needs it.

    Args:
        before: The splits as they were.
        after: The splits with numbered labels.
        label: The column of labels; None finds it.
        functions: The functions of each split, with the columns to keep.
    """
    label = label or find_label(reference_of(before).kinds)
    # A transform gets strings as they are. It may return the numbers that it gets, so these are
    # those of the names.
    wanting = {
        key
        for key, split in before.items()
        if split is not after[key]
        and (
            label in functions[key].keep
            or (functions[key].transform is not None and split.kinds.get(str(label)) in TEXT_KINDS)
        )
    }
    if label is None or not wanting:
        return None
    run = Copy(label, RAW)
    return {
        key: split.map(run, types={RAW: label}) if key in wanting else split
        for key, split in before.items()
    }


def without_raw(split: Split) -> Split:
    """Return a split without the second column of labels."""
    kinds = split.kinds
    return split.select([name for name in kinds if name != RAW]) if RAW in kinds else split


def check_kept(
    splits: Mapping[Any, Split],
    keep: tuple[str, ...],
    tokenizer: Any,
    model: nn.Module | None,
    columns: Columns,
) -> None:
    """Refuse columns to keep that no split has, or that the model gets.

    Args:
        splits: The splits, after ``preprocess``.
        keep: Names of the columns.
        tokenizer: As in ``prepare_dataloaders``.
        model: As in ``prepare_dataloaders``.
        columns: The roles of the columns.

    Raises:
        ConfigError: A column cannot be kept.
    """
    reference = reference_of(splits)
    known = column_filter(tokenizer, model, takes_all=False)
    is_known = tokenizer is not None or model is not None
    for name in keep:
        having = next((s for s in splits.values() if name in s.kinds), None)
        if having is None:
            require_columns(reference.name, reference.kinds, [name], "keep=")
            continue
        is_input = is_known and known(name, having.kinds[name]) and name != columns.label
        if name == "labels" or is_input:
            other = "label" if name == "labels" else f"kept_{name}"
            line = having.fix(f'rename_column("{name}", "{other}")')
            if name != "labels":
                line = having.fix(f'map(lambda row: {{"{other}": row["{name}"]}})')
            raise ConfigError(
                f"keep={keep} names {name!r}, which the batches have already: the model gets it. "
                f'Give the kept column another name: {line}, keep="{other}".'
            )


def kept_columns(
    split: Split, functions: Functions, label: str | None, is_transformed: bool
) -> dict[str, str]:
    """Return the kept columns of a prepared split, and the column that holds each.

    Args:
        split: The split.
        functions: Its functions, with the columns to keep.
        label: The column of labels.
        is_transformed: Whether rows are transformed, and hold each column under its name.
    """
    keep = functions.keep
    if is_transformed:
        return {name: name for name in (*keep, *functions.makes)}
    held = {name: name for name in keep if name in split.kinds}
    if label in keep and RAW in split.kinds:
        held[str(label)] = RAW
    if label in keep and label not in held and "labels" in split.kinds:
        held[str(label)] = "labels"
    return held
