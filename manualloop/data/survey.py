"""The survey: all splits are described once and judged together, before a text is tokenized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from manualloop.arguments import Checks
from manualloop.data.columns import LABELS, Columns, find_columns, find_label, is_label_like
from manualloop.data.judge import (
    Labelled,
    advice_on_missing,
    check_kind,
    check_missing,
    check_numbers,
    refuse_no_labels,
)
from manualloop.data.labels import (
    Labels,
    classes_of,
    positions_message,
    task_of,
    warn_of_classes_as_values,
)
from manualloop.data.mapping import QUOTES, is_hidden
from manualloop.data.splits import TEXT_KINDS, Split, fix_all, reference_of
from manualloop.data.values import Values, distinct_in, lengths_of, missing_in, values_of
from manualloop.errors import DataError
from manualloop.mistakes import (
    as_map,
    class_lists_call,
    fill_argument,
    filter_missing,
    misaligned_message,
    text_message,
)
from manualloop.models import problem_type
from manualloop.tasks.names import Naming
from manualloop.tasks.places import POSITIONS
from manualloop.tasks.task import infer_task

_NUM_PEEKED = 1000


class Choices(NamedTuple):
    """What the caller of ``prepare_dataloaders`` chose, as far as the columns are concerned.

    Attributes:
        tokenizer: As in ``prepare_dataloaders``.
        model: As in ``prepare_dataloaders``.
        task: As in ``prepare_dataloaders``.
        text_columns: As in ``prepare_dataloaders``.
        label_column: One column; None infers it.
        tokenizes: Whether texts are tokenized.
        may_be_text: Whether labels of text are allowed: a ``collate_fn`` may make numbers of them.
        is_padded: Whether rows are padded and stacked as they are.
        keep: Columns that skip the model.
        naming: The classes, whose names are those of the numbers in the column, if they have some.
    """

    tokenizer: Any
    model: nn.Module | None
    task: str | None
    text_columns: str | Sequence[str] | None
    label_column: str | None
    tokenizes: bool
    may_be_text: bool
    is_padded: bool
    keep: tuple[str, ...] = ()
    naming: Naming = Naming()


class Survey(NamedTuple):
    """What was found out about the splits.

    Attributes:
        columns: The roles of the columns.
        labels: The labels of all splits.
        hidden: The forms in which a split hides its labels, by key; for splits that do.
    """

    columns: Columns
    labels: Labels
    hidden: dict[Any, str]


def survey(splits: Mapping[Any, Split], choices: Choices, check: Checks) -> Survey:
    """Describe and judge the columns of all splits.

    Args:
        splits: The splits.
        choices: The user's choices.
        check: Keeps the errors; what is returned is of use only if there are none.
    """
    first = reference_of(splits)
    kinds, tokenizer = first.kinds, choices.tokenizer
    columns: Columns | None = check(
        find_columns,
        first.name,
        kinds,
        choices.text_columns,
        choices.label_column,
        needs_text=choices.tokenizes,
        examples=first.first,
    )
    if columns is None:
        named = choices.label_column if choices.label_column in kinds else None
        columns = Columns((), named or find_label(kinds))
    elif choices.is_padded:
        check(_refuse_leftovers, first, columns, tokenizer, choices.keep)
    if choices.is_padded and (unnamed := _unnamed_label(first, columns)) is not None:
        check(_refuse_unnamed_label, first, unnamed)
        if (values := values_of(first, unnamed)) is not None:
            check(check_missing, first, values, unnamed)
    for split in splits.values():
        for name in columns.texts:
            check(_check_text, split, name, first, tokenizer)
    if columns.label is None:
        return Survey(columns, Labels(None, _task_without_labels(choices), None), {})
    labels, hidden = _survey_labels(splits, columns.label, first, choices, check)
    return Survey(columns, labels._replace(names=choices.naming.names), hidden)


def _task_without_labels(choices: Choices) -> str | None:
    return choices.task or (None if choices.model is None else infer_task(choices.model))


def _refuse_leftovers(split: Split, columns: Columns, tokenizer: Any, keep: Sequence[str]) -> None:
    """Refuse text without a tokenizer."""
    kinds = {name: kind for name, kind in split.kinds.items() if name != columns.label}
    if tokenizer is None:
        left = {name: kind for name, kind in kinds.items() if name not in keep}
        is_ready = {"list", "media", "other"} & set(left.values())
        found = [name for name, kind in left.items() if kind == "text" and not is_ready]
        if texts := columns.texts or found:
            raise DataError(text_message(texts[0], split.first[texts[0]], split=split.name))


def _unnamed_label(split: Split, columns: Columns) -> str | None:
    """Return the column that may hold the labels of a training split; None if they are known."""
    if columns.label is not None or not split.is_train:
        return None
    return next((n for n in split.kinds if is_label_like(n) and n not in columns.texts), None)


def _refuse_unnamed_label(split: Split, column: str) -> None:
    raise DataError(
        f"No label column in {split.name}. Its columns: {', '.join(split.kinds)}. Did you mean "
        f'{column!r}? Use label_column="{column}".'
    )


def _check_text(split: Split, column: str, first: Split, tokenizer: Any) -> None:
    kinds, wanted = split.kinds, first.kinds[column]
    if column not in kinds:
        raise DataError(
            f"{split.name} has no column {column!r}. Its columns: {', '.join(kinds)}. Give all "
            "splits the same columns, or prepare them one by one."
        )
    is_missing = missing_in(split, column)
    if is_missing is not None and is_missing.any():
        row, number = int(np.argmax(is_missing)), int(is_missing.sum())
        fill = fill_argument([column], _code_for_blank(tokenizer))
        found, advice = f"{column}=None", f"Keep them: {fill}."
        if kinds[column] == "texts":
            words = f'[word or "" for word in row["{column}"] or []]'
            found = f"None in {column}"
            advice = f"Keep them: {split.fix(as_map(column, words))}."
        elif split.is_train:
            line = split.fix(filter_missing(column, of=""))
            advice = f"Filter them out: {line}, or keep them: {fill}."
        raise DataError(
            f"Row {row} of {split.name} has {found}. Rows without a value: {number} of "
            f"{len(is_missing)}. {advice}"
        )
    if kinds[column] != wanted:
        raise DataError(
            f"Column {column!r} of {split.name} holds values of kind {kinds[column]!r}, that of "
            f"{first.name} of kind {wanted!r}. Give all splits the same columns, or prepare them "
            "one by one."
        )


def _code_for_blank(tokenizer: Any) -> str:
    """Return the code of a text that stands for none, of which the tokenizer makes a token."""
    if hasattr(tokenizer, "pad_token") and not tokenizer("")["input_ids"]:
        names = ("eos_token", "unk_token", "pad_token")
        return "tokenizer." + next(n for n in names if getattr(tokenizer, n, None))
    return QUOTES


def _survey_labels(
    splits: Mapping[Any, Split], column: str, first: Split, choices: Choices, check: Checks
) -> tuple[Labels, dict[Any, str]]:
    found: dict[Any, Values | None] = {}
    for key, split in splits.items():
        if column in split.kinds:
            found[key] = values_of(split, column)
        else:
            check(_refuse_other_name, split, column, first)
    hidden = _hidden(splits, column, found, check)
    visible = {key: splits[key] for key in found if key not in hidden}
    if not visible:
        return Labels(None, _task_without_labels(choices), None), hidden
    reference = reference_of(visible)
    values = found[next(key for key, split in visible.items() if split is reference)]
    labels: Labels | None = check(_describe, reference, column, values, choices)
    if labels is None:
        labels = Labels(column, choices.task, None)
    if any(split.kinds[column] in TEXT_KINDS for split in visible.values()):
        if not choices.may_be_text:
            for key, split in visible.items():
                if (values := found[key]) is not None:
                    check(check_missing, split, values, column)
            if not choices.naming.is_numbered:  # else a string is no class, which was reported
                check(_refuse_texts, list(visible.values()), [found[k] for k in visible], column)
        return labels, hidden
    alike = {k: s for k, s in visible.items() if check_kind(s, reference, column, labels, check)}
    if choices.is_padded:
        check(refuse_no_labels, reference, column)
    everything = Labelled(list(alike.values()), column, labels, choices.model)
    for key, split in alike.items():  # first, so that the lines run in the order of the message
        if (values := found[key]) is not None:
            check(check_missing, split, values, column)
    for key, split in alike.items():
        if (values := found[key]) is not None and split.name not in choices.naming.refused:
            check(check_numbers, split, values, everything)
    return labels, hidden


def _refuse_other_name(split: Split, column: str, first: Split) -> None:
    """Refuse a split whose labels have another name; one without labels is left as it is."""
    names = [name for name in split.kinds if name.lower() in LABELS and name not in first.kinds]
    if names:
        call = f'rename_column("{names[0]}", "{column}")'
        raise DataError(
            f"{split.name} has no column {column!r}, which holds the labels of {first.name}, but "
            f"it has {names[0]!r}. If that holds the labels, rename it: "
            f"{split.fix(call)}. If not, remove it."
        )


def _hidden(
    splits: Mapping[Any, Split], column: str, found: Mapping[Any, Values | None], check: Checks
) -> dict[Any, str]:
    """Return the forms in which splits hide their labels, by key."""
    hidden = {}
    for key, values in found.items():
        split = splits[key]
        forms = values.hidden_as() if values else check(_peek, split, column) or ()
        if "-1" in forms and split.kinds[column] == "float" and _has_negative(found, key):
            continue  # -1 is a value like any other
        if forms:
            hidden[key] = " or ".join(forms)
    return hidden


def _has_negative(found: Mapping[Any, Values | None], own: Any) -> bool:
    others = [values for key, values in found.items() if key != own and values is not None]
    return any(bool((v.has_number & (v.least < 0)).any()) and not v.hidden_as() for v in others)


def _peek(split: Split, column: str) -> tuple[str, ...]:
    """Return the forms in which a stream hides its labels, as far as its first rows tell.

    Raises:
        DataError: The first label is missing, and a later one is not.
    """
    if not is_hidden(split.first[column]):
        return ()
    labels = [row[column] for row in islice(iter(split.rows), _NUM_PEEKED)]
    shown = [number for number, label in enumerate(labels) if not is_hidden(label)]
    if not shown:
        return tuple(dict.fromkeys(map(_form_of, labels)))
    is_text = any(isinstance(label, str) for label in labels)
    if _form_of(labels[0]) != "-1":
        raise DataError(
            f"Row 0 of {split.name} has {column}={labels[0]!r}, and row {shown[0]} has "
            f"{labels[shown[0]]!r}. {advice_on_missing(split, column, is_blank=is_text)}"
        )
    return ()


def _form_of(label: Any) -> str:
    while isinstance(label, list | tuple):
        label = label[0]
    return "None" if label is None else '""' if label == "" else "-1" if label == -1 else "NaN"


def _describe(split: Split, column: str, values: Values | None, choices: Choices) -> Labels:
    """Describe the labels by those of one split, normally the training split.

    Raises:
        DataError: The labels are lists of class numbers, and the number of classes is unknown.
    """
    model, kind = choices.model, split.kinds[column]
    num_classes, are_named = classes_of(split, column, model)
    if choices.naming.is_numbered:  # also of a stream that does not know its columns
        num_classes, are_named = num_classes or len(choices.naming.names or ()), True
    is_chosen = choices.task is not None or (model is not None and problem_type(model) is not None)
    by_token = "input_ids" in split.first and first_misaligned(split, column) is None
    task = choices.task or task_of(split, column, model, by_token=by_token)
    if task == "regression" and not is_chosen and kind in ("int", "class") and values is not None:
        found = f"{column!r} of {split.name}"
        warn_of_classes_as_values(values.least[values.has_number], found)
    if task != "multi_label_classification" or kind != "list":
        return Labels(column, task, num_classes, are_named=are_named)
    if are_named:
        return Labels(column, task, num_classes, True, are_named)
    is_whole = "int" in str(getattr(split.feature(column), "dtype", ""))
    are_listed = is_whole and values is not None and _hold_class_numbers(values, num_classes)
    if are_listed and num_classes is None:
        raise DataError(
            f"Column {column!r} of {split.name} holds lists of class numbers, but the number of "
            "classes is unknown. Pass model=model, or make each row a list of 0 and 1 with one "
            "entry per class."
        )
    if not (are_listed or is_chosen or model is not None or _are_targets(values)):
        task = "regression"  # several values a row; nothing but the labels tells
    return Labels(column, task, num_classes, are_listed)


def _hold_class_numbers(values: Values, num_classes: int | None) -> bool:
    """Tell lists of class numbers from rows with one number for each class."""
    lengths = values.lengths[~values.is_missing]
    if len(lengths) and (lengths != lengths[0]).any():
        return True
    is_row = len(lengths) > 0 and lengths[0] == num_classes
    return bool(values.most[values.has_number].max(initial=0) > 1 and not is_row)


def _are_targets(values: Values | None) -> bool:
    """Tell whether all numbers are 0 to 1; a stream is assumed to hold such."""
    if values is None:
        return True
    kept = values.has_number
    return bool((values.least[kept] >= 0).all() and (values.most[kept] <= 1).all())


def first_misaligned(split: Split, column: str) -> int | None:
    """Return the first row whose number of values differs from its number of tokens.

    None means that no row differs; only the first row of a stream is checked.
    """
    in_lists = split.kinds[column] == "list"
    label = split.first[column]
    if label is not None and (len(label) if in_lists else 1) != len(split.first["input_ids"]):
        return 0
    if not in_lists:
        return None
    values, tokens = lengths_of(split, column), lengths_of(split, "input_ids")
    if values is None or tokens is None or not (differ := values != tokens).any():
        return None
    return int(np.argmax(differ))


def _refuse_texts(splits: Sequence[Split], found: Sequence[Values | None], column: str) -> None:
    """Refuse labels that are strings; the message numbers the strings of all splits alike."""
    texts = [split for split in splits if split.kinds[column] in TEXT_KINDS]
    split, keys = texts[0], [split.key for split in splits]
    example = split.first[column]
    head = (
        f"{column!r} of {', '.join(s.name for s in texts)} holds strings, e.g. {example!r} (row 0)."
    )
    if len(texts) < len(splits):
        others = ", ".join(s.name for s in splits if s not in texts)
        raise DataError(f"{head} Give it the same labels as {others}: numbers.")
    names = sorted({text for values in found if values is not None for text in values.texts})
    if split.kinds[column] == "texts":
        listed = str(names) if names and len(names) <= 20 else None
        inner = f'sorted({{name for row in {split.code} for name in row["{column}"]}})'
        fix = class_lists_call(column, listed or inner)
    elif any(split.is_stream for split in splits):
        read = f'sorted({{row["{column}"] for row in {split.code}}} - {{None, ""}})'
        number = f'{{"{column}": names.index(row["{column}"])}}'
        fix = f"map(lambda row, names={read if len(splits) == 1 else 'names'}: {number})"
        raise DataError(f"{head} Turn them into class numbers: {fix_all(keys, fix, read)}.")
    elif len(splits) == 1:
        fix = f'class_encode_column("{column}")'
    else:
        listed = str(names) if len(names) <= 20 else f'sorted(set({split.code}["{column}"]))'
        fix = f'cast_column("{column}", datasets.ClassLabel(names={listed}))'
    raise DataError(f"{head} Turn them into class numbers: {fix_all(keys, fix)}.")


def check_answers(split: Split, column: str | None) -> Split:
    """Refuse negative positions of answers, and some that are missing.

    Args:
        split: The split.
        column: The column that they are made of; None: nobody knows.

    Returns:
        The split; without positions if all are missing, as those of a test split may be.

    Raises:
        DataError: There is one.
    """
    is_missing = missing_in(split, POSITIONS[0]) if POSITIONS[0] in split.kinds else None
    if is_missing is not None and is_missing.all():
        return split.select([name for name in split.kinds if name not in POSITIONS])
    if is_missing is not None and is_missing.any():
        line = "let preprocess= put both at the token [CLS]."
        if column is not None:
            cell = f'row["{column}"] or {{"text": [], "answer_start": []}}'
            line = f"let the dataset tell so: {split.fix(as_map(column, cell))}."
        raise DataError(
            f"Row {int(np.argmax(is_missing))} of {split.name} as preprocess= makes it has no "
            f"answer that is known: {POSITIONS[0]}=None, as have {int(is_missing.sum())} of "
            f"{len(is_missing)}. If there is no answer, {line}"
        )
    for name in POSITIONS:
        if split.is_stream or split.kinds.get(name) != "int":
            continue
        if distinct_in(split, name).min(initial=0) < 0:
            cells = enumerate(split.rows[name])
            row, found = next(pair for pair in cells if pair[1] is not None and pair[1] < 0)
            raise DataError(positions_message(name, found, f"row {row} of {split.name}"))
    return split


def check_inputs(split: Split, *, by_token: bool) -> None:
    """Refuse tokens that are no whole numbers, and a mask that is longer or shorter than they.

    Padding would hide both. Only the first row of a stream is checked.

    Args:
        split: The split.
        by_token: Whether each token has a label; those that have more or fewer are refused, too.

    Raises:
        DataError: The message has the line that fixes the split.
    """
    if by_token:
        _check_alignment(split)
    kinds, tokens = split.kinds, split.first.get("input_ids")
    if "input_ids" not in kinds or not isinstance(tokens, list):
        return
    leaf: Any = tokens
    while isinstance(leaf, list) and leaf:
        leaf = leaf[0]
    if isinstance(leaf, float):
        feature = 'datasets.Value("int64")'
        for _ in range(_depth_of(tokens)):
            feature = f"datasets.Sequence({feature})"
        line = split.fix(f'cast_column("input_ids", {feature})')
        raise DataError(
            f"input_ids of {split.name} are numbers with a point, {leaf!r} in row 0, and tokens "
            f"are whole numbers. Convert them: {line}."
        )
    if kinds.get("attention_mask") != "list" or _depth_of(tokens) > 1:
        return
    if (row := first_misaligned(split, "attention_mask")) is not None:
        found = split.rows[row] if row else split.first
        raise DataError(
            f"Row {row} of {split.name} has {len(found['input_ids'])} input_ids and an "
            f"attention_mask of {len(found['attention_mask'])}, so nothing tells which tokens it "
            f"hides. Leave it out: {split.fix('remove_columns(' + repr('attention_mask') + ')')}."
        )


def _depth_of(value: Any) -> int:
    return 1 + _depth_of(value[0]) if isinstance(value, list) and value else 0


def _check_alignment(split: Split) -> None:
    """Refuse token labels whose number differs from the number of tokens.

    Padding both would hide the difference. Only the first row of a stream is checked.

    Raises:
        DataError: A row has more or fewer labels than tokens.
    """
    if "input_ids" not in split.first or split.first.get("labels") is None:
        return
    if (row := first_misaligned(split, "labels")) is not None:
        found = split.rows[row] if row else split.first
        labels = found["labels"]
        lengths = len(labels) if isinstance(labels, list) else 1, len(found["input_ids"])
        raise DataError(misaligned_message(*lengths, f"row {row} of {split.name}"))
