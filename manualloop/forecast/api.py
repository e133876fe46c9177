"""``preflight``: what a run will train, and what is wrong with it, before it begins."""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manualloop.arguments import check_arguments
from manualloop.batches import num_rows
from manualloop.checkpoint.folders import free_bytes, local_folder
from manualloop.checks import check_batches, check_run
from manualloop.data.collate import tokenizer_of
from manualloop.errors import ConfigError, DistributedError
from manualloop.forecast.chance import Chance, chance_of
from manualloop.forecast.doubts import doubts_about
from manualloop.forecast.passes import (
    NUM_TIMED,
    LargestBatch,
    Passes,
    passes_of,
    run_largest,
    run_passes,
)
from manualloop.forecast.report import PreflightReport
from manualloop.forecast.sizes import bytes_of_checkpoint, bytes_of_optimizer, count_parameters
from manualloop.forecast.splits import (
    SplitSummary,
    first_batches,
    largest_batch,
    plan_of,
    rows_in_common,
    splits_of,
    summarize,
)
from manualloop.forecast.traces import without_a_trace
from manualloop.keywords import instead_of
from manualloop.loop import check_call, train_loop, try_metrics
from manualloop.models import model_name
from manualloop.notices import logger
from manualloop.optimizers.schedules import require_length, require_schedule
from manualloop.optimizers.together import class_of, each, for_each
from manualloop.plan import Settings, settings_of
from manualloop.reading.describe import batch_size_of
from manualloop.reading.sources import Source, source_of
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy, prepare, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.tasks.loss import check_own_loss, of_model
from manualloop.tasks.names import class_names
from manualloop.tasks.task import Task, resolve_task
from manualloop.types import LossFn, Plan, Terms
from manualloop.update import StepFn

_MOST_READ = 16


def preflight(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Any]] | Iterable[Any],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    lr_scheduler: str | LRScheduler | Sequence[str | LRScheduler | None] | None = "linear",
    *,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    num_warmup_steps: float = 0,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    step_fn: StepFn | None = None,
    strategy: Strategy | None = None,
    extras: dict[str, Any] | None = None,
    evaluate: Callable[[], Mapping[str, Any]] | None = None,
    best_metric: str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    keep_checkpoints: int = 2,
    **others: Any,
) -> PreflightReport:
    """Report what ``train_loop`` will train with these arguments, and refuse what it would refuse.

    Put it where ``train_loop`` will be called, with the same arguments: ``print(preflight(model,
    loaders, num_epochs=3))``. It counts parameters and updates, looks at rows, labels, truncation
    and padding of all splits, runs a few batches of the first epoch and the largest one forward and
    backward, and compares the size of checkpoints with the free disk. A mistake is raised as
    ``train_loop`` raises it; what is only worth a second look is in ``notes``.

    It leaves no trace: weights, gradients, buffers, modes, configs, random states and the positions
    of loaders are what they were, so that a run after it has the bits of a run without it. Only the
    model moves to the device of the strategy, as in ``train_loop``, and the peak of torch's memory
    statistics on a CUDA device begins anew. With several processes call it on each; the model then
    has the weights of rank 0 on all of them, as it has in ``train_loop``.

    Args:
        model: The model.
        loaders: The loaders by split, as ``prepare_dataloaders`` returns them, of which the one
            whose name begins with "train" is trained on; or that one alone.
        optimizer: As in ``train_loop``.
        lr_scheduler: As in ``train_loop``.
        num_epochs: As in ``train_loop``.
        max_steps: As in ``train_loop``.
        num_warmup_steps: As in ``train_loop``.
        gradient_accumulation_steps: As in ``train_loop``.
        max_grad_norm: As in ``train_loop``.
        loss_fn: As in ``train_loop``.
        terms: As in ``train_loop``.
        step_fn: As in ``train_loop``. It is not called, and no pass is made.
        strategy: As in ``train_loop``.
        extras: As in ``train_loop``.
        evaluate: As in ``train_loop``; a ``partial`` of ``evaluate_loop`` is tried on one batch.
        best_metric: As in ``train_loop``.
        checkpoint_dir: As in ``train_loop``. Nothing is written there.
        keep_checkpoints: As in ``train_loop``.
        others: Other arguments of ``train_loop``, which change nothing in the report.

    Raises:
        ConfigError: The arguments do not fit together.
        DataError: The data cannot be trained on.
        ModelError: The model or the optimizer cannot be trained.

    >>> import torch
    >>> model = nn.Linear(1, 1)
    >>> rows = [{"x": torch.ones(4, 1)}] * 10
    >>> report = preflight(model, rows, num_epochs=2, loss_fn=lambda m, batch: m(batch["x"]).mean())
    >>> report.num_steps, report.parameters.num_trainable, model.weight.grad
    (20, 2, None)
    """
    given = dict(locals())
    check_arguments(model=model, extras=extras)
    splits, train = splits_of(loaders)
    given["train_dataloader"] = splits[train]
    arguments = _arguments_of_loop(given, others)
    settings = settings_of(arguments)
    strategy = begin_call(strategy_for(model, strategy), "preflight", **settings._asdict())
    with _notes() as notes:
        plan, optimizer, _, _ = check_call(arguments, settings, strategy)
        _check_length(lr_scheduler, optimizer, plan)
        state = TrainState(model, optimizer, None, extras=extras or {})
        check_run(state, strategy, calls_step=step_fn is None)
        prepared = _prepared(state, arguments["optimizer"] is not None, strategy)
        functions = {"loss_fn": loss_fn, "terms": terms, "step_fn": step_fn, "extras": extras}
        with without_a_trace(
            prepared or model,
            strategy.device,
            loaders=splits,
            **{name: function for name, function in functions.items() if function is not None},
        ):
            found = _look(prepared, model, splits, train, settings, strategy, step_fn is not None)
        try_metrics(evaluate, best_metric)
    return _report(state, plan, train, found, strategy, arguments, notes)


