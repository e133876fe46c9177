"""Labels: which task they belong to, and whether a model can be trained on them.

Whole columns are judged when loaders are prepared (``survey``). Batches are checked by the same
rules before they are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from manualloop.data.splits import Split, fix_all, fix_of
from manualloop.errors import DataError
from manualloop.mistakes import as_map, renumber_call
from manualloop.models import num_labels
from manualloop.notices import warn
from manualloop.tasks.places import POSITIONS
from manualloop.tasks.task import IGNORE_INDEX, infer_task
from manualloop.types import Origin

BY_TOKEN = ("token_classification", "masked_lm", "causal_lm")
"""Tasks with a label for each token."""


class Labels(NamedTuple):
    """A description of the labels that all splits share.

    Attributes:
        column: Column that holds them; None for rows without labels.
        task: A key of ``TASKS``; None if it cannot be inferred from the first row.
        num_classes: Number of classes; None if neither the model nor the column tells.
        are_listed: Whether the label of a row is a list of class numbers.
        are_named: Whether the classes have names, so that -1 stands for no label.
        names: The names of the classes, by number; None if the data have none.
    """

    column: str | None
    task: str | None
    num_classes: int | None
    are_listed: bool = False
    are_named: bool = False
    names: tuple[str, ...] | None = None


def task_of(split: Split, column: str, model: nn.Module | None, *, by_token: bool) -> str | None:
    """Name the task that the labels of a split belong to; None if they do not tell.

    Args:
        split: The split.
        column: Its column of labels.
        model: The model; None if it is unknown.
        by_token: Whether each row has as many labels as tokens.
    """
    kind = split.kinds[column]
    model = nn.Module() if model is None else model
    if kind in ("class", "int", "float"):
        return infer_task(
            model, torch.zeros(1, dtype=torch.float if kind == "float" else torch.long)
        )
    if kind != "list":
        return None
    return infer_task(model, torch.zeros(1, 2, dtype=torch.long if by_token else torch.float))


def classes_of(split: Split, column: str, model: nn.Module | None) -> tuple[int | None, bool]:
    """Return the number of classes, and whether the column has names for them."""
    names = getattr(split.feature(column), "names", None)
    number = None if model is None else num_labels(model)
    return number or (len(names) if names else None), bool(names)


def origin_of(loader: Any) -> Origin:
    """Return where the labels of a loader come from; those of a user's loader are "labels"."""
    origin: Origin = getattr(getattr(loader, "dataset", None), "origin_of_labels", Origin())
    return origin if isinstance(origin, Origin) else Origin()


def hidden_message(forms: str) -> str:
    """Return the message about an evaluation on rows whose labels are hidden."""
    return (
        f"The labels are hidden: every one in the dataset is {forms}, as in the test splits of "
        "benchmarks, so there is nothing to compare predictions with. Evaluate a split with "
        "labels, or predict these rows: predict_loop(model, loader)."
    )


