"""The labels: what task they belong to, and whether a model can learn them.

Whole columns are looked at when they are prepared; batches, by the same rules, before they train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from manualloop.errors import DataError
from manualloop.models import num_labels, problem_type
from manualloop.notices import logger
from manualloop.tasks import IGNORE_INDEX, infer_task, misaligned_message

BY_TOKEN = ("token_classification", "masked_lm", "causal_lm")
"""Tasks with a label for each token."""


class Labels(NamedTuple):
    """What is done to the labels of every split alike.

    Attributes:
        column: None for rows without labels.
        task: A key of ``TASKS``; None where the first row does not tell.
        is_chosen: Whether the user named the task, here or in the model's config.
        num_classes: Outputs of the model, if there is one.
        num_listed: Classes, where a row's label is the list of its class numbers.
    """

    column: str | None
    task: str | None
    is_chosen: bool
    num_classes: int | None
    num_listed: int | None


def describe_labels(
    dataset: Any, column: str | None, task: str | None, model: nn.Module | None
) -> Labels:
    """Say what the labels are, by those of one split, normally the training split's.

    Raises:
        DataError: They are lists of class numbers, and the number of classes is not known.
    """
    known = num_labels(model) if model is not None else None
    is_chosen = task is not None or (model is not None and problem_type(model) is not None)
    labels = Labels(column, task or _infer_task(dataset, column, model), is_chosen, known, None)
    if labels.task != "multi_label_classification" or column is None:
        return labels
    return labels._replace(num_listed=_num_listed(dataset, column, known))


def prepare_labels(
    name: str, dataset: Any, kinds: Mapping[str, str], labels: Labels, *, may_be_text: bool
) -> tuple[Any, str]:
    """Check the labels of one split and call them ``labels``; also say what is to be said.

    Args:
        name: The split's.
        dataset: Of rows with or without labels.
        kinds: What ``column_kinds`` says of it.
        labels: What ``describe_labels`` returned.
        may_be_text: Whether a ``collate_fn`` of the user's may make numbers of strings.

    Raises:
        DataError: A label is missing, text, or not one the model has an output for.
    """
    column = labels.column
    if column is None or column not in kinds:
        return dataset, ""
    if _are_hidden(dataset, column, kinds[column]):
        return dataset.remove_columns(column), f"; every {column} is -1 (hidden), so it has none"
    if kinds[column] == "text" and not may_be_text:
        example = next(iter(dataset))[column]
        raise DataError(
            f"{column!r} of {name} holds strings, e.g. {example!r} (row 0). Turn them into class "
            f'numbers: dataset.class_encode_column("{column}").'
        )
    if hasattr(dataset, "__len__"):  # a stream is checked batch by batch
        _check_column(name, dataset, kinds[column], labels)
    if column != "labels":
        dataset = dataset.remove_columns("labels") if "labels" in kinds else dataset
        dataset = dataset.rename_column(column, "labels")
    if labels.num_listed is not None:
        dataset = dataset.map(partial(_multi_hot, num_classes=labels.num_listed))
    elif labels.task in BY_TOKEN and kinds.get("input_ids") == kinds[column] == "list":
        _check_alignment(name, dataset)
    return dataset, ""


def check_class_ids(
    labels: NDArray[np.integer],
    num_labels: int,
    where: Callable[[int], str],
    column: str = "labels",
) -> None:
    """Refuse class numbers that the model has no output for.

    Args:
        labels: Of any shape, the first axis being the rows.
        num_labels: Outputs of the model.
        where: Names a row, given its number in ``labels``: "train batch 0 (row id 17)".
        column: What the dataset calls them.

    Raises:
        DataError: A label is negative and not -100, or is ``num_labels`` or more.

    >>> check_class_ids(np.array([0, 2]), 2, lambda row: f"row {row} of train")
    Traceback (most recent call last):
    manualloop.errors.DataError: Label 2 in row 1 of train, but the model has num_labels=2 (0..1). \
