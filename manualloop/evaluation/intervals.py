"""Bootstrap intervals of the scores of an evaluation, over the rows of its table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch import nn

from manualloop.errors import MetricError
from manualloop.evaluation.collected import Collected
from manualloop.evaluation.forms import Rows, Scorer
from manualloop.evaluation.losses import Losses
from manualloop.evaluation.metrics import Metric
from manualloop.evaluation.resampling import Floats, Interval, Scored, Weighted, bootstrap
from manualloop.evaluation.scorers import as_metric
from manualloop.evaluation.scoring import Given, given_by
from manualloop.evaluation.sums import sums_of
from manualloop.evaluation.table import Table
from manualloop.evaluation.weighted import BY_KEY, Entries, group_rows, of_classes
from manualloop.notices import say
from manualloop.types import Scores

_MOST_CALLED_ROWS = 1_000_000
_CALLS = (200, 1_000)


def find_intervals(
    model: nn.Module,
    table: Table | None,
    scorers: Sequence[Scorer],
    losses: Sequence[Losses],
    scores: Mapping[str, float],
    confidence: float,
) -> dict[str, tuple[float, float]]:
    """Return the ends of the interval of each score, by the name of the score.

    Args:
        model: The model; what cannot be had is told once for each.
        table: The rows; None if only the loss was asked for.
        scorers: The metrics.
        losses: The losses of each rank.
        scores: The scores.
        confidence: Probability with which such an interval holds the true score.
    """
    found: dict[str, Interval] = {}
    if "loss" in scores:
        if (interval := _of_loss(losses, confidence)) is not None:
            found["loss"] = interval
        else:
            _tell(
                model,
                "the loss has no interval: nothing tells the loss of each row. A loader of one row "
                "a batch does.",
            )
    for scorer in scorers:
        if scorer.takes != "loss":
            assert table is not None
            found |= intervals_of(model, *_units_of(table, scorer), confidence)
        elif "loss" in found:
            low, high = (math.exp(min(end, 709.0)) for end in found["loss"][:2])  # no overflow
            found["perplexity"] = Interval(low, high, 0)
    return {key: (interval.low, interval.high) for key, interval in found.items()}


def with_intervals(scores: Scores, ends: Mapping[str, tuple[float, float]]) -> Scores:
    """Put the ends of each interval behind their score, as ``f1_low`` and ``f1_high``.

    Raises:
        MetricError: There is a score of such a name already.
    """
    for key, value in list(scores.items()):
        del scores[key]
        named = {key: value}
        if key in ends:
            named |= {f"{key}_low": ends[key][0], f"{key}_high": ends[key][1]}
        if twice := named.keys() & scores.keys():
            raise MetricError(
                f"{min(twice)!r} is the end of an interval, and a metric has a score of this name. "
                "Rename that, or leave confidence out."
            )
        scores.update(named)
    return scores


def intervals_of(
    model: nn.Module, scorer: Scorer, given: Given, confidence: float
) -> dict[str, Interval]:
    """Return the bootstrap interval of each score of a metric."""
    expected = score_rows(scorer, given, np.arange(given.num_rows))
    entries, counts = group(given)
    weighted = weighted_scores(scorer, entries, expected, counts.astype(np.float64))
    scored = all_of(weighted) if weighted else None
    if scored is None:
        scored, counts = summed_scores(scorer, given, [(expected, np.ones(given.num_rows))])
    found: dict[str, Interval] = {}
    if scored is not None:
        found = bootstrap(scored, counts, confidence=confidence)
        flat = [key for key, interval in found.items() if interval.low == interval.high]
        if flat:
            verbs = "interval of {} has no width: it is" if len(flat) == 1 else _HAVE_NO_WIDTH
            _tell(
                model,
                f"the {verbs.format(_listed(flat))} the same in every resample of the "
                f"{given.num_rows} rows, which tells nothing of others.",
            )
    if missing := [key for key in expected if key not in found]:
        number = num_calls_for(given.num_rows)
        _tell(
            model,
            f"the intervals of {_listed(missing)} come from {number} resamples, each scored by a "
            f"call of {scorer.name}.",
        )
        calls, counts = called(scorer, given, missing), np.ones(given.num_rows, np.int64)
        found |= bootstrap(calls, counts, confidence=confidence, num_resamples=number)
    if undefined := [key for key, interval in found.items() if interval.num_undefined]:
        verbs = "is not defined in some resamples, which its interval leaves out."
        if len(undefined) > 1:
            verbs = "are not defined in some resamples, which their intervals leave out."
        _tell(model, f"{_listed(undefined)} {verbs}")
    return {key: found[key] for key in expected}


def _units_of(table: Table, scorer: Scorer) -> tuple[Scorer, Given]:
    """Return what is resampled of a table, and the scorer of it.

    They are the rows, unless the metric makes one unit of several of them, as the answer to a
    question of several windows. Such a function has an attribute ``by_unit``, a function of
    predictions and kept columns, which returns the name of a metric, and predictions and references
    for that with one entry a unit.
    """
    given = given_by(table, scorer)
    by_unit: Any = getattr(scorer, "by_unit", None)
    if by_unit is None:
        return scorer, given
    name, predictions, references = by_unit(given.predictions, given.kept or {})
    units = Given(Rows(predictions), Rows(references), None, None, len(predictions))
    return as_metric(name), units


def _of_loss(losses: Sequence[Losses], confidence: float) -> Interval | None:
    """Return the interval of the loss; None unless the loss of every row is known."""
    rows = [one.rows for one in losses if one.rows is not None]
    sums = np.concatenate([np.array(one.sums) for one in rows])
    items = np.concatenate([np.array(one.items) for one in rows])
    if not all(one.are_known for one in rows) or not items.any() or not np.isfinite(sums).all():
        return None
    # In one order for any number of ranks, and however the rows were batched.
    order = np.lexsort((items, sums))
    sums, items = sums[order], items[order]
    return bootstrap(
        lambda weights: {"loss": weights @ sums / (weights @ items)},
        np.ones(len(sums), np.int64),
        confidence=confidence,
    )["loss"]


def score_rows(scorer: Scorer, given: Given, rows: NDArray[np.int64]) -> Scores:
    """Return the scores of some rows."""
    scorer.add_batch(**given.take(rows))
    return scorer.compute()


def group(given: Given) -> tuple[Entries, NDArray[np.int64]]:
    """Return one row of each group of the same rows, and how often it occurs.

    Rows of several entries are not grouped, and neither are rows of values: few are the same.
    """
    predictions, references = given.predictions, given.references
    row = np.arange(given.num_rows) if given.row is None else given.row
    entries = Entries(predictions, references, row, given.num_rows)
    if given.row is not None or not (are_classes(predictions) and are_classes(references)):
        return entries, np.ones(given.num_rows, np.int64)
    places, counts = group_rows(predictions, references)
    rows = np.arange(len(places))
    return Entries(predictions[places], references[places], rows, len(rows)), counts


def are_classes(values: object) -> bool:
    """Tell whether rows are class numbers, of which many are the same."""
    return isinstance(values, np.ndarray) and values.dtype.kind in "biu" and values.ndim < 3


def weighted_scores(
    scorer: Scorer, entries: Entries, expected: Mapping[str, float], weights: Floats
) -> dict[str, Weighted]:
    """Return the scores of a built-in metric as functions of weights, by key.

    Args:
        scorer: The metric.
        entries: The rows, or one of each group of the same rows.
        expected: The scores of all rows.
        weights: Weights with which these are reached, ``(groups,)``.
    """
    is_known = isinstance(scorer, Metric) or (
        isinstance(scorer, Collected) and scorer.takes == "scores"
    )
    if not is_known or getattr(scorer, "options", {}).keys() - {"names"}:
        return {}
    names = getattr(scorer, "options", {}).get("names") or getattr(scorer, "names", None)
    makers: dict[str, Callable[[], Weighted]] = {
        key: partial(make, entries) for key, make in BY_KEY.items()
    }
    if isinstance(scorer, Metric) and scorer.takes == "classes":
        makers |= of_classes(scorer.name, names, entries)
    found: dict[str, Weighted] = {}
    for key, score in expected.items():
        if (make := makers.get(key)) is None:
            continue
        weighted = make()
        # What is not the metric's own score is left to calls of the metric.
        if np.isclose(weighted(weights[None])[0], score, rtol=1e-6, atol=1e-9, equal_nan=True):
            found[key] = weighted
    return found


def summed_scores(
    scorer: Scorer, given: Given, known: Sequence[tuple[Mapping[str, float], Floats]]
) -> tuple[Scored | None, NDArray[np.int64]]:
    """Return the scores that are functions of sums over rows, as functions of weights.

    Args:
        scorer: The metric.
        given: What it gets.
        known: Scores of the metric, and the weights of the rows with which they are reached.

    Returns:
        The function, of the weights of groups of the same rows if there is one ``known``; None if
        the metric is no such function. And how often each group occurs.
    """
    ones = np.ones(given.num_rows, np.int64)
    if (sums := sums_of(scorer, given, known[0][0])) is None:
        return None, ones
    keys = None
    for expected, weights in known:
        reached = sums.scores((weights @ sums.counts)[None])
        same = {
            key
            for key, values in reached.items()
            if key in expected and np.isclose(values[0], expected[key], 1e-9, 1e-12, equal_nan=True)
        }
        keys = same if keys is None else keys & same
    if not keys:
        return None, ones
    counts = sums.counts
    if len(known) == 1:
        places, ones = group_rows(counts)
        counts = counts[places]

    def scores(weights: Floats) -> dict[str, Floats]:
        found = sums.scores(weights @ counts)
        return {key: values for key, values in found.items() if key in keys}

    return scores, ones


def all_of(weighted: Mapping[str, Weighted]) -> Scored:
    """Join scores of the same weights."""
    return lambda weights: {key: score(weights) for key, score in weighted.items()}


def called(scorer: Scorer, given: Given, keys: Sequence[str]) -> Scored:
    """Return a function from weights to the scores that calls of a metric give.

    Args:
        scorer: The metric.
        given: What it gets.
        keys: Names of the scores.
    """
    numbers = np.arange(given.num_rows)

    def scores(weights: Floats) -> dict[str, Floats]:
        found = np.full((len(weights), len(keys)), np.nan)
        for place, times in enumerate(weights.astype(np.int64)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a resample may lack a class
                try:
                    scores = score_rows(scorer, given, np.repeat(numbers, times))
                except (ArithmeticError, MetricError, ValueError):
                    continue
            found[place] = [scores.get(key, np.nan) for key in keys]
        return dict(zip(keys, found.T, strict=True))

    return scores


def num_calls_for(num_rows: int) -> int:
    """Return how often a metric is called: 1,000 times, or fewer for many rows, at least 200.

    >>> num_calls_for(400), num_calls_for(2000), num_calls_for(100_000)
    (1000, 500, 200)
    """
    return int(np.clip(_MOST_CALLED_ROWS // max(1, num_rows), *_CALLS))


_HAVE_NO_WIDTH = "intervals of {} have no width: they are"


def _listed(keys: Sequence[str]) -> str:
    """List a few names, and how many more there are."""
    more = f" and {len(keys) - _NUM_LISTED} more" if len(keys) > _NUM_LISTED else ""
    return ", ".join(keys[:_NUM_LISTED]) + more


_NUM_LISTED = 3
_TOLD: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _tell(model: nn.Module, message: str) -> None:
    """Log a line, once for each model: a run may evaluate a hundred times."""
    told = _TOLD.setdefault(model, set())
    if message not in told:
        told.add(message)
        say(message)
