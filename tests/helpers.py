"""Small things that many tests build: a tokenizer, a model, rows. None needs a network."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from manualloop import prepare_dataloaders

A_THOUSAND = pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 1000), marks=pytest.mark.exhaustive)], ids=str
)
"""Sets of rows, drawn by their numbers, of which `nox -s tests` takes the first 200."""

WORDS = ["good", "bad", "movie", "plot", "very", "not", "the", "a", "was", "acting", "fine", "dull"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
VOCAB_SIZE = len(SPECIAL) + len(WORDS)


def tiny_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that frames texts and pairs as BERT's does."""
    vocab = {token: number for number, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"model_max_length": 64, "model_input_names": inputs, **names, **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def bert_config(**config: Any) -> BertConfig:
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    }
    return BertConfig(**{**sizes, **config})


def tiny_bert(
    num_labels: int = 2, kind: type[Any] = BertForSequenceClassification, **config: Any
) -> Any:
    """A BERT of some 2000 weights, the same at every call; draws nothing from the caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(bert_config(num_labels=num_labels, **config))


def rows(num_rows: int = 6, **columns: list[Any]) -> Dataset:
    """Sentences of different lengths, and labels 0, 1, 0, 1, ...; or the given columns."""
    texts = [
        " ".join(WORDS[(number + i) % len(WORDS)] for i in range(1 + number % 5))
        for number in range(num_rows)
    ]
    default = {"sentence": texts, "label": [number % 2 for number in range(num_rows)]}
    return Dataset.from_dict(columns or default)


def whole_and_resumed(run: Callable[..., Any], folder: Path, dies_after: int) -> tuple[Any, Any]:
    """Call ``run(folder, on_step=...)`` to its end, and in two parts; both end with the same bits.

    Returns:
        The two results.
    """

    def die(step: Any) -> None:
        if step.index == dies_after:
            raise KeyboardInterrupt

    whole = run(folder / "whole", on_step=None)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "parts", on_step=die)
    resumed = run(folder / "parts", on_step=None)
    assert resumed.history == whole.history
    ours, theirs = (dict(result.state.model.named_parameters()) for result in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return whole, resumed


def course_loader(
    dataset: Dataset,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    label: str | None = "label",
    sampler: Sequence[int] | None = None,
    batch_size: int = 8,
    **padding: Any,
) -> DataLoader:
    """The course's chapter 3: map, remove, rename, set_format, DataCollatorWithPadding."""
    table = dataset.map(
        lambda batch: tokenizer(*(batch[text] for text in texts), truncation=True), batched=True
    )
    table = table.remove_columns([c for c in dataset.column_names if c != label])
    if label is not None:
        table = table.rename_column(label, "labels")
    table.set_format("torch")
    collator = DataCollatorWithPadding(tokenizer, **padding)
    return DataLoader(table, batch_size=batch_size, sampler=sampler, collate_fn=collator)


def assert_same_batches(ours: Any, theirs: Any) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert sorted(own) == sorted(other)
        for name, tensor in own.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name


