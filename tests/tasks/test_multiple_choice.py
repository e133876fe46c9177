"""Choices as nested rows: as run_swag.py of transformers makes them, written out."""

from __future__ import annotations

import pickle
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from helpers import (
    PIECES,
    fixes_in,
    messages,
    piece_tokenizer,
    run_fix,
    tiny_bert,
    whole_and_resumed,
)
from transformers import BertForMultipleChoice, ByT5Tokenizer, DataCollatorForMultipleChoice

from manualloop import (
    DataError,
    check_accumulation,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
)
from manualloop.tasks import flatten_choices

ENDINGS = ["ending0", "ending1", "ending2"]


def swag(num_rows: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(PIECES, k=rng.randint(0, longest)))

    columns: dict[str, list[Any]] = {name: [text(8) for _ in range(num_rows)] for name in ENDINGS}
    columns["sent1"] = [text(6) for _ in range(num_rows)]
    columns["sent2"] = [text(2) for _ in range(num_rows)]
    columns["label"] = [rng.randrange(3) for _ in range(num_rows)]
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(num_classes=3))


def endings(row: Any) -> list[str]:
    return [f"{row['sent2']} {row[name]}" for name in ENDINGS]


def rows_of_run_swag(tokenizer: Any, examples: Any, max_length: int) -> dict[str, list[Any]]:
    """preprocess_function of run_swag.py."""
    first_sentences = [[context] * 3 for context in examples["sent1"]]
    second_sentences = [
        [f"{header} {examples[end][i]}" for end in ENDINGS]
        for i, header in enumerate(examples["sent2"])
    ]
    first_sentences = [text for row in first_sentences for text in row]
    second_sentences = [text for row in second_sentences for text in row]
    made = tokenizer(first_sentences, second_sentences, max_length=max_length, truncation=True)
    return {k: [v[i : i + 3] for i in range(0, len(v), 3)] for k, v in made.items()}


@pytest.mark.parametrize("make", [piece_tokenizer, ByT5Tokenizer])
def test_rows_are_those_of_run_swag(make):
    tokenizer = make()
    for seed in range(12):
        rows, limit = swag(5, seed)[:], 12 + 3 * seed
        made, _, counts = flatten_choices(tokenizer, "sent1", endings, max_length=limit).make(
            rows, str
        )
        expected = rows_of_run_swag(tokenizer, rows, limit)
        assert {name: made[name] for name in expected} == expected
        assert made["labels"] == rows["label"]
        whole = rows_of_run_swag(tokenizer, rows, 10_000)["input_ids"]
        cut = sum(len(choice) > limit for row in whole for choice in row)
        assert counts == {"choices": 15, "cut": cut}


def test_forms_of_texts():
    tokenizer = piece_tokenizer()
    columns = {"q": ["ab", "fed"], "choices": [["a", "b"], ["c", "d"]], "x": ["a", "c"]}
    rows = {**columns, "y": ["b", "d"]}
    made = [
        flatten_choices(tokenizer, "q", second)(rows)["input_ids"]
        for second in ("choices", ["x", "y"], lambda row: row["choices"])
    ]
    assert made[0] == made[1] == made[2]
    swapped = flatten_choices(tokenizer, "choices", lambda row: [row["q"]] * 2)(rows)
    assert swapped["input_ids"][1][0] == tokenizer("c", "fed")["input_ids"]
    with pytest.raises(DataError, match=r"\['ab', 'ab'\] and \['a', None\]"):
        flatten_choices(tokenizer, "q", "choices")({"q": ["ab"], "choices": [["a", None]]})
    with pytest.raises(DataError, match="a text for each choice"):
        flatten_choices(tokenizer, "q", "choices")({"q": ["ab"], "choices": [[]]})


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_those_of_transformers(side):
    tokenizer = piece_tokenizer(padding_side=side)
    model = tiny_bert(kind=BertForMultipleChoice, vocab_size=32)
    data = swag(11, 3)
    preprocess = flatten_choices(tokenizer, "sent1", endings)
    for multiple in (None, 8):
        loader = prepare_dataloaders(
            {"dev": data},
            tokenizer,
            model=model,
            preprocess=preprocess,
            batch_size=4,
            pad_to_multiple_of=multiple,
        )["dev"]
        collate = DataCollatorForMultipleChoice(tokenizer, pad_to_multiple_of=multiple)
        made = preprocess(data[:])
        inputs = ["input_ids", "token_type_ids", "attention_mask", "labels"]
        rows = [
            dict(zip(inputs, row, strict=True)) for row in zip(*map(made.get, inputs), strict=True)
        ]
        for number, batch in enumerate(loader):
            expected = collate([dict(row) for row in rows[4 * number : 4 * number + 4]])
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
            assert batch["input_ids"].shape[1] == 3


