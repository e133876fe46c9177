"""``evaluate_loop`` and ``predict_loop``: what a model says about data it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, TypeAlias, TypeVar

import numpy as np
from torch import Tensor, nn

from manualloop.checks import explain, require_loader
from manualloop.data.sampler import num_batches, rows_before
from manualloop.errors import DataError, ModelError
from manualloop.evaluation.predictions import (
    Predictions,
    dataset_rows,
    longest_first_rows,
    table_of,
)
from manualloop.evaluation.scorers import Gathered, Scorer, as_metric, counts_classes
from manualloop.mistakes import IGNORE_INDEX
from manualloop.models import evaluation_mode, forward_columns, is_sharded, takes_any_column
from manualloop.progress import ProgressBar
from manualloop.reading.ranks import is_spare, undealt
from manualloop.reading.reader import Feed
from manualloop.strategy.base import Strategy
from manualloop.strategy.select import strategy_for
from manualloop.tasks.items import (
    TASKS,
    count_terms,
    infer_task,
    loss_and_items,
    num_rows,
    require_loss,
    term_losses,
)
from manualloop.types import Batch, LossFn

_T = TypeVar("_T")

Postprocess: TypeAlias = Callable[[Any, Batch], Tensor]
"""``postprocess(outputs, batch) -> predictions``, one for each row (or each label)."""


def evaluate_loop(
    model: nn.Module,
    eval_dataloader: Iterable[Any],
    metric: Any = None,
    *,
    strategy: Strategy | None = None,
    postprocess: Postprocess | None = None,
    loss_fn: LossFn | None = None,
    progress_bar: bool = False,
) -> dict[str, float]:
    """Score a model on every row of a loader.

    The loss is the mean over all items, so it does not depend on how rows were batched. So those of
    a prepared loader are read from the longest to the shortest, in batches of about as many tokens,
    never more than its largest can have, which leaves out most of the padding; the metric gets them
    in the dataset's order. Not so where that might change the numbers: with a ``loss_fn``, with
    padding on the left or without an attention mask, with a model that is not of transformers or
    whose numbers depend on padding all the same, nor with a ``postprocess`` and a metric of more
    than classes. Of the outputs only what the metric needs is kept, never the logits. Every
    submodule's mode and the random states of torch, NumPy and Python are as before when it returns
    or raises. On several processes call it on each: every row counts once, and each gets the result
    of one process.

    Args:
        model: Moved to the strategy's device if no strategy has prepared it.
        eval_dataloader: Of dicts that the model takes.
        metric: A name (``"accuracy"``, ``"glue/mrpc"``), an ``evaluate`` module, a torchmetrics
            metric, ``fn(predictions, references) -> dict``, or a sequence of these. None: only
            the loss.
        strategy: None: the one that prepared the model, else ``prepare_strategy("auto")``.
        postprocess: ``postprocess(outputs, batch)`` makes predictions of the model's outputs;
            None: by task (argmax, above 0.5, the value).
        loss_fn: As in ``train_steps``. Outputs are those of its last forward pass.
        progress_bar: Show a bar.

    Returns:
        ``loss``, if there are labels or a ``loss_fn``, and what the metric computes.

    Raises:
        DataError: The loader gives no batch, all labels are -100, or a metric is asked for and
            there are no labels.
        MetricError: The metric cannot score these predictions.

    >>> import torch
    >>> model = nn.Linear(1, 1)
    >>> evaluate_loop(model, [{"x": torch.zeros(2, 1)}], strategy=None,
    ...               loss_fn=lambda model, batch: 0 * model(batch["x"]).mean())
    {'loss': 0.0}
    """
    strategy = strategy_for(model, strategy)
    model = strategy.prepare_model(model)
    eval_dataloader = eval_dataloader if strategy.world_size == 1 else undealt(eval_dataloader)
    scorer = None if metric is None else as_metric(metric)
    if loss_fn is None and (postprocess is None or scorer is None or counts_classes(scorer)):
        eval_dataloader, rows = longest_first_rows(eval_dataloader, model, strategy)
    else:
        rows = None  # loss_fn may compare the rows of a batch, postprocess give several for one
    taker: Scorer | Gathered | None = scorer
    if scorer is not None and (strategy.world_size > 1 or rows is not None):
        taker = Gathered(scorer, strategy, rows)
    losses: dict[int, list[tuple[float, float]]] = {}
    with (
        evaluation_mode(model, strategy.device),
        closing(_shown(eval_dataloader, "Evaluating", strategy, progress_bar)) as batches,
    ):
        model = _without_collectives(model)
        for place, batch in batches:
            if is_spare(batch):
                _take_part(model, batch, place, strategy, loss_fn)
                continue
            if parts := _score(model, batch, place, strategy, loss_fn, postprocess, taker):
                losses[place[1]] = parts
    scores: dict[str, float] = {} if taker is None else taker.compute()
    losses = _in_order(losses, strategy)
    means = [_mean(term) for term in zip(*losses.values(), strict=True) if any(n for _, n in term)]
    if not means and taker is None:
        raise DataError(
            f"Nothing to score: every label of the loader is {IGNORE_INDEX}. Check the masking of "
            "the labels, and that truncation leaves some."
        )
    return {"loss": sum(means) / len(means), **scores} if means else scores


def _mean(parts: Sequence[tuple[float, float]]) -> float:
    return sum(loss for loss, _ in parts) / sum(num_items for _, num_items in parts)


def _score(
    model: nn.Module,
    batch: Any,
    place: tuple[Any, int],
    strategy: Strategy,
    loss_fn: LossFn | None,
    postprocess: Postprocess | None,
    scorer: Scorer | Gathered | None,
) -> list[tuple[float, float]]:
    """Give a batch to the metric; return its losses, summed over items, and their numbers.

    There is one, but for question answering (see ``count_terms``); none without labels. A function,
    so that its outputs are gone before the next batch needs the memory.
    """
    outputs, loss = _forward(model, batch, place, strategy, loss_fn)
    if scorer is not None:
        predictions, references, kept = _for_metric(model, outputs, batch, postprocess)
        if isinstance(scorer, Gathered):
            scorer.add_batch(predictions, references, kept)
        else:
            scorer.add_batch(predictions=predictions, references=references)
    elif loss is None:
        loss = require_loss(model, batch, outputs)
    if loss is None:
        return []
    counts: Sequence[float] = count_terms(model, batch)
    if isinstance(loss, tuple):
        loss, num_items = loss_and_items(loss, 0)
        counts = (num_items,)
    means = [loss] if len(counts) == 1 else term_losses(outputs, strategy.to_device(batch))
    return [
        (float(mean) * num_items if num_items else 0.0, num_items)  # a mean of none is 0/0
        for mean, num_items in zip(means, counts, strict=True)
    ]


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
        dataloader: Of dicts that the model takes, with or without labels. Of a prepared loader
            the order is known even if it shuffles.
        strategy: As for ``evaluate_loop``.
        postprocess: As for ``evaluate_loop``.
        progress_bar: Show a bar.

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
    model = strategy.prepare_model(model)
    dataloader = dataloader if strategy.world_size == 1 else undealt(dataloader)
    dataloader, index = longest_first_rows(dataloader, model, strategy)
    if index is None:
        index = dataset_rows(dataloader)
    parts: dict[int, tuple[Tensor | None, ...]] = {}
    with (
        evaluation_mode(model, strategy.device),
        closing(_shown(dataloader, "Predicting", strategy, progress_bar)) as batches,
    ):
        model = _without_collectives(model)
        for place, batch in batches:
            if is_spare(batch):
                _take_part(model, batch, place, strategy, None)
                continue
            references = batch["labels"].to("cpu", copy=True) if "labels" in batch else None
            parts[place[1]] = (*_predict(model, batch, place, strategy, postprocess), references)
    columns = list(zip(*_in_order(parts, strategy).values(), strict=True))
    predictions, scores, labels = ([p for p in column if p is not None] for column in columns)
    rows = sum(map(len, predictions))
    index = np.arange(rows) if index is None else index[:rows]
    order = np.argsort(index, kind="stable")
    tables = [table_of(part)[order] if part else None for part in (scores, labels)]
    return Predictions(index[order], table_of(predictions)[order], *tables)


def _in_order(parts: dict[int, _T], strategy: Strategy) -> dict[int, _T]:
    """Return what all ranks have found, by the number of the batch, in the loader's order."""
    found = {number: part for of_rank in strategy.gather(parts) for number, part in of_rank.items()}
    return {number: found[number] for number in sorted(found)}


