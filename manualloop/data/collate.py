"""From rows to a batch: padding, and what to say when rows do not fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from manualloop.errors import DataError
from manualloop.tasks import misaligned_message

Row = Mapping[str, Any]


def collate_rows(
    rows: Sequence[Row],
    *,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    float_labels: bool = False,
) -> dict[str, Any]:
    """Make a batch with a collator of transformers.

    Args:
        rows: Of the dataset, as dicts.
        collator: Pads and stacks.
        float_labels: Whether the loss wants ``labels`` in float32: multi-label, regression.

    Raises:
        DataError: The collator failed on these rows; the message says on which and why.
    """
    try:
        batch = dict(collator(list(rows)))
    except Exception as error:
        if reason := explain_rows(rows):
            raise DataError(reason) from error
        raise
    if "labels" in batch:
        if float_labels:
            batch["labels"] = batch["labels"].float()
        elif batch["labels"].dtype == torch.bool:
            batch["labels"] = batch["labels"].long()
    return batch


def explain_rows(rows: Sequence[Any]) -> str | None:
    """Say why rows cannot be stacked into a batch; None if they look fine."""
    if not rows or not isinstance(rows[0], Mapping):
        return None
    for column in rows[0]:
        values = [row.get(column) for row in rows]
        if missing := [number for number, value in enumerate(values) if value is None]:
            return (
                f"Row {missing[0]} of the {len(rows)} rows checked has {column}=None; so have "
                f"{len(missing)} of them. Filter them out: dataset.filter(lambda row: "
                f'row["{column}"] is not None).'
            )
        if isinstance(values[0], str):
            return text_message(column, values[0], is_tokenized="input_ids" in rows[0])
    return _explain_lengths(rows)


def text_message(column: str, example: str, *, is_tokenized: bool) -> str:
    """Say that a column is text where numbers are wanted."""
    if column in ("label", "labels"):
        return (
            f"{column!r} holds strings, e.g. {example!r} (row 0). Turn them into class numbers: "
            f'dataset.class_encode_column("{column}").'
        )
    if is_tokenized:
        return (
            f"Column {column!r} is text, e.g. {example!r} (row 0), beside the tokens made of it. "
            f'Leave it out: dataset.remove_columns("{column}").'
        )
    return (
        f"Column {column!r} is still text. Tokenise it: prepare_dataloaders(dataset, tokenizer), "
        f'or dataset.map(lambda rows: tokenizer(rows["{column}"], truncation=True), batched=True).'
    )


def _explain_lengths(rows: Sequence[Row]) -> str | None:
    def lengths(column: str) -> list[int]:
        return [_length(row.get(column)) for row in rows]

    columns = [column for column in rows[0] if any(lengths(column))]
    ragged = [column for column in columns if len(set(lengths(column))) > 1]
    if "labels" in columns and "input_ids" in columns:
        for number, (ids, labels) in enumerate(
            zip(lengths("input_ids"), lengths("labels"), strict=True)
        ):
            if "labels" in ragged and ids != labels:
                return misaligned_message(labels, ids, f"row {number} of the {len(rows)} checked")
    if not ragged:
        return None
    found = lengths(ragged[0])
    return (
        f"Rows have lengths {min(found)}..{max(found)} in {ragged[0]!r}, and nothing pads them. "
        "Pass the tokenizer, prepare_dataloaders(dataset, tokenizer), or a collate_fn that pads: "
        "transformers' DataCollatorWithPadding(tokenizer)."
    )


def _length(value: Any) -> int:
    if getattr(value, "ndim", 1) == 0:  # a tensor or array of one number: len() refuses it
        return 0
    return len(value) if hasattr(value, "__len__") else 0
