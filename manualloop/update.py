"""One update: the window of micro-batches it is made of, and its mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from manualloop.data.collate import explain_rows
from manualloop.data.order import OrderedBatchSampler, num_batches
from manualloop.errors import DataError
from manualloop.notices import say
from manualloop.state import TrainState
from manualloop.strategy import Strategy, strategy_for
from manualloop.tasks import count_items, model_loss, num_rows
from manualloop.types import LossFn, Update, Window

StepFn: TypeAlias = Callable[[TrainState, list[Any], Strategy], Update]
"""``step_fn(state, batches, strategy) -> Update`` replaces the whole update."""


def windows(loader: Iterable[Any], size: int, *, skip: int = 0) -> Iterator[Window]:
    """Group the batches of one pass over a loader into the windows of its updates.

    A window ends with the pass, so the last one may be shorter. Batches stay where the loader put
    them. A loader with a length is read one window at a time and never ahead; of a stream one
    batch is read ahead, since nothing else tells that it ended.

    Args:
        loader: Any iterable of batches.
        size: Micro-batches a window (``gradient_accumulation_steps``).
        skip: Rows at the start of the pass to leave out: a whole number of windows. A prepared
            loader never loads them; any other reads and drops them.

    Raises:
        DataError: The loader gave another number of batches than its ``len()``, or rows that
            cannot be stacked.

    >>> batches = [{"x": torch.zeros(2)}, {"x": torch.zeros(2)}, {"x": torch.zeros(1)}]
    >>> [(len(window.batches), window.num_samples) for window in windows(batches, 2)]
    [(2, 4), (1, 1)]
    """
    batches: list[Any] = []
    num_samples = 0
    for batch, is_last in _mark_last(loader, skip):
        batches.append(batch)
        num_samples += num_rows(batch)
        if is_last or len(batches) == size:
            yield Window(batches, num_samples, is_last)
            batches, num_samples = [], 0


def _mark_last(loader: Iterable[Any], skip: int) -> Iterator[tuple[Any, bool]]:
    length = num_batches(loader)
    batches, num_skipped = _skip_rows(loader, skip)
    if length is None:
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)
            yield batch, following is None
            batch = following
        return
    number = num_skipped
    for number, batch in enumerate(batches, start=num_skipped + 1):
        yield batch, number == length
        if number == length:
            # Read to its end, as a plain `for` would: a sampler may have work to do there.
            number += sum(1 for _ in batches)
    if number != length:
        raise DataError(
            f"The loader gave {number} batches, but its len() is {length}, and updates and "
            "schedule were planned by it. Mend __len__, or leave it out and give max_steps=."
        )


def _skip_rows(loader: Iterable[Any], skip: int) -> tuple[Iterator[Any], int]:
    """Return the batches after so many rows, and how many batches that left out."""
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, OrderedBatchSampler):
        sampler.start_at(skip)
        return _fetch(loader), -(-skip // sampler.batch_size)
    if skip:
        say(
            "going on inside an epoch of a loader that prepare_dataloaders did not make: its rows "
            "are read again and dropped, and if it shuffles, others are than were used before."
        )
    batches, num_skipped, num_rows_skipped = _fetch(loader), 0, 0
    while num_rows_skipped < skip and (batch := next(batches, None)) is not None:
        num_rows_skipped += num_rows(batch)
        num_skipped += 1
    return batches, num_skipped


def _fetch(loader: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from loader
    except (TypeError, ValueError, RuntimeError) as error:
        if not isinstance(error, DataError) and (reason := _explain_fetch(loader)):
            raise DataError(reason) from error
        raise


def _explain_fetch(loader: Iterable[Any]) -> str | None:
    """Look for the reason of a failed fetch in the first rows of the loader's dataset."""
    dataset: Any = getattr(loader, "dataset", None)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    return explain_rows([dataset[number] for number in range(min(len(dataset), 100))])


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    loss_fn: LossFn | None = None,
    strategy: Strategy | None = None,
) -> Update:
    """Add to the parameters' gradients those of the mean loss over all items of a window.

    With ``n_j`` items in micro-batch j and ``N`` in the window, that is the gradient of
    ``sum(n_j / N * mean_loss_j)``: the one big batch's, however it is split. A single micro-batch
    is not multiplied by anything, so that its bits are those of ``loss.backward()``.

    Args:
        model: Prepared by the strategy; its gradients are zero or None.
        batches: The micro-batches, on the CPU or the device.
        loss_fn: ``loss_fn(model, batch)`` returns a mean loss, or ``(mean_loss, num_items)`` if
            only it knows what it counted; None: the loss that the model returns, over the items
            of ``count_items``.
        strategy: None: the one that prepared the model.

    Returns:
        The window's mean loss and number of items. ``applied`` is False, and no gradient was
        added, if there is no item to learn from.

    >>> def loss_fn(model, batch):
    ...     return ((model(batch["x"]) - batch["labels"]) ** 2).mean()
    >>> batches = [{"x": torch.ones(n, 1), "labels": torch.zeros(n, 1)} for n in (3, 1)]
    >>> accumulate_gradients(nn.Linear(1, 1), batches, loss_fn=loss_fn).num_items
    4
    """
    strategy = strategy_for(model, strategy)
    loss_fn = loss_fn or model_loss
    counts = [count_items(model, batch) for batch in batches]
    planned = max(1, sum(counts))
    losses: list[Tensor] = []
    total = 0
    for batch, num_items in zip(batches, counts, strict=True):
        with strategy.autocast():
            result = loss_fn(model, strategy.to_device(batch))
        if isinstance(result, tuple):
            loss, num_items = result[0], int(result[1])
        else:
            loss = result
        if num_items == 0:
            continue  # its mean is 0/0 and would turn every gradient into NaN
        if len(batches) > 1:
            loss = loss * (num_items / planned)
        strategy.backward(loss)
        losses.append(loss.detach())
        total += num_items
    if total == 0:
        return Update(torch.zeros((), device=strategy.device), 0, applied=False)
    loss = reduce(torch.add, losses)
    if len(batches) > 1 and total != planned:  # loss_fn counted otherwise than count_items
        _scale_gradients(model, planned / total)
        loss = loss * (planned / total)
    return Update(loss, total)


def _scale_gradients(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def apply_update(
    state: TrainState,
    batches: Sequence[Any],
    strategy: Strategy,
    *,
    loss_fn: LossFn | None = None,
    max_grad_norm: float | None = None,
) -> Update:
    """The default ``step_fn``: gradients, clip, update, schedule. Copy it to change it.

    Gradients are zeroed first, so that they can be looked at until the next update.
    """
    state.optimizer.zero_grad()
    update = accumulate_gradients(state.model, batches, loss_fn=loss_fn, strategy=strategy)
    grad_norm = None
    if update.applied and max_grad_norm is not None:
        grad_norm = strategy.clip_gradients(state.optimizer, max_grad_norm)
    applied = update.applied and strategy.apply(state.optimizer)
    if applied and state.lr_scheduler is not None:
        state.lr_scheduler.step()
    return Update(update.loss, update.num_items, grad_norm, applied)
