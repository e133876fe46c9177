"""End one rank early, with a group of gloo's beside the default one, which is gone already."""

import sys
import time

import torch

from manualloop import prepare_strategy
from manualloop.strategy import liveness

if __name__ == "__main__":
    liveness.GRACE = 0.5
    strategy = prepare_strategy()
    strategy._on_host = torch.distributed.new_group(backend="gloo")  # as on an accelerator
    strategy.gather(None)
    if sys.argv[1] == "by-itself":
        torch.distributed.destroy_process_group()
    if strategy.is_main:
        time.sleep(3)  # such as to save the model
    print(f"rank {strategy.rank} is done", flush=True)
