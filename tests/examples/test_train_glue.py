"""The example for GLUE trains on MNLI, whose validation rows are in two splits, from a folder."""

import runpy
import sys
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers import sentence, tiny_tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_glue.py"
NAMES = ["entailment", "neutral", "contradiction"]
SPLITS = {
    "train": 12,
    "validation_matched": 5,
    "validation_mismatched": 7,
    "test_matched": 3,
    "test_mismatched": 3,
}


# Of datasets 3: it leaves the files of CSV open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", ["{}-00000-of-00001.parquet", "mnli-{}.parquet", "{}.csv"])
def test_mnli_from_a_folder(form, tmp_path, monkeypatch, capsys):
    features = Features(
        {
            "premise": Value("string"),
            "hypothesis": Value("string"),
            "label": ClassLabel(names=NAMES),
            "idx": Value("int32"),
        }
    )
    folder = tmp_path / "mnli"
    folder.mkdir()
    for split, number in SPLITS.items():
        labels = [-1 if split.startswith("test") else row % 3 for row in range(number)]
        texts = [[sentence(row + more) for row in range(number)] for more in (0, 3)]
        columns = {"premise": texts[0], "hypothesis": texts[1], "label": labels}
        made = Dataset.from_dict({**columns, "idx": list(range(number))}, features=features)
        path = folder / form.format(split)
        made.to_csv(path) if path.suffix == ".csv" else made.to_parquet(path)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = ("hidden_size=8", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=8")
    arguments = [
        *("--task", "mnli", "--data", folder, "--tokenizer", tmp_path / "tokenizer"),
        *("--config", *model, "--num-epochs", 2, "--no-progress-bar", "--device", "cpu"),
        *("--checkpoint-dir", tmp_path / "run"),
    ]
    monkeypatch.setattr(sys, "argv", ["train_glue.py", *map(str, arguments)])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    last = next(line for line in printed.splitlines() if line.startswith("last"))
    assert all(f'"{half}_accuracy"' in last for half in ("matched", "mismatched"))
    assert "matched_accuracy" in printed
