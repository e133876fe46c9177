"""Judging the labels of a split: their kind, missing ones, and numbers that are no class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from manualloop.arguments import Checks
from manualloop.data.labels import Found, Labels, class_message
from manualloop.data.splits import Split, fix_all
from manualloop.data.values import Values, distinct_in
from manualloop.errors import DataError
from manualloop.mistakes import (
    as_map,
    filter_missing,
    integers_call,
    scalar_floats_message,
    targets_message,
)
from manualloop.tasks.task import IGNORE_INDEX, TASKS


class Labelled(NamedTuple):
    """The splits whose labels are judged together.

    Attributes:
        splits: The splits, whose labels are of one kind.
        column: Their column of labels.
        labels: What is known of the labels.
        model: The model; None if it is unknown.
    """

    splits: list[Split]
    column: str
    labels: Labels
    model: nn.Module | None

    def fix(self, call: str) -> str:
        """Return the line that changes all of them."""
        return fix_all([split.key for split in self.splits], call)

    def distinct(self) -> list[Any]:
        """Return the numbers that occur in all of them, sorted."""
        found = [distinct_in(s, self.column) for s in self.splits if not s.is_stream]
        kept: list[Any] = np.unique(np.concatenate(found)).tolist()
        return [number for number in kept if number != IGNORE_INDEX]


def refuse_no_labels(split: Split, column: str) -> None:
    """Refuse a column that holds neither numbers nor lists nor arrays of them.

    Raises:
        DataError: It holds dicts, dates or the like.
    """
    if split.kinds[column] == "other":
        raise DataError(
            f"Column {column!r} of {split.name} holds no labels, e.g. "
            f"{split.first[column]!r:.60} (row 0). Name another one in label_column=, or make "
            "numbers of it with preprocess=."
        )


def check_kind(split: Split, reference: Split, column: str, labels: Labels, check: Checks) -> bool:
    """Tell whether a split's labels are of the kind of another's; if not, keep the error."""
    found, wanted = _kind(split, column), _kind(reference, column)
    if found == wanted or ({found, wanted} == {"int", "float"} and labels.task == "regression"):
        return True
    check(_refuse_kind, split, reference, column)
    return False


def _kind(split: Split, column: str) -> str:
    kind = split.kinds[column]
    return "int" if kind == "class" else kind


def _refuse_kind(split: Split, reference: Split, column: str) -> None:
    found, wanted = _kind(split, column), _kind(reference, column)
    words = {"int": "whole numbers", "float": "floats", "list": "lists"}
    head = (
        f"The labels {column!r} of {split.name} are {words.get(found, found)}, e.g. "
        f"{split.first[column]!r:.60} (row 0), those of {reference.name} are "
        f"{words.get(wanted, wanted)}. "
    )
    if split.maker is not None:
        raise DataError(f"{head}{split.maker}= returns them: let it return one kind.")
    if (found, wanted) == ("float", "int") and _are_whole(split, column):
        raise DataError(f"{head}Make them integers: {split.fix(integers_call(column))}.")
    raise DataError(f"{head}Give all splits labels of one kind, or prepare them one by one.")


def _are_whole(split: Split, column: str) -> bool:
    if split.is_stream:
        return float(split.first[column]).is_integer()
    numbers = distinct_in(split, column)
    return bool((numbers == np.round(numbers)).all())


def check_missing(split: Split, values: Values, column: str) -> None:
    """Refuse a column of which some rows have no value.

    Raises:
        DataError: A row has None, NaN or an empty string, or a list that holds one of them.
    """
    is_missing = values.is_missing | values.is_blank
    if not is_missing.any():
        return
    row = int(np.argmax(is_missing))
    value = split.rows[row][column]
    is_inside = isinstance(value, list)
    found = f"None or NaN in {column}" if is_inside else f"{column}={value!r}"
    raise DataError(
        f"Row {row} of {split.name} has {found}. Rows without a value: {int(is_missing.sum())} of "
        f"{len(is_missing)}. "
        f"{advice_on_missing(split, column, is_blank=bool(values.is_blank.any()))}"
    )


def advice_on_missing(split: Split, column: str, *, is_blank: bool) -> str:
    """Return the sentence on what to do with rows without a label.

    Args:
        split: The split.
        column: Its column of labels.
        is_blank: Whether an empty string means that a label is missing.
    """
    if split.maker is not None:
        return f"{split.maker}= returns the labels: let it return one for each of its rows."
    kind = split.kinds[column]
    call = filter_missing(
        column, is_float=kind == "float", in_lists=kind in ("list", "texts"), of=""
    )
    if is_blank:
        inside = f' and all(row["{column}"])' if kind == "texts" else ""
        call = f'filter(lambda row: row["{column}"]{inside})'
    line = split.fix(call)
    if split.is_train:
        return f"Filter them out: {line}."
    without = split.fix(f'remove_columns("{column}")')
    return f"To predict all rows: {without}. To score those with a label: {line}."


def check_numbers(split: Split, values: Values, everything: Labelled) -> None:
    """Refuse labels that are no class of the model, or no target of its loss.

    Raises:
        DataError: The model has no output for a label.
    """
    labels, column, kind = everything.labels, everything.column, split.kinds[everything.column]
    if labels.task == "multi_label_classification" and kind == "float":
        shown = values.least[values.has_number]
        found = (
            f"in {split.name}, e.g. {float(shown[0])} (row {int(np.argmax(values.has_number))}),"
        )
        are_whole = all(number == round(number) for number in everything.distinct())
        line = everything.fix(integers_call(column))
        if split.maker is not None:
            line = f"let {split.maker}= return int(label)"
        raise DataError(
            scalar_floats_message(found, column, labels.num_classes, are_whole=are_whole, line=line)
        )
    has_targets = labels.task == "multi_label_classification" and not labels.are_listed
    if (has_targets and kind == "list") or labels.task == "regression":
        _check_width(split, values, everything)
    if has_targets and kind == "list":
        _check_targets(split, values, everything)
    has_numbers = labels.task is not None and not TASKS[labels.task].float_labels
    if kind == "list" and (has_numbers or labels.are_listed):
        _check_whole(split, values, column)
    has_classes = labels.task in ("single_label_classification", "token_classification")
    if labels.are_listed or (has_classes and kind in ("class", "int", "list")):
        _check_classes(split, values, everything)


def _check_whole(split: Split, values: Values, column: str) -> None:
    """Refuse class numbers that are no whole ones, which batches would round down."""
    if values.least.dtype.kind != "f":
        return
    found = distinct_in(split, column)
    if not len(wrong := found[found != np.round(found)]):
        return
    number = float(wrong[0])
    row = next(
        n for n, row in enumerate(split.select([column]).rows) if number in flat(row[column])
    )
    raise DataError(
        f"Row {row} of {split.name} has the label {number:g} in {column}, and labels of this task "
        "are whole numbers of classes. Correct it; for values to predict pass "
        'task="regression".'
    )


def flat(cell: Any) -> list[Any]:
    """Return the entries of nested lists."""
    return [one for entry in cell for one in flat(entry)] if isinstance(cell, list) else [cell]


def _check_classes(split: Split, values: Values, everything: Labelled) -> None:
    labels, column = everything.labels, everything.column
    is_wrong = values.has_number & (values.least < 0)
    if labels.num_classes:
        is_wrong |= values.has_number & (values.most >= labels.num_classes)
    if not is_wrong.any():
        return
    row = int(np.argmax(is_wrong))
    label = int(values.least[row] if values.least[row] < 0 else values.most[row])
    found = Found(label, f"row {row} of {split.name}", list(map(int, everything.distinct())))
    raise DataError(
        class_message(
            found,
            column,
            labels.num_classes,
            in_lists=split.kinds[column] == "list",
            are_named=labels.are_named,
            is_train=split.is_train,
            maker=split.maker,
            fix=everything.fix,
            fix_here=split.fix,
        )
    )


def _check_width(split: Split, values: Values, everything: Labelled) -> None:
    """Refuse rows with more or fewer numbers than the model has outputs."""
    classes = everything.labels.num_classes
    is_other = (values.lengths != classes) & ~values.is_missing
    if everything.model is None or not classes or not is_other.any():
        return
    row = int(np.argmax(is_other))
    width = int(values.lengths[row])
    raise DataError(
        f"Row {row} of {split.name} has {width} labels, but the model has num_labels={classes}, "
        "and the loss wants one number for each. Load the model with room for them: "
        f"from_pretrained(name, num_labels={width})."
    )


def _check_targets(split: Split, values: Values, everything: Labelled) -> None:
    """Refuse multi-label targets beyond 0 and 1."""
    is_wrong = values.has_number & ((values.least < 0) | (values.most > 1))
    if not is_wrong.any():
        return
    row = int(np.argmax(is_wrong))
    number = values.least[row] if values.least[row] < 0 else values.most[row]
    raise DataError(
        f"{targets_message(number, f'row {row} of {split.name}')}. "
        f"{_advice_on_targets(everything.distinct(), everything)}"
    )


def _advice_on_targets(found: Sequence[float], everything: Labelled) -> str:
    column = everything.column
    of_row = f'for x in row["{column}"]]'
    least, most, are_whole = found[0], found[-1], all(x == round(x) for x in found)
    as_values = 'For values to predict set model.config.problem_type = "regression".'
    if everything.model is None:
        as_values = 'For values to predict pass task="regression".'
    if (maker := everything.splits[0].maker) is not None:
        return f"{maker}= returns the labels: correct it. {as_values}"
    if are_whole and list(found) == [-1, 0, 1]:
        fix = everything.fix(as_map(column, f"[{IGNORE_INDEX} if x == -1 else x {of_row}"))
        return f"If -1 means unknown, leave it out: {fix}. {as_values}"
    if are_whole and len(found) == 2:
        fix = everything.fix(
            as_map(column, f"[x if x == {IGNORE_INDEX} else int(x == {most:g}) {of_row}")
        )
        return f"Code them as 0 and 1: {fix}. {as_values}"
    if least < 0:
        return as_values
    scale = 100 if 10 < most <= 100 else most
    fix = everything.fix(as_map(column, f"[x if x == {IGNORE_INDEX} else x / {scale:g} {of_row}"))
    return f"Scale them: {fix}. {as_values}"