def labels_of(loader: Any) -> list[Any]:
    return [label for batch in loader for label in batch["labels"].tolist()]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the library has logged, line by line."""
    return [record.getMessage() for record in caplog.records if record.name == "manualloop"]


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * 5 + i) % len(WORDS)] for i in range(1 + number % 7))


def table_of(columns: Sequence[str], num_rows: int = 21, label: str = "int") -> Dataset:
    """Rows with these columns of text, a label and an id."""
    table: dict[str, list[Any]] = {
        name: [sentence(row + 3 * number) for row in range(num_rows)]
        for number, name in enumerate(columns)
    }
    make = {"int": lambda row: row % 2, "float": lambda row: row / 4}[label]
    table |= {"label": [make(row) for row in range(num_rows)], "idx": list(range(num_rows))}
    return Dataset.from_dict(table)


def sizes(loader: Any) -> list[int]:
    """The number of rows of each batch."""
    return [len(batch["labels"]) for batch in loader]


def first_batch(dataset: Any, tokenizer: Any = None, **arguments: Any) -> dict[str, Any]:
    (loader,) = prepare_dataloaders({"dev": dataset}, tokenizer, **arguments).values()
    return next(iter(loader))


def token_model() -> Any:
    return tiny_bert(kind=BertForTokenClassification)


_FIX = re.compile(
    r"(for name[^:]* in [^:]*: dataset\[name\] = |dataset\[[^\]]+\] = )?dataset(\[[^\]]+\])?\.\w+\("
)


def fixes_in(message: object) -> list[str]:
    """The lines of code in a message that change a dataset, each up to its closing bracket."""
    text, lines, start = str(message), [], 0
    while (found := _FIX.search(text, start)) is not None:
        depth, start = 1, found.end()
        while depth:
            depth += (text[start] in "([{") - (text[start] in ")]}")
            start += 1
        lines.append(text[found.start() : start])
    return lines


def run_fix(line: str, dataset: Any, **names: Any) -> Any:
    """Run a line of a message on a dataset, or on a mapping of them, which it changes."""
    names |= {"dataset": dataset, "datasets": datasets}
    if not isinstance(dataset, dict):
        return eval(line, names)
    exec(line, names)
    return names["dataset"]


def apply_fix(error: pytest.ExceptionInfo[Any], dataset: Dataset, method: str) -> Dataset:
    """Run the line of the error message that calls a method of the split "dev"."""
    (line,) = {line for line in fixes_in(error.value) if f".{method}(" in line}
    return run_fix(line, {"dev": dataset})["dev"]


def correlation(p: Any, r: Any) -> Any:
    """Pearson's, along the last axis, by its definition."""
    p, r = (side - side.mean(-1, keepdims=True) for side in (p, r))
    return (p * r).sum(-1) / np.sqrt((p * p).sum(-1) * (r * r).sum(-1))


def seeded(function: Callable[..., Any], seed: int) -> dict[str, Any]:
    """The argument by which this version of SciPy takes a generator."""
    names = inspect.signature(function).parameters
    return {"rng" if "rng" in names else "random_state": np.random.default_rng(seed)}


def piece_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of the letters a to f, of which most words are several tokens.

    It frames texts as BERT's does, and makes no token of control characters.
    """
    letters = "abcdef"
    pieces = ["ab", "##cd", "##ef", "cafe", *letters, *(f"##{letter}" for letter in letters), *".,"]
    vocab = {token: number for number, token in enumerate(SPECIAL + pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"model_max_length": 64, "model_input_names": inputs, **names, **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-MISC"]
PIECES = ["ab", "cafe", "abcdef", "fed", "a.b", "...", "bad", "\u00e9", "a", "Face"]
NO_PIECES = ["", " ", "\u200b", "[SEP]"]


def tagged_words(num_rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """Sentences of up to 12 words with the names of their tags; some words are no token."""
    rng = random.Random(seed)
    words = [rng.choices(PIECES + NO_PIECES, k=rng.randint(0, 12)) for _ in range(num_rows)]
    return {"tokens": words, "ner_tags": [[rng.choice(TAGS) for _ in row] for row in words]}


def questions(num_rows: int, seed: int = 0, none: float = 0.3) -> dict[str, list[Any]]:
    """Questions of contexts of up to 40 words; answers are some words of them, or none."""
    rng = random.Random(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("id", "question", "context", "answers")}
    for number in range(num_rows):
        words = rng.choices(PIECES, k=rng.randint(1, 40))
        first = rng.randrange(len(words))
        text = " ".join(words[first : first + rng.randint(1, 5)])
        start = len("".join(f"{word} " for word in words[:first]))
        answer: dict[str, list[Any]] = {"text": [], "answer_start": []}
        if rng.random() >= none:
            answer = {"text": [text, words[first]], "answer_start": [start, start]}
        rows["id"].append(f"q{seed}-{number}")
        rows["question"].append("  " * (number % 2) + " ".join(rng.choices(PIECES, k=number % 4)))
        rows["context"].append(" ".join(words))
        rows["answers"].append(answer)
    return rows
