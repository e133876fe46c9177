"""``train_loop``: a run in one call. A driver over ``train_steps``, and nothing it could not do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from manualloop.cadence import Cadence, parse_cadence
from manualloop.errors import ConfigError
from manualloop.history import History, Record
from manualloop.optim import prepare_optimizer, prepare_scheduler
from manualloop.progress import ProgressBar
from manualloop.state import TrainState
from manualloop.strategy import Strategy, strategy_for
from manualloop.training import Plan, plan_run, train_steps
from manualloop.types import LossFn, Step
from manualloop.update import OnNonfinite, StepFn


@dataclass(frozen=True, slots=True, eq=False)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        state: Model, optimizer and schedule as the last update left them, and the progress.
        metrics: Of the last evaluation; empty if there was none.
        best_metrics: Of the best evaluation by ``best_metric``; empty without it.
        history: Records of training and evaluation, oldest first: see ``manualloop.history``.
        stopped_by: What ended the run: "num_epochs", "max_steps" or "patience".
    """

    state: TrainState
    metrics: dict[str, float]
    best_metrics: dict[str, float]
    history: list[Record]
    stopped_by: str

    def __repr__(self) -> str:
        scores = "".join(f", {name}={value:.4g}" for name, value in self.metrics.items())
        steps = self.state.progress.num_steps
        return f"TrainResult({steps} steps, stopped_by={self.stopped_by!r}{scores})"

    def plot(self) -> Any:
        """Draw loss, learning rate and evaluations over the steps; return matplotlib's figure.

        Raises:
            ImportError: matplotlib is missing: ``pip install manualloop[plot]``.
        """
        from manualloop.plot import plot_history

        return plot_history(self.history)


def train_loop(
    model: nn.Module,
    train_dataloader: Iterable[Any],
    optimizer: Optimizer | None = None,
    lr_scheduler: str | LRScheduler | None = "linear",
    *,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    num_warmup_steps: float = 0,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    loss_fn: LossFn | None = None,
    step_fn: StepFn | None = None,
    on_nonfinite: OnNonfinite = "raise",
    strategy: Strategy | None = None,
    extras: dict[str, Any] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: Cadence = "epoch",
    best_metric: str | None = None,
    patience: int | None = None,
    on_step: Callable[[Step], object] | None = None,
    log_every: Cadence = 50,
    progress_bar: bool = True,
    preflight: bool = True,
) -> TrainResult:
    """Train a model. With its defaults, to the bit, what the hand-written PyTorch loop does.

    ::

        for step in train_steps(...):
            log                     if due
            on_step(step)
            evaluate()              if due, and after the last step
            leave                   if patience is exhausted

    Args:
        model: Trained in place.
        train_dataloader: Of dicts that the model takes; any iterable of anything with ``loss_fn``.
        optimizer: None: ``prepare_optimizer(model)``, AdamW with a learning rate of 5e-5 and no
            weight decay.
        lr_scheduler: A name (see ``prepare_scheduler``), a scheduler of your own, stepped once an
            update, or None for a constant rate. The default decays linearly to 0.
        num_epochs: Passes over the data. With ``max_steps`` also None: 3.
        max_steps: Updates, instead.
        num_warmup_steps: Updates over which a schedule given by name rises from 0; a float below
            1 is a share of all updates.
        gradient_accumulation_steps: Batches an update, weighted by items.
        max_grad_norm: Norm to which gradients are clipped; None does not clip.
        loss_fn: ``loss_fn(model, batch)`` returns a mean loss, or ``(mean_loss, num_items)``.
        step_fn: ``step_fn(state, batches, strategy) -> Update`` replaces the whole update.
        on_nonfinite: What a loss or gradient norm that is NaN or infinite does: ``"raise"``,
            ``"skip"`` or ``"ignore"``; see ``train_steps``.
        strategy: Device and precision; None: ``prepare_strategy("auto")``.
        extras: Kept in ``TrainState.extras``.
        evaluate: Called without arguments; returns metrics by name.
        evaluate_every: Updates (200), ``"epoch"``, ``"0.25 epoch"`` or ``"10 min"``; the end of
            the run always evaluates.
        best_metric: A name among the metrics to maximise, or with "-" before it to minimise.
        patience: Evaluations without a better ``best_metric`` after which the run ends.
        on_step: Called with every step, before an evaluation.
        log_every: When ``history`` gets a record of training; the first step and the last always
            do.
        progress_bar: Show progress: a bar in a terminal or notebook, lines in a log file.
        preflight: Check the first window before it is used.

    Returns:
        The trained state, the metrics and the history.

    Raises:
        ConfigError: The arguments do not fit together.
        DataError: The data cannot be trained on.
        ModelError: The model or the optimizer cannot be trained.
        NonFiniteError: The loss or the gradient norm is NaN or infinite; it names the rows.

    >>> import torch
    >>> model = nn.Linear(1, 1)
    >>> rows = [{"x": torch.ones(4, 1)}] * 10
    >>> train_loop(model, rows, max_steps=20, loss_fn=lambda model, batch: model(batch["x"]).mean(),
    ...            evaluate=lambda: {"weight": 1.0}, progress_bar=False)
    TrainResult(20 steps, stopped_by='max_steps', weight=1)
    """
    length: dict[str, Any] = {
        "num_epochs": num_epochs,
        "max_steps": max_steps,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    plan = plan_run(train_dataloader, max_grad_norm=max_grad_norm, **length)
    _check_evaluation(evaluate, best_metric, patience)
    log_is_due = parse_cadence("log_every", log_every, plan.num_steps_per_epoch)
    evaluation_is_due = parse_cadence("evaluate_every", evaluate_every, plan.num_steps_per_epoch)
    strategy = strategy_for(model, strategy)
    optimizer = optimizer or prepare_optimizer(model)
    schedule = _schedule(lr_scheduler, optimizer, plan.num_steps, num_warmup_steps)
    state = TrainState(model, optimizer, schedule, extras=extras or {})
    steps = train_steps(
        state,
        train_dataloader,
        max_grad_norm=max_grad_norm,
        loss_fn=loss_fn,
        step_fn=step_fn,
        on_nonfinite=on_nonfinite,
        strategy=strategy,
        preflight=preflight,
        **length,
    )
    report = _Report(plan, log_is_due, shown=progress_bar and strategy.is_main)
    evaluations: list[dict[str, float]] = []
    stopped_by = "max_steps" if plan.num_epochs is None else "num_epochs"
    step = evaluated = None
    with closing(report), closing(steps):
        for step in steps:
            report.add(step)
            if on_step is not None:
                on_step(step)
            if evaluate is not None and evaluation_is_due(step):
                evaluations.append(evaluate())
                report.add_evaluation(step, evaluations[-1])
                evaluated = step
                best = best_of(evaluations, best_metric)
                if patience is not None and len(evaluations) - 1 - best >= patience:
                    stopped_by = "patience"
                    break
        report.end_interval()
        if evaluate is not None and step is not None and evaluated is not step:
            evaluations.append(evaluate())
            report.add_evaluation(step, evaluations[-1])
    best = best_of(evaluations, best_metric) if evaluations else 0
    return TrainResult(
        state,
        metrics=evaluations[-1] if evaluations else {},
        best_metrics=evaluations[best] if evaluations and best_metric else {},
        history=report.history.records,
        stopped_by=stopped_by,
    )


def best_of(evaluations: Sequence[Mapping[str, float]], best_metric: str | None) -> int:
    """Return which evaluation is the best so far: the first of equals, and NaN is the worst.

    Args:
        evaluations: At least one, oldest first.
        best_metric: As in ``train_loop``; None: the newest is the best.

    Raises:
        ConfigError: The metric is not among the results.

    >>> best_of([{"loss": 0.7}, {"loss": 0.4}, {"loss": float("nan")}], "-loss")
    1
    """
    if best_metric is None:
        return len(evaluations) - 1
    name = best_metric.removeprefix("-")
    if name not in evaluations[-1]:
        raise ConfigError(
            f"best_metric={best_metric!r}, and evaluate returned no {name!r}: "
            f"{', '.join(evaluations[-1]) or 'nothing'}. Name one of its results."
        )
    sign = -1 if best_metric.startswith("-") else 1
    values = [sign * metrics[name] for metrics in evaluations]
    return max(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])


