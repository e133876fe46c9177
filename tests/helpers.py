"""Small things that many tests build: a tokenizer, a model, rows. None needs a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

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
