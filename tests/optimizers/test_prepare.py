"""The optimizer: what it is by default, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manualloop import ConfigError, ModelError, prepare_optimizer


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


def test_numbers_out_of_range_are_named_alone_also_those_of_groups() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=r"^lr=-1 must be at least 0 and finite. Write") as error:
        prepare_optimizer(model, lr=-1)
    eval(str(error.value).partition("Write ")[2].removesuffix("."))
    groups = [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters())}]
    groups[1] |= {"lr": -1, "weight_decay": math.inf}
    with pytest.raises(ConfigError, match=r"lr=-1 .*weight_decay=inf") as error:
        prepare_optimizer(model, param_groups=groups)
    exec(str(error.value).partition("Write ")[2].removesuffix("."), {"param_groups": groups})
    assert prepare_optimizer(model, param_groups=groups).param_groups[1]["lr"] == 5e-5
