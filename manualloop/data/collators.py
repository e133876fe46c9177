"""Which function makes a batch of rows: transformers' collators, and ours for tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from manualloop.data.collate import collate_rows
from manualloop.data.labels import BY_TOKEN
from manualloop.errors import DataError
from manualloop.tasks import TASKS


def padding_collate_fn(
    tokenizer: Any, task: str | None, pad_to_multiple_of: int | None
) -> Callable[[Any], dict[str, Any]]:
    """Return what pads and stacks the rows of a task.

    It takes tables where the tokenizer pads as all do, and then has ``padded_lengths``.
    """
    import transformers

    collator: Any = transformers.default_data_collator
    if hasattr(tokenizer, "pad_token"):  # it is neither None nor a processor of images
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
    if task == "multiple_choice" or not _pads_plainly(tokenizer):
        return collate
    from manualloop.data.tables import TableCollate

    return TableCollate(
        tokenizer,
        collate,
        labels="tokens" if task in BY_TOKEN else "longest" if task == "seq2seq_lm" else None,
        pad_to_multiple_of=pad_to_multiple_of,
        float_labels=float_labels,
    )


def _pads_plainly(tokenizer: Any) -> bool:
    """Tell whether a tokenizer pads as transformers' base class does."""
    from transformers import PreTrainedTokenizerBase

    own, base = type(tokenizer), PreTrainedTokenizerBase
    return isinstance(tokenizer, base) and own.pad is base.pad and own._pad is base._pad


def require_pad_token(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot pad.

    Raises:
        DataError: It has no pad token.
    """
    if getattr(tokenizer, "pad_token", "") is None:
        raise DataError(
            "The tokenizer has no pad token, so batches cannot be padded. Give it one: "
            "tokenizer.pad_token = tokenizer.eos_token; model.config.pad_token_id = "
            "tokenizer.pad_token_id."
        )
