"""What a task is to the loop: the loss of a batch, the items it averages over, the predictions.

A model's mean loss is a mean over *items*. What an item is depends on the task, and whoever adds up
means must know it:

| task | items of a batch |
|---|---|
| single_label_classification, multiple_choice | rows whose label is not -100 |
| multi_label_classification, regression | elements of ``labels``: rows x classes, rows x outputs |
| token_classification, masked_lm, seq2seq_lm | labels that are not -100 |
| causal_lm | labels that are not -100, without each row's first: the model shifts them |
| question_answering | positions inside the input, of starts and of ends: two means |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from manualloop.errors import DataError, ModelError
from manualloop.mistakes import IGNORE_INDEX, example_loss, no_head_message, no_labels_message
from manualloop.models import config_of, model_name, problem_type, unwrap_model
from manualloop.types import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn


class Task(NamedTuple):
    """One row of ``TASKS``.

    Attributes:
        count_items: Items of a batch (see the module's table), for each of the means that the
            loss is the mean of: one, but two for question answering.
        predict: Logits to predictions.
        float_labels: Whether the loss wants floating point labels.
    """

    count_items: Callable[[Batch], tuple[int, ...]]
    predict: Callable[[Tensor], Tensor]
    float_labels: bool = False


_FEW = 64  # labels; a list of them takes 1 us


def count_kept(labels: Tensor) -> int:
    """Count the labels that are not -100.

    On the CPU without an ATen call: few as a list, more through NumPy, which costs 20 us where its
    code is not in the cache. Labels that are already on an accelerator make the host wait for them,
    so leave batches on the CPU.
    """
    if labels.device.type == "cpu":
        if labels.ndim == 1 and labels.numel() <= _FEW:
            return labels.numel() - labels.tolist().count(IGNORE_INDEX)
        return int(np.count_nonzero(labels.numpy() != IGNORE_INDEX))
    return int(torch.count_nonzero(labels != IGNORE_INDEX))


def _kept_labels(batch: Batch) -> tuple[int, ...]:
    return (count_kept(batch["labels"]),)


def _shifted_labels(batch: Batch) -> tuple[int, ...]:
    shifted = batch.get("shift_labels")
    return (count_kept(batch["labels"][..., 1:] if shifted is None else shifted),)


def _elements(batch: Batch) -> tuple[int, ...]:
    return (int(batch["labels"].numel()),)


def _positions_inside(batch: Batch) -> tuple[int, ...]:
    length = batch["input_ids"].shape[-1]
    return tuple(
        int(np.count_nonzero(batch[name].cpu().numpy() < length))
        for name in ("start_positions", "end_positions")
    )


def _argmax(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def _above_half(logits: Tensor) -> Tensor:
    return (logits > 0).int()  # sigmoid(x) > 0.5


def _as_value(logits: Tensor) -> Tensor:
    return logits.squeeze(-1)


TASKS: dict[str, Task] = {
    "single_label_classification": Task(_kept_labels, _argmax),
    "multi_label_classification": Task(_elements, _above_half, float_labels=True),
    "regression": Task(_elements, _as_value, float_labels=True),
    "token_classification": Task(_kept_labels, _argmax),
    "multiple_choice": Task(_kept_labels, _argmax),
    "masked_lm": Task(_kept_labels, _argmax),
    "seq2seq_lm": Task(_kept_labels, _argmax),
    "causal_lm": Task(_shifted_labels, _argmax),
    "question_answering": Task(_positions_inside, _argmax),
}

# Heads whose question answering loss is another.
_BEAM_SEARCHING = (
    "FlaubertForQuestionAnswering",
    "XLMForQuestionAnswering",
    "XLNetForQuestionAnswering",
)

# Heads of language models that want their labels shifted already (transformers 5.23).
_UNSHIFTED = (
    "BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM", "MarianForCausalLM", "MBartForCausalLM", "PegasusForCausalLM",
    "PLBartForCausalLM", "ProphetNetForCausalLM", "WhisperForCausalLM", "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
)  # fmt: skip

_TASK_OF_HEAD = {
    "ForTokenClassification": "token_classification",
    "ForMultipleChoice": "multiple_choice",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}


@cache  # asked at every step
def _task_of_class(name: str) -> str | None:
    if name in _UNSHIFTED:
        return "masked_lm"  # which counts as they do
    return next((task for head, task in _TASK_OF_HEAD.items() if name.endswith(head)), None)


def infer_task(model: nn.Module, labels: Tensor | None = None) -> str:
    """Name the task of a model, by its head, its config and the labels, as transformers does.

    Args:
        model: A transformers model, or any module: then the labels decide.
        labels: Of one batch: ``(rows,)``, ``(rows, classes)`` or ``(rows, tokens)``; None for
            rows without labels: a classification then, unless the model says otherwise.
    """
    model = unwrap_model(model)
    name = type(model).__name__
    if task := _task_of_class(name):
        return task
    config = config_of(model)
    if name.endswith("ForConditionalGeneration"):
        return "seq2seq_lm" if getattr(config, "is_encoder_decoder", False) else "causal_lm"
    if name.endswith("Classification"):
        # The rule of transformers' ForSequenceClassificationLoss, which the model writes into
        # its config at the first forward pass.
        if (chosen := problem_type(model)) in TASKS:
            return str(chosen)
        if getattr(config, "num_labels", None) == 1:
            return "regression"
    if labels is None:
        return "single_label_classification"
    is_row = labels.ndim > 1 and labels.shape[-1] > 1  # more than one number for each
    if name.endswith("Classification") and (is_row or labels.is_floating_point()):
        return "multi_label_classification"
    if not labels.is_floating_point():
        return "single_label_classification" if labels.ndim < 2 else "token_classification"
    return "multi_label_classification" if is_row else "regression"


def count_items(model: nn.Module, batch: Batch) -> int:
    """Count the items that the model's mean loss over this batch is a mean of.

    Args:
        model: The model; its task decides what an item is (see the module's table).
        batch: Column name to tensor. Without a tensor of ``labels`` every row is an item.

    >>> import torch
    >>> labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    >>> count_items(torch.nn.Linear(1, 1), {"labels": labels})
    3
    """
    return sum(count_terms(model, batch))


def count_terms(model: nn.Module, batch: Batch) -> tuple[int, ...]:
    """Count the items of each of the means that the model's loss is the mean of.

    They are one, but for question answering, whose loss is the mean of the start positions' and
    the end positions' means.
    """
    columns = batch if isinstance(batch, Mapping) else {}
    if isinstance(labels := columns.get("labels"), torch.Tensor):
        return TASKS[infer_task(model, labels)].count_items(batch)
    name = model_name(model) if "start_positions" in columns else ""
    if name.endswith("ForQuestionAnswering") and name not in _BEAM_SEARCHING:
        return TASKS["question_answering"].count_items(batch)
    return (num_rows(batch),)


def term_losses(outputs: Any, batch: Batch) -> list[Tensor]:
    """Return the means of a question answering head apart: of start and of end positions.

    The formula is transformers' ``ForQuestionAnsweringLoss``: positions beyond the input are left
    out of the mean.
    """
    losses = []
    for key, name in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
        logits = outputs[key] if isinstance(outputs, Mapping) else getattr(outputs, key)
        length = logits.shape[1]
        positions = batch[name].reshape(-1).clamp(0, length)
        losses.append(torch.nn.functional.cross_entropy(logits, positions, ignore_index=length))
    return losses


def num_rows(batch: Any) -> int:
    """Count the rows of a batch: the length of its first tensor, or list of a dict's values."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in [values] if isinstance(values, torch.Tensor) else values:
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.shape[0]  # len() of a tensor is slow
    for value in values if isinstance(batch, Mapping) else ():
        if isinstance(value, list | tuple):
            return len(value)
    raise DataError(
        f"A batch of type {type(batch).__name__} holds no tensor, so its rows cannot be counted. "
        "Let the loader's collate_fn return a dict of tensors, one row per example."
    )


def loss_and_items(result: Any, num_items: float) -> tuple[Tensor, float]:
    """Take apart what a ``loss_fn`` returned: a mean, or a mean and its items.

    Items may be a fraction: with class weights they are the sum of the rows' weights.
    """
    if not isinstance(result, tuple):
        return result, num_items
    loss, num_items = result
    return loss, num_items.item() if isinstance(num_items, torch.Tensor) else num_items


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The default ``loss_fn``: the loss that the model itself returns for ``model(**batch)``.

    Raises:
        ModelError: It returned none; the message says why and what to do.
        DataError: The batch has no labels.
    """
    return require_loss(model, batch, model(**batch))


def require_loss(model: nn.Module, batch: Batch, outputs: Any) -> Tensor:
    """Take the loss out of a model's outputs, or say why there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    name = model_name(model)
    if isinstance(outputs, torch.Tensor) and outputs.ndim == 0:
        raise ModelError(
            f"{name}.forward returned a 0-d Tensor, not an output with a loss. If that is the "
            "loss: loss_fn=lambda model, batch: model(**batch)."
        )
    if not isinstance(outputs, Mapping) and not hasattr(outputs, "loss"):
        shape = f" of shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else ""
        raise ModelError(
            f"{name}.forward returned a {type(outputs).__name__}{shape}, not an output with a "
            f"loss. Pass the loss as a function: {example_loss(model, batch, outputs)}."
        )
    if "labels" not in batch and "start_positions" not in batch:
        raise DataError(no_labels_message(batch))
    raise ModelError(no_head_message(model))
