"""Rows as loaders fetch them: as tables, with their numbers, or as they are."""

from __future__ import annotations

from typing import Any

from manualloop.data.masks import RowMasks
from manualloop.data.splits import Split
from manualloop.data.transform import TransformedRows


def as_read(split: Split, collate_fn: Any, seed: int) -> Any:
    """Return a split's rows as loaders fetch them: as tables, if ``collate_fn`` takes tables.

    Rows that are masked by their numbers know them.
    """
    if isinstance(collate_fn, RowMasks):
        return TransformedRows(split.rows, split.name, seed)
    if split.is_stream:
        return split.rows
    # A table holds an image as bytes.
    if not hasattr(collate_fn, "padded_lengths") or "media" in split.kinds.values():
        return split.rows
    from manualloop.data.tables import as_tables

    return as_tables(split.rows)
