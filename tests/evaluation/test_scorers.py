"""Scorers: names, functions, evaluate modules and torchmetrics behind one interface."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    f1_score,
    jaccard_score,
    multilabel_confusion_matrix,
    recall_score,
)

from manualloop import compare_predictions, evaluate_loop, predict_loop
from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.forms import Rows
from manualloop.evaluation.metrics import Metric, load_metric
from manualloop.evaluation.scorers import as_metric


def score(metric: Any, predictions: Any, references: Any) -> dict[str, float]:
    scorer = as_metric(metric)
    scorer.add_batch(predictions=predictions, references=references)
    return scorer.compute()


def assert_scores(scores: dict[str, float], expected: dict[str, float]) -> None:
    assert list(scores) == list(expected)
    assert all(type(value) is float for value in scores.values())
    assert scores == pytest.approx(expected, rel=0, abs=1e-6)


SCRIPT = '''
import datasets
import evaluate


class Tiny(evaluate.Metric):
    """Counts equal rows; returns numbers, a list and a mapping."""

    def _info(self):
        value = datasets.Value("string" if self.config_name == "texts" else "int64")
        return evaluate.MetricInfo(
            description="",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references):
        equal = [p == r for p, r in zip(predictions, references)]
        return {
            "equal": sum(equal), "total": len(equal), "first": equal[:1], "PER": {"f1": 0.25}
        }
'''


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Load a real evaluate module from a local script, all its caches under tmp_path."""
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    # evaluate imports its generated package from the first such folder on the path, which must not
    # be one that other tests or other processes write to.
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    _forget_generated_modules()
    script = tmp_path / "tiny.py"
    script.write_text(SCRIPT)
    yield lambda config=None, **kwargs: evaluate.load(str(script), config, **kwargs)
    _forget_generated_modules()


def _forget_generated_modules() -> None:
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]


def test_evaluate_module(tiny: Any) -> None:
    metric = as_metric(tiny())
    metric.add_batch(predictions=torch.tensor([1, 0]), references=np.array([1, 1]))
    metric.add_batch(predictions=[2], references=[2])
    expected = {"equal": 2.0, "total": 3.0, "first_0": 1.0, "PER_f1": 0.25}
    assert_scores(metric.compute(), expected)
    metric.add_batch(predictions=[2, 3, 1], references=[2, 3, 2])
    assert_scores(metric.compute(), expected)


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_evaluate_module_starts_clean(tiny: Any, keep_in_memory: bool) -> None:
    module = tiny(keep_in_memory=keep_in_memory)
    module.add_batch(predictions=[7, 7], references=[7, 7])
    as_metric(module).add_batch(predictions=[8, 8], references=[8, 8])  # and never computed
    assert score(module, [1], [1])["total"] == 1.0


def test_evaluate_module_that_declares_integers_is_not_fed_floats(tiny: Any) -> None:
    metric = as_metric(tiny())
    with pytest.raises(MetricError, match=r"tiny expects integers, got float32 \(0\.9, 1\.2\)"):
        metric.add_batch(predictions=torch.tensor([0.9, 1.2]), references=[0, 1])
    with pytest.raises(MetricError, match=r"float scores of shape \(2, 2\) .* of batch 0"):
        metric.add_batch(predictions=[[0.9, 0.1], [0.0, 1.0]], references=[0, 1])
    metric.add_batch(predictions=[1, 1], references=[0, 1])
    with pytest.raises(MetricError, match=r"str \('a'\) in the predictions of batch 1"):
        metric.add_batch(predictions=["a"], references=[0])


def test_evaluate_modules_of_texts_and_combined(tiny: Any) -> None:
    import evaluate

    assert score(tiny("texts"), ["a", "b"], ["a", "c"])["equal"] == 1.0
    combined = evaluate.combine({"a": tiny(), "b": tiny()}, force_prefix=True)
    as_metric(combined).add_batch(predictions=[1], references=[1])
    scores = score(combined, [1, 0], [1, 1])
    assert (scores["a_total"], scores["b_equal"]) == (2.0, 1.0)


def test_a_local_script_is_loaded_by_its_path(tiny: Any, tmp_path: Path) -> None:
    tiny()
    assert score(str(tmp_path / "tiny.py"), [1], [1])["total"] == 1.0


