"""``evaluate_loop``: the scores of a model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import isfinite, isnan
from typing import Any, TypeAlias, TypeVar
from weakref import ref

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.batches import is_spare, model_inputs
from manualloop.checks import explain, require_loader
from manualloop.data.labels import hidden_message, origin_of
from manualloop.data.sampler import longest_first_view, num_batches, rows_before
from manualloop.errors import DataError, ModelError
from manualloop.evaluation.losses import Made, terms_of, whole_loss
from manualloop.evaluation.scorers import Gathered, Scorer, as_metric, counts_classes
from manualloop.models import (
    accepts,
    evaluation_mode,
    is_blind_to_padding,
    is_sharded,
    sample_weights,
)
from manualloop.notices import say
from manualloop.progress import ProgressBar
from manualloop.reading.ranks import unsharded
from manualloop.reading.reader import Reader
from manualloop.reading.sources import source_of
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.tasks.loss import check_loss, explain_kept, no_loss
from manualloop.tasks.otherwise import objection_to
from manualloop.tasks.task import IGNORE_INDEX, Task, resolve_task
from manualloop.types import Batch, LossFn, Scores, Terms

_T = TypeVar("_T")

Postprocess: TypeAlias = Callable[[Any, Batch], Tensor]
"""``postprocess(outputs, batch) -> predictions``, one per row or per label."""


def evaluate_loop(
    model: nn.Module,
    eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]],
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
        eval_dataloader: Loader of dicts that the model takes; or several by name, such as MNLI's
            ``{"matched": a, "mismatched": b}``: the keys of their results begin with the names.
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
    check_arguments(
        model=model,
        loader=eval_dataloader,
        postprocess=postprocess,
        loss_fn=loss_fn,
        terms=terms,
        progress_bar=progress_bar,
    )
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
    scores = Scores()
    evaluate = partial(_evaluate, model, metric, strategy, postprocess, loss_fn, terms)
    for prefix, loader in named_loaders(eval_dataloader).items():
        found = evaluate(loader, progress_bar)
        scores |= {prefix + name: value for name, value in found.items()}
    if not is_sharded(model):
        scores.model, scores.sample = ref(model), sample_weights(model)
    return scores


def named_loaders(loaders: Iterable[Any] | Mapping[str, Iterable[Any]]) -> dict[str, Iterable[Any]]:
    """Return loaders by what the keys of their results begin with: "" for a single one.

    Raises:
        DataError: A mapping holds something else than loaders.
    """
    if not isinstance(loaders, Mapping):
        require_loader(loaders)
        return {"": loaders}
    if not loaders:
        raise DataError("There is no loader among those to evaluate: the mapping is empty.")
    for loader in loaders.values():
        if isinstance(loader, Tensor):
            raise DataError(
                f"Got a batch with {', '.join(map(str, loaders))}, where a loader of batches is "
                "wanted. Pass a list of batches: evaluate_loop(model, [batch])."
            )
        require_loader(loader)
    return {f"{name}_": loader for name, loader in loaders.items()}


def _evaluate(
    model: nn.Module,
    metric: Any,
    strategy: Strategy,
    postprocess: Postprocess | None,
    loss_fn: LossFn | None,
    terms: Terms | None,
    loader: Iterable[Any],
    progress_bar: bool,
) -> dict[str, float]:
    loader = loader if strategy.world_size == 1 else unsharded(loader)
    scorer = None if metric is None else as_metric(metric)
    if loss_fn is None and (postprocess is None or scorer is None or counts_classes(scorer)):
        loader, rows = longest_first_rows(loader, model, strategy)
    else:
        rows = None  # loss_fn may compare a batch's rows, postprocess make several of one
    taker: Scorer | Gathered | None = scorer
    if scorer is not None and (strategy.world_size > 1 or rows is not None):
        taker = Gathered(scorer, strategy, rows)
    nan_rows: list[int] = []
    found = each_batch(
        passes_of(
            model, loader, strategy, loss_fn, terms, scorer is not None and postprocess is None
        ),
        partial(_score, postprocess=postprocess, scorer=taker, nan_rows=nan_rows),
        "Evaluating" if progress_bar else None,
    )
    tell_nan(sum(nan_rows))
    scores: dict[str, float] = {} if taker is None else taker.compute()
    loss = whole_loss([of_batch for of_batch in found if of_batch])
    if loss is None and taker is None:
        raise DataError(
            f"Nothing to score: every label of the loader is {IGNORE_INDEX}. Check the masking of "
            "the labels, and that truncation leaves some."
        )
    return scores if loss is None else {"loss": loss, **scores}


def _score(
    passes: Passes,
    made: Made,
    *,
    postprocess: Postprocess | None,
    scorer: Scorer | Gathered | None,
    nan_rows: list[int],
) -> list[tuple[float, float | None]]:
    """Give a batch to the metric; return the terms of its loss.

    A batch without labels has no term. The items of one are None where nothing tells them. The
    number of rows whose logits are NaN is added to ``nan_rows``.
    """
    with passes.strategy.autocast():
        found = terms_of(made, passes.loss_fn, passes.terms)
    if found is None or scorer is not None:
        _refuse_hidden(passes.loader, made.batch)
    if found is None and scorer is None:
        raise no_loss(passes.model, made.batch, made.outputs)
    if scorer is not None:
        # A loss that the model computed is finite only if the logits that it scored are no NaN.
        is_models = passes.loss_fn is None and passes.terms is None
        is_sound = is_models and found and all(isfinite(loss) for loss, _ in found)
        predictions, references, kept = _for_metric(
            made, postprocess, None if is_sound else nan_rows
        )
        if isinstance(scorer, Gathered):
            scorer.add_batch(predictions, references, kept)
        else:
            scorer.add_batch(predictions=predictions, references=references)
    return found or []


def _refuse_hidden(loader: Any, batch: Any) -> None:
    """Refuse to score rows whose labels ``prepare_dataloaders`` found to be hidden."""
    if not (isinstance(batch, Mapping) and "labels" in batch) and (
        forms := origin_of(loader).hidden
    ):
        raise DataError(hidden_message(forms))


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
    """

    model: nn.Module
    loader: Iterable[Any]
    strategy: Strategy
    loss_fn: LossFn | None
    terms: Terms | None
    leaves_out: frozenset[str]
    predicts: bool