def _without_collectives(model: nn.Module) -> nn.Module:
    """Take off the wrapper of data parallelism, which would talk to the other ranks."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    inner: nn.Module = model.module if is_wrapped else model  # type: ignore[assignment]
    return inner


def _predict(
    model: nn.Module,
    batch: Any,
    place: tuple[Any, int],
    strategy: Strategy,
    postprocess: Postprocess | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the predictions for a batch, and the probabilities where the task has them."""
    outputs, _ = _forward(model, batch, place, strategy, None)
    probabilities = None
    if postprocess is not None:
        predictions = postprocess(outputs, batch)
    else:
        logits, task = _logits(outputs), infer_task(model, batch.get("labels"))
        predictions = TASKS[task].predict(logits)
        if task in _PROBABILITIES:
            probabilities = _PROBABILITIES[task](logits.float()).cpu()
    if len(predictions) != (rows := num_rows(batch)):
        raise DataError(
            f"{len(predictions)} predictions for a batch of {rows} rows. Let postprocess return "
            "one for each row, such as outputs.logits.argmax(-1)."
        )
    return predictions.to("cpu", copy=True), probabilities  # a view would keep all the outputs


def _shown(
    loader: Iterable[Any], name: str, strategy: Strategy, progress_bar: bool
) -> Generator[tuple[tuple[Any, int], Any], None, None]:
    """Give the batches of this rank, in all at least one, under a bar; each after its place."""
    require_loader(loader)
    shown = progress_bar and strategy.is_main
    bar = ProgressBar(num_batches(loader), name=name, unit="batch", shown=shown)
    number = 0
    try:
        for batch in loader if strategy.world_size == 1 else _dealt(loader, strategy):
            yield (loader, number + strategy.rank), batch
            number += strategy.world_size
            if bar.is_due():
                bar.show(number)
    finally:
        bar.close(number)
    if number == 0:
        raise DataError(
            "No rows to evaluate: the loader gave 0 batches. Check the filter of the dataset, and "
            "that the loader is not a generator that was read before."
        )


