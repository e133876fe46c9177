"""The scores that a script can compute, each with its expression."""

from __future__ import annotations

from typing import Any, NamedTuple

from manualloop.evaluation.collected import Perplexity
from manualloop.evaluation.metrics import Metric, keys_of


class Score(NamedTuple):
    """How a score is computed in a script.

    Attributes:
        text: The expression, of ``references`` and ``predictions``.
        imports: The import that it needs.
    """

    text: str
    imports: str


def _of_sklearn(function: str, average: str | None = None) -> Score:
    options = "" if average is None else f', average="{average}"'
    return Score(
        f"{function}(references, predictions{options})", f"from sklearn.metrics import {function}"
    )


SCORES = {
    "accuracy": _of_sklearn("accuracy_score"),
    "matthews_correlation": _of_sklearn("matthews_corrcoef"),
    "mse": _of_sklearn("mean_squared_error"),
    "mae": _of_sklearn("mean_absolute_error"),
    **{name: _of_sklearn(f"{name}_score") for name in ("f1", "precision", "recall")},
    **{
        f"{name}_{average}": _of_sklearn(f"{name}_score", average)
        for name in ("f1", "precision", "recall")
        for average in ("macro", "micro", "weighted")
    },
    "pearson": Score("pearsonr(references, predictions)[0]", "from scipy.stats import pearsonr"),
    "spearmanr": Score(
        "spearmanr(references, predictions)[0]", "from scipy.stats import spearmanr"
    ),
}
"""Scores by their keys. Their formulas are scikit-learn's and SciPy's, as in ``load_metric``."""

NEVER_NAN = frozenset(
    name
    for name in SCORES
    if name.startswith(("accuracy", "f1", "precision", "recall", "matthews"))
)
"""Scores that are a number whatever the predictions are."""

PREDICTIONS = {
    "single_label_classification": "outputs.logits.argmax(dim=-1)",
    "multi_label_classification": "(outputs.logits > 0).int()",  # sigmoid(x) > 0.5
    "regression": "outputs.logits.squeeze(-1)",
    "token_classification": "outputs.logits.argmax(dim=-1)",
    "masked_lm": "outputs.logits.argmax(dim=-1)",
}


def find_scores(metric: Any) -> tuple[dict[str, Score], list[str]]:
    """Return the scores of a metric by their keys, and why some cannot be written out.

    Args:
        metric: The metric of ``evaluate_loop``.
    """
    parts = metric if isinstance(metric, list | tuple) else [] if metric is None else [metric]
    problems, found = [], {}
    for part in parts:
        is_built_in = isinstance(part, Metric | Perplexity)  # others may have any name
        name = part if isinstance(part, str) else part.name if is_built_in else ""
        shown = repr(part if isinstance(part, str) else type(part).__name__)
        if name == "perplexity":
            found["perplexity"] = Score("math.exp(loss_sum / num_items)", "import math")
            continue
        keys = keys_of(name) if not getattr(part, "options", None) else ()
        if not keys or not set(keys) <= SCORES.keys():
            problems.append(
                f"metric={shown} is not written out. Those that are: {', '.join(sorted(SCORES))}. "
                "Leave the others out, and add them to the function evaluate() of the script."
            )
        found |= {key: SCORES[key] for key in keys if key in SCORES}
    return found, problems
