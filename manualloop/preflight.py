"""The mistakes that can be seen before the first update, and what to say of each.

``check_run`` looks at the model and its optimizer, ``check_batch`` at the first batch of a run.
When a later batch fails inside the model, ``explain`` looks at that batch in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from manualloop.data.collate import text_message
from manualloop.data.labels import check_class_ids
from manualloop.data.order import OrderedBatchSampler
from manualloop.errors import DataError, ManualLoopError, ModelError
from manualloop.models import (
    forward_columns,
    max_length,
    model_name,
    num_labels,
    takes_any_column,
    vocab_size,
)
from manualloop.optim import require_trainable
from manualloop.state import TrainState
from manualloop.strategy import parameters_of
from manualloop.tasks import (
    IGNORE_INDEX,
    count_items,
    infer_task,
    no_head_message,
    no_labels_message,
    num_rows,
)


def check_run(state: TrainState) -> None:
    """Refuse a model without trainable parameters, or an optimizer of another model.

    Raises:
        ModelError: One of the two.
    """
    own = {id(parameter) for parameter in require_trainable(state.model)}
    updated = parameters_of(state.optimizer)
    if not any(id(parameter) in own for parameter in updated):
        raise ModelError(
            f"None of the optimizer's {len(updated)} parameters is a trainable one of this "
            f"{model_name(state.model)}. Build it from the model after loading it: "
            "prepare_optimizer(model)."
        )


def check_batches(
    model: nn.Module, batches: Sequence[Any], loader: Iterable[Any], num_samples: int
) -> None:
    """Refuse micro-batches that the model cannot learn from.

    Args:
        model: Whose forward pass takes the batches.
        batches: Micro-batches that follow each other.
        loader: They came from.
        num_samples: Rows of the epoch before the first of them.

    Raises:
        DataError: Text, missing or impossible labels, tokens the model does not know, ...
        ModelError: The model has no head, or does not take these columns.
    """
    sampler = getattr(loader, "batch_sampler", None)
    for batch in batches:
        check_batch(model, batch, _namer(sampler, num_samples))
        num_samples += num_rows(batch)


def explain(
    error: Exception,
    model: nn.Module,
    batches: Sequence[Any],
    loader: Iterable[Any],
    num_samples: int,
) -> None:
    """Raise, from an error out of the model, the mistake in the data that explains it, if any."""
    try:
        check_batches(model, batches, loader, num_samples)
    except ManualLoopError as mistake:
        raise mistake from error


def _namer(sampler: object, num_samples: int) -> Callable[[int], str]:
    """Return a function that names a row of the batch that begins after so many rows."""
    if not isinstance(sampler, OrderedBatchSampler):
        return lambda row: f"row {row} of a batch"
    number = num_samples // sampler.batch_size
    rows = sampler.rows()
    return lambda row: f"{sampler.split} batch {number} (row id {rows[num_samples + row]})"


def check_batch(model: nn.Module, batch: Any, where: Callable[[int], str]) -> None:
    """Check one batch; ``where`` names one of its rows."""
    _check_columns(model, batch)
    if isinstance(ids := batch.get("input_ids"), Tensor):
        _check_tokens(model, ids.cpu().numpy(), where)
    if isinstance(labels := batch.get("labels"), Tensor):
        _check_labels(model, batch, labels, where)


def _check_columns(model: nn.Module, batch: Any) -> None:
    name = model_name(model)
    if not isinstance(batch, Mapping):
        raise DataError(
            f"The loader gives a {type(batch).__name__}, and {name} is called as model(**batch). "
            "Let collate_fn return a dict, or pass loss_fn=lambda model, batch: ...."
        )
    for column, value in batch.items():
        example = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(example, str):
            raise DataError(text_message(column, example))
    taken = forward_columns(model)
    labelled = "labels" in batch or "start_positions" in batch
    if "labels" in taken and not labelled:
        raise DataError(no_labels_message(batch))
    if takes_any_column(model):
        return
    if "labels" in batch and "labels" not in taken:
        raise ModelError(no_head_message(model))
    if unknown := [column for column in batch if column not in taken]:
        raise DataError(
            f"{name}.forward does not take {', '.join(unknown)} (it takes {', '.join(taken)}). "
            f'Leave them out: dataset.remove_columns("{unknown[0]}"), or '
            "prepare_dataloaders(dataset, tokenizer, model=model)."
        )


def _check_tokens(model: nn.Module, ids: np.ndarray[Any, Any], where: Callable[[int], str]) -> None:
    size = vocab_size(model)
    if size is not None and ids.size and (ids.max() >= size or ids.min() < 0):
        row, *_ = np.argwhere((ids >= size) | (ids < 0))[0]
        token = int(ids[(ids >= size) | (ids < 0)][0])
        raise DataError(
            f"Token id {token} in {where(int(row))} is beyond the vocabulary of "
            f"{model_name(model)}: vocab_size {size}. Tokenizer and model differ; if tokens were "
            "added: model.resize_token_embeddings(len(tokenizer))."
        )
    room = max_length(model)
    if room is not None and ids.ndim > 1 and ids.shape[1] > room:
        raise DataError(
            f"A sequence of {ids.shape[1]} tokens in {where(0).partition(' (')[0]}, but "
            f"{model_name(model)} takes {room}. Cut the texts: "
            f"prepare_dataloaders(..., max_length={room}), or tokenizer(..., truncation=True, "
            f"max_length={room})."
        )


def _check_labels(
    model: nn.Module, batch: Mapping[str, Any], labels: Tensor, where: Callable[[int], str]
) -> None:
    task, classes = infer_task(model, labels), num_labels(model)
    ids = batch.get("input_ids")
    by_token = task in ("token_classification", "masked_lm", "causal_lm")
    if by_token and isinstance(ids, Tensor) and labels.shape != ids.shape:
        raise DataError(
            f"labels have length {labels.shape[-1]}, input_ids {ids.shape[-1]} ({where(0)}). "
            f"Align the labels to the tokens and pad them with {IGNORE_INDEX}: transformers' "
            "DataCollatorForTokenClassification(tokenizer)."
        )
    if count_items(model, batch) == 0:
        raise DataError(
            f"No label to learn from in {where(0).partition(' (')[0]}: all {labels.numel()} are "
            f"{IGNORE_INDEX}. Check the masking of the labels, and that truncation leaves some."
        )
    if classes is None:
        return
    by_class = task in ("single_label_classification", "token_classification")
    if by_class and not labels.is_floating_point():
        check_class_ids(labels.cpu().numpy(), classes, where)
    if task == "multi_label_classification" and tuple(labels.shape[1:]) != (classes,):
        raise DataError(
            f"Float labels of shape {tuple(labels.shape)} with {classes} classes are read as "
            f"multi-label, which wants ({len(labels)}, {classes}). For one class a row make them "
            'integers: dataset.cast_column("labels", Value("int64")); for a regression load the '
            "model with num_labels=1."
        )
    if task == "multi_label_classification" and not labels.is_floating_point():
        raise DataError(
            f"Multi-label classification wants float labels, got {labels.dtype}. "
            'Use prepare_dataloaders, or batch["labels"] = batch["labels"].float() in collate_fn.'
        )
