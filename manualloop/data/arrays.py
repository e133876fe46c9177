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
from numpy.typing import NDArray

from manualloop.internals import rows_as_table


def read_rows(dataset: Any, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return rows of a dataset in its format.

    Args:
        dataset: A ``datasets.Dataset``.
        numbers: Row numbers.
    """
    form = dataset.format
    options = form["format_kwargs"]
    is_known = form["type"] in ("numpy", "torch") and options.keys() <= {"dtype"}
    if is_known and list(form["columns"]) == dataset.column_names:
        columns = _columns(rows_as_table(dataset, list(numbers)), options.get("dtype"))
        if columns is not None:
            make: Any = _as_tensor if form["type"] == "torch" else np.asarray
            columns = {name: make(column) for name, column in columns.items()}
            return [
                {name: column[row] for name, column in columns.items()}
                for row in range(len(numbers))
            ]
    rows: list[dict[str, Any]] = dataset.__getitems__(list(numbers))
    return rows


def _columns(table: pa.Table, dtype: Any) -> dict[str, Any] | None:
    """Return the columns of a table as arrays; None if one holds anything but numbers and texts."""
    columns: dict[str, Any] = {}
    for name in table.column_names:
        column = table.column(name)
        array = column.chunk(0) if column.num_chunks == 1 else _together(column)
        if pa.types.is_string(array.type) and not array.null_count:
            columns[name] = array.to_pylist()
            continue
        numbers = _numbers(array)
        if numbers is None:
            return None
        columns[name] = numbers.astype(_dtype_of(numbers, dtype))
    return columns


def _together(column: pa.ChunkedArray) -> pa.Array:
    chunks = column.chunks
    if isinstance(column.type, pa.ExtensionType):
        chunks = [chunk.storage for chunk in chunks]
    return pa.concat_arrays(chunks)


def _numbers(array: pa.Array) -> NDArray[Any] | None:
    """Return lists of lists of numbers as an array; None if they differ in length or are no such.

    Lists of one number are left to datasets, as are empty ones.
    """
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    shape = [len(array)]
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        if array.null_count:
            return None
        if pa.types.is_fixed_size_list(array.type):
            lengths = np.array([array.type.list_size])
        else:
            lengths = np.diff(array.offsets.to_numpy())
        if not len(lengths) or lengths[0] == 0 or (lengths != lengths[0]).any():
            return None
        shape.append(int(lengths[0]))
        array = array.flatten()
    kind = array.type
    if array.null_count or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    return array.to_numpy(zero_copy_only=False).reshape(shape)  # type: ignore[no-any-return]


def _dtype_of(numbers: NDArray[Any], dtype: Any) -> Any:
    if isinstance(dtype, torch.dtype):
        return torch.empty((), dtype=dtype).numpy().dtype
    if dtype is not None:
        return np.dtype(dtype)
    return np.float32 if numbers.dtype.kind == "f" else np.int64


def _as_tensor(column: Any) -> Any:
    return torch.from_numpy(column) if isinstance(column, np.ndarray) else column