def _dealt(loader: Iterable[Any], strategy: Strategy) -> Generator[Any, None, None]:
    feed = Feed(loader, strategy=strategy)
    for given in feed.batches():
        yield given.batch
        feed.settle()  # else it would keep every batch


def _forward(
    model: nn.Module,
    batch: Any,
    place: tuple[Any, int],
    strategy: Strategy,
    loss_fn: LossFn | None,
) -> tuple[Any, Any]:
    """Return the outputs for a batch and its loss: a mean, ``(mean, items)``, or None."""
    inputs = strategy.to_device(batch)
    loss: Any
    with strategy.autocast():
        if loss_fn is not None:
            seen: list[Any] = []
            hook = model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
            try:
                loss = loss_fn(model, inputs)
            finally:
                hook.remove()
            return (seen[-1] if seen else None), loss
        try:
            outputs = model(**_taken(model, inputs))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            loader, number = place
            strategy.explain(error)
            start = rows_before(loader, number)
            explain(error, model, [batch], loader, [start], needs_labels=False)
            raise
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return outputs, loss


def _take_part(
    model: nn.Module,
    batch: Any,
    place: tuple[Any, int],
    strategy: Strategy,
    loss_fn: LossFn | None,
) -> None:
    """Make a pass whose outputs count on another rank, where that takes all ranks."""
    if is_sharded(model):
        _forward(model, batch, place, strategy, loss_fn)


def _taken(model: nn.Module, batch: Batch) -> Batch:
    """Leave the labels out for a model that does not compute its own loss."""
    if "labels" not in batch or takes_any_column(model) or "labels" in forward_columns(model):
        return batch
    return {name: value for name, value in batch.items() if name != "labels"}


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model's {type(outputs).__name__} has no logits to make predictions of. Pass "
            "postprocess=lambda outputs, batch: outputs[0].argmax(-1)."
        )
    return logits


def _for_metric(
    model: nn.Module, outputs: Any, batch: Any, postprocess: Postprocess | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return predictions and references of a batch without those labelled -100, and which are not.

    The last is bool, in the shape of all predictions; None: they are all kept.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"The metric needs labels: the batch has only {found}. For rows without labels use "
            'predict_loop; let collate_fn name those of others: {"labels": ...}.'
        )
    labels: Tensor = batch["labels"]
    task = infer_task(model, labels)
    if postprocess is not None:
        predictions = postprocess(outputs, batch)
    else:
        predictions = TASKS[task].predict(_logits(outputs))
        if "shift_labels" in batch:
            labels = batch["shift_labels"]
        elif task == "causal_lm":  # a position predicts the token after it
            predictions, labels = predictions[..., :-1], labels[..., 1:]
    predictions, labels = predictions.cpu(), labels.cpu()
    if task == "multi_label_classification":
        return predictions, labels.int(), None
    if predictions.numel() == labels.numel():
        labels = labels.reshape(predictions.shape)
        if not labels.is_floating_point():
            kept = labels != IGNORE_INDEX
            return predictions[kept], labels[kept], kept
    return predictions, labels, None


_PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "single_label_classification": lambda logits: logits.softmax(dim=-1),
    "multi_label_classification": lambda logits: logits.sigmoid(),
}
