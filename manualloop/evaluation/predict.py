"""``predict_loop``: the predictions of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.batches import num_rows
from manualloop.errors import DataError
from manualloop.evaluation.loop import (
    Passes,
    Postprocess,
    count_nan_rows,
    each_batch,
    logits_of,
    longest_first_rows,
    passes_of,
    tell_nan,
)
from manualloop.evaluation.losses import Made
from manualloop.evaluation.predictions import Predictions, dataset_rows, table_of
from manualloop.mistakes import scalar_floats_message
from manualloop.models import predicts_without_labels
from manualloop.notices import say
from manualloop.reading.ranks import unsharded
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for


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
    check_arguments(
        model=model, loader=dataloader, postprocess=postprocess, progress_bar=progress_bar
    )
    strategy = strategy_for(model, strategy)
    strategy = begin_call(strategy, "predict_loop", postprocess=postprocess)
    model = prepare_model(strategy, model)
    loader = dataloader if strategy.world_size == 1 else unsharded(dataloader)
    loader, longest_first = longest_first_rows(loader, model, strategy)
    numbers = dataset_rows(loader) if longest_first is None else longest_first
    nan_rows: list[int] = []
    passes = passes_of(model, loader, strategy, None, None, postprocess is None)
    if postprocess is None and predicts_without_labels(model):
        passes = replace(passes, leaves_out=passes.leaves_out | {"labels"})
    parts = each_batch(
        passes,
        partial(_predict, postprocess=postprocess, nan_rows=nan_rows),
        "Predicting" if progress_bar else None,
    )
    tell_nan(sum(nan_rows))
    predictions, scores, labels = zip(*parts, strict=True)
    rows = sum(map(len, predictions))
    index = None if numbers is None else np.fromiter(islice(numbers, rows), np.int64)
    order = np.arange(rows) if index is None else np.argsort(index, kind="stable")
    return Predictions(
        None if index is None else index[order],
        table_of(predictions)[order],
        _whole_column("scores", scores, order),
        _whole_column("references", labels, order),
        names=_names_of(model),
    )


def _names_of(model: nn.Module) -> tuple[str, ...] | None:
    id2label = getattr(getattr(model, "config", None), "id2label", None) or {}
    is_named = any(name != f"LABEL_{number}" for number, name in id2label.items())
    return tuple(map(str, id2label.values())) if is_named else None


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
    passes: Passes, made: Made, *, postprocess: Postprocess | None, nan_rows: list[int]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return predictions, probabilities and labels of a batch; None for what it does not have."""
    batch, rules, probabilities = made.batch, made.task.rules, None
    if postprocess is not None:
        predictions = postprocess(made.outputs, batch)
    else:
        logits = logits_of(made.outputs)
        predictions = rules.predict(logits)
        nan_rows.append(count_nan_rows(logits, predictions))
        if rules.probabilities is not None:
            probabilities = rules.probabilities(logits.float()).cpu()
    if len(predictions) != (rows := num_rows(batch)):
        raise DataError(
            f"{len(predictions)} predictions for a batch of {rows} rows. Let postprocess return "
            "one for each row, such as outputs.logits.argmax(-1)."
        )
    labels = batch["labels"].to("cpu", copy=True) if "labels" in batch else None
    is_multi_label = postprocess is None and made.task.name == "multi_label_classification"
    if is_multi_label and labels is not None and labels.ndim == 1:
        found = f"of shape {tuple(labels.shape)}"
        raise DataError(scalar_floats_message(found, "labels", predictions.shape[-1]))
    # A view of them would keep all the outputs.
    return predictions.to("cpu", copy=True), probabilities, labels
