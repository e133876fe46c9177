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
from manualloop.run import report

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

    torch.manual_seed(0)
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
    for token in re.findall(
        r"\x1b\[[0-9;]*[A-Za-z]|[\s\S]", re.sub(r"\x1b\[[0-9;]*m", "", written)
    ):
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


def test_a_run_is_a_table_above_a_bar_that_ends_at_100_percent(terminal: list[str]) -> None:
    head, *rows, bar = run_of(terminal, 0)
    assert head == " step  epoch  train loss  eval loss        lr     time"
    assert [row[:12] for row in rows] == ["   10   0.33", "   20   0.67", "   30   1.00"]
    assert {len(row) for row in rows} == {len(head)}
    # 20 ms a batch: 10 steps and evaluations of 15 batches.
    assert [row.split()[-1] for row in rows] == ["00:01", "00:01", "00:02"]
    assert re.match(
        r"Training: 100%\|█+\| 30/30 \[00:02, loss=\d+\.\d{4}, lr=\d\.\d\de-\d\d, "
        r"50\.00 step/s\]$",
        bar,
    )
    assert terminal[-2:] == ["END", ""]


def test_an_exception_leaves_the_terminal_on_a_new_line(terminal: list[str]) -> None:
    mid_run, first_step, evaluation = (run_of(terminal, number) for number in (1, 2, 3))
    for run in (mid_run, first_step, evaluation):
        assert run.count("Traceback (most recent call last):") == 1
        assert "ArithmeticError: boom" in run
        assert sum("Traceback" in line for line in run) == 1
    assert re.match(r"Training: +92%.* 12/13 \[.*loss=", mid_run[0])
    assert re.match(r"Training: +0%.* 0/2 ", first_step[0])
    assert re.match(r"Training: 100%.* 2/2 ", evaluation[0])  # that of the evaluation is gone


def test_no_bar_in_a_terminal_if_it_is_not_wanted(terminal: list[str]) -> None:
    assert run_of(terminal, 4) == []


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_bar_fits_into_its_terminal(columns: int, tmp_path: Path) -> None:
    script = """
        train([batch] * 20, evaluate=evaluate, evaluate_every=10)
        print("END")
    """
    lines = screen(in_terminal(tmp_path, script, columns))
    head, first, last, bar, end = lines[1:6]
    assert end == "END"
    assert max(map(len, lines)) <= columns
    assert len(head) == len(first) == len(last)
    assert bar.startswith("Training: 100%|█")
    shown = [name for name in ("20/20 [", "loss=", "lr=", "step/s]") if name in bar]
    assert len(shown) == {40: 1, 60: 2, 100: 4}[columns]


def test_a_bar_in_the_terminal_and_lines_in_a_file(tmp_path: Path) -> None:
    """Where stdout is a file and stderr is not, as in ``python train.py > log``."""
    log = tmp_path / "log"
    written = in_terminal(
        tmp_path,
        f"""
        with open({str(log)!r}, "w") as sys.stdout:
            train([batch] * 20, evaluate=evaluate, evaluate_every=10)
        sys.stdout = sys.__stdout__
        """,
    )
    bar = screen(written)[0]
    assert screen(written)[1:] == [""], screen(written)
    assert bar.startswith("Training: 100%|█")
    head, *rows = log.read_text().splitlines()
    assert head == "START 20"
    assert [row.partition("  train")[0] for row in rows] == [
        "step 10  epoch 0.50",
        "step 20  epoch 1.00",
    ]


def test_a_run_below_a_bar_of_the_user_leaves_whole_lines(tmp_path: Path) -> None:
    written = in_terminal(
        tmp_path,
        """
        from tqdm import tqdm

        for fold in tqdm(range(2), desc="folds"):
            train([batch] * 20, evaluate=evaluate, evaluate_every=10)
        print("END")
        """,
    )
    lines = [line.strip().split("  ")[0] for line in screen(written) if "START" not in line]
    bar = r"Training: 100%\|█+\| 20/20 \[00:\d\d, loss=\d\.\d{4}, lr=2\.50e-06, 50\.00 step/s\]"
    assert [re.sub(bar, "bar", line) for line in lines[:8]] == ["step", "10", "20", "bar"] * 2
    assert lines[8].startswith("folds: 100%|")
    assert lines[9:] == ["END", ""]


