"""Objects are described as the script has built them: the same in every process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import tiny_bert
from torch import nn
from torch.optim import lr_scheduler as schedules

from manualloop import prepare_scheduler
from manualloop.checkpoint.facts import (
    model_facts,
    optimizer_facts,
    schedule_facts,
)


class Net(nn.Module):
    def __init__(self, drop: float = 0.1) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 2), drop

    def forward(self, x: Any) -> Any:
        return nn.functional.dropout(self.layer(x), self.drop, self.training)


def frozen(model: nn.Module) -> nn.Module:
    next(model.parameters()).requires_grad_(False)
    return model


def last_frozen(model: nn.Module) -> nn.Module:
    list(model.parameters())[-1].requires_grad_(False)
    return model


def test_the_time_at_which_a_model_was_built_does_not_count() -> None:
    first, second = Net(), Net()
    first.built_at, second.built_at = time.time(), time.perf_counter()
    assert model_facts(first) == model_facts(second)


def test_what_a_model_counts_does_not_count() -> None:
    class Counting(Net):
        num_calls = 0

        def forward(self, x: Any) -> Any:
            self.num_calls += 1
            return super().forward(x)

    model = Counting()
    before = model_facts(model)
    model(torch.ones(1, 2))
    assert model.num_calls == 1
    assert model_facts(model) == before


def test_models_differ_by_class_config_settings_of_modules_and_frozen_parameters() -> None:
    models = [
        Net(),
        Net(0.2),
        frozen(Net()),
        last_frozen(Net()),
        nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.2)),
        nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.1)),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.LeakyReLU(0.1)),
        nn.Sequential(nn.LeakyReLU(0.2)),
        nn.Sequential(nn.LayerNorm(2, eps=1e-5)),
        nn.Sequential(nn.LayerNorm(2, eps=1e-6)),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=2)),
        tiny_bert(2),
        tiny_bert(2, hidden_dropout_prob=0.3),
        tiny_bert(2, classifier_dropout=0.3),
    ]
    assert len({repr(model_facts(model)) for model in models}) == len(models)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_forward_pass_changes_no_fact() -> None:
    model = tiny_bert(2)
    before = model_facts(model)
    ids = torch.tensor([[5, 6]])
    model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    model.eval()
    model.gradient_checkpointing_enable()
    assert model_facts(model) == before


def optimizer(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), **{"lr": 0.1, **options})


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedules.StepLR(o, 2, gamma=0.5),
        lambda o: schedules.MultiStepLR(o, [2, 5]),
        lambda o: schedules.ExponentialLR(o, 0.9),
        lambda o: schedules.CosineAnnealingLR(o, 9),
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
        lambda o: schedules.OneCycleLR(o, 0.2, total_steps=9),
        lambda o: schedules.CyclicLR(o, 0.1, 0.2, step_size_up=3),
        lambda o: schedules.PolynomialLR(o, 9),
        lambda o: schedules.LinearLR(o, total_iters=5),
        lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
        lambda o: schedules.SequentialLR(
            o, [schedules.ConstantLR(o, 0.5, 2), schedules.StepLR(o, 2)], [3]
        ),
        lambda o: schedules.ChainedScheduler([schedules.StepLR(o, 2), schedules.ConstantLR(o)]),
        lambda o: prepare_scheduler(o, "linear", num_training_steps=9),
        lambda o: prepare_scheduler(o, "cosine", num_training_steps=9, num_warmup_steps=2),
    ],
)
def test_the_same_schedule_is_described_alike(make: Callable[..., Any]) -> None:
    built, again = make(optimizer()), make(optimizer())
    assert schedule_facts(built) == schedule_facts(again)
    assert optimizer_facts(built.optimizer) == optimizer_facts(again.optimizer)


@pytest.mark.parametrize(
    "pair",
    [
        [partial(schedules.StepLR, step_size=2, gamma=gamma) for gamma in (0.1, 0.2)],
        [partial(schedules.StepLR, step_size=size) for size in (2, 3)],
        [partial(schedules.MultiStepLR, milestones=[at]) for at in (2, 3)],
        [partial(schedules.OneCycleLR, max_lr=lr, total_steps=9) for lr in (0.2, 0.3)],
        [partial(schedules.OneCycleLR, max_lr=0.2, total_steps=number) for number in (8, 9)],
        [partial(schedules.CosineAnnealingWarmRestarts, T_0=number) for number in (2, 3)],
        [partial(schedules.LambdaLR, lr_lambda=lambda s, k=k: k / (s + 1)) for k in (1.0, 2.0)],
        [partial(schedules.LambdaLR, lr_lambda=rate) for rate in (lambda s: 1.0, lambda s: 0.5)],
        [
            partial(prepare_scheduler, name=name, num_training_steps=9)
            for name in ("linear", "cosine")
        ],
        [
            partial(prepare_scheduler, name="polynomial", num_training_steps=9, power=power)
            for power in (1.0, 2.0)
        ],
        [
            lambda o, at=at: schedules.SequentialLR(
                o, [schedules.ConstantLR(o), schedules.StepLR(o, at)], [3]
            )
            for at in (2, 3)
        ],
        [
            lambda o, gamma=gamma: schedules.ChainedScheduler([schedules.ExponentialLR(o, gamma)])
            for gamma in (0.8, 0.9)
        ],
    ],
)
def test_schedules_differ_by_kind_and_settings(pair: list[Callable[..., Any]]) -> None:
    built = [make(optimizer()) for make in pair]
    facts = [(schedule_facts(s), optimizer_facts(s.optimizer)) for s in built]
    assert facts[0] != facts[1]


def test_groups_have_the_rate_that_a_schedule_scales() -> None:
    model = nn.Linear(1, 1)
    groups = [{"params": [model.weight], "lr": 0.3}, {"params": [model.bias]}]
    made = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9))
    prepare_scheduler(made, "linear", num_training_steps=9, num_warmup_steps=3)
    assert [group["lr"] for group in made.param_groups] == [0.0, 0.0]
    facts = optimizer_facts(made)
    assert [group["lr"] for group in facts] == [0.3, 0.1]
    assert [group["betas"] for group in facts] == [[0.8, 0.9]] * 2