def test_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    predictions, references = np.random.default_rng(12).integers(0, 3, (2, 60))
    theirs = torchmetrics.classification.MulticlassF1Score(num_classes=3, average="macro")
    theirs.update(torch.tensor([0, 0]), torch.tensor([1, 1]))  # left over: must not count
    expected = {"multiclass_f1_score": f1_score(references, predictions, average="macro")}
    metric = as_metric(theirs)
    for convert in (np.asarray, torch.tensor):
        for rows in (slice(0, 20), slice(20, 60)):
            metric.add_batch(
                predictions=convert(predictions[rows]), references=convert(references[rows])
            )
        assert_scores(metric.compute(), expected)
    assert theirs.update_count == 0  # reset afterwards


def test_torchmetrics_collection_of_logits_and_per_class_results() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    collection = torchmetrics.MetricCollection(
        {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(3, average="micro"),
            "recall": torchmetrics.classification.MulticlassRecall(3, average=None),
        }
    )
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 2])]
    scores = score(collection, logits, torch.tensor([0, 1, 2, 1]))
    assert scores == {"accuracy": 0.75, "recall_0": 1.0, "recall_1": 0.5, "recall_2": 1.0}


def test_torchmetrics_gets_its_own_device_lists_and_texts() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    accuracy = torchmetrics.classification.BinaryAccuracy()
    assert score(accuracy, [1, 0], [1, 1]) == {"binary_accuracy": 0.5}
    seen: list[Any] = []
    on_meta = torchmetrics.MeanSquaredError().to("meta")
    on_meta.update = lambda p, r: seen.append((p.device.type, r.device.type))
    as_metric(on_meta).add_batch(predictions=torch.zeros(2), references=np.zeros(2))
    assert seen == [("meta", "meta")]

    class Texts:
        def update(self, predictions: Any, references: Any) -> None:
            self.rows = (predictions, references)

        def compute(self) -> float:
            return float(self.rows == (["a"], ["b"]))

        def reset(self) -> None:
            self.rows = ([], [])

    assert score(Texts(), ["a"], ["b"]) == {"texts": 1.0}


def test_torchmetrics_curves_are_no_numbers() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.classification.BinaryROC()
    with pytest.raises(MetricError, match="binary_roc gave tuple of 3 entries for 'binary_roc'"):
        score(metric, torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))


def test_functions_get_all_rows_in_order_at_once() -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def gap(predictions: np.ndarray, references: np.ndarray) -> dict[str, Any]:
        seen.append((predictions, references))
        return {"gap": torch.tensor(1.5), "rows": np.int64(len(predictions)), "any": True}

    metric, buffer = as_metric(gap), np.array([[1.0, 2.0]])
    metric.add_batch(predictions=buffer, references=torch.tensor([3]))
    buffer[:] = 9
    metric.add_batch(predictions=[], references=[])
    metric.add_batch(predictions=buffer, references=[4])
    assert_scores(metric.compute(), {"gap": 1.5, "rows": 2.0, "any": 1.0})
    np.testing.assert_array_equal(seen[0][0], [[1, 2], [9, 9]])
    np.testing.assert_array_equal(seen[0][1], [3, 4])
    metric.add_batch(predictions=["a"], references=["b"])
    assert metric.compute()["rows"] == 1.0


def test_a_lone_number_is_named_by_the_function() -> None:
    def bias(predictions: np.ndarray, references: np.ndarray, scale: int = 1) -> np.floating[Any]:
        return scale * (predictions - references).mean()

    assert_scores(score(bias, [1.0, 2.0], [0.0, 1.0]), {"bias": 1.0})
    assert_scores(score(functools.partial(bias, scale=3), [1.0, 2.0], [0.0, 1.0]), {"bias": 3.0})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"bad gave NoneType for 'bad', not a number\..*return \{'bad': 0\.5\}"),
        ("0.5", "bad returned a text.*output_dict=True"),
        ({"a": [0.5] * 1001}, "bad gave list of 1001 entries for 'a'"),
        (np.zeros((2, 2, 2)).tolist() * 1000, "bad gave list of 2000 entries for 'bad'"),
        ({"a": {"b": None}}, "bad gave NoneType for 'a_b'"),
        ({"a": {"b": 1.0}, "a_b": 2.0}, "bad gave two results of the name 'a_b'"),
        (1j, "bad gave complex for 'bad'"),
    ],
)
def test_a_function_must_return_numbers(result: Any, message: str) -> None:
    def bad(predictions: Any, references: Any) -> Any:
        return result

    with pytest.raises(MetricError, match=message):
        score(bad, [1], [1])


def test_a_function_takes_no_batches_of_different_widths() -> None:
    metric = as_metric(max)
    metric.add_batch(predictions=np.zeros((2, 5)), references=[0, 0])
    metric.add_batch(predictions=np.zeros((2, 6)), references=[0, 0])
    with pytest.raises(MetricError, match="max gets all rows at once, but batches differ in width"):
        metric.compute()


