"""Texts and classes that are others than where a model was trained are reported."""

import pytest
from datasets import ClassLabel, Dataset
from helpers import messages, tiny_bert, tiny_tokenizer

from manualloop import evaluate_loop, predict_loop, prepare_dataloaders, train_loop

ROWS = {"text": ["good movie " * 6, "bad plot"] * 3, "title": ["fine", "dull"] * 3}


def prepared(model, names=("neg", "pos"), **arguments):
    data = Dataset.from_dict({**ROWS, "label": [0, 1] * 3})
    data = data.cast_column("label", ClassLabel(names=list(names)))
    arguments = {"text_columns": "text", **arguments}
    return prepare_dataloaders({"train": data}, tiny_tokenizer(), model=model, **arguments)["train"]


def trained(model, **arguments):
    loader = prepared(model, **arguments)
    train_loop(model, loader, max_steps=1, progress_bar=False)
    return loader


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ({"max_length": 8}, {}, "are cut off at 64 tokens, and those that"),
        ({}, {"max_length": 8}, "was trained on cut off at 64 tokens."),
        ({"max_length": 8}, {"max_length": 5}, "are cut off at 5 tokens, and those that"),
        (
            {},
            {"text_columns": "title"},
            "trained on of text.",
        ),
        ({}, {"text_columns": ["text", "title"]}, "are of text, title, and those that"),
        ({"max_length": 8}, {"max_length": 8}, None),
        ({"max_length": 100}, {"max_length": 50}, None),
        ({"max_length": 50}, {}, None),
    ],
    ids=str,
)
def test_texts_that_are_made_otherwise_are_reported(there, here, told, caplog):
    model = tiny_bert(max_position_embeddings=64)
    own = trained(model, **there)
    evaluate_loop(model, own, "accuracy")
    caplog.clear()
    loader = prepared(model, **here)
    for _ in range(2):
        predict_loop(model, loader)
    lines = [line for line in messages(caplog) if line.startswith("these texts are")]
    assert len(lines) == (0 if told is None else 1)
    assert told is None or told in lines[0]


@pytest.mark.parametrize(
    ("config", "names", "told"),
    [
        ({"num_labels": 5}, ("neg", "pos"), "the model has 5 outputs, and the data name 2 classes"),
        ({"num_labels": 2}, ("neg", "pos"), None),
        ({"id2label": {0: "neg", 1: "pos", 2: "none"}}, ("neg", "pos"), None),
        ({"num_labels": 3}, ("neg", "pos", "unused"), None),
    ],
    ids=str,
)
def test_outputs_that_are_no_class_of_the_data_are_reported(config, names, told, caplog):
    trained(tiny_bert(**config), names=names)
    lines = [line for line in messages(caplog) if line.startswith("the model has")]
    assert len(lines) == (0 if told is None else 1)
    assert told is None or told in lines[0]