def test_a_split_without_labels_is_predicted_and_with_them_scored():
    tokenizer = piece_tokenizer()
    model = tiny_bert(kind=BertForMultipleChoice, vocab_size=32, initializer_range=1.0)
    data = {"dev": swag(11, 3), "test": swag(11, 3).remove_columns("label")}
    loaders = prepare_dataloaders(
        data, tokenizer, model=model, preprocess=flatten_choices(tokenizer, "sent1", endings)
    )
    found = predict_loop(model, loaders["test"]).predictions
    labels = np.array(data["dev"]["label"])
    accuracy = evaluate_loop(model, loaders["dev"], "accuracy")["accuracy"]
    assert accuracy == pytest.approx((found == labels).mean())
    assert len({*found.tolist()}) > 1


def test_rows_with_other_numbers_of_choices_are_refused():
    tokenizer = piece_tokenizer()
    choices = [["a", "b"], ["a", "b"], ["a", "b", "c"], ["a", "b"], ["a"]]
    data = Dataset.from_dict({"q": ["ab"] * 5, "choices": choices, "label": [0, 1, 1, 0, 0]})
    options: dict[str, Any] = {
        "model": tiny_bert(kind=BertForMultipleChoice, vocab_size=32),
        "preprocess": flatten_choices(tokenizer, "q", "choices"),
    }
    with pytest.raises(
        DataError, match="Row 2 of train has 3 choices, and most rows have 2"
    ) as error:
        prepare_dataloaders(data, tokenizer, **options)
    (line,) = [line for line in fixes_in(error.value) if "select" in line]
    left = run_fix(line.removeprefix("dataset = "), data)
    assert left["choices"][:] == [["a", "b"]] * 3
    loader = prepare_dataloaders(left, tokenizer, **options)["train"]
    assert next(iter(loader))["input_ids"].shape[:2] == (3, 2)
    stream = prepare_dataloaders(
        {"dev": data.to_iterable_dataset()}, tokenizer, batch_size=5, **options
    )["dev"]
    with pytest.raises(DataError, match="Row 2 of the 5 rows of a batch has 3 choices"):
        next(iter(stream))


@pytest.mark.parametrize("label", [3, "A", 0.5])
def test_labels_that_are_no_choice_are_refused(label):
    rows = {**swag(1)[:], "label": [label]}
    with pytest.raises(DataError, match=f"label={label!r} and 3 choices"):
        flatten_choices(piece_tokenizer(), "sent1", endings)(rows)


def test_labels_by_letter():
    rows = {**swag(3)[:], "answer": ["B", "A", "C"]}
    made = flatten_choices(
        piece_tokenizer(), "sent1", endings, label=lambda row: "ABC".index(row["answer"])
    )
    assert made(rows)["labels"] == [1, 0, 2]


def test_choices_that_are_cut_off_are_reported(caplog):
    tokenizer = piece_tokenizer(model_max_length=16)
    model = tiny_bert(kind=BertForMultipleChoice, vocab_size=32)
    data, preprocess = swag(9, 1), flatten_choices(tokenizer, "sent1", endings)
    prepare_dataloaders(data, tokenizer, model=model, preprocess=preprocess)
    number = preprocess.make(data[:], str).counts["cut"]
    share = round(100 * number / 27)
    line = f"train: choices are cut off at 16 tokens: {share}% ({number} of 27)"
    assert line in messages(caplog)


