"""The script on docs/eject.md is the one that ``eject`` writes for the call on README.

``python tests/script/test_page.py`` writes it there again.
"""

import re
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, DatasetInfo
from helpers import table_of, tiny_bert, tiny_tokenizer

from manualloop import eject, evaluate_loop, prepare_dataloaders

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "eject.md"
BLOCK = re.compile(r'^```python\n(""".*?)^```', re.MULTILINE | re.DOTALL)
HUB = "hf://datasets/nyu-mll/glue@bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c/mrpc/train.parquet"


def script():
    """The script of README's call, with small things of the same names."""
    model = tiny_bert(max_position_embeddings=512)
    model.config._name_or_path = "bert-base-uncased"
    tokenizer = tiny_tokenizer(model_max_length=512)
    tokenizer.name_or_path = "bert-base-uncased"
    info = DatasetInfo(config_name="mrpc", download_checksums={HUB: {}})
    table = table_of(["sentence1", "sentence2"]).to_dict()
    data = DatasetDict(
        {name: Dataset.from_dict(table, info=info) for name in ("train", "validation")}
    )
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
