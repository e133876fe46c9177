"""Real text that comes with Python: the docstrings of its standard library.

Each row is a docstring and the area of the library that it documents. The sources are read with
``ast``, and none of them is imported or run. The examples share this module, so that they need no
network and no download.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

# Some modules are missing in some versions or on some platforms; those that exist are read.
AREAS = {
    "concurrency": "_threading_local asyncio concurrent multiprocessing queue sched selectors "
    "subprocess threading",
    "debugging": "bdb cProfile doctest logging pdb profile pstats timeit trace traceback "
    "tracemalloc unittest",
    "files": "bz2 compression filecmp fileinput fnmatch glob gzip lzma ntpath os pathlib "
    "posixpath shutil stat tarfile tempfile zipapp zipfile",
    "formats": "configparser csv difflib html json plistlib string textwrap tomllib xml",
    "internet": "email ftplib http imaplib mailbox poplib smtplib socket socketserver ssl urllib "
    "wsgiref xmlrpc",
    "language": "_collections_abc abc annotationlib ast collections contextlib dataclasses dis "
    "enum functools importlib inspect pkgutil pyclbr runpy symtable tokenize types typing "
    "zipimport",
    "numbers": "_pydatetime _pydecimal _pylong _strptime calendar datetime decimal fractions "
    "numbers random statistics zoneinfo",
}
MIN_WORDS, MAX_WORDS = 6, 40  # shorter ones do not show their area; longer ones are cut
MAX_TOKENS = 64
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
}


def load_docstrings(stdlib: Path | None = None) -> DatasetDict:
    """Return the splits "train" and "validation", of ``text`` and ``label``; no text is in both."""
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    areas = areas_of_texts(stdlib)
    if not areas:
        raise FileNotFoundError(f"No Python sources in {stdlib}: they were not installed.")
    splits = {"train": [], "validation": []}
    for text, area in areas.items():
        # By checksum, so that a docstring is in the same split in every version of Python.
        held_out = zlib.crc32(text.casefold().encode()) % 100 < 15
        splits["validation" if held_out else "train"].append({"text": text, "label": area})
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(AREAS))})
    return DatasetDict(
        {name: Dataset.from_list(rows, features=features) for name, rows in splits.items()}
    )


@cache  # it takes some seconds, and the processes of the notebook inherit it
def areas_of_texts(stdlib: Path) -> dict[str, str]:
    """Return the first area in which each docstring is found, by its text."""
    areas: dict[str, str] = {}
    for area, modules in AREAS.items():
        for module in modules.split():
            for path in source_files(stdlib, module):
                for text in map(clean, docstrings(path)):
                    if len(text.split()) >= MIN_WORDS:
                        areas.setdefault(text, area)
    return areas


def source_files(stdlib: Path, module: str) -> list[Path]:
    """List the source files of a module, or of a package without its tests."""
    paths = [stdlib / f"{module}.py", *(stdlib / module).rglob("*.py")]
    return sorted(
        path
        for path in paths
        if path.is_file() and not {"test", "tests"} & set(path.relative_to(stdlib).parts)
    )


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of a file: the module's, its classes' and its functions'."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # unreadable, or not Python of this version
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def clean(docstring: str) -> str:
    """Keep the prose before the first interactive example, in one line."""
    prose = re.split(r"^\s*>>>", docstring, maxsplit=1, flags=re.MULTILINE)[0]
    return " ".join(prose.split()[:MAX_WORDS])


def train_tokenizer(texts: list[str], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """Train a lower-case WordPiece tokenizer; the same texts give the same vocabulary."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    characters = sorted(set("".join(map(normalizer.normalize_str, texts))) - {" "})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # The trainer numbers the characters inside words in the order of a hash map, and breaks
        # ties by these numbers (huggingface/tokenizers#1794). Listing them first fixes the order.
        special_tokens=[*SPECIAL_TOKENS.values(), *(f"##{c}" for c in characters)],
        show_progress=False,
    )
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trained.train_from_iterator(texts, trainer)

    vocab = trained.get_vocab()
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **SPECIAL_TOKENS
    )


def small_bert(vocab_size: int) -> BertForSequenceClassification:
    """Build a BERT with one layer, 128 wide, and random weights."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=512,
            max_position_embeddings=MAX_TOKENS,
            initializer_range=0.05,  # BERT's 0.02 is for a width of 768; narrow models learn slowly
            id2label=dict(enumerate(AREAS)),
            label2id={area: number for number, area in enumerate(AREAS)},
        )
    )
