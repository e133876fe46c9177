"""A function that was edited, or that reads other values, is told from the one before."""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import DataCollatorForLanguageModeling

from manualloop import evaluate_loop
from manualloop.checkpoint.functions import describe_function

SCALE = 2.0
criterion: Any = nn.CrossEntropyLoss()
settings = Namespace(alpha=0.5, num_epochs=3)
by_name = {"alpha": 0.5, "num_epochs": 3}
config = ModuleType("config")
config.ALPHA = 0.5  # type: ignore[attr-defined]


def plainly(model: Any, batch: Any) -> Any:
    return model(batch)


def with_a_constant(model: Any, batch: Any) -> Any:
    return model(batch) * 0.5


def of_alpha(alpha: Any) -> Callable[..., Any]:
    return lambda model, batch: alpha * model(batch)


def with_default(model: Any, batch: Any, alpha: float = 1.0) -> Any:
    return alpha * model(batch)


def with_global(model: Any, batch: Any) -> Any:
    return SCALE * model(batch)


def through_helper(model: Any, batch: Any) -> Any:
    return with_global(model, batch)


def with_criterion(model: Any, batch: Any) -> Any:
    return criterion(model(batch[0]), batch[1])


def with_settings(model: Any, batch: Any) -> Any:
    return settings.alpha * model(batch)


def with_names(model: Any, batch: Any) -> Any:
    return by_name["alpha"] * model(batch)


def with_module(model: Any, batch: Any) -> Any:
    return config.ALPHA * model(batch)


class Focal(nn.Module):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma, self.num_calls = gamma, 0
        self.register_buffer("weight", torch.ones(2))

    def forward(self, model: Any, batch: Any) -> Any:
        self.num_calls += 1
        return model(batch) ** self.gamma


class Edited(Focal):
    def forward(self, model: Any, batch: Any) -> Any:
        return model(batch) ** self.gamma + 1


@dataclass
class Smoothed:
    epsilon: float = 0.1

    def loss_fn(self, model: Any, batch: Any) -> Any:
        return self.epsilon * self._inner(model, batch)

    def _inner(self, model: Any, batch: Any) -> Any:
        return model(batch)


