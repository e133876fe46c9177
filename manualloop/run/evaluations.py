"""The evaluations of a run: the last, the best, and how many came since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from manualloop.checkpoint.manifest import score
from manualloop.errors import ConfigError
from manualloop.types import Record


class Evaluations:
    """The last and the best evaluation of a run. Their number does not matter to its size.

    Args:
        best_metric: As in ``train_loop``; None: the last evaluation is the best.

    Attributes:
        number: How many evaluations there were.
        last: Metrics of the last one; empty before the first.
        best: Metrics of the best one: the first of equals, and NaN is the worst.
        num_since_best: Evaluations after the best one.

    >>> evaluations = Evaluations("-loss")
    >>> for loss in (0.7, 0.4, float("nan")):
    ...     evaluations.add({"loss": loss})
    >>> evaluations.best, evaluations.num_since_best
    ({'loss': 0.4}, 1)
    """

    def __init__(self, best_metric: str | None) -> None:
        self.best_metric = best_metric
        self.number = self.num_since_best = 0
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Count an evaluation, and keep it if it is the best so far.

        Raises:
            ConfigError: The metric that decides is not among its results.
        """
        if self.best_metric is not None and self._name not in metrics:
            raise ConfigError(
                f"best_metric={self.best_metric!r}, and evaluate returned no {self._name!r}: "
                f"{', '.join(metrics) or 'nothing'}. Name one of its results."
            )
        self.number += 1
        self.last = dict(metrics)
        if not self.best or self._is_better():
            self.best, self.num_since_best = self.last, 0
        else:
            self.num_since_best += 1

    @property
    def _name(self) -> str:
        return (self.best_metric or "").removeprefix("-")

    def _is_better(self) -> bool:
        if self.best_metric is None:
            return True
        return score(self.last, self.best_metric) > score(self.best, self.best_metric)

    def notes(self) -> dict[str, Any]:
        """Return what ``restore`` needs."""
        return dict(vars(self))

    def restore(self, notes: Any, records: Iterable[Record]) -> None:
        """Continue from what ``notes`` returned in another process.

        Args:
            notes: The notes; in checkpoints of release 0.1.0 a list of all evaluations.
            records: The history of the run. If the other process had another ``best_metric``, the
                best evaluation is found in there.
        """
        if isinstance(notes, Mapping) and notes["best_metric"] == self.best_metric:
            vars(self).update(notes)
            return
        found = notes if isinstance(notes, list) else map(_metrics, filter(_is_evaluation, records))
        for metrics in found:
            if self.best_metric is None or self._name in metrics:
                self.add(metrics)
        if isinstance(notes, list):
            self.number, self.last = len(notes), notes[-1] if notes else {}
        else:
            self.number, self.last = notes["number"], notes["last"]


def _is_evaluation(record: Record) -> bool:
    return "lr" not in record  # a record of training has one


def _metrics(record: Record) -> dict[str, Any]:
    return {name[5:]: value for name, value in record.items() if name.startswith("eval_")}
