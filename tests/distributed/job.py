"""The script of the MRPC job, as it stands, on two ranks: best model and TensorBoard of rank 0."""

import os
from pathlib import Path

import mrpc_job
import torch

from manualloop import prepare_strategy


def main(folder):
    shared = os.environ.get("MANUALLOOP_SHARED")
    if not shared:
        return
    strategy = prepare_strategy()
    if strategy.is_main:
        mrpc_job.lay_out(folder, Path(shared))
    strategy.gather(None)
    result = mrpc_job.run(folder)["result"]
    assert result.state.progress.num_steps == 12
    assert result.best_checkpoint == strategy.gather(result.best_checkpoint)[0]
    assert len(list((folder / "runs" / "mrpc" / "tensorboard").glob("events.*"))) == 1
    weights = [parameter.detach() for parameter in result.state.model.parameters()]
    for one, other in zip(*strategy.gather(weights), strict=True):
        assert torch.equal(one, other)
