"""Padding and collating rows, and the messages for rows that do not fit together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import load_dataset
from helpers import (
    VOCAB_SIZE,
    apply_fix,
    assert_same_batches,
    course_loader,
    first_batch,
    labels_of,
    rows,
    table_of,
    tiny_bert,
    tiny_tokenizer,
    token_model,
)
from transformers import BertForMultipleChoice, T5Config, T5ForConditionalGeneration

from manualloop import DataError, prepare_dataloaders, train_loop, windows
from manualloop.data.collate import explain_rows
from manualloop.data.sampler import order


# datasets before 4 leaves the file to be closed by the garbage collection.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_rows_of_a_csv_file_with_a_gap_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,1\nbad,\nfine,1\n")
    loaded = load_dataset("csv", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    message = "Row 1 of train has label=None. Rows without a value: 1 of 3"
    with pytest.raises(DataError, match=message):
        prepare_dataloaders(loaded, tiny_tokenizer())


def test_rows_without_text_are_named():
    dataset = rows(text=["good", None, None], label=[0, 1, 0])
    message = "Row 1 of train has text=None. Rows without a value: 2 of 3. Filter them out: dataset"
    with pytest.raises(DataError, match=message):
        prepare_dataloaders(dataset, tiny_tokenizer())
    dataset = dataset.filter(lambda row: row["text"] is not None)
    assert labels_of(prepare_dataloaders(dataset, tiny_tokenizer())["train"]) == [0]


def test_padding_to_a_multiple():
    dataset = table_of(["text"])
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), pad_to_multiple_of=8)["train"]
    expected = course_loader(
        dataset, tiny_tokenizer(), ["text"], sampler=order(21, 42, 0), pad_to_multiple_of=8
    )
    assert_same_batches(loader, expected)
    assert {batch["input_ids"].shape[1] % 8 for batch in loader} == {0}


def test_a_collate_fn_gets_every_column_but_the_text_that_became_tokens():
    seen: list[dict[str, Any]] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(batch)
        return {"labels": torch.tensor([row["labels"] for row in batch])}

    dataset = table_of(["text"]).add_column("name", [f"row {n}" for n in range(21)])
    loaders = prepare_dataloaders(
        dataset, tiny_tokenizer(), text_columns="text", collate_fn=collate, model=tiny_bert()
    )
    assert len(labels_of(loaders["train"])) == len(seen) == 21
    tokens = {"input_ids", "token_type_ids", "attention_mask"}
    assert set(seen[0]) == {"labels", "idx", "name"} | tokens


def test_a_collate_fn_may_tokenize():
    tokenizer = tiny_tokenizer()

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        encoded = tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([row["labels"] for row in batch])}

    dataset = table_of(["text"])
    loaders = prepare_dataloaders(dataset, collate_fn=collate)
    expected = course_loader(dataset, tokenizer, ["text"], sampler=order(21, 42, 0))
    assert_same_batches(loaders["train"], expected)


def test_a_collate_fn_may_make_numbers_of_strings():
    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return {"labels": torch.tensor([["no", "yes"].index(row["labels"]) for row in batch])}

    dataset = {"dev": rows(input_ids=[[4], [5]], label=["yes", "no"])}
    (batch,) = prepare_dataloaders(dataset, collate_fn=collate)["dev"]
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"x": 1}, {"x": None}],
            "Row 1 of the 2 rows checked has x=None. Rows without a value: 1",
        ),
        ([{"text": "good"}], "Column 'text' is still text."),
        ([{"input_ids": [4], "id": "a"}], "Column 'id' is text, e.g. 'a' (row 0), beside"),
        ([{"label": "pos"}], "'label' holds strings, e.g. 'pos' (row 0)."),
        ([{"x": [1]}, {"x": [1, 2, 3]}], "have lengths 1..3 in 'x', and they are not padded."),
        (
            [
                {"x": torch.ones(1), "y": torch.tensor(0)},
                {"x": torch.ones(2), "y": torch.tensor(1)},
            ],
            "The rows of a batch have lengths 1..2 in 'x'",
        ),
        (
            [{"input_ids": [4, 5], "labels": [0, 1]}, {"input_ids": [4, 5, 6], "labels": [0]}],
            "labels have length 1, input_ids 3 (row 1 of the 2 checked).",
        ),
        ([{"x": 1, "y": [1, 2]}, {"x": 2, "y": [3, 4]}], None),
        ([(1, 2)], None),
        ([], None),
    ],
)
def test_explain_rows(rows, message):
    explained = explain_rows(rows)
    assert explained is None if message is None else message in explained


def test_an_error_of_a_collate_fn_that_rows_do_not_explain_is_left_as_it_is():
    def collate(batch: list[Any]) -> Any:
        raise RuntimeError("mine")

    loader = prepare_dataloaders(rows(input_ids=[[4]], labels=[0]), collate_fn=collate)["train"]
    with pytest.raises(RuntimeError, match=r"^mine$"):
        list(windows(loader, 1))


def test_a_later_row_of_a_stream_with_too_few_labels_is_not_padded():
    dataset = rows(input_ids=[[4, 5, 6]] * 2, labels=[[0, 1, 0], [0, 1]]).to_iterable_dataset()
    with pytest.raises(DataError, match=r"labels have length 2, input_ids 3 \(row 1 of the 2"):
        first_batch(dataset, tiny_tokenizer(), model=token_model())


@pytest.mark.parametrize(
    "labels",
    [[[0, None], [2]], [[0, None], [1, 0]], [[0.0, float("nan")], [1.0, 0.0]]],
    ids=["classes", "0-and-1", "nan"],
)
def test_values_missing_inside_lists_are_named(labels):
    dataset = rows(text=["good", "bad"], labels=labels)
    message = r"Row 0 of dev has None or NaN in labels. Rows without a value: 1 of 2"
    with pytest.raises(DataError, match=message) as error:
        first_batch(dataset, tiny_tokenizer(), model=tiny_bert(3))
    assert len(apply_fix(error, dataset, "filter")) == 1


def tiny_t5() -> Any:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


def test_sequences_are_padded_apart_from_the_sequences_they_become():
    dataset = rows(input_ids=[[4, 5], [6]], labels=[[4, 5, 6, 7], [4, 5]])
    batch = first_batch(dataset, tiny_tokenizer(), model=tiny_t5())
    assert batch["input_ids"].tolist() == [[4, 5], [6, 0]]
    assert batch["labels"].tolist() == [[4, 5, 6, 7], [4, 5, -100, -100]]
    train_loop(tiny_t5(), [batch], num_epochs=1, progress_bar=False)
    assert "labels" not in first_batch(
        dataset.remove_columns("labels"), tiny_tokenizer(), model=tiny_t5()
    )


def test_choices_are_padded():
    dataset = rows(input_ids=[[[4, 5], [6]], [[6, 7, 7], [5]]], labels=[0, 1])
    model = tiny_bert(kind=BertForMultipleChoice)
    batch = first_batch(dataset, tiny_tokenizer(), model=model)
    assert batch["input_ids"].shape == (2, 2, 3)
    train_loop(model, [batch], num_epochs=1, progress_bar=False)


def test_a_first_label_that_is_missing_in_a_stream_of_tokens():
    dataset = rows(input_ids=[[4, 5], [6]], labels=[None, [1]]).to_iterable_dataset()
    with pytest.raises(DataError, match="labels=None"):
        first_batch(dataset, tiny_tokenizer(), model=token_model())
