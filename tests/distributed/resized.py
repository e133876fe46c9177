"""A run is continued by another number of ranks: it ends with its schedule, after its epochs."""

import json

import torch
from torch.utils.data import DataLoader, TensorDataset

from manualloop import prepare_strategy, train_loop


def main(folder, stop):
    """Train until a step, on as many ranks as there are; leave what was used in a file."""
    strategy = prepare_strategy()
    torch.manual_seed(strategy.rank)
    steps, rows = [], []
    model = torch.nn.Linear(1, 1)

    def loss_fn(model, batch):
        rows.extend(batch[0].tolist())
        return model(torch.ones(len(batch[0]), 1)).mean()

    def on_step(step):
        if step.index == stop:
            raise InterruptedError
        steps.append((step.index, step.lr, step.num_steps, step.is_last))

    try:
        train_loop(
            model,
            DataLoader(TensorDataset(torch.arange(24)), 2),
            torch.optim.SGD(model.parameters(), lr=1.0),
            "linear",
            num_epochs=2,
            loss_fn=loss_fn,
            checkpoint_dir=folder,
            checkpoint_every=1,
            on_step=on_step,
            strategy=strategy,
            progress_bar=False,
        )
    except InterruptedError:
        del rows[2 * len(steps) :]
    outcome = {"steps": steps, "rows": [row for own in strategy.gather(rows) for row in own]}
    assert strategy.gather(steps) == [steps] * strategy.world_size
    if strategy.is_main:
        folder.with_name(f"{folder.name}-{stop}.json").write_text(json.dumps(outcome))
