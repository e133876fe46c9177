"""What of the data is lost is reported once: texts that are cut off, padding, ignored labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from helpers import WORDS, fixes_in, messages, rows, run_fix, tiny_bert, tiny_tokenizer
from transformers import (
    BertForSequenceClassification,
    ByT5Tokenizer,
    FNetConfig,
    FNetForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from manualloop import DataError, evaluate_loop, inspect_batch, prepare_dataloaders
from manualloop.tasks.names import notes_of

LENGTHS = [1, 3, 4, 5, 9, 30]
TEXTS = [" ".join(WORDS[i % len(WORDS)] for i in range(length)) for length in LENGTHS]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [line for line in messages(caplog) if "cut off" in line]
    caplog.clear()
    return found


@pytest.mark.parametrize("limit", [3, 5, 6, 7, 32, 33])
def test_texts_are_counted_that_have_more_tokens_than_the_limit(limit, caplog):
    tokenizer = tiny_tokenizer()
    splits = {
        "train": rows(text=TEXTS, label=[0, 1] * 3),
        "dev": rows(text=TEXTS[:2], label=[0, 1]),
    }
    loaders = prepare_dataloaders(splits, tokenizer, max_length=limit)
    for key, texts in (("train", TEXTS), ("dev", TEXTS[:2])):
        number = sum(len(tokenizer(text)["input_ids"]) > limit for text in texts)
        notes = notes_of(loaders[key])
        assert (notes.num_cut, notes.num_texts, notes.max_length) == (number, len(texts), limit)
    (line,) = told(caplog) or [""]
    assert (" of train (" in line) == (limit < 32)
    assert (" of dev (" in line) == (limit < 5)
    if limit == 5:
        assert line == "texts are cut off at 5 tokens: 67% of train (4 of 6)"


def test_pairs_and_words_are_counted(caplog):
    tokenizer = tiny_tokenizer()
    pairs = rows(sentence1=TEXTS, sentence2=TEXTS[::-1], label=[0] * 6)
    prepare_dataloaders({"dev": pairs}, tokenizer, max_length=16)
    number = sum(
        len(tokenizer(a, b)["input_ids"]) > 16 for a, b in zip(TEXTS, TEXTS[::-1], strict=True)
    )
    assert told(caplog) == [
        f"texts are cut off at 16 tokens: {100 * number / 6:.0f}% of dev ({number} of 6)"
    ]
    words = rows(words=[text.split() for text in TEXTS], label=[0] * 6)
    prepare_dataloaders({"dev": words}, tokenizer, text_columns="words", max_length=6)
    assert told(caplog) == ["texts are cut off at 6 tokens: 50% of dev (3 of 6)"]


@pytest.mark.parametrize("limit", [None, 5])
def test_the_limits_of_tokenizer_and_model_count(limit, caplog):
    tokenizer = tiny_tokenizer(model_max_length=limit or 1_000_000_000)
    dataset = {"dev": rows(text=TEXTS, label=[0] * 6)}
    loader = prepare_dataloaders(dataset, tokenizer)["dev"]
    assert notes_of(loader).max_length == limit
    assert len(told(caplog)) == (limit is not None)
    model = tiny_bert(max_position_embeddings=6)
    prepare_dataloaders(dataset, tokenizer, model=model)
    assert told(caplog)[0].startswith(f"texts are cut off at {min(limit or 6, 6)} tokens")


def test_a_cache_knows_the_count_and_a_selection_has_its_own(tmp_path: Path, caplog):
    path = tmp_path / "rows.parquet"
    rows(text=TEXTS, label=[0] * 6).to_parquet(str(path))
    counts = []
    for _ in range(2):
        dataset = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        prepare_dataloaders({"dev": dataset}, tiny_tokenizer(), max_length=6)
        counts += told(caplog)
    assert counts == ["texts are cut off at 6 tokens: 50% of dev (3 of 6)"] * 2
    prepare_dataloaders({"dev": dataset.select([5, 0])}, tiny_tokenizer(), max_length=6)
    assert told(caplog) == ["texts are cut off at 6 tokens: 50% of dev (1 of 2)"]


def test_a_tokenizer_in_python_is_asked_again_for_those_at_the_limit(caplog):
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    dataset = {"dev": rows(text=["abc", "abcd", "abcdefgh"], label=[0, 1, 0])}
    prepare_dataloaders(dataset, tokenizer, max_length=5)
    assert told(caplog) == ["texts are cut off at 5 tokens: 33% of dev (1 of 3)"]


def test_nothing_is_told_of_texts_that_others_have_cut(caplog):
    tokenizer, dataset = tiny_tokenizer(), rows(text=TEXTS, label=[0] * 6)
    stream = dataset.to_iterable_dataset()
    loader = prepare_dataloaders({"dev": stream}, tokenizer, max_length=4)["dev"]
    assert notes_of(loader).num_cut is None
    assert "is_cut_off" not in next(iter(loader))
    own = lambda batch: tokenizer(batch["text"], truncation=True, max_length=4)  # noqa: E731
    prepare_dataloaders({"dev": dataset}, tokenizer, preprocess=own)
    prepare_dataloaders({"dev": dataset.map(own, batched=True)}, tokenizer)
    assert told(caplog) == []


def test_the_notes_reach_no_batch():
    seen: list[Any] = []
    dataset = {"dev": rows(text=TEXTS, label=[0] * 6)}
    (batch,) = prepare_dataloaders(dataset, tiny_tokenizer(), max_length=4)["dev"]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    collate = lambda batch: seen.extend(batch) or {"n": len(batch)}  # noqa: E731
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), max_length=4, collate_fn=collate)["dev"]
    next(iter(loader))
    assert sorted(seen[0]) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    assert inspect_batch(loader).cut == pytest.approx(5 / 6)


# Padding ------------------------------------------------------------------------------------------


def padded(lengths, caplog, **options):
    """What is logged of the padding, and its share in the batches of the first epoch."""
    caplog.clear()
    rng = np.random.default_rng(0)
    data = rows(
        input_ids=[rng.integers(5, 30, n).tolist() for n in lengths], label=[0] * len(lengths)
    )
    loaders = prepare_dataloaders({"train": data}, tiny_tokenizer(), **options)
    masks = [batch["attention_mask"] for batch in loaders["train"]]
    share = 1 - sum(float(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    return [line for line in messages(caplog) if "padding" in line], share


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 4}], ids=str)
def test_much_padding_is_reported_with_what_grouping_leaves_of_it(options, caplog):
    lengths = np.random.default_rng(1).integers(1, 30, 200)
    (line,), share = padded(lengths, caplog, batch_size=8, **options)
    _, grouped = padded(lengths, caplog, batch_size=8, group_by_length=True, **options)
    assert line == (
        f"{100 * share:.0f}% of the tokens in the batches of train are padding; with "
        f"group_by_length=True it is {100 * grouped:.0f}%"
    )


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([20] * 200, {}),  # none
        ([19, 20] * 100, {}),  # little
        ([1, 30] * 10, {}),  # few batches
        ([1, 30] * 100, {"group_by_length": True}),
        ([1, 30] * 100, {"max_tokens": 64}),
        ([1, 30] * 100, {"batch_size": 1}),
        ([1] * 5 + [30] * 195, {}),
    ],
)
def test_padding_that_nothing_saves_is_not_reported(lengths, options, caplog):
    lines, _ = padded(lengths, caplog, **options)
    assert lines == []


# Labels -------------------------------------------------------------------------------------------


def ignored(caplog):
    return [line for line in messages(caplog) if "count in no loss" in line]


def test_rows_and_labels_that_count_in_no_loss_are_reported(caplog):
    texts = rows(text=["a", "b", "c"] * 4, label=[0, 1, -100] * 4)
    prepare_dataloaders({"train": texts, "dev": texts.select([0, 1])}, tiny_tokenizer())
    assert ignored(caplog) == [
        "rows whose only label is -100 count in no loss: 33% of train (4 of 12)"
    ]
    caplog.clear()
    tokens = rows(
        input_ids=[[5, 6, 7, 8], [5, 6], [7, 8, 9]],
        labels=[[-100, -100, 1, -100], [-100, -100], [-100, 0, -100]],
    )
    prepare_dataloaders({"train": tokens, "dev": tokens.select([0])}, tiny_tokenizer())
    assert ignored(caplog) == [
        "rows whose only label is -100 count in no loss: 33% of train (1 of 3)",
        "labels that are -100 count in no loss: 78% of those of train, 75% of those of dev",
    ]


@pytest.mark.parametrize(
    "columns",
    [
        {"label": [0, 1, 1]},
        {"label": [0.5, -100.0, 2.0]},  # values
        {"labels": [[0, -100], [1, 0], [1, 1]]},
    ],
)
def test_labels_that_count_are_not_reported(columns, caplog):
    prepare_dataloaders({"train": rows(input_ids=[[5, 6]] * 3, **columns)}, tiny_tokenizer())
    assert ignored(caplog) == []


def framed(begin: str = "[CLS]", end: str = "[SEP]") -> Any:
    """A tokenizer with one token that begins every text, and one that ends it."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = begin, end
    return tokenizer


