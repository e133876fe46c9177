"""All rows of the data are digested: any that is changed is noticed, however they are stored."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import processes
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from manualloop.reading import describe
from manualloop.reading.describe import rows_digest

NUM_ROWS = 2500  # more than two of the parts in which rows are read


def columns(row: int | None = None, **changed: Any) -> Dataset:
    values: dict[str, list[Any]] = {
        "number": list(range(NUM_ROWS)),
        "share": [n / 7 for n in range(NUM_ROWS)],
        "flag": [n % 2 == 0 for n in range(NUM_ROWS)],
        "text": [f"text {n}" for n in range(NUM_ROWS)],
        "ids": [list(range(n % 5)) for n in range(NUM_ROWS)],
        "deep": [[["a", str(n)], []] for n in range(NUM_ROWS)],
        "pair": [{"x": n, "y": "z"} for n in range(NUM_ROWS)],
        "missing": [None if n % 3 else n for n in range(NUM_ROWS)],
    }
    for name, value in changed.items():
        assert row is not None
        values[name][row] = value
    return Dataset.from_dict(values)


@pytest.fixture(scope="module")
def digest() -> str | None:
    return rows_digest(columns())


@pytest.mark.parametrize("row", [1, 1234, NUM_ROWS - 2])
@pytest.mark.parametrize(
    "changed",
    [
        {"number": -1},
        {"share": 0.123},
        {"text": "other"},
        {"text": ""},
        {"ids": [9]},
        {"ids": []},
        {"deep": [["a"], ["x"]]},
        {"pair": {"x": -1, "y": "z"}},
        {"missing": 7},
        {"missing": None},
    ],
    ids=str,
)
def test_a_changed_cell_is_noticed(changed: dict[str, Any], row: int, digest: str) -> None:
    before, after = columns(), columns(row, **changed)
    is_same = before[row] == after[row]  # None was there already
    assert (rows_digest(after) == digest) == is_same


def test_the_same_rows_have_the_same_digest_however_they_are_stored(
    tmp_path: Path, digest: str
) -> None:
    rows = columns()
    rows.save_to_disk(tmp_path / "rows")
    parts = [rows.select(range(10)), rows.select(range(10, NUM_ROWS))]
    turned = rows.select(list(range(NUM_ROWS))[::-1])
    for stored in (
        load_from_disk(str(tmp_path / "rows")),
        rows.select(range(NUM_ROWS)),
        concatenate_datasets(parts),
        turned.select(list(range(NUM_ROWS))[::-1]),
        rows.with_format("torch"),
    ):
        assert rows_digest(stored) == digest
    assert rows_digest(turned) != digest


def test_a_text_cannot_move_from_one_row_to_the_next() -> None:
    first, second = [Dataset.from_dict({"text": t}) for t in (["ab", "c"], ["a", "bc"])]
    assert rows_digest(first) != rows_digest(second)
    first, second = [Dataset.from_dict({"ids": ids}) for ids in ([[1, 2], [3]], [[1], [2, 3]])]
    assert rows_digest(first) != rows_digest(second)


ARRAY = torch.arange(9000.0).reshape(300, 30)


def holders(x: torch.Tensor) -> list[Any]:
    numbers = x.numpy()
    return [
        TensorDataset(x),
        TensorDataset(x.t()),
        TensorDataset(x.bfloat16()),
        Subset(TensorDataset(x), range(3)),
        ConcatDataset([TensorDataset(x[:2]), TensorDataset(x[2:])]),
        list(x.split(2)),
        [{"x": part, "texts": ["a", "b"]} for part in x.split(2)],
        [(part, 1) for part in numbers],
        [part.tolist() for part in x],
        SimpleNamespace(encodings={"x": x}),
        SimpleNamespace(x=numbers.astype("float16")),
        SimpleNamespace(rows=[SimpleNamespace(x=part) for part in numbers]),
        SimpleNamespace(table=pd.DataFrame(numbers)),
    ]


@pytest.mark.parametrize("number", range(len(holders(ARRAY))))
def test_a_changed_number_is_noticed_wherever_it_is(number: int) -> None:
    changed = ARRAY.clone()
    changed[123, 17] += 64  # bfloat16 has it, too
    digests = [rows_digest(holders(x)[number]) for x in (ARRAY, ARRAY.clone(), changed)]
    assert digests[0] == digests[1] != digests[2]


def test_the_order_of_batches_counts() -> None:
    batches = list(ARRAY.split(2))
    assert rows_digest(batches) != rows_digest(batches[::-1])


def test_of_larger_data_parts_are_digested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "_ROWS_AT_ONCE", 10)
    rows = columns()
    whole, part = rows_digest(rows), rows_digest(rows, max_bytes=1000)
    assert whole != part == rows_digest(columns(), max_bytes=1000)
    assert rows_digest(columns(0, number=-1), max_bytes=1000) != part
    tensors = TensorDataset(ARRAY)
    assert rows_digest(tensors, max_bytes=1000) == rows_digest(tensors, max_bytes=1000)
    assert rows_digest(TensorDataset(ARRAY[:-1]), max_bytes=1000) != rows_digest(
        tensors, max_bytes=1000
    )


def test_files_under_another_root_are_the_same() -> None:
    def files(root: str, name: str) -> Any:
        return SimpleNamespace(root=root, samples=[(f"{root}/train/{name}", 0)])

    digest = rows_digest(files("/scratch/1", "a.png"))
    assert rows_digest(files("/scratch/2", "a.png")) == digest
    assert rows_digest(files("/scratch/1", "b.png")) != digest


def test_what_cannot_be_read_twice_has_no_digest() -> None:
    given = iter([1, 2])
    assert rows_digest(given) is None
    assert list(given) == [1, 2]
    assert rows_digest(SimpleNamespace(x=np.array([object()]))) is not None


def test_a_stream_of_hugging_face_has_one_digest_in_every_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from datasets import Dataset\n"
        "from manualloop.reading.describe import rows_digest\n"
        "stream = Dataset.from_dict({'x': [1, 2, 3, 4]}).to_iterable_dataset(num_shards=2)\n"
        "print(rows_digest(stream.map(lambda row: {'x': row['x'] + 1}).with_format('torch')))\n"
    )
    runpy.run_path(str(script), run_name="__main__")
    # The other process hashes its strings in another way.
    forked = processes.run(script, is_merged=False)
    assert forked.output == capsys.readouterr().out != ""


def test_the_time_at_which_a_dataset_was_opened_does_not_count() -> None:
    first = SimpleNamespace(rows=[1, 2], opened=time.time())
    second = SimpleNamespace(rows=[1, 2], opened=first.opened - 1)
    assert rows_digest(first) == rows_digest(second)