class _Report:
    """What a run tells while it goes: the history, and the bar above it."""

    def __init__(self, plan: Plan, log_is_due: Callable[[Step], bool], *, shown: bool) -> None:
        self.history = History()
        self._per_epoch = plan.num_steps_per_epoch
        self._log_is_due = log_is_due
        self._bar = ProgressBar(plan.num_steps, name="Training", unit="step", shown=shown)
        self._step: Step | None = None

    def add(self, step: Step) -> None:
        self._step = step
        self.history.add(step)
        if self._log_is_due(step) or step.index == 1:
            self.end_interval()
        if self._bar.is_due():
            self._bar.show(step.index, self._facts(step))

    def end_interval(self) -> None:
        if self._step is not None and self.history.has_open_interval():
            self.history.close_interval(self._step, self._epochs(self._step))

    def add_evaluation(self, step: Step, metrics: Mapping[str, float]) -> None:
        self.history.add_evaluation(step, self._epochs(step), metrics)
        scores = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._bar.write(f"step {step.index}  epoch {self._epochs(step):.2f}  {scores}")

    def close(self) -> None:
        self.history.collect(wait=True)
        step = self._step
        self._bar.close(step.index if step else 0, self._facts(step) if step else "")

    def _epochs(self, step: Step) -> float:
        return step.index / self._per_epoch if self._per_epoch else float(step.epoch)

    def _facts(self, step: Step) -> str:
        loss = self.history.last_loss
        shown = "" if loss is None else f"loss={loss:.4f}, "
        return f"{shown}lr={step.lr:.2e}"


def _schedule(
    lr_scheduler: str | LRScheduler | None,
    optimizer: Optimizer,
    num_steps: int,
    num_warmup_steps: float,
) -> LRScheduler | None:
    if isinstance(lr_scheduler, str):
        return prepare_scheduler(
            optimizer,
            lr_scheduler,
            num_training_steps=num_steps,
            num_warmup_steps=num_warmup_steps,
        )
    if num_warmup_steps:
        raise ConfigError(
            f"num_warmup_steps={num_warmup_steps} belongs to a schedule given by name. Build it "
            "into the scheduler: prepare_scheduler(optimizer, num_warmup_steps=...)."
        )
    return lr_scheduler


def _check_evaluation(evaluate: object, best_metric: str | None, patience: int | None) -> None:
    problems = []
    if evaluate is not None and not callable(evaluate):
        problems.append(
            f"evaluate is a {type(evaluate).__name__}, already computed. Pass a function: "
            "evaluate=lambda: evaluate_loop(model, loader)."
        )
    if best_metric is not None and evaluate is None:
        problems.append(
            f"best_metric={best_metric!r} needs evaluate=lambda: evaluate_loop(model, ...)."
        )
    if patience is not None and best_metric is None:
        problems.append(f'patience={patience!r} needs a best_metric, such as "f1" or "-loss".')
    if patience is not None and patience < 1:
        problems.append(f"patience must be at least 1 evaluation, got {patience!r}.")
    if problems:
        raise ConfigError("\n".join(problems))