@pytest.mark.parametrize("text", ["[CLS] a b", " [CLS]a", "a b [SEP]", "[CLS] a b [SEP]\n"])
def test_a_text_that_holds_the_tokens_around_it_is_refused(text):
    tokenizer = framed()
    word = WORDS[0]
    texts = [word, text.replace("a", word), word]
    data = rows(text=texts, label=[0, 1, 0])
    with pytest.raises(DataError, match=r"Row 1 of train (begins|ends) with") as caught:
        prepare_dataloaders(data, tokenizer)
    assert "manualloop.tasks.chat(tokenizer)" in str(caught.value)
    fixed = data
    for _ in range(2):  # one that both begins and ends so takes both lines
        (line,) = fixes_in(caught.value)
        fixed = run_fix(line, fixed)
        try:
            loader = prepare_dataloaders(fixed, tokenizer)["train"]
        except DataError as error:
            caught._excinfo = (type(error), error, error.__traceback__)
            continue
        break
    for batch in loader:
        ids = batch["input_ids"]
        assert not (ids[:, :-1] == ids[:, 1:])[ids[:, 1:] != tokenizer.pad_token_id].any()


def test_tokens_of_a_rendered_text_are_told(caplog):
    tokenizer = framed()
    twice = [tokenizer.cls_token_id] * 2
    for ids, is_told in (([*twice, 7], True), ([twice[0], 7], False)):
        caplog.clear()
        prepare_dataloaders(Dataset.from_dict({"input_ids": [ids]}), tokenizer)
        assert ("begins with '[CLS]' twice" in caplog.text) == is_told


