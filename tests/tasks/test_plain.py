"""Documents as rows: those of run_clm.py, with an end after each; nothing is lost uncounted."""

from __future__ import annotations

import math
import pickle
import random

import pytest
import torch
from datasets import Dataset
from helpers import WORDS, messages, tiny_bert, tiny_tokenizer
from transformers import BertForMaskedLM, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from manualloop import (
    ConfigError,
    DataError,
    check_accumulation,
    evaluate_loop,
    prepare_dataloaders,
)
from manualloop.tasks import cut, mask_tokens, pack

EOS = 3


def without_frame(**options):
    """A tokenizer that adds nothing to a text, as GPT-2's."""
    tokenizer = tiny_tokenizer(eos_token="[SEP]", **options)
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def documents(num_rows=30):
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(9))) for _ in range(num_rows)]


def group_texts(examples, block_size):
    """The function of transformers' run_clm_no_trainer.py."""
    concatenated = [token for ids in examples for token in ids]
    total = len(concatenated) // block_size * block_size
    return [concatenated[start : start + block_size] for start in range(0, total, block_size)]


@pytest.mark.parametrize("length", [2, 5, 16])
def test_packed_rows_are_those_of_the_script_with_an_end_after_each_document(length):
    tokenizer = without_frame()
    texts = documents()
    rows = pack(tokenizer, length)({"text": texts})
    ids = [[*found, EOS] for text in texts if (found := tokenizer(text)["input_ids"])]
    assert rows["input_ids"] == rows["labels"] == group_texts(ids, length)
    made = pack(tokenizer, length).make({"text": texts}, str)
    assert made.counts["left"] == sum(map(len, ids)) % length
    assert made.counts["empty"] == len(texts) - len(ids)
    starts = [[n] * (len(found) + 1) for n, t in enumerate(texts) if (found := t.split())]
    assert made.sources == [n for of in starts for n in of][::length][: len(made.sources)]


def test_a_tokenizer_that_ends_texts_itself_gets_no_second_end():
    for tokenizer in (tiny_tokenizer(), ByT5Tokenizer()):
        texts = ["good movie", "bad"]
        whole = [tokenizer(text)["input_ids"] for text in texts]
        length = sum(map(len, whole))
        assert pack(tokenizer, length)({"text": texts})["input_ids"] == [whole[0] + whole[1]]
        assert cut(tokenizer, 64)({"text": texts})["input_ids"] == whole


