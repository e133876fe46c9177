"""``prepare_dataloaders``: the batches of the course's pipeline, bit by bit; ``inspect_batch``."""

from __future__ import annotations

import gc
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
)
from helpers import VOCAB_SIZE, WORDS, rows, tiny_bert, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertForTokenClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from manualloop import (
    ConfigError,
    DataError,
    TrainState,
    inspect_batch,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
    train_steps,
    windows,
)
from manualloop.data.collate import explain_rows
from manualloop.data.columns import find_columns
from manualloop.data.sampler import OrderedBatchSampler, order, set_epoch
from manualloop.data.tables import Dataset as TablesDataset


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


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
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


# The columns. ---------------------------------------------------------------------------------

SCHEMES = {
    "cola, sst2": ("sentence",),
    "mrpc, stsb, rte, wnli": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli, ax": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "imdb": ("text",),
    "of one's own": ("utterance",),
}


@pytest.mark.parametrize("texts", SCHEMES.values(), ids=SCHEMES)
def test_batches_are_those_of_the_course(texts, caplog):
    dataset, tokenizer = table_of(texts), tiny_tokenizer()
    splits = DatasetDict(train=dataset, validation=dataset.select(range(10)))
    loaders = prepare_dataloaders(splits, tokenizer)
    assert list(loaders) == ["train", "validation"]
    for epoch in (0, 1):
        set_epoch(loaders["train"], epoch)
        expected = course_loader(dataset, tokenizer, texts, sampler=order(21, 42, epoch))
        assert_same_batches(loaders["train"], expected)
    assert_same_batches(
        loaders["validation"], course_loader(splits["validation"], tokenizer, texts)
    )
    assert said(caplog) == [f"train, validation: using {', '.join(texts)} -> labels; left out: idx"]
    batch = next(iter(loaders["train"]))
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "token_type_ids", "attention_mask", "labels"], torch.int64
    )


@pytest.mark.shared
def test_mrpc(shared, tmp_path):
    raw = load_dataset(str(shared / "glue/mrpc"), cache_dir=str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/bert-base-uncased")
    loaders = prepare_dataloaders(raw, tokenizer)
    assert {name: len(loader) for name, loader in loaders.items()} == {
        "train": 459,
        "validation": 51,
    }
    batch = next(iter(loaders["train"]))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    texts = ("sentence1", "sentence2")
    expected = course_loader(raw["train"], tokenizer, texts, sampler=order(3668, 42, 0))
    assert_same_batches(loaders["train"], expected)
    expected = course_loader(raw["validation"], tokenizer, texts)
    assert_same_batches(loaders["validation"], expected)


def test_columns_are_chosen_by_the_user_over_what_would_be_inferred():
    dataset = table_of(["sentence", "text", "extra"]).rename_column("idx", "stars")
    loaders = prepare_dataloaders(
        dataset, tiny_tokenizer(), text_columns="extra", label_column="stars"
    )
    expected = course_loader(
        dataset, tiny_tokenizer(), ["extra"], label="stars", sampler=order(21, 42, 0)
    )
    assert_same_batches(loaders["train"], expected)
    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), text_columns=["text", "sentence"])
    expected = course_loader(
        dataset, tiny_tokenizer(), ["text", "sentence"], sampler=order(21, 42, 0)
    )
    assert_same_batches(loaders["train"], expected)


