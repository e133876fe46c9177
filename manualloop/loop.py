"""``train_loop``: a run in one call, built on ``train_steps``.

``train_loop`` checks the arguments, builds the parts of the run and resumes it. ``_follow`` is the
loop over its steps, and tells what happens after each; ``run/run.py`` does it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Real
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manualloop.arguments import all_at_once, check_arguments, is_positive
from manualloop.body import watching_body
from manualloop.checkpoint.manifest import metric_name
from manualloop.errors import ConfigError
from manualloop.evaluation.trial import try_evaluation
from manualloop.keywords import explains_unknown
from manualloop.notices import say
from manualloop.optimizers.prepare import prepare_optimizer
from manualloop.optimizers.schedules import check_schedule, prepare_scheduler
from manualloop.optimizers.together import as_optimizer, each, for_each
from manualloop.plan import Settings, plan_run, settings_of
from manualloop.reading.sources import source_of
from manualloop.run.cadence import Cadence, parse_cadence
from manualloop.run.delivery import check_trackers
from manualloop.run.evaluations import check_evaluation, require_metric
from manualloop.run.folder import check_folder, open_run_folder
from manualloop.run.report import Report, report_of
from manualloop.run.run import Run
from manualloop.run.stopping import Agreement, Stopping, agree_at_updates, counted
from manualloop.run.table import ends_of_intervals
from manualloop.state import Pace, TrainState, has_updates_left
from manualloop.steps import contract_of, start_steps
from manualloop.strategy.base import Strategy
from manualloop.strategy.calls import agree, in_call
from manualloop.strategy.select import strategy_for
from manualloop.times import Times, parse_seconds
from manualloop.types import LossFn, OnNonfinite, Plan, Record, Step, Terms, Tracker
from manualloop.update import StepFn


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    """The result of a run.

    Attributes:
        state: Model, optimizer and schedule as the last update left them, and the progress.
        metrics: Metrics of the last evaluation; empty if there was none.
        best_metrics: Metrics of the best evaluation by ``best_metric``; empty without it.
        best_step: Number of updates before the best evaluation; None without a ``best_metric``.
        best_checkpoint: Folder of the best checkpoint, which ``from_pretrained`` takes; None
            without a ``best_metric`` or a ``checkpoint_dir``.
        last_checkpoint: Folder of the newest checkpoint; None without a ``checkpoint_dir``.
        history: Records of training and evaluation, oldest first. The history of a resumed run
            includes the records of earlier processes.
        stopped_by: Reason for the end of the run: "num_epochs", "max_steps", "patience" or
            "max_time". Of a run inside another one also a signal, such as "SIGTERM".
    """

    state: TrainState
    metrics: dict[str, float]
    best_metrics: dict[str, float]
    history: list[Record]
    stopped_by: str
    best_step: int | None = None
    best_checkpoint: Path | None = None
    last_checkpoint: Path | None = None

    @property
    def times(self) -> Times:
        """Where the time of this process went: ``print(result.times)``."""
        return self.state.times

    def __repr__(self) -> str:
        ends = {end for pair in ends_of_intervals(self.metrics).values() for end in pair}
        numbers = {n: value for n, value in self.metrics.items() if isinstance(value, Real)}
        scores = "".join(f", {n}={value:.4g}" for n, value in numbers.items() if n not in ends)
        steps = self.state.progress.num_steps
        return f"TrainResult({steps} steps, stopped_by={self.stopped_by!r}{scores})"

    def to_pandas(self) -> Any:
        """Return the history as a ``pandas.DataFrame`` with one row per record."""
        from pandas import DataFrame  # a dependency of datasets

        return DataFrame(self.history)

    def plot(self) -> Any:
        """Draw losses, scores and the learning rate, with the best step; return the figure.

        Raises:
            ImportError: matplotlib is missing: ``pip install manualloop[plot]``.
        """
        from manualloop.run.plot import plot_history

        return plot_history(self)

    def report(self, path: str | os.PathLike[str], *args: Any, **options: Any) -> Path:
        """Write the run as a page of HTML; the arguments are those of ``write_report``."""
        from manualloop.report.page import write_report  # it loads a template engine

        return write_report(self, path, *args, **options)


@explains_unknown
def train_loop(
    model: nn.Module,
    train_dataloader: Iterable[Any],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    lr_scheduler: str | LRScheduler | Sequence[str | LRScheduler | None] | None = "linear",
    *,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    max_time: float | str | None = None,
    num_warmup_steps: float = 0,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    step_fn: StepFn | None = None,
    on_nonfinite: OnNonfinite = "raise",
    strategy: Strategy | None = None,
    extras: dict[str, Any] | None = None,
    evaluate: Callable[[], Mapping[str, Any]] | None = None,
    evaluate_every: Cadence = "epoch",
    best_metric: str | None = None,
    patience: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: Cadence = "epoch",
    keep_checkpoints: int = 2,
    resume: bool | Literal["auto"] = "auto",
    on_step: Callable[[Step], object] | None = None,
    trackers: Sequence[Tracker] = (),
    log_every: Cadence = 50,
    progress_bar: bool = True,
    preflight: bool = True,
) -> TrainResult:
    """Train a model. With the defaults, a run equals the hand-written PyTorch loop bit for bit.

    ::

        resume from the newest checkpoint, if there is one
        for step in train_steps(...):
            log                     if due
            on_step(step)
            evaluate()              if due, and after the last step
            save                    if due, if it is the best, and after the last step
            leave                   if patience or max_time is over, or at a signal
        raise KeyboardInterrupt or SystemExit       if that was a signal

    With a ``checkpoint_dir`` a run can be killed at any moment. The same command resumes from the
    newest checkpoint and ends with the same bits. Ctrl-C, SIGTERM and SIGUSR1 end the run after the
    current update and a checkpoint: Ctrl-C then raises ``KeyboardInterrupt``, the others
    ``SystemExit(128 + number)``, so that nothing behind ``train_loop`` takes the run for complete.
    A second signal ends it at once. ``max_time`` and ``patience`` return a result.

    With several processes call it on each. Batches are distributed among them, rank 0 prints and
    writes, and they end together. ``evaluate`` is called on each, and the result of rank 0 counts.

    Args:
        model: The model, which is trained in place.
        train_dataloader: Loader of dicts that the model takes; with ``loss_fn`` any iterable of
            batches.
        optimizer: The optimizer; None uses ``prepare_optimizer(model)``, AdamW with a learning rate
            of 5e-5 and no weight decay. A list of several optimizers, each for parameters of its
            own, is stepped as one.
        lr_scheduler: A name (see ``prepare_scheduler``), a scheduler that is stepped once per
            update, or None for a constant rate. The default decays linearly to 0. With several
            optimizers a name holds for each of them, or a list has one entry for each.
        num_epochs: Number of passes over the data; 3 if ``max_steps`` is also None.
        max_steps: Number of updates, instead of ``num_epochs``.
        max_time: Time after which this process ends the run with a checkpoint, in seconds or as
            ``"30 s"``, ``"10 min"`` or ``"2 h"``.
        num_warmup_steps: Number of updates in which a schedule given by name rises from 0; a float
            below 1 is a share of all updates.
        gradient_accumulation_steps: Number of batches per update, which are weighted by items.
        max_grad_norm: Norm to which gradients are clipped; None does not clip.
        loss_fn: ``loss_fn(model, batch)`` returns a mean loss, or ``(mean_loss, num_items)``.
        terms: ``terms(outputs, batch)`` returns ``[(mean, num_items), ...]``, for a loss that is a
            sum of means, each over items of its own; instead of ``loss_fn``.
        step_fn: ``step_fn(state, batches, strategy) -> Update`` replaces the whole update.
        on_nonfinite: Reaction to a loss or gradient norm that is NaN or infinite: ``"raise"``,
            ``"skip"`` or ``"ignore"``; see ``train_steps``.
        strategy: Device and precision; None uses ``prepare_strategy("auto")``.
        extras: Objects to keep in ``TrainState.extras`` and to save, such as an average of the
            weights or a random generator.
        evaluate: Function without arguments that returns metrics by name.
        evaluate_every: Interval of evaluations: a number of updates (200), ``"epoch"``,
            ``"0.25 epoch"`` or ``"10 min"``. The end of the run always evaluates.
        best_metric: Name of the metric that decides which evaluation is the best one. Of losses
            and errors (``loss``, ``..._loss``, ``perplexity``, ``mse``, ``mae``, ``rmse``, ``wer``,
            ``cer``, ``..._error``) it is the lowest, of all others the highest; a sign before the
            name decides otherwise: ``"-x"`` takes the lowest, ``"+x"`` the highest.
        patience: Number of evaluations without a better ``best_metric`` after which the run ends.
        checkpoint_dir: Folder of this run's checkpoints and of its ``history.jsonl``, which only
            one run at a time can use. It is created if it does not exist.
        checkpoint_every: Interval of checkpoints, as for ``evaluate_every``. A new best evaluation
            and the end of the run always save.
        keep_checkpoints: Number of newest checkpoints to keep, besides the best one.
        resume: ``"auto"`` resumes if the folder holds a checkpoint, and returns at once if that is
            of a finished run. True requires a checkpoint, False requires that there is none.
        on_step: Function that is called with every step, before an evaluation.
        trackers: Functions that are called with each record of ``history`` on rank 0, in order and
            each record once over all processes of the run, such as those of
            ``manualloop.tracking``. A record is a dict; see ``docs/tracking.md``.
        log_every: Interval of training records in ``history``, as for ``evaluate_every``. The first
            and the last step are always recorded.
        progress_bar: Whether to show a table of the evaluations and a bar (docs/watching.md).
        preflight: Whether to check the first window before its update.

    Returns:
        The trained state, the metrics and the history.

    Raises:
        CheckpointError: ``checkpoint_dir`` cannot be used, or belongs to another run.
        ConfigError: The arguments do not fit together.
        DataError: The data cannot be trained on, or no update of an epoch was applied.
        KeyboardInterrupt: Ctrl-C, with a ``checkpoint_dir`` after the update was saved.
        ModelError: The model or the optimizer cannot be trained.
        NonFiniteError: The loss or gradient norm is NaN or infinite; the message names the rows.
        SystemExit: SIGTERM or SIGUSR1 with a ``checkpoint_dir``, after the update was saved.

    >>> import torch
    >>> model = nn.Linear(1, 1)
    >>> rows = [{"x": torch.ones(4, 1)}] * 10
    >>> train_loop(model, rows, max_steps=20, loss_fn=lambda model, batch: model(batch["x"]).mean(),
    ...            evaluate=lambda: {"weight": 1.0}, progress_bar=False)
    TrainResult(20 steps, stopped_by='max_steps', weight=1)
    """
    arguments = dict(locals())
    check_arguments(model=model)  # everything else is made for it
    strategy = in_call(strategy_for(model, strategy), "train_loop")
    settings = settings_of(arguments)
    agreement, run_strategy = agree_at_updates(strategy)
    plan, optimizer, due, max_seconds = check_call(arguments, settings, strategy, agreement)
    _tell_unused(arguments)
    given = {name: arguments[name] for name in _SAME_ON_RANKS} | settings._asdict()
    agree(strategy, "train_loop", checkpoint_dir=checkpoint_dir and Path(checkpoint_dir), **given)

    schedule = _schedules(lr_scheduler, optimizer, plan.num_steps, num_warmup_steps)
    stopping = Stopping(max_seconds, agreement)
    state = TrainState(model, optimizer, schedule, extras=extras or {})
    source = source_of(train_dataloader)
    contract = contract_of(state, source, plan, strategy, arguments)

    with ExitStack() as stack:
        folder = stack.enter_context(
            open_run_folder(checkpoint_dir, state, strategy, resume, keep_checkpoints, best_metric)
        )
        report = report_of(plan, max_seconds, arguments, is_main=strategy.is_main)
        run = Run(
            state, report, folder, stopping, evaluate, best_metric, patience, strategy, trackers
        )
        stack.callback(run.close)
        run.resume(train_dataloader, on_step, contract)
        steps = start_steps(
            state,
            source,
            plan,
            contract,
            run_strategy,
            settings,
            preflight=preflight,
            yields_skipped=True,
        )
        stack.enter_context(closing(steps))

        if has_updates_left(state.progress, plan):
            run.rehearse()
            try_metrics(evaluate if preflight else None, best_metric)
        run.open_trackers(contract, arguments)
        if folder is not None:
            stack.enter_context(stopping.watching_signals())
        run.catch_up()
        if run.stopped_by is None:
            _follow(counted(steps, run_strategy, step_fn), state, report, run, due, on_step)
        run.finish()

    if folder is not None:
        stopping.raise_signal(run.place, strategy)
    return _result(state, run, report)


_SAME_ON_RANKS = (
    "evaluate",
    "evaluate_every",
    "best_metric",
    "patience",
    "checkpoint_every",
    "resume",
    "num_epochs",
    "max_steps",
)
"""Arguments that decide when the ranks of a run exchange something, beside the settings."""


class Due(NamedTuple):
    """The cadences of a run, each a function of a step and the place behind it.

    Attributes:
        log: Tells whether a record of training is due.
        evaluation: Tells whether an evaluation is due.
        save: Tells whether a checkpoint is due.
    """

    log: Callable[[Step | None, Pace], bool]
    evaluation: Callable[[Step | None, Pace], bool]
    save: Callable[[Step | None, Pace], bool]


def _follow(
    steps: Iterable[Step | None],
    state: TrainState,
    report: Report,
    run: Run,
    due: Due,
    on_step: Callable[[Step], object] | None,
) -> None:
    """Make the updates of a run, and what is due after each; None is one that was skipped."""
    is_first, pace = True, state.pace
    for step in steps:
        is_last = step is not None and step.is_last
        is_logged = due.log(step, pace) or is_last or (step is not None and step.index == 1)
        if step is not None:
            report.add(step, pace, closes=is_logged)
            if on_step is not None:
                with watching_body(state) if is_first else nullcontext():
                    on_step(step)
            if is_first:  # with the states that the first update has made
                run.rehearse()
                is_first = False
        elif is_logged:
            report.end_interval()
        is_evaluated = due.evaluation(step, pace) or is_last
        if is_evaluated:
            run.evaluate()
        if due.save(step, pace) or is_last or (is_evaluated and run.is_best):
            run.save()
        if is_logged or is_evaluated:
            run.track()
        run.stopped_by = run.reason_to_stop()
        if run.stopped_by is not None:
            run.save()  # unless that was done just now
            break


def _result(state: TrainState, run: Run, report: Report) -> TrainResult:
    planned_end = "max_steps" if report.plan.num_epochs is None else "num_epochs"
    best_checkpoint, last_checkpoint = run.find_checkpoints()
    return TrainResult(
        state,
        metrics=run.metrics,
        best_metrics=run.best_metrics,
        history=report.history.records,
        stopped_by=run.stopped_by or planned_end,
        best_step=run.best_step,
        best_checkpoint=best_checkpoint,
        last_checkpoint=last_checkpoint,
    )


def check_call(
    arguments: Mapping[str, Any],
    settings: Settings,
    strategy: Strategy,
    agreement: Agreement | None = None,
) -> tuple[Plan, Optimizer, Due, float | None]:
    """Check all arguments of ``train_loop``, and raise what is wrong with them as one error.

    Args:
        arguments: The arguments by name.
        settings: Those that an update depends on.
        strategy: The strategy of the run.
        agreement: The agreement by which its ranks act on time together; None for a single rank.

    Returns:
        The length of the run, its optimizer, what is due when, and ``max_time`` in seconds.

    Raises:
        ConfigError: The arguments do not fit together.
        DataError: The data cannot be trained on.
    """
    model, loader, schedule = itemgetter("model", "train_dataloader", "lr_scheduler")(arguments)
    ends = {name: arguments[name] for name in ("num_epochs", "max_steps")}
    cadences = {
        name: arguments[name] for name in ("log_every", "evaluate_every", "checkpoint_every")
    }
    of_evaluation = itemgetter("evaluate", "best_metric", "patience", "on_step")(arguments)
    of_folder = itemgetter("checkpoint_dir", "resume", "keep_checkpoints")(arguments)
    others = {name: arguments[name] for name in ("extras", "progress_bar", "preflight")}
    with all_at_once() as check:
        plan = check(plan_run, loader, settings, world_size=strategy.world_size, **ends)
        num_steps, _, per_epoch = plan or Plan(sys.maxsize, None, 1)  # any, if that was refused
        parse = partial(parse_cadence, num_steps_per_epoch=per_epoch, agreement=agreement)
        due = Due(*(check(parse, name, cadence) for name, cadence in cadences.items()))
        max_seconds = check(parse_seconds, "max_time", arguments["max_time"])
        check(check_evaluation, *of_evaluation)
        check(check_folder, *of_folder)
        check(check_trackers, arguments["trackers"])
        check(check_arguments, **others)
        optimizer = check(_optimizer_of, model, arguments["optimizer"])
        warmup = arguments["num_warmup_steps"]
        check(_check_schedules, schedule, optimizer, num_steps, warmup)
    return plan, optimizer, due, max_seconds


def _optimizer_of(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None) -> Optimizer:
    return prepare_optimizer(model) if optimizer is None else as_optimizer(optimizer)


def _schedules(
    lr_scheduler: Any, optimizer: Any, num_steps: int, num_warmup_steps: float
) -> list[LRScheduler | None]:
    """Return the schedule of each optimizer: those that were named are built."""
    return [
        prepare_scheduler(own, one, num_training_steps=num_steps, num_warmup_steps=num_warmup_steps)
        if isinstance(one, str)
        else one
        for one, own in zip(for_each(optimizer, lr_scheduler), each(optimizer), strict=True)
    ]


def _check_schedules(
    lr_scheduler: Any, optimizer: Any, num_steps: int, num_warmup_steps: float
) -> None:
    pairs: Iterable[tuple[Any, Any]] = [(lr_scheduler, None)]
    if optimizer is not None:  # else there is none to be made of the model
        pairs = zip(for_each(optimizer, lr_scheduler), each(optimizer), strict=True)
    if num_warmup_steps != 0 and not is_positive(num_warmup_steps):
        raise ConfigError(
            f"num_warmup_steps={num_warmup_steps!r} is neither a number of updates (100) nor a "
            "share of them (0.1)."
        )
    for one, own in pairs:
        if isinstance(one, str):
            if own is not None:
                check_schedule(own, one, num_steps, num_warmup_steps)
        elif num_warmup_steps:
            raise ConfigError(
                f"num_warmup_steps={num_warmup_steps} belongs to a schedule given by name. Build "
                "it into the scheduler: prepare_scheduler(optimizer, num_warmup_steps=...)."
            )


def try_metrics(evaluate: object, best_metric: str | None) -> None:
    """Try ``evaluate`` on one batch, if it can be looked into, and look for ``best_metric``.

    Raises:
        ConfigError: The metric is not among its results.
    """
    found = try_evaluation(evaluate)
    if found is None or best_metric is None or (name := metric_name(best_metric)) in found.names:
        return
    if found.are_all:
        require_metric(best_metric, dict.fromkeys(found.names, 0.0))
    say(
        f"best_metric={best_metric!r} is not among {', '.join(found.names) or 'no metrics'}, "
        f"which one batch gave. If the other metrics do not return {name!r}, the run ends with a "
        "checkpoint after the first evaluation."
    )


def _tell_unused(arguments: Mapping[str, Any]) -> None:
    for name, needed in (("evaluate_every", "evaluate"), ("checkpoint_every", "checkpoint_dir")):
        if arguments[needed] is None and arguments[name] != "epoch":
            say(f"{name}={arguments[name]!r} has no effect without {needed}=.")
