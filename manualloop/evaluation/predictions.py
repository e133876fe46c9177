"""The table of predictions, in the dataset's order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from manualloop.errors import DataError
from manualloop.notices import say
from manualloop.reading.sources import source_of
from manualloop.tasks.task import IGNORE_INDEX


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """A table of predictions with one row per row of the dataset, in the dataset's order.

    Attributes:
        index: Row numbers in the dataset, int64 ``(rows,)``; None where nobody knows them, as of a
            stream that several workers read. Rows are then in the order in which they came.
        predictions: Class numbers or values ``(rows,)``; for multi-label ``(rows, classes)``, for
            tokens ``(rows, tokens)``. Rows of batches narrower than the widest are padded with
            -100.
        scores: Probability of each class, float32 ``(rows, classes)``; None for a regression, for
            tokens, or with a ``postprocess`` of your own.
        references: The labels, padded as ``predictions`` are; None if the data has none.
    """

    index: NDArray[np.int64] | None
    predictions: NDArray[Any]
    scores: NDArray[np.float32] | None
    references: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.predictions)


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


def dataset_rows(loader: Iterable[Any]) -> Iterable[int] | None:
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
    sampler: Any = getattr(loader, "batch_sampler", None)
    name = type(getattr(sampler, "sampler", sampler) or getattr(loader, "sampler", None)).__name__
    raise DataError(
        f"The loader draws its rows with a {name}, so predictions could not be "
        "put in the dataset's order. Build it with shuffle=False, or use prepare_dataloaders."
    )
