"""One optimizer update: its mathematics, and what a ``step_fn`` of the user returns instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial, reduce
from numbers import Real
from time import perf_counter
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.batches import num_rows, split_batch
from manualloop.errors import ConfigError
from manualloop.internals import heeds_found_inf, skip_where
from manualloop.notices import say
from manualloop.optimizers.access import parameters_of, zero_gradients
from manualloop.optimizers.schedules import schedules_of
from manualloop.optimizers.together import each
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.calls import in_call
from manualloop.strategy.replicas import require_all_added_up
from manualloop.strategy.select import strategy_in_place
from manualloop.tasks.loss import Loss, loss_of, means_of, require_mean
from manualloop.tasks.otherwise import balances_experts
from manualloop.tasks.shares import (
    Shares,
    count_ahead,
    items_alone,
    items_of,
    leaves_of,
    share_out,
    tell_equal,
)
from manualloop.tasks.splitting import (
    doubt_about_splitting,
    explain_memory,
    report_own_loss,
    report_statistics,
)
from manualloop.tasks.task import Counted, Task, count_window, resolve_task
from manualloop.times import Times
from manualloop.types import LossFn, OnNonfinite, Terms, Update

StepFn: TypeAlias = Callable[[TrainState, list[Any], Strategy], Update]
"""``step_fn(state, batches, strategy) -> Update`` replaces the whole update."""


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

    Raises:
        ConfigError: ``loss_fn`` and ``terms`` are both given, or an argument cannot be meant.
        DataError: A batch has no labels, or the model sees its padding.
        ModelError: There is no loss, or none that depends on trainable parameters.

    >>> def loss_fn(model, batch):
    ...     return ((model(batch["x"]) - batch["labels"]) ** 2).mean()
    >>> batches = [{"x": torch.ones(n, 1), "labels": torch.zeros(n, 1)} for n in (3, 1)]
    >>> accumulate_gradients(nn.Linear(1, 1), batches, loss_fn=loss_fn).num_items
    4
    """
    check_arguments(model=model, batches=batches, loss_fn=loss_fn, terms=terms, strategy=strategy)
    loss = loss_of(model, loss_fn, terms)
    strategy = strategy_in_place(model) if strategy is None else strategy
    strategy = in_call(strategy, "accumulate_gradients")
    if strategy.world_size > 1:
        model = prepare_model(strategy, model)  # the wrapper adds up the gradients of the ranks
    counted, shares = count_window(model, batches), None
    if len(batches) > 1 or strategy.world_size > 1:
        shares = share_out(batches, counted.counts, counted.task, strategy, loss)
        report_statistics(model)
    update, is_equal = _accumulate(
        model, batches, counted, shares, strategy, loss, Times(), model.parameters
    )
    if is_equal and model not in _TOLD:
        _TOLD.add(model)
        tell_equal(batches[0])
    return update


_TOLD: WeakSet[nn.Module] = WeakSet()  # a loop written by hand calls this for every update


def _accumulate(
    model: nn.Module,
    batches: Sequence[Any],
    counted: Counted,
    shares: Shares | None,
    strategy: Strategy,
    loss: Loss,
    times: Times,
    parameters: Callable[[], Iterable[Tensor]],
) -> tuple[Update, bool]:
    """Accumulate the gradients of the micro-batches of a window.

    There are no shares of the only micro-batch on the only rank, whose mean is the window's, as in
    the hand-written loop. ``parameters`` lists those whose gradients are added to.

    Returns:
        The update so far, and whether the micro-batches weighed the same because nothing tells
        their items.
    """
    losses: list[Tensor] = []  # weighted
    roots: list[Any] = []  # of the graphs, which have let go of their tensors
    num_items: float = 0
    is_equal = False
    for number, batch in enumerate(batches):
        begin = perf_counter()
        inputs = strategy.to_device(batch)
        if inputs is not batch:
            times.copy += perf_counter() - begin
        counts = counted.counts[number] if shares is None else shares.counts[number]
        with strategy.hold_gradients(model, hold=number < len(batches) - 1):
            with strategy.autocast():
                found = means_of(model, batch, inputs, counts, loss, looks=counted.looks)
            if shares is None:
                if not loss.is_models or not counts:
                    found = items_alone(found, batch, counts, loss)
            elif not shares.is_counted:
                is_equal = shares.num_unknown > 0 and shares.are_equal(found)
                if number == 0 and shares.is_guess and len(found) > 1:
                    shares = count_ahead(shares, found, model, batches, loss, strategy)
                found = items_of(shares, number, found, batch)
            weighted, items = _weighted_loss(found, shares and shares.totals, strategy.world_size)
            if weighted is None:
                continue
            strategy.backward(weighted)
        if shares is not None and shares.is_guess:
            roots.append(weighted.grad_fn)
        if items:
            losses.append(weighted.detach())
            num_items += items
    mean = reduce(torch.add, losses) if losses else torch.zeros_like(found[0][0].detach())
    if shares is None:
        return Update(mean, num_items, applied=num_items > 0), is_equal
    total: float = num_items
    if strategy.world_size > 1:
        require_all_added_up(model)
        mean = strategy.sum_over_ranks(mean) / strategy.world_size
        guessed = shares.is_guess
        total = strategy.sum_counts([num_items])[0] if guessed else sum(shares.totals)
    if total == 0:
        return Update(mean, 0, applied=False), is_equal
    if shares.is_guess and total != shares.totals[0]:
        factor = shares.totals[0] / total  # the items are other than those of count_items
        scaled = {id(one): one for one in (*parameters(), *leaves_of(roots))}
        for parameter in scaled.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        mean = mean * factor
    return Update(mean, total), is_equal


