"""Tokens that a model cannot take: told with the call that makes other rows, and no copies."""

import re

import pytest
import torch
import transformers
from chat_styles import tokenizer_for
from datasets import Dataset
from helpers import fixes_in, run_fix, tiny_bert, tiny_tokenizer
from tiny_language_models import SIZES, VOCAB, gpt2, llama, padded, paired, pairs_of, rows_of
from transformers import BertForMaskedLM

from manualloop import DataError, evaluate_loop, prepare_dataloaders, train_loop
from manualloop.errors import ConfigError
from manualloop.tasks import (
    chat,
    complete,
    cut,
    dpo,
    fill_in_middle,
    lm_loss,
    mask_tokens,
    pack,
    preference_pairs,
    tag_words,
)

TEXT = "2+2 is four. Café naïve don't ok! a b c x_y the sun is four"
ROWS = {
    "text": [TEXT] * 3, "prompt": ["a b"] * 3, "completion": [TEXT] * 3,
    "chosen": [TEXT] * 3, "rejected": [TEXT + " no"] * 3, "tokens": [TEXT.split()] * 3,
    "ner_tags": [[0] * len(TEXT.split())] * 3,
    "messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": TEXT}]] * 3,
}  # fmt: skip
MAKERS = {
    "chat": lambda tokenizer, **options: chat(tokenizer, **options),
    "complete": lambda tokenizer, **options: complete(tokenizer, **options),
    "cut": lambda tokenizer, max_length=99: cut(tokenizer, max_length),
    "pack": lambda tokenizer, length=40: pack(tokenizer, length),
    "preference_pairs": lambda tokenizer, **options: preference_pairs(tokenizer, **options),
}


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_rows_that_are_too_long_are_cut_where_they_are_made(name, own_loss):
    tokenizer = tokenizer_for("zephyr")
    is_pair = name == "preference_pairs"
    if is_pair and not own_loss:
        return

    def run(preprocess, train):
        model = gpt2(vocab_size=len(tokenizer), n_positions=16)
        loss_fn = dpo(reference=gpt2(vocab_size=len(tokenizer))) if is_pair else lm_loss
        options = {"loss_fn": loss_fn if own_loss else None}
        data = {"train": Dataset.from_dict(ROWS)}
        loader = prepare_dataloaders(data, tokenizer, model=model, preprocess=preprocess)["train"]
        if train:
            return train_loop(model, loader, max_steps=1, progress_bar=False, **options)
        return evaluate_loop(model, loader, **options)

    for train in (True, False):
        with pytest.raises(DataError, match="GPT2LMHeadModel takes 16") as error:
            run(MAKERS[name](tokenizer), train)
        (call,) = re.findall(rf"{name}\(tokenizer, .*?\)", str(error.value))
        assert "length=16" in call
    if name not in ("chat", "complete", "preference_pairs"):  # whose whole answers do not fit
        run(eval(call), train=True)


def test_other_makers_name_their_own_argument():
    tokenizer = tiny_tokenizer()
    model = tiny_bert(kind=transformers.BertForTokenClassification, max_position_embeddings=8)
    data = Dataset.from_dict({"tokens": [["good"] * 12], "ner_tags": [[0] * 12]})
    loader = prepare_dataloaders(data, tokenizer, model=model, preprocess=tag_words(tokenizer))[
        "train"
    ]
    with pytest.raises(DataError, match=r"made: tag_words\(tokenizer, max_length=8\)"):
        train_loop(model, loader, max_steps=1, progress_bar=False)

    def own(rows):
        return tokenizer(rows["text"])

    tokenizer = tiny_tokenizer(mask_token="dull")
    masked = tiny_bert(kind=BertForMaskedLM, max_position_embeddings=8)
    data = Dataset.from_dict({"text": ["good " * 12]})
    loader = prepare_dataloaders(
        data, tokenizer, model=masked, preprocess=own, transform=mask_tokens(tokenizer)
    )["train"]
    with pytest.raises(DataError, match="let preprocess call tokenizer"):
        train_loop(masked, loader, max_steps=1, progress_bar=False)


def test_gaps_that_make_rows_too_long_name_both_functions():
    tokenizer = tokenizer_for("zephyr")
    tokenizer.add_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], special_tokens=True)
    model = gpt2(vocab_size=len(tokenizer), n_positions=32)
    loader = prepare_dataloaders(
        Dataset.from_dict({"text": [TEXT] * 9}),
        tokenizer,
        model=model,
        preprocess=pack(tokenizer, 32),
        transform=fill_in_middle(tokenizer, rate=1.0),
    )["train"]
    wanted = r"pack\(tokenizer, length=32\) and fill_in_middle\(tokenizer, max_length=32\)"
    with pytest.raises(DataError, match=wanted):
        train_loop(model, loader, num_epochs=1, progress_bar=False)


