"""Which names the classes of a model have, and that a loader of other numbers is refused."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import labels_of, rows, tiny_bert, tiny_tokenizer
from torch import nn
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertForTokenClassification

from manualloop import DataError, evaluate_loop, predict_loop, prepare_dataloaders, train_loop
from manualloop.tasks.names import class_names, names_of, notes_of

PAIR = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}


class Net(nn.Module):
    """A classifier without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Embedding(16, 3)

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        labels: Any = None,
    ) -> Any:
        logits = self.scores(input_ids).mean(1)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def prepared(labels: list[str], model: Any = None, split: str = "train") -> Any:
    dataset = {split: rows(text=["good"] * len(labels), label=labels)}
    return prepare_dataloaders(dataset, tiny_tokenizer(), model=model)[split]


def train(model: nn.Module, loader: Any, **options: Any) -> Any:
    return train_loop(model, loader, num_epochs=1, progress_bar=False, **options)


CONFIGS: dict[str, tuple[Any, tuple[str, ...] | None]] = {
    "names": (lambda: tiny_bert(**PAIR), ("neg", "pos")),
    "of tokens": (lambda: tiny_bert(kind=BertForTokenClassification, **PAIR), ("neg", "pos")),
    "none": (tiny_bert, None),
    "numbers": (lambda: tiny_bert(id2label={0: "0", 1: "1"}), None),
    "numbers in another order": (lambda: tiny_bert(id2label={0: "1", 1: "0"}), ("1", "0")),
    "the same twice": (lambda: tiny_bert(id2label={0: "a", 1: "a"}), None),
    "a gap": (lambda: tiny_bert(id2label={0: "a", 2: "b"}), None),
    "another head": (lambda: tiny_bert(kind=BertForMaskedLM, **PAIR), None),
    "positions": (lambda: tiny_bert(kind=BertForQuestionAnswering, **PAIR), None),
    "one output": (lambda: tiny_bert(1, id2label={0: "score"}), None),
    "no config": (Net, None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_the_names_of_its_config_if_they_mean_classes(name):
    make, expected = CONFIGS[name]
    assert names_of(make()) == expected
    assert class_names(make(), [{"labels": torch.tensor([0])}]) == expected


def test_keys_that_are_texts_are_numbers():
    model = Net()
    model.config = SimpleNamespace(id2label={"1": "pos", "0": "neg"})
    assert names_of(model) == ("neg", "pos")
    model.config.id2label = {"a": "neg", "b": "pos"}
    assert names_of(model) is None


def test_a_wrapped_model_has_the_names_of_the_model_inside():
    model = tiny_bert()
    loader = prepared(["neg", "pos"], nn.DataParallel(model))
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert class_names(torch.compile(model), loader) == ("neg", "pos")


@pytest.mark.parametrize("make", [Net, lambda: tiny_bert(3)])
@pytest.mark.parametrize("knows_model", [True, False])
def test_splits_that_are_prepared_one_by_one_mean_the_same_classes(make, knows_model):
    model = make()
    known = model if knows_model else None
    loader = prepared(["a", "b", "c"], known)
    if knows_model:
        other = prepared(["c", "a", "c"], known, "dev")
        assert labels_of(other) == [2, 0, 2]
        train(model, loader, evaluate=partial(evaluate_loop, model, other, "accuracy"))
        return
    other = prepared(["c", "a", "c"], known, "dev")
    assert labels_of(other) == [1, 0, 1]  # of its own two
    for evaluate in (partial(evaluate_loop, model, other, "accuracy"), lambda: {"x": 1.0}):
        if isinstance(evaluate, partial):
            with pytest.raises(DataError, match=r"0 = a, 1 = c, but .* has 0 = a, 1 = b, 2 = c"):
                train(model, loader, evaluate=evaluate)
        else:
            train(model, loader, evaluate=evaluate)
    for look in (evaluate_loop, predict_loop):
        with pytest.raises(DataError, match=r"prepare_dataloaders\(datasets, tokenizer, model=m"):
            look(model, other)
    again = prepared(["c", "a", "c"], model, "dev")  # the line of the message
    assert labels_of(again) == [2, 0, 2]
    assert class_names(model, again)[:3] == ("a", "b", "c")
    evaluate_loop(model, again, "accuracy")


def test_a_model_without_a_config_is_trained_on_other_classes_on_purpose():
    model = Net()
    train(model, prepared(["a", "b"]))
    with pytest.raises(DataError, match="prepare them without model="):
        prepared(["c", "d"], model)
    train(model, prepared(["c", "d"]))
    assert class_names(model, prepared(["c", "d"], model, "dev")) == ("c", "d")


def test_a_copy_of_a_model_is_asked_for_itself():
    model = tiny_bert()
    train(model, prepared(["a", "b"]))
    assert names_of(model) == ("a", "b")
    assert model.config.id2label[0] == "LABEL_0"
    assert names_of(tiny_bert()) is None


def test_loaders_of_others_have_no_notes():
    assert notes_of([{"x": 1}]).names is None
    assert notes_of(None).num_cut is None