def _weighted_loss(
    terms: Sequence[tuple[Tensor, float]], totals: Sequence[float] | None, world_size: int
) -> tuple[Tensor | None, float]:
    """Return a micro-batch's share of the window's loss and its items; None if it has no item.

    A mean over no item is left out: it is 0/0 and would turn every gradient into NaN. With several
    ranks such means are kept, times 0, because the other ranks wait for this rank's gradients.

    Args:
        terms: The means of the micro-batch with their items.
        totals: Items of the window, for each term; None where it has no other micro-batch.
        world_size: Number of ranks.
    """
    totals = [num_items for _, num_items in terms] if totals is None else totals
    shares: list[Tensor] = []
    items: float = 0
    for (mean, num_items), total in zip(terms, totals, strict=True):
        if num_items:
            items += num_items
            weight = num_items * world_size / total
            shares.append(mean if weight == 1 else mean * weight)
        elif world_size > 1:
            shares.append((require_mean(mean) * 0).nan_to_num())
    return (reduce(torch.add, shares) if shares else None), items


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
    loss = loss_of(state.model, loss_fn, terms)
    zero_gradients(state.optimizer)
    while True:
        parts, max_rows = batches, state.max_batch_rows
        if max_rows is not None and not _doubt(state, batches, state.task, loss):
            parts = [part for batch in batches for part in split_batch(batch, max_rows)]
        counted = count_window(state.model, parts, state.task)
        if state.is_training:
            state.task = counted.task
        try:
            return _accumulate_shares(state, parts, counted, strategy, loss)
        except torch.OutOfMemoryError as error:
            largest, doubt = max(map(num_rows, parts)), _doubt(state, parts, counted.task, loss)
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


def _doubt(state: TrainState, batches: Sequence[Any], task: Task | None, loss: Loss) -> str | None:
    task = task or resolve_task(state.model, batches[0])
    return doubt_about_splitting(state.model, batches, task, loss.loss_fn, loss.terms)


