"""The evaluations of a run: the last, the best, and how many came since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from manualloop.arguments import is_count, problem_of_call
from manualloop.checkpoint.manifest import (
    has_sign,
    is_known,
    is_lower_better,
    metric_name,
    score,
)
from manualloop.errors import ConfigError
from manualloop.notices import say
from manualloop.types import Record, is_training, metrics_of


class Evaluations:
    """The last and the best evaluation of a run. Their number does not matter to its size.

    Args:
        best_metric: As in ``train_loop``; None: the last evaluation is the best.

    Attributes:
        number: How many evaluations there were.
        last: Metrics of the last one; empty before the first.
        best: Metrics of the best one: the first of equals, and NaN is the worst.
        best_step: Number of updates before the best one; None if it is not known.
        num_since_best: Evaluations after the best one.

    >>> evaluations = Evaluations("loss")
    >>> for loss in (0.7, 0.4, float("nan")):
    ...     evaluations.add({"loss": loss})
    >>> evaluations.best, evaluations.num_since_best
    ({'loss': 0.4}, 1)
    """

    def __init__(self, best_metric: str | None) -> None:
        self.best_metric = best_metric
        self.is_lower_better = best_metric is not None and is_lower_better(best_metric)
        self.number = self.num_since_best = 0
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.best_step: int | None = None

    def add(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Count an evaluation, and keep it if it is the best so far.

        Args:
            metrics: Its results.
            step: Number of updates before it.

        Raises:
            ConfigError: The metric that decides is not among its results. It is the last evaluation
                all the same.
        """
        self.number += 1
        self.last = dict(metrics)
        if self.best_metric is not None:
            require_metric(self.best_metric, self.last)
        if not self.best or self._is_better():
            self.best, self.best_step, self.num_since_best = self.last, step, 0
        else:
            self.num_since_best += 1

    def tell_direction(self) -> None:
        """Log which value is the best, unless a sign has decided it as one would expect."""
        if self.best_metric is None:
            return
        which, sign = ("lowest", "+") if self.is_lower_better else ("highest", "-")
        name = metric_name(self.best_metric)
        if not has_sign(self.best_metric):
            say(
                f"the best evaluation is the one with the {which} {name} (otherwise "
                f"write best_metric={sign + name!r})."
            )
        elif self.is_lower_better != is_lower_better(name) and is_known(name):
            other = "highest" if self.is_lower_better else "lowest"
            say(
                f"best_metric={self.best_metric!r} takes the {which} {name} for the best, which is "
                f"the worst model. The {other} is best_metric={name!r}."
            )

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
        if isinstance(notes, Mapping) and self._decides_as(notes):
            vars(self).update((name, notes[name]) for name in vars(self) if name in notes)
            return
        evaluations = (record for record in records if not is_training(record))
        found = [(metrics_of(record), record["step"]) for record in evaluations]
        if isinstance(notes, list):
            found = [(metrics, None) for metrics in notes]
        for metrics, step in found:
            if self.best_metric is None or metric_name(self.best_metric) in metrics:
                self.add(metrics, step)
        if isinstance(notes, list):
            self.number, self.last = len(notes), notes[-1] if notes else {}
        else:
            self.number, self.last = notes["number"], notes["last"]

    def _decides_as(self, notes: Mapping[str, Any]) -> bool:
        before = notes["best_metric"]
        # Before the direction was noted, it was the sign alone.
        was_lower = notes.get("is_lower_better", (before or "").startswith("-"))
        return bool(before == self.best_metric and was_lower == self.is_lower_better)


def check_evaluation(
    evaluate: object, best_metric: object, patience: object, on_step: object
) -> None:
    """Refuse functions and names of ``train_loop`` that cannot be meant, all of them at once.

    Raises:
        ConfigError: A line for every problem.
    """
    problems = []
    if evaluate is not None and not callable(evaluate):
        problems.append(
            f"evaluate is a {type(evaluate).__name__}, already computed. Pass a function: "
            "evaluate=lambda: evaluate_loop(model, loader)."
        )
    if best_metric is not None and not (isinstance(best_metric, str) and best_metric.strip("+-")):
        problems.append(f'best_metric={best_metric!r} is not a name, such as "f1" or "loss".')
    if best_metric is not None and evaluate is None:
        problems.append(
            f"best_metric={best_metric!r} needs evaluate=lambda: evaluate_loop(model, ...)."
        )
    if patience is not None and best_metric is None:
        problems.append(f'patience={patience!r} needs a best_metric, such as "f1" or "loss".')
    if patience is not None and not is_count(patience):
        problems.append(f"patience must be a whole number of at least 1, got {patience!r}.")
    if on_step is not None and not callable(on_step):
        problems.append(
            f"on_step is a {type(on_step).__name__}. Pass a function: on_step=lambda step: ...."
        )
    for name, function in (("evaluate", evaluate), ("on_step", on_step)):
        # A partial of evaluate_loop is tried on a batch.
        if callable(function) and not isinstance(function, partial):
            problems += filter(None, [problem_of_call(name, function)])
    if problems:
        raise ConfigError("\n".join(problems))


def require_metric(best_metric: str, metrics: Mapping[str, Any]) -> None:
    """Refuse metrics without the one that decides.

    Raises:
        ConfigError: It is not among them, or is no number.
    """
    name = metric_name(best_metric)
    if name not in metrics:
        raise ConfigError(
            f"best_metric={best_metric!r}, and evaluate returned no {name!r}: "
            f"{', '.join(metrics) or 'nothing'}. Name one of its results."
        )
    if not isinstance(metrics[name], Real):
        raise ConfigError(
            f"best_metric={best_metric!r}, and evaluate returned a {type(metrics[name]).__name__} "
            f"by this name: {metrics[name]!r:.60}. Name a result that is a number."
        )


def read_metrics(returned: Any) -> dict[str, Any]:
    """Return what ``evaluate`` returned as plain values by name; nested names are joined.

    Raises:
        ConfigError: It is no mapping, or holds something that is neither a number nor a text nor a
            list of these.

    >>> read_metrics({"matched": {"f1": 0.5}, 2: None})
    {'matched_f1': 0.5, '2': None}
    """
    if not isinstance(returned, Mapping):
        number = returned if isinstance(returned, int | float) else "accuracy"
        raise ConfigError(
            f"evaluate returned {_describe(returned)}, and a run keeps metrics by name. Let it end "
            f'with a dict of numbers: return {{"accuracy": {number}}}.'
        )
    metrics: dict[str, Any] = {}
    for key, value in returned.items():
        found = {str(key): value}
        if isinstance(value, Mapping):
            found = read_metrics({f"{key}_{inner}": entry for inner, entry in value.items()})
        if twice := found.keys() & metrics.keys():
            raise ConfigError(
                f"evaluate returned two metrics of the name {min(twice)!r}. Rename one of them."
            )
        metrics |= {name: _plain(name, entry) for name, entry in found.items()}
    return metrics


def _plain(name: str, value: Any) -> Any:
    if hasattr(value, "tolist"):  # of NumPy or torch
        value = value.tolist()
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(name, entry) for entry in value]
    if isinstance(value, Real):
        return float(value)
    raise ConfigError(
        f"evaluate returned {_describe(value)} as {name!r}, which no history can hold. Return a "
        f'number: {{"{name}": float(...)}}, or leave it out.'
    )


def _describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__} ({value!r:.60})"
