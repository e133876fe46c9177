"""Run on each of two ranks: what ``eject`` writes for accelerate has the bits of ``train_loop``."""

import os
import re
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import DatasetDict
from helpers import table_of, tiny_bert, tiny_tokenizer
from transformers import BertForSequenceClassification

from manualloop import (
    eject,
    evaluate_loop,
    prepare_dataloaders,
    prepare_optimizer,
    prepare_strategy,
    train_loop,
)

CALLS = [
    {"num_epochs": 3},
    {"num_epochs": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    {"max_steps": 5, "prepares": {"drop_last": True, "group_by_length": True, "batch_size": 3}},
    {"num_epochs": 2, "is_given": True, "best_metric": "f1", "checkpoint_dir": "ours"},
]


def bits(model):
    return {name.removeprefix("module."): t.clone() for name, t in model.state_dict().items()}


def main(folder):
    strategy = prepare_strategy()
    folder.mkdir(parents=True, exist_ok=True)
    if strategy.is_main:
        tiny_bert().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
    strategy.gather(None)
    rows = table_of(["sentence1", "sentence2"], 51)  # 7 batches of 8: an odd one for two ranks
    data = DatasetDict(train=rows, validation=rows.select(range(19)))
    before = Path.cwd()
    os.chdir(folder)
    for call in CALLS:
        compare(folder, data, strategy, **call)
    os.chdir(before)


def compare(folder, data, strategy, prepares=None, **call):
    torch.manual_seed(42)
    model = BertForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    tokenizer = type(tiny_tokenizer()).from_pretrained(folder / "model")
    loaders = prepare_dataloaders(data, tokenizer, model=model, **(prepares or {}))
    if "best_metric" in call:
        call["evaluate"] = partial(evaluate_loop, model, loaders["validation"], "glue/mrpc")
    if call.pop("is_given", False):
        call["strategy"] = Accelerator(cpu=True)
    arguments = model, loaders["train"], prepare_optimizer(model, lr=1e-3)
    script = eject(*arguments, progress_bar=False, **call)
    result = train_loop(*arguments, progress_bar=False, **call)
    assert "FILL IN" in script
    script = re.sub(r"^raw_datasets = .*$", "", script, flags=re.MULTILINE)
    script = script.replace('RUN = Path("ours")', 'RUN = Path("theirs")')
    names = {"raw_datasets": data, "__name__": "__main__"}
    exec(compile(script, "script", "exec"), names)
    ours, theirs = bits(result.state.model), bits(names["model"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), call
    if "checkpoint_dir" in call:
        assert {**names["metrics"], "loss": 0} == {**result.metrics, "loss": 0}
        strategy.gather(None)
        saved = sorted(path.name for path in Path("theirs").iterdir())
        assert saved == [f"best-{result.best_step:08d}", "last-00000004", "last-00000008"], saved
