"""Batches through a model in evaluation mode, on every rank, without a trace."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from manualloop.arguments import require_loader
from manualloop.batches import is_spare
from manualloop.checks import EXPLAINED, explain, explain_loss
from manualloop.data.sampler import num_batches, rows_before, rows_fixed
from manualloop.errors import DataError, ManualLoopError
from manualloop.evaluation.draws import Draws
from manualloop.evaluation.losses import Made
from manualloop.evaluation.meaning import task_of_outputs
from manualloop.mistakes import no_columns_message
from manualloop.models import accepts, evaluation_mode, is_sharded
from manualloop.progress import ProgressBar, is_watched
from manualloop.reading.reader import Reader
from manualloop.reading.sources import source_of
from manualloop.strategy.base import Strategy
from manualloop.tasks.isolation import inputs_of, require_isolation
from manualloop.tasks.lookahead import refuse_lookahead
from manualloop.tasks.loss import explain_kept
from manualloop.tasks.otherwise import objection_to
from manualloop.tasks.padding import require_padding_unseen
from manualloop.tasks.task import Task, are_targets, resolve_task
from manualloop.types import LossFn, Terms


@dataclass(frozen=True, slots=True)
class Passes:
    """How an evaluation runs the batches of a loader through a model.

    Attributes:
        model: The model, without a wrapper that would communicate with the other ranks.
        loader: The loader.
        strategy: The strategy.
        loss_fn: As in ``train_steps``; None where the model is called with the batch's columns.
        terms: As in ``train_steps``.
        leaves_out: Columns that skip the model.
        predicts: Whether predictions are made by the rule of the task.
        runs: Batches of which the outputs are used, where ``decode`` does not use them.
        lets_write: Whether a ``decode`` lets the model write, instead of using the outputs.
        has_loss: Whether the loss of batches with labels is used, beside a ``decode``.
    """

    model: nn.Module
    loader: Iterable[Any]
    strategy: Strategy
    loss_fn: LossFn | None
    terms: Terms | None
    leaves_out: frozenset[str]
    predicts: bool
    runs: Literal["all", "labelled", "none"] = "all"
    lets_write: Literal["no", "perhaps", "yes"] = "no"
    has_loss: bool = True


def passes_of(
    model: nn.Module,
    loader: Iterable[Any],
    strategy: Strategy,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    *,
    predicts: bool,
) -> Passes:
    """Prepare the passes of an evaluation."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    # A model that does not compute its own loss gets no labels.
    takes_labels = loss_fn is not None or accepts(model, "labels")
    leaves_out = frozenset() if takes_labels else frozenset({"labels"})
    return Passes(model, loader, strategy, loss_fn, terms, leaves_out, predicts)


def each_batch(passes: Passes, use: Callable[[Made], None], bar: str | None, **owners: Any) -> None:
    """Run every batch of this rank through the model, in evaluation mode.

    Args:
        passes: The loader, the model and how to run it.
        use: Function of the results of a batch.
        bar: Title of a progress bar; None shows one in a run that shows its own, and else none.
        owners: Objects that may hold random generators, beside those of the passes.
    """
    model, strategy = passes.model, passes.strategy
    owners |= {"loader": passes.loader, "loss_fn": passes.loss_fn, "terms": passes.terms}
    task: Task | None = None
    draws = Draws(model, passes.loader)
    with (
        evaluation_mode(model, strategy.device, **owners),
        rows_fixed(passes.loader),
        closing(_numbered(passes.loader, strategy, bar, draws)) as batches,
    ):
        is_first = True
        for number, batch in batches:
            if strategy.world_size > 1 and is_spare(batch):
                # Passes that take all ranks: losses of detection add up the boxes of all.
                if is_sharded(model) or objection_to(model, batch):
                    inputs, outputs, _ = _forward(passes, batch, number)
                    if passes.terms is not None:
                        passes.terms(outputs, inputs)
            elif is_first:
                refuse_lookahead(model, [batch], passes.loss_fn)
                before, is_first = draws.before_use(), False
                task = _use(passes, batch, number, task, use)
                draws.after_use(before)
            else:
                task = _use(passes, batch, number, task, use)


def _use(
    passes: Passes, batch: Any, number: int, known: Task | None, use: Callable[[Made], None]
) -> Task:
    """Run a batch through the model and use the results; return its task.

    It is a function so that the outputs are freed before the next batch needs the memory.
    """
    inputs, outputs, loss = _forward(passes, batch, number)
    task = resolve_task(passes.model, batch, known)  # the model has its problem_type now
    made = Made(number, batch, inputs, outputs, loss, task)
    if passes.predicts and known is not None:
        _require_one_kind(known, task, batch, number)
    elif passes.predicts:
        made = made._replace(task=task_of_outputs(made))
    use(made)
    return made.task


