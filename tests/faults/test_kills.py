"""SIGKILL at any moment: the same command resumes exactly."""

import os
import random
import signal
import time

import bench
import pytest
from injections import POINTS, Gate, KillAt

import manualloop
from manualloop.checkpoint.files import verify_folder
from manualloop.checkpoint.manifest import find_best, find_folders, find_last

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

# Of the dozen fsyncs of a save: first, middle, last; and one of the second save.
FSYNCS = [("fsync", n) for n in (1, 5, 10, 15)]


def is_sampled(point):
    """Before a file the disk is as it was after the one before; of all but the first and last.

    Of the files of tensors that are written alike, the first and the one in the middle.
    """
    stem, _, moment = point.partition(":")
    if stem in ("optimizer", "extras", "rng"):
        return point == "extras:half"
    return moment != "before" or stem in ("model", "manifest", "probe")


FIRST = [
    pytest.param(point, 1, marks=() if is_sampled(point) else pytest.mark.exhaustive)
    for point in POINTS
    if not point.startswith("fsync")
]
THIRD = [
    pytest.param(
        point,
        3,
        marks=()
        if point in ("model:half", "manifest:half", "rename:after")
        else pytest.mark.exhaustive,
    )
    for point in POINTS
    if not point.startswith(("fsync", "probe", "rotate"))
]


def whole(folder):
    """The steps of the checkpoints that verify."""
    steps = []
    for entry in find_folders(folder):
        assert entry.manifest is not None, entry.problem
        verify_folder(entry.path, entry.manifest)
        steps.append(entry.manifest["step"])
    return steps


def reached_in(log):
    """The last step that was logged: every step before it has been saved."""
    entries = bench.merged(log) if log.exists() else []
    return max((entry["step"] for entry in entries), default=0)


def check_kill(folder, fault, finish):
    log = folder.with_name("log.jsonl")
    outcome = bench.run(folder, log, fault)
    assert outcome[:2] == ("killed", signal.SIGKILL), outcome
    steps = whole(folder)
    reached = reached_in(log)
    # The last step whose save had returned is at most one behind: that save was interrupted.
    assert max(steps, default=0) >= reached - 1
    finish(folder, log)


@pytest.mark.parametrize(("point", "number"), FIRST + THIRD + FSYNCS)
def test_f01_killed_at_a_named_point(point, number, tmp_path, finish):
    check_kill(tmp_path / "run", KillAt(point, number), finish)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(1, 60))
@pytest.mark.parametrize("point", ["fsync", "fsync:after"])
def test_f01_killed_before_and_after_each_fsync(point, number, tmp_path, finish):
    check_kill(tmp_path / "run", KillAt(point, number), finish)


def kill_at_random(folder, log, draws):
    """Kill the run at a random moment after a random step."""
    # The run waits before its last save, so that the kill is never too late.
    last_save = Gate(str(folder.with_name("never")), 2 * bench.NUM_STEPS - 2)
    process, _ = bench.start(folder, log, last_save, keep_checkpoints=1)
    step = draws.randrange(bench.NUM_STEPS)
    while process.is_alive() and (log.read_text().count("\n") if log.exists() else 0) < step:
        time.sleep(0.001)
    time.sleep(draws.uniform(0, 0.03))
    os.kill(process.pid, signal.SIGKILL)
    process.join(600)
    return -process.exitcode


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.exhaustive if n >= 4 else ()) for n in range(40)]
)
def test_f02_killed_at_a_random_moment(number, tmp_path, finish):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    assert kill_at_random(folder, log, random.Random(number)) == signal.SIGKILL
    assert max(whole(folder), default=0) >= reached_in(log) - 1
    finish(folder, log)


@pytest.mark.parametrize("point", ["rotate", "rotate:renamed", "rotate:half"])
def test_f03_killed_in_the_rotation_best_and_last_are_intact(point, tmp_path, kept):
    folder = tmp_path / "run"
    options = {"best_metric": "drawn", "evaluate_every": 2, "keep_checkpoints": 1}
    expected = bench.run(tmp_path / "undisturbed", **options)
    outcome = bench.run(folder, fault=KillAt(point, 3), **options)
    assert outcome[:2] == ("killed", signal.SIGKILL)
    last, best = find_last(folder).path, find_best(find_folders(folder)).path
    assert (last.name, best.name) == ("step-00000005", "step-00000002")
    for path in (last, best):
        for name in ("model", "optimizer", "extras", "rng"):
            file = f"{name}.safetensors"
            assert (path / file).read_bytes() == (kept / path.name / file).read_bytes()
    assert bench.run(folder, **options) == expected
    assert bench.junk(folder) == []
    assert whole(folder) == [12, 8], "the newest and the best"
    assert bench.saved_steps(folder) == bench.saved_steps(tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a run without a fault, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    options = {"best_metric": "drawn", "evaluate_every": 2, "keep_checkpoints": 99}
    assert bench.run(folder, **options)[0] == "finished"
    return folder


@pytest.mark.parametrize("point", ["mkdir:after", "optimizer:half", "rename", "rename:after"])
def test_f04_killed_again_in_the_first_save_of_the_resumed_run(point, tmp_path, finish):
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    for number in (4, 1, 1, 4):  # the last one late: its records follow those that were lost
        outcome = bench.run(folder, log, KillAt(point, number))
        assert outcome[:2] == ("killed", signal.SIGKILL)
        assert whole(folder)
    finish(folder, log)


def test_the_best_checkpoint_is_the_best_after_several_kills(tmp_path):
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
