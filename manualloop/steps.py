"""``train_steps``: training as a ``for`` loop over optimizer updates.

``train_steps`` checks the arguments and describes the run, ``start_steps`` gets everything ready,
and ``_train_steps`` is the loop. The mathematics of an update is in ``update.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from time import perf_counter
from typing import Any, cast

from torch.utils.data import IterableDataset

from manualloop.arguments import check_arguments
from manualloop.body import watch_first
from manualloop.checkpoint.agreement import agreed
from manualloop.checkpoint.changes import note_run
from manualloop.checkpoint.contract import (
    Contract,
    carried_on,
    check_contract,
    describe_run,
    log_differences,
)
from manualloop.checkpoint.functions import values_read
from manualloop.checkpoint.restore import take_generators
from manualloop.checks import EXPLAINED, check_batches, check_run, explain, explain_loss
from manualloop.data.collate import tokenizer_of
from manualloop.data.kept import columns_read
from manualloop.errors import ConfigError, DataError
from manualloop.models import call_own_train, remember_configs, unwrap_model
from manualloop.nonfinite import Watch
from manualloop.notices import say
from manualloop.optimizers.access import plain_lr, put_into_training
from manualloop.optimizers.schedules import require_schedules, tell_rates_of_zero
from manualloop.optimizers.together import as_optimizer
from manualloop.plan import (
    Settings,
    Skips,
    begin_epoch,
    ends_in_lone_row,
    has_other_size,
    plan_run,
    settings_of,
)
from manualloop.reading.describe import all_facts, digest_of, digests_of_loaders, rows_digest
from manualloop.reading.position import read_position
from manualloop.reading.reader import Reader
from manualloop.reading.sources import Source, source_of, workers_matter
from manualloop.state import TrainState, has_updates_left
from manualloop.strategy.base import Strategy, prepare
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.tasks.loss import check_own_loss, of_model
from manualloop.tasks.splitting import try_lone_row
from manualloop.tasks.task import Task
from manualloop.types import LossFn, OnNonfinite, Plan, Step, Terms, Update, Window
from manualloop.update import StepFn, apply_update, checked, drop_gradients


def train_steps(
    state: TrainState,
    train_dataloader: Iterable[Any],
    *,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    step_fn: StepFn | None = None,
    on_nonfinite: OnNonfinite = "raise",
    strategy: Strategy | None = None,
    preflight: bool = True,
) -> Generator[Step, None, None]:
    """Make one optimizer update each time the ``for`` loop asks for one.

    ::

        while epochs or steps are left:
            set_epoch(train_dataloader, epoch)
            for each window of gradient_accumulation_steps batches:
                zero the gradients
                for each batch: forward, loss, backward        (weighted by items)
                clip, update the weights, advance the schedule (apply_update)
                move state.progress, then yield a Step

    Everything that lasts is in ``state``, which is updated before a step is yielded. You can leave
    the loop anywhere, and the next ``train_steps`` with this state continues with the next window.
    When the planned number of updates is reached, nothing is yielded. The gradients of a step stay
    until the next one. Nothing waits for the device, except as described for ``on_nonfinite``. An
    interrupt inside an update leaves the state in the middle of it. With several processes call it
    on each: batch k of the loader goes to rank ``k % world_size``, and a step is the same on all
    ranks.

    Arguments are checked at the call, and batches when they are used. To end the generator early,
    leave its ``for`` loop, or ``close()`` it if it has a name.

    Args:
        state: Model, optimizer, schedule and position. The strategy moves the model to its device.
        train_dataloader: Loader of dicts that the model takes; with ``loss_fn`` any iterable of
            batches.
        num_epochs: Number of passes over the data, including those already in ``state``; 3 if
            ``max_steps`` is also None.
        max_steps: Number of updates instead, including those already in ``state``.
        gradient_accumulation_steps: Number of batches per update. The last window of an epoch may
            hold fewer.
        max_grad_norm: Norm to which gradients are clipped; None does not clip.
        loss_fn: ``loss_fn(model, batch)`` returns a mean loss, or ``(mean_loss, num_items)``.
        terms: ``terms(outputs, batch)`` returns ``[(mean, num_items), ...]``, for a loss that is a
            sum of means, each over items of its own. The model is called as without it.
        step_fn: ``step_fn(state, batches, strategy) -> Update`` replaces the update, and with it
            ``loss_fn``, ``terms`` and ``max_grad_norm``.
        on_nonfinite: Reaction to a loss, or a gradient norm that is computed, which is NaN or
            infinite. ``"raise"`` ends the run with the weights from before the update. On an
            accelerator with a fused optimizer the host learns of it some steps late; the weights
            have not changed since, but position and schedule have. ``"skip"`` skips the update and
            counts it. ``"ignore"`` makes the update. On an accelerator, ``"skip"`` waits for every
            update, and so does ``"raise"`` with an optimizer that is not one of torch's fused ones;
            with a fused one ``"raise"`` never waits on cuda, and once in eight updates elsewhere.
        strategy: Device and precision; None uses the strategy that prepared the model, else
            ``prepare_strategy("auto")``.
        preflight: Whether to check the first window before its update.

    Yields:
        A ``Step`` for each update that was applied. A skipped update is only counted, in
        ``state.progress.num_skipped``.

    Raises:
        ConfigError: The arguments do not fit together.
        DataError: The data cannot be trained on, no update of an epoch was applied, or an epoch has
            another length than the one by which its schedule was planned.
        ModelError: The model or the optimizer cannot be trained.
        NonFiniteError: The loss or the gradient norm is NaN or infinite; it names the rows.
        DistributedError: Another rank is gone; the message says which, and why if it could tell.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1)
    >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> batches = [{"x": torch.ones(4, 1)}, {"x": torch.ones(2, 1)}]
    >>> for step in train_steps(state, batches, num_epochs=2,
    ...                         loss_fn=lambda model, batch: model(batch["x"]).mean()):
    ...     print(step)
    Step(1/4, epoch=0, lr=0.1)
    Step(2/4, epoch=0, lr=0.1, ends_epoch)
    Step(3/4, epoch=1, lr=0.1)
    Step(4/4, epoch=1, lr=0.1, ends_epoch)
    """
    arguments = dict(locals())
    check_arguments(state=state, preflight=preflight)
    strategy = strategy_for(state.model, strategy)
    settings = settings_of(arguments)
    ends: dict[str, Any] = {"num_epochs": num_epochs, "max_steps": max_steps}
    plan = plan_run(train_dataloader, settings, world_size=strategy.world_size, **ends)
    at = {"steps made": state.progress.num_steps, "epochs made": state.progress.epoch}
    strategy = begin_call(strategy, "train_steps", **ends, **settings._asdict(), **at)
    source = source_of(train_dataloader)
    contract = contract_of(state, source, plan, strategy, arguments)
    steps = start_steps(state, source, plan, contract, strategy, settings, preflight=preflight)
    return cast("Generator[Step, None, None]", watch_first(steps, state))


def start_steps(
    state: TrainState,
    source: Source,
    plan: Plan,
    contract: Contract,
    strategy: Strategy,
    settings: Settings,
    *,
    preflight: bool,
    yields_skipped: bool = False,
) -> Generator[Step | None, None, None]:
    """Put model and optimizer in place, note how the run finds everything, and return its steps.

    The arguments were checked; ``plan`` and ``contract`` were made of them. With ``yields_skipped``
    there is a None for an update that was skipped, and where an epoch ends without one.
    """
    settings = settings._replace(terms=of_model(settings.terms, state.model))
    window_size, _, loss_fn, terms, step_fn, on_nonfinite = settings
    state.model, state.optimizer = prepare(strategy, state.model, state.optimizer)
    state.allows_nonfinite = on_nonfinite == "ignore"
    put_into_training(state.optimizer)
    is_resized = has_other_size(state.contract, contract)
    _agree_on_contract(state, source, plan, strategy, contract)
    by_step_fn = step_fn is not None
    watch = Watch(state, source, loss_fn, terms, strategy, on_nonfinite, by_step_fn=by_step_fn)
    functions: dict[str, Any] = {"loss_fn": loss_fn, "terms": terms, "step_fn": step_fn}
    take_generators(state, source.loader, **functions)
    note_run(state, source.loader, **functions)
    return _train_steps(
        state,
        source,
        plan,
        window_size,
        _updater(source, strategy, settings),
        strategy,
        watch,
        check=_first_check(state, source, plan, strategy, settings) if preflight else None,
        of_call=(state.contract, state.allows_nonfinite),
        is_resized=is_resized,
        yields_skipped=yields_skipped,
    )


def _updater(
    source: Source, strategy: Strategy, settings: Settings
) -> Callable[[TrainState, Window], Update]:
    """Return the function that makes the update of a window."""
    _, max_grad_norm, loss_fn, terms, step_fn, on_nonfinite = settings
    if step_fn is not None:
        make = checked(step_fn)
    else:
        of_loss: dict[str, Any] = {"loss_fn": loss_fn, "terms": terms}
        make = partial(
            apply_update, **of_loss, max_grad_norm=max_grad_norm, on_nonfinite=on_nonfinite
        )
    is_own = loss_fn is not None or step_fn is not None
    explains = explain_loss if is_own else partial(explain, needs_labels=terms is None)
    return partial(_update_from, step_fn=make, strategy=strategy, source=source, explain=explains)


def _first_check(
    state: TrainState, source: Source, plan: Plan, strategy: Strategy, settings: Settings
) -> Callable[..., Task | None]:
    """Return the function that looks at the first window of a run, before its update."""
    loss_fn, step_fn, tokenizer = settings.loss_fn, settings.step_fn, tokenizer_of(source.loader)
    needs_labels = settings.terms is None
    check: Callable[..., Task | None] = partial(
        check_batches, needs_labels=needs_labels, tokenizer=tokenizer
    )
    if loss_fn is not None or step_fn is not None:
        begins = strategy if state.progress.num_steps == 0 else None
        check = partial(check_own_loss, loss_fn=loss_fn, strategy=begins, tokenizer=tokenizer)
    if step_fn is None and ends_in_lone_row(source.loader, plan):
        check = partial(try_lone_row, check=check, loss_fn=loss_fn, strategy=strategy)
    return check


def contract_of(
    state: TrainState,
    source: Source,
    plan: Plan,
    strategy: Strategy,
    arguments: Mapping[str, Any],
) -> Contract:
    """Check the state of a run, and describe the run by all arguments of the call. Collective."""
    state.optimizer = as_optimizer(state.optimizer)  # somebody may have set a list
    check_run(state, strategy, calls_step=arguments.get("step_fn") is None)
    state.lr_scheduler = require_schedules(state.lr_scheduler, state.optimizer)
    if arguments.get("step_fn") is None:
        tell_rates_of_zero(state.lr_scheduler, state.optimizer)
    facts = all_facts(source)
    read = columns_read(source.loader, getattr(arguments.get("loss_fn"), "reads", ()))
    if read is not None:  # the others that skip the model change no number
        facts.exact["columns that loss_fn reads"] = rows_digest(read)
    if "evaluate" in arguments:
        rows = digests_of_loaders(values_read(arguments["evaluate"]))
        arguments = {**arguments, "evaluated rows": rows}
    return agreed(describe_run(state, facts, plan, strategy, arguments), strategy)


def _agree_on_contract(
    state: TrainState, source: Source, plan: Plan, strategy: Strategy, contract: Contract
) -> None:
    """Keep the contract of the run, and compare it with that of its checkpoint."""
    if state.is_resumed and state.contract is not None:
        saved = read_position(state.position, state.progress.num_samples)
        digest = digest_of(source.facts, source.loader)
        if not has_updates_left(state.progress, plan):
            # Nothing is left to do, perhaps because the checkpoint is of a later stage of the
            # script. The position stays that of its loader, which may be this one.
            if saved.get("data") == digest:
                state.reader, state.is_resumed = Reader(source, saved, strategy), False
            return
        check_contract(state.contract, contract)
        log_differences(state.contract, contract, workers_matter=workers_matter(saved))
        if state.position is not None:
            state.position["data"] = digest
        contract = carried_on(state.contract, contract)
    state.contract, state.is_resumed = contract, False


def _train_steps(
    state: TrainState,
    source: Source,
    plan: Plan,
    window_size: int,
    update_from: Callable[[TrainState, Window], Update],
    strategy: Strategy,
    watch: Watch,
    *,
    check: Callable[..., Task | None] | None,
    of_call: tuple[Contract | None, bool],
    is_resized: bool | None,
    yields_skipped: bool,
) -> Generator[Step | None, None, None]:
    """Make the updates that are left, and yield a step after each."""
    if not has_updates_left(state.progress, plan):
        return
    progress, times, inner = state.progress, state.times, unwrap_model(state.model)
    (reader, leave), skips = _enter(state, source, strategy), Skips(strategy)
    state.contract, state.allows_nonfinite = of_call  # another call may have been made since
    try:
        while has_updates_left(progress, plan):
            epoch, window, num_before = progress.epoch, None, progress.num_steps
            is_whole, begin = not progress.num_samples, perf_counter()
            windows = _begin_pass(state, reader, window_size)
            num_planned = begin_epoch(state, plan, reader, window_size, strategy, is_resized)
            is_resized = None
            for window in windows:
                times.data += perf_counter() - begin
                if check is not None:
                    state.task = check(state.model, window.batches, source.place, window.starts)
                    check = None
                if not inner.training:  # the wrapper of a model in eval mode is in training mode
                    state.model.train()  # only then: it would thaw layers that were set to eval
                lr = state.optimizer.param_groups[0]["lr"]
                lr = lr if type(lr) is float else plain_lr(lr)
                update = update_from(state, window)
                if update.is_finite is not True and watch.watches(update):
                    watch.look_at(update, window)
                _advance(state, reader, window, applied=update.applied)
                is_last = not has_updates_left(progress, plan) and watch.end()
                if update.applied:
                    yield Step(
                        index=progress.num_steps,
                        epoch=epoch,
                        num_steps=num_planned,
                        loss=update.loss,
                        lr=lr,
                        grad_norm=update.grad_norm,
                        num_items=update.num_items,
                        num_skipped=progress.num_skipped,
                        ends_epoch=window.ends_epoch,
                        is_last=is_last,
                    )
                else:
                    skips.add(state, update)
                    if yields_skipped:
                        yield None
                if is_last and not window.ends_epoch:
                    break
                begin = perf_counter()
            if window is None:
                _end_empty_epoch(state, reader)
                if yields_skipped:
                    yield None
            elif is_whole and progress.num_steps == num_before:
                skips.require_applied(epoch)
        watch.settle(wait=True)
        if not progress.num_samples:
            reader.close()  # at the end of an epoch there is no place in it to be found again
    except GeneratorExit:  # the loop was left: what is known of its last updates is still said
        watch.settle(wait=True)
        raise
    finally:
        leave()


def _leaving(state: TrainState, reader: Reader) -> Callable[[], None]:
    """Return the function to call at the end.

    It ends the workers of the loader, as those of a plain ``for`` loop end with it, unless they are
    persistent. Those of a stream stay too, as new ones might have to read it from its start.

    A generator that is still open when Python ends finds no names of its module any more.
    """
    num_before, forget = state.progress.num_steps, remember_configs(state.model)
    loader: Any = reader.source.loader
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    stay = is_stream or getattr(loader, "persistent_workers", False)
    is_ending, close = sys.is_finalizing, None if stay else reader.close

    def leave() -> None:
        if close is not None and not is_ending():
            close()
        state.is_training, state.task = False, None
        if state.progress.num_steps == num_before:
            forget()  # a batch that was refused decides nothing

    return leave


def _update_from(
    state: TrainState,
    window: Window,
    *,
    step_fn: StepFn,
    strategy: Strategy,
    source: Source,
    explain: Callable[..., None],
) -> Update:
    """Make the update of a window, and say what is wrong with its batches if it fails."""
    state.times.count_tokens(window.batches)  # before a loss_fn takes a column out of them
    begin = perf_counter()
    try:
        update = step_fn(state, window.batches, strategy)
        if not update.applied:
            drop_gradients(state)
    except EXPLAINED as error:
        strategy.explain(error)
        explain(error, state.model, window.batches, source.place, window.starts)
        raise
    state.times.update += perf_counter() - begin
    return update


def _reader_for(state: TrainState, source: Source, strategy: Strategy) -> Reader:
    """Return a reader of the loader: at the position of the state, if that was taken from it."""
    progress, held = state.progress, state.reader
    if isinstance(held, Reader):
        reader = held.continues(source, strategy)
        if progress.num_samples and reader and source.loader is not held.source.loader:
            say(
                f"the loader was built again, of the same data with the same settings: it resumes "
                f"behind the {progress.num_samples} rows of epoch {progress.epoch} that were used."
            )
    else:
        position = read_position(state.position, progress.num_samples)
        data = position.get("data")
        is_its_own = data is None or data == digest_of(source.facts, source.loader)
        reader = Reader(source, position, strategy) if is_its_own else None
    if reader is None:
        if progress.num_samples:
            say(
                f"another loader than that of the last updates: it begins at its start. Of the "
                f"other one {progress.num_samples} rows of epoch {progress.epoch} had been used."
            )
        progress.num_samples, reader = 0, Reader(source, None, strategy)
        state.weighs_equally = None
    return reader


def _enter(
    state: TrainState, source: Source, strategy: Strategy
) -> tuple[Reader, Callable[[], None]]:
    """Return the reader of the batches, and the function to call when the loop is left."""
    if state.is_training:
        raise ConfigError(
            "Another train_steps is still open on this state. Leave its loop, or close() it."
        )
    reader = _reader_for(state, source, strategy)
    state.reader, state.position = reader, None
    state.is_training, state.has_failed, state.task = True, None, None
    return reader, _leaving(state, reader)


def _begin_pass(state: TrainState, reader: Reader, window_size: int) -> Iterator[Window]:
    if not state.progress.num_samples:  # inside of an epoch the modes are those of the checkpoint
        call_own_train(state.model)
    return reader.windows(window_size, state.progress.epoch)


def _advance(state: TrainState, reader: Reader, window: Window, *, applied: bool) -> None:
    """Move the position past a window, before its step is seen by anyone."""
    progress = state.progress
    progress.num_samples += window.num_samples
    progress.num_steps += applied
    progress.num_skipped += not applied
    state.pace.num_done += 1
    state.pace.is_over = window.ends_epoch
    reader.settle(ends_epoch=window.ends_epoch)
    if window.ends_epoch:
        _end_epoch(state)


def _end_epoch(state: TrainState) -> None:
    state.progress.epoch += 1
    state.progress.num_samples = 0


def _end_empty_epoch(state: TrainState, reader: Reader) -> None:
    """End an epoch of which nothing is left in larger batches than before.

    Raises:
        DataError: There was nothing from its start on.
    """
    if not state.progress.num_samples:
        raise DataError(
            f"The training loader gave no batch in epoch {state.progress.epoch}. A generator can "
            "be read only once: pass a DataLoader or a list."
        )
    reader.settle(ends_epoch=True)
    state.pace.is_over = True
    _end_epoch(state)
