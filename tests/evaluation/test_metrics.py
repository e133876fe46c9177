"""Metrics: equal to scikit-learn, SciPy and the hub's GLUE formulae, however the rows arrive."""

from __future__ import annotations

import math
import pickle
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation import metrics as metrics
from manualloop.evaluation.metrics import Metric, load_metric

NUM_CLASSES = {"mnli": 3, "mnli_matched": 3, "mnli_mismatched": 3, "hans": 3}
GLUE = [
    *("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_matched", "mnli_mismatched"),
    *("qnli", "rte", "wnli", "hans"),
]


def glue_script(config: str, preds: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The hub's formulae, written out."""
    if config == "cola":
        return {"matthews_correlation": sk.matthews_corrcoef(labels, preds)}
    if config == "stsb":
        return {"pearson": pearsonr(preds, labels)[0], "spearmanr": spearmanr(preds, labels)[0]}
    accuracy = (preds == labels).mean()
    if config in ("mrpc", "qqp"):
        return {"accuracy": accuracy, "f1": sk.f1_score(y_true=labels, y_pred=preds)}
    return {"accuracy": accuracy}


def make_rows(config: str, num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if config == "stsb":
        references = np.round(rng.uniform(0, 5, num_rows), 1)  # rounded: spearman meets ties
        return references + rng.normal(size=num_rows), references
    references = rng.integers(0, NUM_CLASSES.get(config, 2), num_rows)
    is_wrong = rng.random(num_rows) < 0.3
    return np.where(is_wrong, rng.permutation(references), references), references


def split(rows: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(rows, sorted(min(cut, len(rows)) for cut in cuts))


def score(metric: Any, predictions: Any, references: Any, cuts: list[int]) -> dict[str, float]:
    for p, r in zip(split(predictions, cuts), split(references, cuts), strict=True):
        metric.add_batch(predictions=p, references=r)
    return metric.compute()


def assert_scores(scores: dict[str, float], expected: dict[str, float]) -> None:
    assert list(scores) == list(expected)
    assert all(type(value) is float for value in scores.values())
    assert scores == pytest.approx(expected, rel=0, abs=1e-12, nan_ok=True)


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", GLUE)
@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(2, 300),
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 300), max_size=12),
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_glue_equals_the_hubs_formulae(
    config: str, num_rows: int, seed: int, cuts: list[int]
) -> None:
    predictions, references = make_rows(config, num_rows, seed)
    expected = glue_script(config, predictions, references)
    assert_scores(score(load_metric("glue", config), predictions, references, cuts), expected)
    assert_scores(score(load_metric(f"glue/{config}"), predictions, references, []), expected)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("name", ["f1", "precision", "recall"])
def test_averages_equal_sklearn(name: str, average: str) -> None:
    rng = np.random.default_rng(1)
    predictions, references = rng.integers(0, 5, 200), rng.integers(0, 4, 200)
    function = getattr(sk, f"{name}_score")
    expected = function(references, predictions, average=average, zero_division=0)
    for metric in (load_metric(name, average), load_metric(f"{name}/{average}")):
        scores = score(metric, predictions, references, [7, 90])
        assert_scores(scores, {f"{name}_{average}": expected})


@pytest.mark.parametrize("name", ["f1", "precision", "recall"])
def test_binary_equals_sklearn(name: str) -> None:
    predictions, references = make_rows("mrpc", 150, 2)
    expected = getattr(sk, f"{name}_score")(references, predictions)
    assert 0 < expected < 1
    assert_scores(score(load_metric(name), predictions, references, [3, 77]), {name: expected})


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", "samples"])
def test_multi_label_rows_equal_sklearn(average: str) -> None:
    rng = np.random.default_rng(3)
    predictions, references = rng.integers(0, 2, (2, 300, 4))
    expected = sk.f1_score(references, predictions, average=average, zero_division=0)
    metric = load_metric("f1", average)
    assert_scores(score(metric, predictions, references, [1, 9]), {f"f1_{average}": expected})
    exact = {"accuracy": (predictions == references).all(axis=1).mean()}
    assert_scores(score(load_metric("accuracy"), predictions, references, [200]), exact)


def test_plain_metrics_equal_sklearn_and_scipy() -> None:
    classes = make_rows("mnli", 99, 4)
    numbers = make_rows("stsb", 99, 4)
    expected = [
        ("accuracy", classes, "accuracy", (classes[0] == classes[1]).mean()),
        ("matthews_correlation", classes, None, sk.matthews_corrcoef(*classes)),
        ("pearson", numbers, None, pearsonr(*numbers)[0]),
        ("pearsonr", numbers, "pearson", pearsonr(*numbers)[0]),
        ("spearman", numbers, "spearmanr", spearmanr(*numbers)[0]),
        ("spearmanr", numbers, None, spearmanr(*numbers)[0]),
        ("mse", numbers, None, ((numbers[0] - numbers[1]) ** 2).mean()),
        ("mae", numbers, None, abs(numbers[0] - numbers[1]).mean()),
    ]
    for name, rows, key, value in expected:
        assert_scores(score(load_metric(name), *rows, [10, 11]), {key or name: value})


def test_several_outputs_a_row_for_errors() -> None:
    predictions, references = np.random.default_rng(5).normal(size=(2, 20, 3))
    expected = {"mse": ((predictions - references) ** 2).mean()}
    assert_scores(score(load_metric("mse"), predictions, references, [4]), expected)


# Undefined scores: no warning (warnings are errors here), nothing hidden --------------------------


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("f1", [0, 0], [0, 0], {"f1": 0.0}),
        ("precision", [0, 0], [0, 1], {"precision": 0.0}),
        ("recall/macro", [0, 0], [0, 2], {"recall_macro": 0.5}),
        ("f1/samples", [[0, 0], [0, 1]], [[0, 0], [0, 1]], {"f1_samples": 0.5}),
        ("glue/cola", [1, 1], [1, 1], {"matthews_correlation": 0.0}),
        ("glue/stsb", [1.0, 1.0], [1.0, 2.0], {"pearson": math.nan, "spearmanr": math.nan}),
        ("glue/stsb", [1.0], [1.0], {"pearson": math.nan, "spearmanr": math.nan}),
        ("pearson", [1.0, math.nan, 3.0], [1.0, 2.0, 3.0], {"pearson": math.nan}),
        ("mse", [math.nan, 1.0], [0.0, 1.0], {"mse": math.nan}),
        ("mae", [math.inf, 1.0], [0.0, 1.0], {"mae": math.nan}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_undefined_scores(name: str, predictions: Any, references: Any, expected: Any) -> None:
    assert_scores(
        load_metric(name).compute(predictions=predictions, references=references), expected
    )


# The accumulator ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda rows: rows.tolist(),
        lambda rows: rows.astype(np.uint8),
        lambda rows: rows.astype(bool),
        torch.tensor,
        lambda rows: torch.tensor(rows, dtype=torch.bool),
        lambda rows: [np.bool_(row) for row in rows],
        lambda rows: [torch.tensor(row) for row in rows],
    ],
)
def test_takes_lists_arrays_and_tensors(convert: Any) -> None:
    predictions, references = make_rows("mrpc", 40, 6)
    metric = load_metric("glue", "mrpc")
    scores = metric.compute(predictions=convert(predictions), references=convert(references))
    assert_scores(scores, glue_script("mrpc", predictions, references))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_takes_float_tensors_that_require_grad(dtype: torch.dtype) -> None:
    predictions = torch.tensor([0.5, 1.5, 4.0], dtype=dtype, requires_grad=True)
    scores = load_metric("mse").compute(predictions=predictions, references=[0.5, 1.0, 3.0])
    assert_scores(scores, {"mse": (0.25 + 1.0) / 3})


