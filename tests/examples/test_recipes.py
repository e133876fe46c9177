"""Every recipe of docs/recipes runs, and resumes to the bit where it says so."""

import os
import re
import signal
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from helpers import table_of, tiny_bert, tiny_tokenizer
from stand_ins import FEWER
from torch.optim.optimizer import register_optimizer_step_post_hook

from manualloop import prepare_dataloaders

PAGE = (Path(__file__).parents[2] / "docs/recipes/README.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
(IMPORTS,) = re.findall(r"^```python\n(.*?)^```", PAGE.split("\n## ")[0], re.M | re.S)
BLOCKS = {
    title: "".join(re.findall(r"^```python\n(.*?)^```", body, re.M | re.S))
    for title, body in SECTIONS.items()
}
RESUMED = [title for title, body in SECTIONS.items() if "Resumes to the bit" in body]
LOADED = {
    "Two optimizers that take turns": 'load_checkpoint("runs/gan", state)',
    "Early stopping on several metrics": 'load_checkpoint("runs/watched", state)',
}
SAMPLE = ("Class weights", "Freezing and gradual unfreezing", "Two optimizers that take turns")
ROWS = table_of(["sentence1", "sentence2"], 24)


def names_of(**others):
    """The names that the first block of the page makes."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    data = datasets.DatasetDict(train=ROWS, validation=ROWS.select(range(9)))
    model = tiny_bert(num_hidden_layers=3)
    names = {"__name__": "recipes"}
    exec(IMPORTS, names)
    names |= {
        "model": model,
        "tokenizer": tokenizer,
        "loaders": prepare_dataloaders(data, tokenizer, model=model),
        "new_model": lambda: tiny_bert(num_hidden_layers=3),
    }
    exec("from torch.utils.data import DataLoader", names)
    names["prepared"] = names["loaders"]["train"]
    return names | others


def run(title, names, before_loop=""):
    code = BLOCKS[title]
    for long, short in FEWER.items():
        code = code.replace(long, short)
    if before_loop:
        code = re.sub(r"^for step in", f"{before_loop}\nfor step in", code, flags=re.M)
    exec(compile(code, title, "exec"), names)
    return names


def bits(names):
    """All that a recipe has trained, by name."""
    state = names.get("state")
    models = {
        name: value
        for name, value in {**names, **(state.extras if state else {})}.items()
        if isinstance(value, torch.nn.Module) and name != "teacher"
    }
    return {
        f"{name}.{key}": tensor.clone()
        for name, model in models.items()
        for key, tensor in model.state_dict().items()
    }


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = datasets.DatasetDict(train=ROWS, validation=ROWS.select(range(9)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: whole)
    load = staticmethod(lambda name, **options: tiny_bert(num_hidden_layers=3))
    kind = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(kind, "from_pretrained", load)
    load = staticmethod(lambda name: tiny_tokenizer())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)


def test_recipes_are_short():
    """They run in test_docs.py, as all blocks of all pages do."""
    assert len(BLOCKS) == 15
    for title, code in BLOCKS.items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) < 30, title
        assert max(map(len, lines)) <= 100, title


def test_the_finder_of_a_rate_puts_the_weights_back():
    names = run("Learning-rate finder", names_of())
    assert 1e-7 <= names["lr"] <= 1
    before, after = names["new_model"]().state_dict(), names["model"].state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(title, marks=() if title in SAMPLE else pytest.mark.exhaustive)
        for title in sorted({*RESUMED, *LOADED})
    ],
)
def test_a_recipe_that_is_stopped_and_run_again_ends_with_the_same_bits(
    title, monkeypatch, tmp_path, capsys
):
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = bits(run(title, names_of()))
    if title == "Class weights":
        assert "Any split is the same update" in capsys.readouterr().out
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "parts")
    num_made = 0
    in_loop = title in LOADED

    def stop(optimizer, args, kwargs):
        nonlocal num_made
        num_made += 1
        if num_made == (14 if in_loop else 2):
            if in_loop:
                raise KeyboardInterrupt  # as a kill would: inside of an update
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run(title, names_of())
    finally:
        hook.remove()
    resumed = bits(run(title, names_of(), LOADED.get(title, "")))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
