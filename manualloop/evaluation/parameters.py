"""What the names of a function's parameters tell: which side is which, and what is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

REFERENCES = {
    *("references", "reference", "refs", "ref", "labels", "label", "targets", "target", "gold"),
    *("golds", "truth", "truths", "ground_truth", "ground_truths", "actual", "expected"),
    *("y_true", "labels_true", "true", "trues", "y_test"),
}
PREDICTIONS = {
    *("predictions", "prediction", "predicted", "preds", "pred", "outputs", "output", "y_hat"),
    *("hypotheses", "hypothesis", "hyps", "y_pred", "labels_pred"),
}
PROBABILITIES = {"y_score", "y_prob", "y_proba", "probas_pred"}
# Words in the names of what a metric gets only where decode or postprocess returns it.
_NOT_GIVEN = {
    *("logits", "logit", "probs", "prob", "proba", "probas", "probabilities", "probability"),
    *("softmax", "sigmoid", "confidence", "confidences", "scores", "score"),
}


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function by name; none if nobody knows them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function that is not written in Python
        return {}


def asks_for_more(parameter: str) -> bool:
    """Tell whether a parameter is named after logits or probabilities, and gets predictions."""
    name = parameter.lower()
    return name not in PROBABILITIES and not _NOT_GIVEN.isdisjoint(name.split("_"))


def roles_of(function: Callable[..., Any]) -> list[str | None]:
    """Return what the names of the first two parameters of a function tell."""
    return [role_of(parameter) for parameter in list(parameters_of(function))[:2]]


def role_of(parameter: str) -> str | None:
    """Return what the name of a parameter tells: true_labels are references, val_preds are not."""
    name = parameter.lower()
    if name in PROBABILITIES:
        return "scores"
    words = set(name.split("_"))
    if name in REFERENCES:
        return "references"
    if name in PREDICTIONS or any(word.startswith("pred") for word in words) or "hat" in words:
        return "predictions"
    return "references" if words & REFERENCES or "test" in words else None
