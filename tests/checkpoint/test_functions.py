"""A function that was edited, or that reads other values, is told from the one before."""

from __future__ import annotations

import runpy
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import DataCollatorForLanguageModeling

from manualloop import evaluate_loop
from manualloop.checkpoint.functions import describe_function, function_facts

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
    assert described == "manualloop.evaluation.loop.evaluate_loop(Linear, [1], 'glue/mrpc')"


def test_functions_that_refer_to_themselves_end() -> None:
    def loss_fn(model: Any, batch: Any, depth: int = 3) -> Any:
        return loss_fn(model, batch, depth - 1) if depth else model(batch)

    assert describe_function(loss_fn) == describe_function(loss_fn)


def test_functions_are_the_same_in_every_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from manualloop.checkpoint.functions import describe_function\n"
        "kinds = {'a', 'b', 'c'}\n"
        "def loss_fn(model, batch, names=frozenset({'u', 'v', 'w'})):\n"
        "    return model(kinds) if batch in {'x', 'y'} else (lambda row: row * 2.5)(batch)\n"
        "print(describe_function(loss_fn))\n"
    )
    runpy.run_path(str(script), run_name="__main__")
    # The other process hashes its strings in another way.
    forked = processes.run(script, is_merged=False)
    assert forked.output == capsys.readouterr().out
    assert forked.output.startswith("loss_fn (code ")


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


# Pairs of the same function that reads other values, which must be told by name; None: by any.


def reading(value: Any) -> Callable[..., Any]:
    return lambda model, batch: model(batch) * value


def by_key(value: Any) -> Callable[..., Any]:
    return lambda model, batch: model(batch) * value["margin"]


def by_get(value: Any) -> Callable[..., Any]:
    return lambda model, batch: model(batch) * value.get("margin", 1.0)


def by_attribute(value: Any) -> Callable[..., Any]:
    return lambda model, batch: model(batch) * value.margin


def of_all(value: Any) -> Callable[..., Any]:
    return lambda model, batch: sum(weight * model(batch) for weight in value.values())


def margin_of(value: Any) -> Any:
    return value["margin"]


def through_a_helper(value: Any) -> Callable[..., Any]:
    return lambda model, batch: model(batch) * margin_of(value)


def by_method(value: Any) -> Callable[..., Any]:
    return lambda model, batch: value.loss(model, batch)


@lru_cache
def cached_margin() -> float:
    return SCALE


def with_cache(model: Any, batch: Any) -> Any:
    return model(batch) * cached_margin()


class Slots:
    __slots__ = ("margin",)

    def __init__(self, margin: float) -> None:
        self.margin = margin


class Reduction(Enum):
    MEAN = 1
    SUM = 2


@dataclass
class Config:
    margin: float
    num_epochs: int = 3


def config_class(value: float) -> type:
    return type("Config", (), {"margin": value, "__module__": __name__})


