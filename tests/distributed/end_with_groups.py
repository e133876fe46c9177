"""End one rank early, with another gloo group beside the default one, which has ended."""

import sys
import time

import torch
from limits import wait_patiently

from manualloop import prepare_strategy

if __name__ == "__main__":
    wait_patiently(GRACE=0.2)
    strategy = prepare_strategy()
    strategy._on_host = torch.distributed.new_group(backend="gloo")  # as on an accelerator
    strategy.gather(None)
    if sys.argv[1] == "by-itself":
        torch.distributed.destroy_process_group()
    if strategy.is_main:
        time.sleep(0.6)  # longer than GRACE, as if it saved the model
    print(f"rank {strategy.rank} is done", flush=True)
