"""Functions of Python's standard library; a tokenizer for their words, and a small BERT."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer
from transformers import BertConfig, PreTrainedTokenizerFast

MODULES = (
    "argparse asyncio calendar collections configparser csv datetime difflib email ftplib "
    "functools http imaplib inspect json logging pathlib shutil socket statistics subprocess "
    "tarfile threading tkinter typing unittest urllib zipfile"
)
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def functions() -> Iterator[ast.FunctionDef]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for module in MODULES.split():
        for path in (stdlib / f"{module}.py", *sorted((stdlib / module).rglob("*.py"))):
            if path.is_file() and "test" not in str(path.relative_to(stdlib)):
                nodes = ast.walk(ast.parse(path.read_bytes()))
                yield from (node for node in nodes if isinstance(node, ast.FunctionDef))


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    inner = Tokenizer.from_str(trained.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **SPECIAL)


def small_bert(vocab_size: int, **options: int) -> BertConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 256, "max_position_embeddings": 64, "initializer_range": 0.05}
    return BertConfig(vocab_size=vocab_size, **sizes, **options)
