"""Metrics of torchmetrics: each is given what its kind takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manualloop.errors import ConfigError
from manualloop.evaluation.forms import Rows, Takes, explaining, to_scores
from manualloop.evaluation.parameters import roles_of
from manualloop.types import Scores

# Ends of the names of classes whose subclasses score probabilities.
_OF_SCORES = (
    *("PrecisionRecallCurve", "ROC", "AUROC", "AveragePrecision", "CalibrationError", "HingeLoss"),
    *("RankingLoss", "CoverageError", "LogAUC"),
)
# The same of functions.
_OF_SCORES_TOO = (
    *("curve", "roc", "average_precision", "calibration_error", "hinge_loss", "ranking_loss"),
    *("coverage_error", "logauc", "eer"),
)
_EXACT = "MulticlassExactMatch"
_BY_DOMAIN: dict[str, Takes] = {
    "classification": "classes",
    "clustering": "classes",
    "nominal": "classes",
    "regression": "values",
}


class TorchMetric:
    """A torchmetrics ``Metric`` or ``MetricCollection``, or an object with their methods.

    Args:
        metric: The metric; it is reset.

    Raises:
        ConfigError: The members of a collection take different things, or in another order.
    """

    def __init__(self, metric: Any) -> None:
        words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
        self.name = re.sub(words, "_", type(metric).__name__).lower()
        self.names: Sequence[str] | None = None
        self._metric = metric
        members = list(metric.values()) if hasattr(metric, "add_metrics") else [metric]
        self.takes = self._taken_by(members)
        self._takes_right_first = self._is_reversed(members)
        # Whether all tokens of a row are right is not told by tokens of all rows in one axis.
        self._takes_each = any(_kind(member) == _EXACT for member in members)
        self._is_binary = all(_kind(member).startswith("Binary") for member in members)
        # A collection has no device of its own, its members have.
        modules = list(metric.modules()) if hasattr(metric, "modules") else [metric]
        self._device = next((one.device for one in modules if hasattr(one, "device")), None)
        # It would gather rows from the other ranks, which are already on this rank only.
        self._syncing = [one for one in modules if hasattr(one, "sync")]
        metric.reset()

    def _taken_by(self, members: Sequence[Any]) -> Takes:
        found = {_takes(member) for member in members}
        if found == {"classes", "scores"}:
            return "scores"  # those of classes take probabilities too
        if len(found) > 1:
            raise ConfigError(
                f"The metrics of the {self.name} take different things: "
                f"{', '.join(sorted(found))}. Pass them as a list: [metric, metric]."
            )
        return found.pop() if found else "rows"

    def _is_reversed(self, members: Sequence[Any]) -> bool:
        """Tell whether ``update`` takes references first, by the names of its parameters."""
        roles = [roles_of(member.update) for member in members]
        is_reversed = [of_one == ["references", "predictions"] for of_one in roles]
        if any(is_reversed) and len(members) > 1:
            raise ConfigError(
                f"A metric of the {self.name} takes references first, as the names of its "
                "parameters tell, and a collection calls all by place. Pass them as a list: "
                "[metric, metric]."
            )
        return any(is_reversed)

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add the rows of one batch, as tensors on the metric's own device."""
        if self.takes == "scores":
            predictions = in_single(predictions)
        predicted, right = self._to_tensor(predictions), self._to_tensor(references)
        if isinstance(predicted, list) and self._takes_each:
            for one, other in zip(predicted, right, strict=True):
                self._update(one[None], other[None])
            return
        is_pair = self.takes == "scores" and getattr(predicted, "ndim", 0) == 2
        if is_pair and self._is_binary and predicted.shape[1] == 2:
            predicted = predicted[:, 1]
        self._update(predicted, right)

    def _update(self, predicted: Any, right: Any) -> None:
        sides = (right, predicted) if self._takes_right_first else (predicted, right)
        with explaining(self.name):
            self._metric.update(*sides)

    def _to_tensor(self, values: Any) -> Any:
        if isinstance(values, Rows) and self._takes_each:
            return [self._to_tensor(row) for row in values]
        return as_tensor(values, self._device)

    def compute(self) -> Scores:
        """Return the scores of all rows, and forget the rows."""
        with computing_alone(self._syncing), explaining(self.name):
            result = self._metric.compute()
        self._metric.reset()
        return to_scores(self.name, result, self.names)


def _takes(metric: Any) -> Takes:
    """Return what a metric takes, by the part of torchmetrics that its class comes from."""
    while hasattr(metric, "metric") and type(metric).__module__.startswith("torchmetrics.wrappers"):
        metric = metric.metric
    for base in type(metric).__mro__:
        library, _, domain = base.__module__.partition(".")
        if library == "torchmetrics" and domain != "metric":
            takes = taken_in(domain.split(".")[0])
            if type(metric).__name__ == _EXACT:
                return "rows"
            top_k, threshold = getattr(metric, "top_k", None), getattr(metric, "threshold", None)
            is_of_scores = any(one.__name__.endswith(_OF_SCORES) for one in type(metric).__mro__)
            # Class numbers are the probabilities cut at 0.5, whatever the metric's threshold is.
            has_own = isinstance(threshold, float) and threshold != 0.5
            wants_scores = is_of_scores or has_own or (isinstance(top_k, int) and top_k > 1)
            return "scores" if takes == "classes" and wants_scores else takes
    return "rows"


def taken_in(domain: str) -> Takes:
    """Return what the metrics of a part of torchmetrics take, such as of ``classification``."""
    return _BY_DOMAIN.get(domain, "rows")


def is_of_classes(name: str) -> bool:
    """Tell whether a function of ``torchmetrics.functional.classification`` takes classes."""
    return not name.endswith(_OF_SCORES_TOO) and "_at_" not in name


def in_single(probabilities: Any) -> Any:
    """Return probabilities in float32, as torch makes them, and takes them on every device."""
    if isinstance(probabilities, Tensor):
        return probabilities.float()
    return np.asarray(probabilities, np.float32)


def as_tensor(values: Any, device: Any = None) -> Any:
    """Return numbers as a tensor, rows of different shapes as a list of them, texts as they are."""
    if isinstance(values, Mapping):
        return {name: as_tensor(entry, device) for name, entry in values.items()}
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError):
        if isinstance(values, list) and not all(isinstance(row, str) for row in values):
            return [as_tensor(row, device) for row in values]
        return values


def _kind(metric: Any) -> str:
    return type(getattr(metric, "metric", metric)).__name__


@contextmanager
def computing_alone(metrics: Iterable[Any]) -> Iterator[None]:
    """Keep metrics of torchmetrics from gathering the rows of other ranks.

    Args:
        metrics: The metrics, without the modules in them that are none.

    Seen in torchmetrics 1.6 to 1.9: ``distributed_available_fn``. If it is gone, the metric gathers
    by a function that returns its own rows alone.
    """
    changes: list[tuple[Any, str, Any]] = [
        (metric, "distributed_available_fn", _is_alone)
        if hasattr(metric, "distributed_available_fn")
        else (metric, "dist_sync_fn", _gather_own)
        for metric in metrics
    ]
    kept = [getattr(metric, name, None) for metric, name, _ in changes]
    for metric, name, function in changes:
        setattr(metric, name, function)
    try:
        yield
    finally:
        for (metric, name, _), function in zip(changes, kept, strict=True):
            setattr(metric, name, function)


def _is_alone() -> bool:
    return False


def _gather_own(state: Tensor, group: Any = None) -> list[Tensor]:
    return [state]
