"""Tokens that a model cannot take, and labels from which it would learn to copy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from manualloop.errors import DataError
from manualloop.models import config_of, max_length, model_name, vocab_size
from manualloop.tasks.task import IGNORE_INDEX, infer_task
from manualloop.types import Place

_FEW = 8  # labels: by chance all of so many are the tokens in their places once in 10**8 windows


class Limits(NamedTuple):
    """The tokens that a model takes; None where it has no limit.

    Attributes:
        vocab_size: Number of tokens that it knows.
        max_length: Number of tokens of a row.
    """

    vocab_size: int | None
    max_length: int | None


def limits_of(model: nn.Module) -> Limits:
    """Return the tokens that a model takes."""
    return Limits(vocab_size(model), max_length(model))


def check_tokens(
    model: nn.Module, batch: Mapping[str, Any], place: Place, limits: Limits | None = None
) -> None:
    """Refuse tokens that are no numbers of a vocabulary, and rows that are too long.

    Args:
        model: The model.
        batch: A batch; one without ``input_ids`` is not looked at.
        place: Where it comes from.
        limits: The limits of the model, where they were found before.

    Raises:
        DataError: The message names the row.
    """
    tokens, positions = batch.get("input_ids"), batch.get("position_ids")
    if not isinstance(tokens, Tensor):
        return
    if tokens.is_floating_point():
        raise DataError(
            f"input_ids of {place.batch} are {str(tokens.dtype).removeprefix('torch.')}, and "
            "tokens are whole numbers. Convert them: "
            'dataset.cast_column("input_ids", datasets.Sequence(datasets.Value("int64"))).'
        )
    is_one = tokens.ndim == 3 and tokens.shape[1] == 1 and config_of(model) is not None
    if is_one and infer_task(model) != "multiple_choice":
        raise DataError(
            f"input_ids of {place.batch} have the shape {tuple(tokens.shape)}: the axis of length "
            '1 comes from a tokenizer that is called for each row with return_tensors="pt". Leave '
            "that out: tokenizer(text, truncation=True)."
        )
    ids, (size, room) = tokens.cpu().numpy(), limits or limits_of(model)
    if size is not None and ids.size and (ids.max() >= size or ids.min() < 0):
        row, *_ = np.argwhere((ids >= size) | (ids < 0))[0]
        token = int(ids[(ids >= size) | (ids < 0)][0])
        raise DataError(
            f"Token id {token} in {place.row(int(row))} is beyond the vocabulary of "
            f"{model_name(model)}: vocab_size {size}. Tokenizer and model differ; if tokens were "
            "added: model.resize_token_embeddings(len(tokenizer))."
        )
    length = ids.shape[-1] if ids.ndim > 1 else 0
    if isinstance(positions, Tensor) and positions.numel():
        length = min(length, int(positions.max()) + 1)  # those of packed rows begin anew
    if room is not None and length > room:
        raise DataError(
            f"A sequence of {length} tokens in {place.batch}, but {model_name(model)} takes {room}."
            f" {_shorter(place.origin.cut, room)}"
        )


def is_of_tokens(error: Exception) -> bool:
    """Tell whether an error may be that of a token or a position that a model does not have."""
    return isinstance(error, IndexError) or _NO_ROW.search(str(error)) is not None


_NO_ROW = re.compile("index out of range|device-side assert|must match|size of tensor")


def _shorter(cut: str | None, room: int) -> str:
    """Return the sentence on how to make rows shorter, by the function that makes them."""
    if cut is not None:
        return f"Cut the rows where they are made: {cut.format(room=room)}."
    return (
        f"Cut the texts: prepare_dataloaders(..., max_length={room}), or tokenizer(..., "
        f"truncation=True, max_length={room})."
    )


def refuse_copies(model: nn.Module, batches: Sequence[Any], place: Place) -> None:
    """Refuse labels that are the tokens in their own places, of a model that sees these.

    Args:
        model: A masked language model, or one whose labels are not shifted.
        batches: The micro-batches of the first window.
        place: Where the first one comes from.

    Raises:
        DataError: All labels are of this kind.
    """
    number = 0
    for batch in batches:
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
            return
        if ids.shape != labels.shape or bool(((labels != ids) & (labels != IGNORE_INDEX)).any()):
            return
        number += int((labels != IGNORE_INDEX).sum())
    if number < _FEW:
        return
    name = model_name(model)
    if name.endswith("ForMaskedLM"):
        raise DataError(
            f"All {number} labels of {place.batch} are the tokens in their own places, which "
            f"{name} sees: it would learn to copy. Hide some of them: prepare_dataloaders(..., "
            "transform=manualloop.tasks.mask_tokens(tokenizer))."
        )
    raise DataError(
        f"All {number} labels of {place.batch} are the tokens in their own places, which {name} "
        "sees, since it does not shift labels: it would learn to copy. Let each be the token that "
        'follows: {**batch, "labels": torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), '
        "value=-100)}."
    )