@pytest.mark.parametrize(
    ("kinds", "arguments", "error", "message"),
    [
        (
            {"title": "text", "body": "text", "label": "class"},
            {},
            DataError,
            "Which columns of train are the text? title, body hold strings. Say "
            "text_columns='title', or a pair: text_columns=('title', 'body').",
        ),
        (
            {"text": "text", "title": "text"},
            {},
            DataError,
            "Which columns of train are the text?",
        ),
        (
            {"image": "other", "label": "class"},
            {},
            DataError,
            "train has neither text nor input_ids. Its columns: image, label.",
        ),
        (
            {"text": "text", "label": "int"},
            {"text_columns": "txet"},
            ConfigError,
            "train has no column 'txet'. It has: text, label. Name them with text_columns=",
        ),
        (
            {"text": "text", "label": "int"},
            {"label_column": "lebal"},
            ConfigError,
            "train has no column 'lebal'",
        ),
        (
            {"text": "text", "stars": "int"},
            {"text_columns": "stars"},
            ConfigError,
            "Column 'stars' of train is no text: it holds values of kind 'int'.",
        ),
        (
            dict.fromkeys("abc", "text"),
            {"text_columns": ["a", "b", "c"]},
            ConfigError,
            "a tokenizer takes one text or a pair. Join them",
        ),
    ],
)
def test_columns_that_cannot_be_told_are_asked_for(kinds, arguments, error, message):
    with pytest.raises(error) as refused:
        find_columns("train", kinds, **arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"text": "text", "label": "int"}, (("text",), "label")),
        ({"text": "text", "label": "int", "labels": "int"}, (("text",), "labels")),
        ({"text": "text", "intent": "class"}, (("text",), "intent")),
        ({"text": "text", "intent": "class", "tone": "class"}, (("text",), None)),
        ({"text": "text", "intent": "int"}, (("text",), None)),
        ({"text": "text", "label": "text"}, (("text",), "label")),
        ({"text": "text", "category": "text"}, (("text",), None)),
        ({"input_ids": "list", "text": "text", "other": "text"}, ((), None)),
        ({"sentence": "text", "question": "text", "a": "text"}, (("question", "sentence"), None)),
    ],
)
def test_columns_are_found(kinds, expected):
    assert find_columns("train", kinds) == expected


def test_a_split_without_the_text_of_the_others_is_refused():
    splits = {"train": rows(), "test": rows(text=["good"])}
    with pytest.raises(DataError, match=r"test has no column 'sentence'; it has text\."):
        prepare_dataloaders(splits, tiny_tokenizer())


@pytest.mark.parametrize(
    "given_rows",
    [{}, [{"text": "good", "label": 0}], {"train": [1, 2]}, {"train": "train.csv"}],
    ids=["no-split", "list-of-rows", "list-in-a-split", "file-name"],
)
def test_what_is_no_dataset_is_refused(given_rows):
    with pytest.raises(DataError, match=r"datasets\.|load_dataset"):
        prepare_dataloaders(given_rows, tiny_tokenizer())


# Where rows come from. ------------------------------------------------------------------------


def test_one_dataset_is_the_training_split_and_any_mapping_will_do():
    dataset = rows(10)
    (name,) = (alone := prepare_dataloaders(dataset, tiny_tokenizer()))
    assert name == "train"
    mapped = prepare_dataloaders({"train_a": dataset, "dev": dataset}, tiny_tokenizer())
    assert list(mapped) == ["train_a", "dev"]
    assert_same_batches(mapped["train_a"], alone["train"])
    assert labels_of(mapped["dev"]) == dataset["label"]
    assert labels_of(mapped["train_a"]) == [dataset["label"][row] for row in order(10, 42, 0)]


def test_streams_give_the_same_rows_in_their_own_order():
    dataset = rows(10)
    stream = IterableDatasetDict(
        train=dataset.to_iterable_dataset(), validation=dataset.to_iterable_dataset()
    )
    loaders = prepare_dataloaders(stream, tiny_tokenizer(), batch_size=4)
    expected = course_loader(dataset, tiny_tokenizer(), ["sentence"], batch_size=4)
    for loader in loaders.values():
        assert_same_batches(loader, expected)
        assert_same_batches(loader, expected)  # and again


def test_a_stream_that_does_not_know_its_features():
    def rows_one_by_one():
        yield from rows(5)

    stream = IterableDataset.from_generator(rows_one_by_one)
    assert stream.features is None
    loaders = prepare_dataloaders(stream, tiny_tokenizer(), batch_size=4, drop_last=True)
    (batch,) = loaders["train"]
    assert batch["labels"].tolist() == [0, 1, 0, 1]


def test_a_shuffled_stream_is_shuffled_anew_each_epoch():
    stream = rows(input_ids=[[4]] * 16, labels=list(range(16))).to_iterable_dataset()
    loaders = prepare_dataloaders(stream.shuffle(seed=0, buffer_size=16))
    orders = []
    for epoch in (0, 1, 0):
        set_epoch(loaders["train"], epoch)
        orders.append(labels_of(loaders["train"]))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(16))


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of datasets' streams
def test_files(kind, streaming, tmp_path):
    dataset = rows(10)
    path = tmp_path / f"rows.{kind}"
    {"csv": dataset.to_csv, "json": dataset.to_json, "parquet": dataset.to_parquet}[kind](path)
    loaded = load_dataset(
        kind, data_files=str(path), cache_dir=str(tmp_path / "cache"), streaming=streaming
    )
    loader = prepare_dataloaders(loaded, tiny_tokenizer(), model=tiny_bert())["train"]
    sampler = None if streaming else order(10, 42, 0)
    expected = course_loader(dataset, tiny_tokenizer(), ["sentence"], sampler=sampler)
    assert_same_batches(loader, expected)
    gc.collect()  # while that warning is ignored


