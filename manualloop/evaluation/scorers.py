"""The metrics of an evaluation: what is taken for one, what they ask of the rows, their scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.collected import Collected, Perplexity
from manualloop.evaluation.decoding import Decoding
from manualloop.evaluation.forms import Scorer, Takes, count_rows, owned, require_rows, to_array
from manualloop.evaluation.functions import Function
from manualloop.evaluation.metrics import Metric, load_metric
from manualloop.evaluation.modules import Module, module_of
from manualloop.evaluation.rows import Ask, Postprocess
from manualloop.evaluation.scoring import arguments_for
from manualloop.evaluation.segmentation import IGNORED
from manualloop.evaluation.table import Table
from manualloop.evaluation.torch_metrics import TorchMetric
from manualloop.types import Scores

_AT_ONCE = 1 << 16  # labels that are counted at once: more only take memory


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
        rows = {"predictions": predictions, "references": references, **more}
        for scorer in self.scorers if num_rows else ():
            # The next metric, the next resample and the user's table have the same objects.
            is_foreign = isinstance(scorer, _FOREIGN)
            scorer.add_batch(**({n: owned(v) for n, v in rows.items()} if is_foreign else rows))
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


def ask_for(
    scorers: Sequence[Scorer], postprocess: Postprocess | None, decode: Decoding | None
) -> Ask | None:
    """Return what metrics ask of each row; None if they ask nothing.

    Raises:
        ConfigError: A function asks for logits, and gets predictions; or predictions are made that
            no metric asks for.
    """
    scorers = [scorer for scorer in scorers if scorer.takes != "loss"]
    if postprocess is None and decode is None:
        for scorer in scorers:
            if (require := getattr(scorer, "require_predictions", None)) is not None:
                require()
    elif not scorers:
        name = "postprocess" if decode is None else "decode"
        raise ConfigError(
            f"{name} makes predictions, and no metric takes them: the result would be the loss "
            f"alone. Name a metric: evaluate_loop(model, loader, metric, {name}={name}). For the "
            f"predictions themselves: predict_loop(model, loader, {name}={name})."
        )
    takes_kept = [getattr(scorer, "takes_kept", False) for scorer in scorers]
    return (
        Ask(
            postprocess,
            decode,
            references=not all(takes_kept) or any(scorer.takes != "rows" for scorer in scorers),
            predictions=any(scorer.takes != "scores" for scorer in scorers),
            scores=any(scorer.takes == "scores" for scorer in scorers),
            kept=any(takes_kept),
            classes=any(map(_counts_all_classes, scorers)),
        )
        if scorers
        else None
    )


def _counts_all_classes(scorer: Scorer) -> bool:
    if not isinstance(scorer, Metric):
        return False
    return scorer.takes == "classes" and "labels" not in scorer.options


def counts(scorer: Scorer) -> bool:
    """Tell whether a metric needs no rows once it has got them, in any order."""
    return scorer.takes == "loss" or (isinstance(scorer, Metric) and scorer.counts)


def tally(scorers: Sequence[Scorer], table: Table) -> None:
    """Give the rows of a table to metrics; those that count get some at once."""
    for scorer in scorers:
        if scorer.takes == "loss":
            continue
        is_counting, arguments = counts(scorer), arguments_for(table, scorer)
        if not is_counting:
            scorer.add_batch(**arguments)
            continue
        predictions, references = arguments["predictions"], arguments["references"]
        most = np.size(to_array(predictions[0])) if len(predictions) else 1
        size = max(_AT_ONCE // max(most, 1), 1)
        for start in range(0, max(len(predictions), 1), size):
            part = slice(start, start + size)
            scorer.add_batch(predictions=predictions[part], references=references[part])


def merge_counts(scorers: Sequence[Scorer], of_rank: Sequence[Scorer]) -> None:
    """Add to metrics what those of another rank have counted."""
    for scorer, other in zip(scorers, of_rank, strict=True):
        if isinstance(scorer, Metric) and isinstance(other, Metric):
            scorer.merge(other)


def score(table: Table | None, scorers: Sequence[Scorer], loss: float | None) -> Scores:
    """Return the loss, if there is one, and what metrics make of a table.

    Args:
        table: The rows; None if the metrics have counted them already.
        scorers: The metrics.
        loss: The mean loss; None if there is none.

    Raises:
        MetricError: Two of them have the same key, or one has that of the loss.
    """
    if table is not None:
        tally(scorers, table)
    found = compute_all(scorers, loss)
    if loss is None:
        return found
    if "loss" in found:
        raise MetricError(
            f"A metric has a score 'loss', which is the key of the model's loss ({loss:.4g}). "
            "Rename it: return {'own_loss': ...}."
        )
    scores = Scores(loss=loss)
    scores.add(found)
    return scores


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
        if isinstance(scorer, Metric) and scorer.options.keys() <= {"names"}:
            # A built-in score is the same in each metric that has it: accuracy in a report. Names
            # of classes change keys alone, and scores of classes that others call otherwise.
            is_same = {key for key in twice if repr(merged[key]) == repr(scores[key])}
            twice -= built_in & is_same
            built_in |= scores.keys()
        for key in twice or merged.matrices.keys() & scores.matrices.keys():
            raise MetricError(
                f"Key {key!r} comes from {scorer.name} and from an earlier metric. Leave one "
                f"out, or rename it: lambda p, r: {{'other_{key}': ...}}."
            )
        merged.add(scores)
    return merged