def passes_of(
    model: nn.Module,
    loader: Iterable[Any],
    strategy: Strategy,
    loss_fn: LossFn | None,
    terms: Terms | None,
    predicts: bool,
) -> Passes:
    """Prepare the passes of an evaluation."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    # A model that does not compute its own loss gets no labels.
    takes_labels = loss_fn is not None or accepts(model, "labels")
    leaves_out = frozenset() if takes_labels else frozenset({"labels"})
    return Passes(model, loader, strategy, loss_fn, terms, leaves_out, predicts)


def each_batch(passes: Passes, use: Callable[[Passes, Made], _T], bar: str | None) -> list[_T]:
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
                # Passes that take all ranks: losses of detection add up the boxes of all.
                if is_sharded(model) or objection_to(model, batch):
                    inputs, outputs, _ = _forward(passes, batch, number)
                    if passes.terms is not None:
                        passes.terms(outputs, inputs)
                continue
            task, kept[number] = _use(passes, batch, number, task, use)
    found = {number: part for of_rank in strategy.gather(kept) for number, part in of_rank.items()}
    return [found[number] for number in sorted(found)]


def _use(
    passes: Passes,
    batch: Any,
    number: int,
    task: Task | None,
    use: Callable[[Passes, Made], _T],
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


def _forward(passes: Passes, batch: Any, number: int) -> tuple[Any, Any, Any]:
    """Return the inputs of a batch, its outputs, and what ``loss_fn`` returned."""
    model, strategy = passes.model, passes.strategy
    inputs = strategy.to_device(batch)
    with strategy.autocast():
        if passes.loss_fn is not None:
            seen: list[Any] = []
            hook = model.register_forward_hook(lambda module, args, outputs: seen.append(outputs))
            try:
                loss: Any = passes.loss_fn(model, inputs)
            except TypeError as error:
                explain_kept(error, inputs)
                raise
            finally:
                hook.remove()
            return inputs, (seen[-1] if seen else None), loss
        columns = model_inputs(inputs)
        if passes.leaves_out:
            columns = {name: c for name, c in columns.items() if name not in passes.leaves_out}
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


def logits_of(outputs: Any) -> Tensor:
    """Return the logits among a model's outputs.

    Raises:
        ModelError: There are none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if logits is None:
        logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model's {type(outputs).__name__} has no logits to predict from. Pass "
            "postprocess=lambda outputs, batch: outputs[0].argmax(-1)."
        )
    return logits


def count_nan_rows(logits: Tensor, predictions: Tensor) -> int:
    """Count the rows with a NaN among their logits."""
    if predictions.shape == logits.shape[:-1] and not predictions.is_floating_point():
        logits = logits.gather(-1, predictions.unsqueeze(-1))  # NaN is the largest of a row
    if not isnan(float(logits.sum())):
        return 0
    return int(logits.isnan().reshape(len(logits), -1).any(1).sum())


def tell_nan(num_rows: int) -> None:
    """Log that some predictions mean nothing."""
    if num_rows:
        rows = "1 row" if num_rows == 1 else f"{num_rows} rows"
        say(
            f"the logits of {rows} are NaN: their predictions and scores mean nothing.",
            from_every_rank=True,
        )


def _for_metric(
    made: Made, postprocess: Postprocess | None, nan_rows: list[int] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the predictions and references of a batch that are not labelled -100, and a mask.

    The mask is bool, has the shape of all predictions, and tells which of them are kept; None keeps
    all. The number of rows whose logits are NaN is added to ``nan_rows``, unless that is None.
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
        logits = logits_of(made.outputs)
        predictions = task.rules.predict(logits)
        if nan_rows is not None:
            nan_rows.append(count_nan_rows(logits, predictions))
        if "shift_labels" in batch:
            labels = batch["shift_labels"]
        elif task.rules.shifts_labels:
            predictions, labels = predictions[..., :-1], labels[..., 1:]
    predictions, labels = predictions.cpu(), labels.cpu()
    if task.name == "multi_label_classification":
        if labels.is_floating_point() and bool((labels == IGNORE_INDEX).any()):
            raise DataError(
                f"Labels of {IGNORE_INDEX} leave classes of a row out of the loss, but the metric "
                "compares whole rows. Leave the metric out: evaluate_loop(model, loader) computes "
                "the loss, and predict_loop gives predictions and references."
            )
        return predictions, labels.int(), None
    if predictions.numel() == labels.numel():
        labels = labels.reshape(predictions.shape)
        if not labels.is_floating_point():
            kept = labels != IGNORE_INDEX
            return predictions[kept], labels[kept], kept
    return predictions, labels, None


def longest_first_rows(
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
