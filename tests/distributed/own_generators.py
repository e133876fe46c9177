"""Each rank draws from generators of its own; the run is interrupted, resumed and compared."""

import random

import pytest
import torch
from torch import nn

from manualloop import prepare_strategy, train_loop


def train(rank, folder=None, stop_after=None):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    noise, extra = random.Random(10 + rank), torch.Generator().manual_seed(rank)
    batches = [{"x": torch.full((2, 2), i / 8)} for i in range(8)]

    def loss_fn(model, batch):
        return (model(batch["x"]) * (1 + noise.random())).square().mean()

    def on_step(step):
        torch.rand(1 + rank, generator=extra)
        if step.index == stop_after:
            raise KeyError(step.index)

    train_loop(
        model,
        batches,
        torch.optim.SGD(model.parameters(), lr=0.1),
        num_epochs=2,
        loss_fn=loss_fn,
        on_step=on_step,
        extras={"extra": extra},
        checkpoint_dir=folder,
        checkpoint_every=2,
        progress_bar=False,
    )
    return model.weight.tolist(), torch.rand(2, generator=extra).tolist(), noise.random()


def main(folder):
    rank = prepare_strategy().rank
    whole = train(rank)
    with pytest.raises(KeyError):
        train(rank, folder, stop_after=5)
    assert train(rank, folder) == whole
