"""Functions as metrics: each is called as its parameters' names tell."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import helpers
import numpy as np
import pytest
import scipy.stats
import torch
from sklearn import metrics as sk
from torch.nn import functional

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.forms import Rows
from manualloop.evaluation.functions import Function

PREDICTED, RIGHT = np.array([1, 1, 1, 0, 2]), np.array([1, 0, 0, 0, 2])
SCORES = np.array([[0.2, 0.8], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
OF_TWO = np.array([1, 0, 0, 0])


def score(function: Any, predictions: Any, references: Any) -> Any:
    metric = Function(function)
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add_batch(predictions=predictions[2:], references=references[2:])
    return metric.compute()


@pytest.mark.parametrize(
    ("function", "takes", "expected"),
    [
        (partial(sk.precision_score, average="macro"), "classes",
         sk.precision_score(RIGHT, PREDICTED, average="macro")),
        (partial(sk.fbeta_score, beta=2, average="micro"), "classes",
         sk.fbeta_score(RIGHT, PREDICTED, beta=2, average="micro")),
        (sk.cohen_kappa_score, "classes", sk.cohen_kappa_score(RIGHT, PREDICTED)),
        (sk.adjusted_rand_score, "classes", sk.adjusted_rand_score(RIGHT, PREDICTED)),
        (sk.make_scorer(sk.recall_score, average="macro"), "classes",
         sk.recall_score(RIGHT, PREDICTED, average="macro")),
        (sk.mean_absolute_percentage_error, "values",
         sk.mean_absolute_percentage_error(RIGHT, PREDICTED)),
        (sk.r2_score, "values", sk.r2_score(RIGHT, PREDICTED)),
    ],
)  # fmt: skip
def test_functions_of_scikit_learn_get_references_first(
    function: Any, takes: str, expected: float
) -> None:
    assert Function(function).takes == takes
    (value,) = score(function, PREDICTED, RIGHT).values()
    assert value == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (sk.roc_auc_score, sk.roc_auc_score(OF_TWO, SCORES[:, 1])),
        (sk.average_precision_score, sk.average_precision_score(OF_TWO, SCORES[:, 1])),
        (sk.brier_score_loss, sk.brier_score_loss(OF_TWO, SCORES[:, 1])),
        (sk.log_loss, sk.log_loss(OF_TWO, SCORES)),
        (sk.get_scorer("neg_log_loss"), -sk.log_loss(OF_TWO, SCORES)),
        (sk.get_scorer("roc_auc"), sk.roc_auc_score(OF_TWO, SCORES[:, 1])),
    ],
)
def test_functions_of_probabilities_get_those_of_the_second_class(
    function: Any, expected: float
) -> None:
    assert Function(function).takes == "scores"
    (value,) = score(function, SCORES, OF_TWO).values()
    assert value == expected


def test_probabilities_of_more_classes() -> None:
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(4), 30)
    right = rng.integers(0, 3, 30)  # class 3 does not occur
    found = score(sk.log_loss, scores, right)
    assert found == {"log_loss": sk.log_loss(right, scores, labels=[0, 1, 2, 3])}
    found = score(partial(sk.top_k_accuracy_score, k=2), scores, right)
    assert found["top_k_accuracy_score"] == sk.top_k_accuracy_score(
        right, scores, k=2, labels=[0, 1, 2, 3]
    )
    with pytest.raises(MetricError, match=r"roc_auc_score cannot score .*multi_class"):
        score(sk.roc_auc_score, scores, right)


def test_reports_and_matrices_of_scikit_learn() -> None:
    with pytest.raises(MetricError, match=r"returned a text.*output_dict=True"):
        score(sk.classification_report, PREDICTED, RIGHT)
    found = score(partial(sk.classification_report, output_dict=True), PREDICTED, RIGHT)
    expected = sk.classification_report(RIGHT, PREDICTED, output_dict=True)
    assert found["macro avg_f1-score"] == expected["macro avg"]["f1-score"]
    metric = Function(sk.confusion_matrix)
    metric.names = ["no", "yes", "perhaps", "never"]
    metric.add_batch(predictions=PREDICTED, references=RIGHT)
    matrix = metric.compute().matrices["confusion_matrix"]
    assert matrix.rows == ("no", "yes", "perhaps")
    np.testing.assert_array_equal(matrix.values, sk.confusion_matrix(RIGHT, PREDICTED))


def test_a_matrix_of_chosen_classes_has_their_names_in_their_order() -> None:
    metric = Function(partial(sk.confusion_matrix, labels=[2, 0, 1]))
    metric.names = ["no", "yes", "perhaps"]
    metric.add_batch(predictions=PREDICTED, references=RIGHT)
    matrix = metric.compute().matrices["confusion_matrix"]
    assert matrix.rows == matrix.columns == ("perhaps", "no", "yes")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (sk.precision_recall_fscore_support, ("precision", "recall", "fscore", "support")),
        (sk.homogeneity_completeness_v_measure, ("homogeneity", "completeness", "v_measure")),
    ],
)
@pytest.mark.parametrize("average", [None, "macro", "micro"])
def test_several_numbers_of_scikit_learn_have_their_names(
    function: Any, expected: tuple[str, ...], average: str | None
) -> None:
    has_average = function is sk.precision_recall_fscore_support
    function = partial(function, average=average) if has_average else function
    metric = Function(function)
    metric.names = ["no", "yes", "perhaps"]
    metric.add_batch(predictions=PREDICTED, references=RIGHT)
    wanted = {}
    for key, part in zip(expected, function(RIGHT, PREDICTED), strict=True):
        if has_average and average is None:
            wanted |= {f"{key}_{n}": v for n, v in zip(metric.names, part, strict=True)}
        elif part is not None:
            wanted[key] = part
    assert metric.compute() == wanted


def test_likelihood_ratios_have_their_names() -> None:
    found = score(sk.class_likelihood_ratios, np.array([1, 1, 0, 0]), np.array([1, 0, 0, 1]))
    assert found == {"positive_likelihood_ratio": 1.0, "negative_likelihood_ratio": 1.0}


def test_areas_of_classes_have_their_names() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.dirichlet(np.ones(3), 30), rng.integers(0, 3, 30)
    function = partial(sk.roc_auc_score, average=None, multi_class="ovr")
    metric = Function(function)
    metric.names = ["no", "yes", "perhaps"]
    metric.add_batch(predictions=scores, references=right)
    areas = function(right, scores).tolist()
    assert metric.compute() == dict(
        zip([f"roc_auc_score_{name}" for name in metric.names], areas, strict=True)
    )


def test_a_positive_label_of_0_is_scored_by_its_own_probability() -> None:
    for function in (sk.average_precision_score, sk.brier_score_loss):
        found = score(partial(function, pos_label=0), SCORES, OF_TWO)
        assert list(found.values()) == [function(OF_TWO, SCORES[:, 0], pos_label=0)]


@pytest.mark.parametrize("function", [sk.d2_absolute_error_score, sk.d2_pinball_score])
def test_every_error_of_scikit_learn_gets_values(function: Any) -> None:
    assert Function(function).takes == "values"
    values = np.array([0.5, 1.0, 2.5, 2.0]), np.array([0.0, 1.0, 2.0, 2.0])
    assert list(score(function, *values).values()) == [function(values[1], values[0])]


@pytest.mark.parametrize(
    "function",
    [
        functional.cross_entropy,
        functional.binary_cross_entropy_with_logits,
        functional.nll_loss,
        functional.kl_div,
        functional.hinge_embedding_loss,
        torch.nn.BCEWithLogitsLoss(),
        torch.nn.CrossEntropyLoss(),
        torch.nn.MultiMarginLoss(),
    ],
)
def test_losses_of_logits_are_no_metrics(function: Any) -> None:
    with pytest.raises(ConfigError, match="scores logits, and a metric gets predictions"):
        Function(function)


def test_functions_of_torchmetrics_for_more_classes_get_all_of_two() -> None:
    from torchmetrics.functional.classification import binary_auroc, multiclass_auroc

    area = sk.roc_auc_score(OF_TWO, SCORES[:, 1])
    found = score(partial(multiclass_auroc, num_classes=2), SCORES, OF_TWO)
    assert found == {"multiclass_auroc": pytest.approx(area)}
    assert score(binary_auroc, SCORES, OF_TWO) == {"binary_auroc": pytest.approx(area)}


def test_tuples_are_named_by_their_fields_or_numbered() -> None:
    class Found(NamedTuple):
        share: float
        number: int

    assert score(lambda p, r: Found(0.5, 3), PREDICTED, RIGHT) == {
        "metric_share": 0.5,
        "metric_number": 3.0,
    }
    assert score(lambda p, r: (0.5, np.float32(3)), PREDICTED, RIGHT) == {
        "metric_0": 0.5,
        "metric_1": 3.0,
    }
    assert set(score(scipy.stats.pearsonr, PREDICTED, RIGHT)) == {
        "pearsonr_statistic",
        "pearsonr_pvalue",
    }
    with pytest.raises(MetricError, match="gave tuple of 3 entries"):  # the points of a curve
        score(sk.roc_curve, SCORES, OF_TWO)


@pytest.mark.parametrize("function", [sk.silhouette_score, sk.auc, sk.hinge_loss])
def test_functions_of_scikit_learn_that_score_something_else_are_refused(function: Any) -> None:
    with pytest.raises(ConfigError, match="are no predictions and references"):
        Function(function)


# The user's own -----------------------------------------------------------------------------------


def documented(predictions, references):
    return float(np.mean(predictions) - np.mean(references))


def plain(p, r):
    return documented(p, r)


def reversed_names(y_true, y_pred):
    return documented(y_pred, y_true)


def labels_first(labels, preds, scale=1):
    return scale * documented(preds, labels)


def with_kept(targets, outputs, *, kept):
    return documented(outputs, targets) + len(kept["id"])


@pytest.mark.parametrize(
    ("function", "more"),
    [
        *((one, 0) for one in (documented, plain, reversed_names, labels_first)),
        (partial(labels_first, scale=1), 0),
        (lambda a, b: documented(a, b), 0),
    ],
)
def test_functions_are_called_in_the_order_of_their_parameters(function: Any, more: int) -> None:
    (value,) = score(function, PREDICTED, RIGHT).values()
    assert value == documented(PREDICTED, RIGHT) + more
    assert Function(function).takes == "rows"


def test_kept_columns_are_passed_by_name() -> None:
    metric = Function(with_kept)
    for _ in range(2):
        metric.add_batch(predictions=PREDICTED, references=RIGHT, kept={"id": list("abcde")})
    assert metric.takes_kept
    assert metric.compute() == {"with_kept": documented(PREDICTED, RIGHT) + 10}


def test_functions_of_objects_get_lists() -> None:
    def same(predictions, references):
        assert type(predictions) is type(references) is list
        return sum(p == r for p, r in zip(predictions, references, strict=True))

    metric = Function(same)
    for rows in (["a", "b"], ["c"]):
        metric.add_batch(predictions=Rows(rows), references=Rows(["a", "x"][: len(rows)]))
    assert metric.compute() == {"same": 1.0}


def test_a_parameter_for_probabilities_gets_them() -> None:
    def mean_score(y_true, y_score):
        return float(y_score[y_true == 1].mean())

    assert Function(mean_score).takes == "scores"
    assert score(mean_score, SCORES, OF_TWO) == {"mean_score": 0.8}


@pytest.mark.parametrize(
    "function",
    [
        lambda true_labels, pred_labels: {"first": pred_labels[0], "second": true_labels[0]},
        lambda y_test, val_preds: {"first": val_preds[0], "second": y_test[0]},
        lambda label_list, y_hat: {"first": y_hat[0], "second": label_list[0]},
        lambda test_labels, predicted_classes: {
            "first": predicted_classes[0],
            "second": test_labels[0],
        },
        lambda a, b: {"first": a[0], "second": b[0]},
    ],
)
def test_words_in_the_names_of_parameters_tell_their_order(function: Any) -> None:
    found = score(function, np.array([3, 0]), np.array([5, 0]))
    assert found == {"first": 3.0, "second": 5.0}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda labels, x: 0.0, r"metric takes labels and x, .*Rename them: def metric\(pred"),
        (lambda x, preds: 0.0, r"takes x and preds"),
        (lambda eval_pred: 0.0, r"metric cannot be called with two arguments"),
        (lambda a, b, c: 0.0, r"cannot be called with two arguments \(missing a required"),
    ],
)
def test_functions_whose_order_is_not_clear_are_refused(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Function(function)


class Keeping:
    """A metric that keeps what it gets, under names that tell nothing."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def __call__(self, a: Any, b: Any) -> float:
        self.kept += [*a.tolist(), *b.tolist()]
        return float(len(self.kept))


