"""The loss of an evaluation: the terms of each batch, those of each row, and their mean."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from math import isfinite, isnan, nan
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manualloop.batches import shared_rows
from manualloop.errors import ModelError
from manualloop.models import unwrap_model
from manualloop.notices import say
from manualloop.tasks.loss import (
    Term,
    declared_items,
    find_loss,
    listed_terms,
    model_terms,
    own_terms,
    read_items,
    require_mean,
)
from manualloop.tasks.task import IGNORE_INDEX, Task, best_class
from manualloop.types import LossFn, Terms


class Made(NamedTuple):
    """A batch and what the model computed from it.

    Attributes:
        number: Number of the batch.
        batch: The batch as the loader gave it.
        inputs: The batch on the model's device.
        outputs: The outputs of the last forward pass; None if ``loss_fn`` made none.
        loss: What ``loss_fn`` returned; None without one.
        task: The task of the model and this batch.
    """

    number: int
    batch: Any
    inputs: Any
    outputs: Any
    loss: Any
    task: Task


class RowLosses:
    """The loss of each row as a sum over its items, and their number.

    A batch of one row tells it. A larger one tells only the mean over its rows: for the heads of
    transformers the loss of each is computed by the formula of the task, and believed if the rows
    give that mean. Other losses are not guessed: with label smoothing, balanced classes may give
    the same mean as without.

    Attributes:
        sums: Sum over the items of each row.
        items: Number of items of each row.
        are_known: Whether this is true of every batch so far.
    """

    def __init__(self) -> None:
        self.sums, self.items, self.are_known = array("d"), array("d"), True

    def add(
        self,
        outputs: Any,
        inputs: Any,
        task: Task,
        terms: Sequence[tuple[float, float]],
        *,
        is_models: bool,
    ) -> None:
        """Add the rows of a batch.

        Args:
            outputs: Outputs of the model.
            inputs: The batch, where the outputs are.
            task: The task.
            terms: The terms of its loss: means, and the items that each is over.
            is_models: Whether the loss is the one that the model computes.
        """
        if not self.are_known or not terms:
            return
        if len(terms) == 1 and shared_rows(inputs) == 1 and not isnan(terms[0][1]):
            mean, num_items = terms[0]
            self.sums.append(mean * num_items if num_items else 0.0)
            self.items.append(num_items)
            return
        is_known = len(terms) == 1 and is_models and _is_of_transformers(task.model)
        found = _by_formula(outputs, inputs, task) if is_known else None
        if found is None or not _fits(found, *terms[0]):
            self.are_known = False
            return
        sums, items = found
        self.sums.extend(sums.double().tolist())
        self.items.extend(items.tolist())


class Losses:
    """The terms of the losses of batches, 20 bytes for each.

    Args:
        by_row: Whether the loss of each row is wanted, too.

    Attributes:
        rows: The losses of the rows; None if they are not wanted.
        means: The means of all batches, one after the other.
        items: The items that each is over; NaN where nothing tells them.
        widths: Number of terms of each batch.
    """

    def __init__(self, *, by_row: bool = False) -> None:
        self.rows = RowLosses() if by_row else None
        self.means, self.items, self.widths = array("d"), array("d"), array("i")

    def add(self, made: Made, loss_fn: LossFn | None, terms: Terms | None) -> bool | None:
        """Add the terms of a batch. Called under the strategy's autocast.

        Returns:
            Whether the loss is finite; None if the model returned none.
        """
        found = _terms_of(made, loss_fn, terms)
        self.widths.append(len(found) if found else 0)
        if found is None:
            return None
        is_finite = True
        for mean, num_items in found:
            value = float(require_mean(mean, trains=False))
            is_finite = is_finite and isfinite(value)
            self.means.append(value)
            self.items.append(nan if num_items is None else read_items(num_items))
        if self.rows is not None:
            last = zip(self.means[-len(found) :], self.items[-len(found) :], strict=True)
            self.rows.add(
                made.outputs,
                made.inputs,
                made.task,
                list(last) if found else [],
                is_models=loss_fn is None and terms is None,
            )
        return is_finite

    def __iter__(self) -> Iterator[list[tuple[float, float]]]:
        """Yield the terms of each batch."""
        terms = zip(self.means, self.items, strict=True)
        for width in self.widths:
            yield [next(terms) for _ in range(width)]


def _terms_of(made: Made, loss_fn: LossFn | None, terms: Terms | None) -> list[Term] | None:
    """Return the terms of a batch's loss; None if the model returned no loss."""
    if loss_fn is None and terms is None:
        counts = () if made.task.objection else made.task.count(made.batch)
        loss = find_loss(made.outputs)
        if loss is None:
            return None
        return model_terms(loss, made.outputs, made.inputs, counts)
    declared = declared_items(loss_fn) if loss_fn is not None else None
    counts = (declared or made.task.count)(made.batch)
    default = counts[0] if counts else None
    found = (
        listed_terms(terms(made.outputs, made.inputs))
        if terms is not None
        else own_terms(made.loss)
    )
    return [(mean, default if num_items is None else num_items) for mean, num_items in found]


