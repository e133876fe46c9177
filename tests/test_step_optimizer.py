"""The optimizer's step without torch's record: the same numbers, and hooks and profilers see it."""

import copy
import functools

import pytest
import torch
from torch.optim import optimizer as torch_optimizer
from torch.profiler import ProfilerActivity, profile

from manualloop import SingleDevice, prepare_scheduler

KINDS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
}


class Halving(torch.optim.SGD):
    """One of the user's own."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.div_(2)


def run(apply, kind, schedule):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = kind(model.parameters())
    scheduler = prepare_scheduler(optimizer, "linear", num_training_steps=5) if schedule else None
    for _ in range(4):
        model(torch.ones(2, 4)).square().sum().backward()
        apply(optimizer)
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return [*model.parameters()], optimizer.state_dict()["state"]


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("kind", [*KINDS.values(), Halving], ids=[*KINDS, "own"])
def test_numbers_are_those_of_the_method(kind, schedule):
    found, states = run(SingleDevice("cpu").apply, kind, schedule)
    expected, others = run(lambda optimizer: optimizer.step(), kind, schedule)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert str(states) == str(others)


def make():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=0.1)


@pytest.mark.parametrize("kind", ["pre", "post", "global pre", "global post"])
def test_hooks_are_called(kind):
    optimizer, calls = make(), []
    where = torch_optimizer if "global" in kind else optimizer
    name = f"register_optimizer_step_{kind.split()[-1]}_hook"
    if where is optimizer:
        name = f"register_step_{kind}_hook"
    handle = getattr(where, name)(lambda *args: calls.append(kind))
    try:
        SingleDevice("cpu").apply(optimizer)
    finally:
        handle.remove()
    assert calls == [kind]


@pytest.mark.parametrize("schedule", [False, True])
def test_a_method_put_on_the_optimizer_is_called(schedule):
    optimizer, calls = make(), []
    if schedule:
        prepare_scheduler(optimizer, "linear", num_training_steps=5)
    original = optimizer.step

    def counting():
        calls.append(1)
        return original()

    optimizer.step = counting
    SingleDevice("cpu").apply(optimizer)
    assert calls == [1]


class Wrapped(torch.optim.SGD):
    """Whose step takes over what torch has written on the one that it wraps."""

    calls = 0

    @functools.wraps(torch.optim.SGD.step)
    def step(self, closure=None):
        Wrapped.calls += 1
        return super().step(closure)


@pytest.mark.parametrize("schedule", [False, True])
def test_what_wraps_the_method_is_called(schedule):
    make()  # torch marks the method of the class when the first one is made
    optimizer = Wrapped(make().param_groups[0]["params"], lr=0.1)
    if schedule:
        prepare_scheduler(optimizer, "linear", num_training_steps=5)
    before = Wrapped.calls
    SingleDevice("cpu").apply(optimizer)
    assert Wrapped.calls == before + 1


def test_a_profiler_finds_its_record():
    optimizer = make()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        SingleDevice("cpu").apply(optimizer)
    assert any(event.key == "Optimizer.step#SGD.step" for event in profiled.key_averages())
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        pass
    SingleDevice("cpu").apply(copy.deepcopy(optimizer))
    assert not profiled.key_averages()
