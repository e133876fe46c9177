"""The example, unchanged, under two launchers: killed in the midst of an epoch, started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL"),
]

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [BIN / "torchrun", "--nproc_per_node=2", "--master_port"],
    "accelerate": [
        *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes=2"),
        "--main_process_port",
    ],
}


def start(launcher, folder, shared):
    model = ("hidden_size=64", "num_hidden_layers=2", "num_attention_heads=2")
    command = [
        *LAUNCHERS[launcher],
        ranks.free_port(),
        ranks.ROOT / "examples" / "train_glue.py",
        *("--task", "mrpc", "--data", shared / "glue" / "mrpc"),
        *("--tokenizer", shared / "tokenizers" / "bert-base-uncased"),
        *("--config", *model, "intermediate_size=128", "--lr", "1e-3", "--max-grad-norm", "1"),
        *("--max-train-rows", "401", "--batch-size", "2", "--accumulation", "2"),
        *("--num-epochs", "1", "--checkpoint-every", "10", "--checkpoint-dir", folder),
    ]
    return subprocess.Popen(
        list(map(str, command)),
        env=ranks.environment(ACCELERATE_USE_CPU=1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(child):
    output, _ = child.communicate(timeout=300)
    assert child.returncode == 0, output
    return output


def kill(child, folder):
    """SIGKILL to launcher and ranks once the third checkpoint is there, of six."""
    deadline = time.monotonic() + 120
    while not (folder / "step-00000030").exists() and time.monotonic() < deadline:
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.01)
    for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
        process.send_signal(signal.SIGKILL)
    child.communicate()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_in_the_midst_and_started_again(launcher, shared, tmp_path):
    expected = finish(start(launcher, tmp_path / "undisturbed", shared))
    assert "TrainResult(51 steps, stopped_by='num_epochs'" in expected
    folder = tmp_path / "killed"
    kill(start(launcher, folder, shared), folder)
    assert not (folder / "step-00000051").exists()
    output = finish(start(launcher, folder, shared))
    assert "manualloop: resuming from" in output
    results = [
        [line for line in text.splitlines() if line.startswith(("TrainResult", "last", "best"))]
        for text in (expected, output)
    ]
    assert results[0] == results[1]
    assert len(results[0]) == 3, "rank 0 alone prints"
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        ours, theirs = (f / "step-00000051" / name for f in (folder, tmp_path / "undisturbed"))
        assert ours.read_bytes() == theirs.read_bytes(), name