def test_rows_of_a_csv_file_with_a_gap_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,1\nbad,\nfine,1\n")
    loaded = load_dataset("csv", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"Row 1 of train has label=None; so have 1 of 3 rows"):
        prepare_dataloaders(loaded, tiny_tokenizer())


def test_rows_without_text_are_named():
    dataset = rows(text=["good", None, None], label=[0, 1, 0])
    message = r"Row 1 of train has text=None; so have 2 of 3 rows\. Filter them out: dataset"
    with pytest.raises(DataError, match=message):
        prepare_dataloaders(dataset, tiny_tokenizer())
    dataset = dataset.filter(lambda row: row["text"] is not None)
    assert labels_of(prepare_dataloaders(dataset, tiny_tokenizer())["train"]) == [0]


def test_a_transform_is_refused_and_runs_as_preprocess():
    tokenizer = tiny_tokenizer()
    transform = lambda batch: {**tokenizer(batch["sentence"]), "labels": batch["label"]}  # noqa: E731
    dataset = {"dev": rows(10).with_transform(transform)}
    with pytest.raises(DataError, match=r"dev has a transform.*preprocess=transform\)"):
        prepare_dataloaders(dataset, tokenizer)
    dataset = {"dev": dataset["dev"].with_format(None)}
    loaders = prepare_dataloaders(dataset, tokenizer, preprocess=transform)
    assert_same_batches(loaders["dev"], course_loader(rows(10), tokenizer, ["sentence"]))


def test_rows_already_tokenized_are_padded_and_pruned(caplog):
    tokenizer = tiny_tokenizer()
    raw = table_of(["text"])
    dataset = raw.map(lambda batch: tokenizer(batch["text"]), batched=True)
    loaders = prepare_dataloaders(dataset, tokenizer)
    expected = course_loader(raw, tokenizer, ["text"], sampler=order(21, 42, 0))
    assert_same_batches(loaders["train"], expected)
    used = "input_ids, token_type_ids, attention_mask -> labels; left out: text, idx"
    assert said(caplog) == [f"train: using {used}"]


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_format_is_undone_and_its_choice_of_columns_kept(kind):
    tokenizer = tiny_tokenizer()
    dataset = rows(10).map(lambda batch: tokenizer(batch["sentence"]), batched=True)
    columns = ["input_ids", "attention_mask", "label"]
    formatted = dataset.with_format(kind, columns=columns)
    loaders = prepare_dataloaders(formatted, tokenizer)
    expected = prepare_dataloaders(dataset.select_columns(columns), tokenizer)
    assert_same_batches(loaders["train"], expected["train"])
    assert formatted.format["type"] == kind  # the user's own is as it was
    loader = prepare_dataloaders(dataset.to_iterable_dataset().with_format("torch"), tokenizer)
    assert labels_of(loader["train"]) == dataset["label"]


# The labels. ----------------------------------------------------------------------------------


def test_hidden_labels_are_left_out_and_said(caplog):
    hidden = rows(8).map(lambda row: {"label": -1})
    features = Features({**rows().features, "label": ClassLabel(names=["no", "yes"])})
    splits = {"train": rows(8).cast(features), "test": hidden.cast(features)}
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), model=tiny_bert())
    (batch,) = loaders["test"]
    assert "labels" not in batch
    assert said(caplog) == [
        "train: using sentence -> labels",
        "test: using sentence; every label is -1 (hidden), so it has none",
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


def test_multi_label_numbers_all_of_one_length_are_told_from_rows_of_0_and_1():
    dataset = {"dev": rows(text=["good", "bad"], labels=[[3], [1]])}
    (batch,) = prepare_dataloaders(dataset, tiny_tokenizer(), model=tiny_bert(4))["dev"]
    assert batch["labels"].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


def test_multi_label_as_wide_as_there_are_tokens_is_not_taken_for_labels_of_tokens():
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
    with pytest.raises(DataError, match=r"'labels' holds lists of class numbers.* model=model"):
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


# What the model takes. ------------------------------------------------------------------------


def test_distilbert_takes_no_token_type_ids(caplog):
    config = DistilBertConfig(vocab_size=VOCAB_SIZE, dim=8, hidden_dim=8, n_layers=1, n_heads=1)
    model = DistilBertForSequenceClassification(config)
    loaders = prepare_dataloaders(table_of(["text"]), tiny_tokenizer(), model=model)
    batch = next(iter(loaders["train"]))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert said(caplog) == [
        "train: using text -> labels; left out: idx, token_type_ids "
        "(not in DistilBertForSequenceClassification.forward)"
    ]


def test_a_column_that_only_the_model_knows_stays():
    dataset = rows(input_ids=[[4, 5]], labels=[1], position_ids=[[1, 0]], weight=[0.5])
    (batch,) = prepare_dataloaders(dataset, tiny_tokenizer(), model=tiny_bert())["train"]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "position_ids"]


