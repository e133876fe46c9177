"""Docstrings of Python's standard library, and a tokenizer that is trained on them."""

import ast
import sysconfig
from collections import Counter
from math import exp, log
from pathlib import Path

from datasets import Dataset, DatasetDict
from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]", "mask_token": "[MASK]"}


def load_docstrings(num_rows: int | None = None) -> DatasetDict:
    found = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split()[:60])
                found |= {text: None} if len(text) > 40 else {}
        if num_rows is not None and len(found) >= num_rows:
            break
    return Dataset.from_dict({"text": list(found)[:num_rows]}).train_test_split(0.1, seed=0)


def train_tokenizer(texts: list[str], *more: str) -> PreTrainedTokenizerFast:
    trained = BertWordPieceTokenizer()
    special = [*SPECIAL.values(), "[CLS]", *more]
    trained.train_from_iterator(texts, 2000, special_tokens=special, show_progress=False)
    made = Tokenizer.from_str(trained.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def usual_tokens(batches: list) -> tuple[float, float]:
    """Return the perplexity of guesses by frequency, and the share of the most frequent token."""
    labels = [label for batch in batches for label in batch["labels"].flatten().tolist()]
    counts = Counter(label for label in labels if label != -100)
    shares = [number / counts.total() for number in counts.values()]
    return exp(-sum(share * log(share) for share in shares)), max(shares)
