"""A part that refuses its state: those before it are put back, whatever they are."""

import copy
import random

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from manualloop import (
    CheckpointError,
    ConfigError,
    SingleDevice,
    TrainState,
    load_checkpoint,
    prepare_scheduler,
    save_checkpoint,
    train_steps,
)

CPU = SingleDevice("cpu")


class Refusing:
    """Takes no state, or only half of it."""

    def __init__(self, error):
        self.error, self.count = error, 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = -1
        if self.error is not None:
            raise self.error
        self.count = state["count"]


class Counting(torch.nn.Linear):
    """Has a state that is no tensor."""

    count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        if state["count"] > 2:
            raise ValueError("too many")
        self.count = state["count"]


def new_state(model_class=torch.nn.Linear, error=None, **more):
    model = torch.nn.Sequential(model_class(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    extras = {
        "average": AveragedModel(model),
        "second": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "refusing": Refusing(error),
        **more,
    }
    schedule = prepare_scheduler(optimizer, num_training_steps=9)
    return TrainState(model, optimizer, schedule, extras=extras)


def train(state, num_steps):
    loss_fn = lambda model, batch: model(batch).square().mean()  # noqa: E731
    for step in train_steps(
        state, [torch.rand(3, 2) for _ in range(9)], max_steps=9, loss_fn=loss_fn, strategy=CPU
    ):
        state.extras["second"].step()
        state.extras["average"].update_parameters(state.model)
        if step.index == num_steps:
            break
    return state


def everything(state):
    whole = {name: copy.deepcopy(part.state_dict()) for name, part in state.parts().items()}
    whole["progress"], whole["place"] = copy.deepcopy(state.progress), state.position
    whole["random"] = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    return whole


def differing(one, other, path=""):
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differing(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [d for n, (a, b) in enumerate(pairs) for d in differing(a, b, f"{path}.{n}")]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [path]
    return [] if one == other else [path]


ERRORS = [ValueError("no"), RuntimeError("no"), KeyError("no"), AssertionError(), OSError("no")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("num_steps", [0, 2])
def test_everything_is_as_it_was(error, num_steps, tmp_path):
    save_checkpoint(tmp_path, train(new_state(), 4), strategy=CPU)
    state = new_state(error=error)
    if num_steps:
        train(state, num_steps)
    before = everything(state)
    with pytest.raises(CheckpointError, match=r"extras.refusing .Refusing. does not take") as text:
        load_checkpoint(tmp_path, state, strategy=CPU)
    assert "Nothing was loaded" in str(text.value)
    after = everything(state)
    assert differing(before, after) in ([], [".extras.refusing.count"])
    state.extras["refusing"].error = None
    assert load_checkpoint(tmp_path, state, strategy=CPU).step == 4


def test_a_model_with_a_state_of_its_own_is_put_back(tmp_path):
    saved = new_state(Counting)
    saved.model[0].count = 3
    save_checkpoint(tmp_path, train(saved, 4), strategy=CPU)
    state = train(new_state(Counting), 2)
    before = everything(state)
    with pytest.raises(CheckpointError, match="too many"):
        load_checkpoint(tmp_path, state, strategy=CPU)
    assert differing(before, everything(state)) == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_state_dict_is_loaded_whole_or_not_at_all(error):
    noise = torch.Generator().manual_seed(1)
    saved = copy.deepcopy(train(new_state(noise=noise), 4).state_dict())
    state = train(new_state(error=error, noise=torch.Generator().manual_seed(2)), 2)
    before, drawn = everything(state), state.extras["noise"].get_state()
    with pytest.raises(ConfigError, match=r"extras.refusing .Refusing. does not take"):
        state.load_state_dict(saved)
    assert differing(before, everything(state)) in ([], [".extras.refusing.count"])
    assert torch.equal(state.extras["noise"].get_state(), drawn)
    state.extras["refusing"].error = None
    state.load_state_dict(saved)
    assert state.progress.num_steps == 4
    assert torch.equal(state.extras["noise"].get_state(), noise.get_state())


FORGED = {
    "progress": {"num_steps": -1, "num_skipped": 0, "epoch": 0, "num_samples": 0},
    "progress without a name": {"num_steps": 1},
    "progress that is none": [1],
    "generators": {"extras['noise']": [1, 2]},
    "generators that are gone": {"extras['other'].x": {"kind": "torch", "state": None}},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_state_dict_that_is_not_ours_changes_nothing(name):
    saved = copy.deepcopy(train(new_state(noise=torch.Generator()), 4).state_dict())
    saved[name.partition(" ")[0]] = FORGED[name]
    state = train(new_state(noise=torch.Generator().manual_seed(2)), 2)
    before, drawn = everything(state), state.extras["noise"].get_state()
    with pytest.raises(ConfigError, match="nothing was loaded"):
        state.load_state_dict(saved)
    assert differing(before, everything(state)) == []
    assert torch.equal(state.extras["noise"].get_state(), drawn)
