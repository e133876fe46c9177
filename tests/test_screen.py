"""What a notebook shows of a run: one output, in place, which ends in its final state."""

from __future__ import annotations

import os
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from IPython.core.displaypub import CapturingDisplayPublisher
from torch import nn

from manualloop import evaluate_loop, predict_loop, progress, screen, train_loop


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is sent to the front end of a notebook."""
    publisher: Any = CapturingDisplayPublisher()
    session = SimpleNamespace(pid=os.getpid())
    shell = SimpleNamespace(display_pub=publisher, kernel=SimpleNamespace(session=session))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_UPDATES", 0.0)
    return publisher.outputs  # type: ignore[no-any-return]


def document(outputs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The outputs of a cell as its file has them: the last content of each display."""
    found: dict[str, dict[str, str]] = {}
    for output in outputs:
        name = output["transient"]["display_id"]
        assert output["update"] == (name in found)
        found[name] = output["data"]
    return list(found.values())


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.linear(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


BATCH = {"x": torch.ones(4, 1), "labels": torch.zeros(4, dtype=torch.long)}


def train(num_steps: int = 6, **options: Any) -> Any:
    model = Outputs()
    return train_loop(
        model,
        [BATCH] * num_steps,
        num_epochs=1,
        **{"evaluate": lambda: evaluate_loop(model, [BATCH] * 3, "accuracy"), **options},
    )


def test_a_run_is_one_output_that_ends_in_its_final_state(
    outputs: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    result = train(evaluate_every=3, best_metric="loss")
    (data,) = document(outputs)
    assert data["text/html"].count("<table") == 1
    assert data["text/html"].count("<tr") == 3
    assert data["text/html"].count(">best<") == 1
    assert re.findall(r'<progress value="6" max="6" aria-label="Training"', data["text/html"])
    dot = "\N{MIDDLE DOT}"
    assert re.search(rf"6/6 \(100%\) {dot} [\d:]+ {dot} loss=", data["text/html"])
    assert "left" not in data["text/html"]
    head, *rows, bar = data["text/plain"].splitlines()
    assert [row.split()[0] for row in (head, *rows)] == ["step", "3", "6"]
    assert f"{result.metrics['loss']:.4f}" in rows[-1]
    assert bar.startswith("Training: step 6/6 (100%), loss=")
    # It has moved, and shown the evaluation below.
    values = re.findall(r'value="(\d+)" max="6"', "".join(o["data"]["text/html"] for o in outputs))
    assert sorted(set(map(int, values))) == list(range(7))
    nested = [o["data"]["text/html"] for o in outputs if 'max="3"' in o["data"]["text/html"]]
    assert all("evaluating" in html for html in nested)
    assert {re.findall(r'value="(\d)" max="3"', html)[0] for html in nested} == set("0123")
    assert capfd.readouterr() == ("", "")


def test_each_run_has_an_output_of_its_own(outputs: list[dict[str, Any]]) -> None:
    """The same cell twice, folds, and a run inside of the evaluation of another one."""

    def evaluate() -> dict[str, float]:
        inner = train(4, evaluate=lambda: {"inner": 0.5})
        return {"outer": float(inner.state.progress.num_steps)}

    train(2, evaluate=evaluate)
    train(3, evaluate=None)
    shown = [data["text/plain"].splitlines() for data in document(outputs)]
    assert [lines[-1].partition(",")[0] for lines in shown] == [
        f"Training: step {n}/{n} (100%)" for n in (2, 4, 3)
    ]
    assert [len(lines) for lines in shown] == [3, 3, 1]
    assert "outer" in shown[0][0]
    assert "inner" in shown[1][0]


def test_a_run_that_fails_stays_where_it_was(outputs: list[dict[str, Any]]) -> None:
    def fail(step: Any) -> None:
        if step.index == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(evaluate_every=3, on_step=fail)
    (data,) = document(outputs)
    assert 'value="4" max="6" aria-label="Training stopped"' in data["text/html"]
    assert data["text/html"].count("<tr") == 2

    def evaluate() -> Any:
        evaluate_loop(Outputs(), [BATCH, {"x": 0}])

    outputs.clear()
    with pytest.raises(Exception, match="labels"):
        train(evaluate=evaluate, preflight=False)
    (data,) = document(outputs)
    assert data["text/html"].count("<progress") == 1  # that of the evaluation is gone
    assert "evaluating" not in data["text/html"]


def test_a_loop_of_ones_own(outputs: list[dict[str, Any]]) -> None:
    model = Outputs()
    evaluate_loop(model, [BATCH] * 2)
    assert outputs == []
    evaluate_loop(model, [BATCH] * 2, progress_bar=True)
    predict_loop(model, iter([BATCH] * 2), progress_bar=True)
    first, second = (data["text/html"] for data in document(outputs))
    assert 'value="2" max="2" aria-label="Evaluating"' in first
    assert 'value="1" max="1" aria-label="Predicting"' in second  # nobody knew how many


def test_nothing_is_shown_if_it_is_not_wanted(
    outputs: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    train(progress_bar=False)
    assert outputs == []
    assert capfd.readouterr() == ("", "")


def test_a_process_that_a_notebook_has_forked_prints(
    outputs: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    train()
    assert outputs == []
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_text_that_stdout_cannot_encode(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with open(1, "w", encoding="ascii", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        screen.write("Größe \udcff")
    assert capfdbinary.readouterr().out == b"Gr??e ?\n"
