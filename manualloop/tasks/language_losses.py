"""Losses of causal language models: cross-entropy at the labelled tokens, and distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from manualloop.errors import ConfigError, ModelError
from manualloop.models import has_soft_prompt, model_name
from manualloop.tasks.frozen import frozen_pass
from manualloop.tasks.heads import (
    hidden_states,
    in_pieces,
    labelled,
    labels_of,
    proved_head,
    token_losses,
)
from manualloop.tasks.task import IGNORE_INDEX, count_shifted_labels


def lm_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the mean cross-entropy of the labelled tokens, and their number.

    It is the loss that a causal language model of transformers returns, in a fraction of its
    memory: logits are made at the labelled positions only, in float32, and in pieces that are made
    again for the backward pass. It declares its items, so that windows are planned by them.

    Before the first batch the loss of a few tokens is compared with the model's own, so that heads
    that scale or cap their logits in an unknown way are refused. The outputs of the model have the
    logits of the last position alone: metrics of tokens need the model's own loss.

    Args:
        model: A causal language model of transformers, wrapped or not.
        batch: A batch with ``labels``, -100 where there is none, or with ``shift_labels``.

    Raises:
        DataError: The batch has no labels.
        ModelError: The model's own loss is another one, or a soft prompt predicts first tokens.

    ::

        train_loop(model, loaders["train"], loss_fn=lm_loss, gradient_accumulation_steps=4)
        evaluate_loop(model, loaders["validation"], "perplexity", loss_fn=lm_loss)
    """
    if has_soft_prompt(model):
        _refuse_first_labels(model, batch)
    head, hidden, labels, _, _ = labelled(model, batch)
    losses = in_pieces(token_losses, (head,), hidden, labels)
    return losses.sum() / max(len(labels), 1), len(labels)


def _refuse_first_labels(model: nn.Module, batch: Any) -> None:
    """Refuse rows whose first token has a label, which a soft prompt predicts.

    Raises:
        ModelError: The message tells what to do.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and bool((labels[..., 0] != IGNORE_INDEX).any()):
        raise ModelError(
            f"The soft prompt of {model_name(model)} predicts the first token of a row, which has "
            "a label here and no place in lm_loss. Train with the loss that the model returns: "
            "leave loss_fn=lm_loss out; or leave that token out of the labels: "
            'batch["labels"][:, 0] = -100.'
        )


def _items(batch: Any) -> int:
    return int(count_shifted_labels(batch)[0])


lm_loss.items = _items  # type: ignore[attr-defined]
lm_loss.compares_rows = False  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Distillation:
    """The loss that ``distil`` returns.

    Attributes:
        teacher: The model that is imitated.
        temperature: Number by which the logits of both are divided.
        alpha: Share of the teacher in the loss.
        compares_rows: Whether the loss of a row depends on the rows beside it.
    """

    teacher: nn.Module
    temperature: float
    alpha: float
    compares_rows: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """Return the mean over the labelled tokens of a batch, and their number."""
        with frozen_pass(self.teacher, model, batch, "teacher") as teacher:
            wanted = proved_head(teacher, batch)
            states, _ = hidden_states(teacher, batch, labels_of(batch).shape[-1])
        head, hidden, labels, places, _ = labelled(model, batch)
        columns = hidden, states.flatten(0, -2)[places], labels
        losses = in_pieces(self._of_tokens, (head, wanted), *columns)
        return losses.sum() / max(len(labels), 1), len(labels)

    def _of_tokens(self, logits: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        if logits.shape != wanted.shape:
            raise ModelError(
                f"The teacher has {wanted.shape[-1]} logits for each token, the model "
                f"{logits.shape[-1]}. Take a {model_name(self.teacher)} with the same tokenizer."
            )
        mine, theirs = (log_softmax(part / self.temperature, -1) for part in (logits, wanted))
        apart = kl_div(mine, theirs.detach(), reduction="none", log_target=True).sum(-1)
        losses = self.alpha * self.temperature**2 * apart
        if self.alpha < 1:
            losses = losses + (1 - self.alpha) * token_losses(logits, labels)
        return losses

    def items(self, batch: Any) -> int:
        """Count the labelled tokens of a batch."""
        return _items(batch)


def distil(teacher: nn.Module, *, temperature: float = 1.0, alpha: float = 0.5) -> Distillation:
    """Return a loss that lets a language model imitate another one with the same vocabulary.

    At each labelled token it is ``alpha * temperature**2 * KL(teacher || model) + (1 - alpha) *
    cross-entropy``, where the logits of both are divided by the temperature in the first part
    (Hinton et al. 2015). Its items are the labelled tokens.

    The teacher runs in evaluation mode, without gradients, on the device of the batch. It is not
    trained and not saved.

    Args:
        teacher: A causal language model with the vocabulary of the model.
        temperature: Number by which the logits of both are divided.
        alpha: Share of the teacher in the loss, 0 to 1.

    Raises:
        ConfigError: A number is beyond its bounds.

    ::

        train_loop(model, loaders["train"], loss_fn=distil(teacher, temperature=2.0, alpha=0.5))
    """
    if not temperature > 0 or not 0 <= alpha <= 1:
        raise ConfigError(
            f"temperature must be above 0 and alpha between 0 and 1, got {temperature!r} and "
            f"{alpha!r}."
        )
    if not isinstance(teacher, nn.Module):
        raise ConfigError(f"teacher is a {type(teacher).__name__}, not a model.")
    return Distillation(teacher, float(temperature), float(alpha))
