"""Old names work with a warning that points to the line of the caller."""

import inspect
import types
import warnings
from pathlib import Path

import pytest

from manualloop.deprecation import renamed, renamed_keyword

LINES = Path(__file__).read_text().splitlines()


@renamed_keyword("steps", "max_steps", ends="0.4.0")
def train(model, *, max_steps=3):
    """Train."""
    return model, max_steps


def test_an_old_keyword_works_and_names_the_new_one_at_the_callers_line():
    with pytest.warns(FutureWarning) as caught:
        assert train("model", steps=7) == ("model", 7)
    (warning,) = caught
    assert str(warning.message) == (
        "train(steps=...) ends with manualloop 0.4.0. Write train(max_steps=...)."
    )
    assert warning.filename == __file__
    assert "train(" in LINES[warning.lineno - 1]


def test_the_new_keyword_is_silent_and_the_signature_is_that_of_the_function():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train("model", max_steps=7) == ("model", 7)
    assert str(inspect.signature(train)) == "(model, *, max_steps=3)"
    assert train.__doc__ == "Train."


def test_both_names_are_refused_and_an_unknown_one_stays_unknown():
    with pytest.raises(TypeError, match="max_steps and its old name steps"):
        train("model", steps=7, max_steps=7)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        train("model", step=7)


def test_an_old_name_of_a_module_works_and_names_the_new_one():
    module = types.ModuleType("library")
    module.train_loop = train

    def get(name):
        if name == "fit":
            return renamed("fit", "train_loop", module.train_loop, ends="0.4.0")
        raise AttributeError(name)

    module.__getattr__ = get
    expected = r"manualloop\.fit ends .* Write manualloop\.train_loop"
    with pytest.warns(FutureWarning, match=expected) as caught:
        assert module.fit is train
    assert "module.fit is" in LINES[caught[0].lineno - 1]
    with pytest.raises(AttributeError):
        module.fitted  # noqa: B018
