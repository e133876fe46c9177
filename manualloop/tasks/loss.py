"""The loss of a batch as means, each with the number of its items.

Everything that adds up losses (an update, an evaluation, the search for a bad row, a proof) takes
them apart here, whether the model returned the loss or a ``loss_fn`` did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from manualloop.errors import DataError, ModelError
from manualloop.mistakes import no_head_message, no_labels_message, no_loss_message
from manualloop.types import Batch, LossFn

Term: TypeAlias = "tuple[Tensor, float]"
"""A mean, and the number of items it is over. A loss is the mean of its terms' means."""


def loss_terms(
    model: nn.Module, batch: Any, counts: Sequence[float], loss_fn: LossFn | None = None
) -> list[Term]:
    """Run a batch through the model, and return the terms of its loss.

    Args:
        model: Called as ``model(**batch)``, unless there is a ``loss_fn``.
        batch: A batch on the model's device.
        counts: The items that ``Task.count`` found in the batch.
        loss_fn: As in ``train_steps``; None for the loss that the model returns.

    Raises:
        ModelError: The model returned no loss; the message says why and what to do.
        DataError: The batch has no labels.
    """
    if loss_fn is not None:
        return own_terms(loss_fn(model, batch), counts)
    outputs = model(**batch)
    loss = find_loss(outputs)
    if loss is None:
        raise no_loss(model, batch, outputs)
    return model_terms(loss, outputs, batch, counts)


def own_terms(result: Any, counts: Sequence[float]) -> list[Term]:
    """Take apart what a ``loss_fn`` returned: a mean, or a mean and its items.

    Items may be a fraction: with class weights they are the sum of the rows' weights.

    Raises:
        ModelError: It returned None.
    """
    loss, num_items = result if isinstance(result, tuple) else (result, counts[0])
    if loss is None:
        raise ModelError(
            "loss_fn returned None. Let it end with return loss, or return loss, num_items."
        )
    return [(loss, num_items.item() if isinstance(num_items, Tensor) else num_items)]


def model_terms(loss: Any, outputs: Any, batch: Batch, counts: Sequence[float]) -> list[Term]:
    """Take apart the loss that a model returned with its outputs."""
    if len(counts) == 1:
        return [(loss, counts[0])]
    return list(zip(_position_losses(outputs, batch), counts, strict=True))


def _position_losses(outputs: Any, batch: Batch) -> list[Tensor]:
    """Return the two means of a question answering head: of start and of end positions.

    The formula is that of transformers' ``ForQuestionAnsweringLoss``: positions beyond the input
    are left out of the mean.
    """
    losses = []
    for key, name in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
        logits = outputs[key] if isinstance(outputs, Mapping) else getattr(outputs, key)
        length = logits.shape[1]
        positions = batch[name].reshape(-1).clamp(0, length)
        losses.append(nn.functional.cross_entropy(logits, positions, ignore_index=length))
    return losses


def find_loss(outputs: Any) -> Any:
    """Return the loss among a model's outputs; None if there is none."""
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def no_loss(model: nn.Module, batch: Batch, outputs: Any) -> ModelError | DataError:
    """Return the error about outputs without a loss, which says why there is none."""
    if not isinstance(outputs, Mapping) and not hasattr(outputs, "loss"):
        return ModelError(no_loss_message(model, batch, outputs))
    if "labels" not in batch and "start_positions" not in batch:
        return DataError(no_labels_message(batch))
    return ModelError(no_head_message(model))
