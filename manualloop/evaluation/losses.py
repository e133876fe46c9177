"""The loss of an evaluation: the terms of each batch, and their means over all items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from manualloop.errors import ModelError
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
        batch: The batch as the loader gave it.
        inputs: The batch on the model's device.
        outputs: The outputs of the last forward pass; None if ``loss_fn`` made none.
        loss: What ``loss_fn`` returned; None without one.
        task: The task of the model and this batch.
    """

    batch: Any
    inputs: Any
    outputs: Any
    loss: Any
    task: Task


def terms_of(
    made: Made, loss_fn: LossFn | None, terms: Terms | None
) -> list[tuple[float, float | None]] | None:
    """Return the terms of a batch's loss; None if the model returned no loss.

    The items of a term are None where nothing tells them. Called under the strategy's autocast.
    """
    counts = made.task.count(made.batch)
    found: list[Term]
    if loss_fn is not None:
        found = own_terms(made.loss)
        if (declared := declared_items(loss_fn)) is not None:
            counts = declared(made.batch)
    elif terms is not None:
        found = listed_terms(terms(made.outputs, made.inputs))
    elif (loss := find_loss(made.outputs)) is None:
        return None
    else:
        if made.task.objection:
            counts = ()
        found = model_terms(loss, made.outputs, made.inputs, counts)
    default = counts[0] if counts else None
    return [
        (float(require_mean(mean, trains=False)), default if n is None else read_items(n))
        for mean, n in found
    ]


def whole_loss(losses: Sequence[Sequence[tuple[float, float | None]]]) -> float | None:
    """Return the loss over all batches from the terms of each; None if there is no item.

    If nothing tells the items of a batch, all batches weigh the same, and a message tells that.
    """
    if len({*map(len, losses)}) > 1:
        raise ModelError(
            "The loss has other numbers of terms for some batches of the loader. Let terms return "
            "the same terms for each; one without items in a batch gets 0 of them."
        )
    if any(items is None for of_batch in losses for _, items in of_batch):
        if len(losses) > 1:
            say(
                "the loss is the mean of the batches' means: nothing tells how many rows they "
                "have. Let loss_fn return (mean_loss, num_items), or pass terms=."
            )
        losses = [[(mean, 1) for mean, _ in of_batch] for of_batch in losses]
    means = [
        sum(mean * items for mean, items in term if items) / total
        for term in zip(*losses, strict=True)
        if (total := sum(items or 0 for _, items in term))
    ]
    return sum(means) if means else None
