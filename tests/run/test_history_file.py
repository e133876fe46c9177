"""history.jsonl, and the lock beside it."""

import json
import math
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from manualloop import CheckpointError
from manualloop.checkpoint.files import LOCK, hold_lock
from manualloop.run.history_file import HISTORY, HistoryFile, read_history

FORK = multiprocessing.get_context("fork")


def record(step, **values):
    return {"step": step, **values}


def test_the_later_run_wins_and_nothing_is_ever_removed(tmp_path):
    first = [record(n, loss=float(n)) for n in (1, 2, 3, 4)]
    HistoryFile(tmp_path, 0, 0).write(first)
    lines = (tmp_path / HISTORY).read_text()
    again = [*first[:2], record(3, loss=30.0)]
    ledger = HistoryFile(tmp_path, 2, 2)
    ledger.write(again)
    ledger.write([*again, record(4, loss=40.0)])
    assert read_history(tmp_path) == [*again, record(4, loss=40.0)]
    assert (tmp_path / HISTORY).read_text().startswith(lines)
    HistoryFile(tmp_path, 0, 0)
    assert read_history(tmp_path) == []


def test_a_record_of_the_same_step_that_the_checkpoint_did_not_know_is_left_out(tmp_path):
    records = [record(2, loss=1.0), record(2, eval_f1=0.5)]
    HistoryFile(tmp_path, 0, 0).write(records)
    HistoryFile(tmp_path, 2, 1).write(records)
    assert read_history(tmp_path) == records


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3}x', "\x00\x00\x00", "[1, 2]"])
def test_half_a_line_is_skipped_and_the_next_process_begins_a_new_one(rest, tmp_path):
    HistoryFile(tmp_path, 0, 0).write([record(1, loss=0.5), record(2, loss=0.25)])
    with open(tmp_path / HISTORY, "a") as file:
        file.write(rest)
    records = [record(1, loss=0.5), record(2, loss=0.25), record(3, loss=0.125)]
    assert read_history(tmp_path) == records[:2]
    HistoryFile(tmp_path, 2, 2).write(records)
    assert read_history(tmp_path) == records


def test_numbers_come_back_to_the_last_bit_and_the_lines_are_json(tmp_path):
    values = {
        "a": 0.1 + 0.2,
        "b": math.nan,
        "c": -math.inf,
        "d": np.float32(0.1),
        "e": np.arange(3),
        "f": None,
        "g": True,
        "h": {"x": [1.5]},
    }
    HistoryFile(tmp_path, 0, 0).write([record(1, **values)])
    for line in (tmp_path / HISTORY).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    (found,) = read_history(tmp_path)
    assert math.isnan(found.pop("b"))
    assert found == {
        "step": 1,
        "a": 0.1 + 0.2,
        "c": -math.inf,
        "d": float(np.float32(0.1)),
        "e": [0, 1, 2],
        "f": None,
        "g": True,
        "h": {"x": [1.5]},
    }


def test_without_a_ledger_there_are_no_records(tmp_path):
    assert read_history(tmp_path) == []


def in_child(function, *args):
    """Run a function in a forked process and return what it returns, or its error's text."""
    receiver, sender = FORK.Pipe(duplex=False)

    def target():
        try:
            sender.send(function(*args))
        except CheckpointError as error:
            sender.send(str(error))

    process = FORK.Process(target=target)
    process.start()
    result = receiver.recv()
    process.join()
    return result


def try_lock(folder):
    with hold_lock(folder):
        return "held"


def test_the_lock_keeps_other_processes_out_and_names_its_owner(tmp_path):
    with hold_lock(tmp_path):
        text = in_child(try_lock, tmp_path)
        assert f"process {os.getpid()} on " in text
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()
    assert in_child(try_lock, tmp_path) == "held"


def test_the_lock_lets_its_own_process_in_again_only_if_it_says_so(tmp_path):
    with hold_lock(tmp_path):
        with hold_lock(tmp_path, again=True):
            pass
        assert "process" in in_child(try_lock, tmp_path), "still held"
        with (
            pytest.raises(CheckpointError, match="Another run of this process uses"),
            hold_lock(tmp_path),
        ):
            pass


def test_a_fork_does_not_keep_the_lock(tmp_path):
    is_forked, may_end = FORK.Event(), FORK.Event()

    def wait():
        is_forked.set()
        may_end.wait(600)

    with hold_lock(tmp_path):
        process = FORK.Process(target=wait)
        process.start()
        assert is_forked.wait(600)
    assert in_child(try_lock, tmp_path) == "held"
    may_end.set()
    process.join()


def test_the_lock_of_a_killed_process_is_taken_over_with_a_notice(tmp_path, caplog):
    receiver, sender = FORK.Pipe(duplex=False)

    def hold():
        with hold_lock(tmp_path):
            sender.send("held")
            threading.Event().wait(600)

    process = FORK.Process(target=hold)
    process.start()
    receiver.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / LOCK).exists()
    with caplog.at_level("INFO", logger="manualloop"), hold_lock(tmp_path):
        assert f"that did not end by itself: process {process.pid} on" in caplog.text
    assert not (tmp_path / LOCK).exists()


def test_an_unreadable_lock_file_of_nobody_is_no_obstacle(tmp_path):
    (tmp_path / LOCK).write_text("garbage")
    with hold_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
