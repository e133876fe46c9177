"""The jobs that people are told take few lines: counted, and run as they stand."""

import re
import runpy
import sys
from pathlib import Path

import mrpc_job
import pandas
import pytest
from count_jobs import JOBS, concepts_in, count_lines
from helpers import WORDS, tiny_bert, tiny_tokenizer

from manualloop import find_checkpoint

ROOT = Path(__file__).parents[2]


def test_the_mrpc_job_takes_at_most_20_lines_and_6_concepts():
    source = mrpc_job.SCRIPT.read_text()
    assert count_lines(source) <= 20
    assert concepts_in(source) == {
        *("evaluate_loop", "partial", "prepare_dataloaders", "tensorboard", "train_loop"),
        "best_metrics",
    }


def test_the_page_has_the_counts_of_all_four_scripts():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in JOBS.glob("with_*.py"):
        source = path.read_text()
        lines, concepts = count_lines(source), len(concepts_in(source))
        name = path.stem.removeprefix("with_")
        assert re.search(rf"^\| {name} \| {lines} \| {concepts} \|$", page, re.M | re.I), name


def test_lines_and_concepts_are_counted_as_one_would():
    source = '"""Text.\n\nMore."""\n\nimport a as b  # for c\nfrom d import (\n    e,\n)\n\n'
    source += "b.f(\n    1\n)\n"
    assert count_lines(source) == 7
    assert concepts_in(source) == {"b", "e", "f"}


@pytest.mark.shared
def test_the_mrpc_job_runs_and_its_second_call_returns_the_result(tmp_path, shared):
    mrpc_job.lay_out(tmp_path, shared)
    result = mrpc_job.run(tmp_path)["result"]
    assert result.state.progress.num_steps == 24
    assert find_checkpoint(tmp_path / "runs" / "mrpc", "best") == result.best_checkpoint
    assert list((tmp_path / "runs" / "mrpc" / "tensorboard").glob("events.*"))
    again = mrpc_job.run(tmp_path)["result"]  # it is finished
    assert again.history == result.history


def messages_of_a_shop(path, num_rows=150):
    """A file of one's own: an id, texts, labels of text, an empty cell, and a row twice."""
    texts = [
        " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(1, 4 + number % 9))
        + f" {number}"
        for number in range(num_rows)
    ]
    label = [("billing", "delivery", "support")[number % 3] for number in range(num_rows)]
    frame = pandas.DataFrame({"id": range(num_rows), "text": texts, "label": label})
    frame.loc[7, "text"] = None
    frame.loc[num_rows - 1] = [num_rows - 1, *frame.loc[3, ["text", "label"]]]
    frame.to_csv(path, index=False)


def test_the_csv_job_takes_at_most_20_lines_and_writes_names(tmp_path, monkeypatch, capsys):
    script = ROOT / "examples" / "own_csv.py"
    assert count_lines(script.read_text()) <= 20
    messages_of_a_shop(tmp_path / "train.csv")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_bert(3).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["own_csv.py", "train.csv", str(tmp_path / "model")])
    runpy.run_path(str(script), run_name="__main__")
    table = pandas.read_csv("predictions.csv")
    assert len(table) == 15
    assert {*table["label"]} <= {"billing", "delivery", "support"}
    rows = pandas.read_csv("train.csv").set_index("id")
    assert all(rows.loc[table["id"], "label"].to_numpy() == table["reference_label"])
