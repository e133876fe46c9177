"""Runs the script of the MRPC job as it stands: real rows, a tiny model in place of BERT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
from helpers import tiny_bert
from transformers import AutoTokenizer

SCRIPT = Path(__file__).parent / "benchmarks" / "mrpc_job" / "with_manualloop.py"


def lay_out(folder: Path, shared: Path) -> None:
    """Put the rows and the model of the job into a folder."""
    tokenizer = AutoTokenizer.from_pretrained(str(shared / "tokenizers" / "bert-base-uncased"))
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "model")
    tiny_bert(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    (folder / "rows").mkdir()
    for split, number in (("train", 60), ("validation", 21)):
        rows = pyarrow.parquet.read_table(shared / "glue" / "mrpc" / f"{split}.parquet")
        pyarrow.parquet.write_table(rows.slice(0, number), folder / "rows" / f"{split}.parquet")


def run(folder: Path, **changes: str) -> dict[str, Any]:
    """Run the script, with the hub's names replaced by those of the folder; return its names."""
    source = SCRIPT.read_text()
    changes = {
        '"bert-base-uncased"': repr(str(folder / "model")),
        'load_dataset("glue", "mrpc")': f"load_dataset({str(folder / 'rows')!r}, "
        f"cache_dir={str(folder / 'cache')!r})",
        '"runs/mrpc': f'"{folder}/runs/mrpc',
        **changes,
    }
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, str(SCRIPT), "exec"), names)
    return names
