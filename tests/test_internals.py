"""The private names of other libraries: what they are for, and the same numbers without them."""

import copy
import functools
import math
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.nn.parallel import DataParallel
from torch.optim import optimizer as torch_optimizer
from torch.profiler import ProfilerActivity, profile

from manualloop import (
    Accelerated,
    NonFiniteError,
    SingleDevice,
    TrainState,
    internals,
    prepare_scheduler,
    train_steps,
    update,
)
from manualloop.models import unwrap_model


@pytest.fixture
def take_away(monkeypatch):
    """Return a function that takes a private name away, for ``internals`` alone.

    The library itself still has it: it would not work without. So every look at the owner's
    attributes is asked where it comes from.
    """

    def take(owner, *names):
        is_module = not isinstance(owner, type)
        kind = type(owner) if is_module else owner
        original = kind.__getattribute__

        def look_up(self, name):
            caller = sys._getframe(1).f_globals.get("__name__")
            if name in names and caller == internals.__name__ and (not is_module or self is owner):
                missed.append(name)
                raise AttributeError(name)
            return original(self, name)

        if is_module:
            without = type("Without", (kind,), {"__getattribute__": look_up})
            monkeypatch.setattr(owner, "__class__", without)
        else:
            monkeypatch.setattr(owner, "__getattribute__", look_up)
        return missed

    missed = []
    internals._code_of_hooked_step.cache_clear()
    internals._kernel_heeds_found_inf.cache_clear()
    yield take
    internals._code_of_hooked_step.cache_clear()
    internals._kernel_heeds_found_inf.cache_clear()


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


