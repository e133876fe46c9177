"""Train with two optimizers on the ranks that there are; leave what came out in a file."""

import torch
from torch import nn

from manualloop import (
    ModelError,
    TrainState,
    load_checkpoint,
    prepare_scheduler,
    prepare_strategy,
    save_checkpoint,
    train_steps,
)
from manualloop.data.sampler import ordered_loader

ROWS = [
    {"x": torch.linspace(-1, 1 + row % 5, 6).double(), "y": torch.tensor([row % 3.0]).double()}
    for row in range(22)
]


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def build(order=1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 1)).double()
    matrices = [p for p in model.parameters() if p.ndim == 2][::order]
    vectors = [p for p in model.parameters() if p.ndim < 2][::order]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.01)]
    schedules = [
        prepare_scheduler(optimizer, name, num_training_steps=12)
        for optimizer, name in zip(optimizers, ("linear", "cosine"), strict=True)
    ]
    return TrainState(model, optimizers, schedules)


def train(state, strategy, max_steps, **options):
    loader = ordered_loader(
        ROWS, "train", 4 // strategy.world_size, shuffle=True, seed=3, drop_last=False
    )
    options = {"loss_fn": loss_fn, "strategy": strategy, **options}
    for _ in train_steps(state, loader, max_steps=max_steps, **options):
        pass
    return torch.cat([weight.detach().reshape(-1) for weight in state.model.parameters()])


def refusal(strategy):
    """What is said of an optimizer whose parameters the ranks would not share."""
    state, head = build(), nn.Linear(1, 1).double()
    vectors = state.optimizer[1]
    vectors.add_param_group({"params": list(head.parameters())})
    state = TrainState(state.model, list(state.optimizer), extras={"head": head})
    try:
        train(state, strategy, 1)
    except ModelError as error:
        return str(error)
    return ""


def main(folder):
    strategy = prepare_strategy("auto")
    said = refusal(strategy)
    whole = train(build(), strategy, 12)
    half = build()
    train(half, strategy, 7)
    save_checkpoint(folder / f"{strategy.world_size}", half, strategy=strategy)
    resumed = build(order=-1)
    load_checkpoint(folder / f"{strategy.world_size}", resumed, strategy=strategy)
    ended = train(resumed, strategy, 12)
    torch.save(
        {"whole": whole, "resumed": ended, "refusal": said},
        folder / f"{strategy.world_size}-{strategy.rank}.pt",
    )
