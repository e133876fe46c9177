"""Whether a causal language model learns to end a text: the token for it has to be a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manualloop.mistakes import pad_token_fix
from manualloop.models import config_of
from manualloop.notices import say
from manualloop.tasks.task import IGNORE_INDEX, infer_task


def report_untrained_ends(model: nn.Module, batches: Sequence[Any], tokenizer: Any) -> None:
    """Log that a causal language model does not learn to end a text, if that is so."""
    if infer_task(model) == "causal_lm" and (line := untrained_ends(model, batches, tokenizer)):
        say(line)


def untrained_ends(model: nn.Module, batches: Sequence[Any], tokenizer: Any) -> str | None:
    """Return the message that no text of some batches ends with a label; None if some does.

    Collators that recognise padding by the pad token leave EOS out of the labels as well, where
    both are one token. The loss falls all the same, and the model never stops writing.

    Args:
        model: The model.
        batches: Batches whose labels are the tokens in their places.
        tokenizer: The tokenizer; None if it is unknown: then the model's config tells EOS.
    """
    eos = getattr(config_of(model) if tokenizer is None else tokenizer, "eos_token_id", None)
    stops = torch.tensor(eos if isinstance(eos, list) else [] if eos is None else [eos])
    num_ends = 0
    for batch in batches if len(stops) else ():
        ids, labels, mask = _columns(batch)
        if ids is None or labels is None or ids.ndim != 2 or labels.shape != ids.shape:
            continue
        is_end = torch.isin(ids, stops.to(ids.device)) & (mask != 0)
        after_label = nn.functional.pad(labels[:, :-1] != IGNORE_INDEX, (1, 0))
        is_end &= after_label  # others belong to a prompt, or are padding after padding
        if bool((is_end & (labels != IGNORE_INDEX)).any()):
            return None
        num_ends += int(is_end.sum())
    if not num_ends:
        return None
    message = (
        f"none of the {num_ends} EOS tokens after a label in the first batches is a label itself: "
        "the model never learns to end a text. "
    )
    if tokenizer is not None and tokenizer.pad_token_id == eos:
        return (
            f"{message}EOS is the pad token, too, and is taken for padding. Give the tokenizer "
            f"another pad token: {pad_token_fix(tokenizer)}."
        )
    return f"{message}Make it one: labels are -100 where attention_mask is 0, and elsewhere tokens."


def _columns(batch: Any) -> tuple[Tensor | None, Tensor | None, Any]:
    """Return the tokens of a batch, its labels, and what is no padding."""
    columns: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    ids, labels, mask = (columns.get(n) for n in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        return None, None, None
    is_mask = isinstance(mask, Tensor) and mask.shape == ids.shape
    return ids, labels, mask if is_mask else torch.ones_like(ids)
