"""README and docs: every Python block runs, and what the pages point to exists.

The blocks of a page share one namespace and run in the order of the page, as they stand and as the
cells of a notebook do. What they would download comes from stand_ins.py. A block that cannot run
has a line before it that tells why:

    <!-- not run: it needs eight GPUs -->
"""

import ast
import inspect
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import tiny_bert
from stand_ins import FEWER, stand_in
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import manualloop

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}


class Block(NamedTuple):
    """Python code of a page.

    Attributes:
        line: Number of lines of the page before its code.
        code: The code.
        reason: Why it is not run; empty if it is.
    """

    line: int
    code: str
    reason: str


def blocks_of(text):
    pattern = r"^(?:<!-- not run: (.*?) -->\n\n?)?```python\n(.*?)^```$"
    return [
        Block(text[: found.start(2)].count("\n"), found[2], found[1] or "")
        for found in re.finditer(pattern, text, re.M | re.S)
    ]


BLOCKS = {page: blocks_of(text) for page, text in PAGES.items()}
# What a page promises that its blocks print or log.
PRINTED = {
    "README.md": [
        r"using sentence1, sentence2 -> labels; dropped: idx",
        r"\{'loss': .*, 'accuracy': .*, 'f1': .*\}\n",
        r"equal to the last bit: batches, losses, history",
        r"Any split is the same update\.",
    ],
}
in_a_checkout = pytest.mark.skipif(
    not (ROOT / "noxfile.py").exists(), reason="the installed wheel is tested without the checkout"
)


def run_page(page, names=None, only=None):
    """Run the blocks of a page in one namespace, and return it."""
    names = {"__name__": "__main__"} if names is None else names
    for block in BLOCKS[page] if only is None else only:
        if not block.reason:
            code = block.code
            for number, fewer in FEWER.items():
                code = code.replace(number, fewer)
            code = compile("\n" * block.line + code, page, "exec")  # errors name its lines
            exec(code, names)
    return names


@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument",  # the Trainer's default, on a machine without a GPU
    "ignore:Tokenizer does not support real words",  # the one of bytes that stands in
    "ignore:Anomaly Detection has been enabled",  # torch, where a page shows how
    "ignore:.*(gradient_checkpointing|is_gradient_checkpointing).* is deprecated:FutureWarning",
)
@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)  # as in a notebook
    stand_in(PAGES[page], monkeypatch)
    run_page(page)
    printed = capsys.readouterr().out + caplog.text
    for pattern in PRINTED.get(page, ()):
        assert re.search(pattern, printed), printed


def test_no_block_hides():
    for page, text in PAGES.items():
        fences = re.findall(r"^ *(?:`{3,}|~{3,}) *(?:python|py)\b", text, re.M | re.I)
        assert len(fences) == len(BLOCKS[page]), f"{page}: begin a block with ```python"
        assert all(len(block.reason.split()) > 2 for block in BLOCKS[page] if block.reason)


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_code_imports_public_names_and_passes_arguments_that_exist(page):
    for node in (node for block in BLOCKS[page] for node in ast.walk(ast.parse(block.code))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("manualloop"):
            public = import_module(node.module).__all__
            assert {alias.name for alias in node.names} <= set(public)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id not in manualloop.__all__:
                continue
            keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
            arguments = [argument for argument in node.args if ast.unparse(argument) != "..."]
            signature = inspect.signature(getattr(manualloop, node.func.id))
            signature.bind_partial(*arguments, **dict.fromkeys(keywords))  # else a TypeError


@cache
def anchors(path):
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@in_a_checkout
def test_links_lead_to_files_and_headings():
    broken = []
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            if link.startswith("http") or (target.exists() and not anchor):
                continue
            if not target.exists() or anchor not in anchors(target):
                broken.append(f"{page}: {link}")
    assert broken == []


@in_a_checkout
def test_paths_and_sessions_exist():
    functions = re.findall(r"^def (\w+)\(session:", (ROOT / "noxfile.py").read_text(), re.M)
    sessions = {name.replace("_", "-") for name in functions}
    missing = []
    for page, text in PAGES.items():
        for path in re.findall(r"\b(?:tests|docs|examples|manualloop)/[\w./-]*\w/?", text):
            missing += [] if (ROOT / path).exists() else [f"{page}: {path}"]
        for names in re.findall(r"nox -s ((?:[\w-]*\w ?)+)", text):
            missing += [f"{page}: {name}" for name in {*names.split()} - sessions]
    assert missing == []


@in_a_checkout
def test_modules_that_the_plan_names_exist():
    modules = ["/" + str(path.relative_to(ROOT)) for path in ROOT.glob("[mt]*/**/*.py")]
    named = re.findall(r"`([\w/]+\.py)`", PAGES["docs/architecture.md"])
    assert len(named) > 20
    assert [n for n in named if not any(module.endswith(f"/{n}") for module in modules)] == []


def test_the_ways_to_change_a_run_work(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    _setup, begin, extend, cycle, rate, average, anew, second = BLOCKS["docs/resume.md"]
    loaders = {name: BATCHES[name] for name in ("train", "second")}

    def run(block):
        caplog.clear()
        names = {name: getattr(manualloop, name) for name in manualloop.__all__}
        names |= {"AveragedModel": AveragedModel, "get_ema_multi_avg_fn": get_ema_multi_avg_fn}
        names |= {"Path": Path, "torch": torch, "loaders": loaders, "build_model": tiny_bert}
        rates = []
        names["train_loop"] = lambda *args, **options: manualloop.train_loop(
            *args, **options, on_step=lambda step: rates.append(step.lr), progress_bar=False
        )
        run_page("docs/resume.md", names, [block])
        run_page("docs/resume.md", names, [block])  # a script that is started again
        lines = [message for message in caplog.messages if "->" in message]
        return names, rates, lines

    _, rates, lines = run(begin)
    assert (len(rates), lines) == (3 * NUM_BATCHES, [])
    names, _, lines = run(average)
    assert names["step"].index == 6 * NUM_BATCHES
    assert sorted({line.split(":")[0] for line in lines if "bit-exact" not in line}) == [
        "num_epochs"
    ]
    assert manualloop.load_checkpoint("runs/ema", names["state"]).step == 6 * NUM_BATCHES
    for block, rate_at_first, num_steps in (
        (cycle, pytest.approx(5e-5 / 25), 8),
        (rate, 1e-5, 2 * NUM_BATCHES),
        (anew, 0.01, 2 * NUM_BATCHES),
        (second, 1e-5, NUM_BATCHES),
    ):
        _, rates, lines = run(block)
        assert (rates[0], len(rates), lines) == (rate_at_first, num_steps, [])
    _, rates, lines = run(extend)
    steps = range(3 * NUM_BATCHES, 5 * NUM_BATCHES)
    assert rates == pytest.approx([5e-5 * (1 - step / (5 * NUM_BATCHES)) for step in steps])
    assert any("num_epochs: 3 -> 5" in line for line in lines)


NUM_BATCHES = 2
BATCHES = {
    name: [
        {"input_ids": torch.tensor([[2, 5 + n, 3]] * 2), "labels": torch.tensor([n % 2, 1])}
        for n in range(first, first + 2)
    ]
    for name, first in (("train", 0), ("second", 8))
}
