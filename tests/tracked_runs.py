"""A small run with trackers, which a SIGKILL can end at any step and at any call of a tracker."""

import multiprocessing
import os
import signal

import torch
from torch import nn

from manualloop import train_loop

FORK = multiprocessing.get_context("fork")
NUM_STEPS = 10


def train(folder, trackers, on_step=None, **options):
    """Train for ten updates: 10 records, 4 of them of evaluations; checkpoints at 4, 8 and 10."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    batches = [torch.randn(3, 2, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    settings = {
        "num_epochs": 2,
        "log_every": 2,
        "evaluate": lambda: {"f1": float(model.weight.detach().sum()), "text": "good"},
        "evaluate_every": 3,
        "checkpoint_every": 4,
        **options,
    }
    return train_loop(
        model,
        batches,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=lambda model, batch: model(batch).square().mean(),
        checkpoint_dir=folder,
        trackers=trackers,
        on_step=on_step,
        progress_bar=False,
        **settings,
    )


def kill_here():
    os.kill(os.getpid(), signal.SIGKILL)


class KilledAt:
    """A tracker whose process is killed before or after its n-th call."""

    def __init__(self, tracker, number, *, is_after):
        self.tracker, self.number, self.is_after, self.count = tracker, number, is_after, 0

    def __call__(self, record):
        self.count += 1
        if self.count == self.number and not self.is_after:
            kill_here()
        self.tracker(record)
        if self.count == self.number and self.is_after:
            kill_here()

    def __getattr__(self, name):
        return getattr(self.tracker, name)


def killed_at_step(step):
    """Return an ``on_step`` that kills the process."""

    def on_step(done):
        if done.index == step:
            kill_here()

    return on_step


def killed(function, *args, **options):
    """Call a function in a process of its own, which must be killed on the way."""
    process = FORK.Process(target=function, args=args, kwargs=options)
    process.start()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL, process.exitcode
