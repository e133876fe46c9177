"""torchmetrics: each metric is given what its kind takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from manualloop import evaluate_loop
from manualloop.errors import ConfigError
from manualloop.evaluation.scorers import as_metric
from manualloop.evaluation.torch_metrics import TorchMetric

torchmetrics = pytest.importorskip("torchmetrics")
LABELS = torch.tensor([0, 1, 1, 0, 1])
LOGITS = torch.tensor([[2.0, 0], [0, 1], [1, 0.5], [3, 0], [0, 2]])


class Affine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": x + self.bias}


@pytest.mark.parametrize(
    ("metric", "takes"),
    [
        (lambda: torchmetrics.Accuracy(task="binary"), "classes"),
        (lambda: torchmetrics.AUROC(task="binary"), "scores"),
        (lambda: torchmetrics.AUROC(task="multiclass", num_classes=3), "scores"),
        (lambda: torchmetrics.CalibrationError(task="binary"), "scores"),
        (lambda: torchmetrics.Accuracy(task="multiclass", num_classes=3, top_k=2), "scores"),
        (lambda: torchmetrics.Accuracy(task="multiclass", num_classes=3, top_k=1), "classes"),
        (lambda: torchmetrics.MeanSquaredError(), "values"),
        (lambda: torchmetrics.text.CharErrorRate(), "rows"),
        (
            lambda: torchmetrics.ClasswiseWrapper(
                torchmetrics.AUROC("multiclass", num_classes=3, average=None)
            ),
            "scores",
        ),
        (
            lambda: torchmetrics.MetricCollection(
                [torchmetrics.Accuracy("binary"), torchmetrics.AUROC("binary")]
            ),
            "scores",
        ),
    ],
)
def test_what_a_metric_takes(metric: Any, takes: str) -> None:
    assert TorchMetric(metric()).takes == takes


def test_a_collection_of_different_things_is_refused() -> None:
    both = torchmetrics.MetricCollection(
        [torchmetrics.Accuracy("binary"), torchmetrics.MeanSquaredError()]
    )
    with pytest.raises(ConfigError, match=r"different things: classes, values\. Pass them as"):
        as_metric(both)


def test_classes_and_probabilities_in_one_pass() -> None:
    batches = [{"x": LOGITS[i : i + 2], "labels": LABELS[i : i + 2]} for i in (0, 2, 4)]
    metrics = ["accuracy", "roc_auc", torchmetrics.AUROC("binary"), torchmetrics.F1Score("binary")]
    found = evaluate_loop(Affine(), batches, metrics)
    scores = LOGITS.softmax(-1)[:, 1]
    expected = torchmetrics.functional.auroc(scores, LABELS, task="binary")
    assert found["binary_auroc"] == pytest.approx(float(expected))
    assert found["roc_auc"] == pytest.approx(float(expected))
    assert found["accuracy"] == 0.8
    assert found["binary_f1_score"] == pytest.approx(0.8)


def test_confusion_matrices_are_named() -> None:
    scorer = as_metric(torchmetrics.ConfusionMatrix("multiclass", num_classes=2), ["no", "yes"])
    scorer.add_batch(predictions=torch.tensor([0, 1]), references=torch.tensor([1, 1]))
    scores = scorer.compute()
    matrix = scores.matrices["multiclass_confusion_matrix"]
    assert matrix.rows == ("no", "yes")
    np.testing.assert_array_equal(matrix.values, [[0, 0], [1, 1]])


def test_texts_and_rows_with_names() -> None:
    scorer = as_metric(torchmetrics.text.CharErrorRate())
    scorer.add_batch(predictions=["abc"], references=["abd"])
    assert scorer.compute() == {"char_error_rate": pytest.approx(1 / 3)}

    class Boxes:
        def update(self, predictions: Any, references: Any) -> None:
            self.seen = [*predictions, *references]

        def compute(self) -> float:
            return float(all(isinstance(row["boxes"], torch.Tensor) for row in self.seen))

        def reset(self) -> None:
            self.seen: list[Any] = []

    scorer = as_metric(Boxes())
    row = {"boxes": [[0.0, 0, 1, 1]]}
    scorer.add_batch(predictions=[row], references=[row])
    assert scorer.compute() == {"boxes": 1.0}


class Recall(torchmetrics.Metric):  # type: ignore[misc,name-defined]
    """A metric whose ``update`` takes references first, as its names tell."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), "sum")
        self.add_state("number", torch.tensor(0), "sum")

    def update(self, target: Any, preds: Any) -> None:
        self.right += ((preds == 1) & (target == 1)).sum()
        self.number += (target == 1).sum()
        target[:] = preds[:] = 0

    def compute(self) -> Any:
        return self.right / self.number


def test_update_is_called_in_the_order_of_its_parameters() -> None:
    """And may change what it gets: the metric after it has rows of its own."""
    predictions, references = np.array([1, 1, 1, 0]), np.array([1, 0, 0, 1])
    scorer = as_metric([Recall(), "accuracy"])
    scorer.add_batch(predictions=predictions, references=references)
    assert scorer.compute() == {"recall": 0.5, "accuracy": 0.25}
    both = torchmetrics.MetricCollection([Recall(), torchmetrics.text.BLEUScore()])
    with pytest.raises(ConfigError, match="takes references first"):
        as_metric(both)
