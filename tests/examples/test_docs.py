"""README and docs: their code fits the package, and what they point to exists."""

import ast
import inspect
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from helpers import rows, tiny_bert, tiny_tokenizer
from tiny_language_models import llama
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import manualloop

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page, text in PAGES.items()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S), start=1)
]
in_a_checkout = pytest.mark.skipif(
    not (ROOT / "noxfile.py").exists(), reason="the installed wheel is tested without the checkout"
)


@pytest.mark.parametrize("block", BLOCKS)
def test_code_imports_public_names_and_passes_arguments_that_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module == "manualloop":
            assert {alias.name for alias in node.names} <= set(manualloop.__all__)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id not in manualloop.__all__:
                continue
            keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
            arguments = [argument for argument in node.args if ast.unparse(argument) != "..."]
            signature = inspect.signature(getattr(manualloop, node.func.id))
            signature.bind_partial(*arguments, **dict.fromkeys(keywords))  # else a TypeError


def anchors(text):
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@in_a_checkout
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = ROOT / page if not name else (ROOT / page).parent / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


@in_a_checkout
@pytest.mark.parametrize("page", PAGES)
def test_paths_and_sessions_exist(page):
    for path in re.findall(r"\b(?:tests|docs|examples|manualloop)/[\w./-]*\w/?", PAGES[page]):
        assert (ROOT / path).exists(), path
    functions = re.findall(r"^def (\w+)\(session:", (ROOT / "noxfile.py").read_text(), re.M)
    sessions = {name.replace("_", "-") for name in functions}
    for names in re.findall(r"nox -s ((?:[\w-]*\w ?)+)", PAGES[page]):
        assert set(names.split()) <= sessions, names


@in_a_checkout
def test_modules_that_the_plan_names_exist():
    modules = ["/" + str(path.relative_to(ROOT)) for path in ROOT.glob("[mt]*/**/*.py")]
    named = re.findall(r"`([\w/]+\.py)`", PAGES["docs/architecture.md"])
    assert len(named) > 20
    assert [n for n in named if not any(module.endswith(f"/{n}") for module in modules)] == []


@pytest.fixture
def hub(monkeypatch):
    """The hub's MRPC, BERT and its tokenizer, as small ones that need no network."""
    pairs = {
        split: rows(
            sentence1=["good movie", "bad plot", "very dull acting"] * 4,
            sentence2=["fine movie", "good plot", "a very bad movie"] * 4,
            label=[1, 0, 0] * 4,
            idx=list(range(12)),
        )
        for split in ("train", "validation")
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict(pairs))
    for name, made in (
        ("AutoTokenizer", tiny_tokenizer),
        ("AutoModelForSequenceClassification", tiny_bert),
    ):
        load = staticmethod(lambda name, made=made, **options: made(**options))
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load)


def test_the_readme_runs(hub, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    blocks = [block.values[0] for block in BLOCKS[:7]]
    ten_lines, resumable, best, _verify, loop, chats, check = blocks
    names = vars(manualloop) | {name: getattr(manualloop, name) for name in manualloop.__all__}
    exec(ten_lines, names)
    assert "using sentence1, sentence2 -> labels; dropped: idx" in caplog.text
    assert re.match(r"\{'loss': .*, 'accuracy': .*, 'f1': .*\}\n", capsys.readouterr().out)
    exec(resumable, names)
    assert (tmp_path / "runs/mrpc/step-00000006/config.json").exists()
    exec(best, names)
    assert names["model"].num_labels == 2
    names["ema"] = AveragedModel(names["model"])
    names["optimizer"] = manualloop.prepare_optimizer(names["model"])
    exec(loop, names)
    assert names["step"].index == 6
    names["batch"] = next(iter(names["loaders"]["train"]))
    exec(check, names)
    assert "Any split is the same update." in capsys.readouterr().out
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "tasks"))
    from months import chat_tokenizer, month_chats

    data = month_chats(20)
    tokenizer = chat_tokenizer(data)
    model = llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    exec(chats, names | {"data": data, "tokenizer": tokenizer, "model": model})
    assert (tmp_path / "runs/sft").is_dir()


def test_the_script_on_hardware_runs(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = next(block.values[0] for block in BLOCKS if "def main" in block.values[0])
    exec(script, {"__name__": "__main__"})
    assert (tmp_path / "runs/mrpc/step-00000009").is_dir()


def test_the_ways_to_change_a_run_work(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    page = [block.values[0] for block in BLOCKS if block.id.startswith("docs/resume.md")]
    begin, extend, cycle, rate, average, anew, second = page
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
        exec(block, names)
        exec(block, names)  # a script that is started again
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
