"""Rows as arrays equal those that datasets gives, to the dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import (
    Array2D,
    Array3D,
    ClassLabel,
    Dataset,
    Features,
    Sequence,
    Value,
    concatenate_datasets,
)

from manualloop.data.arrays import ArrayReader

NUM_ROWS = 7
NUMBERS = np.random.default_rng(0).integers(0, 100, (NUM_ROWS, 3, 2, 4))


def columns():
    found = {
        "one": ([[n] for n in range(NUM_ROWS)], Sequence(Value("int64"))),
        "ragged": ([[1] * n for n in range(NUM_ROWS)], Sequence(Value("int64"))),
        "null": ([None, *range(1, NUM_ROWS)], Value("float64")),
        "text": ([str(n) for n in range(NUM_ROWS)], Value("string")),
        "no text": ([None, *map(str, range(1, NUM_ROWS))], Value("string")),
        "texts": ([["a", "b"]] * NUM_ROWS, Sequence(Value("string"))),
        "class": ([n % 2 for n in range(NUM_ROWS)], ClassLabel(names=["a", "b"])),
        "of any height": (list(NUMBERS[:, 0]), Array2D((None, 4), "int64")),
    }
    for dtype in ("uint8", "int32", "int64", "uint16", "float16", "float32", "float64", "bool"):
        cells = (NUMBERS > 50 if dtype == "bool" else NUMBERS).astype(dtype)
        lists = cells[:, 0, 0].tolist()
        found |= {
            f"array of {dtype}": (list(cells), Array3D((3, 2, 4), dtype)),
            f"list of {dtype}": (lists, Sequence(Value(dtype))),
            f"fixed list of {dtype}": (lists, Sequence(Value(dtype), length=4)),
            f"lists of {dtype}": (cells[:, 0].tolist(), Sequence(Sequence(Value(dtype)))),
            f"{dtype}": (cells[:, 0, 0, 0].tolist(), Value(dtype)),
        }
    return found


COLUMNS = columns()
FORMATS = [
    ("numpy", {}),
    ("torch", {}),
    ("torch", {"dtype": torch.uint8}),
    ("numpy", {"dtype": "float64"}),
    (None, {}),
]


def require_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor | np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.array_equal(np.asarray(ours).astype(str), np.asarray(theirs).astype(str))
    else:
        assert ours == theirs or ours != ours


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.filterwarnings("ignore")
def test_rows_equal_those_of_datasets(name):
    cells, feature = COLUMNS[name]
    features = Features({"x": feature, "number": Value("int64")})
    table = Dataset.from_dict({"x": cells, "number": list(range(NUM_ROWS))}, features=features)
    for kind, options in FORMATS:
        parts = concatenate_datasets([table.select(range(2)), table.select(range(2, NUM_ROWS))])
        for dataset in (table, table.select([5, 1, 1, 3]), parts):
            rows = dataset.with_format(kind, **options)
            for numbers in ([0], [2, 0, 1], [3, 3]):
                try:
                    expected = rows.__getitems__(numbers)
                except (TypeError, ValueError, RuntimeError):
                    continue  # a text cannot be a number
                found = ArrayReader(rows)(numbers)
                assert [row.keys() for row in found] == [row.keys() for row in expected]
                for ours, theirs in zip(found, expected, strict=True):
                    for column in ours:
                        require_same(ours[column], theirs[column])


def test_a_row_may_be_changed_in_place():
    table = Dataset.from_dict({"x": [[1, 2], [3, 4]]}).with_format("torch")
    first, second = ArrayReader(table)([0, 1])
    first["x"] += 10
    assert second["x"].tolist() == [3, 4]
    assert ArrayReader(table)([0])[0]["x"].tolist() == [1, 2]


def test_a_format_of_some_columns_is_that_of_datasets():
    table = Dataset.from_dict({"x": [1, 2], "y": [3, 4]})
    rows = table.with_format("torch", columns=["x"], output_all_columns=True)
    (row,) = ArrayReader(rows)([1])
    assert isinstance(row["x"], torch.Tensor)
    assert row["y"] == 4