def test_moves_tensors_to_the_cpu() -> None:
    class OnAccelerator:
        """Answers as a CUDA tensor does: no numpy before cpu(), no cpu() before detach()."""

        def __len__(self) -> int:
            return 2

        def detach(self) -> Any:
            return SimpleNamespace(cpu=lambda: torch.tensor([0, 1]))

        def numpy(self) -> np.ndarray:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    scores = load_metric("accuracy").compute(predictions=OnAccelerator(), references=[0, 0])
    assert scores == {"accuracy": 0.5}


def test_compute_resets_also_when_it_fails() -> None:
    metric = load_metric("f1")
    assert metric.compute(predictions=[1, 0], references=[1, 0]) == {"f1": 1.0}
    assert metric.compute(predictions=[0, 1], references=[1, 0]) == {"f1": 0.0}
    with pytest.raises(MetricError, match="f1/macro"):
        metric.compute(predictions=[0, 2], references=[1, 0])
    assert metric.compute(predictions=[1, 0], references=[1, 0]) == {"f1": 1.0}


def test_compute_adds_to_what_was_added_before() -> None:
    metric = load_metric("accuracy")
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute(predictions=[1, 1, 1], references=[0, 0, 0]) == {"accuracy": 0.25}


@pytest.mark.parametrize("name", ["accuracy", "mse"])
def test_rows_are_copied(name: str) -> None:
    metric, buffer = load_metric(name), np.array([1, 1])
    metric.add_batch(predictions=buffer, references=[1, 1])
    buffer[:] = 0
    assert metric.compute() == {name: 1.0 if name == "accuracy" else 0.0}


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation", "f1/macro"])
def test_class_scores_do_not_depend_on_order_or_batches_to_the_last_bit(name: str) -> None:
    predictions, references = make_rows("mrpc", 20_000, 7)
    order = np.random.default_rng(8).permutation(20_000)
    once = score(load_metric(name), predictions, references, [])
    assert score(load_metric(name), predictions, references, list(range(0, 20_000, 13))) == once
    assert score(load_metric(name), predictions[order], references[order], [4095, 4096]) == once


