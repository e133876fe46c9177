"""Metrics of probabilities: equal to scikit-learn, and NaN where they are not defined."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from manualloop import evaluate_loop, predict_loop
from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.metrics import load_metric


def rows(seed: int, num_classes: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities in float32, as of a softmax, some of them equal."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=(num_rows, num_classes)), rng.integers(0, 4))
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return scores.astype(np.float32), rng.integers(0, num_classes, num_rows)


@pytest.mark.filterwarnings("error")
def test_sets_of_rows_equal_scikit_learn() -> None:
    names = ("roc_auc", "average_precision", "log_loss")
    for seed in range(60):
        num_classes, num_rows = [2, 3, 5][seed % 3], [1, 3, 40][seed % 7 % 3]
        scores, right = rows(seed, num_classes, num_rows)
        found = {}
        for name in names:
            found |= load_metric(name).compute(predictions=scores, references=right)
        labels = np.arange(num_classes)
        one_hot = right[:, None] == labels
        occurs = one_hot[:, 1:2].any() if num_classes == 2 else one_hot.any(0).all()
        expected = {"roc_auc": math.nan, "average_precision": math.nan}
        if len(np.unique(right)) == num_classes:
            of_class = scores[:, 1] if num_classes == 2 else scores
            expected["roc_auc"] = sk.roc_auc_score(right, of_class, multi_class="ovr")
        if occurs:
            sides = (one_hot[:, 1], scores[:, 1]) if num_classes == 2 else (one_hot, scores)
            expected["average_precision"] = sk.average_precision_score(*sides)
        expected["log_loss"] = sk.log_loss(right, scores, labels=labels)
        assert found == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True), seed


@pytest.mark.parametrize("average", ["macro", "weighted", "micro", "samples"])
def test_several_labels_a_row_equal_scikit_learn(average: str) -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.random((50, 4)), rng.integers(0, 2, (50, 4))
    right[:, 1] = 1 - right[:, 0]  # for "samples" each row needs both kinds
    if average in ("micro", "samples"):
        right[:, 3] = 0  # a class without rows is none of their curves
    for name, function in (
        ("roc_auc", sk.roc_auc_score),
        ("average_precision", sk.average_precision_score),
    ):
        found = load_metric(name, average=average).compute(predictions=scores, references=right)
        expected = function(right, scores, average=average)
        assert found == pytest.approx({name: expected}, rel=0, abs=1e-12)
    found = load_metric("log_loss").compute(predictions=scores, references=right)
    mean = -(right * np.log(scores) + (1 - right) * np.log(1 - scores)).mean()
    assert found["log_loss"] == pytest.approx(mean, rel=1e-12)


def test_each_class_by_name_and_pairs_of_classes() -> None:
    scores, right = rows(1, 3, 60)
    metric = load_metric("roc_auc", average=None, names=["a", "b", "c"])
    found = metric.compute(predictions=scores, references=right)
    expected = {
        f"roc_auc_{name}": sk.roc_auc_score(right == i, scores[:, i])
        for i, name in enumerate("abc")
    }
    assert found == pytest.approx(expected)
    found = load_metric("roc_auc", multi_class="ovo").compute(predictions=scores, references=right)
    assert found["roc_auc"] == sk.roc_auc_score(right, scores, multi_class="ovo")
    metric = load_metric("average_precision", average=None)
    right[right == 2] = 0
    assert math.isnan(metric.compute(predictions=scores, references=right)["average_precision_2"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["roc_auc", "average_precision", "log_loss"])
def test_nan_stays_nan_and_batches_do_not_matter(name: str) -> None:
    scores, right = rows(5, 2, 30)
    expected = load_metric(name).compute(predictions=scores, references=right)
    metric = load_metric(name)
    for i in range(0, 30, 7):
        metric.add_batch(predictions=scores[i : i + 7], references=right[i : i + 7])
    assert metric.compute() == expected
    if name != "log_loss":
        metric = load_metric(name, average="micro")  # of two classes there is one curve
        nothing = metric.compute(predictions=scores, references=np.zeros(30, int))
        assert math.isnan(nothing[name])
    scores[3] = math.nan
    assert math.isnan(load_metric(name).compute(predictions=scores, references=right)[name])


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (np.zeros(4), [0, 1, 0, 1], r"got float64 of shape \(4,\).*logits\.softmax\(-1\)"),
        (np.zeros((4, 2), int), [0, 1, 0, 1], "got int64"),
        (np.zeros((4, 2)), [0, 1, 2, 1], r"2 classes and references from 0 to 2"),
        (np.zeros((4, 2)), np.zeros((4, 3), int), r"references of shape \(4, 3\)"),
        (np.zeros((2, 2)), ["a", "b"], r"beside str"),
    ],
)
def test_what_are_no_probabilities_is_refused(scores: Any, right: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        load_metric("roc_auc").compute(predictions=scores, references=right)


def test_options() -> None:
    with pytest.raises(ConfigError, match=r"takes names, average, max_fpr, multi_class"):
        load_metric("roc_auc", averaged="macro")
    scores, right = rows(1, 3, 20)
    with warnings.catch_warnings(), pytest.raises(MetricError, match="roc_auc cannot score"):
        load_metric("roc_auc", max_fpr=0.5).compute(predictions=scores, references=right)


def test_the_area_of_each_class_heeds_the_largest_rate_of_false_positives() -> None:
    generator = np.random.default_rng(0)
    scores = generator.dirichlet(np.ones(2), 50)
    references = generator.integers(0, 2, 50)
    found = load_metric("roc_auc", average=None, max_fpr=0.3).compute(
        predictions=scores, references=references
    )
    for label in range(2):
        expected = sk.roc_auc_score(references == label, scores[:, label], max_fpr=0.3)
        assert found[f"roc_auc_{label}"] == expected
        assert expected != sk.roc_auc_score(references == label, scores[:, label])


with_logits = torch.nn.functional.binary_cross_entropy_with_logits


class Sure(torch.nn.Module):
    """A model whose logits are its input, so that it may be as sure as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: Any, labels: Any) -> dict[str, Any]:
        if x.shape[1] == 1:
            x = torch.cat([torch.zeros_like(x), x], 1)
        is_one = labels.ndim == 1
        loss = torch.nn.functional.cross_entropy if is_one else with_logits
        return {"loss": loss(x, labels), "logits": x}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_which_a_model_is_very_sure_are_not_tied(dtype: Any) -> None:
    logits = torch.linspace(18, 34, 12)[torch.randperm(12)].to(dtype)
    right = (logits > 25).long()
    two = [{"x": logits[i : i + 5, None], "labels": right[i : i + 5]} for i in (0, 5, 10)]
    wide = torch.stack([logits, -logits, logits / 2], 1)
    many = [
        {"x": wide[i : i + 5], "labels": torch.stack([right, 1 - right, right], 1)[i : i + 5] * 1.0}
        for i in (0, 5, 10)
    ]
    got: list[Any] = []

    def area(y_true: Any, y_score: Any) -> float:
        got.append(y_score)
        return float(sk.roc_auc_score(y_true, y_score))

    for batches in (two, many):
        found = evaluate_loop(Sure(), batches, ["roc_auc", "average_precision", area])
        assert {found["roc_auc"], found["area"]} == {1.0}
        assert found["average_precision"] == pytest.approx(1, rel=1e-12)
        assert predict_loop(Sure(), batches).scores.dtype == np.float32  # type: ignore[union-attr]
    assert [scores.dtype for scores in got] == [np.float64] * 2


def test_a_log_loss_is_the_loss_however_sure_a_wrong_model_is() -> None:
    batches = [{"x": torch.tensor([[30.0], [28.0]]), "labels": torch.tensor([0, 1])}]
    found = evaluate_loop(Sure(), batches, "log_loss")
    assert found["log_loss"] == pytest.approx(found["loss"], rel=1e-6) == pytest.approx(15)
