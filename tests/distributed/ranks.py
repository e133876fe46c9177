"""Starts a script in several processes, as a launcher does but without one."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**more):
    """What every process gets; nothing that an outer launcher has set."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join([str(HERE.parent), str(HERE), str(HERE.parent / "faults")])
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return kept | fixed | {name: str(value) for name, value in more.items()}


def start(script, *args, num_ranks=2, **more):
    """Start a script of this folder in so many processes; each writes to a file of its own."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": num_ranks}
    children = []
    for rank in range(num_ranks):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        child = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "ignore", HERE / script, *map(str, args)],
            env=environment(RANK=rank, LOCAL_RANK=rank, **shared, **more),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        child.output = output
        children.append(child)
    return children


def finish(children, timeout=300):
    """Wait for all; return what each has written. Nothing is left behind."""
    deadline = time.monotonic() + timeout
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, deadline - time.monotonic()))
    hung = [child for child in children if child.poll() is None]
    for child in hung:
        child.send_signal(signal.SIGABRT)  # so that it says where it hangs
    outputs = []
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(5)
        child.kill()
        child.wait()
        child.output.seek(0)
        outputs.append(child.output.read())
        child.output.close()
    assert not hung, "\n".join(outputs)
    return outputs


def run(script, *args, num_ranks=2, timeout=300, **more):
    """Run a script of asserts to its end on all ranks; return what each has written."""
    children = start(script, *args, num_ranks=num_ranks, **more)
    outputs = finish(children, timeout)
    codes = [child.returncode for child in children]
    assert codes == [0] * num_ranks, f"{codes}\n" + "\n".join(outputs)
    return outputs