def test_a_run_is_exact(tmp_path):
    tokenizer = piece_tokenizer()
    data = {"train": swag(14, 4), "validation": swag(6, 5)}

    def run(folder, **options):
        torch.manual_seed(0)
        model = tiny_bert(kind=BertForMultipleChoice, vocab_size=32).double()
        loaders = prepare_dataloaders(
            data,
            tokenizer,
            model=model,
            preprocess=flatten_choices(tokenizer, "sent1", endings),
            batch_size=4,
        )
        return train_loop(
            model,
            loaders["train"],
            prepare_optimizer(model, lr=1e-2),
            num_epochs=2,
            gradient_accumulation_steps=3,
            evaluate=partial(evaluate_loop, model, loaders["validation"], "accuracy"),
            best_metric="accuracy",
            checkpoint_dir=folder,
            checkpoint_every=1,
            progress_bar=False,
            **options,
        )

    whole_and_resumed(run, tmp_path, dies_after=3)
    model = tiny_bert(kind=BertForMultipleChoice, vocab_size=32).double()
    loader = prepare_dataloaders(
        data, tokenizer, model=model, preprocess=flatten_choices(tokenizer, "sent1", endings)
    )["train"]
    assert check_accumulation(model, next(iter(loader))).is_exact


def test_it_can_be_sent_to_other_processes():
    function = flatten_choices(piece_tokenizer(), "sent1", ENDINGS)
    rows = swag(3)[:]
    assert pickle.loads(pickle.dumps(function))(rows) == function(rows)


def test_choices_need_no_model_to_be_known():
    tokenizer, data = piece_tokenizer(), swag(6, 1)
    options = {"preprocess": flatten_choices(tokenizer, "sent1", endings), "batch_size": 3}
    model = tiny_bert(kind=BertForMultipleChoice, vocab_size=32)
    for stored in (data, data.to_iterable_dataset()):
        with_model, without = (
            list(prepare_dataloaders({"dev": stored}, tokenizer, model=one, **options)["dev"])
            for one in (model, None)
        )
        for one, other in zip(with_model, without, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("label", [1.5, "1", float("nan"), 3])
def test_labels_that_are_no_number_of_a_choice_are_refused(label):
    rows = {"q": ["ab", "ab"], "choices": [["a", "b", "c"]] * 2, "label": [0, label]}
    with pytest.raises(DataError, match="Row 1 of the batch has label="):
        flatten_choices(piece_tokenizer(), "q", "choices")(rows)
    rows["label"] = [2.0, -100]
    made = flatten_choices(piece_tokenizer(), "q", "choices")(rows)
    assert made["labels"] == [2, -100]


def test_columns_that_are_not_there_are_named():
    rows = {"q": ["ab"], "choices": [["a", "b"]]}
    with pytest.raises(DataError, match=r"no column 'sent1'\. The columns: q, choices"):
        flatten_choices(piece_tokenizer(), "sent1", "choices")(rows)


@pytest.mark.parametrize("label", [-1, -7])
def test_negative_labels_stand_for_none(label):
    tokenizer, data = piece_tokenizer(), swag(6, 1)
    data = data.remove_columns("label")
    hidden = data.add_column("label", [label] * 6)
    some = data.add_column("label", [0, 1, label, 2, 0, 1])
    options = {
        "model": tiny_bert(kind=BertForMultipleChoice, vocab_size=32),
        "preprocess": flatten_choices(tokenizer, "sent1", endings),
    }
    loader = prepare_dataloaders({"dev": hidden}, tokenizer, **options)["dev"]
    assert "labels" not in next(iter(loader))
    with pytest.raises(DataError, match="Row 2 of dev has labels=None"):
        prepare_dataloaders({"dev": some}, tokenizer, **options)