Mend the label, or load the model with room for it: from_pretrained(name, num_labels=3).
    """
    kept = labels[labels != IGNORE_INDEX]
    if kept.size == 0 or (kept.min() >= 0 and kept.max() < num_labels):
        return
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_labels))
    first = tuple(np.argwhere(wrong)[0])
    label, place = int(labels[first]), where(int(first[0]))
    if label < 0:
        mended = f'dataset.filter(lambda row: row["{column}"] >= 0)'
        if labels.ndim > 1:
            mended = (
                f'dataset.map(lambda row: {{"{column}": [label if label >= 0 else {IGNORE_INDEX} '
                f'for label in row["{column}"]]}})'
            )
        raise DataError(
            f"Label {label} in {place}: classes are counted from 0, and what the loss leaves out "
            f"is {IGNORE_INDEX}. Take it out: {mended}."
        )
    message = f"Label {label} in {place}, but the model has num_labels={num_labels}"
    smallest, largest = int(kept.min()), int(kept.max())
    if labels.ndim == 1 and smallest > 0 and largest - smallest < num_labels:
        raise DataError(
            f"{message} (0..{num_labels - 1}). The smallest label is {smallest}, and labels must "
            f'start at 0: dataset.map(lambda row: {{"{column}": row["{column}"] - {smallest}}}).'
        )
    raise DataError(
        f"{message} (0..{num_labels - 1}). Mend the label, or load the model with room for it: "
        f"from_pretrained(name, num_labels={largest + 1})."
    )


def check_complete(name: str, dataset: Any, column: str, *, is_float: bool = False) -> None:
    """Refuse a column of a split in which values are missing: None or, among floats, NaN.

    Raises:
        DataError: Some are; the message names the first of the rows.
    """
    import pyarrow.compute as pc

    table = _arrow_column(dataset, column)
    is_missing = pc.is_null(table, nan_is_null=is_float)
    if num_missing := pc.sum(is_missing).as_py():
        row = pc.index(is_missing, True).as_py()
        raise DataError(
            f"Row {row} of {name} has {column}={table[row].as_py()}; so have {num_missing} of "
            f"{len(dataset)} rows. Filter them out: {filter_missing(column, is_float)}."
        )


def filter_missing(column: str, is_float: bool) -> str:
    """Return the code that filters out rows without a label: None or, among floats, NaN."""
    equals_itself = f' and row["{column}"] == row["{column}"]' if is_float else ""
    return f'dataset.filter(lambda row: row["{column}"] is not None{equals_itself})'


def scalar_floats_message(found: str, column: str, num_labels: int | None) -> str:
    """Say that one float a row is neither a class nor a row of a multi-label problem."""
    wanted = "one for each class" if num_labels is None else f"{num_labels} of them a row"
    return (
        f"Float labels {found} are read as multi-label, which wants {wanted}. For a regression "
        "load the model with num_labels=1; for one class a row make them integers: "
        f'dataset.cast_column("{column}", datasets.Value("int64")).'
    )


def warn_of_classes_as_values(labels: NDArray[np.integer], found: str) -> None:
    """Warn that whole numbers are about to be learned as values, if they look like classes."""
    values = np.unique(labels)
    if values.size and values[0] >= 0 and values[-1] <= len(values):
        shown = ", ".join(map(str, values[:3])) + (", ..." if len(values) > 3 else "")
        logger.warning(
            f"num_labels=1 means regression (MSE), and {found} look like classes: {shown}. If "
            f"they are, load the model with num_labels={int(values[-1]) + 1}; if they are values, "
            'set model.config.problem_type = "regression".'
        )


def _infer_task(dataset: Any, column: str | None, model: nn.Module | None) -> str | None:
    row: dict[str, Any] = {} if column is None else next(iter(dataset), {})
    label = None if column is None else row.get(column)
    if label is None or isinstance(label, str):
        return None  # said by prepare_labels, with the row
    model = nn.Module() if model is None else model
    if not hasattr(label, "__len__"):
        return infer_task(model, torch.tensor([label]))
    tokens = row.get("input_ids")
    by_token = tokens is not None and len(tokens) == len(label)
    if by_token and hasattr(dataset, "__len__"):  # or is it so by chance, in the first row?
        by_token = _first_misaligned(dataset, column) is None
    return infer_task(model, torch.zeros(1, 2, dtype=torch.long if by_token else torch.float))


def _num_listed(dataset: Any, column: str, num_classes: int | None) -> int | None:
    """Return the number of classes if labels are lists of class numbers, None if of 0 and 1."""
    if dataset.features is None:
        return None
    feature = dataset.features[column]
    inner: Any = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if hasattr(inner, "names"):
        return len(inner.names)
    if not hasattr(dataset, "__len__") or "int" not in str(getattr(inner, "dtype", "")):
        return None
    import pyarrow.compute as pc

    lists = _arrow_column(dataset, column)
    one_length = pc.count_distinct(pc.list_value_length(lists)).as_py() == 1
    if one_length and (pc.max(pc.list_flatten(lists)).as_py() or 0) < 2:
        return None
    if num_classes is None:
        raise DataError(
            f"{column!r} holds lists of class numbers, and how many classes there are is not "
            "known. Pass model=model, or rows of 0 and 1, one for each class."
        )
    return num_classes


def _multi_hot(row: dict[str, Any], *, num_classes: int) -> dict[str, list[float]]:
    return {"labels": [float(number in row["labels"]) for number in range(num_classes)]}


def _arrow_column(dataset: Any, column: str | None) -> Any:
    return dataset.select_columns([column]).with_format("arrow")[:].column(column)


def _are_hidden(dataset: Any, column: str, kind: str) -> bool:
    """Tell whether all labels are -1: GLUE's convention for test splits."""
    if not hasattr(dataset, "__len__") or kind not in ("int", "class"):
        return False
    import pyarrow.compute as pc

    extremes = pc.min_max(_arrow_column(dataset, column)).as_py()
    return bool(extremes["min"] == extremes["max"] == -1)


