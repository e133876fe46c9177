"""``evaluate_loop`` and ``predict_loop``: what a model says about data it does not learn from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import IterableDataset, SequentialSampler

from manualloop.data.order import OrderedBatchSampler, num_batches
from manualloop.errors import DataError, ModelError
from manualloop.models import evaluation_mode, forward_columns, takes_any_column
from manualloop.preflight import explain, require_loader
from manualloop.progress import ProgressBar
from manualloop.scorers import Scorer, as_metric
from manualloop.strategy import Strategy, require_one_process, strategy_for
from manualloop.tasks import (
    IGNORE_INDEX,
    TASKS,
    count_terms,
    infer_task,
    loss_and_items,
    num_rows,
    require_loss,
    term_losses,
)
from manualloop.types import Batch, LossFn

Postprocess: TypeAlias = Callable[[Any, Batch], Tensor]
"""``postprocess(outputs, batch) -> predictions``, one for each row (or each label)."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """A table of predictions, one row for each row of the dataset, in its order.

    Attributes:
        index: int64 ``(rows,)``: row numbers in the dataset.
        predictions: ``(rows,)`` class numbers or values, ``(rows, classes)`` for multi-label,
            ``(rows, tokens)`` for tokens. Rows of a batch narrower than the widest end in -100.
        scores: float32 ``(rows, classes)``: probability of each class; None for a regression, for
            tokens, or with a ``postprocess`` of your own.
        references: The labels, padded as ``predictions`` are, or None if the data has none.
    """

    index: NDArray[np.int64]
    predictions: NDArray[Any]
    scores: NDArray[np.float32] | None
    references: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.index)


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

    The loss is the mean over all items, so it does not depend on how rows were batched. Of the
    outputs only what the metric needs is kept, never the logits. Every submodule's mode and the
    random states of torch, NumPy and Python are as before when it returns or raises.

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

    >>> model = nn.Linear(1, 1)
    >>> evaluate_loop(model, [{"x": torch.zeros(2, 1)}], strategy=None,
    ...               loss_fn=lambda model, batch: 0 * model(batch["x"]).mean())
    {'loss': 0.0}
    """
    strategy = require_one_process(strategy_for(model, strategy))
    model = strategy.prepare_model(model)
    scorer = None if metric is None else as_metric(metric)
    losses: list[list[tuple[float, float]]] = []
    shown = progress_bar and strategy.is_main
    with (
        evaluation_mode(model, strategy.device),
        closing(_shown(eval_dataloader, "Evaluating", shown)) as batches,
    ):
        for place, batch in batches:
            if parts := _score(model, batch, place, strategy, loss_fn, postprocess, scorer):
                losses.append(parts)
    scores: dict[str, float] = {} if scorer is None else scorer.compute()
    means = [_mean(term) for term in zip(*losses, strict=True) if any(n for _, n in term)]
    if not means and scorer is None:
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
    scorer: Scorer | None,
) -> list[tuple[float, float]]:
    """Give a batch to the metric; return its losses, summed over items, and their numbers.

    There is one, but for question answering (see ``count_terms``); none without labels. A function,
    so that its outputs are gone before the next batch needs the memory.
    """
    outputs, loss = _forward(model, batch, place, strategy, loss_fn)
    if scorer is not None:
        predictions, references = _for_metric(model, outputs, batch, postprocess)
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

    >>> class Half(nn.Module):
    ...     def forward(self, x):
    ...         return {"logits": x / 2}
    >>> batches = [{"x": torch.tensor([[2.0, 4.0]])}, {"x": torch.tensor([[8.0, 6.0]])}]
    >>> predict_loop(Half(), batches).predictions
    array([1, 0])
    """
    strategy = require_one_process(strategy_for(model, strategy))
    model = strategy.prepare_model(model)
    index = _dataset_rows(dataloader)
    predictions: list[Tensor] = []
    scores: list[Tensor] = []
    references: list[Tensor] = []
    shown = progress_bar and strategy.is_main
    with (
        evaluation_mode(model, strategy.device),
        closing(_shown(dataloader, "Predicting", shown)) as batches,
    ):
        for place, batch in batches:
            predicted, probabilities = _predict(model, batch, place, strategy, postprocess)
            predictions.append(predicted)
            if probabilities is not None:
                scores.append(probabilities)
            if "labels" in batch:
                references.append(batch["labels"].cpu())
    rows = sum(map(len, predictions))
    index = np.arange(rows) if index is None else index[:rows]
    order = np.argsort(index, kind="stable")
    tables = [_table(parts)[order] if parts else None for parts in (scores, references)]
    return Predictions(index[order], _table(predictions)[order], *tables)


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


def _table(parts: list[Tensor]) -> NDArray[Any]:
    """Put the rows of all batches into one array; rows of narrower ones are padded with -100."""
    widest = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)][1:]
    padded = []
    for part in parts:
        missing = [size - own for size, own in zip(widest, part.shape[1:], strict=True)]
        if any(missing):
            ends = [end for size in reversed(missing) for end in (0, size)]
            part = nn.functional.pad(part, ends, value=IGNORE_INDEX)
        padded.append(part.float() if part.dtype == torch.bfloat16 else part)  # NumPy has none
    table: NDArray[Any] = torch.cat(padded).numpy()
    return table


def _shown(
    loader: Iterable[Any], name: str, shown: bool
) -> Generator[tuple[tuple[Any, int], Any], None, None]:
    """Give the batches of a loader, at least one, under a bar; each after its place."""
    require_loader(loader)
    bar = ProgressBar(num_batches(loader), name=name, unit="batch", shown=shown)
    number = 0
    try:
        for batch in loader:
            yield (loader, number), batch
            number += 1
            if bar.is_due():
                bar.show(number)
    finally:
        bar.close(number)
    if number == 0:
        raise DataError(
            "No rows to evaluate: the loader gave 0 batches. Check the filter of the dataset, and "
            "that the loader is not a generator that was read before."
        )


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
            size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or 0
            explain(error, model, [batch], loader, number * size, needs_labels=False)
            raise
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return outputs, loss


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
) -> tuple[Tensor, Tensor]:
    """Return predictions and references of a batch, without those labelled -100."""
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
        return predictions, labels.int()
    if predictions.numel() == labels.numel():
        labels = labels.reshape(predictions.shape)
        if not labels.is_floating_point():
            kept = labels != IGNORE_INDEX
            return predictions[kept], labels[kept]
    return predictions, labels


def _dataset_rows(loader: Iterable[Any]) -> NDArray[np.int64] | None:
    """Return the dataset's row numbers in the loader's order; None: it is the dataset's."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if isinstance(batch_sampler, OrderedBatchSampler):
        return np.array(batch_sampler.rows(), dtype=np.int64)
    sampler = getattr(loader if batch_sampler is None else batch_sampler, "sampler", batch_sampler)
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if sampler is None or is_stream or isinstance(sampler, SequentialSampler):
        return None
    raise DataError(
        f"The loader reads its rows by a {type(sampler).__name__}, so predictions could not be put "
        "in the dataset's order. Build it with shuffle=False, or use prepare_dataloaders."
    )


_PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "single_label_classification": lambda logits: logits.softmax(dim=-1),
    "multi_label_classification": lambda logits: logits.sigmoid(),
}
