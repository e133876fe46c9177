"""Rows read in this process: what a DataLoader does, less its bookkeeping of 15 us a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader


def reads_here(loader: Any) -> bool:
    """Tell whether a loader of batches does nothing but fetch and collate, in this process."""
    return type(loader) is DataLoader and loader.num_workers == 0 and not loader.pin_memory


class Here:
    """The batches of a loader.

    Args:
        loader: With rows that are read in this process.
        batch_sampler: Gives the rows of each batch.
    """

    def __init__(self, loader: DataLoader[Any], batch_sampler: Any) -> None:
        self._index_sampler, self._rows = batch_sampler, iter(batch_sampler)
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._get_many: Any = getattr(loader.dataset, "__getitems__", None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        rows = next(self._rows)
        if self._get_many is None:
            return self._collate([self._dataset[row] for row in rows])
        return self._collate(self._get_many(rows))