def test_max_length_beside_preprocess_is_refused():
    tokenizer = tokenizer_for("zephyr")
    with pytest.raises(ConfigError, match=r"preprocess=chat\(tokenizer, max_length=36\)"):
        prepare_dataloaders(
            Dataset.from_dict(ROWS), tokenizer, preprocess=chat(tokenizer), max_length=36
        )
    with pytest.raises(ConfigError, match=r"truncation=True, max_length=36"):
        prepare_dataloaders(
            Dataset.from_dict(ROWS),
            tokenizer,
            preprocess=lambda rows: tokenizer(rows["text"]),
            max_length=36,
        )


@pytest.mark.parametrize("loss_fn", [None, lm_loss])
def test_tokens_beyond_the_vocabulary_are_found_in_any_loss(loss_fn):
    batch = padded(rows_of((5, 6)))
    batch["input_ids"][1, 2] = VOCAB + 3
    with pytest.raises(DataError, match=f"Token id {VOCAB + 3} in row 1"):
        train_loop(llama(), [batch], loss_fn=loss_fn, max_steps=1, progress_bar=False)
    pair = paired(pairs_of(2))
    pair["input_ids"][1, 0, 2] = VOCAB + 3
    with pytest.raises(DataError, match=f"Token id {VOCAB + 3} in row 1"):
        train_loop(
            llama(), [pair], loss_fn=dpo(reference=llama(seed=1)), max_steps=1, progress_bar=False
        )


def test_tokens_with_a_point_are_refused():
    tokenizer = tokenizer_for("zephyr")
    rows = {"input_ids": [[5.0, 6.0], [7.5, 8.0]], "labels": [[5, 6], [7, 8]]}
    data = {"dev": Dataset.from_dict(rows)}
    with pytest.raises(DataError, match="input_ids of dev are numbers with a point") as error:
        prepare_dataloaders(data, tokenizer, model=llama(vocab_size=len(tokenizer)))
    (line,) = [line for line in fixes_in(error.value) if "cast_column" in line]
    rows["input_ids"][1][0] = 7.0
    fixed = run_fix(line, {"dev": Dataset.from_dict(rows)})
    loader = prepare_dataloaders(fixed, tokenizer, model=llama(vocab_size=len(tokenizer)))["dev"]
    assert next(iter(loader))["input_ids"].tolist() == [[5, 6], [7, 8]]
    nested = {"input_ids": [[[5.5], [6.5]]], "labels": [[[5], [6]]]}
    with pytest.raises(DataError, match=r"Sequence\(datasets.Sequence"):
        prepare_dataloaders({"dev": Dataset.from_dict(nested)}, tokenizer)
    batch = {name: column.float() for name, column in padded(rows_of((5, 6))).items()}
    with pytest.raises(DataError, match="are float32, and tokens are whole numbers"):
        train_loop(
            llama(),
            [{**batch, "labels": batch["labels"].long()}],
            max_steps=1,
            progress_bar=False,
        )


def test_a_masked_model_that_would_copy_is_refused():
    tokenizer = tiny_tokenizer(mask_token="dull")
    model = tiny_bert(kind=BertForMaskedLM)
    data = {"train": Dataset.from_dict({"text": ["good bad movie plot very"] * 6})}
    options = {"model": model, "preprocess": cut(tokenizer, 16), "batch_size": 2}
    loader = prepare_dataloaders(data, tokenizer, **options)["train"]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match="would learn to copy") as error:
        train_loop(model, loader, max_steps=1, progress_bar=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert "transform=manualloop.tasks.mask_tokens(tokenizer)" in str(error.value)
    loader = prepare_dataloaders(data, tokenizer, transform=mask_tokens(tokenizer), **options)
    train_loop(model, loader["train"], max_steps=1, progress_bar=False)


def test_labels_in_their_own_places_of_a_model_that_does_not_shift_are_refused():
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model, batch = transformers.BartForCausalLM(config), padded(rows_of((9, 12)))
    with pytest.raises(DataError, match="does not shift labels") as error:
        train_loop(model, [batch], max_steps=1, progress_bar=False)
    line = re.search(r"\{\*\*batch.*\}", str(error.value))[0]
    train_loop(model, [eval(line)], max_steps=1, progress_bar=False)


def test_causal_models_and_few_labels_are_left_alone():
    train_loop(llama(), [padded(rows_of((9, 12)))], max_steps=1, progress_bar=False)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    batch = padded(rows_of((9, 12)))
    batch["labels"][:, 3:] = -100  # by chance none of a few is hidden
    batch["labels"][:, :3] = batch["input_ids"][:, :3]
    train_loop(model, [batch], max_steps=1, progress_bar=False)
