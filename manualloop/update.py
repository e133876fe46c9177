"""One optimizer update: its window of micro-batches, and its mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from manualloop.errors import DataError, ModelError
from manualloop.internals import heeds_found_inf, skip_where
from manualloop.notices import say
from manualloop.optim import parameters_of, zero_gradients
from manualloop.reading.ranks import as_spare, is_spare
from manualloop.reading.reader import Given, Reader
from manualloop.reading.sources import source_of
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy
from manualloop.strategy.calls import in_call
from manualloop.strategy.select import strategy_in_place
from manualloop.tasks.loss import Term, loss_terms
from manualloop.tasks.task import count_window, num_rows
from manualloop.times import Times
from manualloop.types import LossFn, OnNonfinite, Update, Window

StepFn: TypeAlias = Callable[[TrainState, list[Any], Strategy], Update]
"""``step_fn(state, batches, strategy) -> Update`` replaces the whole update."""


def windows(loader: Iterable[Any], size: int, *, skip: int = 0) -> Iterator[Window]:
    """Group the batches of one pass over a loader into the windows of its updates.

    A window ends with the pass, so the last one may be shorter. Batches are not moved to another
    device. A loader with a length is read one window at a time and never ahead; a stream is read
    one batch ahead, because nothing else tells where it ends.

    Args:
        loader: Any iterable of batches.
        size: Number of micro-batches per window (``gradient_accumulation_steps``).
        skip: Number of rows to leave out at the start of the pass, which must be those of whole
            windows. A prepared loader never loads them; other loaders read and drop them.

    Raises:
        DataError: The number of batches differs from the loader's ``len()``, or rows cannot be
            stacked.

    >>> batches = [{"x": torch.zeros(2)}, {"x": torch.zeros(2)}, {"x": torch.zeros(1)}]
    >>> [(len(window.batches), window.num_samples) for window in windows(batches, 2)]
    [(2, 4), (1, 1)]
    """
    reader = Reader(source_of(loader), {"num_samples": skip})
    for window in group(reader.batches(), size):
        yield window
        reader.settle()  # otherwise it would keep every batch


def group(batches: Iterable[Given], size: int) -> Iterator[Window]:
    """Group the batches of a pass into windows of ``size`` batches."""
    window: list[Any] = []
    starts: list[int] = []
    num_samples = 0
    for given in batches:
        window.append(given.batch)
        starts.append(given.start)
        num_samples += given.num_rows
        if given.is_last or len(window) == size:
            yield Window(window, num_samples, given.is_last, starts)
            window, starts, num_samples = [], [], 0


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    loss_fn: LossFn | None = None,
    strategy: Strategy | None = None,
) -> Update:
    """Add the gradient of the mean loss over all items of a window to the parameters' gradients.

    With ``n_j`` items in micro-batch j and ``N`` items in the window, on all ranks, this is the
    gradient of ``sum(n_j / N * mean_loss_j)``. It equals the gradient of all rows in one batch,
    however they are split. The loss of a single micro-batch on a single rank is not multiplied by
    anything, so that the gradient has the bits of ``loss.backward()``. Call it on every rank;
    otherwise the other ranks wait for ever.

    Args:
        model: Model on the strategy's device, with gradients that are zero or None.
        batches: The micro-batches, on the CPU or the device; the same number on every rank.
        loss_fn: ``loss_fn(model, batch)`` returns a mean loss, or ``(mean_loss, num_items)`` if it
            counts items of its own. None takes the loss that the model returns, over the items
            of ``count_items``.
        strategy: Device, precision and ranks; None takes the strategy that prepared the model, or
            plain torch on the model's device.

    Returns:
        The mean loss and the number of items of the window. If it has no item to learn from,
        ``applied`` is False and no gradient was added.

    >>> def loss_fn(model, batch):
    ...     return ((model(batch["x"]) - batch["labels"]) ** 2).mean()
    >>> batches = [{"x": torch.ones(n, 1), "labels": torch.zeros(n, 1)} for n in (3, 1)]
    >>> accumulate_gradients(nn.Linear(1, 1), batches, loss_fn=loss_fn).num_items
    4
    """
    strategy = strategy_in_place(model) if strategy is None else strategy
    strategy = in_call(strategy, "accumulate_gradients")
    counts, _ = count_window(model, batches)
    return _accumulate(model, batches, counts, loss_fn, strategy, model.parameters, Times())


def _accumulate(
    model: nn.Module,
    batches: Sequence[Any],
    counts: Sequence[Sequence[float]],
    loss_fn: LossFn | None,
    strategy: Strategy,
    parameters: Callable[[], Iterable[Tensor]],
    times: Times,
) -> Update:
    if len(batches) == strategy.world_size == 1:
        return _accumulate_one(model, batches[0], counts[0], loss_fn, strategy, times)
    spare = [strategy.world_size > 1 and is_spare(batch) for batch in batches]
    planned = _plan(counts, spare, loss_fn, strategy)
    weighted_losses: list[Tensor] = []
    num_items: float = 0
    for number, (batch, count, is_none) in enumerate(zip(batches, counts, spare, strict=True), 1):
        with strategy.hold_gradients(model, hold=number < len(batches)):
            terms = _terms(model, batch, count, loss_fn, strategy, times)
            if is_none:
                terms = [(mean, 0) for mean, _ in terms]
            weighted = _weighted_loss(terms, planned, strategy.world_size)
            if weighted is None:
                continue
            strategy.backward(weighted)
        if items := sum(items for _, items in terms):
            weighted_losses.append(weighted.detach())
            num_items += items
    if weighted_losses:
        loss = reduce(torch.add, weighted_losses)
    else:
        loss = torch.zeros_like(terms[0][0].detach())
    total: float = num_items
    if strategy.world_size > 1:
        loss = strategy.sum_over_ranks(loss) / strategy.world_size
        # Without a loss_fn, no rank has counted items other than the planned ones.
        total = sum(planned) if loss_fn is None else strategy.sum_counts([num_items])[0]
    if total == 0:
        return Update(loss, 0, applied=False)
    if loss_fn is not None and total != planned[0]:
        factor = planned[0] / total  # loss_fn counted items other than those of count_items
        for parameter in parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        loss = loss * factor
    return Update(loss, total)


def _accumulate_one(
    model: nn.Module,
    batch: Any,
    counts: Sequence[float],
    loss_fn: LossFn | None,
    strategy: Strategy,
    times: Times,
) -> Update:
    """Take the mean of the only micro-batch for the window's, as the hand-written loop does."""
    terms = _terms(model, batch, counts, loss_fn, strategy, times)
    items = [num_items for _, num_items in terms]
    loss = _weighted_loss(terms, items, 1)
    if loss is None:
        return Update(torch.zeros_like(terms[0][0].detach()), 0, applied=False)
    strategy.backward(loss)
    return Update(loss.detach(), sum(items))