def test_a_model_that_takes_none_of_the_columns_is_named():
    dataset = rows(tokens=[[4, 5]], labels=[1])
    with pytest.raises(DataError, match=r"train has nothing for the model to read, only labels"):
        prepare_dataloaders(dataset, None, model=tiny_bert(), preprocess=lambda batch: {})


def longest(loader: Any) -> int:
    return max(batch["input_ids"].shape[1] for batch in loader)


def test_max_length_is_what_model_and_tokenizer_have_room_for():
    dataset = rows(text=["good " * 100, "bad"], label=[1, 0])
    model = tiny_bert(max_position_embeddings=16)
    small = tiny_tokenizer(model_max_length=12)
    assert longest(prepare_dataloaders(dataset, tiny_tokenizer())["train"]) == 64
    assert longest(prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["train"]) == 16
    assert longest(prepare_dataloaders(dataset, small, model=model)["train"]) == 12
    cut = prepare_dataloaders(dataset, tiny_tokenizer(), model=model, max_length=7)
    assert longest(cut["train"]) == 7
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=20,  # of which RoBERTa does not use the first two
    )
    model = RobertaForSequenceClassification(config)
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["train"]
    assert longest(loader) == 18
    train_loop(model, loader, num_epochs=1, progress_bar=False)


def test_padding_to_a_multiple():
    dataset = table_of(["text"])
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), pad_to_multiple_of=8)["train"]
    expected = course_loader(
        dataset, tiny_tokenizer(), ["text"], sampler=order(21, 42, 0), pad_to_multiple_of=8
    )
    assert_same_batches(loader, expected)
    assert {batch["input_ids"].shape[1] % 8 for batch in loader} == {0}


# Batches. -------------------------------------------------------------------------------------


def sizes(loader: Any) -> list[int]:
    return [len(batch["labels"]) for batch in loader]


def test_sizes_of_batches():
    splits = {"train": rows(10), "validation": rows(10)}
    loaders = prepare_dataloaders(
        splits, tiny_tokenizer(), batch_size=4, eval_batch_size=6, drop_last=True
    )
    assert sizes(loaders["train"]) == [4, 4]
    assert sizes(loaders["validation"]) == [6, 4]  # evaluation drops nothing
    assert [len(loader) for loader in loaders.values()] == [2, 2]
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), batch_size=4)
    assert sizes(loaders["train"]) == sizes(loaders["validation"]) == [4, 4, 2]
    with pytest.raises(
        DataError,
        match=r"train has 10 rows: with batch_size=16 and drop_last it has 0 batches\. Use drop",
    ):
        prepare_dataloaders(splits, tiny_tokenizer(), batch_size=16, drop_last=True)


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


def test_preprocess_replaces_tokenization():
    tokenizer = tiny_tokenizer()
    dataset = table_of(["text", "reply", "name"])
    loaders = prepare_dataloaders(
        dataset,
        tokenizer,
        preprocess=lambda batch: tokenizer(batch["reply"], batch["name"], truncation=True),
    )
    expected = course_loader(dataset, tokenizer, ["reply", "name"], sampler=order(21, 42, 0))
    assert_same_batches(loaders["train"], expected)


