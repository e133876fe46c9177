"""The loss of a model that knows nothing, beside which the loss at the start is judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from manualloop.forecast.splits import SplitSummary
from manualloop.models import num_classes, vocab_size
from manualloop.tasks.language_losses import lm_loss
from manualloop.tasks.task import Task
from manualloop.types import LossFn, Terms

_FAR = 1.5  # times the loss of chance, above which a new head is not what it should be


class Chance(NamedTuple):
    """The loss of guessing.

    Attributes:
        loss: The loss.
        name: What it is made of, such as "ln 2".
        of_shares: Loss of guessing by the shares of the classes; None where these are not known.
    """

    loss: float
    name: str
    of_shares: float | None = None


def chance_of(
    model: nn.Module,
    task: Task,
    train: SplitSummary,
    batch: Any,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> Chance | None:
    """Return the loss of guessing; None for losses that are the user's own, and for CTC.

    Args:
        model: The model.
        task: Its task.
        train: The split to train on.
        batch: A batch of it.
        loss_fn: As in ``train_loop``.
        terms: As in ``train_loop``.
    """
    if terms is not None or (loss_fn is not None and loss_fn is not lm_loss):
        return None
    if task.name == "regression":
        if train.labels is None or not train.labels[1]:
            return None
        return Chance(train.labels[1], "the variance of the labels")
    if task.name == "multi_label_classification":
        return Chance(math.log(2), "ln 2", _of_targets(train))
    number = _num_guessed(model, task, batch)
    if number is None or number < 2:
        return None
    shares = entropy([*train.classes.values()]) if len(train.classes) > 1 else None
    return Chance(math.log(number), f"ln {number}", shares)


_OVER_CLASSES = (
    *("single_label_classification", "token_classification"),
    "semantic_segmentation",
)


def _num_guessed(model: nn.Module, task: Task, batch: Any) -> int | None:
    """Return among how many things a guess chooses."""
    if task.name in _OVER_CLASSES:
        return num_classes(model)
    if task.name in ("causal_lm", "masked_lm", "seq2seq_lm"):
        return vocab_size(model)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        return None
    if task.name == "multiple_choice" and ids.ndim == 3:
        return int(ids.shape[1])
    return int(ids.shape[-1]) if task.name == "question_answering" else None


def entropy(counts: Sequence[int]) -> float:
    """Return the entropy of the shares of some classes, in nats.

    >>> round(entropy([1, 1]), 4), entropy([3, 0])
    (0.6931, 0.0)
    """
    total = sum(counts) or 1
    return sum(n / total * math.log(total / n) for n in counts if n)


def _of_targets(train: SplitSummary) -> float | None:
    if not train.classes or not train.num_counted:
        return None
    rows = train.num_counted
    of_each = [entropy([count, rows - count]) for count in train.classes.values()]
    return sum(of_each) / len(of_each)


def doubt_about_start(loss: float, chance: Chance | None, train: SplitSummary) -> str | None:
    """Return a line on a loss at the start that is not what it should be; None if it is."""
    if not math.isfinite(loss):
        return f"The loss of the first batches is {loss}: train_loop would stop there."
    if chance is None:
        return None
    if train.labels is not None:
        mean, variance = train.labels
        if loss <= 10 * variance:
            return None
        return (
            f"The loss begins at {loss:.3g}, and predicting the mean of the labels would give "
            f"{variance:.3g}: their mean is {mean:.3g}. Train on standardised labels: "
            f"(label - {mean:.3g}) / {math.sqrt(variance):.3g}."
        )
    if loss > _FAR * chance.loss + 0.5:
        return (
            f"The loss begins at {loss:.3g}, far above the {chance.loss:.3g} of guessing "
            f"({chance.name}): look at the labels with inspect_batch(loader), and at the head."
        )
    return None