@pytest.mark.parametrize("num_labels", [None, 3])
def test_class_metrics_keep_no_more_rows_the_longer_they_run(num_labels: int | None) -> None:
    metric = Metric("accuracy")
    shape = (32,) if num_labels is None else (32, num_labels)
    rng, peaks = np.random.default_rng(9), []
    for _ in range(2):
        peak = 0
        for _ in range(1000):
            predictions, references = rng.integers(0, 2, (2, *shape))
            metric.add_batch(predictions=predictions, references=references)
            peak = max(peak, sum(map(len, metric._rows)))
        peaks.append(peak)
    assert peaks[0] == peaks[1] <= 4096 + 64
    assert metric._num_rows == 64_000
    assert len(pickle.dumps(metric)) < 2 * 4096 * 8 * 2 * (num_labels or 1)


def test_continuous_metrics_keep_16_bytes_a_row() -> None:
    metric = Metric("pearson")
    for _ in range(2000):
        metric.add_batch(predictions=np.ones(8, np.float32), references=np.ones(8))
    assert sum(rows.nbytes for rows in metric._rows) == 16 * 16_000


def test_many_distinct_rows_are_not_sorted_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    num_sorted = []

    def count(metric: Metric) -> None:
        num_sorted.append(sum(map(len, metric._rows)))
        fold(metric)

    fold = Metric._fold
    monkeypatch.setattr(metrics, "_FOLD_AT", 100)
    monkeypatch.setattr(Metric, "_fold", count)
    predictions, references = np.random.default_rng(10).integers(0, 2, (2, 10_000, 24))
    scores = score(load_metric("f1/micro"), predictions, references, list(range(0, 10_000, 100)))
    assert_scores(scores, {"f1_micro": sk.f1_score(references, predictions, average="micro")})
    assert sum(num_sorted) < 4 * 10_000  # 505_000 if every hundred rows were folded at once


@pytest.mark.parametrize("name", ["glue/mrpc", "glue/stsb"])
def test_merge_equals_one_metric_and_survives_pickling(name: str) -> None:
    config = name.partition("/")[2]
    predictions, references = make_rows(config, 500, 11)
    ranks = [load_metric(name) for _ in range(3)]  # the third rank gets no rows
    for rank, rows in ((0, slice(0, 200)), (1, slice(200, 500))):
        ranks[rank].add_batch(predictions=predictions[rows], references=references[rows])
    first = pickle.loads(pickle.dumps(ranks[0]))
    for other in (ranks[2], pickle.loads(pickle.dumps(ranks[1]))):
        first.merge(other)
    assert first._num_rows == 500
    assert ranks[1]._num_rows == 300
    assert_scores(first.compute(), glue_script(config, predictions, references))


def test_merge_with_itself_and_into_an_empty_one() -> None:
    metric, empty = Metric("accuracy"), Metric("accuracy")
    metric.add_batch(predictions=[1, 0, 0], references=[1, 0, 1])
    metric.merge(metric)
    empty.merge(metric)
    assert (metric._num_rows, empty._num_rows) == (6, 6)
    assert empty.compute() == {"accuracy": 2 / 3}
    with pytest.raises(ConfigError, match=r"Cannot merge .* 'f1' into 'accuracy'.*load_metric\("):
        metric.merge(Metric("f1"))
    other = Metric("accuracy")
    other.add_batch(predictions=[[1, 0]], references=[[1, 0]])
    with pytest.raises(MetricError, match="rows of 2 labels in the metric to merge, of 1 before"):
        metric.merge(other)


def test_empty_batches_are_no_error_beside_others() -> None:
    metric = load_metric("accuracy")
    metric.add_batch(predictions=[], references=[])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {"accuracy": 1.0}