def test_preprocess_sees_the_rows_as_they_are_and_may_make_the_labels():
    tokenizer = tiny_tokenizer()
    numbers = {"no": 0, "yes": 1}

    def preprocess(batch: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        labels = [numbers[answer] for answer in batch["label"]]
        return {**tokenizer(batch["text"]), "labels": labels}

    dataset = {"dev": rows(text=["good", "bad", "fine"], label=["yes", "no", "yes"])}
    (batch,) = prepare_dataloaders(dataset, tokenizer, preprocess=preprocess)["dev"]
    assert batch["labels"].tolist() == [1, 0, 1]


def test_preprocess_aligns_the_labels_of_words_to_tokens():
    """The course, chapter 7: rows of words with a class each."""
    tokenizer = tiny_tokenizer()
    features = Features(
        {
            "tokens": datasets.Sequence(Value("string")),
            "ner_tags": datasets.Sequence(ClassLabel(names=["O", "PER"])),
        }
    )
    words = {"tokens": [["good", "movie"], ["bad"]], "ner_tags": [[0, 1], [1]]}

    def preprocess(batch: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        encoded = tokenizer(batch["tokens"], is_split_into_words=True)
        labels = [[-100, *tags, -100] for tags in batch["ner_tags"]]
        return {**encoded, "labels": labels}

    model = tiny_bert(kind=BertForTokenClassification)
    dataset = {"dev": Dataset.from_dict(words, features=features)}
    loaders = prepare_dataloaders(dataset, tokenizer, model=model, preprocess=preprocess)
    (batch,) = loaders["dev"]
    assert batch["labels"].tolist() == [[-100, 0, 1, -100], [-100, 1, -100, -100]]


def test_preprocess_may_change_the_number_of_rows():
    dataset = rows(text=["good bad movie", "fine plot"])

    def preprocess(batch: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        ids = [[WORDS.index(w) + 4] for text in batch["text"] for w in text.split()]
        return {"input_ids": ids, "labels": ids}

    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), preprocess=preprocess)
    assert sizes(loaders["train"]) == [5]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_give_the_same_batches(streaming):
    dataset = table_of(["text"])
    source = dataset.to_iterable_dataset(num_shards=1) if streaming else dataset
    alone = prepare_dataloaders(source, tiny_tokenizer(), batch_size=4)
    workers = prepare_dataloaders(
        source, tiny_tokenizer(), batch_size=4, num_workers=1 if streaming else 2
    )
    for epoch in (0, 1):
        for loaders in (alone, workers):
            set_epoch(loaders["train"], epoch)
        assert_same_batches(workers["train"], alone["train"])


# The order. -----------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32)
EPOCHS = st.integers(0, 50)


@given(num_rows=st.integers(0, 300), seed=SEEDS, epoch=EPOCHS)
def test_an_order_is_a_permutation_and_a_function_of_its_arguments(num_rows, seed, epoch):
    rows = order(num_rows, seed, epoch)
    assert sorted(rows) == list(range(num_rows))
    assert rows == order(num_rows, seed, epoch)
    assert all(type(row) is int for row in rows)


@given(num_rows=st.integers(1, 300), seed=SEEDS, epoch=EPOCHS)
def test_an_order_is_that_of_accelerates_seedable_sampler(num_rows, seed, epoch):
    sampler = SeedableRandomSampler(range(num_rows), data_seed=seed)
    sampler.set_epoch(epoch)
    assert order(num_rows, seed, epoch) == list(sampler)


def test_epochs_and_seeds_differ():
    orders = [order(100, seed, epoch) for seed in (0, 1000) for epoch in range(5)]
    assert len({tuple(rows) for rows in orders}) == 10


@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_a_sampler_is_a_view_of_the_order(num_rows, batch_size, drop_last, shuffle, data):
    sampler = OrderedBatchSampler(
        num_rows, batch_size, shuffle=shuffle, seed=3, drop_last=drop_last
    )
    sampler.set_epoch(2)
    expected = order(num_rows, 3, 2) if shuffle else list(range(num_rows))
    if drop_last:
        expected = expected[: num_rows // batch_size * batch_size]
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert [row for batch in batches for row in batch] == expected == sampler.rows()
    assert all(len(batch) == batch_size for batch in batches[:-1])
    skipped = data.draw(st.integers(0, len(batches)))
    sampler.start_at(skipped * batch_size)
    assert list(sampler) == batches[skipped:]
    assert list(sampler) == batches  # only the next pass began later


def test_the_seed_is_of_the_order_and_nothing_else():
    dataset = {"train": rows(30), "dev": rows(30)}
    loaders = {
        seed: prepare_dataloaders(dataset, tiny_tokenizer(), seed=seed, batch_size=30)
        for seed in (42, 7)
    }
    for seed, pair in loaders.items():
        assert labels_of(pair["train"]) == [rows(30)["label"][row] for row in order(30, seed, 0)]
    assert_same_batches(loaders[42]["dev"], loaders[7]["dev"])


def test_passes_without_set_epoch_repeat_and_training_changes_the_epoch():
    loader = prepare_dataloaders(rows(12), tiny_tokenizer(), batch_size=4)["train"]
    assert_same_batches(loader, list(loader))
    seen = []
    model = tiny_bert()
    loss_fn = lambda model, batch: seen.append(batch["input_ids"]) or model(**batch).loss  # noqa: E731
    train_loop(model, loader, num_epochs=2, loss_fn=loss_fn, progress_bar=False)
    for epoch in (0, 1):
        set_epoch(loader, epoch)
        for batch, ids in zip(loader, seen[3 * epoch : 3 * epoch + 3], strict=True):
            assert torch.equal(batch["input_ids"], ids)


def random_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_drawn_from_the_global_generators(num_workers):
    dataset, tokenizer = rows(20), tiny_tokenizer()
    random.random(), np.random.rand(), torch.rand(1)
    states = random_states()
    splits = {"train": dataset, "validation": dataset}
    loaders = prepare_dataloaders(splits, tokenizer, model=tiny_bert(), num_workers=num_workers)
    assert random_states() == states
    for loader in loaders.values():
        for epoch in range(2):
            set_epoch(loader, epoch)
            assert len(labels_of(loader)) == 20
            assert random_states() == states
        inspect_batch(loader, tokenizer)
        assert random_states() == states


def test_nothing_is_drawn_from_the_global_generators_by_a_stream():
    states = random_states()
    loaders = prepare_dataloaders(rows(20).to_iterable_dataset(), tiny_tokenizer())
    assert len(labels_of(loaders["train"])) == 20
    assert random_states() == states


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_does_not_depend_on_the_global_generators(num_workers):
    torch.manual_seed(1)
    loaders = prepare_dataloaders(rows(20), tiny_tokenizer(), num_workers=num_workers)
    first = list(loaders["train"])
    torch.manual_seed(2)
    assert_same_batches(loaders["train"], first)


def with_noise(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"noise": torch.rand(len(batch))}


def test_what_workers_draw_is_a_function_of_seed_and_epoch():
    dataset = rows(input_ids=[[4]] * 8, labels=[0] * 8)
    loader = prepare_dataloaders(dataset, collate_fn=with_noise, num_workers=1)["train"]
    noise = []
    for epoch in (0, 1, 0):
        set_epoch(loader, epoch)
        noise.append([batch["noise"].tolist() for batch in loader])
    assert noise[0] == noise[2] != noise[1]


@pytest.fixture
def loaded(monkeypatch) -> list[int]:
    """The rows that loaders read from a dataset, in order."""
    numbers: list[int] = []
    fetch = TablesDataset.__getitems__

    def record(self: Dataset, keys: list[int]) -> Any:
        numbers.extend(keys)
        return fetch(self, keys)

    monkeypatch.setattr(TablesDataset, "__getitems__", record)
    return numbers


def test_rows_before_the_start_are_never_loaded(loaded):
    loader = prepare_dataloaders(rows(20), tiny_tokenizer(), batch_size=4)["train"]
    loaded.clear()
    loader.batch_sampler.start_at(12)
    assert sum(sizes(loader)) == 8
    assert loaded == order(20, 42, 0)[12:]
    loaded.clear()
    assert sum(window.num_samples for window in windows(loader, 2, skip=8)) == 12
    assert loaded == order(20, 42, 0)[8:]


def test_going_on_inside_an_epoch_loads_only_what_is_left(loaded):
    loader = prepare_dataloaders(rows(20), tiny_tokenizer(), batch_size=4)["train"]
    model = tiny_bert()
    state = TrainState(model, prepare_optimizer(model))
    loaded.clear()
    for step in train_steps(state, loader, num_epochs=2):
        if step.index == 7:
            break
    assert loaded == order(20, 42, 0) + order(20, 42, 1)[:8]
    loaded.clear()
    for _ in train_steps(state, loader, num_epochs=2):
        pass
    assert loaded == order(20, 42, 1)[8:]


# Looking at a batch. --------------------------------------------------------------------------


def test_inspect_batch_describes_the_first_batch():
    dataset = {"dev": rows(text=["good movie", "bad <b>plot</b> was very dull"], label=[1, 0])}
    tokenizer = tiny_tokenizer()
    report = inspect_batch(prepare_dataloaders(dataset, tokenizer)["dev"], tokenizer)
    assert list(report.columns) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    assert report.columns["labels"] == ((2,), "int64")
    num_tokens = report.columns["input_ids"][0][1]
    assert report.num_rows == 2
    assert report.padding == pytest.approx((num_tokens - 4) / (2 * num_tokens))
    assert report.rows[0] == {"input_ids": "[CLS] good movie [SEP]", "labels": 1}
    assert str(report) == repr(report)
    assert "padding" in str(report)
    assert f"(2, {num_tokens}) int64" in str(report)
    assert "[CLS] good movie [SEP]  ->  1" in str(report)
    assert report._repr_html_().startswith("<table>")


def test_inspect_batch_escapes_html_and_shows_numbers_without_a_tokenizer():
    batch = {"input_ids": torch.tensor([[4, 5], [6, 0]]), "a<b": torch.ones(2)}
    report = inspect_batch([batch])
    assert report.padding is None
    assert report.rows == [{"input_ids": [4, 5]}, {"input_ids": [6, 0]}]
    assert "a&lt;b" in report._repr_html_()
    assert "a<b" not in report._repr_html_()


def test_inspect_batch_shows_what_is_no_tensor():
    report = inspect_batch([{"text": ["good", "bad"], "labels": torch.tensor([1, 0]), "n": 3}])
    assert report.columns == {
        "labels": ((2,), "int64"),
        "n": ((), "int, no tensor"),
        "text": ((2,), "list of str, no tensor"),
    }
    assert "text    (2,) list of str, no tensor" in str(report)
    assert report.rows == [{"labels": 1}, {"labels": 0}]


@pytest.mark.parametrize(("loader", "got"), [([], "no batch"), ([[1, 2]], "a list")])
def test_inspect_batch_says_what_it_got_instead(loader, got):
    with pytest.raises(DataError, match=f"The loader gave {got}, not a dict of tensors"):
        inspect_batch(loader)


def test_inspect_batch_changes_nothing_that_comes_after():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, row: int) -> dict[str, Any]:
            noise = random.random() + np.random.rand() + torch.rand(()).item()
            return {"labels": row, "noise": noise}

    def passes(look: bool, **options: Any) -> list[Any]:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True, **options)
        if look:
            inspect_batch(loader)
        return [(batch["labels"].tolist(), batch["noise"].tolist()) for batch in loader]

    assert passes(look=True) == passes(look=False)
    with_generator = [
        passes(look, generator=torch.Generator().manual_seed(1)) for look in (True, False)
    ]
    assert with_generator[0] == with_generator[1]


