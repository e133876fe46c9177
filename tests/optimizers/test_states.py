"""The state of an optimizer comes back to its parameter in its dtype and strides, or is refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from manualloop import (
    Accelerated,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    SingleDevice,
    TrainState,
    load_checkpoint,
    save_checkpoint,
    train_steps,
)

CPU = SingleDevice("cpu")
ROWS = [{"x": torch.linspace(-1, 1 + row, 12).view(2, 6)} for row in range(4)]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(batch["x"].to(dtype)).float() - 1).square().mean()


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()).to(dtype)


def train(state: TrainState, max_steps: int, **options: Any) -> TrainState:
    options = {"loss_fn": loss_fn, **options}
    for _ in train_steps(state, ROWS, max_steps=max_steps, strategy=CPU, **options):
        pass
    return state


def same(one: Any, other: Any) -> bool:
    """Whether two nests hold the same bits, in tensors of the same dtype and strides."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
            and torch.equal(one, other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and (one == other).all()
    return type(one) is type(other) and one == other


def by_name(state: TrainState, optimizer: Any = None) -> dict[str, Any]:
    """The state of each parameter, by the parameter's name."""
    optimizer = optimizer or state.optimizer
    return {n: dict(optimizer.state.get(p, {})) for n, p in state.model.named_parameters()}


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.model.named_parameters()}


def check(tmp_path: Any, build: Any, rebuild: Any = None, **options: Any) -> None:
    """Save after 4 of 6 updates; resumed at both levels, the run ends as it does undisturbed."""
    whole = train(build(), 6, **options)
    half, rebuild = train(build(), 4, **options), rebuild or build
    save_checkpoint(tmp_path, half, strategy=CPU)
    load_checkpoint(tmp_path, resumed := rebuild(), strategy=CPU)
    saved = half.state_dict()
    (second := rebuild()).load_state_dict(saved)
    for state in (resumed, second):
        assert same(by_name(half), by_name(state))
        train(state, 6, **options)
        assert same(weights(whole), weights(state))
        assert same(by_name(whole), by_name(state))
    # Nothing is shared with what was loaded: training the one has not moved the other.
    assert same(by_name(half), by_name(rebuilt(rebuild, saved)))


def rebuilt(build: Any, saved: Any) -> TrainState:
    (state := build()).load_state_dict(saved)
    return state


OPTIMIZERS: dict[str, Any] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW, rate as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "transformers' Adafactor": lambda p: transformers.Adafactor(p, lr=None),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(name: str, tmp_path: Any) -> None:
    # torch 2.13's fused SGD reads memory that nobody has written in its first bfloat16 update.
    dtype = torch.float32 if name == "SGD, fused" else torch.bfloat16

    def build() -> TrainState:
        model = net(dtype)
        return TrainState(model, OPTIMIZERS[name](model.parameters()))

    check(tmp_path, build)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_in_another_order(name: str, tmp_path: Any) -> None:
    def build(order: int = 1) -> TrainState:
        model = net(torch.float64)
        return TrainState(model, OPTIMIZERS[name]([*model.parameters()][::order]))

    check(tmp_path, build, lambda: build(-1))


def test_muon_and_sparse_adam(tmp_path: Any) -> None:
    def matrices() -> TrainState:
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        model.load_state_dict({"0.weight": torch.eye(6), "1.weight": -torch.eye(6)})
        return TrainState(model, torch.optim.Muon(model.parameters(), lr=0.01))

    check(tmp_path / "muon", matrices)

    def sparse() -> TrainState:
        model = nn.EmbeddingBag(5, 3, sparse=True, mode="sum")
        nn.init.constant_(model.weight, 0.5)
        return TrainState(model, torch.optim.SparseAdam(model.parameters(), lr=0.01))

    def own_loss(model: nn.Module, batch: Any) -> Tensor:
        return model(torch.tensor([[1, 2], [2, 4]])).square().mean() * batch["x"].mean()

    check(tmp_path / "sparse", sparse, loss_fn=own_loss)


# Dtypes and containers of other optimizers -------------------------------------------------------