def _check_column(name: str, dataset: Any, kind: str, labels: Labels) -> None:
    import pyarrow.compute as pc

    column, num_classes = str(labels.column), labels.num_classes
    table = _arrow_column(dataset, column)
    check_complete(name, dataset, column, is_float=kind == "float")
    if labels.num_listed is not None:
        rows = pc.list_parent_indices(table).to_numpy()
        numbers = pc.list_flatten(table).to_numpy()
        check_class_ids(numbers, labels.num_listed, lambda i: f"row {rows[i]} of {name}", column)
    elif kind == "float" and labels.task == "multi_label_classification":
        found = f"in {name}, e.g. {table[0].as_py()} (row 0),"
        raise DataError(scalar_floats_message(found, column, num_classes))
    elif kind in ("int", "class"):
        numbers = table.to_numpy()
        if labels.task == "single_label_classification" and num_classes:
            check_class_ids(numbers, num_classes, lambda row: f"row {row} of {name}", column)
        elif labels.task == "regression" and not labels.is_chosen:
            warn_of_classes_as_values(numbers, f"{column!r} of {name}")


def _first_misaligned(dataset: Any, column: str | None) -> int | None:
    """Return the first row that has another number of labels than of tokens."""
    import pyarrow.compute as pc

    lengths = [pc.list_value_length(_arrow_column(dataset, name)) for name in (column, "input_ids")]
    row = pc.index(pc.not_equal(*lengths), True).as_py()
    return None if row < 0 else int(row)


def _check_alignment(name: str, dataset: Any) -> None:
    """Refuse token labels that are not one a token: padding both would hide it."""
    if not hasattr(dataset, "__len__") or (row := _first_misaligned(dataset, "labels")) is None:
        return
    num_label_ids, num_tokens = (len(dataset[row][column]) for column in ("labels", "input_ids"))
    raise DataError(misaligned_message(num_label_ids, num_tokens, f"row {row} of {name}"))