NAMES_OF_STEP = {
    "hooks": (torch.optim.Optimizer, "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
    "note": (torch.optim.Optimizer, "_opt_called"),
    "global hooks": (
        torch_optimizer,
        "_global_optimizer_pre_hooks",
        "_global_optimizer_post_hooks",
    ),
    "profiler": (torch._C._autograd, "_profiler_enabled"),
}


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("gone", NAMES_OF_STEP)
def test_the_step_is_the_same_without(take_away, gone, kind, schedule):
    expected, states = run(SingleDevice("cpu").apply, kind, schedule)
    missed = take_away(*NAMES_OF_STEP[gone])
    found, others = run(SingleDevice("cpu").apply, kind, schedule)
    assert missed or (gone == "note" and not schedule)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert str(states) == str(others)


def test_the_step_is_the_same_without_the_wrapper_of_the_profiler(monkeypatch):
    expected, _ = run(SingleDevice("cpu").apply, KINDS["adamw"], True)
    internals._code_of_hooked_step.cache_clear()
    monkeypatch.delattr(torch.optim.Optimizer, "profile_hook_step")
    found, _ = run(SingleDevice("cpu").apply, KINDS["adamw"], True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_step_of_a_class_that_torch_has_not_wrapped_is_called(monkeypatch):
    """As all of them are where torch does not wrap them any more."""
    monkeypatch.setattr(torch.optim.SGD, "step", torch.optim.SGD.step.__wrapped__)
    optimizer = make()
    monkeypatch.setattr(torch.optim.SGD, "step", torch.optim.SGD.step.__wrapped__)
    assert internals._bare_step(optimizer) is None
    SingleDevice("cpu").apply(optimizer)
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([0.9, 0.9])


def test_the_short_way_is_taken():
    optimizer = make()
    assert internals._bare_step(optimizer) is torch.optim.SGD.step.__wrapped__
    prepare_scheduler(optimizer, "linear", num_training_steps=5)
    assert internals._bare_step(optimizer) is None  # the scheduler notes the first call
    optimizer.step()
    assert internals._bare_step(optimizer) is torch.optim.SGD.step.__wrapped__


def fp16_run():
    """Train in fp16 with a scale so large that the first updates overflow."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    batches = [{"x": torch.full((2, 4), 3e2)} for _ in range(6)]
    loss_fn = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    steps = train_steps(state, batches, num_epochs=2, loss_fn=loss_fn, strategy=strategy)
    losses = [float(step.loss) for step in steps]
    return losses, [*model.parameters()], state.progress.num_skipped, strategy.scaler.get_scale()


def test_skipped_updates_of_fp16_are_known_without_the_scale_as_a_tensor(take_away):
    expected = fp16_run()
    assert expected[2] > 0
    missed = take_away(torch.amp.GradScaler, "_get_scale_async")
    found = fp16_run()
    assert missed
    assert str(found) == str(expected)


def nan_run(value):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    state = TrainState(model, optimizer)
    batches = [{"x": torch.full((2, 4), float(number))} for number in range(6)]
    batches[3]["x"][0, 0] = value
    loss_fn = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    steps = train_steps(state, batches, num_epochs=1, loss_fn=loss_fn)
    with pytest.raises(NonFiniteError, match="at step 4 ") if math.isnan(value) else nullcontext():
        list(steps)
    return [*model.parameters()], optimizer.state_dict()["state"]


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_losses_that_are_not_finite_are_found_without_the_flag(monkeypatch, take_away, value):
    monkeypatch.setattr(update, "reads_at_once", lambda tensor: False)
    expected = nan_run(value)
    missed = take_away(torch.optim.Optimizer, "_step_supports_amp_scaling")
    assert str(nan_run(value)) == str(expected)
    assert missed


def test_models_are_unwrapped_without_the_dictionary_of_children(take_away):
    inner = torch.nn.Linear(2, 2)
    models = [inner, DataParallel(inner), DataParallel(DataParallel(inner))]
    assert all(unwrap_model(model) is inner for model in models)
    missed = take_away(torch.nn.Module, "_modules")
    assert all(unwrap_model(model) is inner for model in models)
    assert missed


def test_a_compiled_model_is_unwrapped_whatever_its_child_is_called():
    inner = torch.nn.Linear(2, 2)
    compiled, parallel = torch.compile(inner), DataParallel(inner)
    assert unwrap_model(compiled) is unwrap_model(torch.compile(parallel)) is inner
    (child,) = compiled.children()
    assert internals.compiled_module(compiled, {"_new": child}) is inner
    assert internals.compiled_module(parallel, {"_new": inner}) is None


def test_a_module_is_compiled_once(take_away):
    def calls():
        module, seen = torch.nn.Linear(2, 2), []
        module.compile = lambda **settings: seen.append(settings)
        internals.compile_once(module, {"dynamic": True})
        return module, seen

    module, seen = calls()
    assert seen == [{"dynamic": True}]
    missed = take_away(torch.nn.Module, "_compiled_call_impl")
    module, seen = calls()
    internals.compile_once(module, {"dynamic": True})
    assert seen == [{"dynamic": True}]
    assert missed


def accelerated_run():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batches = [{"x": torch.full((2, 4), float(number))} for number in range(6)]
    loss_fn = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
    for _ in range(2):  # the second run prepares what is prepared
        state = TrainState(model, optimizer)
        steps = train_steps(
            state,
            batches,
            num_epochs=1,
            loss_fn=loss_fn,
            max_grad_norm=0.5,
            strategy=Accelerated(accelerator),
        )
        losses = [float(step.loss) for step in steps]
    return losses, [*model.parameters()]


@pytest.mark.parametrize("name", ["_models", "_optimizers"])
def test_accelerate_prepares_once_without(take_away, name):
    expected = accelerated_run()
    missed = take_away(Accelerator, name)
    assert str(accelerated_run()) == str(expected)
    assert missed


def test_an_accelerators_optimizer_is_wrapped_once(take_away):
    accelerator = Accelerator(cpu=True)
    optimizer = make()
    take_away(Accelerator, "_optimizers")
    wrapper = internals.prepare_optimizer_once(accelerator, optimizer)
    assert internals.prepare_optimizer_once(accelerator, optimizer) is wrapper
    assert internals.prepare_optimizer_once(accelerator, wrapper) is wrapper
    assert wrapper.optimizer is optimizer


def test_an_accelerator_is_noticed_without_the_shared_state(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not internals.was_accelerator_made()
    PartialState(cpu=True)
    assert internals.was_accelerator_made()
    Accelerator(cpu=True)
    state = PartialState._shared_state
    monkeypatch.delattr(PartialState, "_shared_state")
    try:
        assert internals.was_accelerator_made()
    finally:
        PartialState._shared_state = state
