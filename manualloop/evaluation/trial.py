"""A trial of ``evaluate`` on one batch, before the first update and without a trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.data.inspect import first_batch
from manualloop.errors import ConfigError, DataError
from manualloop.evaluation.functions import accepts_kept
from manualloop.evaluation.loop import evaluate_loop, named_loaders
from manualloop.evaluation.metrics import BuiltIn, load_metric
from manualloop.evaluation.passes import NO_ROWS
from manualloop.evaluation.scorers import as_metric, ask_for, parts_of
from manualloop.objects import remember
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.select import strategy_for
from manualloop.tasks.names import class_names
from manualloop.tasks.task import IGNORE_INDEX


class Found(NamedTuple):
    """What a trial has found.

    Attributes:
        names: Names of the metrics.
        are_all: Whether there are no others. Metrics that are not built in are not called.
    """

    names: list[str]
    are_all: bool


def try_evaluation(evaluate: object) -> Found | None:
    """Make a ``partial`` of ``evaluate_loop`` score one batch of each of its loaders.

    Everything is put back as it was: random states, modes, configs, buffers, and what the model and
    the functions hold. Only the rows of the batch are read.

    Returns:
        The names of its metrics; None for another callable, or if no batch can be looked at.

    Raises:
        ConfigError: The arguments are not those of ``evaluate_loop``.
        ManualLoopError: The batch cannot be scored. The same would come at the first evaluation.
    """
    if not isinstance(evaluate, partial) or evaluate.func is not evaluate_loop:
        return None
    try:
        bound = inspect.signature(evaluate_loop).bind(*evaluate.args, **evaluate.keywords)
    except TypeError as error:
        raise ConfigError(
            f"evaluate=partial(evaluate_loop, ...) cannot be called: {error}. Write "
            "partial(evaluate_loop, model, loader, metric)."
        ) from error
    model, loaders = bound.arguments["model"], bound.arguments["eval_dataloader"]
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"evaluate=partial(evaluate_loop, ...) begins with a {type(model).__name__}, not a "
            "model. Write partial(evaluate_loop, model, loader, metric)."
        )
    metric = bound.arguments.get("metric")
    functions = (bound.arguments.get(name) for name in ("postprocess", "decode"))
    ask_for([] if metric is None else parts_of(as_metric(metric)), *functions)  # refuses mistakes
    metrics, are_all = _own_metrics(metric)
    others = _stand_in(metric)
    strategy = strategy_for(model, bound.arguments.get("strategy"))
    prepare_model(strategy, model)  # first: what is put back below must not be on another device
    confidence = bound.arguments.pop("confidence", None)
    if confidence is not None:
        check_arguments(confidence=confidence)
    ends = ("",) if confidence is None else ("", "_low", "_high")
    names: list[str] = []
    are_fixed = True
    for prefix, loader in named_loaders(loaders).items():
        batch = _batch_of(loader, strategy)
        if batch is None:
            return None
        bound.arguments |= {"eval_dataloader": [batch] * strategy.world_size, "progress_bar": False}
        if metrics or not are_all:  # else the loss alone is asked for, and needs no labels
            of_data = class_names(model, loader)
            fresh = [one.fresh(of_data) for one in metrics]
            are_fixed &= all(one.has_fixed_keys for one in fresh)
            bound.arguments["metric"] = fresh if are_all else [*fresh, others]
        forget = _remember(model, bound.arguments)
        if (decode := bound.arguments.get("decode")) is not None:
            bound.arguments["decode"] = partial(decode)  # which asks for no samples to be shown
        try:
            found = evaluate_loop(*bound.args, **bound.kwargs)
        finally:
            forget()
        names += [prefix + name + end for name in found for end in ends]
    return Found(names, are_all and are_fixed)


def _own_metrics(metric: Any) -> tuple[list[BuiltIn], bool]:
    """Return the metrics that are built in, and whether all of them are."""
    parts = metric if isinstance(metric, list | tuple) else [] if metric is None else [metric]
    loaded = [load_metric(part) if isinstance(part, str) else part for part in parts]
    own = [part for part in loaded if isinstance(part, BuiltIn)]
    return own, len(own) == len(parts)


def _batch_of(loader: Iterable[Any], strategy: Strategy) -> Any:
    """Return the first batch; None if a look would use it up, or if it has no label to score.

    Raises:
        DataError: There is no batch.
    """
    try:
        batch = first_batch(loader)
    except DataError:
        return None
    if batch is None and strategy.world_size == 1:  # of several ranks others may have one
        raise DataError(NO_ROWS)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and not bool((labels != IGNORE_INDEX).any()):
        return None
    return batch


def _stand_in(metric: Any) -> Callable[..., Any]:
    """Return a function that stands for metrics that are not called, and gets what they get."""
    parts = metric if isinstance(metric, list | tuple) else [metric]
    if any(callable(part) and accepts_kept(part) for part in parts):
        return lambda predictions, references, kept: {}
    return lambda predictions, references: {}


def _remember(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Return a function that undoes what a forward pass and the functions called may leave."""
    functions = {name: arguments.get(name) for name in ("decode", "loss_fn", "postprocess")}
    put_back = remember({"model": model, **functions})
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def forget() -> None:
        put_back()
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)

    return forget
