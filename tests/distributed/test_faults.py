"""Ranks that fail, and decisions that ranks must share, in two gloo processes.

There is no launcher, so the surviving ranks must end by themselves.
"""

import functools
import json
import os
import re
import signal
from contextlib import suppress

import bench
import pytest
import ranks
from limits import CAN_FAIL_SOON, needs_to_fail_soon
from processes import wait_until

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals"),
]


class Outcome:
    """A run on two ranks with a fault on one, and how each ended.

    Args:
        folder: The folder of the run.
        codes: The exit status of each rank.
        outputs: What each rank has printed in the run.
    """

    def __init__(self, folder, codes, outputs):
        self.folder, self.codes, self.outputs = folder, codes, outputs

    def results(self):
        return [json.loads(self.folder.with_name(f"run.{r}.json").read_text()) for r in range(2)]

    def log(self, rank):
        lines = self.folder.with_name(f"run.{rank}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def start(victim, *faults):
    """Start one or several runs, each a fault and its folder, in the same two processes.

    No limit of time is set that could end a rank: one that ends knows of the other's fault.
    """
    for _, folder in faults:
        for rank in range(2):
            folder.with_name(f"run.{rank}.json").unlink(missing_ok=True)
    children = ranks.start("fault_run.py", victim, *(word for fault in faults for word in fault))
    if faults[0][0] == "stop":
        with suppress(AssertionError):  # it hangs: `finish` shows where
            wait_until(lambda: children[1 - victim].poll() is not None)
        children[victim].send_signal(signal.SIGCONT)
    outputs = ranks.finish(children)
    return [child.returncode for child in children], outputs


@pytest.fixture(scope="module")
def run_with(tmp_path_factory):
    """A function that makes the run with a fault; that of each fault is made once."""

    @functools.cache
    def run_with(fault, victim=1):
        folder = tmp_path_factory.mktemp("fault") / "run"
        return Outcome(folder, *start(victim, (fault, folder)))

    return run_with


WHOLE = ("none", "nan", "nan raises", "clock", "max_time")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs after which their processes can make the next one."""
    folders = {fault: tmp_path_factory.mktemp("whole") / "run" for fault in WHOLE}
    codes, outputs = start(1, *folders.items())
    assert codes == [0, 0], "\n".join(outputs)
    parts = [re.split(r"^ran: .*\n", output, flags=re.MULTILINE) for output in outputs]
    return {
        fault: Outcome(folders[fault], codes, [part[number] for part in parts])
        for number, fault in enumerate(WHOLE)
    }


def test_a_run_without_a_fault_prints_nothing(whole):
    assert whole["none"].outputs == ["", ""]
    ours, others = whole["none"].results()
    assert (ours["stopped_by"], ours["num_steps"]) == ("num_epochs", bench.NUM_STEPS // 2)
    assert ours["digest"] == others["digest"]


def test_f14_ranks_skip_an_update_together(whole):
    ours, others = whole["nan"].results()
    assert ours["digest"] == others["digest"]
    assert (ours["num_steps"], ours["num_skipped"]) == (4, 2)
    assert (others["num_steps"], others["num_skipped"]) == (4, 2)
    assert "row id 45) on rank 1" in whole["nan"].outputs[0]


def test_ranks_raise_together_and_name_the_row(whole):
    for output in whole["nan raises"].outputs:
        assert "NonFiniteError: The loss is nan at step 2" in output
        assert "train batch 7 (row id 45) on rank 1" in output
    assert bench.saved_steps(whole["nan raises"].folder) == [1]


def test_cadences_of_time_follow_one_clock(whole):
    ours, others = whole["clock"].results()
    assert [r["step"] for r in ours["history"]] == [r["step"] for r in others["history"]]
    assert ours["digest"] == others["digest"]


def check_stopped(found):
    """The run was saved in time; return after which step."""
    last = found.log(0)[-1]["step"]  # the victim's on_step has no log
    assert max(bench.saved_steps(found.folder)) == last < bench.NUM_STEPS // 2
    return last


def test_one_rank_is_out_of_time_and_all_end(whole):
    assert [one["stopped_by"] for one in whole["max_time"].results()] == ["max_time"] * 2
    check_stopped(whole["max_time"])


@pytest.mark.parametrize("victim", [1, 0])
def test_f16_a_rank_is_killed(victim, run_with):
    found = run_with("kill", victim)
    survivor = 1 - victim
    assert found.codes[victim] == -signal.SIGKILL
    assert found.codes[survivor] not in (0, None)
    assert f"rank {victim} is gone" in found.outputs[survivor]
    assert bench.saved_steps(found.folder) == [1, 2]


@pytest.mark.parametrize("victim", [pytest.param(1, marks=pytest.mark.exhaustive), 0])
def test_f17_a_rank_raises(victim, run_with):
    found = run_with("raise", victim)
    assert found.codes == [1, 1]
    for output in found.outputs:
        assert f"rank {victim} failed" in output
        assert output.strip().splitlines()[-1].startswith(("ValueError: bad rows", "[rank"))
        assert "bad rows [" in output.strip().splitlines()[-1]


def test_a_rank_leaves_early(run_with):
    found = run_with("exit")
    assert found.codes == [1, 3]
    assert "rank 1 has ended before the others" in found.outputs[0]


@needs_to_fail_soon
def test_f18_a_rank_is_stopped(run_with):
    found = run_with("stop")
    assert 0 not in found.codes
    assert "rank 1 does not answer" in found.outputs[0]
    assert "rank 0 failed (DistributedError: rank 1 does not answer" in found.outputs[1]


def test_f19_rank_0_is_killed_between_its_save_and_its_message(run_with):
    found = run_with("killed after its save", 0)
    assert found.codes[0] == -signal.SIGKILL
    assert found.codes[1] not in (0, None)
    assert "rank 0 is gone" in found.outputs[1]
    assert bench.saved_steps(found.folder) == [1, 2]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.exhaustive)])
def test_one_rank_is_asked_to_end_and_all_do(name, run_with):
    found = run_with(name)
    assert found.codes == [128 + getattr(signal, name)] * 2, "\n".join(found.outputs)
    last = check_stopped(found)
    assert not list(found.folder.parent.glob("run.*.json"))  # train_loop has raised on both
    line = f"{name}: ended after step {last}. The same command resumes there"
    assert line in found.outputs[0]


SOME = (
    ("kill", 1),
    ("kill", 0),
    ("raise", 0),
    *((("stop", 1),) if CAN_FAIL_SOON else ()),
    ("killed after its save", 0),
    ("SIGTERM", 1),
)
OTHERS = (("raise", 1), ("SIGUSR1", 1))


@pytest.mark.parametrize("faults", [SOME, pytest.param(OTHERS, marks=pytest.mark.exhaustive)])
def test_started_again_a_run_ends_like_the_one_without_a_fault(faults, run_with, whole):
    ended = {fault: run_with(*fault) for fault in faults}
    ended["max_time"] = whole["max_time"]
    codes, outputs = start(1, *(("none", found.folder) for found in ended.values()))
    assert codes == [0, 0], "\n".join(outputs)
    for fault, found in ended.items():
        assert found.results() == whole["none"].results(), fault
        assert bench.junk(found.folder) == []


@pytest.mark.parametrize(
    ("fault", "what", "victim"),
    [
        # Of rank 0 all others learn directly, as in the tests of two ranks; of rank 2 by rank 0.
        pytest.param("kill", "is gone", 0, marks=pytest.mark.exhaustive),
        ("kill", "is gone", 2),
        pytest.param("raise", "failed (ValueError: first line)", 0, marks=pytest.mark.exhaustive),
        pytest.param("raise", "failed (ValueError: first line)", 2, marks=pytest.mark.exhaustive),
        pytest.param("stop", "does not answer", 0, marks=needs_to_fail_soon),
        pytest.param(  # 20 s of waiting
            *("stop", "does not answer", 2), marks=[needs_to_fail_soon, pytest.mark.exhaustive]
        ),
    ],
)
def test_both_survivors_of_three_name_the_failed_rank(fault, what, victim):
    children = ranks.start("talk.py", fault, victim, num_ranks=3)
    others = [child for rank, child in enumerate(children) if rank != victim]
    with suppress(AssertionError):  # one hangs: `finish` shows where
        wait_until(lambda: all(child.poll() is not None for child in others))
    children[victim].send_signal(signal.SIGCONT)
    outputs = ranks.finish(children)
    assert all(child.returncode not in (0, None) for child in children)
    for rank, output in enumerate(outputs):
        if rank != victim:
            assert f"rank {victim} {what}" in output, "\n".join(outputs)
