"""Whether a batch may be split into smaller ones without another update.

It may if the loss is known to be a mean over items of single rows: the loss of a head of
transformers, on a model in which no row depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manualloop.batches import model_inputs, num_rows, shared_rows
from manualloop.models import batch_statistics, model_name, unwrap_model
from manualloop.tasks.otherwise import balances_experts
from manualloop.tasks.task import Task, count_rows
from manualloop.types import LossFn, Terms

_HEADS = (
    "Classification", "ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForMultipleChoice",
    "ForQuestionAnswering", "ForConditionalGeneration", "ForCTC", "ForSemanticSegmentation",
)  # fmt: skip


def doubt_about_splitting(
    model: nn.Module,
    batches: Sequence[Any],
    task: Task | None,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> str | None:
    """Return why smaller batches might be another update; None if it is known that they are not."""
    is_declared = getattr(loss_fn, "compares_rows", True) is False
    if (loss_fn is not None or terms is not None) and not is_declared:
        return f"nothing tells whether {'terms' if loss_fn is None else 'loss_fn'} compares rows"
    is_known = is_declared or (_has_known_loss(model) and task is not None and not task.objection)
    if not is_known or task is None:
        return f"nothing tells whether the loss of {model_name(model)} compares rows"
    if layer := batch_statistics(model):
        return f"{layer} computes statistics over the batch"
    if task.count is count_rows or not all(map(_has_rows_only, batches)):
        return "not every column of the batch has one entry for each row"
    return None


def _has_known_loss(model: nn.Module) -> bool:
    """Tell whether a model computes the loss that transformers has for its head."""
    model = unwrap_model(model)
    kind = type(model)
    owner = next((cls for cls in kind.__mro__ if "forward" in vars(cls)), kind)
    loss: Any = getattr(model, "loss_function", None)  # users may set another one
    places = (owner.__module__, getattr(loss, "__module__", owner.__module__))
    if not all(str(place).startswith("transformers.") for place in places):
        return False
    return owner.__name__.endswith(_HEADS) and not balances_experts(model)


def _has_rows_only(batch: Any) -> bool:
    if not isinstance(batch, Mapping) or shared_rows(batch) is None:
        return False
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim > 2:
        return False  # its first axis is that of time, height and width
    columns = model_inputs(batch).values()
    return all(isinstance(column, Tensor) and column.ndim for column in columns)


def explain_memory(
    error: torch.OutOfMemoryError, batches: Sequence[Any], doubt: str | None
) -> None:
    """Add to an error what to try.

    Args:
        error: The error, which is raised again.
        batches: The micro-batches of the window.
        doubt: Why smaller batches might be another update; None if they are not.
    """
    rows = max(map(num_rows, batches))
    size = max(rows // 2, 1)
    text = (
        f"Out of memory with {rows} rows at once. Try batch_size={size} with "
        f"gradient_accumulation_steps={-(-rows * len(batches) // size)}, "
    )
    if doubt is None:
        text += "which is the same update."
    else:
        text += (
            "which is the same update if the loss is a mean over items of single rows. This was "
            f"not tried here, because {doubt}: where rows are compared with each other, as in "
            "contrastive losses and batch normalisation, it is another loss."
        )
    error.args = (f"{error}\n{text}",)  # a note would be left out of str(error), and of logs
