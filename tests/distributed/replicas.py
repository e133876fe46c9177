"""The ranks keep one model: what is trained, wrapped or built otherwise is exact, or told."""

import logging
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from manualloop import (
    DistributedError,
    ModelError,
    evaluate_loop,
    prepare_strategy,
    train_loop,
)

NUM_ROWS, GLOBAL_BATCH = 30, 12


class Net(nn.Module):
    """Layers that are used in another order than they are built in."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Linear(16, 3)
            self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
            self.body = nn.Linear(5, 16)

    def forward(self, x, labels=None):
        hidden = self.body(x)
        for number in (2, 0, 3, 1):
            hidden = hidden + torch.tanh(self.layers[number](hidden))
        logits = self.head(hidden)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def rows(dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, 5, generator=draw).to(dtype)
    return x, torch.randint(0, 3, (NUM_ROWS,), generator=draw)


def loss_fn(model, batch):
    x, labels = batch
    return model(x, labels)["loss"]


def optimizer_of(model):
    return AdamW(model.parameters(), lr=1e-2)


def train(strategy, model, optimizer=None, **options):
    data = TensorDataset(*rows(next(model.parameters()).dtype))
    train_loop(
        model,
        DataLoader(data, GLOBAL_BATCH // strategy.world_size),
        optimizer or optimizer_of(model),
        None,
        loss_fn=loss_fn,
        strategy=strategy,
        progress_bar=False,
        **{"num_epochs": 1, **options},
    )


def by_hand(model, after=None, optimizer=None):
    """Make the updates of an epoch in a plain loop; ``after`` is called with their numbers."""
    x, labels = rows()
    optimizer = optimizer or optimizer_of(model)
    for number, begin in enumerate(range(0, NUM_ROWS, GLOBAL_BATCH), 1):
        batch = slice(begin, begin + GLOBAL_BATCH)
        optimizer.zero_grad()
        model(x[batch], labels[batch])["loss"].backward()
        optimizer.step()
        if after is not None:
            after(number)


def check_same(strategy, model, reference):
    """Compare the weights with those of one process, and with those of the other ranks."""
    for weight, right in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, right, rtol=1e-9, atol=1e-12)
        assert len({of_rank.sum().item() for of_rank in strategy.gather(weight.detach())}) == 1


def check_compiled(strategy):
    model, reference = Net().double(), Net().double()
    train(strategy, torch.compile(model, backend="eager"))
    by_hand(reference)
    check_same(strategy, model, reference)


def check_unfrozen_between(strategy):
    model, reference = Net().double(), Net().double()
    for net in (model, reference):
        net.body.requires_grad_(False)
    train(strategy, model)
    by_hand(reference)
    for net in (model, reference):
        net.body.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            # A head that each rank draws for itself: that of rank 0 counts.
            torch.manual_seed(strategy.rank if net is model else 0)
            net.head = nn.Linear(16, 3).double()
    train(strategy, model)
    by_hand(reference)
    check_same(strategy, model, reference)


def check_drawn_anew(strategy):
    model, reference = Net().double(), Net().double()
    train(strategy, model)
    by_hand(reference)
    for net, seed in ((model, strategy.rank), (reference, 0)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net.head.reset_parameters()
    train(strategy, model)
    by_hand(reference)
    check_same(strategy, model, reference)


def check_changed_within(strategy):
    model, reference = Net().double(), Net().double()

    def change(net, number):
        net.layers[1].requires_grad_(number == 1)
        net.body.requires_grad_(number != 1)

    for net in (model, reference):
        change(net, 0)
    train(strategy, model, on_step=lambda step: change(model, step.index))
    by_hand(reference, lambda number: change(reference, number))
    check_same(strategy, model, reference)


def check_frozen_whole(strategy):
    model, reference = Net().double().requires_grad_(False), Net().double()
    x, labels = rows()
    loader = DataLoader(
        [{"x": one, "labels": label} for one, label in zip(x, labels, strict=True)], 4
    )
    scores = evaluate_loop(model, loader, "accuracy", strategy=strategy)
    right = reference(x, labels)
    assert abs(scores["loss"] - float(right["loss"])) < 1e-9
    train(strategy, model.requires_grad_(True))
    by_hand(reference)
    check_same(strategy, model, reference)


def check_given_wrapper(strategy):
    """A wrapper of the script cannot be made anew."""
    model = Net().double()
    model.body.requires_grad_(False)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(strategy, wrapped)
    model.body.requires_grad_(True)
    message = refused(ModelError, lambda: train(strategy, wrapped))
    assert "Pass the model without it" in message, message


def check_sparse(strategy):
    """Of a sparse gradient DDP takes no other kind."""
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True))
    data = DataLoader(TensorDataset(torch.arange(8), torch.arange(8) % 3), 2)
    train_loop(
        model,
        data,
        torch.optim.SparseAdam(list(model.parameters())),
        None,
        num_epochs=1,
        loss_fn=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        strategy=strategy,
        progress_bar=False,
    )
    weights = strategy.gather(model[0].weight.detach())
    assert all(torch.equal(weights[0], other) for other in weights)


def refused(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was refused")


def check_unused(strategy):
    """DDP itself would let this update pass, and each rank would have weights of its own."""
    model = Net().double()
    model.pooler = nn.Linear(2, 2).double()
    before = [weight.detach().clone() for weight in model.parameters()]
    message = refused(ModelError, lambda: train(strategy, model, num_epochs=None, max_steps=1))
    assert "a gradient of each: pooler.weight, pooler.bias." in message, message
    for weight, right in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, right)
    model.pooler.requires_grad_(False)  # as the message says
    train(strategy, model)


def check_searched(strategy):
    """The other line of the message: the ranks look for what is not used."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    looks = DistributedDataParallelKwargs(find_unused_parameters=True)
    looking = prepare_strategy(Accelerator(cpu=True, kwargs_handlers=[looks]))
    model, reference = Net().double(), Net().double()
    model.pooler = nn.Linear(2, 2).double()
    reference.pooler = nn.Linear(2, 2).double()
    reference.pooler.load_state_dict(model.pooler.state_dict())
    train(looking, model)
    by_hand(reference)
    check_same(strategy, model.body, reference.body)


