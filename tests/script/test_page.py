"""The script on docs/eject.md is the one that ``eject`` writes for the call on README.

``python tests/script/test_page.py`` writes it there again.
"""

import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from datasets import load_dataset
from helpers import bert_config, table_of, tiny_bert, tiny_tokenizer
from transformers import BertConfig

from manualloop import eject, evaluate_loop, prepare_dataloaders

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "eject.md"
BLOCK = re.compile(r'^```python\n(""".*?)^```', re.MULTILINE | re.DOTALL)
HUB = "hf://datasets/nyu-mll/glue@bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c/mrpc/train.parquet"


def data_of_hub(folder):
    """Rows as ``load_dataset`` returns those of the hub."""
    files = {name: f"{folder}/{name}.parquet" for name in ("train", "validation")}
    for path in files.values():
        table_of(["sentence1", "sentence2"]).to_parquet(path)
    data = load_dataset("parquet", data_files=files, cache_dir=f"{folder}/cache")
    for rows in data.values():
        rows.info.download_checksums, rows.info.config_name = {HUB: {}}, "mrpc"
    return data


def script():
    """The script of README's call, with small things of the same names."""
    config = bert_config(max_position_embeddings=512, num_labels=2)
    stored = patch.object(BertConfig, "from_pretrained", return_value=config)
    with TemporaryDirectory() as folder, stored:
        return script_of(data_of_hub(folder))


def script_of(data):
    model = tiny_bert(max_position_embeddings=512)
    model.config._name_or_path = "bert-base-uncased"
    tokenizer = tiny_tokenizer(model_max_length=512)
    tokenizer.name_or_path = "bert-base-uncased"
    loaders = prepare_dataloaders(data, tokenizer, model=model, batch_size=8)
    return eject(
        model,
        loaders["train"],
        num_epochs=3,
        evaluate=partial(evaluate_loop, model, loaders["validation"], "glue/mrpc"),
        best_metric="f1",
        checkpoint_dir="runs/mrpc",
    )


@pytest.mark.skipif(not PAGE.exists(), reason="the installed wheel is tested without the checkout")
def test_the_page_has_the_script_of_the_readmes_call():
    (block,) = BLOCK.findall(PAGE.read_text())
    assert block == script()
    assert "FILL IN" not in block


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda match: f"```python\n{script()}```", PAGE.read_text()))