def test_notices_and_prints_stand_between_rows_and_above_the_bar(tmp_path: Path) -> None:
    written = in_terminal(
        tmp_path,
        """
        from manualloop.notices import say

        def on_step(step):
            if step.index in (4, 12):
                say(f"step {step.index}")

        options = {"evaluate": evaluate, "evaluate_every": 10, "best_metric": "loss"}
        train([batch] * 20, on_step=on_step, **options)
        print("END")
        """,
    )
    lines = screen(written)
    shown = [line.strip().split("  ")[0] for line in lines[1:-2]]
    assert shown == [
        "manualloop: the best evaluation is the one with the lowest loss (otherwise write "
        "best_metric='+loss').",
        "manualloop: step 4",
        *("step", "10"),
        "manualloop: step 12",
        *("step", "20"),  # below a header of its own
        shown[-1],
    ]
    assert shown[-1].startswith("Training: 100%")


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
    log = script.output
    assert "\r" not in log
    assert "\x1b" not in log
    assert "%|" not in log
    assert [re.split(r"  train loss|, loss=", line)[0] for line in log.splitlines()] == [
        *("START 30", "step 20  epoch 0.67", "step 30  epoch 1.00", "Training: step 30/30 (100%)"),
        *("START 13", "Training: step 12/13 (92%)", "START 2"),
    ]
    assert re.search(r"\), loss=\d\.\d{4}, lr=1\.67e-06, 50\.00 step/s, 00:01 gone\n", log)
    assert re.fullmatch(
        r"step 20  epoch 0\.67  train loss \d+\.\d{4}  eval loss \d+\.\d{4}  "
        r"lr 1\.83e-05  time 00:01",
        log.splitlines()[1],
    )
    assert script.errors.count("Traceback") == 2


def test_everything_of_a_run_comes_in_order_on_stdout(tmp_path: Path) -> None:
    script = start(
        tmp_path,
        """
        from manualloop.notices import say

        sys.stdout.reconfigure(line_buffering=False)
        print("before")
        say("a notice")
        options = {"evaluate": evaluate, "evaluate_every": 10, "best_metric": "loss"}
        train([batch] * 20, on_step=lambda step: step.index == 15 and print("step 15"), **options)
        print("after")
        """,
    )
    assert script.end(600)
    assert script.returncode == 0, script.errors
    assert script.errors == ""
    lines = [re.split("  |,| is", line)[0] for line in script.output.splitlines()]
    assert lines == [
        *("before", "manualloop: a notice", "START 20", "manualloop: the best evaluation"),
        *("step 10", "step 15", "step 20", "Training: step 20/20 (100%)", "after"),
    ]


def test_a_program_with_logging_of_its_own_gets_notices_there(tmp_path: Path) -> None:
    script = start(
        tmp_path,
        """
        import logging
        from manualloop.notices import say, warn

        logging.basicConfig(level="INFO", format="mine %(message)s")
        say("a notice")
        logging.getLogger("manualloop").setLevel("WARNING")
        say("another")
        warn("a warning")
        """,
    )
    assert script.end(600)
    assert (script.output, script.errors) == ("", "mine a notice\nmine a warning\n")


def test_warnings_come_where_notices_come(tmp_path: Path) -> None:
    script = start(tmp_path, 'from manualloop.notices import warn; warn("a warning")')
    assert script.end(600)
    assert (script.output, script.errors) == ("manualloop: a warning\n", "")


@pytest.mark.parametrize("where", ["sys.stdout.close()", "sys.stdout = None", "os.close(1)"])
def test_a_run_outlives_its_terminal(where: str, tmp_path: Path) -> None:
    body = f"""
        import os
        {where}
        train_loop(model, [batch] * 5, num_epochs=1, loss_fn=loss_fn, evaluate=evaluate)
        sys.stderr.write("trained")
        sys.stderr.flush()
        os._exit(0)
        """
    script = start(tmp_path, body)
    assert script.end(600)
    assert script.errors == "trained"


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
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 46
    assert lines[0] == "Training: step 20/1000 (2%), loss=20, 2.00 step/s, 00:10 gone, 08:10 left"
    assert lines[-1] == "Training: step 900/1000 (90%), loss=last, 2.00 step/s, 07:30 gone"


