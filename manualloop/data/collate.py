"""From rows to a batch: padding, and explanations for rows that do not fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from manualloop.data.labels import BY_TOKEN
from manualloop.errors import DataError
from manualloop.internals import pads_as_base
from manualloop.mistakes import filter_missing, misaligned_message, text_label_message, text_message
from manualloop.tasks.task import TASKS

if TYPE_CHECKING:
    from manualloop.data.columns import Split

Row = Mapping[str, Any]


def collate_rows(
    rows: Sequence[Row],
    *,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    float_labels: bool = False,
    token_labels: bool = False,
) -> dict[str, Any]:
    """Make a batch with a collator of transformers.

    Args:
        rows: Rows of the dataset, as dicts.
        collator: Function that pads and stacks rows.
        float_labels: Whether the loss needs ``labels`` in float32 (multi-label, regression).
        token_labels: Whether every token must have a label. Padding would hide missing ones.

    Raises:
        DataError: The rows do not fit together; the message names the row and the reason.
    """
    if token_labels and (reason := _explain_alignment(rows)):
        raise DataError(reason)
    try:
        batch = dict(collator(list(rows)))
    except Exception as error:
        if reason := explain_rows(rows):
            raise DataError(reason) from error
        raise
    if batch.get("labels") is None:
        batch.pop("labels", None)  # DataCollatorForSeq2Seq adds it to rows without labels
    elif float_labels:
        batch["labels"] = batch["labels"].float()
    elif batch["labels"].dtype == torch.bool:
        batch["labels"] = batch["labels"].long()
    return batch


def explain_rows(rows: Sequence[Any]) -> str | None:
    """Return the reason why rows cannot be stacked into a batch; None if they can."""
    if not rows or not isinstance(rows[0], Mapping):
        return None
    lengths: dict[str, list[int]] = {}
    for column in rows[0]:
        values = [row.get(column) for row in rows]
        if missing := [number for number, value in enumerate(values) if value is None]:
            return (
                f"Row {missing[0]} of the {len(rows)} rows checked has {column}=None. Rows "
                f"without a value: {len(missing)}. Filter them out: {filter_missing(column)}."
            )
        if _is_text(values[0]):
            return text_message(column, values[0], is_tokenized="input_ids" in rows[0])
        lengths[column] = [_length(value) for value in values]
    ragged = [column for column, found in lengths.items() if len(set(found)) > 1]
    if "labels" in ragged and (reason := _explain_alignment(rows)):
        return reason
    if not ragged:
        return None
    found = lengths[ragged[0]]
    return (
        f"The rows of a batch have lengths {min(found)}..{max(found)} in {ragged[0]!r}, and they "
        "are not padded. Pass the tokenizer, prepare_dataloaders(dataset, tokenizer), or a "
        "collate_fn that pads: transformers' DataCollatorWithPadding(tokenizer)."
    )


def _is_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str)


def check_columns(
    split: Split, texts: Sequence[str], label: str | None, *, may_be_text: bool
) -> None:
    """Refuse a split that lacks a column of text, has missing values, or has labels of text.

    Args:
        split: The split to check.
        texts: Columns of text.
        label: Column of labels, which the split may lack.
        may_be_text: Whether labels of text are allowed.

    Raises:
        DataError: The split cannot be used; the message names the column, and the first bad row.
    """
    kinds = split.kinds
    for column in texts:
        if column not in kinds:
            raise DataError(
                f"{split.name} has no column {column!r}. Its columns: {', '.join(kinds)}. Give all "
                "splits the same columns, or prepare them one by one."
            )
        _check_complete(split, column)
    if label is None or label not in kinds:
        return
    _check_complete(split, label)
    if kinds[label] in ("text", "texts") and not may_be_text:
        raise DataError(text_label_message(label, split.first[label], split=split.name))


def _check_complete(split: Split, column: str) -> None:
    import pyarrow.compute as pc

    if (values := split.column(column)) is None:
        return
    kind, in_lists = split.kinds[column], False
    rows = np.flatnonzero(pc.is_null(values, nan_is_null=True))
    if kind in ("list", "texts") and not rows.size:
        in_lists, is_missing = True, pc.is_null(pc.list_flatten(values), nan_is_null=True)
        rows = np.unique(pc.list_parent_indices(values).filter(is_missing))
    if rows.size:
        value = values[int(rows[0])].as_py()
        found = f"None or NaN in {column}" if in_lists else f"{column}={value}"
        raise DataError(
            f"Row {rows[0]} of {split.name} has {found}. Rows without a value: {rows.size} of "
            f"{len(values)}. Filter them out: "
            f"{filter_missing(column, is_float=kind == 'float', in_lists=in_lists)}."
        )


def check_alignment(split: Split) -> None:
    """Refuse token labels whose number differs from the number of tokens.

    Padding both would hide the difference. Only the first row of a stream is checked.

    Raises:
        DataError: A row has more or fewer labels than tokens.
    """
    if "input_ids" not in split.first or split.first.get("labels") is None:
        return
    if (row := split.first_misaligned("labels")) is not None:
        found = split.rows[row] if row else split.first
        lengths = np.size(found["labels"]), len(found["input_ids"])
        raise DataError(misaligned_message(*lengths, f"row {row} of {split.name}"))


def _explain_alignment(rows: Sequence[Row]) -> str | None:
    for number, row in enumerate(rows):
        if "labels" in row and "input_ids" in row:
            num_labels, num_tokens = _length(row["labels"]), _length(row["input_ids"])
            if num_labels != num_tokens:
                where = f"row {number} of the {len(rows)} checked"
                return misaligned_message(num_labels, num_tokens, where)
    return None


def _length(value: Any) -> int:
    if getattr(value, "ndim", 1) == 0:  # len() refuses a tensor or array of one number
        return 0
    return len(value) if hasattr(value, "__len__") else 0


def padding_collate_fn(
    tokenizer: Any, task: str | None, pad_to_multiple_of: int | None
) -> Callable[[Any], dict[str, Any]]:
    """Return the function that pads and stacks rows for a task.

    If the tokenizer pads in the standard way, it is a ``TableCollate``, which also takes tables.
    """
    import transformers

    collator: Any = transformers.default_data_collator
    if hasattr(tokenizer, "pad_token"):  # not None, nor a processor of images
        collators = {
            "seq2seq_lm": transformers.DataCollatorForSeq2Seq,
            "multiple_choice": transformers.DataCollatorForMultipleChoice,
            **dict.fromkeys(BY_TOKEN, transformers.DataCollatorForTokenClassification),
        }
        kind = collators.get(task or "", transformers.DataCollatorWithPadding)
        collator = kind(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
    float_labels = task is not None and TASKS[task].float_labels
    collate = partial(
        collate_rows,
        collator=collator,
        float_labels=float_labels,
        token_labels=task in BY_TOKEN,
    )
    if task == "multiple_choice" or not pads_as_base(tokenizer):
        return collate
    from manualloop.data.tables import TableCollate

    return TableCollate(
        tokenizer,
        collate,
        labels="tokens" if task in BY_TOKEN else "longest" if task == "seq2seq_lm" else None,
        pad_to_multiple_of=pad_to_multiple_of,
        float_labels=float_labels,
    )


def require_pad_token(tokenizer: Any) -> None:
    """Refuse a tokenizer without a pad token.

    Raises:
        DataError: The tokenizer has no pad token.
    """
    if getattr(tokenizer, "pad_token", "") is None:
        raise DataError(
            "The tokenizer has no pad token, so batches cannot be padded. Give it one: "
            "tokenizer.pad_token = tokenizer.eos_token; model.config.pad_token_id = "
            "tokenizer.pad_token_id."
        )
