"""The examples of examples/tasks: each runs for a moment, is short, and keeps its call short."""

import runpy
from pathlib import Path

import pytest
from tiny_language_models import needs_packs

TASKS = Path(__file__).parents[2] / "examples" / "tasks"
EXAMPLES = {path.stem: path for path in sorted(TASKS.glob("*.py"))}
RUN = [name for name in EXAMPLES if "\ndef main(" in EXAMPLES[name].read_text()]  # not shared ones


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name):
    lines = EXAMPLES[name].read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_packs) if n == "chat" else n for n in RUN]
)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TASKS))
    main = runpy.run_path(str(EXAMPLES[name]))["main"]
    scores = main(quick=True)
    assert scores
    assert all(value == value for value in scores.values())
    assert "baseline" in capsys.readouterr().out
