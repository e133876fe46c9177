"""``predict_loop``: the predictions of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from manualloop.arguments import check_arguments
from manualloop.evaluation.decoding import AnyDecode, lets_write, uses_outputs, with_model
from manualloop.evaluation.inputs import Inputs
from manualloop.evaluation.loop import longest_first
from manualloop.evaluation.passes import passes_of
from manualloop.evaluation.predictions import Predictions, dataset_rows
from manualloop.evaluation.rows import Ask, Postprocess, check_predictions
from manualloop.evaluation.table import read_table
from manualloop.models import predicts_without_labels
from manualloop.notices import say
from manualloop.reading.ranks import unsharded
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.tasks.names import class_names


def predict_loop(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    strategy: Strategy | None = None,
    postprocess: Postprocess | None = None,
    decode: AnyDecode | None = None,
    progress_bar: bool = False,
) -> Predictions:
    """Predict every row of a loader, in the order of the dataset.

    Args:
        model: As for ``evaluate_loop``.
        dataloader: Loader of dicts that the model takes, with or without labels. The order of a
            prepared loader is known even if it shuffles.
        strategy: As for ``evaluate_loop``.
        postprocess: As for ``evaluate_loop``.
        decode: As for ``evaluate_loop``. ``Predictions.predictions`` is then a list.
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
    check_arguments(
        model=model,
        loader=dataloader,
        postprocess=postprocess,
        decode=decode,
        progress_bar=progress_bar,
    )
    check_predictions(postprocess, decode)
    strategy = strategy_for(model, strategy)
    strategy = begin_call(strategy, "predict_loop", postprocess=postprocess, decode=decode)
    model = prepare_model(strategy, model)
    names = class_names(model, dataloader)
    loader = dataloader if strategy.world_size == 1 else unsharded(dataloader)
    loader, numbers = longest_first(loader, model, strategy)
    by_rule = postprocess is None and decode is None
    passes = passes_of(model, loader, strategy, predicts=by_rule)
    if by_rule and predicts_without_labels(model):
        passes = replace(passes, leaves_out=passes.leaves_out | {"labels"})
    if not uses_outputs(decode):
        passes = replace(passes, runs="none")
    decode = with_model(decode, model, strategy)
    passes = replace(passes, lets_write=lets_write(decode), has_loss=False)
    table, _ = read_table(
        passes,
        Ask(postprocess, decode, references=False, scores=None, kept=True, aligned=False),
        "Predicting" if progress_bar else None,
        numbers=dataset_rows(loader) if numbers is None else numbers,
        wants_loss=False,
    )
    assert table is not None
    for name in table.missing:
        say(f"the predictions have no {name}: some batches of the loader have no labels.")
    return Predictions(
        table.index,
        table.column("predictions"),
        table.column("scores"),
        table.column("references"),
        {name: column.rows(table.order) for name, column in table.kept.items()},
        names,
        Inputs(dataloader),
        table.ignored,
    )