class _Found(NamedTuple):
    """What was found in the data and by the passes.

    Attributes:
        splits: The splits.
        passes: The passes; None if there were none.
        largest: The pass of the largest batch; None if there was none.
        chance: The loss of guessing; None if it is unknown.
    """

    splits: dict[str, SplitSummary]
    passes: Passes | None
    largest: LargestBatch | None
    chance: Chance | None


def _arguments_of_loop(given: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of ``train_loop``, with their defaults where they are not given."""
    parameters = inspect.signature(train_loop).parameters
    for name, value in others.items():
        if name not in parameters:
            raise ConfigError(
                f"preflight takes the arguments of train_loop, which has no {name}=. "
                f"{instead_of(name, value, parameters)}"
            )
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return {name: given.get(name, others.get(name, value)) for name, value in defaults.items()}


def _check_length(lr_scheduler: Any, optimizer: Optimizer, plan: Plan) -> None:
    """Refuse schedules of the user's that drive another optimizer, or end before the run."""
    for schedule, own in zip(for_each(optimizer, lr_scheduler), each(optimizer), strict=True):
        if not isinstance(schedule, str):
            require_schedule(schedule, own)
            require_length(schedule, plan.num_steps)


def _prepared(state: TrainState, is_given: bool, strategy: Strategy) -> nn.Module | None:
    """Put the model where it runs, and an optimizer that is the user's; None where both must be."""
    if is_given:
        state.model, state.optimizer = prepare(strategy, state.model, state.optimizer)
        return state.model
    try:
        return prepare_model(strategy, state.model)
    except DistributedError:  # it is sharded together with an optimizer, which train_loop makes
        return None


def _look(
    prepared: nn.Module | None,
    model: nn.Module,
    splits: Mapping[str, Any],
    train: str,
    settings: Settings,
    strategy: Strategy,
    by_step_fn: bool,
) -> _Found:
    """Look at the splits, check the first window, and run some batches."""
    loss_fn, terms = settings.loss_fn, of_model(settings.terms, model)
    loader, size_of_window = splits[train], settings.gradient_accumulation_steps
    source, plans = source_of(loader), {name: plan_of(one) for name, one in splits.items()}
    read = first_batches(loader, max(NUM_TIMED, min(int(size_of_window), _MOST_READ)))
    starts = [0]
    for batch in read[:-1]:
        starts.append(starts[-1] + num_rows(batch))
    _check_window(model, source, read[:size_of_window], starts, settings, strategy)
    task = _task_of(model, read[0])
    summaries = {
        name: summarize(
            *(one, class_names(model, one), plans[name], read if name == train else (), task)
        )
        for name, one in splits.items()
    }
    for name in splits.keys() - {train}:
        number = rows_in_common(loader, splits[name])
        summaries[name] = summaries[name]._replace(num_in_train=number)
    if prepared is None or by_step_fn:
        return _Found(summaries, None, None, None)
    run = passes_of(prepared, strategy, source, loss_fn, terms)
    passes = run_passes(prepared, run, read[:_MOST_READ])
    largest = largest_batch(loader, plans[train], read)
    measured = run_largest(prepared, run, largest, strategy.device)
    chance = None
    if task is not None:
        chance = chance_of(model, task, summaries[train], read[0], loss_fn, terms)
    return _Found(summaries, passes, measured, chance)


def _check_window(
    model: nn.Module,
    source: Source,
    window: Sequence[Any],
    starts: Sequence[int],
    of: Settings,
    strategy: Strategy,
) -> None:
    """Check the first window as ``train_steps`` does before its update."""
    tokenizer = tokenizer_of(source.loader)
    if of.loss_fn is not None or of.step_fn is not None:
        check_own_loss(model, window, tokenizer=tokenizer, loss_fn=of.loss_fn, strategy=strategy)
        return
    is_whole = len(window) == of.gradient_accumulation_steps or len(window) < _MOST_READ
    check_batches(
        model,
        window,
        source.place,
        starts[: len(window)],
        needs_labels=of.terms is None,
        needs_items=is_whole,
        tokenizer=tokenizer,
    )


def _task_of(model: nn.Module, batch: Any) -> Task | None:
    return resolve_task(model, batch) if isinstance(batch, Mapping) and "labels" in batch else None


def _report(
    state: TrainState,
    plan: Plan,
    train: str,
    found: _Found,
    strategy: Strategy,
    arguments: Mapping[str, Any],
    notes: Sequence[str],
) -> PreflightReport:
    optimizer, passes = state.optimizer, found.passes
    counted = count_parameters(state.model, optimizer)
    folder = arguments["checkpoint_dir"]
    num_kept = arguments["keep_checkpoints"] + (arguments["best_metric"] is not None) + 1
    accumulation = int(arguments["gradient_accumulation_steps"])
    batch_size = batch_size_of(arguments["train_dataloader"])
    report = PreflightReport(
        model=model_name(state.model),
        parameters=counted,
        without_gradient=() if passes is None else passes.without_gradient,
        optimizer=_describe(optimizer, arguments["lr_scheduler"]),
        device=str(strategy.device),
        precision=strategy.precision,
        world_size=strategy.world_size,
        num_steps=plan.num_steps,
        num_epochs=plan.num_epochs,
        num_steps_per_epoch=plan.num_steps_per_epoch,
        rows_per_step=batch_size and batch_size * accumulation * strategy.world_size,
        splits=found.splits,
        train=train,
        loss=None if passes is None else passes.loss,
        chance=found.chance,
        seconds=_seconds(passes, plan, found.splits[train], accumulation, strategy.world_size),
        num_timed=0 if passes is None else passes.num_timed,
        largest=found.largest,
        optimizer_bytes=bytes_of_optimizer(optimizer),
        checkpoint_bytes=bytes_of_checkpoint(state.model, optimizer),
        num_checkpoints=0 if folder is None else num_kept,
        free_bytes=None if folder is None else free_bytes(local_folder(folder)),
    )
    return replace(report, notes=(*notes, *doubts_about(report)))


def _describe(optimizer: Any, lr_scheduler: Any) -> str:
    """Return optimizers and schedules in words."""
    parts = []
    for one in each(optimizer):
        rates = dict.fromkeys(
            f"{float(group['lr']):g}" for group in one.param_groups if group["lr"]
        )
        parts.append(f"{class_of(one)} at {' and '.join(rates)}" if rates else class_of(one))
    named = lr_scheduler if isinstance(lr_scheduler, list | tuple) else [lr_scheduler]
    names = [n if isinstance(n, str) else "no" if n is None else type(n).__name__ for n in named]
    return f"{', '.join(parts)}, {', '.join(dict.fromkeys(names))} schedule"


def _seconds(
    passes: Passes | None, plan: Plan, split: SplitSummary, accumulation: int, world_size: int
) -> tuple[float, float] | None:
    """Return the least and the most time of all passes of a run, on one rank."""
    if passes is None:
        return None
    if plan.num_steps_per_epoch is None or split.num_batches is None:
        least, most = (plan.num_steps * accumulation * seconds for seconds in passes.seconds)
        return least, most
    num_epochs = plan.num_steps / plan.num_steps_per_epoch
    if split.num_tokens is not None and passes.counts_tokens:
        places = split.num_tokens * num_epochs / world_size
        return passes.rates[0] * places, passes.rates[1] * places
    num_batches = split.num_batches * num_epochs / world_size
    return passes.seconds[0] * num_batches, passes.seconds[1] * num_batches


@contextmanager
def _notes() -> Iterator[list[str]]:
    """Collect what this thread would log; after an error it is logged all the same."""
    records: list[logging.LogRecord] = []
    lines: list[str] = []

    here = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        if record.thread != here:
            return True  # of another run
        records.append(record)
        lines.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        yield lines
    except BaseException:
        logger.removeFilter(keep)
        for record in records:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(keep)