def _require_one_kind(known: Task, task: Task, batch: Any, number: int) -> None:
    """Refuse labels by which rows would be predicted otherwise than those before them."""
    name = task.name
    if task.by_values and "labels" in batch and not are_targets(batch["labels"]):
        name = "regression"
    elif known is task or known.rules.predict is task.rules.predict:
        return
    fix = "outputs.logits" if name == "regression" else "outputs.logits.argmax(-1)"
    raise DataError(
        f"The labels of batch {number} are those of a {name}, the labels before it of a "
        f"{known.name}, and one model has one kind of prediction. Give all batches labels of "
        f"one kind, or pass postprocess=lambda outputs, batch: {fix}."
    )


def _forward(passes: Passes, batch: Any, number: int) -> tuple[Any, Any, Any]:
    """Return the inputs of a batch, its outputs, and what ``loss_fn`` returned."""
    model, strategy = passes.model, passes.strategy
    inputs = strategy.to_device(batch)
    with strategy.autocast():
        require_isolation(model, batch, inputs, passes.loss_fn)
        if passes.loss_fn is not None:
            require_padding_unseen(model, batch, inputs, passes.loss_fn)
            seen: list[Any] = []
            hook = model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
            try:
                loss: Any = passes.loss_fn(model, inputs)
            except EXPLAINED as error:
                if isinstance(error, TypeError):
                    explain_kept(error, inputs)
                explain_pass(error, passes, batch, number)
                raise
            finally:
                hook.remove()
            return inputs, (seen[-1] if seen else None), loss
        columns = inputs_of(model, inputs)
        if not hasattr(columns, "keys"):
            raise DataError(no_columns_message(model, batch, takes_loss=passes.has_loss))
        if passes.runs == "none" or (passes.runs == "labelled" and "labels" not in columns):
            return inputs, None, None
        is_used = passes.lets_write == "no" or (passes.has_loss and "labels" in columns)
        if is_used or passes.lets_write == "perhaps":
            require_padding_unseen(model, batch, inputs, refuses=is_used)
        if passes.leaves_out:
            columns = {name: c for name, c in columns.items() if name not in passes.leaves_out}
        try:
            outputs = model(**columns)
        except EXPLAINED as error:
            given = batch if columns is inputs else {name: batch[name] for name in columns}
            explain_pass(error, passes, given, number, partial(explain, needs_labels=False))
            raise
    return inputs, outputs, None


def explain_pass(
    error: Exception,
    passes: Passes,
    batch: Any,
    number: int,
    find: Callable[..., None] = explain_loss,
) -> None:
    """Raise the mistake in a batch that explains an error from the model or from the loss.

    Args:
        error: The error.
        passes: The loader, the model and how to run it.
        batch: The batch.
        number: Its number.
        find: Function that finds the mistake.
    """
    passes.strategy.explain(error)
    if not isinstance(error, ManualLoopError):
        start = rows_before(passes.loader, number)
        find(error, passes.model, [batch], source_of(passes.loader).place, [start])


def _numbered(
    loader: Iterable[Any], strategy: Strategy, bar: str | None, draws: Draws
) -> Generator[tuple[int, Any], None, None]:
    """Yield the number and the batch of each batch of this rank, with a progress bar.

    Raises:
        DataError: There is no batch.
    """
    require_loader(loader)
    shown = strategy.is_main and (bar is not None or is_watched())
    progress = ProgressBar(num_batches(loader), name=bar or "Evaluating", unit="batch", shown=shown)
    number = 0
    try:
        comes_in_order = strategy.world_size == 1 and getattr(loader, "in_order", True)
        given = loader if comes_in_order else _in_common_order(loader, strategy)
        for batch in draws.of_batches(given):
            yield number + strategy.rank, batch
            number += strategy.world_size
            if progress.is_due():
                progress.show(number)
    finally:
        progress.close(number)
    if number == 0:
        raise DataError(NO_ROWS)


NO_ROWS = (
    "No rows to evaluate: the loader gave 0 batches. Check the filter of the dataset, and that the "
    "loader is not a generator that has already been read."
)


def _in_common_order(loader: Iterable[Any], strategy: Strategy) -> Generator[Any, None, None]:
    """Yield the batches of this rank in the order in which one process reads them all."""
    reader = Reader(source_of(loader), strategy=strategy, count_rows=lambda batch: 0)
    for window in reader.windows(1):
        yield window.batches[0]
        reader.settle()  # else it would keep every batch
