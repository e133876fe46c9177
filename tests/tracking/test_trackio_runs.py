"""Records as rows of a run of Trackio, read back from its database."""

import importlib.util

import pytest
from tracked_runs import FORK, KilledAt, killed, train

if importlib.util.find_spec("trackio") is None:
    pytest.skip("trackio is not installed", allow_module_level=True)


def tracked(folder, number=None):
    """Run with a tracker; with a number the process is killed in its call of this number."""
    from manualloop.tracking import trackio

    tracker = trackio("tests", name="mine", auto_log_cpu=False, auto_log_gpu=False)
    trackers = [tracker if number is None else KilledAt(tracker, number, is_after=True)]
    return train(folder, trackers).history


def resumed_and_read(folder, connection):
    history = tracked(folder)
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_run_records("tests")
    connection.send((history, run["name"], SQLiteStorage.get_logs("tests", run["name"])))


def test_a_killed_run_has_each_row_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    killed(tracked, tmp_path / "run", 6)
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=resumed_and_read, args=(tmp_path / "run", theirs))
    process.start()
    theirs.close()
    history, name, rows = ours.recv()
    process.join(600)
    assert name.startswith("mine-")
    names = {"train/loss": "loss", "train/learning_rate": "lr", "eval/f1": "eval_f1"}
    found = [
        {"step": row["step"], **{n: row[m] for m, n in names.items() if m in row}} for row in rows
    ]
    assert found == [
        {name: record[name] for name in ("step", *names.values()) if name in record}
        for record in history
    ]