def test_a_metric_with_a_state_gets_each_row_once():
    metric = Function(keeping := Keeping())
    for number in (1, 2):
        metric.add_batch(predictions=np.array([1, 1]), references=np.array([1, 0]))
        assert metric.compute() == {"Keeping": 4.0 * number}
    assert keeping.kept == [1, 1, 1, 0] * 2


ASKS = "logits, probs, y_pred_probs, pred_proba, scores, y_scores, confidences, softmax_out, Score"


def test_names_that_ask_for_more_than_predictions_are_refused():
    for name in ASKS.split(", "):
        for first_two in (f"{name}, labels", f"{name}, b"):
            function = eval(f"lambda {first_two}: 0.0")
            with pytest.raises(ConfigError, match=f"a parameter '{name}', and gets class numbers"):
                Function(function).require_predictions()
    for names in ("pred_scores, true_scores", "predictions, true_score", "y_true, y_score", "p, r"):
        Function(eval(f"lambda {names}: 0.0")).require_predictions()


def test_an_order_that_no_name_tells_is_reported_where_it_matters(caplog):
    """Called in both orders: in one, and that of the names, where they tell one."""

    def score(function):
        caplog.clear()
        for _ in range(3):
            metric = Function(function)
            metric.add_batch(predictions=np.array([1, 1, 0, 1]), references=np.array([1, 0, 0, 1]))
            metric.compute()
        return helpers.messages(caplog)

    (line,) = score(lambda a, b: float(a[b == 1].mean()))
    assert "metric gets predictions as a and references as b" in line
    assert "(1, 0.6667)" in line
    (line,) = score(lambda x, y_: {"same": float((x == y_).mean()), "bias": float((x - y_).mean())})
    assert "predictions as x and references as y_" in line

    def by_name(y_true, y_pred):
        return float(y_pred[y_true == 1].mean())

    silent = (
        by_name,
        lambda a, b: float((a == b).mean()),
        lambda a, b: float(np.random.rand()),
        lambda p, r: float(p[r == 1].mean()),
        lambda a, references: float(a[references == 1].mean()),
        lambda a, b: float(np.corrcoef(a, b)[0, 1]),
    )
    for function in silent:
        assert score(function) == []
