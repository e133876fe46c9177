"""Mistakes people make, as scripts, and what each of them must lead to.

A mistake is a function ``(fit, model, line)``. With ``line=None`` it is what the user wrote. Then
the error must name what happened and where, and contain a line of code; with that very line, taken
out of the message, the same program must run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader

from manualloop import (
    ManualLoopError,
    TrainState,
    prepare_optimizer,
    train_loop,
    train_steps,
)

Fit = Callable[..., Any]


def by_train_loop(model: nn.Module, loader: Any, **arguments: Any) -> None:
    length = {} if "max_steps" in arguments else {"num_epochs": 1}
    train_loop(model, loader, progress_bar=False, **{**length, **arguments})


def by_train_steps(model: nn.Module, loader: Any, **arguments: Any) -> None:
    length = {} if "max_steps" in arguments else {"num_epochs": 1}
    optimizer = arguments.pop("optimizer", None) or prepare_optimizer(model)
    for _ in train_steps(TrainState(model, optimizer), loader, **{**length, **arguments}):
        pass


class Mistake(NamedTuple):
    name: str
    error: type[ManualLoopError]
    says: tuple[str, ...]  # parts of the message: what happened, and where
    line: str  # the code in the message that fixes it
    script: Callable[[Fit, nn.Module, str | None], None]
    model: Callable[[], nn.Module]
    from_error: bool  # whether it is raised from another library's error


def collect() -> tuple[list[Mistake], Callable[..., Any]]:
    """A list of mistakes, and the decorator that adds to it."""
    mistakes: list[Mistake] = []

    def mistake(
        name: str,
        error: type[ManualLoopError],
        *says: str,
        line: str,
        model: Callable[[], nn.Module] = tiny_bert,
        from_error: bool = False,
    ) -> Callable[[Any], Any]:
        def add(script: Any) -> Any:
            mistakes.append(Mistake(name, error, says, line, script, model, from_error))
            return script

        return add

    return mistakes, mistake


def each(mistakes: list[Mistake]) -> Any:
    ids = [mistake.name.replace(" ", "-") for mistake in mistakes]
    return pytest.mark.parametrize("mistake", mistakes, ids=ids)


def keywords(line: str | None) -> dict[str, Any]:
    """The line is one of keyword arguments."""
    return eval(f"dict({line})", {"torch": torch}) if line else {}


def value(line: str | None, **names: Any) -> Any:
    """The line is an expression of names, and replaces the first of them."""
    if line is None:
        return next(iter(names.values()))
    modules = {"datasets": datasets, "prepare_optimizer": prepare_optimizer}
    return eval(line, {**modules, **names})


# What users write who build their loaders themselves. -----------------------------------------


def tokenized(dataset: Dataset, **options: Any) -> Dataset:
    """The rows of a dataset of sentences, tokenized and all of one length."""
    options = {"truncation": True, "padding": "max_length", "max_length": 8, **options}
    tokenizer = tiny_tokenizer()
    table = dataset.map(lambda row: dict(tokenizer(row["sentence"], **options)))
    return table.remove_columns("sentence")


def own_loader(dataset: Dataset, **options: Any) -> DataLoader:
    """torch's default collate over rows of tensors."""
    return DataLoader(dataset.with_format("torch"), batch_size=4, **options)


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


each_loop = pytest.mark.parametrize("fit", [by_train_loop, by_train_steps])


def assert_refused(mistake: Mistake, fit: Fit, updates: list[torch.optim.Optimizer]) -> None:
    """Without the line: refused before the first update, in words that help."""
    model = mistake.model()
    before = bits_of(model)
    with pytest.raises(ManualLoopError) as refused:
        mistake.script(fit, model, None)
    message = str(refused.value)
    assert type(refused.value) is mistake.error
    assert isinstance(refused.value, ValueError)
    for part in (*mistake.says, mistake.line):
        assert part in message
    assert all(message.index(part) <= message.rindex(mistake.line) for part in mistake.says)
    assert message.endswith(".")
    assert len(message) < 500
    assert isinstance(refused.value.__cause__, Exception) == mistake.from_error
    assert updates == []
    assert_same_bits(model, before)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def assert_fixed(mistake: Mistake, updates: list[torch.optim.Optimizer]) -> None:
    """With the line out of the message the same script trains."""
    mistake.script(by_train_loop, mistake.model(), mistake.line)
    assert updates