def test_lengths_and_rows_are_checked_for_every_kind() -> None:
    metric = as_metric([max, "mse"])
    metric.add_batch(predictions=[], references=[])
    with pytest.raises(MetricError, match=r"No rows to score: max \+ mse got 1 batches and no row"):
        metric.compute()
    with pytest.raises(MetricError, match="mse got 2 predictions but 1 references in batch 1"):
        metric.add_batch(predictions=[1, 1], references=[0])


def test_several_metrics_are_merged() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    def wrong(predictions: np.ndarray, references: np.ndarray) -> int:
        return int((predictions != references).sum())

    kinds = ("glue/mrpc", load_metric("recall"), torchmetrics.MeanAbsoluteError(), wrong)
    metric = as_metric([*kinds[:2], list(kinds[2:])])
    for _ in range(2):
        metric.add_batch(predictions=torch.tensor([1, 0]), references=torch.tensor([1, 1]))
        metric.add_batch(predictions=[1, 1], references=[0, 1])
        scores = metric.compute()
        expected = {"accuracy": 0.5, "f1": 2 / 3, "recall": 2 / 3, "mean_absolute_error": 0.5}
        assert_scores(scores, {**expected, "wrong": 2.0})


def test_the_same_key_twice() -> None:
    def accuracy(predictions: Any, references: Any) -> float:
        return 1.0

    with pytest.raises(
        MetricError, match=r"Key 'accuracy' comes from accuracy and from an earlier metric"
    ):
        score(("glue/mrpc", accuracy), [1], [1])
    with pytest.raises(MetricError, match="Key 'f1' comes from f1 and"):  # of another class
        score(("f1", load_metric("f1", pos_label=0)), [1, 0], [1, 1])


def test_a_key_of_two_built_in_metrics_has_one_value() -> None:
    scores = score(("accuracy", "glue/mrpc", "classification_report"), [1, 0], [1, 1])
    assert scores["accuracy"] == 0.5
    assert scores["f1"] == scores["1_f1-score"] == pytest.approx(2 / 3)
    named = as_metric(["accuracy", "classification_report"], ("no", "yes"))  # as a model names them
    named.add_batch(predictions=[1, 0], references=[1, 1])
    found = named.compute()
    assert (found["accuracy"], found["yes_recall"]) == (0.5, 0.5)
    names = [load_metric("classification_report", names=names) for names in ("ab", "ba")]
    with pytest.raises(MetricError, match=r"Key '\w_[\w-]+' comes from classification_report"):
        score(names, [1, 0], [1, 1])


@pytest.mark.parametrize("function", [f1_score, jaccard_score, recall_score])
def test_entries_of_sklearn_have_the_class_they_are_of(function: Any) -> None:
    predictions, references = [0, 2, 2, 0, 3], [0, 2, 0, 3, 3]
    key, by_class = function.__name__, functools.partial(function, average=None)
    expected = dict(zip((0, 2, 3), by_class(references, predictions), strict=True))
    assert_scores(
        score(by_class, predictions, references),
        {f"{key}_{number}": value for number, value in expected.items()},
    )
    named = as_metric(by_class, ("cat", "dog", "mouse"))
    named.add_batch(predictions=predictions, references=references)
    assert list(named.compute()) == [f"{key}_cat", f"{key}_mouse", f"{key}_3"]
    chosen = functools.partial(by_class, labels=[2, 0])
    assert list(score(chosen, predictions, references)) == [f"{key}_2", f"{key}_0"]
    several = score(by_class, np.eye(3, dtype=int), np.ones((3, 3), dtype=int))
    assert list(several) == [f"{key}_0", f"{key}_1", f"{key}_2"]


def test_matrices_of_sklearn_by_class_have_the_class_they_are_of() -> None:
    scorer = as_metric(multilabel_confusion_matrix)
    scorer.add_batch(predictions=[0, 2, 2], references=[0, 2, 0])
    name = "multilabel_confusion_matrix"
    assert list(scorer.compute().matrices) == [f"{name}_0", f"{name}_2"]


