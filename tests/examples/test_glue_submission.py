"""The example that writes a GLUE submission."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import glue_submission

    yield glue_submission
    for name in ("glue_submission", "docstrings"):
        sys.modules.pop(name, None)


def test_the_file_has_a_name_for_each_row_in_order(example, tmp_path, capsys):
    path = example.main(["--output", str(tmp_path / "RTE.tsv")])
    header, *rows = path.read_text().splitlines()
    assert header == "index\tprediction"
    assert [row.split("\t")[0] for row in rows] == [str(number) for number in range(50)]
    assert {row.split("\t")[1] for row in rows} <= set(example.NAMES)
    assert "Predictions(50 rows; index 0 to 49; predictions: int64 (50,)" in capsys.readouterr().out


def test_tasks_of_numbers_get_numbers(example, tmp_path):
    names, numbers = (
        path.read_text().splitlines()[1:]
        for path in (
            example.main(["--output", str(tmp_path / "RTE.tsv")]),
            example.main(["--numbers", "--output", str(tmp_path / "MRPC.tsv")]),
        )
    )
    pairs = {(a.split("\t")[1], b.split("\t")[1]) for a, b in zip(names, numbers, strict=True)}
    assert pairs <= {("entailment", "0"), ("not_entailment", "1")}
