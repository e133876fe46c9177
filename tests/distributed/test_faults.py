"""Ranks that fail, and decisions that ranks must share, in two gloo processes.

There is no launcher, so the surviving ranks must end by themselves.
"""

import json
import os
import signal
from contextlib import suppress

import bench
import pytest
import ranks
from processes import wait_until

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    found = Outcome(tmp_path_factory.mktemp("undisturbed") / "run", "none", 1)
    assert found.codes == [0, 0], "\n".join(found.outputs)
    assert "".join(found.outputs).strip() == ""
    return found


class Outcome:
    """A run on two ranks with a fault on one, and how each ended.

    No limit of time is set that could end a rank: one that ends knows of the other's fault.
    """

    def __init__(self, folder, fault, victim):
        self.folder = folder
        for rank in range(2):
            folder.with_name(f"run.{rank}.json").unlink(missing_ok=True)
        children = ranks.start("fault_run.py", folder, fault, victim)
        if fault == "stop":
            with suppress(AssertionError):  # it hangs: `finish` shows where
                wait_until(lambda: children[1 - victim].poll() is not None)
            children[victim].send_signal(signal.SIGCONT)
        self.outputs = ranks.finish(children)
        self.codes = [child.returncode for child in children]

    def results(self):
        return [json.loads(self.folder.with_name(f"run.{r}.json").read_text()) for r in range(2)]


def finish(folder, expected):
    """Start the same command again; it must end like the run without a fault."""
    again = Outcome(folder, "none", 1)
    assert again.codes == [0, 0], "\n".join(again.outputs)
    assert again.results() == expected.results()
    assert bench.junk(folder) == []


def test_f14_ranks_skip_an_update_together(tmp_path):
    found = Outcome(tmp_path / "run", "nan", 1)
    assert found.codes == [0, 0], "\n".join(found.outputs)
    ours, others = found.results()
    assert ours["digest"] == others["digest"]
    assert (ours["num_steps"], ours["num_skipped"]) == (4, 2)
    assert (others["num_steps"], others["num_skipped"]) == (4, 2)
    assert "row id 45) on rank 1" in found.outputs[0]


def test_ranks_raise_together_and_name_the_row(tmp_path):
    found = Outcome(tmp_path / "run", "nan raises", 1)
    assert found.codes == [1, 1]
    for output in found.outputs:
        assert "NonFiniteError: The loss is nan at step 2" in output
        assert "train batch 7 (row id 45) on rank 1" in output
    assert bench.saved_steps(found.folder) == [1]


@pytest.mark.parametrize("victim", [1, 0])
def test_f16_a_rank_is_killed(victim, tmp_path, undisturbed):
    found = Outcome(tmp_path / "run", "kill", victim)
    survivor = 1 - victim
    assert found.codes[victim] == -signal.SIGKILL
    assert found.codes[survivor] not in (0, None)
    assert f"rank {victim} is gone" in found.outputs[survivor]
    assert bench.saved_steps(found.folder) == [1, 2]
    finish(found.folder, undisturbed)


@pytest.mark.parametrize("victim", [pytest.param(1, marks=pytest.mark.exhaustive), 0])
def test_f17_a_rank_raises(victim, tmp_path, undisturbed):
    found = Outcome(tmp_path / "run", "raise", victim)
    assert found.codes == [1, 1]
    for output in found.outputs:
        assert f"rank {victim} failed" in output
        assert output.strip().splitlines()[-1].startswith(("ValueError: bad rows", "[rank"))
        assert "bad rows [" in output.strip().splitlines()[-1]
    finish(found.folder, undisturbed)


def test_a_rank_leaves_early(tmp_path):
    found = Outcome(tmp_path / "run", "exit", 1)
    assert found.codes == [1, 3]
    assert "rank 1 has ended before the others" in found.outputs[0]


def test_f18_a_rank_is_stopped(tmp_path, undisturbed):
    found = Outcome(tmp_path / "run", "stop", 1)
    assert 0 not in found.codes
    assert "rank 1 does not answer" in found.outputs[0]
    assert "rank 0 failed (DistributedError: rank 1 does not answer" in found.outputs[1]
    finish(found.folder, undisturbed)


def test_f19_rank_0_is_killed_between_its_save_and_its_message(tmp_path, undisturbed):
    found = Outcome(tmp_path / "run", "killed after its save", 0)
    assert found.codes[0] == -signal.SIGKILL
    assert found.codes[1] not in (0, None)
    assert "rank 0 is gone" in found.outputs[1]
    assert bench.saved_steps(found.folder) == [1, 2]
    finish(found.folder, undisturbed)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("SIGTERM", 143),
        pytest.param("SIGUSR1", 128 + signal.SIGUSR1, marks=pytest.mark.exhaustive),
        ("max_time", 0),
    ],
)
def test_one_rank_is_asked_to_end_and_all_do(fault, code, tmp_path, undisturbed):
    found = Outcome(tmp_path / "run", fault, 1)
    assert found.codes == [code, code], "\n".join(found.outputs)
    last = log_of(found.folder, 0)[-1]["step"]  # the victim's on_step has no log
    assert max(bench.saved_steps(found.folder)) == last < bench.NUM_STEPS // 2
    if fault == "max_time":
        assert [one["stopped_by"] for one in found.results()] == [fault, fault]
    else:  # train_loop has raised on both
        assert not list(tmp_path.glob("run.*.json"))
        line = f"{fault}: ended after step {last}. The same command resumes there"
        assert line in found.outputs[0]
    finish(found.folder, undisturbed)


def log_of(folder, rank):
    lines = folder.with_name(f"run.{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("fault", "what", "victim"),
    [
        ("kill", "is gone", 0),
        ("kill", "is gone", 2),
        ("raise", "failed (ValueError: first line)", 0),
        ("raise", "failed (ValueError: first line)", 2),
        ("stop", "does not answer", 0),
        pytest.param("stop", "does not answer", 2, marks=pytest.mark.exhaustive),  # 20 s of waiting
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


def test_cadences_of_time_follow_one_clock(tmp_path):
    found = Outcome(tmp_path / "run", "clock", 1)
    assert found.codes == [0, 0], "\n".join(found.outputs)
    ours, others = found.results()
    assert [r["step"] for r in ours["history"]] == [r["step"] for r in others["history"]]
    assert ours["digest"] == others["digest"]
