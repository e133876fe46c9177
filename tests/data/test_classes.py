"""A number means the same class in all splits and in the model, or the data are refused."""

from __future__ import annotations

import random
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from helpers import (
    fixes_in,
    labels_of,
    messages,
    rows,
    run_fix,
    tiny_bert,
    tiny_tokenizer,
)
from transformers import BertForTokenClassification, T5Config, T5ForConditionalGeneration

from manualloop import ConfigError, DataError, evaluate_loop, prepare_dataloaders, train_loop
from manualloop.arguments import all_at_once
from manualloop.data.classes import number_classes
from manualloop.data.splits import open_splits
from manualloop.tasks.names import class_names

OWN = {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}}


def split(feature: Any, labels: list[Any]) -> Dataset:
    """Rows with a text and a label each."""
    if not isinstance(feature, list):
        features = Features({"text": Value("string"), "label": feature})
        table = Dataset.from_dict({"text": ["good"] * len(labels), "label": labels})
        return table.cast(features)
    return split(ClassLabel(names=feature), labels)


def strings(*labels: Any) -> Dataset:
    return split(Value("string"), list(labels))


def prepared(datasets: Any, model: Any = None, **arguments: Any) -> Any:
    return prepare_dataloaders(datasets, tiny_tokenizer(), model=model, **arguments)