class Combined(nn.Module):
    """A loss of two others, which a module keeps among its children."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.first = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(self, outputs: Any, labels: Any) -> Any:
        return self.first(outputs, labels)


class WithDict:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.counts = settings, {"n": 0}

    def loss(self, model: Any, batch: Any) -> Any:
        self.counts["n"] += 1
        return model(batch) * self.settings["margin"]


def edited_loss(self: Any, model: Any, batch: Any) -> Any:
    return self.scaled(self.criterion(model(batch[0]), batch[1])) + 1


OTHERS: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "a list": (reading, [1.0, 2.0], [1.0, 3.0]),
    "a longer list": (reading, [1.0], [1.0, 2.0]),
    "a list of lists": (reading, [[1.0], [2.0]], [[1.0], [3.0]]),
    "a list of functions": (reading, [plainly], [with_a_constant]),
    "a set": (reading, {"a", "b"}, {"a", "c"}),
    "a deque": (reading, deque([1.0]), deque([2.0])),
    "a dict by number": (reading, {0: 1.0, 1: 2.0}, {0: 1.0, 1: 3.0}),
    "a dict of tensors": (of_all, {"a": torch.ones(2)}, {"a": torch.zeros(2)}),
    "a dict that is iterated": (of_all, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.5}),
    "a key more": (of_all, {"a": 1.0}, {"a": 1.0, "b": 1.0}),
    "a key": (by_key, {"margin": 1.0}, {"margin": 2.0}),
    "a list by key": (by_key, {"margin": [1.0]}, {"margin": [2.0]}),
    "a key by get": (by_get, {"margin": 1.0}, {"margin": 2.0}),
    "a key in a helper": (through_a_helper, {"margin": 1.0}, {"margin": 2.0}),
    "slots": (by_attribute, Slots(1.0), Slots(2.0)),
    "a dataclass": (by_attribute, Config(1.0), Config(2.0)),
    "a class of settings": (by_attribute, config_class(1.0), config_class(2.0)),
    "a namespace": (by_attribute, SimpleNamespace(margin=1.0), SimpleNamespace(margin=2.0)),
    "a list in a namespace": (
        by_attribute,
        SimpleNamespace(margin=[1.0]),
        SimpleNamespace(margin=[2.0]),
    ),
    "an enum": (reading, Reduction.MEAN, Reduction.SUM),
    "a dtype": (reading, torch.float32, torch.bfloat16),
    "a path": (reading, Path("weights/a.csv"), Path("weights/b.csv")),
    "a large tensor": (reading, torch.zeros(20_000), torch.ones(20_000)),
    "a module of modules": (reading, Combined(0.0), Combined(0.1)),
    "a value of a method": (by_method, Experiment(0.5), Experiment(0.6)),
    "an object of a method": (by_method, Experiment(0.5), Experiment(0.5, smoothing=0.1)),
    "the code of a method": (
        by_method,
        Experiment(0.5),
        type("Experiment", (Experiment,), {"loss": edited_loss, "__module__": __name__})(0.5),
    ),
    "a dict of a method": (
        by_method,
        WithDict({"margin": 1.0, "num_epochs": 2}),
        WithDict({"margin": 2.0, "num_epochs": 2}),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_value_that_a_function_reads_is_told_by_name(name: str) -> None:
    function, one, other = OTHERS[name]
    (text, values), (other_text, other_values) = map(function_facts, map(function, (one, other)))
    assert function_facts(function(deepcopy(one))) == (text, values)  # another object alike
    assert text == other_text
    (changed,) = [key for key in values if values[key] != other_values[key]]
    assert changed.partition(".")[0] == "value"
    assert describe_function(function(one)) != describe_function(function(other))


def scaled_by(value: Any, model: Any, batch: Any) -> Any:
    return model(batch) * (value.margin if hasattr(value, "margin") else value["margin"])


@pytest.mark.parametrize("kind", [lambda margin: {"margin": margin}, Config, Slots, config_class])
def test_what_a_partial_is_given_counts(kind: Any) -> None:
    one, same, other = (describe_function(partial(scaled_by, kind(n))) for n in (1.0, 1.0, 2.0))
    assert one == same != other
    assert describe_function(partial(scaled_by, value=kind(1.0))) != describe_function(
        partial(scaled_by, value=kind(2.0))
    )


@pytest.mark.parametrize(
    ("function", "one", "other"),
    [
        (by_key, {"margin": 1.0, "num_epochs": 3}, {"margin": 1.0, "num_epochs": 5}),
        (by_get, {"margin": 1.0, "name": "a"}, {"margin": 1.0, "name": "b"}),
        (through_a_helper, {"margin": 1.0, "seed": 3}, {"margin": 1.0, "seed": 4}),
        (by_attribute, Config(1.0, 3), Config(1.0, 5)),
        (by_method, WithDict({"margin": 1.0, "epochs": 2}), WithDict({"margin": 1.0, "epochs": 3})),
        (by_method, Experiment(0.5, run_name="a"), Experiment(0.5, run_name="b")),
        (reading, object(), object()),
        (reading, torch.Generator(), torch.Generator()),
        (reading, iter([1]), iter([2])),
        (reading, nn.Linear(1, 1), nn.Linear(1, 1)),
        (reading, time.time(), time.time()),
        (reading, int(time.time()), int(time.time()) - 1),
        (reading, time.time_ns(), time.time_ns()),
    ],
    ids=count(),  # not the values: the processes that collect the tests must agree on their names
)
def test_what_it_does_not_read_or_what_is_another_each_time_does_not_count(
    function: Any, one: Any, other: Any
) -> None:
    assert function_facts(function(one)) == function_facts(function(other))


def test_an_edited_or_cached_helper_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before, values = function_facts(with_cache)
    assert values == {"cached_margin.SCALE": "2.0"}
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert function_facts(with_cache) == (before, {"cached_margin.SCALE": "3.0"})
    before, values = function_facts(through_a_helper({"margin": 1.0}))
    monkeypatch.setitem(globals(), "margin_of", lambda value: value["margin"] * 2)
    text, same = function_facts(through_a_helper({"margin": 1.0}))
    assert (text != before, same == values) == (True, True)


counts: dict[str, Any] = {"n": 0, "losses": []}


def test_what_a_function_counts_in_a_container_does_not_count() -> None:
    """A second run in one process begins with the counters of the first."""
    seen: list[float] = []
    last: dict[Any, float] = {}
    kept: deque[float] = deque()
    names: set[str] = set()
    weights = [1.0, 2.0]

    def loss_fn(model: Any, batch: Any) -> Any:
        counts["n"] += 1
        counts["last"] = batch
        seen.append(batch)
        last[batch] = 1.0
        kept.extend([batch])
        names.add(str(batch))
        return model(batch) * weights[0] + len(seen) + len(last) + len(kept) + len(names)

    experiment = WithDict({"margin": 1.0})
    before = [function_facts(loss_fn), function_facts(experiment.loss)]
    loss_fn(abs, 3)
    experiment.loss(abs, 3)
    assert [function_facts(loss_fn), function_facts(experiment.loss)] == before
    weights.append(3.0)
    assert function_facts(loss_fn) != before[0]


class Centred(nn.Module):
    """A loss with a running mean, as in DINO."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("scale", torch.ones(2))
        self.norm = nn.BatchNorm1d(2, affine=False)

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        self.center.mul_(0.9).add_(outputs.mean(dim=0), alpha=0.1)
        return (self.norm(outputs - self.center) * self.scale).square().mean()


def test_a_running_mean_of_a_loss_does_not_count() -> None:
    loss, center = Centred(), torch.zeros(2)

    def loss_fn(model: Any, batch: Any) -> Any:
        center.lerp_(torch.ones(2), 0.1)
        return loss(model(batch)) + center.sum()

    before = function_facts(loss_fn), describe_function(loss)
    loss_fn(nn.Identity(), torch.randn(4, 2))
    assert (function_facts(loss_fn), describe_function(loss)) == before
    loss.scale = torch.zeros(2)
    assert function_facts(loss_fn) != before[0]
    assert describe_function(loss) != before[1]


def test_containers_that_hold_themselves_end() -> None:
    endless: list[Any] = [1.0]
    endless.append(endless)
    assert function_facts(reading(endless)) == function_facts(reading(endless))
