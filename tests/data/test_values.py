"""The description of a column equals what Python finds row by row, in any order of the rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, LargeList, Sequence, Value
from hypothesis import given, settings
from hypothesis import strategies as st

import manualloop.data.values
from manualloop.data.splits import Split
from manualloop.data.values import (
    distinct_in,
    empty_in,
    lengths_of,
    longest_in,
    missing_in,
    values_of,
)

NAN = float("nan")
COLUMNS: dict[str, tuple[Any, list[Any]]] = {
    **{t: (Value(t), [0, 3, None, 1]) for t in ("int8", "int32", "int64", "uint8", "uint64")},
    **{t: (Value(t), [0.5, -1.0, None, NAN]) for t in ("float16", "float32", "float64")},
    "bool": (Value("bool"), [True, None, False]),
    "classes": (ClassLabel(names=["a", "b"]), [0, -1, None, 1]),
    "texts": (Value("string"), ["b", "", None, "a"]),
    "large texts": (Value("large_string"), ["b", "", None]),
    "nothing": (Value("null"), [None, None]),
    "lists": (Sequence(Value("int64")), [[1, -100, 3], [], None, [-100], [0, None]]),
    "large lists": (LargeList(Value("float32")), [[0.5, NAN], [1.0], None]),
    "fixed lists": (Sequence(Value("int8"), length=2), [[1, 0], [-1, -1]]),
    "nested lists": (Sequence(Sequence(Value("int32"))), [[[1, 2], [3]], [[]], None, [None, [4]]]),
    "words": (Sequence(Value("string")), [["a", ""], [], None, ["b", None]]),
    "dicts": ({"x": Value("int64")}, [{"x": 1}, None, {"x": None}]),
}


def split_of(dataset: Dataset) -> Split:
    return Split("train", dataset, dataset[0])


def leaves_of(cell: Any) -> list[Any]:
    if isinstance(cell, list):
        return [leaf for item in cell for leaf in leaves_of(item)]
    return [] if cell is None else [cell]


def holds_none(cell: Any) -> bool:
    if isinstance(cell, list):
        return any(map(holds_none, cell))
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


@pytest.mark.parametrize(("feature", "cells"), COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("order", ["stored", "shuffled", "filtered", "long"])
def test_a_column_is_described_as_python_sees_it(feature, cells, order, monkeypatch):
    if order == "long":  # several parts
        cells = cells * 12
        monkeypatch.setattr(manualloop.data.values, "_ROWS_AT_ONCE", 7)
    dataset = Dataset.from_dict({"x": cells}, features=Features({"x": feature}))
    if order == "shuffled":
        dataset = dataset.shuffle(seed=1)
    elif order == "filtered":
        dataset = dataset.filter(lambda row, number: number % 2 == 0, with_indices=True)
    cells, split = list(dataset["x"]), split_of(dataset)
    values = values_of(split, "x")
    assert values.is_missing.tolist() == [holds_none(cell) for cell in cells]
    none_alone = [holds_none(cell) and cell == cell and cell is not NAN for cell in cells]
    if "float" not in str(feature):
        assert missing_in(split, "x").tolist() == none_alone
    numbers = [
        [leaf for leaf in leaves_of(cell) if leaf != -100 and leaf == leaf] for cell in cells
    ]
    if any(isinstance(leaf, int | float) for row in numbers for leaf in row):
        assert values.has_number.tolist() == [bool(row) for row in numbers]
        kept = values.has_number
        assert values.least[kept].tolist() == [min(row) for row in numbers if row]
        assert values.most[kept].tolist() == [max(row) for row in numbers if row]
        found = [number for number in distinct_in(split, "x").tolist() if number != -100]
        occurring = {leaf for row in numbers for leaf in row}
        assert set(found) >= occurring
        assert set(found) <= occurring | {0}  # what is None counts as 0
    empty = [cell is None or cell == "" or cell != cell for cell in cells]
    assert empty_in(split, "x").tolist() == empty
    if any(isinstance(cell, list) for cell in cells) and "nested" not in str(feature):
        assert lengths_of(split, "x").tolist() == [len(cell or []) for cell in cells]
    texts = {leaf for cell in cells for leaf in leaves_of(cell) if isinstance(leaf, str) and leaf}
    assert values.texts == tuple(sorted(texts))


HIDDEN = [None, NAN, -1.0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([*HIDDEN, 0.0, 2.5]), min_size=1, max_size=6))
def test_labels_are_hidden_if_every_one_stands_for_none(cells):
    features = Features({"x": Value("float64")})
    forms = values_of(split_of(Dataset.from_dict({"x": cells}, features=features)), "x").hidden_as()
    assert bool(forms) == all(cell is None or cell != cell or cell == -1 for cell in cells)
    if forms:
        found = {"None" if c is None else "NaN" if c != c else "-1" for c in cells}
        assert set(forms) == found


def test_a_stream_is_not_read():
    stream = Dataset.from_dict({"x": [1, 2]}).to_iterable_dataset()
    split = Split("train", stream, {"x": 1})
    found = [f(split, "x") for f in (values_of, missing_in, empty_in, lengths_of)]
    assert found == [None] * 4


def test_numbers_of_a_selection_are_those_of_its_rows():
    dataset = Dataset.from_dict({"x": list(range(50))}).shuffle(seed=0).select(range(10))
    values = values_of(split_of(dataset), "x")
    assert np.array_equal(values.least, dataset["x"])


def test_the_longest_list_of_each_row_also_of_rows_without_lists():
    cells = [[[1, 2], [3]], [], [[4], [5, 6, 7]], [[]], None, []]
    rows = Dataset.from_dict({"input_ids": cells}).select([5, 0, 1, 2, 3, 4])
    assert longest_in(split_of(rows), "input_ids").tolist() == [
        0,
        2,
        0,
        3,
        0,
        0,
    ]
