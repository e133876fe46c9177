"""A loss that is NaN or infinite: which row it comes from, said once, when it has happened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from manualloop.errors import NonFiniteError
from manualloop.models import evaluation_mode
from manualloop.preflight import place_of
from manualloop.strategy import Strategy
from manualloop.tasks import count_items, model_loss, num_rows
from manualloop.types import LossFn, Update, Window
from manualloop.update import split_batch

_NUM_ROWS_NAMED = 3


def explain_nonfinite(
    model: nn.Module,
    window: Window,
    *,
    loader: Iterable[Any],
    num_samples: int,
    step: int,
    epoch: int,
    update: Update,
    loss_fn: LossFn | None,
    strategy: Strategy,
) -> NonFiniteError:
    """Find the rows of a window whose own loss is not finite, one forward pass each.

    Args:
        model: With the weights from before the update.
        window: That gave the loss.
        loader: It came from.
        num_samples: Rows of the epoch before the window.
        step: The update that was not made, counted from 1.
        epoch: Counted from 0.
        update: That was not finite.
        loss_fn: As in ``train_steps``.
        strategy: That runs the model.

    Returns:
        The error to raise, which names step, epoch, batch and rows.
    """
    wrong = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    rows: list[str] = []
    first = place_of(loader, num_samples, epoch).batch
    for batch in window.batches if not wrong else ():
        place = place_of(loader, num_samples, epoch)
        for number in _bad_rows(model, batch, loss_fn, strategy):
            rows.append(place.row(number))
        num_samples += num_rows(batch)
    if wrong:
        where = f"the weights were not finite before it: {', '.join(wrong[:_NUM_ROWS_NAMED])}"
    elif rows:
        more = f" and {len(rows) - _NUM_ROWS_NAMED} more" if len(rows) > _NUM_ROWS_NAMED else ""
        where = f"it comes from {', '.join(rows[:_NUM_ROWS_NAMED])}{more}"
    else:
        where = f"no row of {first} gives it alone: lower the learning rate, or set max_grad_norm"
    found = [f"The loss is {update.loss.item()}"]
    if update.grad_norm is not None:
        found.append(f"the gradient norm {update.grad_norm.item()}")
    return NonFiniteError(
        f"{', '.join(found)} at step {step} (epoch {epoch}); {where}. The weights are those from "
        'before this step. Mend the rows, or leave such updates out: on_nonfinite="skip".'
    )


def _bad_rows(
    model: nn.Module, batch: Any, loss_fn: LossFn | None, strategy: Strategy
) -> list[int]:
    bad = []
    with evaluation_mode(model, strategy.device):
        for number, row in enumerate(split_batch(batch, 1)):
            if count_items(model, row) == 0:
                continue  # its mean is 0/0, and no part of the window's
            with strategy.autocast():
                loss = (loss_fn or model_loss)(model, strategy.to_device(row))
            if not torch.isfinite(loss[0] if isinstance(loss, tuple) else loss):
                bad.append(number)
    return bad
