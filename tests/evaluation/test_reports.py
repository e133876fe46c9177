"""Confusion matrices and reports by class: equal to scikit-learn, with names, aligned."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.forms import to_scores
from manualloop.evaluation.metrics import load_metric
from manualloop.evaluation.scorers import as_metric
from manualloop.types import Matrix, Scores

NAMES = ["no", "yes", "東京"]


def rows(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    right = rng.integers(0, 3, rng.choice([1, 2, 30]))
    if seed % 5 == 0:
        right[:] = 1
    return np.where(rng.random(len(right)) < 0.5, right, rng.integers(0, 3, len(right))), right


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 200), marks=pytest.mark.exhaustive)], ids=str
)
def test_reports_and_matrices_equal_scikit_learn(seeds: range) -> None:
    for seed in seeds:
        predicted, right = rows(seed)
        present = np.union1d(predicted, right)
        names = [NAMES[label] for label in present]
        expected: dict[str, float] = {}
        report = sk.classification_report(
            right, predicted, labels=present, target_names=names, output_dict=True, zero_division=0
        )
        for row, values in report.items():
            if isinstance(values, dict):
                expected |= {f"{row}_{column}": value for column, value in values.items()}
            else:
                expected[row] = values
        metric = load_metric("classification_report", names=NAMES)
        found = metric.compute(predictions=predicted, references=right)
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=0, abs=1e-12)
        absent = found.keys() - expected.keys()
        assert absent == {
            f"{name}_{column}"
            for name in set(NAMES) - set(names)
            for column in ("precision", "recall", "f1-score", "support")
        }
        assert all(found[key] == 0 for key in absent)
        if seed % 5 == 1:
            metric = load_metric("confusion_matrix", names=NAMES)
            scores = metric.compute(predictions=predicted, references=right)
            assert scores == {}
            matrix = scores.matrices["confusion_matrix"]
            assert matrix.rows == matrix.columns == tuple(NAMES)
            expected_matrix = sk.confusion_matrix(right, predicted, labels=[0, 1, 2])
            np.testing.assert_array_equal(matrix.values, expected_matrix)
            assert matrix.values.dtype == np.int64


def test_without_names_the_numbers_that_occur_are_listed() -> None:
    for name in ("confusion_matrix", "classification_report"):
        found = load_metric(name).compute(predictions=[7, 3], references=[7, 7])
        assert found.matrices[name].rows[:2] == ("3", "7")
    shares = load_metric("confusion_matrix", normalize="true")
    found = shares.compute(predictions=[0, 1, 1], references=[0, 0, 1])
    assert found.matrices["confusion_matrix"].values.tolist() == [[0.5, 0.5], [0.0, 1.0]]


def test_several_labels_a_row_equal_scikit_learn() -> None:
    right, predicted = np.random.default_rng(3).integers(0, 2, (2, 40, 3))
    report = sk.classification_report(
        right, predicted, target_names=NAMES, output_dict=True, zero_division=0
    )
    expected = {f"{row}_{c}": v for row, values in report.items() for c, v in values.items()}
    metric = load_metric("classification_report", names=NAMES)
    found = metric.compute(predictions=predicted, references=right)
    assert found == pytest.approx(expected, rel=0, abs=1e-12)
    with pytest.raises(MetricError, match="confusion_matrix got predictions of shape"):
        load_metric("confusion_matrix").compute(predictions=predicted, references=right)


def test_f1_of_each_class_and_other_options() -> None:
    predicted, right = rows(2)
    expected = sk.f1_score(right, predicted, average=None, labels=[0, 1, 2], zero_division=0)
    for metric in (
        load_metric("f1", average=None, names=NAMES),
        load_metric("f1/none", names=NAMES),
    ):
        found = metric.compute(predictions=predicted, references=right)
        assert found == {f"f1_{name}": value for name, value in zip(NAMES, expected, strict=True)}
    found = load_metric("f1", average="macro").compute(predictions=predicted, references=right)
    assert list(found) == ["f1_macro"]
    one = load_metric("precision", pos_label=0).compute(predictions=[0, 0, 1], references=[0, 1, 1])
    assert one == {"precision": 0.5}
    one = load_metric("recall", zero_division=1).compute(predictions=[0, 1], references=[0, 0])
    assert one == {"recall": 1.0}
    some = load_metric("f1/micro", labels=[1, 2]).compute(predictions=predicted, references=right)
    assert some["f1_micro"] == sk.f1_score(right, predicted, labels=[1, 2], average="micro")
    count = load_metric("accuracy", normalize=False).compute(predictions=[1, 1], references=[1, 1])
    assert count == {"accuracy": 2.0}
    both = load_metric("mse", multioutput="raw_values")
    found = both.compute(predictions=[[1.0, 2.0], [1.0, 2.0]], references=[[0.0, 0.0], [0.0, 0.0]])
    assert found == {"mse_0": 1.0, "mse_1": 4.0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("accuracy", {"average": "macro"}, r"does not take average: it takes normalize\."),
        ("f1", {"multiclass": True}, r"takes names, pos_label, zero_division"),
        ("glue/mrpc", {"average": "macro"}, r'takes no options\. Write load_metric\("glue/mrpc"\)'),
        ("pearson", {"method": "x"}, "takes no options"),
        ("perplexity", {"stride": 3}, "takes no options"),
        ("squad", {"n_best": 3}, "takes no options"),
    ],
)
def test_unknown_options_are_refused_when_the_metric_is_loaded(
    name: str, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_metric(name, **options)


def test_metrics_with_other_options_are_not_merged() -> None:
    with pytest.raises(ConfigError, match="Cannot merge"):
        load_metric("f1/macro", labels=[1]).merge(load_metric("f1/macro"))
    metric = load_metric("f1/macro", labels=[1]).fresh()
    assert metric.options == {"labels": [1]}


# What stands beside the scores --------------------------------------------------------------------


def test_scores_are_a_dict_that_keeps_what_is_not_one_number() -> None:
    scorer = as_metric(["f1", "confusion_matrix", "classification_report"], ["no", "yes"])
    scorer.add_batch(predictions=[1, 0], references=[1, 1])
    scores = scorer.compute()
    assert repr(scores) == repr(dict(scores))
    assert all(type(value) is float for value in scores.values())
    assert list(scores.matrices) == ["confusion_matrix", "classification_report"]
    for copied in (pickle.loads(pickle.dumps(scores)), copy.deepcopy(scores), copy.copy(scores)):
        assert type(copied) is Scores
        assert copied == scores
        assert copied.report() == scores.report()
        assert copied.model is None
    of_both = Scores(loss=1.0)
    of_both.add(scores, "matched_")
    assert "matched_f1" in of_both
    assert "matched_confusion_matrix" in of_both.matrices


def test_a_report_is_aligned_in_a_terminal() -> None:
    metric = load_metric("confusion_matrix", names=NAMES)
    scores = Scores(accuracy=0.5, loss=12.0)
    scores.add(metric.compute(predictions=[0, 2] * 60, references=[0, 1] * 60))
    scores.texts["note"] = "two\nlines\n"
    assert scores.report() == "\n".join(
        [
            "accuracy  0.5000",
            "loss      12.0000",
            "",
            "confusion_matrix",
            "true, predicted  no  yes  東京",
            "no               60    0     0",
            "yes               0    0    60",
            "東京              0    0     0",
            "",
            "note",
            "two",
            "lines",
        ]
    )
    assert Scores().report() == ""
    scores = Scores(f1=0.5, f1_low=0.25, f1_high=0.75, loss=1.0)
    assert scores.report() == "f1    0.5000  (0.2500 to 0.7500)\nloss  1.0000"
    metric = load_metric("classification_report", names=["no", "yes"])
    scores = Scores(f1=0.5)
    scores.add(metric.compute(predictions=[0] * 12, references=[0] * 9 + [1] * 3))
    assert scores.report() == "\n".join(
        [
            "f1        0.5000",
            "accuracy  0.7500",
            "",
            "classification_report",
            "              precision  recall  f1-score  support",
            "no               0.7500  1.0000    0.8571        9",
            "yes              0.0000  0.0000    0.0000        3",
            "macro avg        0.3750  0.5000    0.4286       12",
            "weighted avg     0.5625  0.7500    0.6429       12",
        ]
    )
    assert str(Matrix(np.array([[math.nan, 0.25]]), ("cafe\u0301",), ("a", "b"))) == (
        "        a       b\ncafe\u0301  nan  0.2500"
    )


def test_nested_results_are_flattened_and_texts_kept() -> None:
    result = {"cat": {"f1": np.float32(0.5)}, "all": [1, True], "hash": "roberta", "m": np.eye(2)}
    scores = to_scores("metric", result)
    assert scores == {"cat_f1": 0.5, "all_0": 1.0, "all_1": 1.0}
    assert scores.texts == {"hash": "roberta"}
    assert scores.matrices["m"].rows == ("0", "1")
    named = to_scores("confusion_matrix", np.eye(2), ["no", "yes"])
    assert named.matrices["confusion_matrix"].rows == ("no", "yes")


@pytest.mark.parametrize(
    ("metric", "names"),
    [
        (lambda names: load_metric("classification_report", names=names), ["macro avg", "yes"]),
        (lambda names: load_metric("classification_report", names=names), ["no", "no"]),
        (lambda names: load_metric("f1", average=None, names=names), ["no", "no"]),
        (lambda names: as_metric(partial(sk.f1_score, average=None), names), ["no", "no"]),
    ],
)
def test_two_rows_of_one_name_are_refused(metric: Any, names: list[str]) -> None:
    scorer = metric(names)
    scorer.add_batch(predictions=np.array([0, 1, 1]), references=np.array([0, 0, 1]))
    with pytest.raises(MetricError, match=f"are called '(f1_)?{names[0]}'"):
        scorer.compute()
