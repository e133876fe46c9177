"""Lists that a loader shuffles in place: the order of a pass depends on those of all before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from manualloop.objects import is_of_library, walk

_MOST_ENTRIES, _MOST_LISTS, _NUM_SAMPLED = 2_000_000, 100, 5_000


class _Order:
    """The order of a list. It differs only from another order of the same entries in that list."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, entries: Any) -> None:
        self.entries, self.length = entries, len(entries)
        self.sample = list(entries[:: max(self.length // _NUM_SAMPLED, 1)])
        is_array = isinstance(entries, np.ndarray)
        self.total = int(entries.sum()) if is_array else sum(map(hash, entries))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Order) or other.entries is not self.entries:
            return True  # a list that is made anew in each pass
        return self.sample == other.sample or (
            (self.length, self.total) != (other.length, other.total)
        )


def orders_in(loader: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the lists of numbers and texts in a loader's own classes, and a way to their order."""
    for path, part in walk({"train_dataloader": loader}, skips_empty=True):
        holder = part.value
        if is_of_library(type(holder).__module__) or ".__globals__" in path:
            continue
        if hasattr(type(holder), "load_state_dict") or isinstance(holder, type):
            continue
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            for where, entries in _lists(f"{path}.{name}", value):
                yield f"{ORDER} {where}", partial(_Order, entries)


ORDER = "the order of"


def _lists(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, np.ndarray):
        if value.ndim == 1 and value.dtype.kind in "iu" and 1 < len(value) <= _MOST_ENTRIES:
            yield path, value
    elif (
        type(value) is list
        and 1 < len(value) <= _MOST_ENTRIES
        and set(map(type, value)) <= {int, str}
    ):
        yield path, value
    if type(value) in (list, dict) and len(value) <= _MOST_LISTS:
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in list(named):
            if type(entry) in (list, np.ndarray):
                yield from _lists(f"{path}[{key!r}]", entry)
