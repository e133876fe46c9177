"""Rows that a loader leaves out of an evaluation, or counts twice, are reported."""

import numpy as np
import pytest
import torch
from helpers import messages
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from manualloop import evaluate_loop, predict_loop

ROWS = [{"x": torch.ones(2), "labels": torch.tensor(row % 2)} for row in range(11)]
BY_PAIR = {(0, 1): ROWS[0], (0, 2): ROWS[1]}


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 2)

    def forward(self, x, labels):
        logits = self.head(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


LOADERS = {
    "drop_last": (DataLoader(ROWS, 4, drop_last=True), "3 of 11 rows are left out"),
    "a batch sampler": (
        DataLoader(ROWS, batch_sampler=BatchSampler(range(11), 3, drop_last=True)),
        "2 of 11 rows are left out",
    ),
    "with weights": (
        DataLoader(ROWS, 4, sampler=WeightedRandomSampler([1.0] * 11, 11)),
        "a WeightedRandomSampler draws them with replacement",
    ),
    "with replacement": (
        DataLoader(ROWS, 4, sampler=RandomSampler(ROWS, replacement=True)),
        "a RandomSampler draws them with replacement",
    ),
    "a list": (
        DataLoader(ROWS, 4, sampler=[0, 1, 1, 3, 3, 3]),
        "3 of the rows in the loader's list are repeated",
    ),
    "an array": (
        DataLoader(ROWS, 4, sampler=torch.tensor([0, 1, 1])),
        "1 of the rows in the loader's Tensor are repeated",
    ),
    "a random subset": (
        DataLoader(ROWS, 4, sampler=SubsetRandomSampler([2, 2, 5])),
        "1 of the rows in the loader's SubsetRandomSampler are repeated",
    ),
    "a list in a batch sampler": (
        DataLoader(ROWS, batch_sampler=BatchSampler([4, 4, 5], 2, drop_last=False)),
        "1 of the rows in the loader's list are repeated",
    ),
    "batches that overlap": (
        DataLoader(ROWS, batch_sampler=[[0, 1], [1, 2]]),
        "1 of the rows in the loader's list are repeated",
    ),
    "batches that are tensors": (
        DataLoader(ROWS, batch_sampler=[torch.tensor([0, 1]), torch.tensor([1, 2])]),
        "1 of the rows in the loader's list are repeated",
    ),
    "batches that are arrays or ranges": (
        DataLoader(ROWS, batch_sampler=[np.array([0, 1]), range(1, 3), (2, 3)]),
        "2 of the rows in the loader's list are repeated",
    ),
    "numbers that are tensors": (
        DataLoader(ROWS, 4, sampler=[torch.tensor(1), torch.tensor(1), np.int64(1), 2]),
        "2 of the rows in the loader's list are repeated",
    ),
    "a row that is counted from the end, too": (
        DataLoader(ROWS, 4, sampler=[-1, 0, len(ROWS) - 1]),
        "1 of the rows in the loader's list are repeated",
    ),
    "keys that are pairs": (DataLoader(BY_PAIR, 4, sampler=[(0, 1), (0, 2)]), None),
    "a list without repeats": (DataLoader(ROWS, 4, sampler=[3, 1, 2]), None),
    "batches without repeats": (DataLoader(ROWS, batch_sampler=[[0, 1], [2]]), None),
    "nothing left": (DataLoader(ROWS[:8], 4, drop_last=True), None),
    "shuffled": (DataLoader(ROWS, 4, shuffle=True), None),
    "plain": (DataLoader(ROWS, 4), None),
    "batches themselves": (
        DataLoader([{"x": torch.ones(4, 2), "labels": torch.tensor([0, 1] * 2)}], None),
        None,
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_rows_that_an_evaluation_does_not_count_once(name, caplog):
    loader, line = LOADERS[name]
    model = Classifier()
    with caplog.at_level("INFO", logger="manualloop"):
        evaluate_loop(model, loader, "accuracy")
        evaluate_loop(model, loader, "accuracy")  # reported once
    found = [told for told in messages(caplog) if "this evaluation" in told]
    assert len(found) == (line is not None)
    assert line is None or line in found[0]


def test_rows_that_a_prediction_leaves_out(caplog):
    with caplog.at_level("INFO", logger="manualloop"):
        assert len(predict_loop(Classifier(), DataLoader(ROWS, 4, drop_last=True))) == 8
    assert any("3 of 11 rows are left out" in told for told in messages(caplog))
