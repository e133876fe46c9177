"""Scores that depend on random numbers: what draws them is noticed, and reported once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.utils.data import SequentialSampler

from manualloop.models import model_name
from manualloop.notices import say
from manualloop.randomness import (
    RandomState,
    get_random_state,
    is_same_random_state,
    is_same_state,
)
from manualloop.reading.describe import is_prepared


class Draws:
    """Looks whether the global random generators move in an evaluation, where nothing should.

    Of a loader the first two batches of the first evaluation are looked at, of the passes through
    the model the first of each evaluation. Workers have generators of their own, so of a loader
    with workers a batch of one row is made here, if its dataset is one of Hugging Face.

    Args:
        model: The model.
        loader: The loader.
    """

    def __init__(self, model: nn.Module, loader: Any) -> None:
        self._model, self._loader = model, loader

    def of_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return the batches, of which the first report if reading them draws random numbers."""
        loader = self._loader
        iterator = iter(batches)
        if not _can_be_remembered(loader) or loader in _SEEN:
            return iterator
        _SEEN.add(loader)
        return chain(self._first_two(iterator, is_loaders=batches is loader), iterator)

    def _first_two(self, iterator: Iterator[Any], *, is_loaders: bool) -> Iterator[Any]:
        loader = self._loader
        # One that shuffles draws the order when its first batch is read.
        is_plain = isinstance(getattr(loader, "sampler", None), SequentialSampler)
        skips_first = not is_prepared(loader) and not (is_plain and is_loaders)
        draws = getattr(loader, "num_workers", 0) > 0 and _draws_in_workers(loader)
        for number in range(2):
            before = get_random_state(devices=False)
            try:
                batch = next(iterator)
            except StopIteration:
                break
            draws |= not (number == 0 and skips_first) and not _is_same(before)
            yield batch
            del batch  # of which nothing may be kept
        if draws:
            say(
                "the score is random: the loader draws random numbers while it makes batches, so "
                "that the score depends on them and on the batch size. Draw by row, with "
                "transform= of prepare_dataloaders, whose splits that are not shuffled also get "
                "the masks of DataCollatorForLanguageModeling by row."
            )

    def before_use(self) -> RandomState | None:
        """Return the random state before the first batch is used; None if the model was told of."""
        return None if self._model in _SEEN else get_random_state()

    def after_use(self, before: RandomState | None) -> None:
        """Report if the model has drawn random numbers since."""
        if before is None or _is_same(before):
            return
        _SEEN.add(self._model)
        say(
            f"the score is random: {model_name(self._model)}, or a function that is called with "
            "its outputs, draws random numbers in evaluation mode. Two scores differ by these "
            "numbers, too; to compare them, seed before each evaluation: torch.manual_seed(0)."
        )


_SEEN: WeakSet[Any] = WeakSet()


def _can_be_remembered(loader: Any) -> bool:
    return hasattr(loader, "__weakref__") and getattr(loader, "__hash__", None) is not None


def _is_same(before: RandomState) -> bool:
    devices = before.keys() - {"python", "numpy", "torch"}
    now = get_random_state(devices=bool(devices))
    are_same = all(is_same_state(before[name], now.get(name)) for name in devices)
    return are_same and is_same_random_state(before, now)


def _draws_in_workers(loader: Any) -> bool:
    dataset: Any = getattr(loader, "dataset", None)
    inner = getattr(dataset, "rows", dataset)
    if not (hasattr(inner, "with_format") and hasattr(inner, "__len__")):
        return False
    before = get_random_state(devices=False)
    many: Any = getattr(dataset, "__getitems__", None)
    loader.collate_fn([dataset[0]] if many is None else many([0]))
    return not _is_same(before)
