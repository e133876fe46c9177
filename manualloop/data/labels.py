"""Labels: which task they belong to, and whether a model can be trained on them.

Whole columns are checked when loaders are prepared. Batches are checked by the same rules before
they are trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from manualloop.errors import DataError
from manualloop.mistakes import scalar_floats_message
from manualloop.models import num_labels, problem_type
from manualloop.notices import logger
from manualloop.tasks.task import IGNORE_INDEX, infer_task

if TYPE_CHECKING:
    from manualloop.data.columns import Rows, Split

BY_TOKEN = ("token_classification", "masked_lm", "causal_lm")
"""Tasks with a label for each token."""


class Labels(NamedTuple):
    """A description of the labels that all splits share.

    Attributes:
        column: Column that holds them; None for rows without labels.
        task: A key of ``TASKS``; None if it cannot be inferred from the first row.
        num_classes: Number of classes; None if neither the model nor the column tells.
        are_listed: Whether the label of a row is a list of class numbers.
    """

    column: str | None
    task: str | None
    num_classes: int | None
    are_listed: bool = False


def describe_labels(
    split: Split, column: str | None, task: str | None, model: nn.Module | None
) -> Labels:
    """Describe the labels by looking at one split, normally the training split.

    Raises:
        DataError: The labels are lists of class numbers, and the number of classes is unknown.
    """
    num_classes = None if model is None else num_labels(model)
    if column is None:
        return Labels(None, task or (None if model is None else infer_task(model)), num_classes)
    is_chosen = task is not None or (model is not None and problem_type(model) is not None)
    task = task or _infer_task(split, column, model)
    values, kind = split.column(column), split.kinds[column]
    if task == "regression" and not is_chosen and kind in ("int", "class") and values is not None:
        warn_of_classes_as_values(values.to_numpy(), f"{column!r} of {split.name}")
    if task != "multi_label_classification" or kind != "list":
        return Labels(column, task, num_classes)
    item = split.item_feature(column)
    if hasattr(item, "names"):
        return Labels(column, task, len(item.names), are_listed=True)
    are_listed = "int" in str(getattr(item, "dtype", "")) and _hold_class_numbers(values)
    if are_listed and num_classes is None:
        raise DataError(
            f"Column {column!r} of {split.name} holds lists of class numbers, but the number of "
            "classes is unknown. Pass model=model, or make each row a list of 0 and 1 with one "
            "entry per class."
        )
    return Labels(column, task, num_classes, are_listed)


def _infer_task(split: Split, column: str, model: nn.Module | None) -> str | None:
    label, kind = split.first[column], split.kinds[column]
    model = nn.Module() if model is None else model
    if label is None or kind not in ("class", "int", "float", "list"):
        return None
    if kind != "list":
        return infer_task(model, torch.tensor([label]))
    by_token = "input_ids" in split.first and split.first_misaligned(column) is None
    return infer_task(model, torch.zeros(1, 2, dtype=torch.long if by_token else torch.float))


def _hold_class_numbers(lists: Any) -> bool:
    """Tell lists of class numbers from rows of 0 and 1, which a stream is assumed to hold."""
    import pyarrow.compute as pc

    if lists is None:
        return False
    one_length = pc.count_distinct(pc.list_value_length(lists)).as_py() == 1
    return not one_length or (pc.max(pc.list_flatten(lists)).as_py() or 0) > 1


def prepare_labels(split: Split, labels: Labels) -> Split:
    """Check the labels of a split and name them ``labels``; drop them if all are -1.

    Raises:
        DataError: The model has no output for one of the labels.
    """
    column, kinds = labels.column, split.kinds
    if column is None:
        return split
    others = [name for name in kinds if name not in (column, "labels")]
    if column not in kinds or _are_withheld(split, column):
        return split.select(others)
    _check_column(split, column, labels)
    if column != "labels":
        split = split.select([*others, column]).rename(column, "labels")
    if labels.are_listed:
        classes = range(labels.num_classes or 0)

        def as_zeros_and_ones(rows: Rows) -> Rows:
            return {"labels": [[float(n in row) for n in classes] for row in rows["labels"]]}

        split = split.map(as_zeros_and_ones)
    return split


def _are_withheld(split: Split, column: str) -> bool:
    """Tell whether all labels are -1, which is GLUE's convention for test splits."""
    values = split.column(column)
    if values is None or split.kinds[column] not in ("int", "class"):
        return False
    return bool((values.to_numpy() == -1).all())


