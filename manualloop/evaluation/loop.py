"""``evaluate_loop`` and ``predict_loop``: the scores and the predictions of a model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from manualloop.batches import is_spare, num_rows
from manualloop.checks import explain, require_loader
from manualloop.data.sampler import longest_first_view, num_batches, rows_before
from manualloop.errors import DataError, ModelError
from manualloop.evaluation.losses import Made, terms_of, whole_loss
from manualloop.evaluation.predictions import (
    Predictions,
    dataset_rows,
    table_of,
)
from manualloop.evaluation.scorers import Gathered, Scorer, as_metric, counts_classes
from manualloop.models import accepts, evaluation_mode, is_blind_to_padding, is_sharded
from manualloop.notices import say
from manualloop.progress import ProgressBar
from manualloop.reading.ranks import unsharded
from manualloop.reading.reader import Reader
from manualloop.reading.sources import source_of
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.tasks.loss import check_loss, no_loss
from manualloop.tasks.task import IGNORE_INDEX, Task, resolve_task
from manualloop.types import Batch, LossFn, Terms

_T = TypeVar("_T")

Postprocess: TypeAlias = Callable[[Any, Batch], Tensor]
"""``postprocess(outputs, batch) -> predictions``, one per row or per label."""


def evaluate_loop(
    model: nn.Module,
    eval_dataloader: Iterable[Any],
    metric: Any = None,
    *,
    strategy: Strategy | None = None,
    postprocess: Postprocess | None = None,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    progress_bar: bool = False,
) -> dict[str, float]:
    """Score a model on every row of a loader.

    The loss is the mean over all items, so it does not depend on how rows are batched. The rows of
    a prepared loader are therefore read from the longest to the shortest, in batches of about the
    same number of tokens, never more than the loader's largest batch can have. This leaves out most
    of the padding; the metric gets the rows in the dataset's order. Rows are read as the loader
    gives them where another order might change the numbers: with a ``loss_fn``, with padding on the
    left or without an attention mask, with a model that is not of transformers or depends on
    padding all the same, and with a ``postprocess`` and a metric that does not only count classes.

    Only what the metric needs of the outputs is kept, never the logits. Every submodule's mode and
    the random states of torch, NumPy and Python are restored when the call returns or raises. With
    several processes call it on each: every row counts once, and each process gets the result that
    a single one would get.

    Args:
        model: Model to score; moved to the strategy's device if no strategy has prepared it.
        eval_dataloader: Loader of dicts that the model takes.
        metric: A name (``"accuracy"``, ``"glue/mrpc"``), an ``evaluate`` module, a torchmetrics
            metric, ``fn(predictions, references) -> dict``, or a sequence of these. None
            computes only the loss.
        strategy: Device, precision and ranks; None takes the strategy that prepared the model, or
            ``prepare_strategy("auto")``.
        postprocess: ``postprocess(outputs, batch)`` returns the predictions; None predicts by the
            task (argmax, above 0.5, the value).
        loss_fn: As in ``train_steps``. The outputs are those of its last forward pass.
        terms: As in ``train_steps``; ``terms(outputs, batch)`` returns ``[(mean, num_items), ...]``
            for a loss that is a sum of means.
        progress_bar: Whether to show a progress bar.

    Returns:
        ``loss``, if there are labels or a ``loss_fn``, and the scores of the metric by name.

    Raises:
        DataError: The loader gives no batch, all labels are -100, or the metric needs labels and
            there are none.
        MetricError: The metric cannot score these predictions.

    >>> import torch
    >>> model = nn.Linear(1, 1)
    >>> evaluate_loop(model, [{"x": torch.zeros(2, 1)}], strategy=None,
    ...               loss_fn=lambda model, batch: 0 * model(batch["x"]).mean())
    {'loss': 0.0}
    """
    check_loss(loss_fn, terms)
    strategy = begin_call(
        strategy_for(model, strategy),
        "evaluate_loop",
        metric=metric,
        postprocess=postprocess,
        loss_fn=loss_fn,
        terms=terms,
    )
    model = prepare_model(strategy, model)
    loader = eval_dataloader if strategy.world_size == 1 else unsharded(eval_dataloader)
    scorer = None if metric is None else as_metric(metric)
    if loss_fn is None and (postprocess is None or scorer is None or counts_classes(scorer)):
        loader, rows = _longest_first_rows(loader, model, strategy)
    else:
        rows = None  # loss_fn may compare a batch's rows, postprocess make several of one
    taker: Scorer | Gathered | None = scorer
    if scorer is not None and (strategy.world_size > 1 or rows is not None):
        taker = Gathered(scorer, strategy, rows)
    found = _each_batch(
        _passes(
            model, loader, strategy, loss_fn, terms, scorer is not None and postprocess is None
        ),
        partial(_score, postprocess=postprocess, scorer=taker),
        "Evaluating" if progress_bar else None,
    )
    scores: dict[str, float] = {} if taker is None else taker.compute()
    loss = whole_loss([of_batch for of_batch in found if of_batch])
    if loss is None and taker is None:
        raise DataError(
            f"Nothing to score: every label of the loader is {IGNORE_INDEX}. Check the masking of "
            "the labels, and that truncation leaves some."
        )
    return scores if loss is None else {"loss": loss, **scores}


def _score(
    passes: _Passes,
    made: Made,
    *,
    postprocess: Postprocess | None,
    scorer: Scorer | Gathered | None,
) -> list[tuple[float, float | None]]:
    """Give a batch to the metric; return the terms of its loss.

    A batch without labels has no term. The items of one are None where nothing tells them.
    """
    if scorer is not None:
        predictions, references, kept = _for_metric(made, postprocess)
        if isinstance(scorer, Gathered):
            scorer.add_batch(predictions, references, kept)
        else:
            scorer.add_batch(predictions=predictions, references=references)
    with passes.strategy.autocast():
        found = terms_of(made, passes.loss_fn, passes.terms)
    if found is None and scorer is None:
        raise no_loss(passes.model, made.batch, made.outputs)
    return found or []


def predict_loop(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    strategy: Strategy | None = None,
    postprocess: Postprocess | None = None,
    progress_bar: bool = False,
) -> Predictions:
    """Predict every row of a loader, in the order of the dataset.

    Args:
        model: As for ``evaluate_loop``.
        dataloader: Loader of dicts that the model takes, with or without labels. The order of a
            prepared loader is known even if it shuffles.
        strategy: As for ``evaluate_loop``.
        postprocess: As for ``evaluate_loop``.
        progress_bar: Whether to show a progress bar.

    Raises:
        DataError: The loader gives no batch, or shuffles in a way that cannot be undone.

    >>> import torch
    >>> class Half(nn.Module):
    ...     def forward(self, x):
    ...         return {"logits": x / 2}
    >>> batches = [{"x": torch.tensor([[2.0, 4.0]])}, {"x": torch.tensor([[8.0, 6.0]])}]
    >>> predict_loop(Half(), batches).predictions
    array([1, 0])
    """
    strategy = strategy_for(model, strategy)
    strategy = begin_call(strategy, "predict_loop", postprocess=postprocess)
    model = prepare_model(strategy, model)
    loader = dataloader if strategy.world_size == 1 else unsharded(dataloader)
    loader, longest_first = _longest_first_rows(loader, model, strategy)
    numbers = dataset_rows(loader) if longest_first is None else longest_first
    parts = _each_batch(
        _passes(model, loader, strategy, None, None, postprocess is None),
        partial(_predict, postprocess=postprocess),
        "Predicting" if progress_bar else None,
    )
    predictions, scores, labels = zip(*parts, strict=True)
    rows = sum(map(len, predictions))
    index = None if numbers is None else np.fromiter(islice(numbers, rows), np.int64)
    order = np.arange(rows) if index is None else np.argsort(index, kind="stable")
    return Predictions(
        None if index is None else index[order],
        table_of(predictions)[order],
        _whole_column("scores", scores, order),
        _whole_column("references", labels, order),
    )


def _whole_column(
    name: str, parts: Sequence[Tensor | None], order: NDArray[np.int64]
) -> NDArray[Any] | None:
    """Return a column in the dataset's order; None unless all batches have it."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        if present:
            say(f"the predictions have no {name}: some batches of the loader have no labels.")
        return None
    return table_of(present)[order]


