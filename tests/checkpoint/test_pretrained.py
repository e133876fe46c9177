"""What is saved beside the weights, so that ``from_pretrained`` loads a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import rows, tiny_bert, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, pipeline

from manualloop import (
    DataError,
    evaluate_loop,
    load_checkpoint,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.checkpoint.pretrained import find_tokenizer


def prepared(tokenizer, model):
    return prepare_dataloaders(rows(4), tokenizer, model=model)["train"]


def with_own_collate(tokenizer, model):
    collate = DataCollatorWithPadding(tokenizer)
    return prepare_dataloaders(rows(4), tokenizer, model=model, collate_fn=collate)["train"]


def with_a_lambda(tokenizer, model):
    def collate(batch):
        return {
            "input_ids": torch.tensor([row["input_ids"][:3] for row in batch]),
            "labels": torch.tensor([row["labels"] for row in batch]),
        }

    return prepare_dataloaders(rows(4), tokenizer, model=model, collate_fn=collate)["train"]


def streamed(tokenizer, model):
    return prepare_dataloaders(rows(4).to_iterable_dataset(), tokenizer, model=model)["train"]


def of_the_user(tokenizer, model):
    data = rows(4).map(lambda row: tokenizer(row["sentence"]), remove_columns=["sentence"])
    return DataLoader(data, 2, collate_fn=DataCollatorWithPadding(tokenizer))


def in_the_dataset(tokenizer, model):
    class Texts(torch.utils.data.Dataset):
        def __init__(self):
            self.tokenizer = tokenizer

        def __len__(self):
            return 4

        def __getitem__(self, number):
            ids = self.tokenizer("good movie")["input_ids"]
            return {"input_ids": torch.tensor(ids), "labels": number % 2}

    return DataLoader(Texts(), 2)


@pytest.mark.parametrize(
    "make", [prepared, with_own_collate, with_a_lambda, streamed, of_the_user, in_the_dataset]
)
def test_the_tokenizer_of_the_loader_is_beside_the_weights(make, tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_bert()
    result = train_loop(
        model, make(tokenizer, model), max_steps=2, checkpoint_dir=tmp_path, progress_bar=False
    )
    loaded = AutoTokenizer.from_pretrained(result.last_checkpoint)
    text = "a movie that was not dull"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.model_max_length == tokenizer.model_max_length


def test_loaders_without_one_have_none():
    assert find_tokenizer([{"x": torch.ones(1)}]) is None
    assert find_tokenizer(DataLoader(torch.ones(2))) is None
    assert find_tokenizer(iter([])) is None


def test_a_tokenizer_that_cannot_be_saved_costs_no_checkpoint(tmp_path, caplog):
    class Broken(type(tiny_tokenizer())):
        def save_pretrained(self, *args, **kwargs):
            raise ValueError("no vocabulary")

    tokenizer, model = tiny_tokenizer(), tiny_bert()
    tokenizer.__class__ = Broken
    caplog.set_level("INFO", logger="manualloop")
    loader = prepared(tokenizer, model)
    result = train_loop(model, loader, max_steps=1, checkpoint_dir=tmp_path, progress_bar=False)
    assert type(model).from_pretrained(result.last_checkpoint)
    assert "the Broken is not in the checkpoint" in caplog.text


def test_a_model_of_ones_own_gets_no_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    loader = DataLoader(
        torch.ones(2, 1), collate_fn=lambda batch, used=tokenizer: torch.stack(batch)
    )
    train_loop(
        nn.Linear(1, 1),
        loader,
        max_steps=1,
        loss_fn=lambda model, batch: model(batch).mean(),
        checkpoint_dir=tmp_path,
        progress_bar=False,
    )
    assert not list(tmp_path.glob("*/tokenizer*"))


def reviews() -> Dataset:
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])}
    )
    texts = ["bad movie", "good movie", "dull plot", "fine acting"]
    return Dataset.from_dict({"text": texts, "label": [0, 1, 0, 1]}, features=features)


@pytest.mark.parametrize("knows_model", [True, False])
def test_a_pipeline_of_the_best_checkpoint_answers_with_the_names(knows_model, tmp_path):
    torch.manual_seed(0)  # dropout must not decide it
    tokenizer, model, scores = tiny_tokenizer(), tiny_bert(), iter(range(99))
    arguments = {"model": model} if knows_model else {}
    loaders = prepare_dataloaders({"train": reviews()}, tokenizer, **arguments)
    result = train_loop(
        model,
        loaders["train"],
        torch.optim.AdamW(model.parameters(), lr=0.05),
        max_steps=20,
        evaluate=lambda: {"f1": float(next(scores))},
        evaluate_every=10,
        checkpoint_every=10,
        best_metric="f1",
        checkpoint_dir=tmp_path,
        progress_bar=False,
    )
    classify = pipeline("text-classification", model=result.best_checkpoint, device="cpu")
    found = [answer["label"] for answer in classify(["good movie", "bad movie", "dull plot"])]
    assert found == ["positive", "negative", "negative"]
    config = AutoConfig.from_pretrained(result.best_checkpoint)
    assert config.label2id == {"negative": 0, "positive": 1}
    expected = "negative" if knows_model else "LABEL_0"
    assert model.config.id2label[0] == expected  # a run changes no model but by training it


def test_the_names_of_a_model_without_a_config_are_a_file(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Embedding(16, 2)

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = self.scores(input_ids).mean(1)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Net()
    loader = prepare_dataloaders(reviews(), tiny_tokenizer(), model=model)["train"]
    result = train_loop(model, loader, max_steps=1, checkpoint_dir=tmp_path, progress_bar=False)
    file = result.last_checkpoint / "class_names.json"
    assert json.loads(file.read_text()) == ["negative", "positive"]
    again = train_loop(Net(), loader, max_steps=1, checkpoint_dir=tmp_path, progress_bar=False)
    assert torch.equal(again.state.model.scores.weight, model.scores.weight)
    batch = {"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1).long()}
    folder = tmp_path / "plain"
    plain = train_loop(Net(), [batch], max_steps=1, checkpoint_dir=folder, progress_bar=False)
    assert not (plain.last_checkpoint / "class_names.json").exists()


def named(names):
    return rows(8).cast_column("label", ClassLabel(names=names))


def test_weights_are_not_loaded_under_names_in_another_order(tmp_path, caplog):
    model = tiny_bert()
    tokenizer = tiny_tokenizer()
    loader = prepare_dataloaders(named(["pos", "neg"]), tokenizer, model=model)["train"]
    train_loop(model, loader, max_steps=1, checkpoint_dir=tmp_path, progress_bar=False)
    own_split = {"dev": named(["pos", "neg"])}
    expected = predict_loop(model, prepare_dataloaders(own_split, tokenizer, model=model)["dev"])

    other = {"dev": named(["neg", "pos"])}
    again = tiny_bert()
    before = again.classifier.weight.clone()
    prepare_dataloaders(other, tokenizer, model=again)
    with pytest.raises(DataError, match="trained on the classes 0 = pos, 1 = neg, but BertFor"):
        load_checkpoint(tmp_path, again)
    assert torch.equal(again.classifier.weight, before)

    again = tiny_bert()  # the way that the message names
    load_checkpoint(tmp_path, again)
    loader = prepare_dataloaders(other, tokenizer, model=again)["dev"]
    table = predict_loop(again, loader)
    assert table.names == ("pos", "neg")
    assert table.labels == expected.labels
    assert evaluate_loop(again, loader, "accuracy")["accuracy"] == (
        (1 - expected.references == expected.predictions).mean()
    )

    caplog.clear()
    again = tiny_bert()
    prepare_dataloaders({"dev": named(["no", "yes"])}, tokenizer, model=again)
    load_checkpoint(tmp_path, again)
    assert "train it before its predictions count" in caplog.text
    again = tiny_bert()
    prepare_dataloaders(own_split, tokenizer, model=again)
    load_checkpoint(tmp_path, again)
