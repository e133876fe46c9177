"""Layers with statistics over the batch: lone rows, and splits that are other updates."""

import copy
import logging
from functools import partial

import pytest
import torch
from datasets import Dataset
from helpers import messages
from torch import nn
from torch.utils.data import DataLoader

from manualloop import (
    DataError,
    TrainState,
    accumulate_gradients,
    prepare_dataloaders,
    train_loop,
    train_steps,
)


class Normalised(torch.nn.Module):
    def __init__(self, kind=torch.nn.BatchNorm1d):
        super().__init__()
        self.norm, self.head = kind(2), torch.nn.Linear(2, 2)

    def forward(self, x, labels):
        x = self.norm(x)
        x = self.head(x.mean(dim=(2, 3)) if x.ndim == 4 else x)
        return {"loss": torch.nn.functional.cross_entropy(x, labels), "logits": x}


def rows_of(num_rows, *shape):
    return [{"x": torch.randn(2, *shape), "labels": n % 2} for n in range(num_rows)]


def trained(model, loader, **options):
    options = {
        "progress_bar": False,
        "num_epochs": None if "max_steps" in options else 1,
        **options,
    }
    return train_loop(model, loader, **options).state.progress.num_steps


def test_a_lone_last_row_under_batch_normalisation_is_refused_before_the_first_update():
    def own(model, batch):
        return model(**batch)["loss"]

    for loss_fn, start in ((None, torch.nn.Module.train), (own, torch.nn.Module.eval)):
        start(model := Normalised())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(DataError, match=r"each epoch has one row.*drop_last=True"):
            trained(model, DataLoader(rows_of(5), 2), loss_fn=loss_fn)
        assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    data = Dataset.from_list([{"x": [0.5, n], "labels": n % 2} for n in range(5)])
    loader = prepare_dataloaders({"train": data}, model=Normalised(), batch_size=2)["train"]
    with pytest.raises(DataError, match="one row"):
        trained(Normalised(), loader)


def test_a_lone_last_row_that_is_never_read_or_can_be_normalised_is_none():
    def frozen():
        model = Normalised()
        model.norm.eval()
        return model

    pixels = partial(Normalised, torch.nn.BatchNorm2d)
    assert trained(Normalised(), DataLoader(rows_of(5), 2, drop_last=True)) == 2
    assert trained(Normalised(), DataLoader(rows_of(5), 2), max_steps=2) == 2
    assert trained(Normalised(), DataLoader(rows_of(6), 2)) == 3
    assert trained(frozen(), DataLoader(rows_of(5), 2)) == 3
    assert trained(pixels(), DataLoader(rows_of(5, 3, 3), 2)) == 3
    torch.manual_seed(0)
    model, other = pixels(), pixels()
    other.load_state_dict(model.state_dict())
    trained(model, DataLoader(rows := rows_of(5, 3, 3), 2))
    trained(other, DataLoader(rows, 2), preflight=False)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert torch.equal(model.norm.running_mean, other.norm.running_mean)


@pytest.mark.parametrize("by_hand", [False, True])
def test_batch_normalisation_under_accumulation_is_reported_once(by_hand, caplog):
    caplog.set_level(logging.INFO, "manualloop")

    def run(model, num_batches=2):
        caplog.clear()
        batches = [{"x": torch.randn(4, 2)} for _ in range(num_batches)]
        if by_hand:
            for _ in range(2):
                accumulate_gradients(model, batches, loss_fn=loss_fn)
        else:
            state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
            options = {"gradient_accumulation_steps": 2, "loss_fn": loss_fn}
            list(train_steps(state, batches, max_steps=2, **options))
        return [line for line in messages(caplog) if "computes statistics" in line]

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean()

    def build(**options):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, **options))

    frozen = build()
    frozen[1].eval()
    assert len(run(build())) == 1
    assert run(frozen) == run(nn.Linear(2, 1)) == run(build(), 1) == []
