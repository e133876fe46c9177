"""Losses that a module of one's own returns: those that depend on the split are reported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_bert
from torch import Tensor, nn

from manualloop import evaluate_loop, train_loop

TOLD = "depends on how rows are split"
generator = torch.Generator().manual_seed(2)
X = torch.randn(8, 3, generator=generator)
CLASSES = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
TOKENS = torch.randint(0, 3, (8, 5), generator=generator)
TOKENS[0, 1:], TOKENS[5, 2:] = -100, -100


class Net(nn.Module):
    """A module that returns the loss that it is given."""

    def __init__(self, loss: Any, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout, self.loss = nn.Linear(3, width), nn.Dropout(0.3), loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.dropout(self.layer(x))
        return {"loss": self.loss(logits, labels), "logits": logits}


def by_token(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, whose logits are those of its row."""
    wide = logits[:, :, None].expand(-1, -1, labels.shape[1])
    return F.cross_entropy(wide, labels, reduction="none", ignore_index=-100)


def of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return by_token(logits, labels).sum(1).mean()


def of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return by_token(logits, labels).sum() / (labels != -100).sum()


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 9.0, 1.0]))


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))


def broadcast(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits[:, :1] - labels).square().mean()  # (rows, 1) beside (rows,)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1) + 0.5


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def noisy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits + torch.randn_like(logits), labels)


def batches(labels: Tensor, size: int = 4) -> list[dict[str, Tensor]]:
    return [{"x": X[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(X), size)]


def train(model: nn.Module, labels: Tensor, window: int = 2) -> Any:
    return train_loop(
        model,
        batches(labels),
        torch.optim.SGD(model.parameters(), lr=0.1),
        num_epochs=2,
        gradient_accumulation_steps=window,
        progress_bar=False,
    )


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (weighted, CLASSES),
        (summed, CLASSES),
        (contrastive, CLASSES),
        (broadcast, CLASSES),
        (of_rows, TOKENS),
    ],
)
def test_a_loss_that_depends_on_the_split_is_told_once(
    loss: Any, labels: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net(loss)
    train(model, labels, window=1)  # nothing is split
    assert TOLD not in caplog.text
    train(model, labels)
    train(model, labels)
    evaluate_loop(model, batches(labels))
    assert caplog.text.count(TOLD) == 1
    caplog.clear()
    found = [evaluate_loop(Net(loss), batches(labels, size))["loss"] for size in (8, 4)]
    assert abs(found[0] - found[1]) > 1e-3
    assert TOLD in caplog.text


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (F.cross_entropy, CLASSES),
        (smoothed, CLASSES),
        (focal, CLASSES),
        (noisy, CLASSES),
        (of_tokens, TOKENS),
        (F.binary_cross_entropy_with_logits, F.one_hot(CLASSES, 3).float()),
    ],
)
def test_a_loss_that_does_not_is_not_told(
    loss: Any, labels: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    train(Net(loss), labels)
    evaluate_loop(Net(loss), batches(labels))
    assert TOLD not in caplog.text


def test_the_trial_leaves_no_trace() -> None:
    class Counted(Net):
        def __init__(self) -> None:
            super().__init__(F.cross_entropy)
            self.register_buffer("number", torch.zeros(()))

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            self.number += 1
            return super().forward(x, labels)

    tried = Counted()
    known = copy.deepcopy(tried)
    evaluate_loop(known, batches(CLASSES))  # which tries it
    known.number.zero_()
    for model in (tried, known):
        torch.manual_seed(1)
        train(model, CLASSES)
    assert tried.number == known.number == 4
    assert all(map(torch.equal, tried.parameters(), known.parameters()))


def test_a_loss_of_transformers_is_not_tried() -> None:
    calls, model = [], tiny_bert()
    model.register_forward_hook(lambda *call: calls.append(1))
    ids = torch.full((4, 3), 5)
    evaluate_loop(model, [{"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}])
    assert len(calls) == 1