def whole_loss(of_ranks: Sequence[Losses]) -> float | None:
    """Return the loss over all batches from the terms of each; None if there is no item.

    If nothing tells the items of a batch, all batches weigh the same, and a message tells that.

    Args:
        of_ranks: The losses of each rank: batch k is on rank k % world_size.
    """
    losses = [of_batch for turn in zip_longest(*of_ranks) for of_batch in turn if of_batch]
    if len({*map(len, losses)}) > 1:
        raise ModelError(
            "The loss has other numbers of terms for some batches of the loader. Let terms return "
            "the same terms for each; one without items in a batch gets 0 of them."
        )
    if any(isnan(num_items) for of_batch in losses for _, num_items in of_batch):
        if len(losses) > 1:
            say(
                "the loss is the mean of the batches' means: nothing tells how many rows they "
                "have. Let loss_fn return (mean_loss, num_items), or pass terms=."
            )
        losses = [[(mean, 1.0) for mean, _ in of_batch] for of_batch in losses]
    means = [
        sum(mean * num_items for mean, num_items in term if num_items) / total
        for term in zip(*losses, strict=True)
        if (total := sum(num_items for _, num_items in term))
    ]
    return sum(means) if means else None


def _is_of_transformers(model: nn.Module) -> bool:
    return type(unwrap_model(model)).__module__.startswith("transformers.")


def _by_formula(outputs: Any, inputs: Any, task: Task) -> tuple[Tensor, Tensor] | None:
    """Return the sum and the items of each row; None for other tasks and shapes."""
    is_mapping = isinstance(outputs, Mapping)
    logits = outputs.get("logits") if is_mapping else getattr(outputs, "logits", outputs)
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or not labels.ndim:
        return None
    logits, rows = logits.detach().float(), len(labels)
    if task.rules.predict is best_class and not labels.is_floating_point():
        if "shift_labels" in inputs:
            labels = inputs["shift_labels"]
        elif task.rules.shifts_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        if logits.shape[:-1] != labels.shape:
            return None
        flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
        losses = F.cross_entropy(*flat, reduction="none", ignore_index=IGNORE_INDEX)
        items = (labels != IGNORE_INDEX).reshape(rows, -1).sum(1)
    elif task.name in ("multi_label_classification", "regression"):
        if logits.numel() != labels.numel() or len(logits) != rows:
            return None
        pairs = logits.reshape(rows, -1), labels.reshape(rows, -1).float()
        function: Any = F.mse_loss
        if task.name != "regression":
            function = F.binary_cross_entropy_with_logits
        losses = function(*pairs, reduction="none")
        items = torch.full((rows,), losses.shape[1], device=losses.device)
    else:
        return None
    return losses.reshape(rows, -1).sum(1), items


def _fits(found: tuple[Tensor, Tensor], mean: float, num_items: float) -> bool:
    sums, items = found
    number = float(items.sum())
    if number != num_items:
        return False
    # Wide enough for the order of a sum in float32, and for no other formula.
    return number == 0 or abs(float(sums.double().sum()) / number - mean) <= 1e-5 * abs(mean) + 1e-7