# Words for rows that do not fit together. -----------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"x": 1}, {"x": None}], "Row 1 of the 2 rows checked has x=None; so have 1 of them."),
        ([{"text": "good"}], "Column 'text' is still text."),
        ([{"input_ids": [4], "id": "a"}], "Column 'id' is text, e.g. 'a' (row 0), beside"),
        ([{"label": "pos"}], "'label' holds strings, e.g. 'pos' (row 0)."),
        ([{"x": [1]}, {"x": [1, 2, 3]}], "Rows have lengths 1..3 in 'x', and nothing pads them."),
        (
            [
                {"x": torch.ones(1), "y": torch.tensor(0)},
                {"x": torch.ones(2), "y": torch.tensor(1)},
            ],
            "Rows have lengths 1..2 in 'x'",
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


def test_messages_go_where_the_program_sends_them(caplog):
    with caplog.at_level(logging.WARNING, logger="manualloop"):
        prepare_dataloaders(rows(), tiny_tokenizer())
    assert said(caplog) == []


def test_rows_of_json_lines_with_nested_labels(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"text": text, "labels": numbers} for text, numbers in zip(TEXTS, MULTI_HOT, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    loaded = load_dataset("json", data_files={"dev": str(path)}, cache_dir=str(tmp_path / "cache"))
    (batch,) = prepare_dataloaders(loaded, tiny_tokenizer())["dev"]
    assert batch["labels"].tolist() == MULTI_HOT
