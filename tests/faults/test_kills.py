"""Rows 1 to 4 of the fault plan: SIGKILL anywhere, and what the same command makes of it."""

import os
import random
import signal
import time

import bench
import pytest
from strikes import POINTS, KillAt

import manualloop
from manualloop.folder import find_folders, verify_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

# Of the dozen fsyncs of a save: first, middle, last; of the first save and of the second.
FSYNCS = [("fsync", n) for n in (1, 2, 5, 8, 9, 10, 11, 15, 24)]
OTHERS = [(point, n) for point in POINTS if not point.startswith("fsync") for n in (1, 3)]


def whole(folder):
    """The steps of the checkpoints that verify."""
    steps = []
    for entry in find_folders(folder):
        assert entry.manifest is not None, entry.problem
        verify_folder(entry.path, entry.manifest)
        steps.append(entry.manifest["step"])
    return steps


def check_kill(folder, fault, finish):
    log = folder.with_name("log.jsonl")
    outcome = bench.run(folder, log, fault)
    assert outcome[:2] == ("killed", signal.SIGKILL), outcome
    steps = whole(folder)
    reached = max(entry["step"] for entry in bench.merged(log))
    # The last step whose save had returned is at most one behind: that save is what was struck.
    assert max(steps, default=0) >= reached - 1
    finish(folder, log)


@pytest.mark.parametrize(("point", "number"), OTHERS + FSYNCS)
def test_f01_killed_at_a_named_point(point, number, tmp_path, finish):
    if "rotate" in point and number > 1:
        pytest.skip("once is enough")
    check_kill(tmp_path / "run", KillAt(point, number), finish)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(1, 60))
@pytest.mark.parametrize("point", ["fsync", "fsync:after"])
def test_f01_killed_before_and_after_each_fsync(point, number, tmp_path, finish):
    check_kill(tmp_path / "run", KillAt(point, number), finish)


def kill_at_random(folder, log, draws):
    """SIGKILL at a time drawn from the run's whole length."""
    process, _ = bench.start(folder, log, keep_checkpoints=1)
    while not (folder / "history.jsonl").exists() and process.is_alive():
        time.sleep(0.001)
    time.sleep(draws.uniform(0, 0.15))
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.exhaustive if n >= 10 else ()) for n in range(40)]
)
def test_f02_killed_at_a_random_moment(number, tmp_path, finish):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    kill_at_random(folder, log, random.Random(number))
    if folder.exists():
        reached = (
            max((entry["step"] for entry in bench.merged(log)), default=0) if log.exists() else 0
        )
        assert max(whole(folder), default=0) >= reached - 1
    finish(folder, log)


@pytest.mark.parametrize("point", ["rotate", "rotate:renamed", "rotate:half"])
def test_f03_killed_in_the_rotation_best_and_last_are_intact(point, tmp_path, finish):
    folder = tmp_path / "run"
    options = {"best_metric": "drawn", "evaluate_every": 2, "keep_checkpoints": 1}
    expected = bench.run(tmp_path / "undisturbed", **options)
    outcome = bench.run(folder, fault=KillAt(point, 3), **options)
    assert outcome[:2] == ("killed", signal.SIGKILL)
    assert whole(folder)
    assert bench.run(folder, **options) == expected
    assert bench.junk(folder) == []
    assert bench.saved_steps(folder) == bench.saved_steps(tmp_path / "undisturbed")
    for steps in (whole(folder),):
        assert steps[0] == bench.NUM_STEPS
        assert len(steps) <= 2, "the newest and the best"


@pytest.mark.parametrize("point", ["mkdir:after", "optimizer:half", "rename", "rename:after"])
def test_f04_killed_again_in_the_first_save_of_the_resumed_run(point, tmp_path, finish):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    for number in (4, 1, 1, 2):
        outcome = bench.run(folder, log, KillAt(point, number))
        assert outcome[:2] == ("killed", signal.SIGKILL)
        assert whole(folder)
    finish(folder, log)


def test_the_best_checkpoint_is_the_best_after_all_of_this(tmp_path):
    folder = tmp_path / "run"
    options = {"best_metric": "drawn", "evaluate_every": 2, "keep_checkpoints": 1}
    for number in (2, 4, 5):
        bench.run(folder, fault=KillAt("rename:after", number), **options)
    result = bench.train(folder, **options)
    records = [r for r in result.history if "eval_drawn" in r]
    best = max(records, key=lambda record: record["eval_drawn"])
    info = manualloop.load_checkpoint(folder, result.state, which="best")
    assert info.step == best["step"]
    assert info.metrics["drawn"] == best["eval_drawn"] == result.best_metrics["drawn"]
