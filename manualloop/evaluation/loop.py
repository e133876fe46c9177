"""``evaluate_loop``: the scores of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn

from manualloop.arguments import check_arguments, require_loader
from manualloop.data.sampler import longest_first_view
from manualloop.errors import ConfigError, DataError
from manualloop.evaluation.decoding import AnyDecode, Decoding, show_samples, with_model
from manualloop.evaluation.intervals import find_intervals, with_intervals
from manualloop.evaluation.losses import whole_loss
from manualloop.evaluation.passes import Pass, read_table
from manualloop.evaluation.rows import Postprocess
from manualloop.evaluation.scorers import as_metric, ask_for, counts, parts_of, score
from manualloop.models import (
    accepts,
    is_sharded,
    sample_weights,
    without_ranks,
)
from manualloop.randomness import random_states_kept
from manualloop.reading.ranks import unsharded
from manualloop.reading.sources import source_of
from manualloop.strategy.base import Strategy, on_main, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.tasks.loss import check_loss, of_model
from manualloop.tasks.mixing import is_blind_to_padding
from manualloop.tasks.names import class_names
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.types import LossFn, Scores, Terms


class Evaluation(NamedTuple):
    """What is the same for all loaders of a call, under the names of its arguments."""

    model: nn.Module
    metric: Any
    strategy: Strategy
    postprocess: Postprocess | None
    decode: Decoding | None
    loss_fn: LossFn | None
    terms: Terms | None
    confidence: float | None
    progress_bar: bool


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
    own = without_ranks(model)
    call = Evaluation(
        own,
        metric,
        strategy,
        postprocess,
        None if decode is None else with_model(decode, own, strategy),
        loss_fn,
        None if terms is None else of_model(terms, model),
        confidence,
        progress_bar,
    )
    scores = Scores()
    for prefix, loader in named_loaders(eval_dataloader).items():
        found = _evaluate(call, loader)
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


def _evaluate(call: Evaluation, loader: Iterable[Any]) -> Scores:
    """Score the rows of one loader."""
    model, strategy, confidence = call.model, call.strategy, call.confidence
    names = class_names(model, loader)
    scorers = [] if call.metric is None else parts_of(as_metric(call.metric, names))
    ask = ask_for(scorers, call.postprocess, call.decode)
    # Where all metrics count, no row is kept, and the order does not matter.
    is_counted = confidence is None and all(map(counts, scorers))
    loader = loader if strategy.world_size == 1 else unsharded(loader)
    numbers: Iterable[int] | None = None
    if call.loss_fn is None:  # a loss_fn may compare the rows of a batch
        loader, numbers = longest_first(loader, model, strategy)
    if numbers is None and not is_counted:
        numbers = source_of(loader).row_numbers()
    table, losses = read_table(
        Pass(
            model,
            loader,
            strategy,
            ask,
            # A model that does not compute its own loss gets no labels.
            takes_labels=accepts(model, "labels"),
            loss_fn=call.loss_fn,
            terms=call.terms,
            counting=scorers if is_counted else None,
        ),
        "Evaluating" if call.progress_bar else None,
        numbers=numbers,
        wants_row_losses=confidence is not None,
    )
    if table is not None and call.decode is not None:
        show_samples(table, call.decode.num_shown)
    loss = whole_loss(losses)
    if scorers:
        with random_states_kept(devices=False):  # some libraries draw when they are imported
            scores = on_main(strategy, partial(score, table, scorers, loss))
    elif loss is not None:
        scores = Scores(loss=loss)
    else:
        raise DataError(
            f"Nothing to score: every label of the loader is {IGNORE_INDEX}. Check the masking of "
            "the labels, and that truncation leaves some."
        )
    scores.names = names
    if confidence is None:
        return scores
    find = partial(find_intervals, model, table, scorers, losses, scores, confidence)
    with random_states_kept(devices=False):  # a metric that is called again may draw
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