def test_functions_differ_by_name_code_closure_defaults_arguments_and_attributes() -> None:
    functions = [
        plainly,
        with_a_constant,
        of_alpha(1.0),
        of_alpha(2.0),
        of_alpha((1.0, 2.0)),
        of_alpha(torch.tensor([1.0, 2.0])),
        of_alpha(torch.tensor([1.0, 3.0])),
        of_alpha(nn.CrossEntropyLoss()),
        of_alpha(nn.CrossEntropyLoss(label_smoothing=0.1)),
        with_default,
        partial(with_default, alpha=3.0),
        partial(with_default, alpha=4.0),
        partial(with_default, alpha=[3.0, 4.0]),
        partial(with_default, alpha=[3.0, 5.0]),
        partial(of_alpha(1.0), plainly),
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])),
        nn.BCEWithLogitsLoss(),
        Focal(1.0),
        Focal(2.0),
        Edited(1.0),
        Smoothed().loss_fn,
        Smoothed(0.2).loss_fn,
        DataCollatorForLanguageModeling(object(), mlm=False),
        DataCollatorForLanguageModeling(object(), mlm=False, pad_to_multiple_of=8),
        default_collate,
        print,
        nn.Linear,
    ]
    described = list(map(describe_function, functions))
    assert len(set(described)) == len(functions)
    assert describe_function(of_alpha(1.0)) == described[2]
    assert describe_function(Focal(1.0)) == describe_function(Focal(1.0))


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (with_global, "SCALE", 3.0),
        (through_helper, "SCALE", 3.0),
        (with_criterion, "criterion", nn.CrossEntropyLoss(label_smoothing=0.1)),
        (with_settings, "settings", Namespace(alpha=0.6, num_epochs=3)),
        (with_names, "by_name", {"alpha": 0.6, "num_epochs": 3}),
        (through_helper, "with_global", plainly),
    ],
)
def test_what_a_function_reads_counts(
    function: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = describe_function(function)
    monkeypatch.setitem(globals(), name, value)
    assert describe_function(function) != before


def test_the_members_of_a_module_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe_function(with_module)
    monkeypatch.setattr(config, "ALPHA", 0.6)
    assert describe_function(with_module) != before


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (with_settings, "settings", Namespace(alpha=0.5, num_epochs=9)),
        (with_names, "by_name", {"alpha": 0.5, "num_epochs": 9}),
        (with_global, "settings", None),
    ],
)
def test_what_a_function_does_not_read_does_not_count(
    function: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = describe_function(function)
    monkeypatch.setitem(globals(), name, value)
    assert describe_function(function) == before


def test_counters_do_not_count() -> None:
    calls, seen = 0, []

    def loss_fn(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        seen.append(batch)
        return model(batch)

    focal = Focal(1.0)
    before = [describe_function(loss_fn), describe_function(focal)]
    loss_fn(abs, 3)
    focal(abs, 3)
    assert [describe_function(loss_fn), describe_function(focal)] == before


def test_functions_of_installed_libraries_count_by_their_names() -> None:
    assert describe_function(default_collate).startswith("torch.utils.data._utils.collate.")
    described = describe_function(partial(evaluate_loop, nn.Linear(1, 1), [1], "glue/mrpc"))
    assert described == "manualloop.evaluation.loop.evaluate_loop(Linear, (1), 'glue/mrpc')"


def test_functions_that_refer_to_themselves_end() -> None:
    def loss_fn(model: Any, batch: Any, depth: int = 3) -> Any:
        return loss_fn(model, batch, depth - 1) if depth else model(batch)

    assert describe_function(loss_fn) == describe_function(loss_fn)


def test_functions_are_the_same_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from manualloop.checkpoint.functions import describe_function\n"
        "kinds = {'a', 'b', 'c'}\n"
        "def loss_fn(model, batch, names=frozenset({'u', 'v', 'w'})):\n"
        "    return model(kinds) if batch in {'x', 'y'} else (lambda row: row * 2.5)(batch)\n"
        "print(describe_function(loss_fn))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, str(script)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().startswith("loss_fn (code ")


class Experiment:
    """What a practitioner's class holds: a loss among much that the loss does not read."""

    def __init__(self, weight: float, smoothing: float = 0.0, run_name: str = "a") -> None:
        self.weight, self.run_name, self.started = weight, run_name, time.time()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def scaled(self, value: Any) -> Any:
        return value * self.weight

    def loss(self, model: Any, batch: Any) -> Any:
        return self.scaled(self.criterion(model(batch[0]), batch[1]))

    def report(self) -> str:
        return f"{self.run_name}: {time.time() - self.started}"


def test_of_an_object_with_a_method_only_what_the_method_reads_counts() -> None:
    before = describe_function(Experiment(0.5).loss)
    assert describe_function(Experiment(0.5, run_name="b").loss) == before
    assert describe_function(Experiment(0.6).loss) != before
    assert describe_function(Experiment(0.5, smoothing=0.1).loss) != before


def test_editing_a_method_counts_where_it_is_called() -> None:
    class Edited(Experiment):
        def report(self) -> str:
            return "edited"

    class Doubled(Experiment):
        def scaled(self, value: Any) -> Any:
            return value * self.weight * 2

    for kind in (Edited, Doubled):
        kind.__qualname__ = "Experiment"
    before = describe_function(Experiment(0.5).loss)
    assert describe_function(Edited(0.5).loss) == before
    assert describe_function(Doubled(0.5).loss) != before


@pytest.mark.parametrize("clock", [time.time, time.perf_counter])
def test_the_time_at_which_something_began_does_not_count(clock: Callable[[], float]) -> None:
    def timed(begin: float) -> Callable[..., Any]:
        return lambda: clock() - begin

    assert describe_function(timed(clock())) == describe_function(timed(clock()))
    assert describe_function(timed(0.5)) != describe_function(timed(0.25))


class Weighted:
    def __init__(self, weights: list[float]) -> None:
        self.weights, self.seen = weights, 0

    def __call__(self, model: Any, batch: Any) -> Any:
        self.seen += 1
        return model(batch) * self.weights[0]


def test_lists_that_a_method_reads_and_objects_that_a_function_calls_count() -> None:
    def calling(loss: Any) -> Callable[..., Any]:
        return lambda model, batch: loss(model, batch)

    first, same, other = Weighted([1.0]), Weighted([1.0]), Weighted([2.0])
    same(abs, 3)
    assert describe_function(calling(first)) == describe_function(calling(same))
    assert describe_function(calling(first)) != describe_function(calling(other))
    assert describe_function(first.__call__) == describe_function(same.__call__)
    assert describe_function(first.__call__) != describe_function(other.__call__)
