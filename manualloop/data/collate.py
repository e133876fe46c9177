"""From rows to a batch: padding, and explanations for rows that do not fit together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from manualloop.data.labels import BY_TOKEN
from manualloop.data.stacking import collate_images
from manualloop.errors import ConfigError, DataError
from manualloop.libraries import pads_as_base
from manualloop.mistakes import (
    filter_missing,
    misaligned_message,
    pad_token_fix,
    text_message,
)
from manualloop.tasks.places import POSITIONS, in_batch
from manualloop.tasks.task import IGNORE_INDEX, TASKS

Row = Mapping[str, Any]


def collate_rows(
    rows: Sequence[Row],
    *,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    float_labels: bool = False,
    token_labels: bool = False,
    pads_left: bool = False,
) -> dict[str, Any]:
    """Make a batch with a collator of transformers.

    Args:
        rows: Rows of the dataset, as dicts.
        collator: Function that pads and stacks rows.
        float_labels: Whether the loss needs ``labels`` in float32 (multi-label, regression).
        token_labels: Whether every token must have a label. Padding would hide missing ones.
        pads_left: Whether padding stands before the tokens, so that the positions of answers move,
            which the collators of transformers leave as they are.

    Raises:
        DataError: The rows do not fit together; the message names the row and the reason.
    """
    if token_labels and (reason := _explain_alignment(rows)):
        raise DataError(reason)
    try:
        batch = dict(collator(list(rows)))
    except DataError:
        raise
    except Exception as error:
        if reason := explain_rows(rows):
            raise DataError(reason) from error
        raise
    for name in POSITIONS if "input_ids" in batch else ():
        if name in batch and batch[name].ndim == 1:
            width = batch["input_ids"].shape[-1]
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch[name] = in_batch(batch[name], lengths, width, pads_left=pads_left)
    if batch.get("labels") is None:
        batch.pop("labels", None)  # DataCollatorForSeq2Seq adds it to rows without labels
    elif float_labels:
        batch["labels"] = batch["labels"].float()
    elif batch["labels"].dtype == torch.bool:
        batch["labels"] = batch["labels"].long()
    return batch


def collate_choices(
    rows: list[Any], *, collator: Callable[[list[Any]], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Make a batch ``(rows, choices, tokens)`` with the collator of transformers.

    That takes the number of choices of the first row for that of all, and cannot do without labels.

    Args:
        rows: Rows with a list of tokens for each choice.
        collator: ``DataCollatorForMultipleChoice``.

    Raises:
        DataError: The rows have different numbers of choices.
    """
    numbers = [len(row["input_ids"]) for row in rows]
    if len({*numbers}) > 1:
        row = next(n for n, number in enumerate(numbers) if number != numbers[0])
        raise DataError(
            f"Row {row} of the {len(rows)} rows of a batch has {numbers[row]} choices, and row 0 "
            f"has {numbers[0]}. A batch holds as many choices of each row: leave such rows out, or "
            "pass batch_size=1."
        )
    if "labels" in rows[0]:
        return collator(rows)
    batch = dict(collator([{**row, "labels": IGNORE_INDEX} for row in rows]))
    del batch["labels"]
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
    nested = next((c for c in rows[0] if any(_is_ragged(row.get(c)) for row in rows)), None)
    if nested is not None:
        return (
            f"Column {nested!r} holds lists of lists of different lengths, which no tensor can "
            "hold. Pad them with preprocess=, or pass a collate_fn that does."
        )
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


def _is_ragged(value: Any) -> bool:
    """Tell whether lists inside a list have different lengths."""
    lists = [item for item in value if isinstance(item, list)] if isinstance(value, list) else []
    return len({*map(len, lists)}) > 1 or any(map(_is_ragged, lists))


