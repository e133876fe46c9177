"""Functions that take all ranks, called on one of them alone."""

import time

import torch
from limits import fail_soon
from torch import nn

from manualloop import (
    DistributedError,
    TrainState,
    accumulate_gradients,
    check_accumulation,
    evaluate_loop,
    load_checkpoint,
    predict_loop,
    prepare_strategy,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.strategy import liveness

BATCHES = [{"x": torch.randn(2, 3), "labels": torch.tensor([0, 1])} for _ in range(4)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x, labels):
        logits = self.head(x)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def new_state():
    torch.manual_seed(0)
    model = Net()
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))


def error_of(call):
    try:
        call()
    except DistributedError as error:
        return str(error)
    return "no error"


def main(folder):
    """Leave the ranks without a connection: nothing that takes both can follow."""
    strategy = prepare_strategy()
    trained = new_state()
    for _ in train_steps(trained, BATCHES, max_steps=1, strategy=strategy):
        save_checkpoint(folder / "whole", trained)

    def train():
        steps = train_steps(new_state(), BATCHES, max_steps=3, strategy=strategy)
        next(steps)
        return steps

    def evaluate(model=trained.model):
        return evaluate_loop(model, BATCHES, "accuracy", strategy=strategy)

    def crossed(name, first, second, other):
        """Call two functions on the ranks; both are told that `name` belongs on every rank."""
        text = error_of((first, second)[strategy.rank])
        assert f"{name} must be called on every rank: rank 0 is in {name}" in text, text
        assert f"rank 1 is in {other}" in text, text
        assert strategy.gather(strategy.rank) == [0, 1]  # the ranks are where they were

    steps = train()
    crossed("evaluate_loop", evaluate, lambda: next(steps), "train_steps")
    steps = train()
    # A model that no strategy has prepared would be wrapped first, which takes all ranks.
    crossed("evaluate_loop", lambda: evaluate(Net()), lambda: next(steps), "train_steps")
    steps, state = train(), trained

    def save():
        return save_checkpoint(folder / "half", state)

    crossed("save_checkpoint", save, lambda: next(steps), "train_steps")
    assert not (folder / "half").exists()
    steps = train()

    def load():
        return load_checkpoint(folder / "whole", state)

    crossed("load_checkpoint", load, lambda: next(steps), "train_steps")

    def predict():
        return predict_loop(trained.model, BATCHES)

    crossed("predict_loop", predict, lambda: strategy.gather(1), "strategy.gather")
    crossed("predict_loop", predict, lambda: strategy.sum_counts([1]), "strategy.sum_counts")

    def check():
        return check_accumulation(trained.model, BATCHES[0])

    crossed("check_accumulation", check, lambda: train(), "train_steps")

    def accumulate():
        return accumulate_gradients(trained.model, BATCHES[:1])

    crossed("accumulate_gradients", accumulate, lambda: train(), "train_steps")
    text = error_of((save, evaluate)[strategy.rank])
    assert text.startswith("save_checkpoint and evaluate_loop must be called"), text

    def loop(**options):
        model = new_state().model
        return train_loop(model, BATCHES, num_epochs=1, strategy=strategy, **options)

    crossed("evaluate_loop", evaluate, lambda: loop(progress_bar=False), "train_loop")
    inside = {"evaluate": lambda: evaluate() if strategy.is_main else {}}
    crossed("evaluate_loop", *[lambda: loop(**inside, progress_bar=False)] * 2, "train_loop")
    for name, value in {"evaluate": evaluate, "checkpoint_dir": folder / "one"}.items():
        text = error_of(lambda: loop(**{name: value if strategy.is_main else None}))  # noqa: B023
        assert (
            f"train_loop was called with different arguments: {name} is given on rank 0, and"
            in text
        )
        assert strategy.gather(strategy.rank) == [0, 1]
    assert not (folder / "one").exists()
    text = error_of(
        lambda: evaluate_loop(trained.model, BATCHES, "accuracy" if strategy.is_main else None)
    )
    assert "metric is 'accuracy' on rank 0, and None on rank 1" in text, text

    wait_in_vain(strategy, evaluate, folder / "told")


def wait_in_vain(strategy, evaluate, told):
    """Rank 1 does something else for longer than the ranks wait for each other."""
    liveness._REPORT = liveness._ANSWER = 3600.0  # the other rank answers, however late
    if strategy.is_main:
        liveness._REPORT = 0.0  # nobody will report
        fail_soon()
        text = error_of(evaluate)
        told.touch()
    else:
        while not told.exists():
            time.sleep(0.01)
        text = error_of(evaluate)
    assert "evaluate_loop must be called on every rank. Rank 0 has waited in it" in text, text
    assert "rank 1 is not in a function that takes all ranks" in text, text