def refused(datasets: Any, model: Any = None, **arguments: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as error:
        prepared(datasets, model, **arguments)
    return str(error.value)


def stream(dataset: Dataset) -> Any:
    return dataset.to_iterable_dataset()


# Each: the splits, the model's config, its names afterwards, and the numbers in each split.
NUMBERED: dict[str, tuple[Any, dict[str, Any], list[str], dict[str, list[Any]]]] = {
    "strings that validation lacks": (
        {"train": strings("c", "a", "b"), "validation": strings("c", "a")},
        {"num_labels": 3},
        ["a", "b", "c"],
        {"train": [0, 1, 2], "validation": [2, 0]},
    ),
    "orders": (
        {
            "train": split(["neg", "pos"], [0, 1]),
            "dev": split(["pos", "neg"], [0, 1, -100]),
            "test": split(["pos", "neg", "unused"], [1, 1]),
        },
        {},
        ["neg", "pos"],
        {"train": [0, 1], "dev": [1, 0, -100], "test": [0, 0]},
    ),
    "strings in train, names in validation": (
        {"train": strings("b", "a"), "dev": split(["b", "a"], [0, 1])},
        {},
        ["a", "b"],
        {"train": [0, 1], "dev": [1, 0]},
    ),
    "names in train, strings in validation": (
        {"train": split(["b", "a"], [0, 1]), "dev": strings("a", "b")},
        {},
        ["b", "a"],
        {"train": [0, 1], "dev": [1, 0]},
    ),
    "the model's order": (
        {"train": split(["neg", "pos"], [0, 1, 1]), "test": strings("neg", "pos")},
        OWN,
        ["pos", "neg"],
        {"train": [0, 0, 1], "test": [1, 0]},
    ),
    "some of the model's classes": (
        {"test": split(["neg", "pos"], [0, 1])},
        {
            "id2label": {0: "neg", 1: "mixed", 2: "pos"},
            "label2id": {"neg": 0, "mixed": 1, "pos": 2},
            "num_labels": 3,
        },
        ["neg", "mixed", "pos"],
        {"test": [0, 2]},
    ),
    "a class without rows that the model lacks": (
        {"train": split(["neg", "mixed", "pos"], [0, 2, 2])},
        OWN,
        ["pos", "neg"],
        {"train": [0, 0, 1]},
    ),
    "a class that train lacks and the model has": (
        {"train": strings("pos", "pos"), "dev": strings("pos", "neg")},
        OWN,
        ["pos", "neg"],
        {"train": [0, 0], "dev": [0, 1]},
    ),
    "numbers without names under a model with names": (
        {"train": split(Value("int64"), [0, 1]), "dev": split(Value("bool"), [True, False])},
        OWN,
        ["pos", "neg"],
        {"train": [0, 1], "dev": [1, 0]},
    ),
    "names that are numbers": (
        {"test": split(["0", "1"], [0, 1])},
        OWN,
        ["pos", "neg"],
        {"test": [0, 1]},
    ),
    "the same order in another case": (
        {"test": split(["POS", " Neg"], [0, 1])},
        OWN,
        ["pos", "neg"],
        {"test": [0, 1]},
    ),
    "numerals": (
        {"train": strings("10", "2", "1")},
        {"num_labels": 3},
        ["1", "2", "10"],
        {"train": [0, 1, 2]},
    ),
    "more outputs than classes": (
        {"train": strings("b", "a")},
        {"num_labels": 3},
        ["a", "b", "LABEL_2"],
        {"train": [0, 1]},
    ),
    "streams with names": (
        {
            "train": stream(split(["neg", "pos"], [0, 1])),
            "dev": stream(split(["pos", "neg"], [0, 1])),
        },
        {},
        ["neg", "pos"],
        {"train": [0, 1], "dev": [1, 0]},
    ),
    "strings in streams, under a model with names": (
        {"train": stream(strings("neg", "pos")), "dev": stream(strings("pos"))},
        OWN,
        ["pos", "neg"],
        {"train": [1, 0], "dev": [0]},
    ),
    "strings in a stream beside train": (
        {"train": strings("neg", "pos"), "dev": stream(strings("pos", "neg"))},
        {},
        ["neg", "pos"],
        {"train": [0, 1], "dev": [1, 0]},
    ),
    "several classes a row": (
        {
            "train": split(Sequence(Value("string")), [["b"], [], ["c", "a"]]),
            "dev": split(Sequence(ClassLabel(names=["c", "b", "a"])), [[0], [2, 1]]),
        },
        {"num_labels": 3},
        ["a", "b", "c"],
        {"train": [[0, 1, 0], [0, 0, 0], [1, 0, 1]], "dev": [[0, 0, 1], [1, 1, 0]]},
    ),
    "several classes a row in the model's order": (
        {"test": stream(split(Sequence(ClassLabel(names=["neg", "pos"])), [[0], [0, 1], []]))},
        OWN,
        ["pos", "neg"],
        {"test": [[0, 1], [1, 1], [0, 0]]},
    ),
    "pandas": (
        {
            "train": Dataset.from_pandas(
                pd.DataFrame({"text": ["good", "bad"], "label": pd.Categorical(["x", "y"])})
            ),
            "dev": Dataset.from_pandas(
                pd.DataFrame({"text": ["good", "bad"], "label": ["y", "x"]}, index=[5, 6])
            ),
        },
        {},
        ["x", "y"],
        {"train": [0, 1], "dev": [1, 0]},
    ),
}


@pytest.mark.parametrize(
    ("name", "with_model"),
    [(name, True) for name in NUMBERED]
    + [(name, False) for name, case in NUMBERED.items() if "id2label" not in case[1]],
)
def test_a_number_means_the_same_class_everywhere(name, with_model):
    splits, config, names, expected = NUMBERED[name]
    model = tiny_bert(**config) if with_model else None
    loaders = prepared(splits, model)
    for key, numbers in expected.items():
        found = labels_of(loaders[key])
        assert sorted(map(str, found)) == sorted(map(str, type_like(found, numbers)))
        if key != "train" and not isinstance(numbers[0], list):
            assert found == numbers
    if with_model:
        assert [model.config.id2label[n] for n in range(model.config.num_labels)] == names
        assert model.config.label2id == {name: number for number, name in enumerate(names)}
        assert {class_names(model, loader) for loader in loaders.values()} == {tuple(names)}
        for loader in loaders.values():
            assert torch.isfinite(torch.tensor(evaluate_loop(model, loader)["loss"]))
    else:
        plain = torch.nn.Linear(2, 2)
        kept = tuple(name for name in names if not name.startswith("LABEL"))
        assert {class_names(plain, loader) for loader in loaders.values()} == {kept}


def type_like(found: list[Any], wanted: list[Any]) -> list[Any]:
    return torch.tensor(wanted).float().tolist() if isinstance(found[0], list) else wanted


# Each: the splits, the model's config, parts of the message, and the numbers after its first line.
REFUSED: dict[str, tuple[Any, dict[str, Any], list[str], dict[str, list[Any]] | None]] = {
    "a string that train lacks": (
        {"train": strings("a", "b"), "dev": strings("a", "c", "b")},
        {},
        ["Row 1 of dev has label='c', a class that train does not have: 0 = a, 1 = b."],
        {"dev": [0, 1]},
    ),
    "a name that train lacks": (
        {"train": split(["a", "b"], [0, 1]), "dev": split(["c", "b"], [1, 0, 1])},
        {},
        ["Row 1 of dev has label='c', a class that train does not have"],
        {"dev": [1, 1]},
    ),
    "a third name, without a model": (
        {"train": split(["a", "b"], [0, 1]), "dev": split(["a", "b", "c"], [1, 2, 0])},
        {"num_labels": 3},
        ["Row 1 of dev has label='c'"],
        {"dev": [1, 0]},
    ),
    "a string in a list that train lacks": (
        {
            "train": split(Sequence(Value("string")), [["a"], ["b"]]),
            "dev": split(Sequence(Value("string")), [["a"], ["b", "c"]]),
        },
        {},
        ["Row 1 of dev has label='c'"],
        {"dev": [[1, 0]]},
    ),
    "other names than the model's": (
        {"test": split(["good", "bad"], [0, 1])},
        OWN,
        ["Row 0 of test has label='good'", "0 = pos, 1 = neg (config.id2label)", "model.config.up"],
        {"test": [0, 1]},
    ),
    "other lists of names than the model's": (
        {"test": split(Sequence(ClassLabel(names=["good", "bad"])), [[0], [1]])},
        OWN,
        ["Row 0 of test has label='good'"],
        {"test": [[1, 0], [0, 1]]},
    ),
    "another case and another order": (
        {"test": split(["Neg", "Pos"], [0, 1])},
        OWN,
        ["Names differ in case or spaces. Name them as the model does"],
        {"test": [1, 0]},
    ),
    "strings in another case": (
        {"train": strings("NEG", "pos "), "dev": split(["pos", "neg"], [0, 1])},
        OWN,
        ["Row 0 of train has label='NEG'"],
        {"train": [0, 1], "dev": [0, 1]},
    ),
    "lists of strings in another case": (
        {"dev": split(Sequence(Value("string")), [["NEG"], ["POS", "NEG"]])},
        OWN,
        ["Row 0 of dev has label='NEG'"],
        {"dev": [[0, 1], [1, 1]]},
    ),
    "a stream of other names": (
        {"dev": stream(split(["bad", "good"], [0, 1]))},
        OWN,
        ["'label' of dev has 'bad', a class that BertForSequenceClassification does not have"],
        {"dev": [0, 1]},
    ),
    "more strings than outputs": (
        {"train": strings("a", "b", "c")},
        {},
        ["'label' of train has 3 classes: 0 = a, 1 = b, 2 = c. The model has num_labels=2."],
        None,
    ),
    "more names than the model's": (
        {"train": split(["neg", "mixed", "pos"], [0, 1, 2])},
        OWN,
        ["Row 1 of train has label='mixed'", "ignore_mismatched_sizes=True"],
        None,
    ),
    "strings beside numbers": (
        {"train": strings("a", "b"), "dev": split(Value("int64"), [0, 1])},
        {},
        ["'label' of train holds strings", "Give it the same labels as dev: numbers."],
        None,
    ),
    "free text": (
        {"train": strings(*(f"answer {n}" for n in range(30)))},
        {},
        ["'label' of train has 30 classes"],
        None,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_do_not_fit_are_refused_with_the_line_that_fixes_them(name):
    splits, config, parts, expected = REFUSED[name]
    model = tiny_bert(**config)
    before = dict(model.config.id2label)
    message = refused(splits, model)
    assert len(message.split("\n")) == 1
    for part in parts:
        assert part in message
    assert model.config.id2label == before
    if expected is not None:
        fixed = run_fix(fixes_in(message)[0], dict(splits))
        loaders = prepared(fixed, model)
        for key, numbers in expected.items():
            found = labels_of(loaders[key])
            assert sorted(map(str, found)) == sorted(map(str, type_like(found, numbers)))


def test_the_line_that_renames_the_models_classes_runs():
    model, splits = tiny_bert(**OWN), {"test": split(["good", "bad"], [0, 1])}
    line = refused(splits, model).rpartition(": ")[2]
    message = refused(splits, model)
    line = message[message.index("model.config.update(") :].removesuffix(".")
    exec(line, {"model": model})
    assert labels_of(prepared(splits, model)["test"]) == [0, 1]
    assert model.config.label2id == {"good": 0, "bad": 1}


@pytest.mark.parametrize("labels", [["b", "c"], [0, 2]])
def test_a_stream_is_refused_where_the_unknown_class_is_read(labels):
    feature = Value("string") if labels[0] == "b" else ClassLabel(names=["b", "a", "c"])
    splits = {"train": split(["a", "b"], [0, 1]), "dev": stream(split(feature, labels))}
    loaders = prepared(splits, batch_size=1)
    with pytest.raises(DataError, match=r"A row of dev has label=.*The classes are 0 = a, 1 = b"):
        list(loaders["dev"])


def test_strings_that_are_no_classes_stay_strings():
    texts = strings(*(f"answer {n}" for n in range(30)))
    assert "holds strings" in refused({"train": texts})
    model = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1))
    assert "holds strings" in refused({"train": strings("a", "b")}, model)
    assert "holds strings" in refused({"train": strings("a", "b")}, tiny_bert(1))
    assert "holds strings" in refused({"train": strings("a", "b")}, task="regression")
    collate = lambda rows: {"labels": torch.tensor([len(row["labels"]) for row in rows])}  # noqa: E731
    loader = prepared({"dev": strings("a", "bc")}, tiny_bert(), collate_fn=collate)["dev"]
    assert labels_of(loader) == [1, 2]


def test_tags_of_tokens():
    tags = [["O", "B", "I"], ["O", "O"]]
    splits = {
        "train": rows(input_ids=[[4, 5, 6], [7, 8]], labels=tags),
        "dev": Dataset.from_dict(
            {"input_ids": [[4, 5], [6]], "labels": [[2, -100], [0]]},
            Features(
                {
                    "input_ids": Sequence(Value("int64")),
                    "labels": Sequence(ClassLabel(names=["B", "I", "O"][::-1])),
                }
            ),
        ),
    }
    model = tiny_bert(3, kind=BertForTokenClassification)
    loaders = prepared(splits, model)
    (batch,) = loaders["dev"]
    assert batch["labels"].tolist() == [[0, -100], [2, -100]]
    assert model.config.id2label == {0: "B", 1: "I", 2: "O"}
    assert class_names(model, loaders["train"]) == ("B", "I", "O")
    (batch,) = prepared(splits)["dev"]
    assert batch["labels"].dtype == torch.int64


def test_hidden_labels_have_no_say():
    splits = {
        "train": strings("a", "b"),
        "test": strings("", ""),
        "other": split(["x", "y"], [-1, -1]),
    }
    model = tiny_bert()
    loaders = prepared(splits, model)
    assert model.config.id2label == {0: "a", 1: "b"}
    assert "labels" not in next(iter(loaders["test"]))
    assert "labels" not in next(iter(loaders["other"]))


def test_missing_and_unknown_strings_come_in_one_message():
    splits = {"train": strings("a", None, "b"), "dev": strings("a", "c"), "test": strings("a", "")}
    message = refused(splits, tiny_bert())
    assert "Row 1 of train has label=None" in message
    assert "Row 1 of dev has label='c'" in message
    assert "Row 1 of test has label=''" in message
    assert len(message.split("\n")) == 3


def test_one_line_tells_what_was_done(caplog):
    splits = {"train": split(["neg", "pos"], [0, 1]), "dev": split(["pos", "neg"], [0, 1])}
    model = tiny_bert()
    prepared(splits, model)
    found = [line for line in messages(caplog) if "classes" in line]
    assert found == [
        "classes are 0 = neg, 1 = pos: numbered so in dev; named so in the config of "
        "BertForSequenceClassification"
    ]
    caplog.clear()
    prepared({"train": splits["train"]}, model)
    assert not [line for line in messages(caplog) if "classes" in line]


def test_nothing_of_the_config_changes_if_a_later_check_fails():
    model, good = tiny_bert(), split(["a", "b"], [0, 1])
    message = refused({"train": good, "dev": good.remove_columns("text")}, model)
    assert "dev has no column 'text'" in message
    refused({"train": good}, model, batch_size=5, drop_last=True)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert model.config.label2id == {"LABEL_0": 0, "LABEL_1": 1}


def test_a_second_call_on_other_data_names_a_model_anew_until_it_is_trained():
    model = tiny_bert()
    first = prepared(split(["a", "b"], [0, 1]), model)["train"]
    second = prepared(split(["c", "d"], [0, 1]), model)["train"]
    assert model.config.id2label == {0: "c", 1: "d"}
    assert class_names(model, second) == ("c", "d")
    with pytest.raises(DataError, match=r"numbers its classes 0 = a, 1 = b.*has 0 = c, 1 = d"):
        train_loop(model, first, num_epochs=1, progress_bar=False)
    assert "a class that" in refused({"test": split(["a", "b"], [0, 1])}, model)
    train_loop(model, second, num_epochs=1, progress_bar=False)
    assert "a class that" in refused(split(["a", "b"], [0, 1]), model)
    again = prepared(split(["d", "c"], [0, 1]), model)["train"]  # the model's numbers count
    assert sorted(labels_of(again)) == [0, 1]
    assert model.config.id2label == {0: "c", 1: "d"}


def test_loaders_that_were_prepared_for_no_model_are_compared_with_the_one_at_hand():
    loader = prepared({"test": split(["neg", "pos"], [0, 1])})["test"]
    assert class_names(tiny_bert(), loader) == ("neg", "pos")
    with pytest.raises(DataError, match=r"prepare_dataloaders\(datasets, tokenizer, model=model"):
        class_names(tiny_bert(**OWN), loader)


def test_columns_of_0_and_1_are_the_classes_in_the_models_order():
    table = rows(text=["a", "b"], neg=[1, 0], pos=[1, 1])
    model = tiny_bert()
    (batch,) = prepared({"dev": table}, model, label_column=["neg", "pos"])["dev"]
    assert batch["labels"].tolist() == [[1, 1], [0, 1]]
    assert model.config.id2label == {0: "neg", 1: "pos"}
    (batch,) = prepared({"dev": table}, tiny_bert(**OWN), label_column=["neg", "pos"])["dev"]
    assert batch["labels"].tolist() == [[1, 1], [1, 0]]
    other = table.rename_column("neg", "bad")
    message = refused({"dev": other}, tiny_bert(**OWN), label_column=["bad", "pos"])
    assert "The columns of labels are bad, pos, but BertForSequenceClassification has" in message


@pytest.mark.parametrize("name", ["label", "labels"])
def test_labels_that_preprocess_makes_keep_the_names_and_their_numbers(name):
    """A function of the user's may have looked at the model's names, so nothing is numbered."""
    tokenizer = tiny_tokenizer()
    table = split(["neg", "pos"], [0, 1])
    table = table if name == "label" else table.rename_column("label", name)
    made = lambda batch: {**tokenizer(batch["text"]), "labels": [1 - x for x in batch[name]]}  # noqa: E731
    loader = prepared({"dev": table}, tiny_bert(**OWN), preprocess=made)["dev"]
    assert labels_of(loader) == [1, 0]
    only_tokens = lambda batch: tokenizer(batch["text"])  # noqa: E731
    loader = prepared({"dev": table}, tiny_bert(**OWN), preprocess=only_tokens)["dev"]
    assert labels_of(loader) == [1, 0]
    loader = prepared({"dev": table}, tiny_bert(**OWN))["dev"]
    assert labels_of(loader) == [1, 0]


def test_strings_that_preprocess_makes_are_numbered():
    tokenizer, model = tiny_tokenizer(), tiny_bert()
    made = lambda batch: {**tokenizer(batch["text"]), "labels": list(map(str, batch["stars"]))}  # noqa: E731
    table = rows(text=["a", "b"], stars=[5, 1])
    loader = prepared({"dev": table}, model, preprocess=made)["dev"]
    assert labels_of(loader) == [1, 0]
    assert model.config.id2label == {0: "1", 1: "5"}


def test_tags_that_preprocess_aligns_keep_their_names():
    tokenizer = tiny_tokenizer()
    features = Features(
        {
            "tokens": Sequence(Value("string")),
            "ner_tags": Sequence(ClassLabel(names=["O", "PER"])),
        }
    )
    words = {"tokens": [["good", "movie"], ["bad"]], "ner_tags": [[0, 1], [1]]}

    def align(batch: Any) -> Any:
        labels = [[-100, *tags, -100] for tags in batch["ner_tags"]]
        return {**tokenizer(batch["tokens"], is_split_into_words=True), "labels": labels}

    dataset = {"train": Dataset.from_dict(words, features)}
    model = tiny_bert(kind=BertForTokenClassification)
    loader = prepared(dataset, model, preprocess=align)["train"]
    assert model.config.id2label == {0: "O", 1: "PER"}
    assert class_names(model, loader) == ("O", "PER")
    three = tiny_bert(3, kind=BertForTokenClassification)
    prepared(dataset, three, preprocess=align)
    assert three.config.id2label[0] == "LABEL_0"  # more classes: not those of the column


@pytest.mark.parametrize("is_stream", [False, True])
def test_labels_that_preprocess_passes_on_are_those_of_the_dataset(is_stream, caplog):
    tokenizer = tiny_tokenizer()
    table = split(["neg", "pos"], [0, 1, 1])
    table = stream(table) if is_stream else table
    passed = lambda batch: {**tokenizer(batch["text"]), "labels": batch["label"]}  # noqa: E731
    loader = prepared({"dev": table}, tiny_bert(**OWN), preprocess=passed)["dev"]
    assert labels_of(loader) == [1, 0, 0]
    assert not [line for line in messages(caplog) if "preprocess=" in line]
    made = lambda batch: {**tokenizer(batch["text"]), "labels": [1 - x for x in batch["label"]]}  # noqa: E731
    model = tiny_bert(**OWN)
    loader = prepared({"dev": table}, model, preprocess=made)["dev"]
    assert labels_of(loader) == [1, 0, 0]
    assert "preprocess= made the labels of dev: they are taken for" in messages(caplog)[-2]
    orders = {"train": split(["neg", "pos"], [1]), "dev": split(["pos", "neg"], [1, 0])}
    model = tiny_bert()
    assert labels_of(prepared(orders, model, preprocess=passed)["dev"]) == [0, 1]
    assert model.config.id2label == {0: "neg", 1: "pos"}


@pytest.mark.parametrize("keep", [(), ("label",)])
def test_a_transform_gets_the_numbers_of_the_model(keep):
    tokenizer = tiny_tokenizer()
    look = lambda row, generator: {**tokenizer("good"), "labels": row["label"]}  # noqa: E731
    splits = {"train": split(["neg", "pos"], [1, 1]), "dev": split(["neg", "pos"], [0, 1])}
    loader = prepared(splits, tiny_bert(**OWN), transform=look, keep=keep)["dev"]
    (batch,) = loader
    assert batch["labels"].tolist() == [1, 0]
    assert batch.get("label", [0, 1]) == [0, 1]  # as the dataset has them


def test_any_splits_are_read_by_name():
    """Strings, names in any order, selections, classes without rows, models with names or none."""
    draw = random.Random(0)
    num_read = 0
    for _ in range(40):
        names = [f"class {number}" for number in range(draw.randint(2, 4))]
        own = draw.sample(names, len(names)) if draw.random() < 0.5 else None
        labels = {key: draw.choices(names, k=draw.randint(3, 8)) for key in ("train", "dev")}
        splits = {key: any_split(draw, names, labels[key]) for key in labels}
        model = None if own is None else tiny_bert(len(own), id2label=dict(enumerate(own)))
        with all_at_once() as check:
            opened = open_splits(splits, check)
            made, naming = number_classes(opened, "label", model, None, check)
            if not check.ok:
                has_unknown = set(labels["dev"]) > set(labels["train"]) or own is None
                assert has_unknown, check.errors
                check.errors.clear()
                continue
        num_read += 1
        assert own is None or naming.names == tuple(own)
        for key, expected in labels.items():
            found = made[key].rows["label"]
            assert [naming.names[number] for number in found] == expected
    assert num_read > 20


def any_split(draw: random.Random, names: list[str], labels: list[str]) -> Dataset:
    if draw.random() < 0.4:
        return strings(*labels)
    named = draw.sample([*names, "unused"], len(names) + 1)
    whole = split(named, [named.index(label) for label in [*labels, labels[0]]])
    return whole.select(range(len(labels)))


@pytest.mark.parametrize(
    ("one", "other"), [("pos", "pos "), ("Pos", "pos"), ("not spam", "not_spam"), ("1", "1.0")]
)
@pytest.mark.parametrize("is_list", [False, True])
def test_one_class_in_two_writings_is_refused_with_lines_for_one_and_for_two(one, other, is_list):
    labels = [one, "z", other, "z"]
    ready = rows(4).remove_columns("label")
    data = ready.add_column("label", [[name] for name in labels] if is_list else labels)
    splits = {"train": data, "dev": data}
    with pytest.raises(DataError, match="differ in case, spaces or form alone") as error:
        prepared(splits)
    numbers = []
    for line in fixes_in(error.value):
        made = prepared(run_fix(line, dict(splits)))["dev"]
        numbers.append([batch["labels"].tolist() for batch in made])
    (same,), (two,) = numbers
    assert same[0] == same[2] != same[1]
    assert two[0] != two[2]


@pytest.mark.parametrize("is_list", [False, True])
def test_letters_of_both_cases_are_classes_if_both_are_common(is_list, caplog):
    labels = ["a", "A", "b", "b"] * 3
    ready = rows(12).remove_columns("label")
    data = ready.add_column("label", [[name] for name in labels] if is_list else labels)
    loader = prepared({"train": data, "dev": data})["dev"]
    numbers = [number for batch in loader for number in batch["labels"].flatten().tolist()]
    names = class_names(tiny_bert(3), loader)
    assert names == ("A", "a", "b")
    if not is_list:
        assert [names[number] for number in numbers] == labels
    (line,) = {r.getMessage() for r in caplog.records if "differ in case alone" in r.getMessage()}
    assert "'label' of train has the classes 'A' and 'a', which" in line
    rare = [*labels[:-4], "b", "b", "b", "b"]
    typed = ready.add_column("label", ["a", "A", *["a"] * 10])
    with pytest.raises(DataError, match="differ in case, spaces or form alone"):
        prepared({"train": typed, "dev": typed})
    few = ready.add_column("label", rare)
    with pytest.raises(DataError, match="differ in case, spaces or form alone"):
        prepared({"train": few, "dev": few})


def test_letters_of_a_model_in_another_order_are_renumbered():
    data = rows(12).remove_columns("label").add_column("label", ["a", "A", "b"] * 4)
    model = tiny_bert(3, id2label={0: "a", 1: "A", 2: "b"})
    named = data.class_encode_column("label")
    for dataset in (data, named):
        loader = prepare_dataloaders({"dev": dataset}, tiny_tokenizer(), model=model)["dev"]
        assert next(iter(loader))["labels"].tolist()[:3] == [0, 1, 2]


@pytest.mark.parametrize(
    ("one", "other"), [("1.1", "1.10"), ("-", "_"), ("1e400", "inf"), ("nan", "NaNa")]
)
def test_codes_and_punctuation_are_classes_of_their_own(one, other):
    data = rows(4).remove_columns("label").add_column("label", [one, "z", other, "z"])
    (batch,) = prepared({"train": data, "dev": data})["dev"]
    assert len({*batch["labels"].tolist()}) == 3
