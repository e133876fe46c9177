"""Scores that depend on random numbers, or not on all rows: what makes them so is reported once.

In an evaluation nothing should move the global random generators. Of a loader the first two batches
of its first evaluation are looked at, of the passes through the model the first of each evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from numbers import Integral
from typing import Any
from weakref import WeakSet

import numpy as np
from torch import Tensor, nn
from torch.utils.data import SequentialSampler, SubsetRandomSampler

from manualloop.batches import begin_pass
from manualloop.models import model_name
from manualloop.notices import say
from manualloop.randomness import get_random_state, has_drawn
from manualloop.reading.dataloader import iterates_plainly
from manualloop.reading.describe import is_prepared

_SEEN: WeakSet[Any] = WeakSet()
"""Loaders that were looked at, and models that were reported."""


def with_draws_reported(model: nn.Module, loader: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Return the batches of a loader; the first report if they draw random numbers.

    Args:
        model: The model that uses each batch before the next one is asked for.
        loader: The loader.
        batches: Its batches, or those of this rank.
    """
    iterator = begin_pass(batches)
    return chain(_first(model, loader, iterator, is_loaders=batches is loader), iterator)


def _first(
    model: nn.Module, loader: Any, iterator: Iterator[Any], *, is_loaders: bool
) -> Iterator[Any]:
    looks = _can_be_remembered(loader) and loader not in _SEEN
    if looks:
        _SEEN.add(loader)
        _report_rows(loader)
    # One that shuffles draws the order when its first batch is read.
    # So does one that begins its pass only then, as the loaders of accelerate do.
    is_plain = iterates_plainly(loader) and isinstance(loader.sampler, SequentialSampler)
    skips_first = looks and not (is_plain and is_loaders) and not is_prepared(loader)
    draws = looks and getattr(loader, "num_workers", 0) > 0 and _draws_in_workers(loader)
    for number in range(2 if looks else 1):
        before_reading = get_random_state(devices=False) if looks else None
        try:
            batch = next(iterator)
        except StopIteration:
            break
        if before_reading is not None and not (number == 0 and skips_first):
            draws |= has_drawn(before_reading)
        before_use = None if number or model in _SEEN else get_random_state()
        yield batch
        del batch  # of which nothing may be kept
        if before_use is not None and has_drawn(before_use):
            _SEEN.add(model)
            say(
                f"the score is random: {model_name(model)}, or a function that is called with its "
                "outputs, draws random numbers in evaluation mode. Two scores differ by these "
                "numbers, too; to compare them, seed before each evaluation: torch.manual_seed(0)."
            )
    if draws:
        say(
            "the score is random: the loader draws random numbers while it makes batches, so that "
            "the score depends on them and on the batch size. Draw by row, with transform= of "
            "prepare_dataloaders, whose splits that are not shuffled also get the masks of "
            "DataCollatorForLanguageModeling by row."
        )


def _report_rows(loader: Any) -> None:
    """Report rows that a loader leaves out of an evaluation, or counts more than once."""
    batches: Any = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(batches, "sampler", batches)
    if getattr(sampler, "replacement", False):
        say(
            f"some rows count more than once in this evaluation, and others not at all: a "
            f"{type(sampler).__name__} draws them with replacement. Evaluate with a loader that "
            "has no sampler=."
        )
    if num_repeated := _num_repeated(loader):
        say(
            f"some rows count more than once in this evaluation: {num_repeated:,} of the rows in "
            f"the loader's {type(sampler).__name__} are repeated. Evaluate with a loader that has "
            "no sampler= and no batch_sampler=."
        )
    if not getattr(batches, "drop_last", False) or getattr(batches, "max_tokens", None):
        return
    with suppress(AttributeError, TypeError):  # one of the user's own need not tell
        num_rows = len(loader.dataset if sampler is batches else sampler)
        num_left = num_rows - len(batches) * batches.batch_size
        if num_left <= 0:
            return
        say(
            f"{num_left:,} of {num_rows:,} rows are left out of this evaluation: the loader drops "
            "its last batch, which is not whole. Build it with drop_last=False."
        )


def _num_repeated(loader: Any) -> int:
    """Count the rows that a list of rows, or of batches of rows, names again; 0 if it is none."""
    batches: Any = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", batches)
    listed = sampler.indices if isinstance(sampler, SubsetRandomSampler) else sampler
    if isinstance(listed, (np.ndarray, Tensor)):
        listed = listed.tolist()
    if not isinstance(listed, (list, tuple)):
        return 0
    try:
        rows = list(chain.from_iterable(listed)) if sampler is batches else listed
        num_rows = len(loader.dataset)
        return len(rows) - len({_number(row, num_rows) for row in rows})
    except (AttributeError, TypeError):  # keys of the user's own dataset
        return 0


def _number(row: Any, num_rows: int) -> Any:
    """Return the number of a row, which may be a tensor, or count from the end."""
    row = row.item() if isinstance(row, (np.ndarray, Tensor)) else row
    return row % num_rows if isinstance(row, Integral) else row


def _can_be_remembered(loader: Any) -> bool:
    return hasattr(loader, "__weakref__") and getattr(loader, "__hash__", None) is not None


def _draws_in_workers(loader: Any) -> bool:
    """Tell whether a batch of one row draws random numbers, made here: workers have their own.

    Only of a dataset of Hugging Face is a row read to find out.
    """
    dataset: Any = getattr(loader, "dataset", None)
    inner = getattr(dataset, "rows", dataset)
    if not (hasattr(inner, "with_format") and hasattr(inner, "__len__")):
        return False
    before = get_random_state(devices=False)
    many: Any = getattr(dataset, "__getitems__", None)
    loader.collate_fn([dataset[0]] if many is None else many([0]))
    return has_drawn(before)
