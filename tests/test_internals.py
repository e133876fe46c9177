"""The private names of other libraries: what they are for, and the same numbers without them."""

import copy
import functools
import math
import random
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
import torchmetrics
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, interleave_datasets
from datasets.distributed import split_dataset_by_node
from helpers import rows, tiny_bert, tiny_tokenizer, whole_and_resumed
from torch.nn.parallel import DataParallel
from torch.optim import optimizer as torch_optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from transformers import PreTrainedTokenizerBase

from manualloop import (
    Accelerated,
    NonFiniteError,
    SingleDevice,
    TrainState,
    evaluate_loop,
    internals,
    libraries,
    prepare_dataloaders,
    prepare_scheduler,
    train_loop,
    train_steps,
    update,
)
from manualloop.evaluation import torch_metrics
from manualloop.models import unwrap_model
from manualloop.reading.ranks import is_sharded
from manualloop.strategy import single


@pytest.fixture
def take_away(monkeypatch):
    """Return a function that takes a private name away, for our own look at it alone.

    The library itself still has it: it would not work without. So every look at the owner's
    attributes is asked where it comes from.
    """

    def take(owner, *names):
        is_module = not isinstance(owner, type)
        kind = type(owner) if is_module else owner
        original = kind.__getattribute__

        def look_up(self, name):
            caller = sys._getframe(1).f_globals.get("__name__")
            is_ours = caller in (m.__name__ for m in (internals, libraries, torch_metrics))
            if name in names and is_ours and (not is_module or self is owner):
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


# backward


def losses_of_a_run(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, dtype=dtype)
    for hooked in (lambda grad: grad * 3, lambda grad: grad + 1):
        loss = model(torch.ones(2, 4, dtype=dtype)).square().mean()
        loss.register_hook(hooked)
        yield model, loss


def gradients(backward, dtype=torch.float32):
    found = []
    for model, loss in losses_of_a_run(dtype):
        backward(loss)
        found += [parameter.grad.clone() for parameter in model.parameters()]
    return found


DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BACKWARD = SingleDevice("cpu").backward


def test_gradients_are_those_of_backward():
    for dtype in DTYPES:
        expected = gradients(lambda loss: loss.backward(), dtype)
        found = gradients(BACKWARD, dtype)
        assert all(map(torch.equal, found, expected))


NAMES_OF_BACKWARD = {
    "engine": (torch.autograd.graph, "_engine_run_backward"),
    "functorch": (torch._C, "_are_functorch_transforms_active"),
}


@pytest.mark.parametrize("gone", NAMES_OF_BACKWARD)
def test_gradients_are_the_same_without(take_away, monkeypatch, gone):
    expected = gradients(BACKWARD)
    missed = take_away(*NAMES_OF_BACKWARD[gone])
    monkeypatch.setattr(single, "_ENGINE", internals.find_engine())
    assert missed
    assert single._ENGINE is None
    assert all(map(torch.equal, gradients(BACKWARD), expected))


@pytest.mark.parametrize("owner", [torch.Tensor, torch.autograd], ids=["method", "function"])
def test_a_backward_of_before_the_import_is_called(monkeypatch, owner):
    original = owner.backward
    monkeypatch.setattr(
        owner, "backward", functools.wraps(original)(lambda *args, **kw: original(*args, **kw))
    )
    assert internals.find_engine() is None


@pytest.mark.parametrize("owner", [torch.Tensor, torch.autograd], ids=["method", "function"])
def test_a_backward_that_was_put_in_place_is_called(monkeypatch, owner):
    calls, original = [], owner.backward

    @functools.wraps(original)
    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, "backward", counting)
    gradients(BACKWARD)
    assert len(calls) == 2


def test_subclasses_and_modes_see_backward():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    parameter = torch.nn.Parameter(torch.ones(2))
    BACKWARD(parameter.sum().as_subclass(Watched))
    assert torch.Tensor.backward in seen
    seen.clear()
    with Mode():
        BACKWARD(parameter.sum())
    assert torch.Tensor.backward in seen
    assert parameter.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda parameter: parameter,  # two numbers
        lambda parameter: parameter.sum().to(torch.complex64),
        lambda parameter: parameter.sum().detach(),
    ],
    ids=["vector", "complex", "detached"],
)
def test_the_errors_are_those_of_backward(make):
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError) as expected:
        make(parameter).backward()
    with pytest.raises(RuntimeError) as found:
        BACKWARD(make(parameter))
    assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="inside a functorch transform"):
        torch.func.grad(lambda x: BACKWARD((x * parameter).sum()) or x.sum())(torch.ones(2))