def test_padding_that_no_mask_hides_is_told(caplog):
    tokenizer = tiny_tokenizer()
    whole = dict(tokenizer(TEXTS, padding="max_length", max_length=32))
    bare = {"input_ids": whole["input_ids"], "label": [0, 1] * 3}
    splits = {"train": rows(text=TEXTS, label=[0, 1] * 3), "dev": Dataset.from_dict(bare)}

    def lines(dataset, **options):
        caplog.clear()
        loaders = prepare_dataloaders(dataset, tokenizer, **options)
        return [line for line in messages(caplog) if "no attention_mask" in line], loaders

    (line,), _ = lines({"dev": splits["dev"]})
    assert line.startswith("5 of the first 6 rows of dev are padded with '[PAD]'")
    (fix,) = fixes_in(line)
    found, loaders = lines({"dev": run_fix(fix, {"dev": splits["dev"]})["dev"]})
    assert not found
    masks = [row.tolist() for batch in loaders["dev"] for row in batch["attention_mask"]]
    assert masks == whole["attention_mask"]
    for dataset in (
        {"dev": Dataset.from_dict({**whole, "label": [0, 1] * 3})},
        {"dev": Dataset.from_dict({"input_ids": [[5, 6, tokenizer.pad_token_id]], "label": [0]})},
        {"train": splits["train"]},
    ):
        assert not lines(dataset)[0]
    padded = {"preprocess": lambda batch: {"input_ids": [[5, 6, 0, 0]] * len(batch["text"])}}
    assert len(lines({"train": splits["train"]}, **padded)[0]) == (tokenizer.pad_token_id == 0)
    assert lines({"dev": splits["dev"].to_iterable_dataset()})[0]


FNET = FNetForSequenceClassification(
    FNetConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
)
XLNET = XLNetForSequenceClassification(
    XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=16)
)


@pytest.mark.parametrize(
    ("model", "options", "padding", "is_told"),
    [
        (FNET, {}, {}, True),
        (FNET, {"model_input_names": ["input_ids", "token_type_ids"]}, {}, True),
        (FNET, {}, {"pad_to_multiple_of": 32}, False),
        (XLNET, {}, {}, True),
        (XLNET, {"padding_side": "left"}, {}, False),
        (tiny_bert(), {}, {}, False),
    ],
    ids=["FNet", "FNet without masks", "one length", "XLNet", "XLNet on the left", "BERT"],
)
def test_a_model_that_mixes_padding_into_its_tokens_is_told(
    model: BertForSequenceClassification,
    options: dict[str, Any],
    padding: dict[str, Any],
    is_told: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer, losses = tiny_tokenizer(**options), []
    for batch_size in (1, 6):
        data = {"dev": rows(text=TEXTS, label=[0, 1] * 3)}
        made = {"model": model, "batch_size": batch_size, **padding}
        loader = prepare_dataloaders(data, tokenizer, **made)["dev"]
        losses.append(evaluate_loop(model, loader)["loss"])
    found = [line for line in messages(caplog) if "sees padding, whatever" in line]
    assert len(found) == 2 * is_told
    assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) != is_told
    if is_told:
        fix = 'padding_side = "left"' if model is XLNET else "pad_to_multiple_of=32"
        assert fix in found[0]