def _explain_alignment(rows: Sequence[Row]) -> str | None:
    for number, row in enumerate(rows):
        if "labels" in row and "input_ids" in row:
            num_labels, num_tokens = _length(row["labels"]), _length(row["input_ids"])
            if wrong := [x for x in _floats(row["labels"]) if not x.is_integer()]:
                return (
                    f"Row {number} of the {len(rows)} checked has the label {wrong[0]:g}, and "
                    "labels of tokens are whole numbers of classes, or -100."
                )
            if num_labels != num_tokens:
                where = f"row {number} of the {len(rows)} checked"
                return misaligned_message(num_labels, num_tokens, where)
    return None


def _floats(values: Any) -> list[float]:
    """Return a list of floats; an empty one for anything else."""
    is_one = isinstance(values, list) and len(values) > 0 and type(values[0]) is float
    return values if is_one else []


def _length(value: Any) -> int:
    if getattr(value, "ndim", 1) == 0:  # len() refuses a tensor or array of one number
        return 0
    return len(value) if hasattr(value, "__len__") else 0


def padding_collate_fn(
    tokenizer: Any, task: str | None, pad_to_multiple_of: int | None, *, of_images: bool = False
) -> Callable[[Any], dict[str, Any]]:
    """Return the function that pads and stacks rows for a task, or for images.

    If the tokenizer pads in the standard way, it is a ``TableCollate``, which also takes tables.
    """
    collator = padding_collator(tokenizer, task, pad_to_multiple_of)
    if task == "multiple_choice" and hasattr(tokenizer, "pad_token"):
        collator = partial(collate_choices, collator=collator)
    float_labels = task is not None and TASKS[task].float_labels
    collate = partial(
        collate_rows,
        collator=collator,
        float_labels=float_labels,
        token_labels=task in BY_TOKEN,
        pads_left=getattr(tokenizer, "padding_side", None) == "left",
    )
    if of_images:
        return partial(collate_images, collate=collate)
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


def padding_collator(tokenizer: Any, task: str | None, pad_to_multiple_of: int | None) -> Any:
    """Return the collator of transformers for a task; without padding for None and images."""
    import transformers

    if not hasattr(tokenizer, "pad_token"):  # None, or a processor of images
        return transformers.default_data_collator
    collators = {
        "seq2seq_lm": transformers.DataCollatorForSeq2Seq,
        "multiple_choice": transformers.DataCollatorForMultipleChoice,
        **dict.fromkeys(BY_TOKEN, transformers.DataCollatorForTokenClassification),
    }
    kind = collators.get(task or "", transformers.DataCollatorWithPadding)
    return kind(tokenizer, pad_to_multiple_of=pad_to_multiple_of)


def tokenizer_of(loader: Any) -> Any:
    """Return the tokenizer that made the batches of a loader; None if nobody knows it."""
    own = getattr(loader, "tokenizer", None)
    return own or getattr(getattr(loader, "collate_fn", None), "tokenizer", None)


def require_tokenizer(tokenizer: Any) -> None:
    """Refuse what is not a tokenizer: the name of one, or a model.

    Raises:
        ConfigError: It cannot be called on texts.
    """
    if isinstance(tokenizer, str | os.PathLike):
        raise ConfigError(
            f"tokenizer={tokenizer!r} is the name of a tokenizer, not one. Load it: "
            f"tokenizer=transformers.AutoTokenizer.from_pretrained({os.fspath(tokenizer)!r})."
        )
    if isinstance(tokenizer, torch.nn.Module):
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}, which is a model. Name the arguments: "
            "prepare_dataloaders(dataset, tokenizer, model=model)."
        )
    is_one = callable(tokenizer) and hasattr(tokenizer, "model_input_names")
    if tokenizer is not None and not is_one:
        raise ConfigError(
            f"tokenizer is a {type(tokenizer).__name__}, which cannot be called on texts. Load "
            "one: transformers.AutoTokenizer.from_pretrained(name)."
        )


def require_pad_token(tokenizer: Any) -> None:
    """Refuse a tokenizer without a pad token.

    Raises:
        DataError: The tokenizer has no pad token.
    """
    if getattr(tokenizer, "pad_token", "") is None:
        raise DataError(
            "The tokenizer has no pad token, so batches cannot be padded. Give it one: "
            f"{pad_token_fix(tokenizer)}."
        )
