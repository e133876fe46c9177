"""Optimizers that hold another one are resumed as they were, or a line tells what is lost."""

from collections import defaultdict

import pytest
import torch
from torch.optim import SGD, Optimizer

from manualloop import TrainState, load_checkpoint, save_checkpoint, train_steps

ROWS = [{"x": torch.tensor([[1.0, number]])} for number in range(6)]


class Around(Optimizer):
    """Leaves the steps to an optimizer inside of it, as SAM does; both have the same groups."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.inner = SGD(self.param_groups, lr=0.1, momentum=0.9)

    def step(self, closure=None):
        self.inner.step()


class Sharing(Around):
    """Takes the list of groups over, too."""

    def __init__(self, params):
        super().__init__(params)
        self.param_groups = self.inner.param_groups


class Slow(Optimizer):
    """Keeps slow weights in a state of its own, and returns that of the optimizer inside."""

    def __init__(self, params):
        self.inner, self.state = SGD(params, lr=0.1, momentum=0.9), defaultdict(dict)
        for weight in self.weights():
            self.state[weight]["slow"] = weight.detach().clone()

    param_groups = property(lambda self: self.inner.param_groups)
    defaults = property(lambda self: self.inner.defaults)

    def weights(self):
        return [weight for group in self.param_groups for weight in group["params"]]

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for weight in self.weights():
            weight.copy_(self.state[weight]["slow"].lerp_(weight, 0.5))

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)


class Listed(Slow):
    """Keeps them in lists."""

    def __init__(self, params):
        super().__init__(params)
        self.slow = [[self.state.pop(weight)["slow"] for weight in self.weights()]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for weight, slow in zip(self.weights(), self.slow[0], strict=True):
            weight.copy_(slow.lerp_(weight, 0.5))


class Copying(Slow):
    """Returns all that it keeps, as copies."""

    def state_dict(self):
        slow = [self.state[weight]["slow"].clone() for weight in self.weights()]
        return {"inner": self.inner.state_dict(), "slow": slow}

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict["inner"])
        for weight, slow in zip(self.weights(), state_dict["slow"], strict=True):
            self.state[weight]["slow"].copy_(slow)


def new_state(kind, *, saves_inner=False):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = kind(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    extras = {"inner": optimizer.inner} if saves_inner else {}
    return TrainState(model, optimizer, schedule, extras=extras)


def train(state, folder=None):
    for step in train_steps(
        state, ROWS, num_epochs=1, loss_fn=lambda model, batch: model(batch["x"]).square().mean()
    ):
        if folder is not None and step.index == 3:
            save_checkpoint(folder, state)
            break
    return [weight.detach().clone() for weight in state.model.parameters()]


@pytest.mark.parametrize("kind", [Around, Sharing, Copying])
def test_it_resumes_to_the_bit_where_all_is_saved(kind, tmp_path, caplog):
    saves_inner = kind is not Copying
    whole = train(new_state(kind))
    caplog.clear()
    train(new_state(kind, saves_inner=saves_inner), tmp_path)
    resumed = new_state(kind, saves_inner=saves_inner)
    load_checkpoint(tmp_path, resumed)
    outer, inner = resumed.optimizer.param_groups, resumed.optimizer.inner.param_groups
    assert all(one is other for one, other in zip(outer, inner, strict=True))
    assert (outer is inner) == (kind is not Around)
    assert all(map(torch.equal, train(resumed), whole))
    assert "not in the checkpoint" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "path", "way"),
    [
        (Around, "inner.state", 'extras={"inner": optimizer.inner}.'),
        (Sharing, "inner.state", 'extras={"inner": optimizer.inner}.'),
        (Slow, "state", "in extras as an object with state_dict()"),
        (Listed, "slow", "in extras as an object with state_dict()"),
    ],
)
def test_what_no_state_dict_has_is_told(kind, path, way, tmp_path, caplog):
    train(new_state(kind), tmp_path)
    told = f"not in the checkpoint, though it changes during the run: optimizer.{path}. "
    assert told in caplog.text
    assert way in caplog.text
    resumed = new_state(kind)
    load_checkpoint(tmp_path, resumed)
    inner = resumed.optimizer.inner.param_groups
    for _ in range(2):  # the rate moves for the optimizer that reads it
        resumed.lr_scheduler.step()
        assert inner[0]["lr"] == resumed.lr_scheduler.get_last_lr()[0]


def test_constant_tensors_and_optimizers_of_torch_are_not_told(tmp_path, caplog):
    class Anchored(SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1, momentum=0.9)
            self.anchors = [weight.detach().clone() for weight in self.param_groups[0]["params"]]
            self.inner = self

    train(new_state(Anchored), tmp_path)
    assert "not in the checkpoint" not in caplog.text