def test_lines_without_a_total_and_of_a_run_that_goes_on(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = ProgressBar(None, name="Evaluating", unit="batch")
    clock.now += 10
    bar.close(40)
    bar = ProgressBar(20_000, initial=8000, name="Training", unit="step")
    clock.now += 4000
    bar.show(10_000)
    assert capsys.readouterr().out.splitlines() == [
        "Evaluating: batch 40, 4.00 batch/s, 00:10 gone",
        "Training: step 10000/20000 (50%), 2.00 s/step, 1:06:40 gone, 5:33:20 left",
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


# Pauses -------------------------------------------------------------------------------------------


def test_pauses_are_no_steps_and_those_to_come_count(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds_due(position: int, seconds_per_step: float) -> float:
        before = bar.pauses["evaluating"]
        return (100 - position) // 25 * sum(before) / len(before)

    bar = ProgressBar(100, name="Training", unit="step", seconds_due=seconds_due)
    clock.now += 25
    with bar.paused_for("evaluating", 25, "loss=1"):
        clock.now += 40
    clock.now += 25
    bar.show(50, "loss=2")
    with pytest.raises(ZeroDivisionError), bar.paused_for("evaluating", 50):  # it is not measured
        clock.now += 1000
        raise ZeroDivisionError
    bar.show(50)
    assert [line.split(", ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "loss=2, 1.00 step/s, 01:30 gone, 02:10 left",  # 50 steps and two evaluations
        "1.00 step/s, 18:10 gone, 02:10 left",
    ]
    assert bar.pauses == {"evaluating": [40.0]}


def test_the_first_step_does_not_count_where_there_are_others(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = ProgressBar(10, name="Training", unit="step")
    clock.now += 60  # it compiles
    bar.show(1)
    clock.now += 2
    bar.show(3)
    assert [line.split(", ")[-1] for line in capsys.readouterr().out.splitlines()] == [
        "09:00 left",
        "00:07 left",
    ]


def test_time_that_is_limited_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(1000, name="Training", unit="step", max_seconds=15)
    clock.now += 10
    bar.show(10)
    assert capsys.readouterr().out.endswith(" 00:10 gone, 00:05 left\n")


def test_a_run_tells_how_long_its_evaluations_and_saves_will_take(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step takes 1 s, an evaluation 10 s, a save 5 s: time left, when it is the last one."""
    left: list[tuple[int, float | None]] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        clock.now += 1
        return model(batch["x"]).mean()  # type: ignore[no-any-return]

    def evaluate() -> dict[str, float]:
        clock.now += 10
        return {"score": 1.0}

    class Bar(ProgressBar):
        def redraw(self) -> None:
            if self._pause == "saving":
                clock.now += 2.5  # at its begin, and below at its end
            left.append((self._position, self._left()))

        def is_due(self) -> bool:
            return True

        def show(self, position: int, *facts: str) -> None:
            self._move(position, facts)
            self.redraw()

    monkeypatch.setattr(report, "ProgressBar", Bar)
    train_loop(
        nn.Linear(1, 1),
        [{"x": torch.ones(1, 1)}] * 10,
        num_epochs=4,
        loss_fn=loss_fn,
        evaluate=evaluate,
        evaluate_every="0.5 epoch",
        checkpoint_dir=tmp_path,
        checkpoint_every=10,
    )
    # After 11 steps: 29 steps, 6 evaluations and 3 saves, the measured one of 2.5 s.
    assert dict(left)[11] == pytest.approx(29 + 6 * 10 + 3 * 2.5)
    assert dict(left)[39] == pytest.approx(1 + 10 + 2.5)


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
    ("options", "num_reads"),
    [
        ({}, 0),
        ({"log_every": 1}, 0),
        ({"max_grad_norm": 0.1}, 0),
        # Before the first update, whether the loss of this module is a mean over rows.
        ({"num_epochs": 10, "gradient_accumulation_steps": 2}, 1),
    ],
    ids=str,
)
def test_fifty_updates_never_ask_the_device(
    options: dict[str, Any],
    num_reads: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert num_waits(**options) == num_reads
    lines = capsys.readouterr().out.splitlines()
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
