"""One optimizer update: its window of micro-batches, and its mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial, reduce
from time import perf_counter
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.batches import num_rows, split_batch
from manualloop.checks import require_loader
from manualloop.internals import heeds_found_inf, skip_where
from manualloop.notices import say
from manualloop.optim import parameters_of, zero_gradients
from manualloop.reading.reader import Given, Reader
from manualloop.reading.sources import source_of
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.calls import in_call
from manualloop.strategy.select import strategy_in_place
from manualloop.tasks.isolation import require_isolation
from manualloop.tasks.loss import Term, check_loss, loss_terms, of_model, require_mean
from manualloop.tasks.otherwise import balances_experts
from manualloop.tasks.padding import require_padding_unseen
from manualloop.tasks.shares import (
    Shares,
    count_ahead,
    items_alone,
    items_of,
    share_out,
    tell_equal,
)
from manualloop.tasks.splitting import doubt_about_splitting, explain_memory
from manualloop.tasks.task import Counts, Task, count_window, resolve_task
from manualloop.times import Times
from manualloop.types import LossFn, OnNonfinite, Terms, Update, Window

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
    check_arguments(size=size, skip=skip)
    require_loader(loader)
    return _windows(Reader(source_of(loader), {"num_samples": int(skip)}), int(size))


def _windows(reader: Reader, size: int) -> Iterator[Window]:
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
    terms: Terms | None = None,
    strategy: Strategy | None = None,
) -> Update:
    """Add the gradient of the mean loss over all items of a window to the parameters' gradients.

    With ``n_j`` items in micro-batch j and ``N`` items in the window, on all ranks, this is the
    gradient of ``sum(n_j / N * mean_loss_j)``, for each term of the loss. It equals the gradient of
    all rows in one batch, however they are split. The loss of a single micro-batch on a single rank
    is not multiplied by anything, so that the gradient has the bits of ``loss.backward()``. Call it
    on every rank; otherwise the other ranks wait for ever.

    Args:
        model: Model on the strategy's device, with gradients that are zero or None.
        batches: The micro-batches, on the CPU or the device; the same number on every rank.
        loss_fn: ``loss_fn(model, batch)`` returns a mean loss, or ``(mean_loss, num_items)`` if it
            counts items of its own. None takes the loss that the model returns, over the items
            of ``count_items``.
        terms: ``terms(outputs, batch)`` returns ``[(mean, num_items), ...]``, for a loss that is a
            sum of means, each over items of its own; instead of ``loss_fn``.
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
    check_arguments(model=model, batches=batches, loss_fn=loss_fn, terms=terms, strategy=strategy)
    check_loss(loss_fn, terms)
    terms = of_model(terms, model)
    strategy = strategy_in_place(model) if strategy is None else strategy
    strategy = in_call(strategy, "accumulate_gradients")
    if strategy.world_size > 1:
        model = prepare_model(strategy, model)  # the wrapper adds up the gradients of the ranks
    counts, task = count_window(model, batches)
    if len(batches) == strategy.world_size == 1:
        return _accumulate_one(model, batches[0], counts[0], strategy, Times(), loss_fn, terms)
    shares = share_out(batches, counts, task, strategy, loss_fn, terms)
    update, is_equal = _accumulate(
        model, batches, shares, strategy, model.parameters, Times(), loss_fn, terms
    )
    if is_equal and model not in _TOLD:
        _TOLD.add(model)
        tell_equal(batches[0])
    return update


_TOLD: WeakSet[nn.Module] = WeakSet()  # a loop written by hand calls this for every update