def _terms(
    model: nn.Module,
    batch: Any,
    counts: Sequence[float],
    loss_fn: LossFn | None,
    strategy: Strategy,
    times: Times,
) -> list[Term]:
    """Run a micro-batch through the model; return the terms of its loss."""
    inputs = _to_device(batch, strategy, times)
    with strategy.autocast():
        terms = loss_terms(model, inputs, counts, loss_fn)
    return [(_require_scalar(mean), num_items) for mean, num_items in terms]


def _to_device(batch: Any, strategy: Strategy, times: Times) -> Any:
    if strategy.device.type == "cpu":
        return strategy.to_device(batch)
    begin = perf_counter()
    inputs = strategy.to_device(batch)
    times.copy += perf_counter() - begin
    return inputs


def _plan(
    counts: Sequence[Sequence[float]],
    spare: Sequence[bool],
    loss_fn: LossFn | None,
    strategy: Strategy,
) -> list[float]:
    """Return the number of items of each term in a window, on all ranks.

    With ``loss_fn`` it is a guess: only ``loss_fn`` knows what it counts.
    """
    num_terms = 1 if loss_fn is not None else max(map(len, counts))
    own: list[float] = [0] * num_terms
    for count, is_none in zip(counts, spare, strict=True):
        if len(count) < num_terms:
            raise DataError(
                "The micro-batches of a window differ: some have start and end positions, others "
                "do not. Give all batches start_positions and end_positions; rows without an "
                "answer get a position beyond the tokens."
            )
        for term in range(0 if is_none else num_terms):
            own[term] += count[term]
    planned = strategy.sum_counts(own)
    # loss_fn may count items that the labels do not show.
    return planned if loss_fn is None else [planned[0] or 1]


def _require_scalar(loss: Any) -> Tensor:
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
        return loss if loss.ndim == 0 else loss.reshape(())
    found = f"{type(loss).__name__}"
    if isinstance(loss, Tensor):
        found = f"Tensor of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
    raise ModelError(
        f"The loss is a {found}. It must be one number that depends on trainable parameters: "
        "return losses.mean() from loss_fn, not detached and not under no_grad."
    )


def _weighted_loss(
    terms: Sequence[tuple[Tensor, float]], totals: Sequence[float], world_size: int
) -> Tensor | None:
    """Return a micro-batch's share of the window's loss; None if it has no item.

    A mean over no item is left out: it is 0/0 and would turn every gradient into NaN. With several
    ranks one such mean is kept, times 0, because the other ranks wait for this rank's gradients.
    """
    shares = []
    for (mean, num_items), total in zip(terms, totals, strict=True):
        if num_items:
            weight = num_items * world_size / (len(terms) * total)
            shares.append(mean if weight == 1 else mean * weight)
    if shares:
        return reduce(torch.add, shares)
    return terms[0][0] * 0 if world_size > 1 else None