def check_built_otherwise(strategy):
    model = Net()
    optimizer = AdamW(model.parameters(), lr=0.01 * (1 + strategy.rank))
    message = refused(DistributedError, lambda: train(strategy, model, optimizer))
    assert "- lr: 0.01, 0.02" in message, message
    model.body.requires_grad_(strategy.is_main)
    message = refused(DistributedError, lambda: train(strategy, model))
    assert "- frozen parameters: 0 of 12, 2 of 12" in message, message


def check_told_apart(strategy):
    model, lines = Net(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("manualloop")
    logger.addHandler(handler)

    def on_step(step):
        with torch.no_grad():
            model.body.weight.add_(0.01 * strategy.rank)

    train(strategy, model, on_step=on_step)
    told = [line for line in lines if "are not those of rank 0 after step 3" in line]
    assert len(told) == strategy.is_main, lines
    lines.clear()
    train(strategy, Net(), on_step=lambda step: None)
    logger.removeHandler(handler)
    assert not [line for line in lines if "are not those of rank 0" in line], lines


def check_resumed(strategy, folder):
    """The first update after a resume is rounded as in a run that was never stopped."""

    def stop(step):
        if step.index == 2:
            raise InterruptedError

    whole, model = Net(), Net()
    train(strategy, whole)
    options = {"checkpoint_dir": folder / "resumed", "checkpoint_every": 1}
    refused(InterruptedError, lambda: train(strategy, Net(), on_step=stop, **options))
    train(strategy, model, **options)
    for weight, right in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, right)


def main(folder):
    strategy = prepare_strategy()
    check_compiled(strategy)
    check_unfrozen_between(strategy)
    check_drawn_anew(strategy)
    check_changed_within(strategy)
    check_frozen_whole(strategy)
    check_given_wrapper(strategy)
    check_sparse(strategy)
    check_unused(strategy)
    check_searched(strategy)
    check_built_otherwise(strategy)
    check_told_apart(strategy)
    check_resumed(strategy, folder)


if __name__ == "__main__":  # with three ranks, of which sums have an order
    main(Path(sys.argv[1]))
