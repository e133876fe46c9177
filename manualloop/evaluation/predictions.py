"""The table of predictions, in the dataset's order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import IterableDataset, SequentialSampler

from manualloop.data.sampler import OrderedBatchSampler, longest_first_view
from manualloop.errors import DataError
from manualloop.models import is_blind_to_padding
from manualloop.strategy.base import Strategy
from manualloop.tasks.items import IGNORE_INDEX


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """A table of predictions with one row per row of the dataset, in the dataset's order.

    Attributes:
        index: Row numbers in the dataset, int64 ``(rows,)``.
        predictions: Class numbers or values ``(rows,)``; for multi-label ``(rows, classes)``, for
            tokens ``(rows, tokens)``. Rows of batches narrower than the widest are padded with
            -100.
        scores: Probability of each class, float32 ``(rows, classes)``; None for a regression, for
            tokens, or with a ``postprocess`` of your own.
        references: The labels, padded as ``predictions`` are; None if the data has none.
    """

    index: NDArray[np.int64]
    predictions: NDArray[Any]
    scores: NDArray[np.float32] | None
    references: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.index)


def table_of(parts: Sequence[Tensor]) -> NDArray[Any]:
    """Put the rows of all batches into one array; narrower rows are padded with -100."""
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


def dataset_rows(loader: Iterable[Any]) -> NDArray[np.int64] | None:
    """Return the dataset's row numbers in the loader's order; None if that is the dataset's order.

    Raises:
        DataError: The loader shuffles, and its order is not known.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    if isinstance(batch_sampler, OrderedBatchSampler):
        return np.array(batch_sampler.rows(), dtype=np.int64)
    sampler = getattr(loader if batch_sampler is None else batch_sampler, "sampler", batch_sampler)
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if sampler is None or is_stream or isinstance(sampler, SequentialSampler):
        return None
    raise DataError(
        f"The loader draws its rows with a {type(sampler).__name__}, so predictions could not be "
        "put in the dataset's order. Build it with shuffle=False, or use prepare_dataloaders."
    )


def longest_first_rows(
    loader: Iterable[Any], model: nn.Module, strategy: Strategy
) -> tuple[Iterable[Any], NDArray[np.int64] | None]:
    """Return a loader that gives the longest rows first, and the dataset's rows in its order.

    Where another order might change the numbers, return the loader itself and None.
    """
    if not is_blind_to_padding(model):
        return loader, None
    view = longest_first_view(loader, fills_batches=strategy.device.type != "cpu")
    return (loader, None) if view is None else (view, dataset_rows(view))
