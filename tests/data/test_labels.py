"""Labels of every kind: classes, values, several classes a row, classes of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Value,
    concatenate_datasets,
    load_dataset,
)
from helpers import (
    apply_fix,
    assert_same_batches,
    course_loader,
    first_batch,
    messages,
    rows,
    table_of,
    tiny_bert,
    tiny_tokenizer,
    token_model,
)
from transformers import BertForQuestionAnswering, BertForTokenClassification

from manualloop import ConfigError, DataError, prepare_dataloaders, train_loop
from manualloop.data.sampler import order


def test_labels_that_are_all_minus_one_are_dropped_and_reported(caplog):
    withheld = rows(8).map(lambda row: {"label": -1})
    features = Features({**rows().features, "label": ClassLabel(names=["no", "yes"])})
    splits = {"train": rows(8).cast(features), "test": withheld.cast(features)}
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), model=tiny_bert())
    (batch,) = loaders["test"]
    assert "labels" not in batch
    assert messages(caplog) == [
        "train: using sentence -> labels",
        "test: using sentence; every label is -1, so there are no labels",
        "classes are 0 = no, 1 = yes: named so in the config of BertForSequenceClassification",
    ]


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "int64", "bool"])
def test_classes_of_any_whole_type_become_int64(dtype):
    dataset = rows().cast_column("label", Value(dtype))
    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), model=tiny_bert())
    (batch,) = loaders["train"]
    assert batch["labels"].dtype == torch.int64
    train_loop(tiny_bert(), loaders["train"], num_epochs=1, progress_bar=False)


@pytest.mark.parametrize("model", [None, 1])
def test_floats_are_a_regression(model):
    dataset = table_of(["sentence1", "sentence2"], label="float")
    model = model and tiny_bert(model)
    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), model=model)
    expected = course_loader(
        dataset, tiny_tokenizer(), ["sentence1", "sentence2"], sampler=order(21, 42, 0)
    )
    assert_same_batches(loaders["train"], expected)
    assert next(iter(loaders["train"]))["labels"].dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"task": "regression"}, {"model": tiny_bert(1)}])
def test_whole_numbers_are_values_under_one_output(arguments, caplog):
    dataset = rows(text=["good", "bad", "fine"], label=[10, 30, 20])
    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), **arguments)
    (batch,) = loaders["train"]
    assert batch["labels"].dtype == torch.float32
    assert sorted(batch["labels"].tolist()) == [10, 20, 30]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


CLASS_LISTS = [[0, 2], [1], [], [2]]


MULTI_HOT = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]


TEXTS = ["good", "bad movie", "the plot was", "a"]


def classes_with_names() -> Dataset:
    features = Features(
        {"text": Value("string"), "labels": datasets.Sequence(ClassLabel(names=["a", "b", "c"]))}
    )
    return Dataset.from_dict({"text": TEXTS, "labels": CLASS_LISTS}, features=features)


MULTI_LABEL: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "rows of 0 and 1": (lambda: rows(text=TEXTS, labels=MULTI_HOT), {}),
    "rows of 0 and 1, with the model": (
        lambda: rows(text=TEXTS, label=MULTI_HOT),
        {"model": tiny_bert(3)},
    ),
    "rows of 0.0 and 1.0": (
        lambda: rows(text=TEXTS, labels=[[float(x) for x in row] for row in MULTI_HOT]),
        {},
    ),
    "rows of bools": (lambda: rows(text=TEXTS, labels=[[x > 0 for x in r] for r in MULTI_HOT]), {}),
    "class numbers with names": (classes_with_names, {}),
    "class numbers, with the model": (
        lambda: rows(text=TEXTS, labels=CLASS_LISTS),
        {"model": tiny_bert(3)},
    ),
    "streamed rows of 0 and 1": (
        lambda: rows(text=TEXTS, labels=MULTI_HOT).to_iterable_dataset(),
        {},
    ),
    "streamed class numbers with names": (lambda: classes_with_names().to_iterable_dataset(), {}),
}


@pytest.mark.parametrize(("make", "arguments"), MULTI_LABEL.values(), ids=MULTI_LABEL)
def test_multi_label(make, arguments):
    loaders = prepare_dataloaders({"dev": make()}, tiny_tokenizer(), **arguments)
    (batch,) = loaders["dev"]
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == MULTI_HOT
    result = train_loop(tiny_bert(3), [batch], num_epochs=1, progress_bar=False)
    assert result.state.model.config.problem_type == "multi_label_classification"


def test_lists_of_one_class_number_are_distinguished_from_rows_of_0_and_1():
    dataset = {"dev": rows(text=["good", "bad"], labels=[[3], [1]])}
    (batch,) = prepare_dataloaders(dataset, tiny_tokenizer(), model=tiny_bert(4))["dev"]
    assert batch["labels"].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


def test_multi_label_rows_as_wide_as_the_tokens_are_not_mistaken_for_labels_of_tokens():
    dataset = {"dev": rows(input_ids=[[4, 5, 6], [7, 8]], labels=[[0, 1, 1], [1, 0, 1]])}
    for model in (None, tiny_bert(3)):
        (batch,) = prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["dev"]
        assert batch["labels"].tolist() == [[0, 1, 1], [1, 0, 1]]
        assert batch["labels"].dtype == torch.float32
    dataset = {"dev": rows(input_ids=[[4, 5, 6]], labels=[[0, 1, 1]])}
    (batch,) = prepare_dataloaders(dataset, tiny_tokenizer(), model=tiny_bert(3))["dev"]
    assert batch["labels"].dtype == torch.float32


def test_multi_label_numbers_of_unknown_classes_are_refused():
    dataset = rows(text=TEXTS, labels=CLASS_LISTS)
    with pytest.raises(DataError, match=r"'labels' of train holds lists.* model=model"):
        prepare_dataloaders(dataset, tiny_tokenizer())


@pytest.mark.parametrize("model", [None, tiny_bert(kind=BertForTokenClassification)])
def test_labels_of_tokens_are_padded_with_minus_100(model):
    dataset = rows(input_ids=[[4, 5, 6], [7]], labels=[[0, 1, 1], [1]])
    (batch,) = prepare_dataloaders({"dev": dataset}, tiny_tokenizer(), model=model)["dev"]
    assert batch["labels"].tolist() == [[0, 1, 1], [1, -100, -100]]
    assert batch["labels"].dtype == torch.int64


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match=r"task='ner' is unknown\. Use one of: single_label"):
        prepare_dataloaders(rows(), tiny_tokenizer(), task="ner")


def test_rows_of_json_lines_with_nested_labels(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"text": text, "labels": numbers} for text, numbers in zip(TEXTS, MULTI_HOT, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    loaded = load_dataset("json", data_files={"dev": str(path)}, cache_dir=str(tmp_path / "cache"))
    (batch,) = prepare_dataloaders(loaded, tiny_tokenizer())["dev"]
    assert batch["labels"].tolist() == MULTI_HOT


WORDS_LABELLED = {"text": ["good movie bad", "bad plot was"], "labels": [[0, 1, 0], [0, 1, 1]]}


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_words_are_not_mistaken_for_labels_of_tokens(streaming):
    dataset = rows(**WORDS_LABELLED)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(DataError, match=r"labels have length 3, input_ids 5 \(row 0 of dev\)"):
        first_batch(dataset, tiny_tokenizer(), model=token_model())


def test_one_label_a_row_under_a_head_for_tokens_is_refused():
    with pytest.raises(DataError, match=r"labels have length 1, input_ids 3 \(row 0 of train\)"):
        prepare_dataloaders(rows(), tiny_tokenizer(), model=token_model())


def test_the_suggested_line_that_removes_minus_1_from_lists_of_classes_runs():
    dataset = rows(text=["good", "bad"], labels=[[0, -1], [2]])
    with pytest.raises(DataError, match="Label -1 in row 0 of dev") as error:
        first_batch(dataset, tiny_tokenizer(), model=tiny_bert(3))
    batch = first_batch(apply_fix(error, dataset, "map"), tiny_tokenizer(), model=tiny_bert(3))
    assert batch["labels"].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_lists_of_classes_that_start_at_1_get_no_suggestion_that_fails():
    dataset = rows(text=["good", "bad"], labels=[[1, 2], [3]])
    with pytest.raises(DataError, match=r"Label 3 in row 1 of dev.*num_labels=4"):
        first_batch(dataset, tiny_tokenizer(), model=tiny_bert(3))


def test_answers_that_truncation_cut_off_are_explained():
    model = tiny_bert(kind=BertForQuestionAnswering)
    positions = {"start_positions": [5, 5], "end_positions": [5, 5]}
    loader = prepare_dataloaders(rows(input_ids=[[4, 5]] * 2, **positions), tiny_tokenizer())
    with pytest.raises(DataError, match=r"No label to learn from in train batch 0: all start and"):
        train_loop(model, loader["train"], num_epochs=1, progress_bar=False)


def test_a_window_without_labels_counts_all_of_them():
    dataset = rows(input_ids=[[4], [5], [6]], labels=[-100] * 3)
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), batch_size=2)["train"]
    with pytest.raises(DataError, match=r"in train batch 0 and 1 more: all 3 are -100"):
        train_loop(
            tiny_bert(), loader, num_epochs=1, gradient_accumulation_steps=2, progress_bar=False
        )


def test_rows_of_lists_are_named_across_chunks_and_selections():
    part = rows(text=["a", "b"], labels=[[0], [1, 2]])
    dataset = concatenate_datasets([part, rows(text=["a", "b"], labels=[[0], [1, 7]])])
    for chosen, row in ((dataset, 3), (dataset.select([3, 0, 1]), 0)):
        with pytest.raises(DataError, match=f"Label 7 in row {row} of dev"):
            first_batch(chosen, tiny_tokenizer(), model=tiny_bert(3))


@pytest.mark.parametrize("test", [{"stars": [-1, -1], "labels": [5, 6]}, {"labels": [5, 6]}])
def test_another_column_does_not_stand_in_for_withheld_labels(test):
    splits = {
        "train": rows(text=["a", "b"], stars=[0, 1], labels=[5, 6]),
        "test": rows(text=["a", "b"], **test),
    }
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), label_column="stars")
    assert "labels" not in next(iter(loaders["test"]))
    assert sorted(next(iter(loaders["train"]))["labels"].tolist()) == [0, 1]


def test_classes_as_values_are_warned_of_once(caplog):
    splits = {"train": rows(), "dev": rows()}
    prepare_dataloaders(splits, tiny_tokenizer(), model=tiny_bert(1))
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
