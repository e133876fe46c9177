"""Mistakes in any split are reported together, and every printed line fixes its case."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value
from helpers import (
    first_batch,
    fixes_in,
    labels_of,
    messages,
    rows,
    run_fix,
    tiny_bert,
    tiny_tokenizer,
    token_model,
)
from transformers import AutoTokenizer

from manualloop import (
    ConfigError,
    DataError,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.data.mapping import RequireHidden

TEXT = ["good", "bad movie", "the plot", "a", "fine", "very dull"]


def table(**columns: Any) -> Dataset:
    """Rows with a text each."""
    size = len(next(iter(columns.values())))
    return rows(**{"text": (TEXT * 3)[:size], **columns})


def typed(label: Any, values: list[Any]) -> Dataset:
    features = Features({"text": Value("string"), "label": label})
    return Dataset.from_dict(
        {"text": (TEXT * 3)[: len(values)], "label": values}, features=features
    )


CLASSES = ClassLabel(names=["no", "yes"])
UNSPECIAL = {"cls_token": None, "sep_token": None, "eos_token": "bad"}


def refused(datasets: Any, tokenizer: Any = None, **arguments: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as error:
        prepare_dataloaders(datasets, tokenizer or tiny_tokenizer(), **arguments)
    return str(error.value)


def trains(datasets: Any, model: Any, **arguments: Any) -> dict[str, Any]:
    """Prepare, train on the train split, and predict all others."""
    loaders = prepare_dataloaders(
        datasets, tiny_tokenizer(), model=model, batch_size=2, **arguments
    )
    if "train" in loaders:
        train_loop(model, loaders["train"], max_steps=2, progress_bar=False)
    for name, loader in loaders.items():
        if name != "train":
            predict_loop(model, loader)
    return loaders


# Each: the data, the number of the model's labels, parts of the message, and the labels that the
# splits have once the line of the message is run.
FIXED: dict[str, tuple[Any, int, list[str], dict[str, list[Any]]]] = {
    "labels -1 and 1": (
        table(label=[-1, 1, 1, -1]),
        2,
        ["Label -1 in row 0 of train"],
        {"train": [0, 1, 1, 0]},
    ),
    "labels -1 and 1 in both splits, hidden in test": (
        {
            "train": table(label=[-1, 1, 1]),
            "dev": table(label=[1, -1]),
            "test": table(label=[-1, -1]),
        },
        2,
        ["Label -1 in row 0 of train", "Label -1 in row 1 of dev"],
        {"train": [0, 1, 1], "dev": [1, 0]},
    ),
    "three classes from -1": (
        table(label=[-1, 0, 1, 0]),
        3,
        ["Label -1 in row 0 of train"],
        {"train": [0, 1, 2, 1]},
    ),
    "a label -1 of two classes": (
        table(label=[0, -1, 1]),
        2,
        ["Label -1 in row 1 of train", "Drop such rows"],
        {"train": [0, 1]},
    ),
    "a label -1 of named classes": (
        typed(CLASSES, [0, -1, 1]),
        3,
        ["Label -1 in row 1 of train", "Drop such rows"],
        {"train": [0, 1]},
    ),
    "a label -1 in validation stays a row": (
        {"train": typed(CLASSES, [0, 1, 1]), "validation": typed(CLASSES, [0, -1, 1])},
        2,
        ["Label -1 in row 1 of validation", "Keep such rows without a label"],
        {"train": [0, 1, 1], "validation": [0, -100, 1]},
    ),
    "classes with gaps": (
        {"train": table(label=[3, 7, 7]), "dev": table(label=[7, 3])},
        2,
        ["Label 3 in row 0 of train", "Label 7 in row 0 of dev", "The smallest label is 3"],
        {"train": [0, 1, 1], "dev": [1, 0]},
    ),
    "classes that are far apart": (
        table(label=[0, 9, 4, 4]),
        3,
        ["Label 9 in row 1 of train", "Numbers are left out"],
        {"train": [0, 2, 1, 1]},
    ),
    "classes from 1, the largest only in validation": (
        DatasetDict(train=table(label=[1, 2]), validation=table(label=[3, 1])),
        3,
        ["Label 3 in row 0 of validation"],
        {"train": [0, 1], "validation": [2, 0]},
    ),
    "strings in a stream and its validation": (
        {
            "train": table(label=["pos", "neg"]).to_iterable_dataset(),
            "dev": table(label=["neg", "neg"]).to_iterable_dataset(),
        },
        2,
        ["'label' of train, dev holds strings"],
        {"train": [1, 0], "dev": [0, 0]},
    ),
    "floats in validation": (
        {"train": table(label=[0, 1]), "validation": table(label=[1.0, 0.0])},
        2,
        ["The labels 'label' of validation are floats, e.g. 1.0 (row 0), those of train are whole"],
        {"train": [0, 1], "validation": [1, 0]},
    ),
    "labels of another name in validation": (
        {"train": table(label=[0, 1]), "validation": table(labels=[1, 1])},
        2,
        ["validation has no column 'label'", "'labels'"],
        {"train": [0, 1], "validation": [1, 1]},
    ),
    "a missing label": (
        {"train": table(label=[0, None, 1]), "dev": table(label=[1, 1])},
        2,
        ["Row 1 of train has label=None", "1 of 3"],
        {"train": [0, 1], "dev": [1, 1]},
    ),
    "a missing value among floats": (
        table(label=[0.5, float("nan"), None, 1.0]),
        1,
        ["Row 1 of train has label=nan", "2 of 4"],
        {"train": [0.5, 1.0]},
    ),
    "targets of -1, 0 and 1": (
        {"train": table(label=[[1, -1], [0, 1]]), "dev": table(label=[[-1, 0]])},
        2,
        ["Target -1 in row 0 of train", "Target -1 in row 0 of dev", "-100"],
        {"train": [[1, -100], [0, 1]], "dev": [[-100, 0]]},
    ),
    "targets of percent": (
        table(label=[[100.0, 0.0], [40.0, 60.0]]),
        2,
        ["Target 100 in row 0 of train"],
        {"train": [[1.0, 0.0], [0.4, 0.6]]},
    ),
    "whole targets of percent": (
        table(label=[[100, 0], [40, 60]]),
        2,
        ["Target 100 in row 0 of train"],
        {"train": [[1.0, 0.0], [0.4, 0.6]]},
    ),
    "targets coded as 1 and 2": (
        table(label=[[1, 2], [2, 1], [2, 2]]),
        2,
        ["Target 2 in row 0 of train", "Code them as 0 and 1"],
        {"train": [[0, 1], [1, 0], [1, 1]]},
    ),
    "a class -1 in lists": (
        table(label=[[0, -1], [2], []]),
        3,
        ["Label -1 in row 0 of train"],
        {"train": [[1, 0, 0], [0, 0, 1], [0, 0, 0]]},
    ),
    "floats for classes": (
        {"train": table(label=[0.0, 1.0]), "dev": table(label=[1.0, 1.0])},
        2,
        ["Float labels in train, e.g. 0.0 (row 0)", "Float labels in dev"],
        {"train": [0, 1], "dev": [1, 1]},
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_the_line_that_is_printed_fixes_the_data(name):
    datasets, num_labels, says, expected = FIXED[name]
    datasets = dict(datasets) if isinstance(datasets, dict) else datasets
    before = datasets if isinstance(datasets, Dataset) else dict(datasets)
    message = refused(datasets, model=tiny_bert(num_labels))
    for part in says:
        assert part in message
    for line in dict.fromkeys(fixes_in(message)):
        datasets = run_fix(line, datasets)
    model = tiny_bert(num_labels)
    loaders = trains(datasets, model)
    for split, labels in expected.items():
        found = labels_of(loaders[split])
        wanted = torch.tensor(labels, dtype=torch.float).tolist()
        assert sorted(found, key=str) == sorted(type_like(found, wanted), key=str)
    if isinstance(before, dict):
        assert loaders.keys() == before.keys()
        for split in before.keys() - expected.keys():
            assert "labels" not in next(iter(loaders[split]))


def type_like(found: list[Any], wanted: list[Any]) -> list[Any]:
    return [int(x) for x in wanted] if isinstance(found[0], int) else wanted


def test_all_problems_of_all_splits_come_in_one_message():
    datasets = {
        "train": table(label=[0, 7, None], text=["a", None, "b"]),
        "validation": table(label=[9, 1]),
        "dev": table(label=[0.5, 1.0]),
        "empty": table(label=[0]).filter(lambda row: row["label"] > 0),
        "list": [{"text": "a"}],
        "test": rows(words=["a"], label=[1]),
    }
    message = refused(datasets, model=tiny_bert())
    for part in (
        "Row 1 of train has text=None",
        "Row 2 of train has label=None",
        "Label 7 in row 1 of train",
        "Label 9 in row 0 of validation",
        "The labels 'label' of dev are floats",
        "empty has 0 rows",
        "list is a list, not a datasets.Dataset",
        "test has no column 'text'",
    ):
        assert part in message
    assert len(message.split("\n")) == 8


def test_problems_that_tokens_show_come_in_one_message():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    datasets = {"train": table(text=["a", ""], label=[0, 1]), "dev": table(text=["  "], label=[1])}
    message = refused(datasets, tokenizer)
    assert "no token of row 1 of train: {'text': ''}" in message
    assert 'fill={"text": tokenizer.unk_token}' in message
    assert "no token of row 0 of dev: {'text': '  '}" in message
    (line,) = fixes_in(message)
    fixed = run_fix(line, datasets, tokenizer=tokenizer)
    assert len(fixed["dev"]) == 0
    del fixed["dev"]
    loaders = prepare_dataloaders(fixed, tokenizer, fill={"text": tokenizer.unk_token})
    (batch,) = loaders["train"]
    assert sorted(batch["input_ids"].tolist()) == [[1], [11]]


HIDDEN = {
    "-1": (Value("int64"), [-1, -1]),
    "-1.0": (Value("float32"), [-1.0, -1.0]),
    "float16": (Value("float16"), [-1.0, float("nan")]),
    "int8": (Value("int8"), [-1, None]),
    "named": (CLASSES, [-1, -1]),
    "None": (CLASSES, [None, None]),
    "null": (Value("null"), [None, None]),
    "NaN": (Value("float64"), [float("nan")] * 2),
    "empty strings": (Value("string"), ["", ""]),
    "strings that are None": (Value("string"), [None, ""]),
    "mixed": (Value("float64"), [None, -1.0]),
    "lists": (Sequence(Value("int64")), [[-1, -1], [-1]]),
    "lists of None": (Sequence(Value("int64")), [None, [None, -1]]),
}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("form", HIDDEN)
def test_hidden_labels_are_recognised_in_every_form(form, alone, is_stream, caplog):
    feature, values = HIDDEN[form]
    hidden = typed(feature, values)
    splits = {} if alone else {"train": table(label=[1, 0])}
    splits["test"] = hidden.to_iterable_dataset() if is_stream else hidden
    model = tiny_bert()
    loader = prepare_dataloaders(splits, tiny_tokenizer(), model=model)["test"]
    assert any("so there are no labels" in line for line in messages(caplog))
    table_ = predict_loop(model, loader)
    assert table_.references is None
    assert len(table_) == 2
    for arguments in ((), ("accuracy",)):
        with pytest.raises(DataError, match="The labels are hidden: every one"):
            evaluate_loop(model, loader, *arguments)


def test_values_of_minus_1_are_not_hidden_where_others_are_negative():
    splits = {"train": table(label=[-0.5, 1.0, -1.0]), "dev": table(label=[-1.0, -1.0])}
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), model=tiny_bert(1))
    assert labels_of(loaders["dev"]) == [-1.0, -1.0]
    stream = table(label=[-1.0, 0.5]).to_iterable_dataset()
    assert first_batch(stream, tiny_tokenizer())["labels"].tolist() == [-1.0, 0.5]


def test_a_selection_hides_its_labels_whatever_the_other_rows_have():
    dataset = table(label=["a", "", "b", ""]).filter(lambda row: row["label"] == "")
    loader = prepare_dataloaders({"test": dataset}, tiny_tokenizer())["test"]
    assert "labels" not in next(iter(loader))


def test_a_test_split_with_some_labels_has_a_line_to_predict_it_and_one_to_score_it():
    test = table(label=[None, 1, 0])
    message = refused({"train": table(label=[0, 1]), "test": test})
    without, scored = fixes_in(message)
    model = tiny_bert()
    for line, num_rows in ((without, 3), (scored, 2)):
        datasets = run_fix(line, {"train": table(label=[0, 1]), "test": test})
        loaders = trains(datasets, model)
        assert len(predict_loop(model, loaders["test"])) == num_rows
    assert "accuracy" in evaluate_loop(model, loaders["test"], "accuracy")
    stream = {"test": test.to_iterable_dataset()}
    message = refused(stream)
    assert "Row 0 of test has label=None, and row 1 has 1" in message
    loaders = trains(run_fix(fixes_in(message)[0], stream), model)
    assert len(predict_loop(model, loaders["test"])) == 3


def test_a_late_label_in_a_stream_whose_labels_were_hidden_is_refused():
    require = RequireHidden("test", "label", "Fix it.")
    assert require({"label": [-1, None, float("nan")]}) == {}
    with pytest.raises(DataError, match="A row of test has label=1, but the labels of its first"):
        require({"label": [-1, 1]})


@pytest.mark.parametrize("other", ["label", "labels", "label_ids"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_the_named_label_is_the_label_whatever_else_is_called_so(other, is_stream):
    from transformers import DataCollatorWithPadding, default_data_collator

    dataset = rows(input_ids=[[4, 5]] * 2, fine=[3, 4], **{other: [0, 1]})
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    for collate in (None, default_data_collator, DataCollatorWithPadding(tiny_tokenizer())):
        batch = first_batch(dataset, label_column="fine", collate_fn=collate)
        assert batch["labels"].tolist() == [3, 4]
    hidden = rows(input_ids=[[4, 5]] * 2, fine=[-1, -1], **{other: [0, 1]})
    assert "labels" not in first_batch(
        hidden, label_column="fine", collate_fn=default_data_collator
    )


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"id": ["u1"], "words": [["a", "b"]]}, "text_columns='words'"),
        ({"image_id": ["a b"]}, "text_columns='image_id'"),
        ({"imageId": ["a b"]}, "text_columns='imageId'"),
        ({"source": ["https://a.b/c"]}, "text_columns='source'"),
        ({"source": ["images/1.jpg"]}, "text_columns='source'"),
        ({"source": ["3f2504e0-4f89-11d3-9a0c-0305e82c3301"]}, "text_columns='source'"),
        ({"caption": ["a cat"], "tokens": [["a", "cat"]]}, "text_columns='tokens'"),
        ({"sentiment": ["pos"]}, "text_columns='sentiment'"),
        ({"meta": [{"text": "a"}], "id": ["1"]}, "text_columns='id'"),
    ],
)
def test_no_text_is_guessed_where_it_may_be_something_else(columns, says):
    assert says in refused({"dev": rows(**columns, label=[0])})


@pytest.mark.parametrize("name", ["id", "caption"])
def test_strings_beside_images_are_not_taken_for_the_text(name):
    features = Features({name: Value("string"), "image": Image(), "label": Value("int64")})
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    dataset = Dataset.from_dict({name: ["a"], "image": [picture], "label": [0]}, features=features)
    for given in (dataset, dataset.to_iterable_dataset()):
        message = refused({"dev": given})
        assert "preprocess=" in message
        assert f"text_columns={name!r}" in message


def test_a_known_name_is_the_text_beside_ids_and_media():
    dataset = rows(id=["x1"], url=["http://a"], text=["good"], tokens=[["a", "b"]], label=[0])
    assert first_batch(dataset, tiny_tokenizer())["input_ids"].tolist() == [[2, 4, 3]]


def test_a_format_of_some_columns_that_outputs_all_keeps_all():
    dataset = table(label=[0, 1]).map(lambda b: tiny_tokenizer()(b["text"]), batched=True)
    for kind in ("torch", "numpy"):
        shown = dataset.with_format(kind, columns=["input_ids"], output_all_columns=True)
        assert first_batch(shown, tiny_tokenizer())["labels"].tolist() == [0, 1]


def test_fill_replaces_empty_cells_and_nothing_else():
    texts = ["good", None, "", "bad"]
    for dataset in (table(text=texts, label=[0, 1, 0, 1]), table(text=texts, label=[0, 1, 0, 1])):
        filled = first_batch(dataset, tiny_tokenizer(), fill={"text": "movie"})
        plain = first_batch(
            table(text=["good", "movie", "movie", "bad"], label=[0, 1, 0, 1]), tiny_tokenizer()
        )
        assert all(torch.equal(filled[name], plain[name]) for name in plain)
        stream = dataset.to_iterable_dataset()
        filled = first_batch(stream, tiny_tokenizer(), fill={"text": "movie"})
        assert all(torch.equal(filled[name], plain[name]) for name in plain)


def test_fill_keeps_hidden_labels_and_fills_others():
    splits = {"train": table(label=[0, None, 1]), "test": table(label=[None, None])}
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), fill={"label": 1})
    assert sorted(labels_of(loaders["train"])) == [0, 1, 1]
    assert "labels" not in next(iter(loaders["test"]))


def test_fill_comes_before_preprocess():
    own = lambda batch: {"input_ids": [[4] * len(text) for text in batch["text"]]}  # noqa: E731
    dataset = table(text=["ab", None], label=[0, 1])
    batch = first_batch(dataset, preprocess=own, fill={"text": "xy"})
    assert batch["input_ids"].tolist() == [[4, 4], [4, 4]]


@pytest.mark.parametrize(
    ("fill", "says"),
    [
        ({"txt": ""}, "train has no column 'txt'. Its columns: text, label. Name some of these in"),
        ({"text": 0}, "does not fit column 'text' of train, which holds values of kind 'text'"),
        ({"label": "a"}, "does not fit column 'label' of train"),
    ],
)
def test_fill_that_does_not_fit_is_refused(fill, says):
    assert says in refused(table(label=[0, 1]), fill=fill)


def test_nothing_is_computed_anew_where_no_cell_is_empty():
    dataset = table(label=[0, 1, 0])
    loaders = [
        prepare_dataloaders(dataset, tiny_tokenizer(), **arguments)["train"]
        for arguments in ({}, {"fill": {"text": ""}})
    ]
    same = {loader.dataset._fingerprint for loader in loaders}
    assert len(same) == 1


COLUMNS = {"toxic": [0, 1, 1], "insult": [0, 0, 1], "threat": [1, 0, 0]}
JOINED = [[0, 0, 1], [1, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize("make", [int, float, bool])
@pytest.mark.parametrize("is_stream", [False, True])
def test_several_columns_are_one_multi_label_target(make, is_stream, caplog):
    dataset = table(**{name: list(map(make, values)) for name, values in COLUMNS.items()})
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    splits = {"dev": dataset, "test": table(toxic=[-1] * 3, insult=[-1] * 3, threat=[-1] * 3)}
    loaders = prepare_dataloaders(
        splits, tiny_tokenizer(), model=tiny_bert(3), label_column=list(COLUMNS)
    )
    batch = next(iter(loaders["dev"]))
    assert batch["labels"].tolist() == JOINED
    assert batch["labels"].dtype == torch.float32
    assert "labels" not in next(iter(loaders["test"]))
    assert messages(caplog)[0] == "dev: using text -> labels"


def test_columns_that_are_no_zeros_and_ones_are_refused_by_name():
    columns = {"toxic": [0, 5, 1], "insult": [0, None, 1], "kind": ["a", "b", "c"]}
    message = refused(table(**columns), label_column=list(columns))
    assert "Target 5 in row 1 of train, column 'toxic'" in message
    assert "Row 1 of train has insult=None" in message
    assert "Column 'kind' of train holds values of kind 'text'" in message
    assert "no column 'nope'" in refused(table(**COLUMNS), label_column=["toxic", "nope"])
    fixed = run_fix(fixes_in(message)[0], table(**columns))
    assert fixed["toxic"][:] == [0, 1, 1]


def test_one_name_in_a_list_is_that_column():
    assert first_batch(table(stars=[2, 0]), tiny_tokenizer(), label_column=["stars"])[
        "labels"
    ].tolist() == [2, 0]


def test_rows_of_another_width_than_the_model_are_refused_in_every_split():
    splits = {"train": table(label=[[0, 1], [1, 1]]), "dev": table(label=[[0.0, 1.0, 0.0]])}
    assert (
        "Row 0 of dev has 3 labels, but the model has num_labels=2, and the loss wants"
        in refused(splits, model=tiny_bert())
    )


def test_several_values_a_row_are_a_regression_where_the_model_says_so():
    dataset = table(label=[[12.5, -3.0], [7.0, 2.0]])
    batch = first_batch(dataset, tiny_tokenizer())
    assert batch["labels"].tolist() == [[12.5, -3.0], [7.0, 2.0]]
    message = refused(dataset, model=tiny_bert())
    assert 'model.config.problem_type = "regression"' in message
    trains(dataset, tiny_bert(problem_type="regression"))


def test_labels_under_a_name_in_capitals_are_found():
    dataset = rows(Text=["good", "bad"], Label=[1, 0])
    assert first_batch(dataset, tiny_tokenizer())["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("name", ["sentiment", "Sentiment", "intent", "stars"])
def test_a_column_that_may_be_the_label_is_named(name):
    message = refused(table(**{name: [0, 1]}))
    assert f'label_column="{name}"' in message
    trains(table(**{name: [0, 1]}), tiny_bert(), label_column=name)


def test_columns_that_are_left_over_are_named_where_there_is_no_label(caplog):
    prepare_dataloaders(table(weight=[0.5, 1.0]), tiny_tokenizer())
    (line,) = messages(caplog)
    assert (
        line == "train: using text; dropped: weight; there are no labels: label_column= names them"
    )


@pytest.mark.parametrize("kind", [np.int64, np.int32, int])
def test_numbers_of_numpy_are_numbers(kind):
    (batch,) = prepare_dataloaders(
        {"dev": rows()}, tiny_tokenizer(), batch_size=kind(8), max_length=kind(8)
    )["dev"]
    assert len(batch["labels"]) == 6


def test_what_is_no_tokenizer_is_refused_with_the_line_that_loads_one(shared):
    folder = str(shared / "tokenizers/bert-base-uncased")
    message = refused(rows(), folder)
    line = re.search(r"transformers\.(AutoTokenizer.*\))\.$", message).group(1)
    tokenizer = eval(line, {"AutoTokenizer": AutoTokenizer})
    assert prepare_dataloaders(rows(), tokenizer)
    assert "which is a model" in refused(rows(), tiny_bert())
    assert "cannot be called" in refused(rows(), 5)


def test_a_token_label_that_is_no_class_is_found_in_every_split():
    ids = {"input_ids": [[4, 5], [6]]}
    splits = {
        "train": rows(**ids, labels=[[0, 1], [-100]]),
        "dev": rows(**ids, labels=[[0, -1], [1]]),
        "test": rows(**ids, labels=[[0, 1], [2]]),
    }
    message = refused(splits, model=token_model())
    assert "Label -1 in row 0 of dev" in message
    assert "Label 2 in row 1 of test" in message


def test_text_of_another_kind_in_another_split_is_refused():
    splits = {"train": table(label=[0, 1]), "dev": rows(text=[["a", "b"]], label=[1])}
    assert "holds values of kind 'texts', that of train of kind 'text'" in refused(splits)
    splits["dev"] = rows(text=[3], label=[1])
    assert "holds values of kind 'int'" in refused(splits)
    splits["dev"] = rows(text=[None], label=[1])
    assert "Row 0 of dev has text=None" in refused(splits)


def test_predictions_need_no_labels_that_a_loss_would_take():
    model, batch = tiny_bert(), {"input_ids": torch.tensor([[4, 5], [6, 7]])}
    expected = predict_loop(model, [batch])
    for label in (-1, 7, -100):
        found = predict_loop(model, [{**batch, "labels": torch.full((2,), label)}])
        assert found.references.tolist() == [label] * 2
        assert np.array_equal(found.predictions, expected.predictions)
        assert np.array_equal(found.scores, expected.scores)
    with pytest.raises(DataError, match=r"Float labels of shape \(2,\) are read as multi-label"):
        predict_loop(model, [{**batch, "labels": torch.tensor([5.5, 7.0])}])


def test_missing_lists_are_filtered_out_by_the_line():
    dataset = table(labels=[[0, 1], None, [1, None]])
    message = refused(dataset, model=tiny_bert())
    (line,) = fixes_in(message)
    trains(run_fix(line, dataset), tiny_bert())
    words = rows(words=[["a", None], None, ["b"]], label=[0, 1, 0])
    message = refused(words, text_columns="words")
    (line,) = fixes_in(message)
    trains(run_fix(line, words), tiny_bert(), text_columns="words")


def test_a_stream_that_knows_no_columns_hides_its_labels():
    from datasets import IterableDataset

    for label in (None, -1, float("nan"), ""):

        def generate(label=label):
            for text in TEXT:
                yield {"text": text, "label": label}

        loader = prepare_dataloaders(
            {"test": IterableDataset.from_generator(generate)}, tiny_tokenizer(), model=tiny_bert()
        )["test"]
        assert "labels" not in next(iter(loader))


def test_what_holds_no_labels_is_refused():
    assert "Column 'label' of dev holds no labels, e.g. {'x': 1} (row 0)" in refused(
        {"dev": table(label=[{"x": 1}, {"x": 2}])}
    )


@pytest.mark.parametrize(("label", "width"), [([[0.5, 1.0]] * 3, 2), ([0.5, 1.0, 2.0], 1)])
def test_a_regression_has_one_number_per_output(label, width):
    model = tiny_bert(3 - width, problem_type="regression")
    message = refused({"dev": table(label=label)}, model=model)
    assert f"Row 0 of dev has {width} labels, but the model has num_labels={3 - width}" in message
    trains({"dev": table(label=label)}, tiny_bert(width, problem_type="regression"))
    stream = table(label=label).to_iterable_dataset()
    loader = prepare_dataloaders(stream, tiny_tokenizer(), model=model)["train"]
    with pytest.raises(DataError, match="a regression has one number per output"):
        train_loop(model, loader, max_steps=1, progress_bar=False)


STREAMED = {
    "from 1": ([1, 2, 1, 2], 2, {"train": [0, 1, 0, 1]}),
    "-1 and 1": ([-1, 1, 1, -1], 2, {"train": [0, 1, 1, 0]}),
    "whole floats": ([0.0, 1.0], 2, {"train": [0, 1]}),
}


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("is_mapping", [False, True])
def test_the_line_for_a_stream_names_the_column_of_the_user(name, is_mapping):
    labels, num_labels, expected = STREAMED[name]
    stream = table(stars=labels).to_iterable_dataset()
    hidden = table(stars=[-1, -1]).to_iterable_dataset()
    data = {"train": stream, "dev": stream, "test": hidden} if is_mapping else stream
    arguments = {"label_column": "stars", "batch_size": 4}
    loaders = prepare_dataloaders(data, tiny_tokenizer(), model=tiny_bert(num_labels), **arguments)
    with pytest.raises(DataError) as error:
        train_loop(tiny_bert(num_labels), loaders["train"], max_steps=1, progress_bar=False)
    fixed = run_fix(fixes_in(error.value)[0], data)
    loaders = prepare_dataloaders(fixed, tiny_tokenizer(), model=tiny_bert(num_labels), **arguments)
    assert labels_of(loaders["train"]) == expected["train"]
    train_loop(tiny_bert(num_labels), loaders["train"], max_steps=1, progress_bar=False)
    if is_mapping:
        assert labels_of(loaders["dev"]) == expected["train"]
        assert "labels" not in next(iter(loaders["test"]))


@pytest.mark.parametrize("values", [[None, 0.5, 1.0], [None, -1.0, 0.0], [float("nan"), 0.5]])
def test_the_lines_for_a_stream_that_begins_without_a_label_run(values):
    stream = {"dev": typed(Value("float32"), values).to_iterable_dataset()}
    for line in fixes_in(refused(stream)):
        loaders = trains(run_fix(line, dict(stream)), tiny_bert(1))
    assert labels_of(loaders["dev"]) == values[1:]
