"""``evaluate_loop``: the scores of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn

from manualloop.arguments import check_arguments, require_loader
from manualloop.data.sampler import longest_first_view
from manualloop.errors import ConfigError, DataError, MetricError
from manualloop.evaluation.decoding import (
    AnyDecode,
    lets_write,
    show_samples,
    uses_outputs,
    with_model,
)
from manualloop.evaluation.intervals import find_intervals, with_intervals
from manualloop.evaluation.losses import whole_loss
from manualloop.evaluation.passes import passes_of
from manualloop.evaluation.rows import Decode, Postprocess, check_predictions
from manualloop.evaluation.scorers import as_metric, parts_of
from manualloop.evaluation.scoring import ask_for, counts, merge_counts, score, tally
from manualloop.evaluation.table import read_table
from manualloop.models import is_blind_to_padding, is_sharded, sample_weights
from manualloop.randomness import random_states_kept
from manualloop.reading.ranks import unsharded
from manualloop.reading.sources import source_of
from manualloop.strategy.base import Strategy, on_main, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.tasks.loss import check_loss, of_model
from manualloop.tasks.names import class_names
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.types import LossFn, Scores, Terms


class Functions(NamedTuple):
    """The functions of the user in an evaluation; each may be None."""

    postprocess: Postprocess | None
    decode: Decode | None
    loss_fn: LossFn | None
    terms: Terms | None


def evaluate_loop(
    model: nn.Module,
    eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]],
    metric: Any = None,
    *,
    strategy: Strategy | None = None,
    postprocess: Postprocess | None = None,
    decode: AnyDecode | None = None,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    confidence: float | None = None,
    progress_bar: bool = False,
) -> Scores:
    """Score a model on every row of a loader.

    One pass over the loader makes a table with one entry a row, in the order of the dataset, and
    the loss. Metrics of classes get flat class numbers without the ignored labels, others what they
    take; functions get one entry a row.

    The loss is the mean over all items, so it does not depend on how rows are batched. The rows of
    a prepared loader are therefore read from the longest to the shortest, in batches of about the
    same number of tokens, never more than the loader's largest batch can have. This leaves out most
    of the padding. Rows are read as the loader gives them where another order might change the
    numbers: with a ``loss_fn``, with padding on the left or without an attention mask, and with a
    model that is not of transformers or depends on padding all the same.

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
            computes only the loss. A function gets one entry a row: arrays for one label a row;
            for labels by token lists with an array a row, without the ignored positions.
        strategy: Device, precision and ranks; None takes the strategy that prepared the model, or
            ``prepare_strategy("auto")``.
        postprocess: ``postprocess(outputs, batch)`` returns a tensor of predictions, one for each
            row, or in the shape of the labels; None predicts by the task (argmax, above 0.5, the
            value).
        decode: ``decode(outputs, batch)`` returns a list with one object of Python for each row: a
            text, a list of tags, a dict. The metric gets them instead of predictions, beside the
            labels of the row without ignored ones; or ``decode`` returns two such lists,
            predictions and references. With a third parameter ``model`` it gets the model, as
            ``manualloop.tasks.generated`` does, which lets it write.
        loss_fn: As in ``train_steps``. The outputs are those of its last forward pass.
        terms: As in ``train_steps``; ``terms(outputs, batch)`` returns ``[(mean, num_items), ...]``
            for a loss that is a sum of means.
        confidence: Confidence of an interval around each score, such as 0.95: ``accuracy_low`` and
            ``accuracy_high``, by bootstrap over the rows (docs/evaluation.md). None makes none.
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
        decode=decode,
        loss_fn=loss_fn,
        terms=terms,
        progress_bar=progress_bar,
    )
    if confidence is not None:
        check_arguments(confidence=confidence)
    check_loss(loss_fn, terms)
    check_predictions(postprocess, decode)
    strategy = begin_call(
        strategy_for(model, strategy),
        "evaluate_loop",
        metric=metric,
        postprocess=postprocess,
        decode=decode,
        loss_fn=loss_fn,
        terms=terms,
        confidence=confidence,
    )
    model = prepare_model(strategy, model)
    scores = Scores()
    functions = Functions(
        postprocess, with_model(decode, model, strategy), loss_fn, of_model(terms, model)
    )
    evaluate = partial(_evaluate, model, metric, strategy, functions, confidence)
    for prefix, loader in named_loaders(eval_dataloader).items():
        found = evaluate(loader, progress_bar)
        if twice := [key for key in found if prefix + key in scores]:
            raise ConfigError(
                f"Two loaders have a result {prefix + twice[0]!r}. Give {prefix[:-1]!r} a name "
                "that is not the beginning of such a result of another."
            )
        scores.add(found, prefix)
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
    functions: Functions,
    confidence: float | None,
    loader: Iterable[Any],
    progress_bar: bool,
) -> Scores:
    names = class_names(model, loader)
    scorers = [] if metric is None else parts_of(as_metric(metric, names))
    of_rows = [scorer for scorer in scorers if scorer.takes != "loss"]
    loader = loader if strategy.world_size == 1 else unsharded(loader)
    numbers: Iterable[int] | None = None
    if functions.loss_fn is None:  # a loss_fn may compare the rows of a batch
        loader, numbers = longest_first(loader, model, strategy)
    # Where all metrics count, no row is kept, and the order does not matter.
    is_counted = confidence is None and all(map(counts, of_rows))
    if numbers is None and not is_counted:
        numbers = source_of(loader).row_numbers()
    by_rule = bool(of_rows) and functions.postprocess is None and functions.decode is None
    passes = passes_of(
        model, loader, strategy, functions.loss_fn, functions.terms, predicts=by_rule
    )
    if not uses_outputs(functions.decode):
        passes = replace(passes, runs="labelled")
    passes = replace(passes, lets_write=lets_write(functions.decode))
    table, losses = read_table(
        passes,
        ask_for(of_rows, functions.postprocess, functions.decode),
        "Evaluating" if progress_bar else None,
        numbers=numbers,
        tally=partial(tally, of_rows) if is_counted else None,
        wants_row_losses=confidence is not None,
    )
    if is_counted:
        merge_counts(of_rows, strategy)
    elif table is not None:
        show_samples(functions.decode, table)
    loss = whole_loss(losses)
    if loss is None and not scorers:
        raise DataError(
            f"Nothing to score: every label of the loader is {IGNORE_INDEX}. Check the masking of "
            "the labels, and that truncation leaves some."
        )
    scores = Scores() if loss is None else Scores(loss=loss)
    scores.names = names
    if scorers:
        with random_states_kept(devices=False):  # some libraries draw when they are imported
            found = on_main(strategy, partial(score, table, scorers, loss))
        if "loss" in scores and "loss" in found:
            raise MetricError(
                f"A metric has a score 'loss', which is the key of the model's loss ({loss:.4g}). "
                "Rename it: return {'own_loss': ...}."
            )
        scores.add(found)
    if confidence is None:
        return scores
    find = partial(find_intervals, model, table, scorers, losses, scores, confidence)
    return with_intervals(scores, on_main(strategy, find))


def longest_first(
    loader: Iterable[Any], model: nn.Module, strategy: Strategy
) -> tuple[Iterable[Any], list[int] | None]:
    """Return a loader that gives the longest rows first, and the dataset's rows in its order.

    Where another order might change the numbers, return the loader itself and None.
    """
    if not is_blind_to_padding(model):
        return loader, None
    view = longest_first_view(loader, fills_batches=strategy.device.type != "cpu")
    if view is None:
        return loader, None
    sampler: Any = view.batch_sampler
    return view, sampler.rows()
