"""Evaluate beside training: the trial, the scored weights, what evaluate may return."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from manualloop import (
    ConfigError,
    evaluate_loop,
    find_checkpoint,
    load_checkpoint,
    prepare_strategy,
    train_loop,
)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        self.register_buffer("passes", torch.zeros(()), persistent=False)

    def forward(self, x, labels=None):
        if self.training:
            self.passes += 1
        logits = self.linear(x) / (1 + self.passes)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def draw(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    return {"x": x, "labels": torch.randint(2, (4,), generator=generator)}


BATCHES = [draw(number) for number in range(5)]


def bits(model):
    return torch.cat([weight.detach().reshape(-1).clone() for weight in model.parameters()])


def train(strategy, folder, best_metric="a_loss", returned=None, stop_after=None):
    model = Line()
    average = AveragedModel(model)
    evaluate = partial(evaluate_loop, average.module, {"a": BATCHES, "b": BATCHES[:1]}, "accuracy")
    scored = []

    def on_step(step):
        average.update_parameters(model)
        scored.append(bits(average.module))
        if step.index == stop_after:
            raise InterruptedError

    result = train_loop(
        model,
        BATCHES,
        torch.optim.SGD(model.parameters(), lr=0.5),
        None,
        num_epochs=3,
        strategy=strategy,
        extras={"average": average},
        evaluate=evaluate if returned is None else lambda: returned[0],
        best_metric=best_metric,
        checkpoint_dir=folder,
        on_step=on_step,
        progress_bar=False,
    )
    return result, scored


def expect(kind, text, call):
    with pytest.raises(kind) as raised:
        call()
    assert text in str(raised.value), raised.value


def main(folder):
    strategy = prepare_strategy("auto")
    assert strategy.world_size == 2
    model = Line()
    first = evaluate_loop(model, BATCHES, progress_bar=False)
    if strategy.rank == 0:  # which rank collects its garbage when must not matter
        gc.collect()
    assert evaluate_loop(model, BATCHES, progress_bar=False) == first
    expect(
        ConfigError,
        "returned no 'accuracy': a_loss, a_accuracy, b_loss, b_accuracy",
        lambda: train(strategy, folder / "misspelt", "accuracy"),
    )
    assert not list((folder / "misspelt").glob("step-*"))
    expect(
        ConfigError,
        "evaluate returned None",
        lambda: train(strategy, folder / "nothing", None, returned=[None]),
    )
    assert find_checkpoint(folder / "nothing").name == "step-00000003"

    whole, scored = train(strategy, folder / "whole")
    loaded = Line()
    info = load_checkpoint(folder / "whole", loaded, which="best")
    assert info.path == whole.best_checkpoint
    assert torch.equal(bits(loaded), scored[whole.best_step - 1])
    expect(InterruptedError, "", lambda: train(strategy, folder / "parts", stop_after=5))
    resumed, _ = train(strategy, folder / "parts")
    assert torch.equal(bits(resumed.state.model), bits(whole.state.model))
    assert resumed.history == whole.history
