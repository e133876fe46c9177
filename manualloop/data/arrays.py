"""Rows of a dataset as arrays and tensors, straight from its table.

They equal what a dataset with the format "numpy" or "torch" gives for several rows, which makes
Python objects on the way and takes forty times as long for an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from manualloop.internals import stored_table


class ArrayReader:
    """Reads rows of a dataset in its format.

    Args:
        dataset: A ``datasets.Dataset``.
    """

    def __init__(self, dataset: Any) -> None:
        form, self._dataset = dataset.format, dataset
        self._kind, options = form["type"], form["format_kwargs"]
        self._dtype: Any = options.get("dtype")
        if isinstance(self._dtype, torch.dtype):
            self._dtype = torch.empty((), dtype=self._dtype).numpy().dtype
        is_known = self._kind in ("numpy", "torch") and options.keys() <= {"dtype"}
        self._is_fast = is_known and list(form["columns"]) == dataset.column_names
        self._columns: dict[str, _Column] = {}
        if self._is_fast:
            stored, self._numbers = stored_table(dataset)
            table = stored.table
            self._columns = {name: _Column(table.column(name)) for name in table.column_names}
            self._is_fast = all(column.is_plain for column in self._columns.values())

    def __call__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of some numbers."""
        if self._is_fast:
            stored = numbers if self._numbers is None else self._numbers[list(numbers)].tolist()
            columns = {name: column.read(stored) for name, column in self._columns.items()}
            if all(cells is not None for cells in columns.values()):
                made = {name: self._in_format(cells) for name, cells in columns.items()}
                return [
                    {name: cells[row] for name, cells in made.items()}
                    for row in range(len(numbers))
                ]
        rows: list[dict[str, Any]] = self._dataset.__getitems__(list(numbers))
        return rows

    def _in_format(self, cells: Any) -> Any:
        """Return cells with the dtype that datasets gives them: an array of all, or a list."""
        if isinstance(cells, list) and isinstance(cells[0], str):
            return np.asarray(cells) if self._kind == "numpy" else cells
        kind = cells[0].dtype.kind
        dtype = self._dtype or (np.float32 if kind == "f" else np.int64)
        if isinstance(cells, list):
            made = [cell.astype(dtype) for cell in cells]
            return made if self._kind == "numpy" else [torch.from_numpy(cell) for cell in made]
        numbers = cells.astype(dtype)
        return numbers if self._kind == "numpy" else torch.from_numpy(numbers)


class _Column:
    """A column of a table, whose cells are read one by one.

    Args:
        column: The column.

    Attributes:
        is_plain: Whether it holds numbers, lists of numbers of any depth, or texts.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        is_wrapped = isinstance(column.type, pa.BaseExtensionType)
        self._chunks = [chunk.storage if is_wrapped else chunk for chunk in column.chunks]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])
        kind = column.type.storage_type if is_wrapped else column.type
        self._depth = 0
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            kind, self._depth = kind.value_type, self._depth + 1
        self._is_text = pa.types.is_string(kind)
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        self.is_plain = is_number or (self._is_text and self._depth == 0)

    def read(self, numbers: Sequence[int]) -> Any:
        """Return the cells of some rows: an array of numbers, or a list of arrays or texts.

        The result is None if a cell is missing, or if lists differ in length.
        """
        places = np.searchsorted(self._ends, numbers, side="right").tolist()
        chunks, ends = self._chunks, self._ends
        cells = [
            chunks[place].slice(number - int(ends[place]) + len(chunks[place]), 1)
            for number, place in zip(numbers, places, strict=True)
        ]
        if self._depth:
            arrays = [_array_of(cell, self._depth) for cell in cells]
            is_whole = all(a is not None and a.shape == arrays[0].shape for a in arrays)
            return arrays if is_whole else None
        together = pa.concat_arrays(cells)
        if together.null_count:
            return None
        return together.to_pylist() if self._is_text else together.to_numpy(zero_copy_only=False)


def _array_of(cell: pa.Array, depth: int) -> Any:
    """Return a list of lists of numbers as an array; None if its lists differ in length."""
    shape = []
    for level in range(depth):
        if cell.null_count:
            return None
        if pa.types.is_fixed_size_list(cell.type):
            length, inner = cell.type.list_size, cell.flatten()
        else:
            offsets = cell.offsets.to_numpy()
            length = int(offsets[1] - offsets[0])
            if level and (offsets[1:] - offsets[:-1] != length).any():
                return None
            inner = cell.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
        if length == 0:
            return None
        shape.append(length)
        cell = inner
    return None if cell.null_count else cell.to_numpy(zero_copy_only=False).reshape(shape)
