"""Starts a script in several processes, as a launcher does but without one."""

import itertools
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from processes import Script

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


# Below the ports that the system gives to connections; elsewhere for every process of pytest-xdist.
_ports = itertools.cycle(range(10_000, 30_000))
next(itertools.islice(_ports, os.getpid() * 97 % 20_000, None))


def free_port():
    for port in _ports:
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports are taken")


def environment(**more):
    """The environment of every process, without what an outer launcher has set."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    folders = [str(HERE.parent), str(HERE), str(HERE.parent / "faults")]
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return kept | fixed | {name: str(value) for name, value in more.items()}


def start(script, *args, num_ranks=2, **more):
    """Start a script of this folder in so many processes; each writes to a file of its own."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": num_ranks}
    return [
        Script(HERE / script, *args, env=environment(RANK=rank, LOCAL_RANK=rank, **shared, **more))
        for rank in range(num_ranks)
    ]


def finish(children, timeout=600):
    """Wait for all; return what each has written. Nothing is left behind."""
    deadline = time.monotonic() + timeout
    is_over = [child.end(max(0.1, deadline - time.monotonic())) for child in children]
    outputs = [child.output for child in children]
    assert all(is_over), "\n".join(outputs)
    return outputs


def run(script, *args, num_ranks=2, **more):
    """Run a script of asserts to its end on all ranks; return what each has written."""
    children = start(script, *args, num_ranks=num_ranks, **more)
    outputs = finish(children)
    codes = [child.returncode for child in children]
    assert codes == [0] * num_ranks, f"{codes}\n" + "\n".join(outputs)
    return outputs