class Mixed(torch.optim.Optimizer):
    """Keeps float64, int64, bool, a text, a list, a nested dict, and state of its groups."""

    def __init__(self, parameters: Any, **defaults: Any) -> None:
        super().__init__(parameters, {"lr": 0.01, "num_steps": 0, "train_mode": True, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        common = self.state["all"]
        common["norms"] = common.get("norms", torch.zeros(2, dtype=torch.float64)) + 1
        for group in self.param_groups:
            group["num_steps"] += 1
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["copy"] = weight.double()
                    state["count"] = torch.zeros_like(weight, dtype=torch.int64)
                    state["name"], state["table"] = "abc", np.arange(3)
                    state["history"] = [torch.zeros(3, dtype=torch.float64)]
                    state["nested"] = {"step": torch.tensor(0, dtype=torch.int32), "x": (1, None)}
                state["positive"] = weight.grad > 0
                state["count"] += state["positive"]
                state["history"].append(weight.grad.double().reshape(-1)[:3].clone())
                state["nested"]["step"] += 1
                state["copy"] -= group["lr"] * weight.grad.double() + 1e-9 * state["count"]
                weight.copy_(state["copy"])


class MixedInItsOwnWay(Mixed):
    """Overrides ``load_state_dict``, as optimizers that pack their state do, and casts as well."""

    def load_state_dict(self, state_dict: Any) -> None:
        self.was_called = True
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_of_any_type_comes_back(dtype: torch.dtype, tmp_path: Any) -> None:
    def build() -> TrainState:
        model = net(dtype)
        return TrainState(model, Mixed(model.parameters()))

    check(tmp_path, build)
    half = train(build(), 4)
    load_checkpoint(tmp_path, resumed := build(), strategy=CPU)
    assert same(resumed.optimizer.state["all"], half.optimizer.state["all"])
    assert resumed.optimizer.param_groups[0]["num_steps"] == 4


def test_an_optimizer_that_loads_in_its_own_way_is_called(tmp_path: Any) -> None:
    def build(hook: bool = False) -> Any:
        model = net(torch.bfloat16)
        optimizer = MixedInItsOwnWay(model.parameters())
        return TrainState(model, optimizer)

    half = train(build(), 4)
    save_checkpoint(tmp_path, half, strategy=CPU)
    load_checkpoint(tmp_path, resumed := build(), strategy=CPU)
    assert resumed.optimizer.was_called
    for name, entry in by_name(half).items():
        loaded = by_name(resumed)[name]
        assert all(same(entry[key], loaded[key]) for key in ("copy", "count", "positive"))


def test_a_hook_of_loading_is_called(tmp_path: Any) -> None:
    def build() -> TrainState:
        model = net(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer.register_load_state_dict_post_hook(lambda o: o.param_groups[0].update(lr=0.5))
        return TrainState(model, optimizer)

    half = train(build(), 4)
    save_checkpoint(tmp_path, half, strategy=CPU)
    load_checkpoint(tmp_path, resumed := build(), strategy=CPU)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.5
    assert same(by_name(half), by_name(resumed))


def test_a_tensor_that_all_parameters_share_stays_shared(tmp_path: Any) -> None:
    class Shared(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            shared = next((s["n"] for s in self.state.values() if "n" in s), torch.zeros(2))
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["n"] = shared
            shared += 1

    def build() -> TrainState:
        model = net()
        return TrainState(model, Shared(model.parameters(), lr=0.01))

    check(tmp_path, build)
    load_checkpoint(tmp_path, resumed := build(), strategy=CPU)
    assert len({entry["n"].data_ptr() for entry in by_name(resumed).values()}) == 1


class Wrapper(torch.optim.Optimizer):
    """Has a ``state_dict`` of a form of its own, as Lookahead has."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.count = inner, 0
        self.defaults, self.state = inner.defaults, inner.state
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.inner.step()

    def state_dict(self) -> Any:
        return {"fast": self.inner.state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict["fast"])
        self.count = state_dict["count"]
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


def test_a_state_in_a_form_of_its_own(tmp_path: Any) -> None:
    def build(order: int = 1) -> Any:
        model = net()
        inner = torch.optim.Adam([*model.parameters()][::order], lr=0.01)
        return TrainState(model, Wrapper(inner))

    check(tmp_path, build)
    load_checkpoint(tmp_path, resumed := build(), strategy=CPU)
    assert resumed.optimizer.count == 4
    with pytest.raises(CheckpointError, match="its parameters are in another order"):
        load_checkpoint(tmp_path, build(-1), strategy=CPU)


# Memory ------------------------------------------------------------------------------------------


def transposed(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = net(dtype)
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return model


def images(shape: tuple[int, ...] = (3, 4, 3)) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 2, 2))
    return model.to(memory_format=torch.channels_last)


def image_loss(model: nn.Module, batch: Any) -> Tensor:
    x = batch["x"].reshape(-1)[:1].reshape(1, 1, 1, 1) * torch.linspace(-1, 1, 3 * 36)
    x = x.reshape(-1)[: 3 * 36].view(1, 3, 6, 6).to(memory_format=torch.channels_last)
    return model(x).square().mean()


@pytest.mark.parametrize(
    "name", ["AdamW, fused", "AdamW, foreach", "SGD, fused", "RMSprop", "ASGD"]
)
@pytest.mark.parametrize(("make", "loss"), [(transposed, loss_fn), (images, image_loss)])
def test_strides_come_back(name: str, make: Any, loss: Any, tmp_path: Any) -> None:
    def build() -> TrainState:
        model = make()
        return TrainState(model, OPTIMIZERS[name](model.parameters()))

    check(tmp_path, build, loss_fn=loss)


def test_state_follows_weights_whose_memory_is_in_another_order_now(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def build(make: Any) -> TrainState:
        model = make(torch.float64)
        return TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))

    half, whole = train(build(transposed), 4), train(build(net), 6)
    save_checkpoint(tmp_path, half, strategy=CPU)
    load_checkpoint(tmp_path, resumed := build(net), strategy=CPU)
    assert "memory of 2 weights is in another order" in caplog.text
    assert "0.weight" in caplog.text
    for parameter, entry in resumed.optimizer.state.items():
        assert entry["exp_avg"].stride() == parameter.stride()
    for name, value in weights(train(resumed, 6)).items():
        assert torch.allclose(value, weights(whole)[name], rtol=1e-12, atol=1e-14)


# What is refused, before anything is changed ------------------------------------------------------


def groups(names: list[list[str]], **options: Any) -> Any:
    def build(model: nn.Module | None = None) -> TrainState:
        model = model or net()
        of_name = dict(model.named_parameters())
        own = [{"params": [of_name[n] for n in group]} for group in names]
        return TrainState(model, torch.optim.AdamW(own, lr=0.01, **options))

    return build


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (
            [["0.weight", "2.weight"], ["0.bias", "2.bias"]],
            ["0.bias is in group 0 in the checkpoint, in group 1 here", "1 groups in"],
        ),
        ([NAMES[:3]], ["2.bias is in the checkpoint only"]),
        ([NAMES, []], ["1 groups in the checkpoint, 2 here"]),
    ],
)
def test_other_groups_are_refused_with_the_list(
    names: list[list[str]], lines: list[str], tmp_path: Any
) -> None:
    half = train(groups([NAMES])(), 4)
    save_checkpoint(tmp_path, half, strategy=CPU)
    other = train(groups(names)(), 1)
    before = weights(other), by_name(other)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, other, strategy=CPU)
    with pytest.raises(ConfigError) as second:
        other.load_state_dict(half.state_dict())
    for line in lines:
        assert line in str(caught.value)
        assert line in str(second.value)
    assert same(before, (weights(other), by_name(other)))


def test_renamed_parameters_are_refused(tmp_path: Any) -> None:
    save_checkpoint(tmp_path, half := train(groups([NAMES])(), 4), strategy=CPU)
    layers = net()
    model = nn.ModuleDict({"first": layers[0], "second": layers[2]})
    other = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    with pytest.raises(CheckpointError, match=r"model: 0\.weight is .* missing here"):
        load_checkpoint(tmp_path, other, strategy=CPU)
    with pytest.raises(ConfigError, match=r"model: 0\.weight is \(6, 6\) in the saved state"):
        other.load_state_dict(half.state_dict())


def forged(state: TrainState, change: Any) -> Any:
    saved = copy.deepcopy(state.state_dict())
    change(saved["optimizer"][0])
    return saved


def set_moment(name: str, key: str, value: Any) -> Any:
    def change(saved: Any) -> None:
        saved["state"][name][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (set_moment("2.weight", "exp_avg", torch.zeros(5)), r"exp_avg has the shape \(5,\)"),
        (set_moment("2.weight", "exp_avg", torch.zeros(())), r"exp_avg has the shape \(\)"),
        (set_moment("0.bias", "exp_avg_sq", torch.zeros(6).double()), "under a fused kernel"),
        (set_moment("0.bias", "exp_avg", torch.zeros(6).long()), "exp_avg is torch.int64"),
        (set_moment("0.bias", "exp_avg", None), "exp_avg is None"),
        (set_moment("0.bias", "step", torch.zeros(3)), r"step is tensor\(\[0., 0., 0.\]\)"),
        (set_moment("0.bias", "step", "4"), "step is '4'"),
        (lambda saved: saved["state"].update({"0.bias": [1]}), "state of 0.bias: a list"),
        (lambda saved: saved["state"].update({"9.bias": {}}), "cannot be read"),
        (lambda saved: saved["options"][0].update(betas=(0.9,)), "betas of group 0 is"),
        (lambda saved: saved["options"][0].update(lr="high"), "lr of group 0 is 'high'"),
        (lambda saved: saved["options"][0].update(amsgrad=True), "max_exp_avg_sq is None"),
        (lambda saved: saved.update(names=7), "cannot be read"),
        (lambda saved: saved.pop("options"), "cannot be read"),
    ],
)
def test_what_a_kernel_cannot_take_is_refused(change: Any, line: str) -> None:
    build = groups([NAMES], fused=True)
    half, other = train(build(), 4), train(build(), 1)
    before = weights(other), by_name(other)
    with pytest.raises(ConfigError, match=line):
        other.load_state_dict(forged(half, change))
    assert same(before, (weights(other), by_name(other)))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = put(value[path[0]], path[1:], new)
    return copied if isinstance(value, dict) else type(value)(copied)


JUNK = [None, -1, 1.5, "x", [], {}, (), [1, 2], True, torch.zeros(3), torch.zeros(()), 10**30]


@pytest.mark.parametrize("name", ["AdamW, fused", "RMSprop", "NAdam"])
def test_a_forged_value_anywhere_is_refused_or_can_be_trained_with(name: str) -> None:
    def build() -> TrainState:
        model = nn.Linear(6, 2)
        return TrainState(model, OPTIMIZERS[name](model.parameters()))

    saved, num_refused = train(build(), 2).state_dict(), 0
    for number, path in enumerate(places(saved["optimizer"])):
        for turn in range(3):
            new = JUNK[(number * 5 + turn * 7) % len(JUNK)]
            state, before = build(), copy.deepcopy(saved["progress"])
            try:
                state.load_state_dict(saved | {"optimizer": put(saved["optimizer"], path, new)})
            except ConfigError:
                assert not state.optimizer.state
                num_refused += 1
                continue
            assert saved["progress"] == before
            # A number within its range may still be too large, and the weights then are refused.
            with suppress(NonFiniteError):
                train(state, 3)
    assert num_refused > 40


def test_the_kernel_is_chosen_by_the_script(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A fused or capturable one may not exist on the device where the run is resumed."""
    save_checkpoint(tmp_path, train(groups([NAMES], fused=True)(), 4), strategy=CPU)
    load_checkpoint(tmp_path, resumed := groups([NAMES], fused=False)(), strategy=CPU)
    assert resumed.optimizer.param_groups[0]["fused"] is False
    assert "not bit-exact, because fused of the AdamW was True and is False" in caplog.text
    train(resumed, 6)


# Which parameters --------------------------------------------------------------------------------


def test_tied_weights_have_one_state_under_either_name(tmp_path: Any) -> None:
    class Tied(nn.Module):
        def __init__(self, names: tuple[str, str]) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                layers = {name: nn.Linear(6, 6) for name in names}
            for name, layer in layers.items():
                self.add_module(name, layer)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    def build() -> TrainState:
        model = Tied(("a", "b"))
        return TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))

    check(tmp_path, build)
    saved = train(build(), 4).state_dict()["optimizer"][0]
    assert list(saved["state"]) == ["a.weight", "a.bias", "b.bias"]
    model = Tied(("b", "a"))  # the first name is the other one
    other = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    (part,) = [p for name, p in other.parts().items() if name == "optimizer"]
    assert part.differences([saved]) == []
    part.load_state_dict([saved])
    assert same(dict(other.optimizer.state[model.a.weight]), saved["state"]["a.weight"])


def test_parameters_without_gradients_and_frozen_ones_have_none(tmp_path: Any) -> None:
    def build() -> TrainState:
        model = net()
        model.unused = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        model[0].requires_grad_(False)
        return TrainState(model, optimizer)

    check(tmp_path, build)
    assert set(train(build(), 2).state_dict()["optimizer"][0]["state"]) == {"2.weight", "2.bias"}


def test_parameters_of_a_module_among_the_extras(tmp_path: Any) -> None:
    def build(order: int = 1) -> TrainState:
        model, head = net(), nn.Linear(6, 6)
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
        parameters = [*model.parameters(), *head.parameters()][::order]
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        return TrainState(model, optimizer, extras={"head": head})

    def steps(state: TrainState, number: int) -> TrainState:
        head = state.extras["head"]
        return train(state, number, loss_fn=lambda m, b: (head(m(b["x"])) - 1).square().mean())

    whole, half = steps(build(), 6), steps(build(), 4)
    save_checkpoint(tmp_path, half, strategy=CPU)
    load_checkpoint(tmp_path, resumed := build(-1), strategy=CPU)
    steps(resumed, 6)
    assert same(weights(whole), weights(resumed))
    assert torch.equal(whole.extras["head"].weight, resumed.extras["head"].weight)


def test_an_optimizer_among_the_extras(tmp_path: Any) -> None:
    def build(order: int = 1) -> TrainState:
        model = net(torch.bfloat16)
        second = Mixed([*model[2].parameters()][::order])
        first = torch.optim.AdamW(model[0].parameters(), lr=0.01)
        return TrainState(model, first, extras={"second": second})

    def steps(state: TrainState, number: int) -> TrainState:
        second = state.extras["second"]
        for _ in train_steps(state, ROWS, max_steps=number, loss_fn=loss_fn, strategy=CPU):
            second.step()
            second.zero_grad()
        return state

    whole, half = steps(build(), 6), steps(build(), 4)
    save_checkpoint(tmp_path, half, strategy=CPU)
    for order in (1, -1):
        load_checkpoint(tmp_path, resumed := build(order), strategy=CPU)
        own = half.extras["second"], resumed.extras["second"]
        assert same(by_name(half, own[0]), by_name(resumed, own[1]))
        assert same(weights(whole), weights(steps(resumed, 6)))


def test_a_state_dict_of_torch_itself_is_taken_by_numbers() -> None:
    build = groups([NAMES])
    half = train(build(), 4)
    saved = half.state_dict() | {"optimizer": copy.deepcopy(half.optimizer.state_dict())}
    (other := build()).load_state_dict(saved)
    assert same(by_name(half), by_name(other))
    smaller = groups([NAMES[:2], NAMES[2:]])()
    with pytest.raises(ConfigError, match=r"groups of \[4\] parameters .* of \[2, 2\] here"):
        smaller.load_state_dict(saved)


def test_state_of_parameters_in_no_group_is_told(tmp_path: Any) -> None:
    state = train(groups([NAMES])(), 2)
    left = state.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(CheckpointError, match=r"state of 1 parameters .* of shape \(6,\)"):
        save_checkpoint(tmp_path, state, strategy=CPU)
    state.optimizer.state.pop(left)
    save_checkpoint(tmp_path, state, strategy=CPU)


def test_accelerate_takes_over_an_optimizer_with_its_state_as_it_is() -> None:
    from accelerate import Accelerator

    model = net(torch.bfloat16)
    state = train(TrainState(model, Mixed(model.parameters())), 2)
    before = copy.deepcopy(by_name(state))
    strategy = Accelerated(Accelerator(cpu=True))
    for _ in train_steps(state, ROWS, max_steps=2, loss_fn=loss_fn, strategy=strategy):
        pass
    assert type(state.optimizer).__name__ == "AcceleratedOptimizer"
    assert same(by_name(state), before)


def test_named_parameters_in_another_order_keep_their_names(tmp_path: Any) -> None:
    def build(order: int = 1) -> TrainState:
        model = net()
        return TrainState(model, torch.optim.AdamW([*model.named_parameters()][::order], lr=0.01))

    save_checkpoint(tmp_path, half := train(build(), 4), strategy=CPU)
    load_checkpoint(tmp_path, resumed := build(-1), strategy=CPU)
    assert same(by_name(half), by_name(resumed))
    (group,) = resumed.optimizer.param_groups
    assert group["param_names"] == NAMES[::-1]


def test_the_file_names_the_weights(tmp_path: Any) -> None:
    path = save_checkpoint(tmp_path, train(groups([NAMES])(), 4), strategy=CPU)
    names = load_file(path / "optimizer.safetensors").keys()
    assert "optimizer.0.state.2.weight.exp_avg" in names


def test_the_moments_of_every_class_of_torch_are_known() -> None:
    from manualloop.optimizers.fit import _MOMENTS

    kinds = {
        name
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    }
    assert kinds - _MOMENTS.keys() == {"Optimizer", "LBFGS", "Adafactor"}
