"""``predict_loop``: the predictions of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import IterableDataset

from manualloop.arguments import check_arguments, require_loader
from manualloop.data.sampler import packs_rows
from manualloop.errors import DataError
from manualloop.evaluation.decoding import AnyDecode, with_model
from manualloop.evaluation.inputs import Inputs
from manualloop.evaluation.loop import longest_first
from manualloop.evaluation.passes import Pass, read_table
from manualloop.evaluation.predictions import Predictions
from manualloop.evaluation.rows import Ask, Postprocess
from manualloop.models import accepts, predicts_without_labels, without_ranks
from manualloop.notices import say
from manualloop.reading.ranks import unsharded
from manualloop.reading.sources import source_of
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
    require_loader(dataloader)
    strategy = strategy_for(model, strategy)
    strategy = begin_call(strategy, "predict_loop", postprocess=postprocess, decode=decode)
    model = without_ranks(prepare_model(strategy, model))
    names = class_names(model, dataloader)
    loader = dataloader if strategy.world_size == 1 else unsharded(dataloader)
    loader, numbers = longest_first(loader, model, strategy)
    ask = Ask(
        postprocess,
        None if decode is None else with_model(decode, model, strategy),
        references=False,
        scores=None,
        kept=True,
        aligned=False,
    )
    needs_none = ask.made_by == "rule" and predicts_without_labels(model)
    takes_labels = accepts(model, "labels") and not needs_none
    table, _ = read_table(
        Pass(model, loader, strategy, ask, takes_labels, wants_loss=False),
        "Predicting" if progress_bar else None,
        numbers=_row_numbers(loader) if numbers is None else numbers,
    )
    assert table is not None
    for name in table.missing:
        say(f"the predictions have no {name}: some batches of the loader have no labels.")
    scores = table.column("scores")
    return Predictions(
        table.index,
        table.column("predictions"),
        None if scores is None else scores.astype(np.float32),
        table.column("references"),
        {name: column.rows(table.order) for name, column in table.kept.items()},
        names,
        Inputs(dataloader, task=table.task),
        table.ignored,
    )


def _row_numbers(loader: Iterable[Any]) -> Iterable[int] | None:
    """Return the dataset's row numbers in the loader's order; None: nobody knows them.

    Raises:
        DataError: The loader reads its rows by a sampler that does not tell which they are.
    """
    numbers = source_of(loader).row_numbers()
    if numbers is not None:
        return numbers
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        say(
            "the rows of a stream come as several processes read them, so their numbers are not "
            "known: Predictions.index is None. Read it with num_workers=0 to get them in order."
        )
        return None
    if packs_rows(loader):
        raise DataError(
            "The rows of this loader are packed, several of them in one row of a batch, so there "
            "would be no prediction for each. Prepare them without pack=True, or under a name that "
            'does not begin with "train": such splits are not packed.'
        )
    sampler: Any = getattr(loader, "batch_sampler", None)
    name = type(getattr(sampler, "sampler", sampler) or getattr(loader, "sampler", None)).__name__
    raise DataError(
        f"The loader draws its rows with a {name}, so predictions could not be "
        "put in the dataset's order. Build it with shuffle=False, or use prepare_dataloaders."
    )
