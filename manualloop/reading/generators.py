"""The random generators of a loader, saved and restored at two points of a pass.

All that the loader holds are saved at the start of the pass: put back there, the samplers draw the
same order again. Those of the dataset and of ``collate_fn`` are saved at the position as well: put
back there after the order was drawn, the remaining rows draw what they would have drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from manualloop.notices import say
from manualloop.randomness import (
    find_generators,
    generator_states,
    restore_generators,
    states_of,
)


def order_states(loader: Any, *, rows: bool = True) -> dict[str, Any]:
    """Return the states of all generators that a loader holds, by path.

    Args:
        loader: Any loader.
        rows: Whether those of the dataset and of ``collate_fn`` are among them.
    """
    states = generator_states(loader=loader)
    return {path: states[path] for path in states if rows or not _OF_ROWS.search(path)}


_OF_ROWS = re.compile(r"^loader\.(dataset|collate_fn)\b|\.data_source\b")


def restore_order(loader: Any, states: Mapping[str, Any]) -> None:
    """Put back what ``order_states`` returned."""
    own = {path: state for path, state in states.items() if path.startswith("loader")}
    restore_generators(own, loader=loader)
    if older := {path: state for path, state in states.items() if path not in own}:
        restore_generators(older, **getattr(loader, "__dict__", {}))


class RowGenerators:
    """The generators that the rows of a loader draw from.

    They are searched for again after 1, 2, 4, ... looks, since some are made at their first use,
    and a search at each batch would take longer than many a batch.

    Args:
        dataset: The dataset; None: only the ``collate_fn`` draws.
        collate_fn: The function that makes batches of rows.
    """

    def __init__(self, dataset: Any, collate_fn: Any) -> None:
        self._owners = {"rows": dataset, "collate_fn": collate_fn}
        self._num_looks = 0
        self._found: dict[str, Any] = {}

    def states(self) -> dict[str, Any]:
        """Return their states by path."""
        self._num_looks += 1
        if self._num_looks & (self._num_looks - 1) == 0:
            self._found = find_generators(**self._owners)
        return states_of(self._found)

    def restore(self, states: Mapping[str, Any]) -> None:
        """Put back what ``states`` returned, perhaps in another process."""
        own = {p: s for p, s in states.items() if p.startswith(("rows", "collate_fn"))}
        problems = restore_generators(own, **self._owners)
        if older := {path: state for path, state in states.items() if path not in own}:
            restore_generators(older, **getattr(self._owners["rows"], "__dict__", {}))
        for path, reason in problems.items():
            say(
                f"not bit-exact, because the random generator at {path} was not restored: {reason}."
            )


def row_generators_of(loader: Any) -> RowGenerators:
    """Return the generators that the rows of a loader draw from."""
    return RowGenerators(getattr(loader, "dataset", None), getattr(loader, "collate_fn", None))
