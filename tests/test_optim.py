"""The optimizer and the schedule: what they are by default, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Adafactor

from manualloop import ConfigError, ModelError, prepare_optimizer, prepare_scheduler


def make_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=True))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for _ in range(5):
        optimizer.zero_grad()
        (model(ids) ** 2).mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def lrs(name: str, num_steps: int = 10, lr: float = 2.0, **options: Any) -> list[float]:
    """The learning rate of every update, and the one after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = prepare_scheduler(optimizer, name, num_training_steps=num_steps, **options)
    trace = []
    for _ in range(num_steps):
        trace.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*trace, optimizer.param_groups[0]["lr"]]


# The optimizer ------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_course_and_of_the_trainer() -> None:
    model, written_out = make_model(), make_model()
    expected = torch.optim.AdamW(
        written_out.parameters(),
        lr=5e-5,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        fused=True,
    )
    optimizer = prepare_optimizer(model)
    assert type(optimizer) is torch.optim.AdamW
    (group,), (expected_group,) = optimizer.param_groups, expected.param_groups
    assert {**group, "params": None} == {**expected_group, "params": None}
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))
    trained = zip(train(model, optimizer), train(written_out, expected), strict=True)
    assert all(torch.equal(one, other) for one, other in trained)


def test_every_number_reaches_torch() -> None:
    numbers = {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3}
    (group,) = prepare_optimizer(make_model(), **numbers).param_groups  # type: ignore[arg-type]
    assert {name: group[name] for name in numbers} == numbers


def test_weight_decay_spares_biases_and_norms() -> None:
    model: Any = make_model()
    decayed, spared = prepare_optimizer(model, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[2].weight)]
    left = [model[1].weight, model[1].bias, model[2].bias]
    assert [id(p) for p in spared["params"]] == [id(p) for p in left]


@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_weight_decay_with_one_kind_of_parameter(shape: tuple[int, ...]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(shape))])
    optimizer = prepare_optimizer(model, lr=0.1, weight_decay=0.5)
    model[0].grad = torch.zeros(shape)
    optimizer.step()
    expected = 1.0 if len(shape) == 1 else 1 - 0.1 * 0.5
    assert torch.allclose(model[0], torch.full(shape, expected))


def test_fused_wherever_torch_has_it() -> None:
    assert prepare_optimizer(make_model()).param_groups[0]["fused"] is True
    assert prepare_optimizer(make_model(), fused=True).param_groups[0]["fused"] is True
    assert prepare_optimizer(make_model(), fused=False).param_groups[0]["fused"] is False


def test_not_fused_where_torch_has_it_not() -> None:
    meta = nn.Linear(2, 2, device="meta")
    complex_numbers = nn.Linear(2, 2, dtype=torch.complex64)
    for model in (meta, complex_numbers):
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 1.0}]
        for options in ({}, {"param_groups": groups}):
            optimizer = prepare_optimizer(model, **options)  # type: ignore[arg-type]
            assert [bool(g["fused"]) for g in optimizer.param_groups] == [False] * (
                2 if options else 1
            )
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # torch would refuse here, not before


def test_frozen_parameters_are_left_out() -> None:
    model: Any = make_model()
    model[0].requires_grad_(False)
    for options in ({}, {"weight_decay": 0.1}):
        groups = prepare_optimizer(model, **options).param_groups  # type: ignore[arg-type]
        given = {id(parameter) for group in groups for parameter in group["params"]}
        assert given == {id(p) for p in [*model[1].parameters(), *model[2].parameters()]}


def test_groups_of_ones_own_are_copied() -> None:
    model: Any = make_model()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": [model[2].weight], "weight_decay": 0.3},
    ]
    optimizer = prepare_optimizer(model, lr=0.1, weight_decay=0.2, param_groups=iter(groups))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.2),
        (0.1, 0.3),
    ]
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1]
    assert [set(group) for group in groups] == [{"params", "lr"}, {"params", "weight_decay"}]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1e-3},
        {"lr": math.nan},
        {"weight_decay": -0.1},
        {"weight_decay": math.nan},
        {"eps": -1e-8},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
    ],
)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError) as caught:
        prepare_optimizer(make_model(), **options)
    assert f"{name}={value}" in str(caught.value)