def split_batch(batch: Any, max_rows: int) -> list[Any]:
    """Split a batch into batches of at most ``max_rows`` rows, which keep their padding.

    Raises:
        DataError: The batch is not a mapping of tensors with one entry per row.

    >>> split_batch({"x": torch.tensor([1, 2, 3])}, 2)
    [{'x': tensor([1, 2])}, {'x': tensor([3])}]
    """
    rows = num_rows(batch)
    if rows <= max_rows:
        return [batch]
    columns = batch if isinstance(batch, Mapping) else {}
    if not columns or any(not isinstance(c, Tensor) or len(c) != rows for c in columns.values()):
        raise DataError(
            f"A {type(batch).__name__} cannot be split into smaller batches: that takes a dict of "
            f"tensors with one entry for each of its {rows} rows. Use a smaller batch_size and "
            "more gradient_accumulation_steps."
        )
    parts = [
        {name: c[start : start + max_rows] for name, c in columns.items()}
        for start in range(0, rows, max_rows)
    ]
    return [as_spare(part) for part in parts] if is_spare(batch) else parts


def _accumulate_in_memory(
    state: TrainState, batches: Sequence[Any], strategy: Strategy, loss_fn: LossFn | None
) -> Update:
    """Accumulate gradients from zero; if memory runs out, retry with half as many rows at once.

    The update is the same, because micro-batches are weighted by items however they are split. The
    size that fits is kept in the state. With several ranks there is no retry: the other ranks would
    wait for the gradients of the attempt that failed.
    """
    while True:
        zero_gradients(state.optimizer)  # including what a failed attempt added
        parts = batches
        if (max_rows := state.max_batch_rows) is not None:
            parts = [part for batch in batches for part in split_batch(batch, max_rows)]
        counts, task = count_window(state.model, parts, state.task)
        if state.is_training:
            state.task = task
        try:
            return _accumulate(
                state.model,
                parts,
                counts,
                loss_fn,
                strategy,
                partial(parameters_of, state.optimizer),
                state.times,
            )
        except torch.OutOfMemoryError:
            largest = max(map(num_rows, parts))
            if largest == 1 or strategy.world_size > 1:
                raise
        # Outside the handler: the error's traceback holds the activations.
        state.max_batch_rows = (largest + 1) // 2
        say(
            f"out of memory with {largest} rows: continuing with {state.max_batch_rows} at once. "
            "The updates stay the same."
        )
        if strategy.device.type == "cuda":
            torch.cuda.empty_cache()


def apply_update(
    state: TrainState,
    batches: Sequence[Any],
    strategy: Strategy,
    *,
    loss_fn: LossFn | None = None,
    max_grad_norm: float | None = None,
    on_nonfinite: OnNonfinite = "raise",
) -> Update:
    """Make one update: gradients, clipping, optimizer step, schedule step.

    It is the default ``step_fn``; copy it to change it. Gradients are zeroed at its beginning, so
    that they can be inspected until the next update.
    """
    update = _accumulate_in_memory(state, batches, strategy, loss_fn)
    if not update.applied:
        return update
    begin = perf_counter()
    watches, grad_norm = on_nonfinite != "ignore", None
    is_finite: bool | Tensor | None = None
    if watches and strategy.scales_losses:
        # Checked before clipping, which informs the scaler. A norm that overflows is left to it.
        is_finite = bool(_is_finite(update.loss))
        if not is_finite:
            update.applied = update.is_finite = False
            return update
    if max_grad_norm is not None:
        update.grad_norm = grad_norm = strategy.clip_gradients(state.optimizer, max_grad_norm)
    if watches and not strategy.scales_losses:
        is_finite = _is_finite(update.loss if grad_norm is None else update.loss + grad_norm)
    if isinstance(is_finite, Tensor) and (
        on_nonfinite == "skip" or not heeds_found_inf(state.optimizer, strategy.device)
    ):
        is_finite = bool(is_finite)  # this waits
    if isinstance(is_finite, Tensor):
        update.applied = _apply_guarded(state, strategy, is_finite)
    else:
        update.applied = is_finite is not False and strategy.apply(state.optimizer)
    if update.applied and state.lr_scheduler is not None:
        state.lr_scheduler.step()
    update.is_finite = is_finite
    state.times.optimizer += perf_counter() - begin
    return update


def _is_finite(watched: Tensor) -> bool | Tensor:
    """Tell whether a number is finite: as a bool on the CPU, otherwise as a flag on the device."""
    if reads_at_once(watched):
        value: Any = watched.tolist()  # no .item(): it counts as a wait
        return math.isfinite(value)
    return torch.isfinite(watched)


def reads_at_once(tensor: Tensor) -> bool:
    """Tell whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def _apply_guarded(state: TrainState, strategy: Strategy, is_finite: Tensor) -> bool:
    """Make the update on the device, unless this update or an earlier one was not finite.

    Fused optimizers do not change weights and moments where ``found_inf`` is 1. It stays 1, so that
    whenever the host reads it, the weights are those from before the first bad update. Nothing
    waits for the device.
    """
    has_failed = ~is_finite if state.has_failed is None else state.has_failed | ~is_finite
    state.has_failed = has_failed
    with skip_where(state.optimizer, has_failed):
        return strategy.apply(state.optimizer)
