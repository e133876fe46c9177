"""End while a gloo thread waits for Python to release a tensor, and DDP holds the group.

On Linux: print how many threads of gloo are left once the group has ended.
"""

import atexit
import sys
import time
from pathlib import Path

import torch

from manualloop import prepare_strategy


def print_num_threads():
    if sys.platform != "linux":
        print("threads not counted", flush=True)
        return
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    print(f"threads {names.count('pt_gloo_runloop')}", flush=True)


if __name__ == "__main__":
    atexit.register(print_num_threads)  # called after what is registered later
    strategy = prepare_strategy()
    model = strategy.prepare_model(torch.nn.Linear(4, 4))
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
    large = torch.ones(2_000_000)
    sys.setswitchinterval(100)  # so that the thread, once it waits, still does when Python ends
    work = torch.distributed.all_reduce(large, async_op=True)
    del large, work
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        pass
