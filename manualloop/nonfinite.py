"""Losses that are NaN or infinite, noticed without waiting and traced to their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from manualloop.batches import is_spare, split_batch
from manualloop.checkpoint.finite import (
    HOW_TO_FIX,
    all_spoilt,
    names_spoilt,
    require_finite,
    shown,
)
from manualloop.errors import NonFiniteError
from manualloop.models import (
    evaluation_mode,
    is_sharded,
    names_not_finite,
    own_part,
    unwrap_model,
)
from manualloop.notices import say
from manualloop.reading.sources import Source
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy
from manualloop.strategy.transfer import LateTensor
from manualloop.tasks.loss import loss_terms
from manualloop.tasks.otherwise import objection_to
from manualloop.tasks.task import resolve_task
from manualloop.types import LossFn, OnNonfinite, Terms, Update, Window
from manualloop.update import finiteness

_NUM_ROWS_NAMED = 3
_LAG = 2  # updates after which the flag of an earlier one has long landed
_NUM_UNTOLD = 8  # updates that share one wait for the device; their batches are kept so long
_OF_ROWS = 'Fix the rows, or skip such updates: on_nonfinite="skip".'


class Watch:
    """Watches for updates that were not finite, and acts on them.

    What the host knows at once is acted on before anything moves. Other updates leave a flag on the
    device, and flags are read in order once they have reached the host: from the first bad update
    on, the device has left the weights alone.

    Args:
        state: State of the run.
        source: Loader whose batches the run reads.
        loss_fn: As in ``train_steps``.
        terms: As in ``train_steps``.
        strategy: Strategy that runs the model.
        on_nonfinite: As in ``train_steps``.
        by_step_fn: Whether a ``step_fn`` of the user makes the updates.
    """

    def __init__(
        self,
        state: TrainState,
        source: Source,
        loss_fn: LossFn | None,
        terms: Terms | None,
        strategy: Strategy,
        on_nonfinite: OnNonfinite,
        *,
        by_step_fn: bool = False,
    ) -> None:
        self._explain = partial(
            _explain, source=source, loss_fn=loss_fn, terms=terms, strategy=strategy
        )
        self._explain_made = partial(_explain_made, source=source, strategy=strategy)
        self._state, self._strategy = state, strategy
        self._must_agree = strategy.world_size > 1
        self._raises = on_nonfinite == "raise"
        self._is_lone = by_step_fn and self._raises
        self._has_reported = False
        self._flags: list[tuple[LateTensor, Callable[[], NonFiniteError]]] = []

    def watches(self, update: Update) -> bool:
        """Tell whether to look at an update that the host does not know to be finite."""
        return update.is_finite is not None or self._is_lone

    def look_at(self, update: Update, window: Window) -> None:
        """Act on an update that is not finite, or of which the host does not know it yet.

        Called before the position moves past its window.
        """
        progress = self._state.progress
        is_made = update.is_finite is None  # by a step_fn that did not look at it
        error = partial(
            self._explain_made if is_made else self._explain,
            self._state,
            window,
            step=progress.num_steps + 1,
            epoch=progress.epoch,
            update=update,
        )
        is_finite = finiteness(update.loss) if is_made else update.is_finite
        if is_finite is True:
            return
        if isinstance(is_finite, Tensor):
            self._flags.append((LateTensor(is_finite), error))
            self.settle(wait=False)
        elif self._raises or all_spoilt(self._state, self._strategy):
            raise error()  # with such weights every update to come would be skipped, too
        elif not self._has_reported:
            self._has_reported = True
            say(f"skipped an update: {error()} Further skipped updates are only counted.")

    def settle(self, *, wait: bool) -> None:
        """Read the flags that have reached the host; with ``wait`` read all of them."""
        if self._flags and not self._flags[0][0].tells:
            if not wait and len(self._flags) < _NUM_UNTOLD:
                return
            wait, has_failed = True, self._state.has_failed
            if has_failed is not None and not bool(has_failed):  # the one wait for all of them
                self._flags.clear()
        while self._flags and (wait or self._is_due()):
            flag, error = self._flags.pop(0)
            if not flag.read():
                raise error()

    def end(self) -> bool:
        """Look at all updates, and at the weights that the last one has left; return True.

        No loss after it will tell.

        Raises:
            NonFiniteError: One was not finite, or some weights are not.
        """
        self.settle(wait=True)
        require_finite(self._state, self._strategy)
        return True

    def _is_due(self) -> bool:
        if self._must_agree:  # ranks that read a flag after different steps would diverge
            return len(self._flags) > _LAG
        return self._flags[0][0].has_landed()


def _explain(
    state: TrainState,
    window: Window,
    *,
    source: Source,
    step: int,
    epoch: int,
    update: Update,
    loss_fn: LossFn | None,
    terms: Terms | None,
    strategy: Strategy,
) -> NonFiniteError:
    """Find the rows of a window whose own loss, or gradient, is not finite, one pass each.

    Args:
        state: State with the weights from before the update.
        window: Window that gave the loss.
        source: Loader that the window came from.
        step: Number of the update that was not made, counted from 1.
        epoch: Number of the epoch, counted from 0.
        update: Update that was not finite.
        loss_fn: As in ``train_steps``.
        terms: As in ``train_steps``.
        strategy: Strategy that runs the model.

    Returns:
        The error to raise, which names step, epoch, batch and rows.
    """
    model, first = state.model, source.place(window.starts[0], epoch).batch
    wrong = _wrong_weights(state, strategy)
    by_gradient = math.isfinite(update.loss.item())
    own: list[str] = []
    for batch, start in zip(window.batches, window.starts, strict=True) if not wrong else ():
        place = source.place(start, epoch)
        bad = _bad_rows(model, batch, loss_fn, terms, strategy, by_gradient=by_gradient)
        own += [place.row(number) for number in bad]
    rows = [
        f"{row} on rank {rank}" if strategy.world_size > 1 else row
        for rank, of_rank in enumerate(strategy.gather(own))
        for row in of_rank
    ]
    if wrong:
        where = f"the weights were not finite before it: {shown(wrong)}"
    elif rows:
        where = f"it comes from {shown(rows)}"
    else:
        where = (
            f"no row of {first} causes it by itself. If the steps are too large, use a lower "
            f"learning rate{', or max_grad_norm=1.0' if update.grad_norm is None else ''}"
        )
    found = [f"The loss is {update.loss.item()}"]
    if update.grad_norm is not None:
        found.append(f"the gradient norm {update.grad_norm.item()}")
    return NonFiniteError(
        f"{', '.join(found)} at step {step} (epoch {epoch}); {where}. The weights are those from "
        f"before this step.{_spoilt_buffers(model)} {HOW_TO_FIX if wrong else _OF_ROWS}"
    )


def _wrong_weights(state: TrainState, strategy: Strategy) -> list[str]:
    """Name the weights that are not finite on any rank, those that no optimizer has included."""
    weights = dict(unwrap_model(state.model, adapters=False).named_parameters())
    names = [name for name in names_not_finite(weights) if _has_nan(weights[name])]
    found = strategy.gather([*names_spoilt(state), *names])
    return list(dict.fromkeys(name for of_rank in found for name in of_rank))


def _spoilt_buffers(model: nn.Module) -> str:
    """Name the buffers that hold NaN, such as running means: the forward pass has written them."""
    names = [
        name
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.element_size() > 1 and _has_nan(buffer)
    ]
    if not names:
        return ""
    return f" The forward pass has left NaN in buffers: {', '.join(names[:_NUM_ROWS_NAMED])}."


def _explain_made(
    state: TrainState,
    window: Window,
    *,
    source: Source,
    step: int,
    epoch: int,
    update: Update,
    strategy: Strategy,
) -> NonFiniteError:
    """Describe an update of a ``step_fn`` whose loss is not finite: it has been made already.

    Nothing is exchanged between ranks, since each may have a loss of its own.
    """
    rows: list[str] = []
    are_finite = not names_not_finite(dict(state.model.named_parameters()))
    for batch, start in zip(window.batches, window.starts, strict=True):
        place = source.place(start, epoch)
        bad = _rows_with_nan(batch)
        if not bad and are_finite:
            bad = _bad_rows(state.model, batch, None, None, strategy)
        rows += [place.row(number) for number in bad]
    first = source.place(window.starts[0], epoch).batch
    where = f"nothing in {first} is NaN or infinite by itself"
    if rows:
        where = f"it comes from {shown(rows)}"
    on_rank = f" on rank {strategy.rank}" if strategy.world_size > 1 else ""
    return NonFiniteError(
        f"The loss that step_fn returned is {update.loss.item()} at step {step} (epoch {epoch})"
        f"{on_rank}; {where}. step_fn has already made its update, so the weights may not be "
        "finite any more: resume from the last checkpoint. Let step_fn look at the loss before "
        'optimizer.step() and return Update(loss, 0, applied=False), or pass on_nonfinite="ignore".'
    )


def _rows_with_nan(batch: Any) -> list[int]:
    """Return the rows of a batch in which a column holds NaN or infinity."""
    columns = batch.values() if isinstance(batch, Mapping) else batch
    columns = columns if isinstance(columns, Iterable) else ()
    tensors = [batch] if isinstance(batch, Tensor) else columns
    found: set[int] = set()
    for column in tensors:
        if isinstance(column, Tensor) and column.is_floating_point() and column.ndim:
            wrong = ~torch.isfinite(column).reshape(len(column), -1).all(dim=1)
            found |= set(wrong.nonzero().flatten().tolist())
    return sorted(found)


def _has_nan(buffer: Tensor) -> bool:
    return bool(torch.isnan(own_part(buffer)).any())


def _bad_rows(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None,
    terms: Terms | None,
    strategy: Strategy,
    *,
    by_gradient: bool = False,
) -> list[int]:
    bad: list[int] = []
    several = strategy.world_size > 1
    if is_spare(batch) or is_sharded(model) or (several and objection_to(model, batch)):
        return bad  # a pass takes all ranks, which have different rows
    model = unwrap_model(model, adapters=False)
    task = None
    # An error that one row alone causes in the model or loss_fn must not hide the one to be raised.
    with suppress(Exception), evaluation_mode(model, strategy.device, inference=not by_gradient):
        for number, row in enumerate(split_batch(batch, 1)):
            task = resolve_task(model, row, task)
            counts = task.count(row)
            if counts and not any(counts) and terms is None:
                continue  # its mean is 0/0, and is left out of the window's
            with strategy.autocast():
                found = loss_terms(model, strategy.to_device(row), counts, loss_fn, terms)
            used = [mean for mean, num_items in found if num_items is None or num_items > 0]
            if by_gradient:
                weights = [weight for weight in model.parameters() if weight.requires_grad]
                gradients = torch.autograd.grad(sum(used), weights, allow_unused=True)
                used = [gradient for gradient in gradients if gradient is not None]
            if not all(bool(torch.isfinite(numbers).all()) for numbers in used):
                bad.append(number)
    return bad