def test_add_batch_makes_few_calls() -> None:
    metric, rows = load_metric("glue/mrpc"), np.ones(8, np.int64)
    num_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in range(1000):
            metric.add_batch(predictions=rows, references=rows)
    finally:
        sys.setprofile(None)
    assert num_calls < 50 * 1000  # 38 a batch, which take 5 us; np.unique alone makes 17


# Refused rows -------------------------------------------------------------------------------------


REFUSED = [
    ("accuracy", np.zeros((4, 2), np.float32), [0] * 4,
     r"accuracy expects integers, got float scores of shape \(4, 2\) in the predictions of batch "
     r"0\. Take the argmax: predictions = logits\.argmax\(-1\)"),
    ("accuracy", torch.zeros(4, 7, 2), torch.zeros(4, 7, dtype=torch.int64),
     r"float scores of shape \(4, 7, 2\)"),
    ("accuracy", np.array([0.9, 1.2], np.float32), [0, 1],
     r"accuracy expects integers, got float32 \(0\.9, 1\.2\) in the predictions of batch 0.*"
     r"astype\(int\)"),
    ("accuracy", torch.tensor([0.9, 1.2]), [0, 1], r"got float32 \(0\.9, 1\.2\)"),
    ("glue/mrpc", [1.0, 0.0], [0, 1], r"glue/mrpc expects integers, got float64 \(1\.0, 0\.0\)"),
    ("f1", [0, 1, 1, 1], [0.0, 1.0, 0.0, 1.0],
     r"got float64 \(0\.0, 1\.0, 0\.0, \.\.\.\) in the references of batch 0.*references = "),
    ("accuracy", ["pos", "neg"], [0, 1],
     r"accuracy expects integers, got str \('pos', 'neg'\).*label2id"),
    ("mse", ["1", "2"], [0, 1], r"mse expects numbers, got str \('1', '2'\)"),
    ("accuracy", [0, 1, 1], [0, 1], r"accuracy got 3 predictions but 2 references in batch 0\..*"
     r"references=batch\['labels'\]"),
    ("mse", [0.0], [0, 1], r"mse got 1 predictions but 2 references in batch 0"),
    ("mse", np.zeros((4, 1)), np.zeros(4),
     r"predictions of shape \(4, 1\) and references of shape \(4,\) in batch 0.*squeeze\(-1\)"),
    ("accuracy", np.zeros((4, 1), int), np.zeros((4, 1), int),
     r"of shape \(4, 1\).*one value or several labels a row\..*squeeze"),
    ("glue/sst2", np.zeros((4, 3), int), np.zeros((4, 3), int),
     r"glue/sst2 got predictions of shape \(4, 3\) .* in batch 0, but scores one value a row\."),
    ("accuracy", np.zeros((4, 3), int), np.array([[0, 1, -100]] * 4), r"references of -100"),
    ("accuracy", np.zeros((4, 3), int), np.array([[0, 1, 7]] * 4),
     r"several labels as 0 and 1, but they hold \(0, 1, 7\)\. .*references\.ravel\(\)"),
    ("accuracy", [[0, 1], [1]], [[0, 1], [1]], r"rows of different lengths.*Flatten"),
    ("accuracy", torch.tensor(1), torch.tensor(1), r"accuracy got no rows in batch 0.*per row"),
    ("accuracy", [0, 1], None, r"accuracy got no rows in batch 0"),
    ("accuracy", [0, 1], [0, -100], r"references of -100.*\[references != -100\]"),
    ("f1", [1, 2, 0], [1, 2, 3],
     r'f1 scores the classes 0 and 1, but the rows hold the classes \(0, 1, 2, \.\.\.\)\. '
     r'For more classes choose an average: "f1/macro"'),
    ("precision", [1, 2], [1, 2], r'\(1, 2\).*"precision/macro"'),
    ("glue/qqp", [1, 1], [-1, 1], r'classes \(-1, 1\).*"f1/macro"'),
    ("recall/samples", [1, 0], [1, 0], r"recall/samples got .* but scores several labels a row\."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "predictions", "references", "message"), REFUSED)
def test_refused_rows(name: str, predictions: Any, references: Any, message: str) -> None:
    metric = load_metric(name)
    with pytest.raises(MetricError, match=message) as caught:
        metric.compute(predictions=predictions, references=references)
    assert isinstance(caught.value, ValueError)
    assert metric._num_rows == 0  # nothing stays behind


