"""Train and score batches of several kinds, the last of them a spare; equal to one process."""

import torch
import torch.nn.functional as F
from torch import nn

from manualloop import SingleDevice, TrainState, evaluate_loop, prepare_strategy, train_steps


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x, labels):
        logits = self.linear(x)
        loss = F.mse_loss if labels.is_floating_point() else F.cross_entropy
        return {"loss": loss(logits, labels), "logits": logits}


def draw(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 3, dtype=torch.float64, generator=generator)
    if num_rows % 2:
        labels = torch.randn(num_rows, 2, dtype=torch.float64, generator=generator)
        labels[0, 0] = -100.0  # a value like any other
        return {"x": x, "labels": labels}
    labels = torch.randint(2, (num_rows,), generator=generator)
    labels[0] = -100
    return {"x": x, "labels": labels}


def by_square(model, batch):
    """Counts items that the labels do not show."""
    return model(**batch)["logits"].square().mean(), 2 * len(batch["x"])


def train(strategy, window, loss_fn):
    model = Line()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    options = {"gradient_accumulation_steps": window, "loss_fn": loss_fn, "strategy": strategy}
    steps = list(train_steps(state, batches, num_epochs=2, **options))
    scored = evaluate_loop(state.model, batches, strategy=strategy, loss_fn=loss_fn)
    return [step.num_items for step in steps], [*model.parameters()], scored["loss"]


batches = [draw(number) for number in (4, 5, 6, 3, 7)]  # rank 1 of 2 has no third batch


def main(folder):
    strategy = prepare_strategy("auto")
    assert strategy.world_size == 2
    for loss_fn in (None, by_square):
        items, weights, loss = train(strategy, 2, loss_fn)
        expected, own, own_loss = train(SingleDevice(), 4, loss_fn)
        assert items == expected, (items, expected)
        torch.testing.assert_close(weights, own, rtol=1e-12, atol=1e-14)
        assert abs(loss - own_loss) < 1e-12 * abs(own_loss), (loss, own_loss)