def _check_column(split: Split, column: str, labels: Labels) -> None:
    import pyarrow.compute as pc

    values, kind = split.column(column), split.kinds[column]
    if values is None:  # a stream is checked batch by batch
        return
    if kind == "float" and labels.task == "multi_label_classification":
        found = f"in {split.name}, e.g. {values[0].as_py()} (row 0),"
        raise DataError(scalar_floats_message(found, column, labels.num_classes))
    if labels.are_listed:
        rows, numbers = pc.list_parent_indices(values), pc.list_flatten(values)
    elif labels.task == "single_label_classification" and kind in ("class", "int"):
        rows, numbers = range(len(values)), values
    else:
        return
    if labels.num_classes:
        check_class_ids(
            numbers.to_numpy(),
            labels.num_classes,
            lambda number: f"row {rows[number]} of {split.name}",
            column,
            in_lists=labels.are_listed,
        )


def check_class_ids(
    labels: NDArray[np.integer],
    num_labels: int,
    where: Callable[[int], str],
    column: str = "labels",
    *,
    in_lists: bool = False,
) -> None:
    """Refuse class numbers for which the model has no output.

    Args:
        labels: Class numbers of any shape, with the first axis over the places of ``where``.
        num_labels: Number of outputs of the model.
        where: Function that names a place by its index: "train batch 0 (row id 17)".
        column: Name of the labels in the dataset.
        in_lists: Whether a row of the dataset has a list of labels.

    Raises:
        DataError: A label is negative and not -100, or is at least ``num_labels``.

    >>> check_class_ids(np.array([0, 2]), 2, lambda row: f"row {row} of train")
    Traceback (most recent call last):
    manualloop.errors.DataError: Label 2 in row 1 of train is not a class of the model, which has \
num_labels=2 (0..1). Correct the label, or load the model with more classes: \
from_pretrained(name, num_labels=3).
    """
    kept = labels[labels != IGNORE_INDEX]
    if kept.size == 0 or (kept.min() >= 0 and kept.max() < num_labels):
        return
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_labels))
    first = tuple(np.argwhere(wrong)[0])
    label, place = int(labels[first]), where(int(first[0]))
    smallest, largest = int(kept.min()), int(kept.max())
    if label < 0:
        fix = f'Drop such rows: dataset.filter(lambda row: row["{column}"] >= 0)'
        if in_lists:
            fix = (
                f'Replace it: dataset.map(lambda row: {{"{column}": [label if label >= 0 else '
                f'{IGNORE_INDEX} for label in row["{column}"]]}})'
            )
        raise DataError(
            f"Label {label} in {place} is neither a class, which are numbered from 0, nor "
            f"{IGNORE_INDEX}, which the loss ignores. {fix}."
        )
    fix = (
        "Correct the label, or load the model with more classes: "
        f"from_pretrained(name, num_labels={largest + 1})."
    )
    if not in_lists and smallest > 0 and largest - smallest < num_labels:
        fix = (
            f"The smallest label is {smallest}, but classes are numbered from 0. Shift them: "
            f'dataset.map(lambda row: {{"{column}": row["{column}"] - {smallest}}}).'
        )
    raise DataError(
        f"Label {label} in {place} is not a class of the model, which has "
        f"num_labels={num_labels} (0..{num_labels - 1}). {fix}"
    )


def warn_of_classes_as_values(labels: NDArray[np.integer], found: str) -> None:
    """Warn before whole numbers that look like classes are used as the targets of a regression."""
    values = np.unique(labels)
    if values.size and values[0] >= 0 and values[-1] <= len(values):
        shown = ", ".join(map(str, values[:3])) + (", ..." if len(values) > 3 else "")
        logger.warning(
            f"The model has num_labels=1, which means regression (MSE loss), but {found} look like "
            f"classes: {shown}. For classes load the model with num_labels={int(values[-1]) + 1}; "
            'for values set model.config.problem_type = "regression".'
        )
