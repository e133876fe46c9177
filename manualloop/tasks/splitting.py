"""Whether a batch may be split into smaller ones without another update.

It may if the loss is known to be a mean over items of single rows: the loss of a head of
transformers, on a model in which no row depends on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from manualloop.batches import model_inputs, num_rows, shared_rows, split_batch
from manualloop.errors import DataError
from manualloop.models import (
    batch_statistics,
    coarsest_dtype,
    evaluation_mode,
    is_sharded,
    model_name,
    unwrap_model,
)
from manualloop.notices import say
from manualloop.strategy.base import Strategy
from manualloop.tasks.isolation import inputs_of
from manualloop.tasks.loss import find_loss
from manualloop.tasks.otherwise import balances_experts
from manualloop.tasks.shares import buffers_kept
from manualloop.tasks.task import Task, count_rows
from manualloop.types import LossFn, Terms

_HEADS = (
    "ForSequenceClassification", "ForTokenClassification", "ForImageClassification",
    "ForVideoClassification", "ForAudioClassification", "ForAudioFrameClassification",
    "ForEntitySpanClassification", "ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForMultipleChoice",
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


_LOOKED_AT: WeakSet[nn.Module] = WeakSet()


def report_statistics(model: nn.Module) -> None:
    """Report, once for a model, a layer that makes another update of each split of the rows."""
    if model in _LOOKED_AT:
        return
    _LOOKED_AT.add(model)
    if layer := batch_statistics(model):
        say(
            f"{layer} computes statistics over each micro-batch: another split of the rows is "
            "another update. To keep it out of that, put it into eval mode, or use GroupNorm."
        )


_TRIED: WeakSet[nn.Module] = WeakSet()


def report_own_loss(model: nn.Module, batch: Any, task: Task | None, strategy: Strategy) -> None:
    """Report a loss of a module of one's own that is no mean over the items that are counted.

    The first batch of several rows is run as a whole and in two halves, without a trace. Class
    weights, a sum, and rows that are compared with each other make a difference.

    Args:
        model: The model, which returns its loss.
        batch: A batch, as the loader gave it.
        task: Its task.
        strategy: The strategy.
    """
    has_labels = isinstance(batch, Mapping) and "labels" in batch
    if not has_labels or model in _TRIED or task is None or task.objection or is_sharded(model):
        return
    counts = task.count(batch)
    if _has_known_loss(model) or len(counts) != 1 or (shared_rows(batch) or 0) < 2:
        return
    _TRIED.add(model)
    inner = unwrap_model(model, adapters=False)
    parts = [batch, *split_batch(batch, (num_rows(batch) + 1) // 2)]
    found: list[tuple[Tensor, float]] = []
    state = torch.get_rng_state()
    try:
        with evaluation_mode(inner, strategy.device), buffers_kept(inner), strategy.autocast():
            for part in parts:
                columns = inputs_of(inner, strategy.to_device(part))
                loss = find_loss(inner(**columns)).reshape(()).float()
                found.append((loss, task.count(part)[0]))
            is_random = not torch.equal(state, torch.get_rng_state())
    except Exception:
        return  # the pass that follows raises it too, and explains it
    (whole, _), *halves = found
    number = sum(items for _, items in halves)
    if is_random or not number:
        return
    split: Any = sum(loss * items for loss, items in halves if items) / number
    rounding = max(1e-3, 8 * torch.finfo(coarsest_dtype(inner, strategy.device)).eps)
    largest = torch.stack([loss.abs() for loss, items in found if items]).max()
    is_other = (whole - split).abs() > rounding * largest
    if is_other.item():  # the only wait; False if one of them is NaN
        weights = " and ".join(f"{items:g}" for _, items in halves)
        say(
            f"the loss of {model_name(model)} depends on how rows are split: it is {whole:.4g} for "
            f"the {num_rows(batch)} rows of a batch, and {split:.4g} by two halves, weighed by "
            f"their {weights} items. So do the updates of several micro-batches or ranks, and the "
            "loss of an evaluation. If it is a mean over other items, such as class weights or "
            "rows, let a loss_fn return (mean_loss, num_items)."
        )


def try_lone_row(
    model: nn.Module,
    batches: Sequence[Any],
    *places: Any,
    check: Callable[..., Task | None],
    loss_fn: LossFn | None,
    strategy: Strategy,
) -> Task | None:
    """Check a first window, and refuse a model that cannot be trained on the last row of an epoch.

    Batch normalisation over the rows alone needs two of them; one over the pixels of an image does
    not. So the first row is run in training, without a trace.

    Args:
        model: The model.
        batches: The micro-batches of the window.
        places: Further arguments of the check.
        check: The check that comes first.
        loss_fn: The loss; None for that of the model.
        strategy: The strategy.

    Raises:
        DataError: A batch of one row cannot be normalised.
    """
    task, batch, inner = check(model, batches, *places), batches[0], unwrap_model(model)
    if is_sharded(model) or not shared_rows(batch):
        return task
    trains = {module: module.training or not inner.training for module in inner.modules()}
    try:
        with evaluation_mode(inner, strategy.device), buffers_kept(inner), strategy.autocast():
            for module, training in trains.items():
                module.training = training
            layer = batch_statistics(inner)
            if layer is not None:
                row = strategy.to_device(split_batch(batch, 1)[0])
                inner(**inputs_of(inner, row)) if loss_fn is None else loss_fn(inner, row)
    except Exception as error:  # any other is explained where it is raised again
        if "more than 1 value per channel" in str(error):
            raise DataError(
                "The last batch of each epoch has one row, and batch normalisation needs two in "
                "training. Leave it out with drop_last=True of the loader, or choose another "
                "batch_size."
            ) from error
    return task


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
