"""The columns that are found: texts, labels, and those a model does not take."""

from __future__ import annotations

import datasets
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    LargeList,
    Sequence,
    Value,
)
from helpers import (
    VOCAB_SIZE,
    assert_same_batches,
    course_loader,
    first_batch,
    labels_of,
    messages,
    rows,
    table_of,
    tiny_bert,
    tiny_tokenizer,
)
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from manualloop import ConfigError, DataError, prepare_dataloaders
from manualloop.data.columns import find_columns
from manualloop.data.sampler import order


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
            "Several columns of train hold strings: title, body. Name the text: "
            "text_columns='title', or for a pair text_columns=('title', 'body').",
        ),
        (
            {"text": "text", "title": "text"},
            {},
            DataError,
            "Several columns of train hold strings",
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
            "train has no column 'txet'. Its columns: text, label. Name some of these in ",
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
            "Column 'stars' of train holds values of kind 'int', not text.",
        ),
        (
            dict.fromkeys("abc", "text"),
            {"text_columns": ["a", "b", "c"]},
            ConfigError,
            '{"text": row["a"] + " " + row["b"] + " " + row["c"]}).',
        ),
    ],
)
def test_ambiguous_columns_are_asked_for(kinds, arguments, error, message):
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
    with pytest.raises(DataError, match=r"test has no column 'sentence'\. Its columns: text\."):
        prepare_dataloaders(splits, tiny_tokenizer())


@pytest.mark.parametrize(
    "given_rows",
    [{}, [{"text": "good", "label": 0}], {"train": [1, 2]}, {"train": "train.csv"}],
    ids=["no-split", "list-of-rows", "list-in-a-split", "file-name"],
)
def test_rows_that_are_no_dataset_are_refused(given_rows):
    with pytest.raises(DataError, match=r"datasets\.|load_dataset"):
        prepare_dataloaders(given_rows, tiny_tokenizer())


def test_one_dataset_is_the_training_split_and_any_mapping_is_accepted():
    dataset = rows(10)
    (name,) = (alone := prepare_dataloaders(dataset, tiny_tokenizer()))
    assert name == "train"
    mapped = prepare_dataloaders({"train_a": dataset, "dev": dataset}, tiny_tokenizer())
    assert list(mapped) == ["train_a", "dev"]
    assert_same_batches(mapped["train_a"], alone["train"])
    assert labels_of(mapped["dev"]) == dataset["label"]
    assert labels_of(mapped["train_a"]) == [dataset["label"][row] for row in order(10, 42, 0)]


def test_a_stream_that_does_not_know_its_features():
    def rows_one_by_one():
        yield from rows(5)

    stream = IterableDataset.from_generator(rows_one_by_one)
    assert stream.features is None
    loaders = prepare_dataloaders(stream, tiny_tokenizer(), batch_size=4, drop_last=True)
    (batch,) = loaders["train"]
    assert batch["labels"].tolist() == [0, 1, 0, 1]


def test_distilbert_takes_no_token_type_ids(caplog):
    config = DistilBertConfig(vocab_size=VOCAB_SIZE, dim=8, hidden_dim=8, n_layers=1, n_heads=1)
    model = DistilBertForSequenceClassification(config)
    loaders = prepare_dataloaders(table_of(["text"]), tiny_tokenizer(), model=model)
    batch = next(iter(loaders["train"]))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert messages(caplog) == [
        "train: using text -> labels; dropped: idx, token_type_ids "
        "(not in DistilBertForSequenceClassification.forward)"
    ]


def test_a_column_that_only_the_model_knows_stays():
    dataset = rows(input_ids=[[4, 5]], labels=[1], position_ids=[[1, 0]], weight=[0.5])
    (batch,) = prepare_dataloaders(dataset, tiny_tokenizer(), model=tiny_bert())["train"]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "position_ids"]


def test_a_model_that_takes_none_of_the_columns_is_named():
    dataset = rows(tokens=[[4, 5]], labels=[1])
    with pytest.raises(DataError, match=r"train has no column that the model takes, only labels"):
        prepare_dataloaders(dataset, None, model=tiny_bert(), preprocess=lambda batch: {})


def test_lists_of_strings_go_into_no_batch():
    dataset = rows(input_ids=[[4, 5], [6, 7]], words=[["a", "b"], ["c", "d"]], labels=[1, 0])
    assert sorted(first_batch(dataset)) == ["input_ids", "labels"]


def test_lists_of_words_are_a_text_and_not_pairs_of_texts():
    dataset = rows(words=[["good", "bad"], ["good"]], labels=[1, 0])
    batch = first_batch(dataset, tiny_tokenizer(), text_columns="words")
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3], [2, 4, 3, 0]]
    assert batch["token_type_ids"].sum() == 0


@pytest.mark.parametrize("keys", [(datasets.Split.TRAIN, datasets.Split.TEST), (0, 1)])
def test_splits_keep_keys_that_are_no_strings(keys):
    loaders = prepare_dataloaders({key: rows() for key in keys}, tiny_tokenizer())
    assert tuple(loaders) == keys
    assert loaders[keys[0]].batch_sampler.shuffle is (keys[0] != 0)
    assert loaders[keys[1]].batch_sampler.shuffle is False


@pytest.mark.parametrize("is_preprocessed", [False, True])
def test_a_stream_of_unknown_columns_is_started_no_more_than_needed(is_preprocessed):
    starts = []

    def generate():
        starts.append(1)
        yield from rows(5)

    tokenizer = tiny_tokenizer()
    own = {"preprocess": lambda batch: tokenizer(batch["sentence"])} if is_preprocessed else {}
    prepare_dataloaders(IterableDataset.from_generator(generate), tokenizer, **own)
    assert len(starts) == 1 + is_preprocessed


@pytest.mark.parametrize("columns", [{"pixel_values": [[0.0, 1.0]] * 2}, {"x": [0.5, 1.0]}])
def test_rows_that_are_ready_need_no_text(columns):
    assert sorted(first_batch(rows(**columns, label=[0, 1]))) == sorted([*columns, "labels"])


@pytest.mark.parametrize("number_feature", [Sequence, LargeList, lambda item: [item]])
def test_every_feature_for_lists_is_understood(number_feature):
    features = Features({"input_ids": number_feature(Value("int32")), "labels": Value("int8")})
    dataset = Dataset.from_dict({"input_ids": [[4, 5], [6]], "labels": [1, 0]}, features=features)
    assert first_batch(dataset, tiny_tokenizer())["input_ids"].tolist() == [[4, 5], [6, 0]]
    features = Features(
        {"text": Value("string"), "tags": number_feature(ClassLabel(names=["a", "b"]))}
    )
    dataset = Dataset.from_dict({"text": ["a", "b"], "tags": [[1], [0, 1]]}, features=features)
    batch = first_batch(dataset, tiny_tokenizer(), label_column="tags")
    assert batch["labels"].tolist() == [[0, 1], [1, 1]]


def test_a_later_stream_without_rows_is_named():
    splits = {
        "train": rows().to_iterable_dataset(),
        "dev": IterableDataset.from_generator(lambda: iter(())),
    }
    with pytest.raises(DataError, match="dev has 0 rows"):
        prepare_dataloaders(splits, tiny_tokenizer())