def _predict(
    passes: _Passes, made: Made, *, postprocess: Postprocess | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return predictions, probabilities and labels of a batch; None for what it does not have."""
    batch, rules, probabilities = made.batch, made.task.rules, None
    if postprocess is not None:
        predictions = postprocess(made.outputs, batch)
    else:
        logits = _logits(made.outputs)
        predictions = rules.predict(logits)
        if rules.probabilities is not None:
            probabilities = rules.probabilities(logits.float()).cpu()
    if len(predictions) != (rows := num_rows(batch)):
        raise DataError(
            f"{len(predictions)} predictions for a batch of {rows} rows. Let postprocess return "
            "one for each row, such as outputs.logits.argmax(-1)."
        )
    labels = batch["labels"].to("cpu", copy=True) if "labels" in batch else None
    # A view of them would keep all the outputs.
    return predictions.to("cpu", copy=True), probabilities, labels


@dataclass(frozen=True, slots=True)
class _Passes:
    """How an evaluation runs the batches of a loader through a model.

    Attributes:
        model: The model, without a wrapper that would communicate with the other ranks.
        loader: The loader.
        strategy: The strategy.
        loss_fn: As in ``train_steps``; None where the model is called with the batch's columns.
        terms: As in ``train_steps``.
        leaves_out: Columns that skip the model.
        predicts: Whether predictions are made by the rule of the task.
    """

    model: nn.Module
    loader: Iterable[Any]
    strategy: Strategy
    loss_fn: LossFn | None
    terms: Terms | None
    leaves_out: frozenset[str]
    predicts: bool


def _passes(
    model: nn.Module,
    loader: Iterable[Any],
    strategy: Strategy,
    loss_fn: LossFn | None,
    terms: Terms | None,
    predicts: bool,
) -> _Passes:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    # A model that does not compute its own loss gets no labels.
    takes_labels = loss_fn is not None or accepts(model, "labels")
    leaves_out = frozenset() if takes_labels else frozenset({"labels"})
    return _Passes(model, loader, strategy, loss_fn, terms, leaves_out, predicts)


def _each_batch(passes: _Passes, use: Callable[[_Passes, Made], _T], bar: str | None) -> list[_T]:
    """Run every batch of a loader through the model, in evaluation mode.

    Args:
        passes: The loader, the model and how to run it.
        use: Function from the results of a batch to what is kept of them.
        bar: Title of a progress bar; None shows none.

    Returns:
        What was kept of the batches of all ranks, in the loader's order.
    """
    model, strategy = passes.model, passes.strategy
    kept: dict[int, _T] = {}
    task: Task | None = None
    with (
        evaluation_mode(
            model,
            strategy.device,
            loader=passes.loader,
            loss_fn=passes.loss_fn,
            terms=passes.terms,
            use=use,
        ),
        closing(_numbered(passes.loader, strategy, bar)) as batches,
    ):
        for number, batch in batches:
            if strategy.world_size > 1 and is_spare(batch):
                if is_sharded(model):  # whose forward pass takes all ranks
                    _forward(passes, batch, number)
                continue
            task, kept[number] = _use(passes, batch, number, task, use)
    found = {number: part for of_rank in strategy.gather(kept) for number, part in of_rank.items()}
    return [found[number] for number in sorted(found)]


def _use(
    passes: _Passes,
    batch: Any,
    number: int,
    task: Task | None,
    use: Callable[[_Passes, Made], _T],
) -> tuple[Task, _T]:
    """Run a batch through the model, and return its task and what is kept of it.

    It is a function so that the outputs are freed before the next batch needs the memory.
    """
    inputs, outputs, loss = _forward(passes, batch, number)
    known, task = (
        task,
        resolve_task(passes.model, batch, task),
    )  # the model has its problem_type now
    if passes.predicts and known is not None and known.rules.predict is not task.rules.predict:
        raise DataError(
            f"The labels of batch {number} are those of a {task.name}, the labels before it of a "
            f"{known.name}, and one model has one kind of prediction. Give all batches labels of "
            "one kind, or pass postprocess=lambda outputs, batch: outputs.logits.argmax(-1)."
        )
    return task, use(passes, Made(batch, inputs, outputs, loss, task))


def _forward(passes: _Passes, batch: Any, number: int) -> tuple[Any, Any, Any]:
    """Return the inputs of a batch, its outputs, and what ``loss_fn`` returned."""
    model, strategy = passes.model, passes.strategy
    inputs = strategy.to_device(batch)
    with strategy.autocast():
        if passes.loss_fn is not None:
            seen: list[Any] = []
            hook = model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
            try:
                loss: Any = passes.loss_fn(model, inputs)
            finally:
                hook.remove()
            return inputs, (seen[-1] if seen else None), loss
        columns = inputs
        if passes.leaves_out:
            columns = {name: c for name, c in inputs.items() if name not in passes.leaves_out}
        try:
            outputs = model(**columns)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            strategy.explain(error)
            start = rows_before(passes.loader, number)
            explain(
                error, model, [batch], source_of(passes.loader).place, [start], needs_labels=False
            )
            raise
    return inputs, outputs, None


def _numbered(
    loader: Iterable[Any], strategy: Strategy, bar: str | None
) -> Generator[tuple[int, Any], None, None]:
    """Yield the number and the batch of each batch of this rank, with a progress bar.

    Raises:
        DataError: There is no batch.
    """
    require_loader(loader)
    shown = bar is not None and strategy.is_main
    progress = ProgressBar(num_batches(loader), name=bar or "", unit="batch", shown=shown)
    number = 0
    try:
        comes_in_order = strategy.world_size == 1 and getattr(loader, "in_order", True)
        for batch in loader if comes_in_order else _in_common_order(loader, strategy):
            yield number + strategy.rank, batch
            number += strategy.world_size
            if progress.is_due():
                progress.show(number)
    finally:
        progress.close(number)
    if number == 0:
        raise DataError(
            "No rows to evaluate: the loader gave 0 batches. Check the filter of the dataset, and "
            "that the loader is not a generator that has already been read."
        )


def _in_common_order(loader: Iterable[Any], strategy: Strategy) -> Generator[Any, None, None]:
    """Yield the batches of this rank in the order in which one process reads them all."""
    reader = Reader(source_of(loader), strategy=strategy, count_rows=lambda batch: 0)
    for given in reader.batches():
        yield given.batch
        reader.settle()  # else it would keep every batch


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model's {type(outputs).__name__} has no logits to predict from. Pass "
            "postprocess=lambda outputs, batch: outputs[0].argmax(-1)."
        )
    return logits


def _for_metric(
    made: Made, postprocess: Postprocess | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the predictions and references of a batch that are not labelled -100, and a mask.

    The mask is bool, has the shape of all predictions, and tells which of them are kept; None keeps
    all.
    """
    batch, task = made.batch, made.task
    if not isinstance(batch, Mapping) or "labels" not in batch:
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"The metric needs labels: the batch has only {found}. For rows without labels use "
            'predict_loop; if they have another name, let collate_fn return {"labels": ...}.'
        )
    labels: Tensor = batch["labels"]
    if postprocess is not None:
        predictions = postprocess(made.outputs, batch)
    else:
        predictions = task.rules.predict(_logits(made.outputs))
        if "shift_labels" in batch:
            labels = batch["shift_labels"]
        elif task.rules.shifts_labels:
            predictions, labels = predictions[..., :-1], labels[..., 1:]
    predictions, labels = predictions.cpu(), labels.cpu()
    if task.name == "multi_label_classification":
        return predictions, labels.int(), None
    if predictions.numel() == labels.numel():
        labels = labels.reshape(predictions.shape)
        if not labels.is_floating_point():
            kept = labels != IGNORE_INDEX
            return predictions[kept], labels[kept], kept
    return predictions, labels, None


def _longest_first_rows(
    loader: Iterable[Any], model: nn.Module, strategy: Strategy
) -> tuple[Iterable[Any], NDArray[np.int64] | None]:
    """Return a loader that gives the longest rows first, and the dataset's rows in its order.

    Where another order might change the numbers, return the loader itself and None.
    """
    if not is_blind_to_padding(model):
        return loader, None
    view = longest_first_view(loader, fills_batches=strategy.device.type != "cpu")
    if view is None:
        return loader, None
    sampler: Any = view.batch_sampler
    return view, np.array(sampler.rows(), np.int64)