def test_the_engine_is_called_directly(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(
        single, "_ENGINE", single._ENGINE._replace(methods=(None, torch.autograd.backward))
    )
    parameter = torch.nn.Parameter(torch.ones(2))
    BACKWARD(parameter.sum())
    assert parameter.grad.tolist() == [1.0, 1.0]


def weights_of(model):
    return [weight.tolist() for weight in model.parameters()]


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
    scale, num_skipped = strategy.scaler.get_scale(), state.progress.num_skipped
    return losses, weights_of(model), num_skipped, scale


def test_skipped_updates_of_fp16_are_known_without_the_scale_as_a_tensor(take_away):
    expected = fp16_run()
    assert expected[2] > 0
    missed = take_away(torch.amp.GradScaler, "_get_scale_async")
    found = fp16_run()
    assert missed
    assert found == expected


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
    return weights_of(model), str(optimizer.state_dict()["state"])


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_losses_that_are_not_finite_are_found_without_the_flag(monkeypatch, take_away, value):
    monkeypatch.setattr(update, "reads_at_once", lambda tensor: False)
    expected = nan_run(value)
    missed = take_away(torch.optim.Optimizer, "_step_supports_amp_scaling")
    assert nan_run(value) == expected
    assert missed


def test_models_are_unwrapped_without_the_dictionary_of_children(take_away):
    inner = torch.nn.Linear(2, 2)
    models = [inner, DataParallel(inner), torch.compile(DataParallel(DataParallel(inner)))]
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
    return losses, weights_of(model)


@pytest.mark.parametrize("name", ["_models", "_optimizers"])
def test_accelerate_prepares_once_without(take_away, name):
    expected = accelerated_run()
    missed = take_away(Accelerator, name)
    assert accelerated_run() == expected
    assert missed


@pytest.mark.parametrize("names", [(), ("_models",)])
def test_an_accelerator_forgets_a_model(names, take_away):
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
    prepared = accelerator.prepare_model(model)
    take_away(Accelerator, *names)
    assert libraries.forget_prepared(accelerator, prepared)
    assert not libraries.forget_prepared(accelerator, model)
    assert names or not internals.prepared_models(accelerator)


def test_gradients_that_ddp_waits_for_are_left_to_it_where_nothing_tells():
    waits = SimpleNamespace(_check_reducer_finalized=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        libraries.require_reduced(waits)
    libraries.require_reduced(SimpleNamespace())


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


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(7))


LOADERS = {
    "batch size": lambda: DataLoader(range(7), batch_size=2, drop_last=True),
    "shuffled": lambda: DataLoader(range(7), 2, True, generator=torch.Generator().manual_seed(3)),
    "batch sampler": lambda: DataLoader(
        range(7), batch_sampler=BatchSampler(SequentialSampler(range(7)), 3, False)
    ),
    "rows": lambda: DataLoader(range(7), batch_size=None),
    "stream": lambda: DataLoader(Numbers(), batch_size=2, drop_last=True),
    "stream of rows": lambda: DataLoader(Numbers(), batch_size=None),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_copy_of_a_loader_gives_its_batches(take_away, kind):
    changes = {"collate_fn": str}
    copied = internals.copy_loader(LOADERS[kind](), changes)
    missed = take_away(DataLoader, "_iterator")
    made = internals.copy_loader(LOADERS[kind](), changes)
    assert missed
    assert made is not copied
    found = list(made)
    assert found == list(copied)
    assert found
    assert all(type(batch) is str for batch in found)


def test_a_copy_of_a_loader_reads_by_another_sampler(take_away):
    loader, sampler = LOADERS["shuffled"](), [[5], [1, 2]]
    expected = list(internals.copy_loader(loader, {"batch_sampler": sampler}))
    take_away(DataLoader, "_iterator")
    found = list(internals.copy_loader(loader, {"batch_sampler": sampler}))
    assert str(found) == str(expected) == "[tensor([5]), tensor([1, 2])]"


def test_a_copy_of_a_loader_has_workers_of_its_own():
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    list(loader)
    copied = internals.copy_loader(loader, {"collate_fn": str})
    assert list(copied) == ["[0]", "[1]", "[2]", "[3]"]
    assert str(list(loader)) == str([torch.tensor([number]) for number in range(4)])


def test_a_worker_is_seeded_as_torch_does_it():
    generate_state = torch.utils.data._utils.worker._generate_state
    for base_seed in (0, 1, 2**32 - 1, 2**32, 6_148_914_691_236_517_205, 2**63 - 2):
        for number in (0, 1, 17, 5000):
            info = SimpleNamespace(id=7, seed=8)
            internals.renumber_worker(info, number, base_seed)
            found = np.random.random(3).tolist(), random.random(), torch.rand(1).item()
            assert (info.id, info.seed) == (number, base_seed + number)
            np.random.seed(generate_state(base_seed, number))
            random.seed(base_seed + number)
            torch.manual_seed(base_seed + number)
            assert found == (np.random.random(3).tolist(), random.random(), torch.rand(1).item())


def test_a_worker_that_cannot_be_renumbered_ends_the_run():
    with pytest.raises(AttributeError):
        internals.renumber_worker((0, 1), 1, 5)


def test_workers_end_without_the_method_that_ends_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""if True:
        from torch.utils.data import DataLoader
        from manualloop import internals
        from manualloop.reading.workers import WorkerStart

        start = WorkerStart(None, None, 0, {})
        batches = iter(DataLoader(range(100), num_workers=2, worker_init_fn=start))
        next(batches)
        internals.shut_down_workers(object())
        print("ended")
        """)
    ended = processes.run(script)
    assert (ended.returncode, ended.output) == (0, "ended\n")


def test_a_batch_is_not_pinned_without_the_function(take_away):
    take_away(torch.utils.data._utils, "pin_memory")
    batch = {"x": torch.ones(2)}
    assert internals.pin_batch(batch) is batch


def table_run():
    """Train and evaluate on a selection of rows, in batches of rows of one length."""
    chosen = rows(24).select([number for number in range(24) if number % 3])
    torch.manual_seed(0)
    model = tiny_bert()
    loaders = prepare_dataloaders(
        {"train": chosen, "validation": rows(9).select([4, 2, 8, 1])},
        tiny_tokenizer(),
        model=model,
        batch_size=4,
        group_by_length=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    result = train_loop(model, loaders["train"], optimizer, num_epochs=2, progress_bar=False)
    scores = evaluate_loop(model, loaders["validation"])
    batches = [
        {name: tensor.tolist() for name, tensor in batch.items()} for batch in loaders["train"]
    ]
    kind = type(loaders["train"].collate_fn).__name__
    return batches, result.history, scores, weights_of(model), kind


@pytest.mark.parametrize("name", ["_indices", "_fingerprint"])
def test_rows_are_the_same_without(take_away, name):
    expected = table_run()
    missed = take_away(Dataset, name)
    assert table_run() == expected
    assert missed


def test_batches_are_the_same_where_nothing_tells_how_a_tokenizer_pads(monkeypatch):
    expected = table_run()
    pad = PreTrainedTokenizerBase._pad
    others = getattr(PreTrainedTokenizerBase, "__getattr__", object.__getattribute__)

    def of_instances_only(self, name):
        return pad.__get__(self) if name == "_pad" else others(self, name)

    assert libraries.pads_as_base(tiny_tokenizer())
    monkeypatch.delattr(PreTrainedTokenizerBase, "_pad")
    monkeypatch.setattr(PreTrainedTokenizerBase, "__getattr__", of_instances_only, raising=False)
    assert not libraries.pads_as_base(tiny_tokenizer())
    batches, history, scores, weights, kind = table_run()
    assert kind != expected[-1]  # padded by the tokenizer
    assert (batches, history, weights) == (expected[0], expected[1], expected[3])
    # Rows are evaluated in batches of other widths, which changes how a sum is rounded.
    assert scores == {"loss": pytest.approx(expected[2]["loss"], rel=1e-6)}


def stream(num_rows=8):
    return rows(num_rows).to_iterable_dataset()


def test_a_shuffle_buffer_is_noticed(take_away):
    plain, shuffled = stream(), stream().shuffle(seed=1, buffer_size=4)
    both = interleave_datasets([plain, shuffled])
    found = [internals.has_shuffle_buffer(one) for one in (plain, shuffled, both, range(3))]
    assert found == [False, True, True, False]
    take_away(type(plain), "_ex_iterable")
    found = [internals.has_shuffle_buffer(one) for one in (plain, shuffled, both, range(3))]
    assert found == [True, True, True, False]


def test_a_stream_that_was_split_by_rank_is_noticed(take_away, caplog):
    whole = stream()
    part = split_dataset_by_node(whole, rank=0, world_size=2)
    assert [is_sharded(DataLoader(one)) for one in (whole, part, [1])] == [False, True, False]
    assert "split_dataset_by_node" not in caplog.text
    take_away(type(part), "_distributed")
    assert [is_sharded(DataLoader(one)) for one in (whole, part, [1])] == [False, False, False]
    assert caplog.text.count("split_dataset_by_node") == 2


@pytest.mark.parametrize("gone", [False, True])
def test_metrics_do_not_gather_from_other_ranks(take_away, gone):
    """With ranks that are said to be there, a metric that asked them would raise."""
    metric = torchmetrics.MeanSquaredError(distributed_available_fn=lambda: True)
    metric.update(torch.ones(3), torch.zeros(3))
    missed = take_away(torchmetrics.Metric, *["distributed_available_fn"] * gone)
    with torch_metrics.computing_alone([metric]):
        assert metric.compute() == 1.0
    assert bool(missed) == gone
    assert metric.distributed_available_fn()
    assert metric.dist_sync_fn is None


class Drawing(torch.utils.data.Dataset):
    """Rows that are drawn where they are read."""

    def __len__(self):
        return 10

    def __getitem__(self, row):
        return {"x": torch.rand(4) + row + float(np.random.random())}


def drawn_rows(**options):
    return lambda: DataLoader(Drawing(), 2, shuffle=True, **options)


def stream_of_numbers():
    numbers = Dataset.from_dict({"x": [[float(number)] * 4 for number in range(10)]})
    return DataLoader(numbers.to_iterable_dataset().with_format("torch"), 2)


@pytest.mark.parametrize(
    "make",
    [
        drawn_rows(),
        drawn_rows(num_workers=2),
        drawn_rows(num_workers=1, persistent_workers=True),
        stream_of_numbers,
    ],
    ids=["here", "workers", "kept workers", "stream"],
)
def test_runs_resume_without_the_private_names_of_loaders(take_away, tmp_path, make):
    def run(folder, on_step):
        torch.manual_seed(0)
        np.random.seed(0)
        model = torch.nn.Linear(4, 3)
        return train_loop(
            model,
            make(),
            torch.optim.AdamW(model.parameters(), lr=0.1),
            max_steps=13,
            loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
            checkpoint_dir=folder,
            checkpoint_every=1,
            progress_bar=False,
            on_step=on_step,
        )

    expected, _ = whole_and_resumed(run, tmp_path / "with", dies_after=7)
    missed = take_away(DataLoader, "_iterator")
    found, _ = whole_and_resumed(run, tmp_path / "without", dies_after=7)
    assert missed
    assert found.history == expected.history
    assert weights_of(found.state.model) == weights_of(expected.state.model)


class Lookahead(torch.optim.SGD):
    """A wrapper of the user's, which moves the weights itself after the optimizer inside."""

    def __init__(self, inner):
        super().__init__(inner.param_groups[0]["params"], lr=0.1)
        self.optimizer = inner


def test_a_wrapper_of_the_users_is_not_trusted_to_skip_on_the_device():
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=True)
    cpu = torch.device("cpu")
    assert internals.unwrap_optimizer(Lookahead(inner)) is inner
    assert internals.heeds_found_inf(inner, cpu)
    assert not internals.heeds_found_inf(Lookahead(inner), cpu)
