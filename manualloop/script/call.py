"""A call of ``train_loop``, looked into: its arguments are bound and checked.

Nothing is trained: at most a ``loss_fn`` is called on the first batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from manualloop.arguments import all_at_once, check_arguments
from manualloop.data.inspect import first_batch
from manualloop.data.preparation import preparation_of
from manualloop.errors import ConfigError, ManualLoopError
from manualloop.evaluation.loop import evaluate_loop
from manualloop.internals import unwrap_optimizer
from manualloop.keywords import instead_of
from manualloop.loop import train_loop
from manualloop.models import unwrap_model
from manualloop.optimizers.prepare import prepare_optimizer
from manualloop.plan import plan_run, settings_of
from manualloop.randomness import random_states_kept
from manualloop.run.cadence import parse_cadence
from manualloop.script.job import BY_TOKEN, Evaluation, Job
from manualloop.script.loading import loading_of
from manualloop.script.refusals import problems_of
from manualloop.strategy.select import strategy_for
from manualloop.tasks.task import IGNORE_INDEX, resolve_task
from manualloop.times import parse_seconds


def job_of(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Job:
    """Look into the arguments of a call of ``train_loop``.

    Raises:
        ConfigError: The call cannot be made, or cannot be written as a script. A line for each
            problem.
    """
    known = inspect.signature(train_loop).parameters
    if unknown := [name for name in options if name not in known]:
        lines = [f"no {name}. {instead_of(name, options[name], known)}" for name in unknown]
        raise ConfigError(f"eject takes the arguments of train_loop: {' '.join(lines)}")
    try:
        bound = inspect.signature(train_loop).bind(*arguments, **options)
    except TypeError as error:
        raise ConfigError(f"eject takes the arguments of train_loop: {error}.") from error
    bound.apply_defaults()
    given = dict(bound.arguments)
    model, loader = given["model"], given["train_dataloader"]
    check_arguments(model=model)
    strategy = strategy_for(model, given["strategy"])
    with all_at_once() as check:
        ends = {name: given[name] for name in ("num_epochs", "max_steps")}
        settings = settings_of(given)
        plan = check(plan_run, loader, settings, world_size=strategy.world_size, **ends)
        per_epoch = None if plan is None else plan.num_steps_per_epoch
        for name in ("log_every", "evaluate_every", "checkpoint_every"):
            check(parse_cadence, name, given[name], per_epoch or 1)
        check(parse_seconds, "max_time", given["max_time"])
        optimizer = given["optimizer"]
        if optimizer is None:
            optimizer = check(prepare_optimizer, model)
        listed = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
        optimizers = tuple(map(unwrap_optimizer, listed))
        batch = check(_first_batch, loader)
        inner = unwrap_model(model, adapters=False)
        task = check(resolve_task, inner, batch)
        evaluation = check(_evaluation_of, given["evaluate"], model, given)
        if plan is not None and task is not None:
            ignores = task.name in BY_TOKEN or _ignores(loader)
            if evaluation is not None:
                ignores = ignores or _ignores(evaluation.loader)
            of_call = given, optimizers, strategy, batch, task, evaluation
            job = Job(inner, loader, *of_call, loading_of(inner), ignores)
            job = replace(job, returns_items=_returns_items(job))
            check(_refuse, [*problems_of(job)])
    return job


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _ignores(loader: Any) -> bool:
    """Tell whether labels of a loader may be -100, as far as its rows tell."""
    rows: Any = getattr(loader, "dataset", None)
    if preparation_of(loader) is None or not hasattr(rows, "column_names"):
        return True
    if "labels" not in rows.column_names:
        return False
    if hasattr(rows.features["labels"], "feature"):
        return any(IGNORE_INDEX in labels for labels in rows["labels"])
    return IGNORE_INDEX in rows.unique("labels")


def _first_batch(loader: Any) -> Any:
    try:
        return first_batch(loader)
    except ManualLoopError:
        return None


def _evaluation_of(evaluate: Any, model: nn.Module, given: Mapping[str, Any]) -> Evaluation | None:
    """Look into ``evaluate``.

    Raises:
        ConfigError: It is no ``partial`` of ``evaluate_loop``, or scores in ways of its own.
    """
    if evaluate is None:
        return None
    if not isinstance(evaluate, partial) or evaluate.func is not evaluate_loop:
        raise ConfigError(
            f"evaluate is a {type(evaluate).__name__} that nothing can look into. Write "
            "evaluate=partial(evaluate_loop, model, loader, metric), or leave it out and call it "
            "yourself, in the script."
        )
    bound = inspect.signature(evaluate_loop).bind(*evaluate.args, **evaluate.keywords)
    bound.apply_defaults()
    scored = bound.arguments
    problems = []
    if unwrap_model(scored["model"], adapters=False) is not unwrap_model(model, adapters=False):
        problems.append(
            "evaluate scores another model than the one that is trained, and nothing tells how the "
            "one becomes the other. Leave evaluate out and write it into the script."
        )
    if isinstance(scored["eval_dataloader"], Mapping):
        problems.append(
            "evaluate scores several loaders. Give it one: partial(evaluate_loop, model, loader)."
        )
    for name in ("postprocess", "decode", "confidence"):
        if scored[name] is not None:
            problems.append(
                f"{name}= of evaluate_loop is not written out. Leave it out of evaluate, and add "
                "it to the function evaluate() of the script."
            )
    for name in ("loss_fn", "terms"):
        if scored[name] is not given[name]:
            problems.append(
                f"{name} of evaluate is not the one of the training. Use one for both: "
                f"train_loop(..., {name}=f, evaluate=partial(evaluate_loop, ..., {name}=f))."
            )
    if scored["strategy"] not in (None, given["strategy"]):
        problems.append(
            "evaluate has a strategy of its own. Leave it out: it takes that of the training."
        )
    _refuse(problems)
    return Evaluation(scored["eval_dataloader"], scored["metric"])


def _returns_items(job: Job) -> bool:
    """Tell whether the ``loss_fn`` returns a loss with its items, by a look at the first batch."""
    loss_fn, model = job["loss_fn"], job.model
    if loss_fn is None or job.batch is None:
        return False
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = job.batch if device.type == "cpu" else job.strategy.to_device(job.batch)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with random_states_kept(devices=device.type != "cpu", model=model), torch.no_grad():
        returned = loss_fn(model, batch)
        for buffer, before in buffers:
            buffer.copy_(before)
    return isinstance(returned, tuple)