def _accumulate(
    model: nn.Module,
    batches: Sequence[Any],
    shares: Shares,
    strategy: Strategy,
    parameters: Callable[[], Iterable[Tensor]],
    times: Times,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> tuple[Update, bool]:
    """Accumulate the gradients of several micro-batches, or on several ranks.

    Returns:
        The update so far, and whether the micro-batches weighed the same because nothing tells
        their items.
    """
    weighted_losses: list[Tensor] = []
    num_items: float = 0
    is_equal = False
    for number, batch in enumerate(batches):
        with strategy.hold_gradients(model, hold=number < len(batches) - 1):
            found = _terms(model, batch, shares.counts[number], strategy, times, loss_fn, terms)
            if not shares.is_plain:
                is_equal = shares.num_unknown > 0 and shares.are_equal(found)
                if number == 0 and terms is not None and shares.is_guess and len(found) > 1:
                    shares = count_ahead(shares, found, model, batches, terms, strategy)
                found = items_of(shares, number, found, batch)
            weighted = _weighted_loss(found, shares.totals, strategy.world_size)
            if weighted is None:
                continue
            strategy.backward(weighted)
        if items := sum(items for _, items in found):
            weighted_losses.append(weighted.detach())
            num_items += items
    if weighted_losses:
        loss = reduce(torch.add, weighted_losses)
    else:
        loss = torch.zeros_like(found[0][0].detach())
    total: float = num_items
    if strategy.world_size > 1:
        loss = strategy.sum_over_ranks(loss) / strategy.world_size
        guessed = shares.is_guess
        total = strategy.sum_counts([num_items])[0] if guessed else sum(shares.totals)
    if total == 0:
        return Update(loss, 0, applied=False), is_equal
    if shares.is_guess and total != shares.totals[0]:
        factor = shares.totals[0] / total  # the items are other than those of count_items
        for parameter in parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        loss = loss * factor
    return Update(loss, total), is_equal


def _accumulate_one(
    model: nn.Module,
    batch: Any,
    counts: Counts,
    strategy: Strategy,
    times: Times,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> Update:
    """Take the mean of the only micro-batch for the window's, as the hand-written loop does."""
    found = _terms(model, batch, counts, strategy, times, loss_fn, terms)
    if loss_fn is not None or terms is not None or not counts:
        found = items_alone(found, batch, counts, loss_fn, terms)
    items = [num_items for _, num_items in found]
    loss = _weighted_loss(found, items, 1)
    if loss is None:
        return Update(torch.zeros_like(found[0][0].detach()), 0, applied=False)
    strategy.backward(loss)
    return Update(loss.detach(), sum(items))


def _terms(
    model: nn.Module,
    batch: Any,
    counts: Sequence[float],
    strategy: Strategy,
    times: Times,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> list[Term]:
    """Run a micro-batch through the model; return the terms of its loss."""
    inputs = _to_device(batch, strategy, times)
    with strategy.autocast():
        require_isolation(model, batch, inputs, loss_fn)
        require_padding_unseen(model, batch, inputs, loss_fn)
        found = loss_terms(model, inputs, counts, loss_fn, terms)
    return [(require_mean(mean), num_items) for mean, num_items in found]


def _to_device(batch: Any, strategy: Strategy, times: Times) -> Any:
    if strategy.device.type == "cpu":
        return strategy.to_device(batch)
    begin = perf_counter()
    inputs = strategy.to_device(batch)
    times.copy += perf_counter() - begin
    return inputs


def _weighted_loss(
    terms: Sequence[tuple[Tensor, float]], totals: Sequence[float], world_size: int
) -> Tensor | None:
    """Return a micro-batch's share of the window's loss; None if it has no item.

    A mean over no item is left out: it is 0/0 and would turn every gradient into NaN. With several
    ranks such means are kept, times 0, because the other ranks wait for this rank's gradients.
    """
    shares = []
    for (mean, num_items), total in zip(terms, totals, strict=True):
        if num_items:
            weight = num_items * world_size / total
            shares.append(mean if weight == 1 else mean * weight)
        elif world_size > 1:
            shares.append((mean * 0).nan_to_num())
    return reduce(torch.add, shares) if shares else None


def _accumulate_in_memory(
    state: TrainState,
    batches: Sequence[Any],
    strategy: Strategy,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> Update:
    """Accumulate gradients from zero; if memory runs out, retry with half as many rows at once.

    There is a retry only where the update is known to be the same: the loss is that of a head of
    transformers, and no row depends on the rows beside it. The size that fits is kept in the state.
    With several ranks there is no retry: the other ranks would wait for the gradients of the
    attempt that failed.
    """
    zero_gradients(state.optimizer)
    while True:
        parts = batches
        max_rows, of_loss = state.max_batch_rows, (loss_fn, terms)
        if max_rows is not None and not _doubt(state, batches, state.task, *of_loss):
            parts = [part for batch in batches for part in split_batch(batch, max_rows)]
        counts, task = count_window(state.model, parts, state.task)
        if state.is_training:
            state.task = task
        try:
            if len(parts) == strategy.world_size == 1:
                return _accumulate_one(
                    state.model, parts[0], counts[0], strategy, state.times, loss_fn, terms
                )
            return _accumulate_shares(state, parts, counts, task, strategy, loss_fn, terms)
        except torch.OutOfMemoryError as error:
            largest, doubt = max(map(num_rows, parts)), _doubt(state, parts, task, *of_loss)
            if largest == 1:
                raise
            if doubt or strategy.world_size > 1:
                explain_memory(error, parts, doubt)
                raise
        # Outside the handler: the error's traceback holds the activations.
        drop_gradients(state)  # those that the failed attempt has added
        state.max_batch_rows = (largest + 1) // 2
        say(
            f"out of memory with {largest} rows: continuing with {state.max_batch_rows} at once. "
            "The updates stay the same, up to rounding and the masks of dropout."
        )
        if strategy.device.type == "cuda":
            torch.cuda.empty_cache()


def _doubt(
    state: TrainState,
    batches: Sequence[Any],
    task: Task | None,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> str | None:
    task = task or resolve_task(state.model, batches[0])
    return doubt_about_splitting(state.model, batches, task, loss_fn, terms)


def _accumulate_shares(
    state: TrainState,
    batches: Sequence[Any],
    counts: Sequence[Counts],
    task: Task | None,
    strategy: Strategy,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> Update:
    """Accumulate the gradients of several micro-batches, weighed as in the rest of the run."""
    known = state.weighs_equally if state.is_training else None
    if known:
        counts = [(1,)] * len(batches)
    shares = share_out(batches, counts, task, strategy, loss_fn, terms, is_settled=known is False)
    parameters = partial(_all_parameters, state)
    update, is_equal = _accumulate(
        state.model, batches, shares, strategy, parameters, state.times, loss_fn, terms
    )
    if known is None:
        if is_equal:
            tell_equal(batches[0])
        if state.is_training:
            state.weighs_equally = is_equal
            if loss_fn is None and terms is None and balances_experts(state.model):
                say(
                    "the loss that balances the experts (output_router_logits) is that of each "
                    "micro-batch: another split of the rows is a slightly different update."
                )
    return update


def _all_parameters(state: TrainState) -> list[Tensor]:
    """List the parameters of the model and those of its optimizers, each once."""
    parameters = [*parameters_of(state.optimizer), *state.model.parameters()]
    return list({id(parameter): parameter for parameter in parameters}.values())


def drop_gradients(state: TrainState) -> None:
    """Set the gradients of all parameters to None, also of those that other optimizers update.

    A window that was skipped, or whose memory ran out, leaves no gradient behind.
    """
    for optimizer in (state.optimizer, *filter(_is_optimizer, state.extras.values())):
        zero_gradients(optimizer)
    for parameter in state.model.parameters():
        parameter.grad = None


def _is_optimizer(extra: Any) -> bool:
    return hasattr(extra, "param_groups")


def apply_update(
    state: TrainState,
    batches: Sequence[Any],
    strategy: Strategy,
    *,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    max_grad_norm: float | None = None,
    on_nonfinite: OnNonfinite = "raise",
) -> Update:
    """Make one update: gradients, clipping, optimizer step, schedule step.

    It is the default ``step_fn``; copy it to change it. Gradients are zeroed at its beginning, so
    that they can be inspected until the next update.
    """
    clips_well = max_grad_norm is None or (type(max_grad_norm) is float and max_grad_norm > 0)
    if not clips_well or on_nonfinite not in ("raise", "skip", "ignore"):
        check_arguments(max_grad_norm=max_grad_norm, on_nonfinite=on_nonfinite)
    try:
        terms = terms and of_model(terms, state.model)
        if strategy.world_size > 1 and not state.is_training:
            state.model = prepare_model(strategy, state.model)
        update = _accumulate_in_memory(state, batches, strategy, loss_fn, terms)
    except (AttributeError, TypeError):  # here, because it costs nothing otherwise
        own = strategy or "None"
        check_arguments(state=state, batches=batches, strategy=own, loss_fn=loss_fn, terms=terms)
        raise
    if not update.applied:
        drop_gradients(state)
        return update
    begin = perf_counter()
    watches, grad_norm = on_nonfinite != "ignore", None
    is_finite: bool | Tensor | None = None
    if watches and strategy.scales_losses:
        # Checked before clipping, which informs the scaler. A norm that overflows is left to it.
        is_finite = bool(finiteness(update.loss))
        if not is_finite:
            update.applied = update.is_finite = False
            drop_gradients(state)
            return update
    if max_grad_norm is not None:
        update.grad_norm = grad_norm = strategy.clip_gradients(state.optimizer, max_grad_norm)
    if watches and not strategy.scales_losses:
        is_finite = finiteness(update.loss if grad_norm is None else update.loss + grad_norm)
    if isinstance(is_finite, Tensor) and (
        on_nonfinite == "skip"
        or (bool(state.extras) and any(map(_is_optimizer, state.extras.values())))
        or not (
            all(heeds_found_inf(one, strategy.device) for one in state.optimizer)
            if isinstance(state.optimizer, tuple)
            else heeds_found_inf(state.optimizer, strategy.device)
        )
    ):
        is_finite = bool(is_finite)  # this waits
    if isinstance(is_finite, Tensor):
        update.applied = _apply_guarded(state, strategy, is_finite)
    else:
        update.applied = is_finite is not False and strategy.apply(state.optimizer)
    if not update.applied:
        drop_gradients(state)
    elif state.lr_scheduler is not None:
        state.lr_scheduler.step()
    update.is_finite = is_finite
    state.times.optimizer += perf_counter() - begin
    return update


def finiteness(watched: Tensor) -> bool | Tensor:
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
    if not isinstance(state.optimizer, tuple):
        with skip_where(state.optimizer, has_failed):
            return strategy.apply(state.optimizer)
    with ExitStack() as stack:
        for optimizer in state.optimizer:
            stack.enter_context(skip_where(optimizer, has_failed))
        return strategy.apply(state.optimizer)