def test_nothing_to_train() -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(ModelError, match="0 trainable parameters of 5"):
        prepare_optimizer(model)
    with pytest.raises(ModelError, match="0 trainable parameters of 0"):
        prepare_optimizer(nn.ReLU())


# The schedule -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(num_steps=st.integers(1, 50), data=st.data())
def test_linear_is_its_closed_form(num_steps: int, data: st.DataObject) -> None:
    num_warmup = data.draw(st.integers(0, num_steps))
    trace = lrs("linear", num_steps, num_warmup_steps=num_warmup)
    expected = [
        2.0 * t / num_warmup
        if t < num_warmup
        else 2.0 * (num_steps - t) / max(1, num_steps - num_warmup)
        for t in range(num_steps)
    ]
    assert trace[:-1] == pytest.approx(expected)
    assert trace[-1] == 0


@pytest.mark.parametrize(
    ("share", "num_steps", "num_warmup"), [(0.1, 10, 1), (0.25, 10, 3), (0.001, 10, 1), (0.5, 8, 4)]
)
def test_warm_up_as_a_share_is_rounded_up(share: float, num_steps: int, num_warmup: int) -> None:
    trace = lrs("linear", num_steps, num_warmup_steps=share)
    assert trace == lrs("linear", num_steps, num_warmup_steps=num_warmup)
    assert trace[num_warmup] == max(trace) == 2.0


def test_cosine() -> None:
    trace = lrs("cosine", num_warmup_steps=2)
    expected = [1 + math.cos(math.pi * (t - 2) / 8) for t in range(2, 11)]
    assert trace == pytest.approx([0.0, 1.0, *expected])


def test_keywords_reach_the_schedule() -> None:
    whole = lrs("cosine", num_cycles=1.0)
    assert whole == pytest.approx([1 + math.cos(2 * math.pi * t / 10) for t in range(11)])
    lowest = lrs("cosine_with_min_lr", min_lr=0.5)
    assert (lowest[0], lowest[-1]) == (2.0, pytest.approx(0.5))


def test_constant() -> None:
    assert lrs("constant") == [2.0] * 11
    assert lrs("constant_with_warmup", num_warmup_steps=2) == [0.0, 1.0, *[2.0] * 9]


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="lr_scheduler='lineal' is unknown") as caught:
        lrs("lineal")
    message = str(caught.value)
    assert "linear, cosine" in message
    assert "plateau" not in message  # nor is it offered what would be refused
    assert "greedy" not in message


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' follows a metric"):
        lrs(name)


def test_every_name_that_is_offered_can_be_stepped() -> None:
    with pytest.raises(ConfigError) as caught:
        lrs("?")
    names = str(caught.value).rpartition(": ")[2].rstrip(".").split(", ")
    wanted: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr": 0.1},
        "cosine_warmup_with_min_lr": {"min_lr": 0.1},
    }
    assert len(names) >= 8
    for name in set(names) - {"warmup_stable_decay"}:  # its arguments differ between versions
        trace = lrs(name, num_warmup_steps=0 if name == "constant" else 2, **wanted.get(name, {}))
        assert max(trace) == pytest.approx(2.0)


@pytest.mark.parametrize("num_warmup", [-1, 11, 2.5, math.nan, math.inf, -0.1])
def test_a_warm_up_that_does_not_fit(num_warmup: float) -> None:
    with pytest.raises(ConfigError, match=f"num_warmup_steps={num_warmup}"):
        lrs("linear", num_warmup_steps=num_warmup)


def test_an_optimizer_without_a_learning_rate() -> None:
    optimizer = Adafactor([nn.Parameter(torch.ones(1))], lr=None)
    with pytest.raises(ConfigError, match=r"Adafactor has lr=None .* lr_scheduler=None"):
        prepare_scheduler(optimizer, num_training_steps=3)


def test_no_steps() -> None:
    with pytest.raises(ConfigError, match="num_training_steps=0"):
        lrs("linear", 0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("linear", {"num_cycles": 2}, "num_cycles"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("constant", {"num_warmup_steps": 3}, "would ignore num_warmup_steps"),
        ("constant", {"power": 3}, "would ignore power"),
    ],
)
def test_arguments_that_a_schedule_does_not_take(
    name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        lrs(name, **options)
    assert name in str(caught.value)
