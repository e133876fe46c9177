"""preflight on two ranks: it leaves no trace on either, and counts the updates that both make."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from manualloop import preflight, prepare_strategy, train_loop


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)
        )

    def forward(self, x):
        return self.layers(x)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run(strategy, *, looks, given):
    torch.manual_seed(7)
    model = Net()
    torch.manual_seed(7 + strategy.rank)
    x, y = torch.randn(23, 3, generator=torch.Generator().manual_seed(0)), torch.arange(23) % 2
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if given else None
    options = {"num_epochs": 2, "gradient_accumulation_steps": 2, "loss_fn": loss_fn}
    report = None
    if looks:
        state = torch.get_rng_state()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        report = preflight(model, loader, optimizer, strategy=strategy, **options)
        assert torch.equal(state, torch.get_rng_state())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert all(parameter.grad is None for parameter in model.parameters())
    result = train_loop(model, loader, optimizer, strategy=strategy, progress_bar=False, **options)
    return report, result, model


def main(folder):
    strategy = prepare_strategy()
    for given in (False, True):
        _, plain, model = run(strategy, looks=False, given=given)
        report, result, other = run(strategy, looks=True, given=given)
        assert report.num_steps == result.state.progress.num_steps
        assert (report.world_size, report.rows_per_step) == (strategy.world_size, 12)
        assert result.history == plain.history
        for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(one, two)
