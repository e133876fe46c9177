"""Scorers: anything that is accepted as a metric, behind the interface of ``evaluate_loop``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.collected import Collected, Perplexity
from manualloop.evaluation.forms import Takes, count_rows, require_rows
from manualloop.evaluation.functions import Function
from manualloop.evaluation.metrics import Metric, load_metric
from manualloop.evaluation.modules import Module, module_of
from manualloop.evaluation.segmentation import IGNORED
from manualloop.evaluation.torch_metrics import TorchMetric
from manualloop.types import Scores


class Scorer(Protocol):
    """An object that takes rows batch by batch and scores all of them.

    A scorer of ``"rows"`` may have an attribute ``takes_kept``. If it is true, ``add_batch`` gets a
    third argument ``kept``: the columns that skipped the model, by name.

    Attributes:
        name: Name in messages.
    """

    name: str

    @property
    def takes(self) -> Takes:
        """What it is given."""
        ...

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add the rows of one batch: tensors, arrays or lists with one entry per row."""
        ...

    def compute(self) -> Scores:
        """Return the scores of all rows by name, and forget the rows."""
        ...


def as_metric(metric: Any, names: Sequence[str] | None = None) -> Scorer:
    """Make a scorer from a metric of any accepted kind; it starts without rows.

    Args:
        metric: A name, as for ``load_metric``, or what that returns; an ``evaluate`` module, its
            ``compute``, or a ``partial`` of that with options; a torchmetrics ``Metric`` or
            ``MetricCollection``, which gets tensors on its own device; a function
            ``fn(predictions, references)`` of all rows at once, or one of scikit-learn, which
            returns a number, an array, or a mapping of these; or a list or tuple of metrics, whose
            results are merged.
        names: Names of the classes by number, for results by class.

    Returns:
        The scorer. A single number is named after the function ("metric" for a lambda), or after
        the class in snake case; nested results are flattened (``"PER_f1"``,
        ``"multiclass_accuracy_0"``). Of all but counted classes the rows are kept in memory.

    Raises:
        ConfigError: ``metric`` is none of these.
        MetricError: Raised by its methods: lengths differ, there are no rows, a result is not a
            number, or two metrics have the same key.

    >>> def errors(predictions, references):
    ...     return (predictions != references).sum()
    >>> scorer = as_metric(["accuracy", errors])
    >>> scorer.add_batch(predictions=[0, 1], references=[0, 0])
    >>> scorer.compute()
    {'accuracy': 0.5, 'errors': 1.0}
    """
    if isinstance(metric, str):
        metric = load_metric(metric)
    if isinstance(metric, type):
        name = metric.__name__
        raise ConfigError(f"Got the class {name} as metric, not an object. Use {name}(...).")
    if isinstance(metric, (list, tuple)) and metric:
        return _Checked([as_metric(one, names) for one in metric])
    if isinstance(metric, Metric | Collected):
        metric.reset()
        metric.names = names
        if isinstance(metric, Metric):
            metric.ignored = IGNORED
        return metric
    if isinstance(metric, Perplexity):
        return metric
    scorer: Any = metric if isinstance(metric, Module) else module_of(metric)
    if scorer is None and all(hasattr(metric, name) for name in ("update", "compute", "reset")):
        scorer = TorchMetric(metric)
    if scorer is None and callable(metric):
        scorer = Function(metric)
    if scorer is None:
        raise ConfigError(
            f"Got {metric!r} ({type(metric).__name__}) as metric. Pass a name, an evaluate module, "
            "a torchmetrics Metric, fn(predictions, references), or a list of these: 'accuracy'."
        )
    scorer.names = names
    return _Checked([scorer])


class _Checked:
    """Scorers that get the same rows, checked to be as many on both sides and at least one."""

    def __init__(self, scorers: list[Scorer]) -> None:
        self.name = " + ".join(scorer.name for scorer in scorers)
        self.scorers = scorers
        self._num_rows = self._num_batches = 0

    @property
    def takes(self) -> Takes:
        return self.scorers[0].takes

    @property
    def takes_kept(self) -> bool:
        return any(getattr(scorer, "takes_kept", False) for scorer in self.scorers)

    @property
    def by_unit(self) -> Any:
        return getattr(self.scorers[0], "by_unit", None) if len(self.scorers) == 1 else None

    def require_predictions(self) -> None:
        for scorer in self.scorers:
            if (require := getattr(scorer, "require_predictions", None)) is not None:
                require()

    def add_batch(self, *, predictions: Any, references: Any, **more: Any) -> None:
        num_rows = count_rows(self.name, predictions, references, self._num_batches)
        for scorer in self.scorers if num_rows else ():
            scorer.add_batch(predictions=predictions, references=references, **more)
        self._num_rows += num_rows
        self._num_batches += 1

    def compute(self) -> Scores:
        require_rows(self.name, self._num_rows, self._num_batches)
        self._num_rows = self._num_batches = 0
        return compute_all(self.scorers)


_FOREIGN = (Module, TorchMetric, Function)


def parts_of(scorer: Scorer) -> list[Scorer]:
    """Return the scorers that one is made of, each of which takes something of its own."""
    if isinstance(scorer, _Checked) and not isinstance(scorer.scorers[0], _FOREIGN):
        return [part for one in scorer.scorers for part in parts_of(one)]
    return [scorer]


def compute_all(scorers: Iterable[Scorer], loss: float | None = None) -> Scores:
    """Return the scores of several scorers as one mapping.

    Args:
        scorers: The scorers.
        loss: The mean loss, for those that take it.

    Raises:
        MetricError: Two of them have the same key.
    """
    merged, built_in = Scores(), set[str]()
    for scorer in scorers:
        scores = scorer.compute(loss=loss) if isinstance(scorer, Perplexity) else scorer.compute()
        twice = merged.keys() & scores.keys()
        if isinstance(scorer, Metric) and not scorer.options:
            # A built-in score is the same in each metric that has it: accuracy in a report.
            twice -= built_in
            built_in |= scores.keys()
        for key in twice or merged.matrices.keys() & scores.matrices.keys():
            raise MetricError(
                f"Key {key!r} comes from {scorer.name} and from an earlier metric. Leave one "
                f"out, or rename it: lambda p, r: {{'other_{key}': ...}}."
            )
        merged.add(scores)
    return merged