def test_a_tokenizer_that_begins_texts_gets_an_end():
    """As that of Llama, whose empty text is its BOS token alone."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer(eos_token="[SEP]", bos_token="[CLS]")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    assert cut(tokenizer, 9)({"text": ["good", ""]})["input_ids"] == [[2, 4, EOS]]
    assert pack(tokenizer, 3)({"text": ["good", ""]})["input_ids"] == [[2, 4, EOS]]


@pytest.mark.parametrize("max_length", [2, 4, 64])
def test_a_document_that_fits_ends_and_one_that_is_cut_does_not(max_length):
    tokenizer = without_frame()
    texts = documents()
    made = cut(tokenizer, max_length).make({"text": texts}, str)
    expected = [[*ids, EOS][:max_length] for t in texts if (ids := tokenizer(t)["input_ids"])]
    assert made.columns["input_ids"] == made.columns["labels"] == expected
    assert made.counts["cut"] == sum(ids[-1] != EOS for ids in expected)
    assert [texts[n].split()[0] for n in made.sources] == [
        tokenizer.decode(ids[0]) for ids in expected
    ]


@pytest.mark.parametrize("make", [tiny_tokenizer, without_frame, ByT5Tokenizer])
def test_a_document_that_is_cut_at_its_beginning_keeps_its_end(make):
    tokenizer = make(truncation_side="left")
    for length in (3, 5, 9):
        made = cut(tokenizer, length).make({"text": documents()}, str)
        whole = cut(make(), 10_000).make({"text": documents()}, str)
        assert made.sources == whole.sources
        rows = zip(made.columns["input_ids"], whole.columns["input_ids"], strict=True)
        begin = [2] if make is tiny_tokenizer else []  # [CLS]
        for ids, full in rows:
            room = length - len(begin)
            assert ids == (full if len(full) <= length else [*begin, *full[-room:]])
        assert made.counts["cut"] == sum(len(f) > length for f in whole.columns["input_ids"])


def test_perplexity_of_documents_is_that_of_each_token():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ).double()
    tokenizer = without_frame()
    data = {"train": documents(), "validation": documents(7)}
    loaders = prepare_dataloaders(
        {name: Dataset.from_dict({"text": texts}) for name, texts in data.items()},
        tokenizer,
        model=model,
        preprocess=cut(tokenizer, 64),
        batch_size=4,
    )
    model.eval()
    total, number = 0.0, 0
    for text in data["validation"]:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], EOS]])
        if ids.shape[1] > 1:
            logits = model(ids).logits[0, :-1].log_softmax(-1)
            total -= logits[range(len(logits)), ids[0, 1:]].sum().item()
            number += len(logits)
    scores = evaluate_loop(model, loaders["validation"], "perplexity")
    assert scores["perplexity"] == pytest.approx(math.exp(total / number), rel=1e-6)
    assert check_accumulation(model, next(iter(loaders["train"]))).gradient_difference < 1e-6


def test_a_masked_model_gets_its_labels_from_the_transform():
    tokenizer = tiny_tokenizer(mask_token="[UNK]")
    model = tiny_bert(kind=BertForMaskedLM)
    loader = prepare_dataloaders(
        Dataset.from_dict({"text": documents()}),
        tokenizer,
        model=model,
        preprocess=cut(tokenizer, 8),
        transform=mask_tokens(tokenizer, 0.5),
    )["train"]
    for batch in loader:
        chosen = batch["labels"] != -100
        assert (chosen.sum(1) >= 1).all()
        assert not (chosen & (batch["attention_mask"] == 0)).any()
        assert batch["input_ids"].shape[1] <= 8


def test_what_makes_no_rows_is_refused():
    with pytest.raises(ConfigError, match="length must be a whole number of at least 2"):
        pack(tiny_tokenizer(), 1)
    with pytest.raises(ConfigError, match="max_length must be a whole number"):
        cut(tiny_tokenizer(), None)
    endless = without_frame(sep_token=None)
    endless.eos_token = None
    with pytest.raises(ConfigError, match=r"tokenizer\.eos_token ="):
        pack(endless, 4)({"text": ["good"]})
    with pytest.raises(ConfigError, match="no column 'content' among text"):
        cut(tiny_tokenizer(), 8, column="content")({"text": ["good"]})
    with pytest.raises(DataError, match="Row 1 of the batch has text=None"):
        cut(tiny_tokenizer(), 8)({"text": ["good", None]})


def test_the_functions_can_be_sent_to_other_processes():
    for function in (cut(tiny_tokenizer(), 8), pack(tiny_tokenizer(), 8)):
        rows = {"text": documents()}
        assert pickle.loads(pickle.dumps(function))(rows) == function(rows)


def test_prepare_dataloaders_reports_what_was_made_and_left_out(caplog):
    tokenizer = without_frame()
    data = Dataset.from_dict({"text": [*documents(20), ""]})
    for make, expected in (
        (cut(tokenizer, 4), ["cut at 4 tokens", "left out, without text"]),
        (pack(tokenizer, 7), ["21 documents became", "of 7 tokens", "too few for a row"]),
    ):
        made = make.make(data[:], str)
        caplog.clear()
        loader = prepare_dataloaders(data, tokenizer, preprocess=make, batch_size=100)["train"]
        (line,) = [m for m in messages(caplog) if m.startswith("train: 21 documents")]
        assert all(part in line for part in expected)
        rows = next(iter(loader))["labels"]
        assert (rows != -100).sum() == sum(map(len, made.columns["labels"]))
    with pytest.raises(DataError, match="left out all 21 rows"):
        prepare_dataloaders(data, tokenizer, preprocess=pack(tokenizer, 4096))
