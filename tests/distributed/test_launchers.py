"""How many processes each way of starting gives on a CPU; fewer than requested are reported."""

import subprocess
import sys
from pathlib import Path

import accelerate
import processes
import pytest
import ranks
import torch
from accelerate import Accelerator

from manualloop import ConfigError, DistributedError, launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without one"),
]

BIN = Path(sys.executable).parent
SCRIPT = ranks.HERE / "count_ranks.py"
FEWER = "2 processes were asked for, and 1 is running"
CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_processes: 2
num_machines: 1
machine_rank: 0
use_cpu: true
mixed_precision: 'no'
"""


def start(script, *arguments, **more):
    done = processes.run(script, *arguments, env=ranks.environment(**more))
    return done.returncode, done.output


def in_new_python(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=ranks.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.exhaustive  # accelerate's launcher is torchrun inside, and sets the same and more
def test_torchrun_starts_two():
    code, output = start(BIN / "torchrun", "--standalone", "--nproc_per_node=2", SCRIPT)
    assert code == 0, output
    assert "RANKS [0, 1]" in output
    assert FEWER not in output


def test_accelerate_starts_two_with_its_own_flags():
    code, output = start(
        *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2"),
        *("--main_process_port", ranks.free_port(), SCRIPT),
        ACCELERATE_USE_CPU=1,
    )
    assert code == 0, output
    assert "RANKS [0, 1]" in output
    assert FEWER not in output


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux to see what was asked for")
@pytest.mark.exhaustive
@pytest.mark.parametrize("by", ["arguments", "config"])
def test_accelerate_starts_one_and_that_is_reported(by, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    options = {
        "arguments": ("--cpu", "--num_processes", "2"),
        "config": ("--config_file", tmp_path / "config.yaml"),
    }
    # A real interpreter: what was asked for is read from the launcher's command line.
    output = in_new_python(BIN / "accelerate", "launch", *options[by], SCRIPT)
    assert "RANKS [0]" in output
    assert FEWER in output
    assert "torchrun" in output


@pytest.mark.skipif(
    accelerate.__version__.startswith("1.7."), reason="accelerate 1.7 joins processes on a CPU"
)
def test_an_accelerator_that_ignores_the_other_ranks_is_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import Accelerator; from manualloop import prepare_strategy\n"
        "prepare_strategy(Accelerator())\n"
    )
    children = ranks.start(script)
    for output in ranks.finish(children):
        assert "DistributedError: A launcher started 2 processes" in output
        assert "Accelerator(cpu=True)" in output
    assert [child.returncode for child in children] == [1, 1]


def test_a_process_waits_for_the_threads_of_gloo_before_python_ends():
    """Else one that still holds a tensor is ended by force, and the process is aborted.

    None outlives the group, which a function of torch's held by a default argument once DDP had
    been used.
    """
    for output in ranks.run("end_with_a_thread.py"):
        assert output.splitlines()[-1] in ("threads 0", "threads not counted")


@pytest.mark.parametrize("groups_end", ["by-itself", "by-us"])
def test_a_rank_that_ends_early_ends_no_other(groups_end):
    outputs = ranks.run("end_with_groups.py", groups_end)
    assert [f"rank {rank} is done" in output for rank, output in enumerate(outputs)] == [True] * 2
    assert not any("gone" in output for output in outputs)


LAUNCHED = """
import sys, torch
from manualloop import launch, prepare_strategy

def report(text):
    strategy = prepare_strategy()
    matrix = torch.randn(300, 300) @ torch.randn(300, 300)
    found = strategy.gather((strategy.rank, text, bool(matrix.isfinite().all())))
    if strategy.is_main:
        print("FOUND", found, flush=True)

def fail():
    strategy = prepare_strategy()
    if strategy.rank == 1:
        raise ValueError("row 17 is bad")
    strategy.gather(None)

if __name__ == "__main__":
    torch.set_num_threads(2)
    for _ in range(3):  # the threads of OpenMP do not outlive a fork
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    launch(report, ["one"], num_processes=2)
    launch(report, ["two"], num_processes=2)
    launch(fail, num_processes=2)
"""


def test_launch_starts_two_processes_repeatedly_and_raises_their_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    code, output = start(script)
    assert code == 1
    for text in ("one", "two"):
        assert f"FOUND [(0, '{text}', True), (1, '{text}', True)]" in output
    assert "rank 1 failed (ValueError: row 17 is bad)" in output
    assert output.index("FOUND [(0, 'one'") < output.index("FOUND [(0, 'two'")


def test_launch_in_one_process_calls_the_function():
    seen = []
    launch(seen.append, ["here"], num_processes=1)
    launch(seen.append, ["there"])
    assert seen == ["here", "there"]


def test_launch_refuses_impossible_requests(monkeypatch):
    with pytest.raises(ConfigError, match=r"num_processes must be .* at least 1, got 0"):
        launch(print, num_processes=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="plain python"):
        launch(print, num_processes=2)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(DistributedError, match=r"CUDA was used .* before launch"):
        launch(print, num_processes=2)


def test_launch_after_an_accelerator_was_made_is_refused():
    Accelerator(cpu=True)
    with pytest.raises(DistributedError, match="An Accelerator was made in this process"):
        launch(print, num_processes=2)
