"""The reference has each public name, and pages for those who come from elsewhere each argument."""

import ast
import dataclasses
import inspect
import re
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGES = ("manualloop", "manualloop.tasks", "manualloop.tracking")


def entries():
    text = "\n".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
    return re.findall(r"^::: (\S+)$", text, re.M)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_public_name_has_an_entry(package):
    missing = {f"{package}.{name}" for name in import_module(package).__all__} - {*entries()}
    assert missing == set(), "add a line `::: name` to a page of docs/reference/"


def test_entries_are_there_once_and_exist():
    assert len(entries()) == len({*entries()})
    for name in entries():
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def named(page, *headings):
    """Return the names in the first column of the tables below these headings of a page."""
    text = (DOCS / "coming-from" / f"{page}.md").read_text()
    cells = []
    for heading in headings:
        section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        cells += re.findall(r"^\| (`.*?) \|", section[1], re.M)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def of_its_version(page, package):
    """Mark a test of a page that is about one version of a package."""
    shown = re.search(rf"{package} (\d+\.\d+)", (DOCS / "coming-from" / f"{page}.md").read_text())
    there = version(package)
    is_other = not f"{there}.".startswith(f"{shown[1]}.")
    return pytest.mark.skipif(is_other, reason=f"the page is about {package} {shown[1]}")


def arguments_of(function):
    return {*inspect.signature(function).parameters} - {"self", "args", "kwargs"}


def methods_of(kind, *, properties=False):
    """Return the public methods that a class defines itself, or its properties."""
    kinds = (property,) if properties else (staticmethod, classmethod)
    return {
        name
        for name, value in vars(kind).items()
        if not name.startswith("_")
        and (isinstance(value, kinds) or (inspect.isfunction(value) and not properties))
    }


def assert_same(page, shown, there):
    assert len(shown) == len({*shown}), f"{page} has a name twice"
    assert {*shown} == there, f"docs/coming-from/{page}.md and the installed version differ"


@of_its_version("trainer", "transformers")
def test_the_page_on_the_trainer_has_every_argument_method_and_event():
    arguments = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert_same("trainer", named("trainer", "TrainingArguments"), arguments)
    of_trainer = {*inspect.signature(Trainer.__init__).parameters} - {"self"}
    assert_same("trainer", named("trainer", "Trainer"), of_trainer | methods_of(Trainer))
    assert_same("trainer", named("trainer", "Callbacks"), methods_of(TrainerCallback))


@of_its_version("accelerate", "accelerate")
def test_the_page_on_accelerate_has_every_argument_and_method():
    accelerator = import_module("accelerate").Accelerator
    assert_same("accelerate", named("accelerate", "Accelerator"), arguments_of(accelerator))
    assert_same("accelerate", named("accelerate", "Methods"), methods_of(accelerator))
    properties = methods_of(accelerator, properties=True)
    assert_same("accelerate", named("accelerate", "Properties"), properties)


@pytest.mark.skipif(not find_spec("lightning"), reason="lightning is not among the test packages")
def test_the_page_on_lightning_has_every_argument_and_hook():
    lightning = import_module("lightning")
    shown = named("lightning", "Trainer")
    assert arguments_of(lightning.Trainer) <= {*shown}
    hooks = methods_of(lightning.Callback) | methods_of(lightning.pytorch.core.hooks.ModelHooks)
    assert hooks <= {*named("lightning", "Hooks")}


def test_what_the_pages_name_here_exists():
    """Each call of ours in the right column takes the arguments that it is shown with."""
    import manualloop

    for page in ("trainer", "accelerate", "lightning"):
        text = (DOCS / "coming-from" / f"{page}.md").read_text()
        for code in re.findall(r"`((?:\w+\.)?\w+\([^`]*\))`", text):
            try:
                call = ast.parse(code.replace("...", "None")).body[0].value
            except SyntaxError:
                continue
            name = getattr(call.func, "id", "")
            if name in manualloop.__all__:
                parameters = inspect.signature(getattr(manualloop, name)).parameters
                takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
                unknown = {keyword.arg for keyword in call.keywords} - {*parameters, None}
                assert takes_all or not unknown, code