def test_functions_of_torch_get_tensors() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    functional = torchmetrics.functional
    many = functools.partial(functional.accuracy, task="multiclass", num_classes=3)
    assert score(many, [0, 1, 2, 2], [0, 1, 2, 1]) == {"accuracy": 0.75}
    assert (
        score(functional.mean_squared_error, [0.5, 1.0], [0.0, 1.0])["mean_squared_error"] == 1 / 8
    )
    assert score(torch.nn.functional.l1_loss, [0.5, 1.0], [0.0, 1.0]) == {"l1_loss": 0.25}
    assert score(torch.nn.MSELoss(), [0.5, 1.0], [0.0, 1.0]) == {"MSELoss": 0.125}
    takes = {
        "classes": [many, functional.classification.binary_f1_score],
        "values": [functional.pearson_corrcoef],
        "scores": [
            functional.classification.binary_auroc,
            functional.classification.multiclass_calibration_error,
            functional.classification.binary_recall_at_fixed_precision,
            functools.partial(many, top_k=2),
            functools.partial(functional.classification.binary_f1_score, threshold=0.3),
        ],
    }
    for kind, functions in takes.items():
        assert [as_metric(function).takes for function in functions] == [kind] * len(functions)


def test_errors_of_torchmetrics_are_explained() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.retrieval.RetrievalMAP()
    with pytest.raises(MetricError, match="retrieval_map cannot score these rows"):
        score(metric, torch.rand(2), torch.tensor([0, 1]))


def test_a_metric_of_ours_is_taken_as_it_is_and_starts_clean() -> None:
    metric = load_metric("accuracy")
    metric.add_batch(predictions=[0], references=[1])
    assert as_metric(metric) is metric
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (None, r"Got None \(NoneType\) as metric"),
        (5, r"Got 5 \(int\) as metric. Pass a name, an evaluate module"),
        ([], r"Got \[\] \(list\) as metric"),
        ({"accuracy": 1}, r"\(dict\) as metric"),
        (Metric, r"Got the class Metric as metric, not an object\. Use Metric\(\.\.\.\)"),
    ],
)
def test_what_is_no_metric(metric: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_metric(metric)


# Metrics that change what they get. ---------------------------------------------------------------


def spoils(predictions: Any, references: Any) -> dict[str, float]:
    """Score rows that are lists, and empty them."""
    right = [row == other for row, other in zip(predictions, references, strict=True)]
    for row in (*predictions, *references):
        row[:] = [{"spoilt": True}] if isinstance(row, list) else 7
    return {"spoils": float(np.mean([np.all(one) for one in right]))}


def rows_as_lists(outputs: Any, batch: Any) -> tuple[list[Any], list[Any]]:
    tags = [[{"tag": int(number)}] for number in outputs["logits"].argmax(-1)]
    return tags, [[{"tag": int(number)}] for number in batch["labels"]]


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        return {"logits": self.linear(x)}


def test_a_metric_may_change_what_it_gets() -> None:
    """The next metric, each resample and the user's table have rows of their own."""
    model, x = Linear(), torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    batches = [{"x": x[:12], "labels": labels[:12]}, {"x": x[12:], "labels": labels[12:]}]
    share = float((model(x)["logits"].argmax(-1) == labels).float().mean())
    assert 0.1 < share < 0.9
    metrics = [spoils, lambda predictions, references: {"again": spoils(predictions, references)}]
    scores = evaluate_loop(model, batches, metrics, decode=rows_as_lists, confidence=0.9)
    assert scores["spoils"] == scores["again_spoils"] == pytest.approx(share)
    assert scores["spoils_low"] < share < scores["spoils_high"]
    table = predict_loop(model, batches, decode=rows_as_lists)
    before = copy.deepcopy(table.predictions)
    compare_predictions(table, table, spoils)
    assert table.predictions == before


def test_a_metric_may_change_rows_of_tokens() -> None:
    scorer = as_metric([spoils, lambda predictions, references: np.mean(predictions[0])])
    scorer.add_batch(predictions=Rows([np.array([1, 2])]), references=Rows([np.array([1, 2])]))
    assert scorer.compute() == {"spoils": 1.0, "metric": 1.5}


def draws(predictions: Any, references: Any) -> float:
    """Score with the global generators, as a bootstrap inside of a metric does."""
    return float(np.random.rand() + torch.rand(1)) + len(predictions)


def test_a_metric_that_draws_leaves_the_generators_as_they_were() -> None:
    """In each of the calls that intervals and comparisons make, too: they would move dropout."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    model, batches = Linear(), [{"x": x, "labels": torch.tensor([0, 1] * 3)}]
    table = predict_loop(model, batches)
    calls: dict[str, Any] = {
        "scores": lambda: evaluate_loop(model, batches, draws),
        "intervals": lambda: evaluate_loop(model, batches, draws, confidence=0.9),
        "a comparison": lambda: compare_predictions(table, table, draws),
    }
    for name, call in calls.items():
        torch.manual_seed(0)
        np.random.seed(0)
        call()
        found = float(torch.rand(1)), np.random.rand()
        torch.manual_seed(0)
        np.random.seed(0)
        assert found == (float(torch.rand(1)), np.random.rand()), name
