"""The progress bar in a terminal, lines in a log file, and what it costs the run: nothing."""

from __future__ import annotations

import os
import re
import struct
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import Script
from torch import Tensor, nn

from manualloop import SingleDevice, evaluate_loop, predict_loop, progress, train_loop
from manualloop.progress import ProgressBar

PREAMBLE = """
    import sys, traceback, types, warnings
    import torch
    from torch import nn
    from manualloop import evaluate_loop, progress, train_loop

    warnings.simplefilter("error")
    sys.stdout.reconfigure(line_buffering=True)  # as lines of stderr are
    now = 0.0  # a batch takes 20 ms, on any machine
    progress.time = types.SimpleNamespace(monotonic=lambda: now)

    def loss_fn(model, batch):
        if "boom" in batch:
            raise ArithmeticError("boom")
        global now
        now += 0.02
        return (model(batch["x"]) ** 2).mean()

    model, batch = nn.Linear(1, 1), {"x": torch.ones(4, 1)}
    boom = {**batch, "boom": torch.ones(4, 1)}

    def evaluate(batches=[batch] * 15):
        return evaluate_loop(model, batches, loss_fn=loss_fn, progress_bar=True)

    def train(batches, **options):
        print(f"START {len(batches)}")
        try:
            train_loop(model, batches, num_epochs=1, loss_fn=loss_fn, log_every=2, **options)
        except ArithmeticError:
            traceback.print_exc()
"""


def start(folder: Path, body: str, **options: Any) -> Script:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(body))
    return Script(path, env={**os.environ, "TERM": "xterm"}, is_merged=False, **options)


def in_terminal(folder: Path, body: str, columns: int = 100) -> str:
    """Run a script in a pseudo-terminal; return all that it wrote."""
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    script = start(folder, body, terminal=writer)
    os.close(writer)
    written = b""
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:  # Linux says so at the end
            break
        if not chunk:
            break
        written += chunk
    os.close(reader)
    assert script.end(600)
    assert script.returncode == 0, written.decode()
    return written.decode()


def screen(written: str) -> list[str]:
    """What a terminal shows after all this: lines, the last one being the cursor's."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[\s\S]", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            if row == len(lines):
                lines.append([])
        elif token == "\x1b[A":
            row -= 1
        else:
            assert not token.startswith("\x1b"), repr(token)
            lines[row] += [" "] * (column + 1 - len(lines[row]))
            lines[row][column] = token
            column += 1
    return ["".join(line).rstrip() for line in lines]


# A terminal ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Several runs after each other in one terminal."""
    written = in_terminal(
        tmp_path_factory.mktemp("terminal"),
        """
        train([batch] * 30, evaluate=evaluate, evaluate_every=10)
        train([batch] * 12 + [boom])
        train([boom, batch])
        train([batch] * 2, evaluate=lambda: evaluate([batch, boom]))
        train([batch] * 11, progress_bar=False, evaluate=lambda: {"score": 1.0})
        print("END")
        """,
    )
    assert "\r" in written.replace("\r\n", "\n")
    assert len(set(re.findall(r"Training: +(\d+)%", written))) > 5  # it moved
    return screen(written)


def run_of(terminal: list[str], number: int) -> list[str]:
    starts = [row for row, line in enumerate(terminal) if line.startswith(("START", "END"))]
    return terminal[starts[number] + 1 : starts[number + 1]]


def test_a_bar_ends_at_100_percent_and_with_a_newline(terminal: list[str]) -> None:
    *lines, bar = run_of(terminal, 0)
    assert re.match(
        r"Training: 100%\|█+\| 30/30 \[.*step/s, loss=\d+\.\d{4}, lr=\d\.\d\de-\d\d\]$", bar
    )
    # Evaluations have a line of their own above it, and their bars stay complete.
    results = [line for line in lines if line.startswith("step ")]
    assert [line.split("  loss")[0] for line in results] == [
        "step 10  epoch 0.33",
        "step 20  epoch 0.67",
        "step 30  epoch 1.00",
    ]
    others = [line for line in lines if line not in results]
    assert all(re.match(r"(Evaluating: 100%.* 15/15 |$)", line) for line in others), others
    assert terminal[-2:] == ["END", ""]


def test_an_exception_leaves_the_terminal_on_a_new_line(terminal: list[str]) -> None:
    mid_run, first_step, evaluation = (run_of(terminal, number) for number in (1, 2, 3))
    for run in (mid_run, first_step, evaluation):
        assert run.count("Traceback (most recent call last):") == 1
        assert "ArithmeticError: boom" in run
        assert sum("Traceback" in line for line in run) == 1
    assert re.match(r"Training: +92%.* 12/13 \[.*loss=", mid_run[0])
    assert re.match(r"Training: +0%.* 0/2 ", first_step[0])
    assert re.match(r"Evaluating: +50%.* 1/2 ", evaluation[0])
    assert re.match(r"Training: 100%.* 2/2 ", evaluation[1])


def test_no_bar_in_a_terminal_if_it_is_not_wanted(terminal: list[str]) -> None:
    assert run_of(terminal, 4) == []


