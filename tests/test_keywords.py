"""What to write instead of an argument that ``train_loop`` does not have."""

import inspect
import re

import pytest
import torch

import manualloop
from manualloop import ConfigError, eject, preflight, train_loop
from manualloop.keywords import _ELSEWHERE, instead_of

KNOWN = inspect.signature(train_loop).parameters


def loss_fn(model, batch):
    return model(batch["x"]).mean()


def call(**options):
    return train_loop(torch.nn.Linear(1, 1), [{"x": torch.ones(2, 1)}], loss_fn=loss_fn, **options)


def test_names_of_others_are_told_all_at_once():
    with pytest.raises(TypeError) as caught:
        call(lr=1e-4, epochs=2, num_epoch=3, nonsense=1)
    assert isinstance(caught.value, ConfigError)
    first, second, third, fourth = str(caught.value).splitlines()
    assert first.endswith("optimizer=prepare_optimizer(model, lr=0.0001).")
    assert second == "train_loop has no argument epochs. Write num_epochs=2."
    assert third.endswith("Did you mean num_epochs=?")
    assert fourth == "train_loop has no argument nonsense. Leave it out."


def test_the_signature_is_that_of_the_function():
    assert list(KNOWN)[:2] == ["model", "train_dataloader"]
    assert all(one.kind is not one.VAR_KEYWORD for one in KNOWN.values())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        train_loop(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("function", [eject, preflight])
def test_functions_of_the_same_arguments_tell_the_same(function):
    with pytest.raises(ConfigError, match=r"no (argument )?lr.*prepare_optimizer\(model, lr=0.1\)"):
        function(torch.nn.Linear(1, 1), [{"x": torch.ones(2, 1)}], lr=0.1)


@pytest.mark.parametrize("name", ["learning_rate", *_ELSEWHERE])
def test_what_is_told_exists(name):
    """No name that is known, and each name in the text is an argument or a public function."""
    assert name not in KNOWN
    told = instead_of(name, 1, KNOWN)
    for function in re.findall(r"\b((?:prepare|evaluate|train)_\w+)\(", told):
        assert hasattr(manualloop, function)
    written = re.search(r"(?:Write|by) (\w+)[=(]", told)
    assert written is not None
    assert written[1] in KNOWN or hasattr(manualloop, written[1])