def check_class_ids(
    labels: NDArray[np.integer],
    num_labels: int,
    where: Callable[[int], str],
    origin: Origin = Origin(),  # noqa: B008
    *,
    in_lists: bool = False,
) -> None:
    """Refuse class numbers for which the model has no output.

    Args:
        labels: Class numbers of any shape, with the first axis over the places of ``where``.
        num_labels: Number of outputs of the model.
        where: Function that names a place by its index: "train batch 0 (row id 17)".
        origin: Where they are in the user's dataset.
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
    found = Found(int(labels[first]), where(int(first[0])), np.unique(kept).tolist())
    raise DataError(
        class_message(
            found,
            origin.column,
            num_labels,
            in_lists=in_lists,
            are_all=False,
            maker=origin.maker,
            fix=partial(fix_all, origin.keys),
            fix_here=partial(fix_of, origin.key),
        )
    )


def check_spans(batch: Mapping[str, Any], where: Callable[[int], str]) -> None:
    """Refuse negative positions of answers, which models of transformers take for the first token.

    Args:
        batch: A batch with a start and an end for each row.
        where: Function that names a row by its number in the batch.

    Raises:
        DataError: There is one.
    """
    for name in POSITIONS:
        positions = batch.get(name)
        if isinstance(positions, torch.Tensor) and bool((positions < 0).any()):
            row = int((positions.reshape(len(positions), -1) < 0).any(1).nonzero()[0, 0])
            raise DataError(positions_message(name, int(positions[row].min()), where(row)))


def positions_message(name: str, position: int, place: str) -> str:
    """Return the message about an answer at a negative position."""
    return (
        f"{name} is {position} in {place}. Positions are those of tokens, and the model takes a "
        "negative one for the first token. No answer is at the token [CLS]; to leave a row out of "
        f'the loss, put it beyond its tokens: dataset.map(lambda row: {{"{name}": '
        f'row["{name}"] if row["{name}"] >= 0 else len(row["input_ids"])}}).'
    )


class Found(NamedTuple):
    """A class number that the model has no output for.

    Attributes:
        label: The number.
        place: Where it is.
        values: The numbers that occur beside it, sorted: in the whole dataset, or in a batch.
    """

    label: int
    place: str
    values: Sequence[int]


def class_message(
    found: Found,
    column: str,
    num_classes: int | None,
    *,
    in_lists: bool,
    are_all: bool = True,
    are_named: bool = False,
    is_train: bool = True,
    maker: str | None = None,
    fix: Callable[[str], str],
    fix_here: Callable[[str], str],
) -> str:
    """Return the message about a label that is no class, with the fix that fits its neighbours.

    Args:
        found: The label.
        column: Its column.
        num_classes: Number of classes; None if it is unknown.
        in_lists: Whether a row has a list of labels.
        are_all: Whether the numbers beside it are all that the dataset has.
        are_named: Whether the classes have names.
        is_train: Whether the rows are there to be trained on.
        maker: As in ``Origin``.
        fix: Function that makes a line of a call on the dataset, for all splits with labels.
        fix_here: The same for the split that the label is in.
    """
    label, place, values = found
    if label >= 0:
        smallest, largest = values[0], values[-1]
        more = f"load the model with more classes: from_pretrained(name, num_labels={largest + 1})"
        if maker is not None:
            advice = f"{maker}= returns the labels: correct it, or {more}"
        elif not in_lists and _are_others(values, num_classes, are_all):
            start = f"The smallest label is {smallest}" if smallest else "Numbers are left out"
            advice = f"{start}, but classes are numbered from 0. "
            advice += (
                f"{'Shift' if smallest else 'Number'} them: {fix(renumber_call(column, values))}"
            )
        else:
            advice = f"Correct the label, or {more}"
        counted = f"num_labels={num_classes} (0..{(num_classes or 0) - 1})"
        return (
            f"Label {label} in {place} is not a class of the model, which has {counted}. {advice}."
        )
    head = (
        f"Label {label} in {place} is neither a class, which are numbered from 0, nor "
        f"{IGNORE_INDEX}, which the loss ignores."
    )
    if maker is not None:
        return f"{head} {maker}= returns the labels: correct it."
    if in_lists:
        kept = f'[label if label >= 0 else {IGNORE_INDEX} for label in row["{column}"]]'
        return f"{head} Replace it: {fix_here(as_map(column, kept))}."
    meaning = _meaning_of_minus(values, num_classes, are_all) if not are_named else "missing"
    numbers = values if are_all or 0 in values else (-1, 1)
    as_class = f"number the classes from 0: {fix(renumber_call(column, numbers))}"
    kept = f'filter(lambda row: row["{column}"] >= 0)'
    without = f"drop such rows: {fix_here(kept)}"
    if not is_train:
        kept = f'row["{column}"] if row["{column}"] >= 0 else {IGNORE_INDEX}'
        without = f"keep such rows without a label: {fix_here(as_map(column, kept))}"
    if meaning is not None:
        advice = as_class if meaning == "class" else without
        return f"{head} {advice[0].upper()}{advice[1:]}."
    return f"{head} If it is a class, {as_class}. If it means that there is no label, {without}."


def _are_others(values: Sequence[int], num_classes: int | None, are_all: bool) -> bool:
    """Tell whether classes have numbers of their own, as many as the model has outputs for."""
    if num_classes is None or len(values) > min(num_classes, 20):
        return False
    return are_all or (values[0] > 0 and values[-1] - values[0] < num_classes)


def _meaning_of_minus(values: Sequence[int], num_classes: int | None, are_all: bool) -> str | None:
    """Tell whether a negative number is a "class", or stands for "missing"; None: unknown."""
    if values[0] < -1 or (are_all and 0 not in values):
        return "class"
    if not are_all:
        return "missing" if 0 in values else None
    if num_classes is None:
        return None
    return "class" if len(values) == num_classes and values[-1] == num_classes - 2 else "missing"


def warn_of_classes_as_values(labels: NDArray[np.integer], found: str) -> None:
    """Warn before whole numbers that look like classes are used as the targets of a regression."""
    values = np.unique(labels)
    if values.size and values[0] >= 0 and values[-1] <= len(values):
        shown = ", ".join(map(str, values[:3])) + (", ..." if len(values) > 3 else "")
        warn(
            f"The model has num_labels=1, which means regression (MSE loss), but {found} look like "
            f"classes: {shown}. For classes load the model with num_labels={int(values[-1]) + 1}; "
            'for values set model.config.problem_type = "regression".'
        )
