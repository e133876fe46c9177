"""The loss of an evaluation: the terms of each batch, and their means over all items."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from math import isfinite, isnan, nan
from typing import Any, NamedTuple

from manualloop.errors import ModelError
from manualloop.evaluation.row_losses import RowLosses
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
from manualloop.tasks.task import Task
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
        loss = find_loss(made.outputs)
        if loss is None:
            return None
        counts = () if made.task.objection else made.task.count(made.batch)
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
