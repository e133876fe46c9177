"""The blocks of the page on trackers run, one after the other."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from helpers import rows, tiny_bert, tiny_tokenizer

from manualloop import prepare_dataloaders

pytest.importorskip("tensorboard")
PAGE = Path(__file__).parents[2] / "docs" / "tracking.md"


def test_the_page_on_trackers_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    loaders = prepare_dataloaders({"train": rows()}, tokenizer, batch_size=3)
    names = {
        "model": tiny_bert(),
        "build_model": tiny_bert,
        "loaders": loaders,
        "folds": [loaders] * 5,
    }
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(block, names)
    assert len(pd.read_csv("runs/folds.csv")["run"].unique()) == 5
    assert len(pd.read_csv("runs/mrpc/history.csv")) == len(names["result"].history)
    assert all(json.loads(line) for line in Path("records.jsonl").read_text().splitlines())
