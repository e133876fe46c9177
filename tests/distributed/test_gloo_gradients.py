"""Two gloo processes, ragged micro-batches: the gradient is that of the one big batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.distributed
def test_gradients_of_two_ranks_equal_the_big_batch():
    """gloo_gradients.py asserts on both ranks, for heads, splits and ranks without an item."""
    port = str(free_port())
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "WORLD_SIZE": "2",
    }
    children = [
        subprocess.Popen(
            [sys.executable, HERE / "gloo_gradients.py"],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    assert all("6 heads, 18 splits" in output for output in outputs), "\n".join(outputs)
