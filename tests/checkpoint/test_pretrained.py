"""What is saved beside the weights, so that ``from_pretrained`` loads a checkpoint."""

from __future__ import annotations

import pytest
import torch
from helpers import rows, tiny_bert, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding

from manualloop import prepare_dataloaders, train_loop
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