def _accumulate_shares(
    state: TrainState, batches: Sequence[Any], counted: Counted, strategy: Strategy, loss: Loss
) -> Update:
    """Accumulate the gradients of the micro-batches of a window, weighed as in the rest of the run.

    Whether micro-batches are weighed by items is settled by the first window of several.
    """
    known, shares = (state.weighs_equally if state.is_training else None), None
    if len(batches) > 1 or strategy.world_size > 1:
        counts = [(1,)] * len(batches) if known else counted.counts
        task, is_settled = counted.task, known is False
        if known is None:
            report_statistics(state.model)
            if loss.is_models:
                report_own_loss(state.model, batches[0], task, strategy)
        shares = share_out(batches, counts, task, strategy, loss, is_settled=is_settled)

    def parameters() -> list[Tensor]:
        return [*parameters_of(state.optimizer), *state.model.parameters()]

    update, is_equal = _accumulate(
        state.model, batches, counted, shares, strategy, loss, state.times, parameters
    )
    if shares is None or known is not None:
        return update
    if is_equal:
        tell_equal(batches[0])
    if state.is_training:
        state.weighs_equally = is_equal
        if loss.is_models and balances_experts(state.model):
            say(
                "the loss that balances the experts (output_router_logits) is that of each "
                "micro-batch: another split of the rows is a slightly different update."
            )
    return update


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
    that they can be inspected until the next update. Call it on every rank.

    Args:
        state: Model, optimizer and schedule.
        batches: The micro-batches of the update.
        strategy: Device, precision and ranks.
        loss_fn: As in ``accumulate_gradients``.
        terms: As in ``accumulate_gradients``.
        max_grad_norm: Norm to which gradients are clipped; None does not clip.
        on_nonfinite: With ``"raise"`` and ``"skip"`` a loss or gradient norm that is NaN or
            infinite leaves the weights as they are. The update tells so, and ``train_steps`` acts
            on it; ``"skip"`` waits for the device. ``"ignore"`` makes the update.

    Raises:
        ManualLoopError: As in ``accumulate_gradients``.

    >>> model = nn.Linear(1, 1)
    >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> strategy = strategy_in_place(model)
    >>> update = apply_update(state, [torch.ones(2, 1)], strategy, loss_fn=lambda m, x: m(x).mean())
    >>> update.applied, update.num_items
    (True, 2)
    """
    clips_well = max_grad_norm is None or (type(max_grad_norm) is float and max_grad_norm > 0)
    if not clips_well or on_nonfinite not in ("raise", "skip", "ignore"):
        check_arguments(max_grad_norm=max_grad_norm, on_nonfinite=on_nonfinite)
    try:
        if strategy.world_size > 1:  # which wraps it anew if other parameters are trained now
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
    scales_losses = watches and strategy.scales_losses
    is_finite: bool | Tensor | None = None
    if scales_losses:
        # Checked before clipping, which informs the scaler. A norm that overflows is left to it.
        is_finite = bool(finiteness(update.loss))
        if not is_finite:
            update.applied = update.is_finite = False
            drop_gradients(state)
            return update
    if max_grad_norm is not None:
        update.grad_norm = grad_norm = strategy.clip_gradients(state.optimizer, max_grad_norm)
    if watches and not scales_losses:
        is_finite = finiteness(update.loss if grad_norm is None else update.loss + grad_norm)
    if isinstance(is_finite, Tensor) and _must_wait(state, strategy, on_nonfinite):
        is_finite = bool(is_finite)
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


def _must_wait(state: TrainState, strategy: Strategy, on_nonfinite: OnNonfinite) -> bool:
    """Tell whether the host must know if an update is finite before the device makes it."""
    if on_nonfinite == "skip" or any(map(_is_optimizer, state.extras.values())):
        return True
    return not all(heeds_found_inf(one, strategy.device) for one in each(state.optimizer))


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


def checked(step_fn: StepFn) -> StepFn:
    """Return a ``step_fn`` whose updates are checked.

    A schedule that the first update has not moved by one is reported.
    """
    places: list[Any] = []  # of the schedules before the first update
    return partial(_make_checked, step_fn=step_fn, places=places)


def _make_checked(
    state: TrainState,
    batches: list[Any],
    strategy: Strategy,
    *,
    step_fn: StepFn,
    places: list[Any],
) -> Update:
    if not places:
        places.append([_place(schedule) for schedule in schedules_of(state.lr_scheduler)])
    update: Any = step_fn(state, batches, strategy)
    if problem := _problem_of(update):
        raise ConfigError(
            f"step_fn returned {problem}. Return what it did: manualloop.Update(loss.detach(), "
            "num_items), with the mean loss as a tensor of one number and the number of items as "
            "a number; applied=False if the weights were left as they were."
        )
    if update.loss.requires_grad or update.loss.ndim:
        update.loss = update.loss.detach().reshape(())  # else the history keeps its graph
    if places[0] is not None and update.applied:
        _tell_schedules(state, places[0])
        places[0] = None
    made: Update = update
    return made


def _problem_of(update: Any) -> str | None:
    if not isinstance(update, Update):
        return f"a {type(update).__name__}" if update is not None else "None"
    loss, norm, items = update.loss, update.grad_norm, update.num_items
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        return f"an Update whose loss is a {type(loss).__name__}{shape}"
    if not isinstance(items, Real) or isinstance(items, bool) or not items >= 0:
        return f"an Update whose num_items is {items!r:.40}, a {type(items).__name__}"
    if norm is not None and not (isinstance(norm, Tensor) and norm.numel() == 1):
        return f"an Update whose grad_norm is a {type(norm).__name__}"
    if update.applied is not True and update.applied is not False:
        return f"an Update whose applied is a {type(update.applied).__name__}"
    return None


def _place(schedule: Any) -> Any:
    """Return what moves when a schedule is stepped: a number, or all of its state."""
    place = getattr(schedule, "last_epoch", None)
    return place if isinstance(place, int) else repr(getattr(schedule, "state_dict", dict)())


def _tell_schedules(state: TrainState, before: list[Any]) -> None:
    for schedule, place in zip(schedules_of(state.lr_scheduler), before, strict=True):
        name, now = type(schedule).__name__, _place(schedule)
        if now == place:
            say(
                f"step_fn has not stepped the schedule: the {name} stays where it is. Call "
                "state.lr_scheduler.step() in step_fn after the update, or pass lr_scheduler=None."
            )
        elif isinstance(place, int) and now != place + 1:
            say(f"step_fn has moved the schedule by {now - place} in one update ({name}).")
