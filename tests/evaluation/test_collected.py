"""Metrics that score whole rows or the loss: what is refused, and when."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch

from manualloop import evaluate_loop
from manualloop.errors import MetricError
from manualloop.evaluation.collected import COLLECTED, Perplexity
from manualloop.evaluation.metrics import load_metric

MODULES = {
    "seqeval": "seqeval.metrics.v1",
    "rouge": "rouge_score.rouge_scorer",
    "bleu": "sacrebleu.metrics",
    "chrf": "sacrebleu.metrics",
    "map": "pycocotools.cocoeval",
}


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_library_is_named_when_the_metric_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)  # its import raises
    library = MODULES[name].split(".")[0].replace("_", "-")
    with pytest.raises(MetricError) as caught:
        load_metric(name)
    assert str(caught.value).startswith(f"The metric {name!r} needs {library}, which cannot be")
    assert str(caught.value).endswith('Install it: pip install "manualloop[metrics]".')


@pytest.mark.parametrize("name", COLLECTED)
def test_rows_are_counted_on_both_sides(name: str) -> None:
    metric = load_metric(name)
    with pytest.raises(MetricError, match=f"No rows to score: {name} got 0 batches"):
        metric.compute()
    with pytest.raises(MetricError, match=f"{name} got 2 predictions but 1 references in batch 0"):
        metric.add_batch(predictions=["a", "b"], references=["a"])


class Fixed(torch.nn.Module):
    """A loss of its own for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": x.mean() + self.bias.sum(), "logits": x}


def test_perplexity_is_that_of_the_mean_loss_over_all_items() -> None:
    batches = [
        {"x": torch.full((rows, 2), loss), "labels": torch.zeros(rows, dtype=torch.long)}
        for rows, loss in ((3, 1.0), (1, 3.0))
    ]
    for metric in ("perplexity", ["perplexity", "accuracy"]):
        found = evaluate_loop(Fixed(), batches, metric)
        assert found["loss"] == 1.5
        assert found["perplexity"] == math.exp(1.5)
    loss_fn = lambda model, batch: (model(**batch)["loss"], len(batch["x"]))  # noqa: E731
    batches = [{"x": batch["x"]} for batch in batches]  # no labels, and no predictions
    found = evaluate_loop(Fixed(), batches, "perplexity", loss_fn=loss_fn)
    assert found == {"loss": 1.5, "perplexity": math.exp(1.5)}


def test_perplexity_of_odd_losses() -> None:
    assert Perplexity().compute(loss=1e9) == {"perplexity": math.inf}
    assert math.isnan(Perplexity().compute(loss=math.nan)["perplexity"])
    with pytest.raises(MetricError, match="and there is none"):
        Perplexity().compute()
    with pytest.raises(MetricError, match="takes no predictions"):
        Perplexity().add_batch(predictions=[1], references=[1])
