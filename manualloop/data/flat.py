"""Rows of a pack as one row of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manualloop.data.tables import Lists, read_column
from manualloop.errors import DataError
from manualloop.tasks.task import IGNORE_INDEX


class PackCollate:
    """A ``collate_fn`` that puts rows one after the other: int64 ``(1, tokens)``.

    ``position_ids`` begin at 0 in each row, and there is no mask: by the positions a model keeps
    the rows apart. A row's first label is -100, because the token before it is another row's.
    """

    def __call__(self, rows: Any) -> dict[str, Tensor]:
        """Return the batch of some rows.

        Raises:
            DataError: A column does not have one number for each token.
        """
        columns = _columns_of(rows)
        tokens = columns.get("input_ids")
        if tokens is None:
            raise DataError(
                f"pack=True puts input_ids one after the other, and the rows have only "
                f"{', '.join(columns)}. Leave pack=True out."
            )
        _refuse_masked(columns.pop("attention_mask", None))
        starts = np.cumsum(tokens.lengths) - tokens.lengths
        batch = {}
        for name, column in columns.items():
            if not np.array_equal(column.lengths, tokens.lengths):
                raise DataError(
                    f"pack=True puts rows one after the other, and {name!r} does not have one "
                    f"number for each token. Leave it out, or make one of it for each token: "
                    f'dataset.remove_columns("{name}").'
                )
            values = column.values
            if name == "labels":
                values = values.copy()
                values[starts] = IGNORE_INDEX
            kind: Any = np.float32 if values.dtype.kind == "f" else np.int64
            batch[name] = torch.from_numpy(values.astype(kind))[None]
        positions = np.arange(len(tokens.values)) - np.repeat(starts, tokens.lengths)
        batch["position_ids"] = torch.from_numpy(positions)[None]
        return batch

    def padded_lengths(self, dataset: Any) -> None:
        """Return None: packs are not made anew for an evaluation."""


def _refuse_masked(mask: Lists | None) -> None:
    if mask is not None and not mask.values.all():
        raise DataError(
            "pack=True puts rows one after the other without a mask, and an attention_mask hides "
            "tokens of a row. Leave these tokens out of input_ids and labels."
        )


def _columns_of(rows: Any) -> dict[str, Lists]:
    table: Any = getattr(rows, "table", None)  # of TableRows
    if table is not None:
        found = {name: read_column(table.column(name)) for name in table.column_names}
        if all(isinstance(column, Lists) for column in found.values()):
            return found  # type: ignore[return-value]
    listed: Sequence[Mapping[str, Any]] = list(rows)
    return {name: _lists(name, [row[name] for row in listed]) for name in listed[0]}


def _lists(name: str, cells: Sequence[Any]) -> Lists:
    arrays: list[NDArray[Any]] = [np.asarray(cell) for cell in cells]
    if any(array.ndim != 1 for array in arrays):
        raise DataError(
            f"pack=True puts rows one after the other, and {name!r} is not a list of one number "
            f'for each token. Leave it out: dataset.remove_columns("{name}"), or keep it: '
            f'keep="{name}".'
        )
    return Lists(np.concatenate(arrays), np.array([len(array) for array in arrays]))