def test_messages_count_batches_from_0_and_again_after_compute() -> None:
    metric = load_metric("accuracy")
    for _ in range(3):
        metric.add_batch(predictions=[1], references=[1])
    with pytest.raises(MetricError, match="got 2 predictions but 1 references in batch 3"):
        metric.add_batch(predictions=[1, 1], references=[1])
    with pytest.raises(MetricError, match=r"float scores of shape \(1, 2\) .* of batch 3\."):
        metric.add_batch(predictions=[[0.5, 0.5]], references=[1])
    with pytest.raises(MetricError, match="rows of 2 labels in batch 3, of 1 before"):
        metric.add_batch(predictions=[[0, 1]], references=[[0, 1]])
    assert metric.compute() == {"accuracy": 1.0}
    with pytest.raises(MetricError, match="in batch 0"):
        metric.add_batch(predictions=[1, 1], references=[1])


def test_no_rows() -> None:
    metric = load_metric("mse")
    metric.add_batch(predictions=[], references=[])
    with pytest.raises(
        MetricError, match=r"No rows to score: mse got 1 batches and no row.*add_batch\("
    ):
        metric.compute()


# Names --------------------------------------------------------------------------------------------


def load_nothing(*args: Any) -> Any:
    pytest.fail("went to the network")


@pytest.mark.parametrize(
    ("name", "config", "suggestion"),
    [
        ("acuracy", None, "accuracy"),
        ("accurcay", None, "accuracy"),
        ("precison", None, "precision"),
        ("recal", None, "recall"),
        ("spearmen", None, "spearman"),
        ("mathews_correlation", None, "matthews_correlation"),
        ("f1", "makro", "f1/macro"),
        ("glue", "mrcp", "glue/mrpc"),
        ("glue/sst-2", None, "glue/sst2"),
        ("glue", "copa", "glue/cola"),
        ("glue", None, "glue/rte"),
    ],
)
def test_typos_are_answered_without_the_network(
    name: str, config: str | None, suggestion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.load", load_nothing)
    with pytest.raises(MetricError) as caught:
        load_metric(name, config)
    message = str(caught.value)
    key = name if config is None else f"{name}/{config}"
    assert message.startswith(f"Cannot fetch metric {key!r} (offline or unknown). Built in: ")
    assert message.endswith(f" Did you mean {suggestion!r}?")


def test_the_message_names_what_is_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.load", load_nothing)
    with pytest.raises(MetricError) as caught:
        load_metric("glue")
    listed = re.split(r"[:,;]? ", str(caught.value))
    bases = {name for name in metrics._BUILT_IN if "/" not in name or name.startswith("glue/")}
    assert bases | {"/none", "/macro", "/micro", "/weighted", "/samples."} <= set(listed)


# The metrics of the hub's evaluate-metric organisation that are not built in.
ON_THE_HUB = (
    "bertscore bleu bleurt brier_score cer character charcut_mt chrf code_eval comet "
    "competition_math confusion_matrix coval cuad exact_match frugalscore google_bleu indic_glue "
    "mahalanobis mape mase mauve mean_iou meteor nist_mt perplexity poseval r_squared roc_auc "
    "rouge sacrebleu sari seqeval smape squad squad_v2 super_glue ter trec_eval wer wiki_split "
    "xnli xtreme_s"
)


def test_no_metric_of_the_hub_is_taken_for_a_typo(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("evaluate.load", lambda *args: asked.append(args))
    for name in (*ON_THE_HUB.split(), "f1/multilabel", "someone/accuracy"):
        for config in (None, "config"):
            if config is None and name in metrics._BUILT_IN:
                continue
            load_metric(name, config)
            assert asked[-1] == (name, config)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("Couldn't find a module script"), "offline or unknown"),
        (ConnectionError("no route"), "offline or unknown"),
        (ImportError("needs rouge_score"), "ImportError: needs rouge_score"),
    ],
)
def test_what_cannot_be_fetched(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr("evaluate.load", fail)
    with pytest.raises(MetricError) as caught:
        load_metric("wholly_unknown")
    assert caught.value.__cause__ is error
    assert str(caught.value).startswith(f"Cannot fetch metric 'wholly_unknown' ({reason}). Built")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "matthews_correlation"])
def test_several_labels_a_row_are_told_which_metrics_take_them(name):
    rows = {"predictions": [[0, 1, 1], [1, 0, 0]], "references": [[0, 1, 0], [1, 0, 0]]}
    with pytest.raises(MetricError, match="For several labels a row: ") as error:
        load_metric(name).compute(**rows)
    for other in re.findall(r'"([^"]+)"', str(error.value)):
        load_metric(other).compute(**rows)
    for average in ("micro", "weighted", "samples", "none"):
        assert average in str(error.value)