# A log file ---------------------------------------------------------------------------------------


def test_a_log_file_has_lines_and_no_carriage_return(tmp_path: Path) -> None:
    body = """
        train([batch] * 30, evaluate=evaluate, evaluate_every=20)
        train([batch] * 12 + [boom])
        train([boom, batch])
        """
    script = start(tmp_path, body)
    assert script.end(600)
    assert script.returncode == 0, script.errors
    log = script.errors
    assert "\r" not in log
    assert "\x1b" not in log
    assert "%|" not in log
    lines = log.splitlines()
    assert [line.split(",")[0].split("  loss")[0] for line in lines[:5]] == [
        "Evaluating: batch 15/15 (100%)",
        "step 20  epoch 0.67",
        "Evaluating: batch 15/15 (100%)",
        "step 30  epoch 1.00",
        "Training: step 30/30 (100%)",
    ]
    assert re.fullmatch(
        r"Training: step 30/30 \(100%\), loss=\d+\.\d{4}, lr=\d\.\d\de-\d\d, "
        r"\d+\.\d\d step/s, 00:01 gone, 00:00 left",
        lines[4],
    )
    rest = [line for line in lines[5:] if not line.startswith((" ", "Traceback", "Arithmetic"))]
    assert [line.split(",")[0] for line in rest] == ["Training: step 12/13 (92%)"]
    assert log.count("Traceback") == 2


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_lines_come_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(1000, name="Training", unit="step")
    shown = []
    for position in range(1, 901):
        clock.now += 0.5
        if bar.is_due():
            shown.append(clock.now)
            bar.show(position, f"loss={position}")
    bar.close(900, "loss=last")
    bar.close(900, "again")
    assert shown == [10.0 * n for n in range(1, 46)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 46
    assert lines[0] == "Training: step 20/1000 (2%), loss=20, 2.00 step/s, 00:10 gone, 08:10 left"
    assert lines[-1] == (
        "Training: step 900/1000 (90%), loss=last, 2.00 step/s, 07:30 gone, 00:50 left"
    )


def test_lines_without_a_total_and_of_a_run_that_goes_on(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = ProgressBar(None, name="Evaluating", unit="batch")
    clock.now += 10
    bar.close(40)
    bar = ProgressBar(20_000, initial=8000, name="Training", unit="step")
    clock.now += 4000
    bar.write("halfway")
    bar.close(10_000)
    assert capsys.readouterr().err.splitlines() == [
        "Evaluating: batch 40, 4.00 batch/s, 00:10 gone",
        "halfway",
        "Training: step 10000/20000 (50%), 0.50 step/s, 1:06:40 gone, 5:33:20 left",
    ]


def test_nothing_is_written_if_it_is_not_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    class Second(SingleDevice):
        is_main = False

    batches = [{"x": torch.ones(4, 1), "labels": torch.zeros(4, dtype=torch.long)}] * 5
    model = Outputs()
    for options in ({"progress_bar": False}, {"progress_bar": True, "strategy": Second("cpu")}):
        train_loop(
            model,
            batches,
            num_epochs=2,
            evaluate=lambda: evaluate_loop(model, batches, **options),  # type: ignore[arg-type] # noqa: B023
            **options,  # type: ignore[arg-type]
        )
        predict_loop(model, batches, **options)  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")


# What it costs ------------------------------------------------------------------------------------


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.linear(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def num_waits(**options: Any) -> int:
    """How often 50 updates ask for the value of a tensor, which on a GPU waits for it."""
    batches = [{"x": torch.ones(4, 1), "labels": torch.zeros(4, dtype=torch.long)}] * 10
    model = Outputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False, fused=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = train_loop(model, batches, optimizer, **{"num_epochs": 5, **options})
    assert result.state.progress.num_steps == 50
    events = {event.key: event.count for event in profile.key_averages()}
    assert events["aten::addmm"] >= 50  # the profile saw the run
    return events.get("aten::_local_scalar_dense", 0) + events.get("aten::is_nonzero", 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"log_every": 1},
        {"max_grad_norm": 0.1},
        {"num_epochs": 10, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_fifty_updates_never_ask_the_device(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert num_waits(**options) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 51  # the bar was drawn at every update
    assert "loss=" in lines[-1]


def test_a_wait_would_be_seen() -> None:
    assert num_waits(progress_bar=False, on_step=lambda step: float(step.loss)) == 50


def test_a_terminal_is_redrawn_ten_times_a_second(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = SimpleNamespace(written="", isatty=lambda: True, flush=lambda: None, encoding="utf8")
    terminal.write = lambda text: setattr(terminal, "written", terminal.written + text)
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar(1000, name="Training", unit="step")
    drawn = 0
    for position in range(1, 1001):
        clock.now += 0.001
        if bar.is_due():
            drawn += 1
            bar.show(position)
    bar.close(1000)
    assert 9 <= drawn <= 11
    assert screen(terminal.written)[0].startswith("Training: 100%")
    assert terminal.written.endswith("\n")
