"""What the splits of a run hold: rows, labels, padding, and their largest batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manualloop.batches import num_rows
from manualloop.data.inspect import reading
from manualloop.data.sampler import OrderedBatchSampler, num_batches
from manualloop.data.splits import Split, open_split
from manualloop.errors import DataError
from manualloop.tasks.names import Names, notes_of
from manualloop.tasks.task import Task


class SplitSummary(NamedTuple):
    """What is known of a split before it is used.

    Attributes:
        num_rows: Number of rows; None for a stream, and for batches of your own.
        num_batches: Number of batches in a pass; None for a stream.
        num_cut: Number of texts that were cut off; None if nobody knows.
        num_texts: Number of texts.
        max_length: Number of tokens at which they are cut off; None if they are not.
        padding: Share of padding in the batches of a pass; None without an attention mask.
        num_tokens: Number of places in the batches of a pass, padding included; None if unknown.
        classes: Number of labels of each class, by its name; empty where labels are no classes.
        num_counted: Number of rows whose labels were counted.
        labels: Mean and variance of the labels of a regression; None for others.
        num_in_train: Number of rows whose tokens are those of a row to train on; None if unknown.
    """

    num_rows: int | None
    num_batches: int | None
    num_cut: int | None = None
    num_texts: int = 0
    max_length: int | None = None
    padding: float | None = None
    num_tokens: int | None = None
    classes: Mapping[str, int] = {}
    num_counted: int = 0
    labels: tuple[float, float] | None = None
    num_in_train: int | None = None


class Plan(NamedTuple):
    """The batches of a pass over a prepared split, by the lengths of their rows.

    Attributes:
        batches: Row numbers of each batch.
        places: Number of places of each batch, padding included.
        padding: Share of padding among the tokens of the inputs.
    """

    batches: list[list[int]]
    places: NDArray[np.int64]
    padding: float


def splits_of(loaders: Any) -> tuple[dict[str, Any], str]:
    """Return loaders by the names of their splits, and the name of the one to train on.

    Args:
        loaders: What ``preflight`` was given: a mapping of loaders, or one of them.

    Raises:
        DataError: No split of the mapping is there to train on.
    """
    if not isinstance(loaders, Mapping):
        sampler = getattr(loaders, "batch_sampler", None)
        name = sampler.split if isinstance(sampler, OrderedBatchSampler) else "train"
        return {name: loaders}, name
    named = {str(name): loader for name, loader in loaders.items()}
    for name in sorted(named, key=lambda name: name != "train"):
        if name.startswith("train"):
            return named, name
    raise DataError(
        f"No split begins with train: {', '.join(named) or 'there is none'}. Pass the loader to "
        f'train on: preflight(model, loaders["{next(iter(named), "train")}"]).'
    )


def first_batches(loader: Any, number: int) -> list[Any]:
    """Read the first batches of a pass and leave the loader as it was.

    Raises:
        DataError: The loader can be read only once, or gives no batch.
    """
    with reading(loader) as batches:
        found = list(islice(batches, number))
    if not found:
        raise DataError(
            "The training loader gave no batch. Check the filter of the dataset, and batch_size "
            "with drop_last."
        )
    return found


def plan_of(loader: Any) -> Plan | None:
    """Return the batches of the first epoch by the lengths of their rows; None if nobody knows."""
    sampler = getattr(loader, "batch_sampler", None)
    find: Callable[[Any], Any] | None = getattr(
        getattr(loader, "collate_fn", None), "padded_lengths", None
    )
    if not isinstance(sampler, OrderedBatchSampler) or find is None:
        return None
    if (lengths := find(loader.dataset)) is None:
        return None
    batches = sampler.batches(0)
    rows = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in batches])
    sizes = np.array([len(batch) for batch in batches])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    places = np.maximum.reduceat(lengths[rows], starts) * sizes
    tokens, padded = loader.collate_fn.input_lengths(loader.dataset)  # labels have no mask
    num_places = (np.maximum.reduceat(padded[rows], starts) * sizes).sum()
    return Plan(batches, places, 1 - float(tokens[rows].sum() / max(num_places, 1)))


def largest_batch(loader: Any, plan: Plan | None, read: Sequence[Any]) -> Any:
    """Return the batch with the most places, of those of an epoch, or of some that were read."""
    if plan is None:
        return max(read, key=places_of)
    rows = plan.batches[int(plan.places.argmax())]
    fetch = getattr(loader.dataset, "__getitems__", None)
    found = [loader.dataset[row] for row in rows] if fetch is None else fetch(rows)
    return loader.collate_fn(found)


def places_of(batch: Any) -> int:
    """Return the number of tokens of a batch, padding included; of others the number of rows."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return int(ids.numel()) if isinstance(ids, Tensor) else num_rows(batch)


