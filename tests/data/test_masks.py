"""Masks in evaluation are functions of the row; in training they are those of the user's loop."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import messages, tiny_bert, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

from manualloop import evaluate_loop, prepare_dataloaders
from manualloop.batches import model_inputs
from manualloop.data.masks import RowMasks, masks_rows
from manualloop.data.sampler import order
from manualloop.data.transform import NumberedRows

LENGTHS = [3, 9, 5, 7, 4, 8, 6, 9, 3, 5, 7]


def table():
    ids = [[4 + (3 * n + i) % 10 for i in range(length)] for n, length in enumerate(LENGTHS)]
    return Dataset.from_dict({"input_ids": ids})


def tokenizer(**options):
    return tiny_tokenizer(mask_token="[UNK]", **options)


def masked(batch_size=4, collate=None, name="dev", **options):
    """Inputs and labels of each row, without padding."""
    collate = collate or DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4)
    loader = prepare_dataloaders(
        {name: table()}, collate_fn=collate, batch_size=batch_size, **options
    )[name]
    found = {}
    for batch, numbers in zip(loader, loader.batch_sampler.batches(), strict=True):
        rows = zip(numbers, batch["input_ids"], batch["labels"], strict=True)
        for number, ids, labels in rows:
            length = LENGTHS[number]
            found[number] = ids[:length].tolist(), labels[:length].tolist()
            assert (labels[length:] == -100).all()
    return found


def test_masks_are_functions_of_the_row():
    found = []
    for batch_size, seed in ((4, 0), (1, 1), (11, 2)):
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state()
        found.append(masked(batch_size))
        assert torch.equal(torch.get_rng_state(), before)
    found.append(masked(4, num_workers=1))
    found.append(
        masked(4, DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4, seed=7))
    )
    assert all(rows == found[0] for rows in found)
    labels = [label for _, labels in found[0].values() for label in labels]
    assert 0.2 < sum(label != -100 for label in labels) / len(labels) < 0.6
    assert masked(seed=43) != found[0]
    assert len({str(labels) for _, labels in found[0].values()}) > 6


class OfAnother(DataCollatorForLanguageModeling):
    """Draws from Python's and NumPy's global generators as well, as old whole-word masking does."""

    def torch_mask_tokens(self, inputs, *args, **options):
        inputs, labels = super().torch_mask_tokens(inputs, *args, **options)
        labels[0, 0] = random.randrange(5)
        labels[0, 1] = np.random.randint(5)
        return inputs, labels


def test_classes_that_inherit_from_the_collator():
    collate = OfAnother(tokenizer(), mlm_probability=0.4)
    found = []
    for batch_size, seed in ((4, 0), (3, 1)):
        random.seed(seed)
        np.random.seed(seed)
        expected = random.Random(seed).random()
        found.append(masked(batch_size, collate))
        assert random.random() == expected
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:Random token replacement")
@pytest.mark.filterwarnings("ignore:Whole word masking")
def test_whole_words():
    pytest.importorskip("transformers", minversion="5.0")
    collate = DataCollatorForLanguageModeling(
        tokenizer(), mlm_probability=0.4, whole_word_mask=True
    )
    offsets = [[[i - i % 2, i + 1] for i in range(length)] for length in LENGTHS]
    rows = table().add_column("offset_mapping", offsets)
    found = []
    for size in (1, 11):
        loader = prepare_dataloaders({"dev": rows}, collate_fn=collate, batch_size=size)["dev"]
        found.append([r[r != -100].tolist() for batch in loader for r in batch["labels"]])
    assert found[0] == found[1]
    assert any(found[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_apart_from_the_masks_batches_are_those_of_the_collator(side, multiple):
    own = tokenizer()
    own.padding_side = side
    collate = DataCollatorForLanguageModeling(own, mlm_probability=0, pad_to_multiple_of=multiple)
    rows = [{"input_ids": ids, "token_type_ids": [1] * len(ids)} for ids in table()["input_ids"]]
    ours = RowMasks(collate, seed=42)(NumberedRows(rows, range(len(rows))))
    theirs = collate(rows)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].dtype == theirs[name].dtype


def test_kept_columns_and_transforms_come_with_them():
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4)
    rows = table().add_column("id", [*map(str, range(11))])

    def first_four(row, generator):
        return {"input_ids": row["input_ids"][: int(torch.randint(3, 5, (), generator=generator))]}

    found = []
    for size in (3, 11):
        loader = prepare_dataloaders(
            {"dev": rows}, collate_fn=collate, transform=first_four, keep="id", batch_size=size
        )["dev"]
        batches = list(loader)
        assert [name for batch in batches for name in batch["id"]] == [*map(str, range(11))]
        assert "id" not in model_inputs(batches[0])
        found.append([row[row != -100].tolist() for b in batches for row in b["labels"]])
    assert found[0] == found[1]


def test_training_draws_as_a_loop_by_hand_does():
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4)
    loader = prepare_dataloaders(table(), collate_fn=collate, batch_size=4)["train"]
    rows = [{"input_ids": ids} for ids in table()["input_ids"]]
    torch.manual_seed(5)
    ours = list(loader)
    numbers = order(11, 42, 0)
    torch.manual_seed(5)
    for batch, start in zip(ours, range(0, 11, 4), strict=True):
        theirs = collate([rows[n] for n in numbers[start : start + 4]])
        assert all(torch.equal(batch[name], theirs[name]) for name in theirs)


def test_what_is_no_collator_of_masks():
    own = tokenizer()
    assert masks_rows(DataCollatorForLanguageModeling(own))
    assert not masks_rows(DataCollatorForLanguageModeling(own, mlm=False))
    assert not masks_rows(lambda rows: rows)
    assert not masks_rows(DataCollatorForLanguageModeling(own, return_tensors="np"))


def test_random_scores_are_told(caplog):
    model = tiny_bert(kind=BertForMaskedLM)
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4)
    told = "the score is random: the loader draws random numbers"

    def lines(loader, *, calls=1):
        caplog.clear()
        for _ in range(calls):
            evaluate_loop(model, loader)
        return [line for line in messages(caplog) if "the score is random" in line]

    loaders = prepare_dataloaders({"train": table(), "dev": table()}, collate_fn=collate)
    assert lines(loaders["dev"]) == []
    assert [line[: len(told)] for line in lines(loaders["train"], calls=2)] == [told]
    rows = table()
    assert len(lines(DataLoader(rows, batch_size=4, collate_fn=collate))) == 1
    assert len(lines(DataLoader(rows, batch_size=4, collate_fn=collate, shuffle=True))) == 1
    assert len(lines(DataLoader(rows, batch_size=11, collate_fn=collate))) == 1
    assert len(lines(DataLoader(rows, batch_size=11, collate_fn=collate, num_workers=1))) == 1
    fixed = [collate([{"input_ids": ids} for ids in rows["input_ids"]])]
    assert lines(fixed) == []
    assert lines(DataLoader(fixed, batch_size=None, shuffle=True)) == []
    row = {name: column[0] for name, column in fixed[0].items()}
    row["labels"] = row["input_ids"]
    begins_later = Accelerator(cpu=True).prepare_data_loader(DataLoader([row] * 6, batch_size=2))
    assert lines(begins_later) == []


def test_a_model_that_draws_in_evaluation_is_told(caplog):
    class Noisy(torch.nn.Module):
        draws = True

        def forward(self, x, labels=None):
            noise = torch.rand(len(x)) if self.draws else 0
            return {"loss": (x + noise).mean(), "logits": x}

    batches = [{"x": torch.ones(3), "labels": torch.zeros(3)}] * 3
    quiet = Noisy()
    quiet.draws = False
    evaluate_loop(quiet, batches)
    assert not messages(caplog)
    noisy = Noisy()
    evaluate_loop(noisy, batches)
    evaluate_loop(noisy, batches)
    (line,) = messages(caplog)
    assert line.startswith("the score is random: Noisy, or a function that is called with its")
