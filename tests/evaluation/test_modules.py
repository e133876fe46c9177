"""Modules of evaluate: each is given what its features declare, and computes with options."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manualloop import evaluate_loop
from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.metrics import load_metric
from manualloop.evaluation.modules import Module, given_to
from manualloop.evaluation.scorers import as_metric

SCRIPT = '''
import datasets
import evaluate

Value, Sequence = datasets.Value, datasets.Sequence
FORMS = {
    "classes": {"predictions": Value("int32"), "references": Value("int32")},
    "values": {"predictions": Value("float"), "references": Value("float")},
    "scores": {"prediction_scores": Value("float"), "references": Value("int32")},
    "multiclass": {"prediction_scores": Sequence(Value("float")), "references": Value("int32")},
    "tags": {"predictions": Sequence(Value("string")), "references": Sequence(Value("string"))},
    "answers": {
        "predictions": {"id": Value("string"), "prediction_text": Value("string")},
        "references": {"id": Value("string"), "answers": Sequence({"text": Value("string")})},
    },
    "lists": {"predictions": Value("string"), "references": Sequence(Value("string"))},
}
BOTH = [
    {"predictions": Value("string"), "references": Sequence(Value("string"))},
    {"predictions": Value("string"), "references": Value("string")},
]


class Shown(evaluate.Metric):
    """Returns what it was given."""

    def _info(self):
        forms = BOTH if self.config_name == "both" else FORMS[self.config_name]
        features = (
            [datasets.Features(form) for form in forms]
            if isinstance(forms, list)
            else datasets.Features(forms)
        )
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, references, predictions=None, prediction_scores=None, scale=1):
        given = prediction_scores if predictions is None else predictions
        return {"rows": scale * len(references), "given": repr((given, references))}
'''


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    script = tmp_path / "shown.py"
    script.write_text(SCRIPT)
    yield lambda config: evaluate.load(str(script), config)
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]


def given(scorer: Any, predictions: Any, references: Any) -> Any:
    scorer.add_batch(predictions=predictions, references=references)
    scores = scorer.compute()
    assert scores["rows"] == len(references)
    return eval(scores.texts["given"])


def test_what_a_module_is_given_depends_on_its_features(shown: Any) -> None:
    expected = {
        **{name: name for name in ("classes", "values", "scores")},
        **dict.fromkeys(("tags", "answers", "lists", "both"), "rows"),
        "multiclass": "scores",
    }
    assert {config: given_to(shown(config)) for config in expected} == expected


def test_rows_arrive_in_the_form_that_is_declared(shown: Any) -> None:
    tags = as_metric(shown("tags"), ["O", "B-PER"])
    found = given(tags, [np.array([0, 1]), np.array([1])], [np.array([0, 1]), np.array([0])])
    assert found == ([["O", "B-PER"], ["B-PER"]], [["O", "B-PER"], ["O"]])
    scores = np.array([[0.25, 0.75], [0.5, 0.5]])
    assert given(as_metric(shown("scores")), scores, [1, 0]) == ([0.75, 0.5], [1, 0])
    found = given(as_metric(shown("multiclass")), scores, [1, 0])
    assert found == ([[0.25, 0.75], [0.5, 0.5]], [1, 0])
    assert given(as_metric(shown("lists")), ["a"], ["b"]) == (["a"], [["b"]])
    assert given(as_metric(shown("both")), ["a"], ["b"]) == (["a"], ["b"])
    assert given(as_metric(shown("both")), ["a"], [["b", "c"]]) == (["a"], [["b", "c"]])
    answer = [{"id": "1", "prediction_text": "x"}]
    right = [{"id": "1", "answers": {"text": ["x", "y"]}}]
    found, wanted = given(as_metric(shown("answers")), answer, right)
    assert found == answer
    assert wanted[0]["answers"]["text"] == ["x", "y"]
    with pytest.raises(MetricError, match=r"one class of two, and got .* \(1, 3\)"):
        given(as_metric(shown("scores")), np.ones((1, 3)), [0])
    with pytest.raises(MetricError, match=r"does not take the rows of batch 0: "):
        given(as_metric(shown("tags")), [1], [2])


def test_options_pass_through_load_metric_and_partials(shown: Any, tmp_path: Path) -> None:
    script = str(tmp_path / "shown.py")
    module = shown("classes")
    for metric in (
        load_metric(script, "classes", scale=3),
        functools.partial(module.compute, scale=3),
        Module(module, {"scale": 3}),
    ):
        scorer = as_metric(metric)
        scorer.add_batch(predictions=[1, 0], references=[1, 1])
        assert scorer.compute()["rows"] == 6.0
    metric = load_metric(script, "classes", scale=2)
    assert metric.compute(predictions=[1], references=[1])["rows"] == 2.0
    scorer = as_metric(module.compute)
    scorer.add_batch(predictions=[1, 0], references=[1, 1])
    assert scorer.compute()["rows"] == 2.0
    with pytest.raises(ConfigError, match=r"does not take scales: its compute takes .*scale\."):
        load_metric(script, "classes", scales=3)


def test_modules_of_classes_and_probabilities_in_one_pass(shown: Any) -> None:
    class Affine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": x + self.bias}

    seen = {}
    for config in ("classes", "scores"):
        batches = [{"x": torch.tensor([[0.0, 0.0], [9.0, 0.0]]), "labels": torch.tensor([1, 0])}]
        found = evaluate_loop(Affine(), batches, ["accuracy", shown(config)])
        seen[config] = eval(found.texts["given"])
    assert seen["classes"] == ([0, 0], [1, 0])
    assert seen["scores"][0] == pytest.approx([0.5, 1 / (1 + np.exp(9))])
