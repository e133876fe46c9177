"""Count the instructions of a step with valgrind's callgrind: a busy machine changes none of them.

``side_by_side.py --only instructions`` makes a table of them. The file itself is the process that
valgrind watches: its argument is the name of a contestant of ``loops.py``. Bars count steps, but do
not draw: they do so by the clock, and under valgrind a step takes fifty times as long.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from jobs import linear_job
from loops import OVERHEAD

LENGTHS = (60, 160)  # steps of two runs, whose difference is that of 100 steps alone


def per_step(name):
    """Return the instructions of a step of a contestant."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={out}", sys.executable, __file__, name]
        # The order of a set, and with it a count, depends on the seed of the hashes.
        environment = os.environ | {"PYTHONHASHSEED": "0", "TQDM_MININTERVAL": "3600"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        texts = [out.with_suffix(f".{number}").read_text() for number in (1, 2)]
    short, long = (int(re.search(r"^summary: (\d+)", text, re.MULTILINE)[1]) for text in texts)
    return (long - short) / (LENGTHS[1] - LENGTHS[0])


def main(name):
    torch.set_num_threads(1)
    train(name, 20)
    control("--instr=on")
    for num_steps in LENGTHS:
        control("--zero")
        train(name, num_steps)
        control("--dump")
    os._exit(0)  # what Python does at its end would be counted into another file


def train(name, num_steps):
    _, run = OVERHEAD[name](linear_job(num_steps))
    torch.manual_seed(1)
    run()


def control(option):
    done = subprocess.run(
        ["callgrind_control", option, str(os.getpid())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main(sys.argv[1])
