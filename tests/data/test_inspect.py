"""``inspect_batch``: what it shows, and that it changes nothing."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import rows, tiny_tokenizer
from torch.utils.data import DataLoader

from manualloop import DataError, inspect_batch, prepare_dataloaders


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


def test_inspect_batch_shows_values_that_are_no_tensors():
    report = inspect_batch([{"text": ["good", "bad"], "labels": torch.tensor([1, 0]), "n": 3}])
    assert report.columns == {
        "labels": ((2,), "int64"),
        "n": ((), "int, no tensor"),
        "text": ((2,), "list of str, no tensor"),
    }
    assert "text    (2,) list of str, no tensor" in str(report)
    assert report.rows == [{"labels": 1}, {"labels": 0}]


@pytest.mark.parametrize(("loader", "got"), [([], "no batch"), ([[1, 2]], "a list")])
def test_inspect_batch_names_what_it_got_instead(loader, got):
    with pytest.raises(DataError, match=f"The loader gave {got}, not a dict of tensors"):
        inspect_batch(loader)


def test_inspect_batch_changes_no_later_batch():
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
