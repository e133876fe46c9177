"""The call that a script is written for, and what is known of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from manualloop.data.preparation import Preparation, preparation_of
from manualloop.script.loading import Loading
from manualloop.script.scores import Score, find_scores
from manualloop.strategy.accelerated import Accelerated
from manualloop.strategy.base import Strategy
from manualloop.tasks.loss import declared_items
from manualloop.tasks.task import (
    Task,
    count_elements,
    count_labels,
    count_rows,
    count_shifted_labels,
    count_targets,
    count_texts,
)
from manualloop.times import parse_seconds

BY_TOKEN = ("token_classification", "masked_lm", "causal_lm", "seq2seq_lm")
"""Tasks with a label for each token, of which those of padding count nowhere."""


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a run: a ``partial`` of ``evaluate_loop``, looked into.

    Attributes:
        loader: Its loader.
        metric: Its metric, as it was given.
    """

    loader: Any
    metric: Any

    @property
    def preparation(self) -> Preparation | None:
        """How the loader was made; None for one of the user's own."""
        return preparation_of(self.loader)


@dataclass(frozen=True)
class Job:
    """A call of ``train_loop``, looked into.

    Attributes:
        model: The model, without wrappers other than those of PEFT.
        loader: The loader of the training.
        arguments: All arguments of the call, by name.
        optimizers: The optimizers, of which there is mostly one.
        strategy: The strategy.
        batch: The first batch; None if a look at it would use it up.
        task: The task of the model and this batch.
        evaluation: The evaluation, or None.
        loading: How the script loads the model.
        ignores: Whether labels may be -100, which count neither in the loss nor in a score.
        returns_items: Whether ``loss_fn`` returns the items of a batch beside its loss.
    """

    model: nn.Module
    loader: Any
    arguments: Mapping[str, Any]
    optimizers: tuple[Any, ...]
    strategy: Strategy
    batch: Any
    task: Task
    evaluation: Evaluation | None
    loading: Loading
    ignores: bool
    returns_items: bool = False

    def __getitem__(self, name: str) -> Any:
        """Return an argument of the call."""
        return self.arguments[name]

    @property
    def preparation(self) -> Preparation | None:
        """How the loader was made; None for one of the user's own."""
        return preparation_of(self.loader)

    @property
    def scores(self) -> dict[str, Score]:
        """The scores of the evaluation by their keys."""
        return {} if self.evaluation is None else find_scores(self.evaluation.metric)[0]

    @property
    def makes_eval_loader(self) -> bool:
        """Whether the script makes the loader of the evaluation itself."""
        made = self.evaluation is not None and self.evaluation.preparation is not None
        return made and self.preparation is not None

    @property
    def accumulates(self) -> bool:
        """Whether an update has several micro-batches."""
        return bool(self["gradient_accumulation_steps"] > 1)

    @property
    def is_distributed(self) -> bool:
        """Whether the script is one of accelerate, for several processes."""
        return isinstance(self.strategy, Accelerated)

    @property
    def precision(self) -> str:
        """The precision of forward passes: "no", "bf16" or "fp16"."""
        return str(getattr(self.strategy, "precision", "no"))

    @property
    def weighs(self) -> bool:
        """Whether losses are weighted by items: an update has several batches."""
        return self.accumulates or self.is_distributed

    @property
    def may_lack_items(self) -> bool:
        """Whether a batch may have no item: labels are left out, or a function counts them."""
        return "!=" in self.items() or ".items(" in self.items()

    @property
    def may_skip(self) -> bool:
        """Whether an epoch may have fewer updates than windows, as some are skipped."""
        skips = self["on_nonfinite"] == "skip" or self.precision == "fp16"
        return skips or self.may_lack_items or self.returns_items

    @property
    def leaves_out(self) -> bool:
        """Whether a score has to leave out labels."""
        return self.items().startswith('(batch["labels"] != -100)')

    def items(self, batch: str = "batch") -> str:
        """Return the expression for the number of items of a batch."""
        own = self["loss_fn"] or self["terms"]
        if own is not None and declared_items(own) is not None:
            return f"{own.__name__}.items({batch})"
        count: Any = self.task.count
        labels = f'{batch}["labels"]'
        if count is count_labels and not self.ignores:
            return f"len({labels})"
        if count is count_labels:
            return f"({labels} != -100).sum().item()"
        if count is count_shifted_labels:
            return f"({labels}[:, 1:] != -100).sum().item()"
        if count in (count_elements, count_targets):
            return f"{labels}.numel()"
        if count is count_texts:
            return f"len({labels})"
        if count is count_rows and isinstance(self.batch, Mapping):
            name = next(iter(self.batch))
            return f'len({batch}["{name}"])'
        if count is count_rows:
            return f"len({batch}[0])"
        if isinstance(count, partial) and "ignored" in count.keywords:
            return f"({labels} != {count.keywords['ignored']}).sum().item()"
        return ""


def seconds_of(cadence: Any) -> float | None:
    """Return the seconds of a cadence that is a time; None of another."""
    if not isinstance(cadence, str) or "epoch" in cadence:
        return None
    return parse_seconds("cadence", cadence)


def source_of(function: Callable[..., Any]) -> str | None:
    """Return the source of a function that uses nothing but its arguments and torch; else None."""
    known = {"torch": torch, "nn": nn, "F": nn.functional}
    used = inspect.getclosurevars(function)
    others = {name for name, value in used.globals.items() if known.get(name) is not value}
    if used.nonlocals or others:
        return None
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None
