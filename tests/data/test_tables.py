"""Tables of Arrow: chunks, selections, nested lists, formats and files."""

from __future__ import annotations

import sys

import datasets
import pytest
from datasets import Array2D, Dataset, Features
from helpers import assert_same_batches, first_batch, labels_of, rows, tiny_tokenizer

from manualloop import prepare_dataloaders
from manualloop.data.tables import bars_only_where_seen


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_format_is_removed_but_its_columns_are_kept(kind):
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


def test_arrays_are_stacked():
    features = Features({"input_ids": Array2D((2, 2), "int32"), "labels": Array2D((2, 2), "int32")})
    array = [[[1, 2], [3, 4]]] * 2
    batch = first_batch(Dataset.from_dict({"input_ids": array, "labels": array}, features=features))
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == array


@pytest.mark.parametrize(("is_on", "is_asked_for"), [(True, False), (False, False), (True, True)])
def test_bars_of_datasets_are_left_out_of_log_files(is_on, is_asked_for, monkeypatch):
    bars = sys.modules["datasets.utils.tqdm"]
    setting = False if is_asked_for else None
    for module in (bars, datasets.config):
        monkeypatch.setattr(module, "HF_DATASETS_DISABLE_PROGRESS_BARS", setting)
    monkeypatch.setattr(bars, "_hf_datasets_progress_bars_disabled", not is_on)
    with bars_only_where_seen():  # pytest's stderr is no terminal
        assert datasets.are_progress_bars_disabled() == (not is_asked_for)
    assert datasets.are_progress_bars_disabled() == (not is_on)