def tokens_of(batch: Any) -> int | None:
    """Return the length of the rows of a batch, padding included; None without tokens."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return int(ids.shape[-1]) if isinstance(ids, Tensor) and ids.ndim else None


def summarize(
    loader: Any, names: Names | None, plan: Plan | None, read: Sequence[Any], task: Task | None
) -> SplitSummary:
    """Describe a split by what was noted when it was prepared, by its table, or by batches.

    Args:
        loader: The loader of the split.
        names: Names of the classes; None if they have none.
        plan: Its batches, if they are known.
        read: Some batches that were read, for what nothing else tells.
        task: The task; None if no batch has told it.
    """
    notes = notes_of(loader)
    dataset: Any = getattr(loader, "dataset", None)
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    padding, num_tokens = _padding_in(read), None
    if plan is not None:
        num_tokens = int(plan.places.sum())
        padding = plan.padding
    found = SplitSummary(
        rows,
        num_batches(loader),
        notes.num_cut,
        notes.num_texts,
        notes.max_length,
        padding,
        num_tokens,
    )
    if task is None or task.name not in (*_WITH_CLASSES, "regression"):
        return found
    table, tensors = _table_of(loader), _labels_in(read)
    if table is None and not tensors:
        return found
    num_counted = sum(map(len, tensors)) if table is None else len(table.rows)
    if task.name == "regression":
        numbers = _flat(tensors) if table is None else _numbers_in(table)
        kept = numbers[np.isfinite(numbers)]
        if not kept.size:
            return found
        moments = float(kept.mean()), float(kept.var())
        return found._replace(labels=moments, num_counted=num_counted)
    counts = _count(table, tensors, is_by_column=task.name == "multi_label_classification")
    if counts is None:
        return found
    classes = _by_name(counts, names or notes.names or ())
    return found._replace(classes=classes, num_counted=num_counted)


_WITH_CLASSES = (
    *("single_label_classification", "multi_label_classification", "token_classification"),
)


def _padding_in(batches: Sequence[Any]) -> float | None:
    masks = [batch.get("attention_mask") for batch in batches if isinstance(batch, Mapping)]
    found = [mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2]
    places = sum(mask.numel() for mask in found)
    return 1 - sum(int(mask.sum()) for mask in found) / places if places else None


def _table_of(loader: Any) -> Split | None:
    """Return the rows of a loader as a split; None where there is no table with labels."""
    dataset: Any = getattr(loader, "dataset", None)
    is_table = hasattr(dataset, "with_format") and hasattr(dataset, "__len__")
    if not is_table or "labels" not in (getattr(dataset, "column_names", None) or ()):
        return None
    return open_split("the split", dataset.with_format(None), None) if len(dataset) else None


def _labels_in(batches: Sequence[Any]) -> list[Tensor]:
    found = [batch.get("labels") for batch in batches if isinstance(batch, Mapping)]
    return [labels.cpu() for labels in found if isinstance(labels, Tensor)]


def _numbers_in(table: Split) -> NDArray[np.float64]:
    from manualloop.data.values import numbers_in  # loads pyarrow

    return numbers_in(table, "labels")


def _flat(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double().numpy()


def _count(
    table: Split | None, tensors: Sequence[Tensor], *, is_by_column: bool
) -> NDArray[Any] | None:
    """Count the labels of each class in a table, or in the labels of batches."""
    if table is not None:
        from manualloop.data.values import count_classes  # loads pyarrow

        return count_classes(table, "labels", is_by_column=is_by_column)
    if is_by_column:
        return (torch.cat(list(tensors)) > 0.5).sum(0).numpy()
    labels = _flat(tensors)
    return np.bincount(labels[labels >= 0].astype(np.int64))


def _by_name(counts: NDArray[Any], names: Names) -> dict[str, int]:
    """Return the counts of classes by their names, also of those without a label."""
    numbers = range(max(len(names), len(counts)))
    return {
        names[n] if n < len(names) else str(n): int(counts[n]) if n < len(counts) else 0
        for n in numbers
    }


def rows_in_common(train: Any, other: Any) -> int | None:
    """Count the rows of a loader whose tokens are those of a row of another; None if unknown."""
    known, rows = _tokens_of(train), _tokens_of(other)
    if known is None or rows is None:
        return None
    found = {*known}
    return sum(row in found for row in rows)


_MOST_ROWS = 200_000


def _tokens_of(loader: Any) -> list[bytes] | None:
    """Return the tokens of each row of a table; None where there is no table of tokens."""
    dataset: Any = getattr(loader, "dataset", None)
    if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return None
    if not hasattr(dataset, "with_format") or not 0 < len(dataset) <= _MOST_ROWS:
        return None
    with suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        table: Any = dataset.select_columns(["input_ids"]).with_format("arrow")[:]
        column = table["input_ids"].combine_chunks()
        ends = column.offsets.to_numpy() - column.offsets[0].as_py()
        tokens = column.flatten().to_numpy(zero_copy_only=False)
        return [tokens[begin:end].tobytes() for begin, end in pairwise(ends.tolist())]
    return None


def missing_classes(train: Mapping[str, int], others: Iterable[Mapping[str, int]]) -> list[str]:
    """Return the classes that occur elsewhere and have no row to train on."""
    found = [name for of in others for name, count in of.items() if count]
    return [name for name in dict.fromkeys(found) if not train.get(name)]
