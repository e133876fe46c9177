"""``compare_predictions``: whether two models differ on the same rows by more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manualloop.arguments import check_arguments
from manualloop.errors import ConfigError, DataError, MetricError
from manualloop.evaluation.forms import Scorer
from manualloop.evaluation.intervals import (
    all_of,
    are_classes,
    called,
    num_calls_for,
    score_rows,
    summed_scores,
    weighted_scores,
)
from manualloop.evaluation.predictions import Predictions, kind_of
from manualloop.evaluation.resampling import (
    Floats,
    Scored,
    bootstrap,
    num_resamples_for,
    p_value,
    swaps,
)
from manualloop.evaluation.scorers import as_metric, parts_of
from manualloop.evaluation.scoring import Given, given_by
from manualloop.evaluation.table import Column, Table
from manualloop.evaluation.weighted import Entries, group_rows
from manualloop.randomness import random_states_kept
from manualloop.tasks.made import counted
from manualloop.tasks.task import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of one score between two tables of predictions.

    Attributes:
        a: Score of the first.
        b: Score of the second.
        difference: ``b - a``.
        low: Lower end of the interval of the difference, by bootstrap over the rows.
        high: Upper end.
        p_value: Probability of a difference at least as large if the two were equally good.
        test: Name of the test that gave the p-value.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    test: str

    def __repr__(self) -> str:
        found = self.difference, self.low, self.high
        largest = max((abs(value) for value in found if math.isfinite(value)), default=0.0)
        form = "+.2e" if 0 < largest < 0.001 else "+.4f"
        difference, low, high = (format(value, form) for value in found)
        return (
            f"{self.a:.4g} -> {self.b:.4g}, {difference} ({low} to {high}), "
            f"p = {self.p_value:.2g}, {self.test}"
        )


@dataclass(frozen=True, slots=True, repr=False)
class PredictionsComparison:
    """The differences between two tables of predictions. It prints as text.

    Attributes:
        num_rows: Number of rows.
        num_different: Rows whose predictions differ.
        confidence: Confidence of the intervals.
        differences: Differences by the name of the score.
    """

    num_rows: int
    num_different: int
    confidence: float
    differences: Mapping[str, Difference] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Difference:
        return self.differences[name]

    def __repr__(self) -> str:
        width = max(map(len, self.differences), default=0)
        lines = [f"{name:<{width}}  {found!r}" for name, found in self.differences.items()]
        rows = counted(self.num_rows, "row")
        head = (
            f"{rows}, {self.num_different:,} of them predicted differently; "
            f"intervals of {self.confidence:.4g} around b - a"
        )
        return "\n".join([head, *lines])


def compare_predictions(
    a: Predictions, b: Predictions, metric: Any, *, confidence: float = 0.95
) -> PredictionsComparison:
    """Compare two models by their predictions of the same rows.

    The interval is that of the difference ``b - a``, by a paired bootstrap: both are scored on the
    same resamples of the rows. The p-value of an accuracy is that of McNemar's exact test; that of
    any other score is the share of exchanges of the two predictions of rows, at random, which make
    a difference at least as large. Both take the rows as drawn independently, and tell nothing
    about other random seeds of the training.

    Args:
        a: Predictions of one model, such as ``predict_loop(model, loader)``.
        b: Those of another for the same rows. Rows are joined by ``index``, or by the index of the
            frames that the loaders were prepared from, if these are in different orders.
        metric: As for ``evaluate_loop``. Metrics that are not built in are called for each
            resample, and get fewer. Those of probabilities get the tables' scores, in float32, in
            which all above ``1 - 3e-8`` are 1; ``evaluate_loop`` ranks such rows in float64.
        confidence: Confidence of the intervals.

    Returns:
        The difference of each score, with its interval and its p-value.

    Raises:
        DataError: The tables have other rows or other references, or none.
        MetricError: The metric cannot score these predictions.

    >>> rows, references = np.arange(200), np.arange(200) % 2
    >>> a = Predictions(rows, np.where(rows % 5, references, 1 - references), None, references)
    >>> b = Predictions(rows, np.where(rows % 9, references, 1 - references), None, references)
    >>> found = compare_predictions(a, b, "accuracy")
    >>> found  # doctest: +NORMALIZE_WHITESPACE
    200 rows, 53 of them predicted differently; intervals of 0.95 around b - a
    accuracy  0.8 -> 0.885, +0.0850 (+0.0150 to +0.1550), p = 0.027,
              McNemar: 18 rows only a has right, 35 only b
    >>> round(found["accuracy"].difference, 3)
    0.085
    """
    check_arguments(confidence=confidence)
    for name, table in {"a": a, "b": b}.items():
        if not isinstance(table, Predictions):
            raise ConfigError(
                f"{name} must be Predictions, got a {type(table).__name__}: {name} = "
                "predict_loop(model, loader)."
            )
    a, b = _joined(a, b)
    if not len(a):
        raise DataError("a and b have no row with a label to compare by.")
    differences: dict[str, Difference] = {}
    for scorer in parts_of(as_metric(metric, a.names or b.names)):
        with random_states_kept(devices=False):  # a metric may draw
            compared = _compare(scorer, a, b, confidence)
        for name, found in compared.items():
            if name in differences and repr(differences[name]) != repr(found):
                raise MetricError(f"Key {name!r} comes from two metrics. Leave one of them out.")
            differences[name] = found
    if not differences:
        raise MetricError("The metric gives no number that both have, so nothing can be compared.")
    num_different = int(_differing(a.predictions, b.predictions).sum())
    return PredictionsComparison(len(a), num_different, confidence, differences)


def _joined(a: Predictions, b: Predictions) -> tuple[Predictions, Predictions]:
    """Return both tables in one order of the rows.

    Raises:
        DataError: The rows, their references or the names of the classes are not the same.
    """
    if len(ignored := {a.ignored, b.ignored} - {IGNORE_INDEX}) > 1:
        raise DataError(
            f"Labels of {a.ignored} count in no score of a, and those of {b.ignored} in none of b. "
            "Give both configs one semantic_loss_ignore_index."
        )
    a, b = (replace(table, ignored=max(ignored, default=IGNORE_INDEX)) for table in (a, b))
    b = _renumbered(a, b)
    a, b = (_by_index(name, table) for name, table in (("a", a), ("b", b)))
    assert a.index is not None
    assert b.index is not None
    for name, own, others in (("a", a.index, b.index), ("b", b.index, a.index)):
        if len(missing := np.setdiff1d(own, others, assume_unique=True)):
            raise DataError(
                f"Only {name} has row {missing[0]} (and {len(missing) - 1} more): a has {len(a)} "
                f"rows, b has {len(b)}. Compare predictions of the same rows: "
                "a[np.isin(a.index, b.index)]."
            )
    if None not in (a.names, b.names) and a.names != b.names:
        raise DataError(
            f"The classes of a are {', '.join(a.names or ())[:100]}, those of b "
            f"{', '.join(b.names or ())[:100]}. Give both models the names in one order."
        )
    if (kinds := (kind_of(a), kind_of(b)))[0] != kinds[1]:
        raise DataError(f"A row of a is a {kinds[0]}, one of b a {kinds[1]}: they do not compare.")
    references = [table.references for table in (a, b) if table.references is not None]
    if not references:
        raise DataError(
            "Neither a nor b has references to score them by. Predict a split with labels."
        )
    if len(references) == 2 and (different := _differing(*references)).any():
        row = int(np.flatnonzero(different)[0])
        raise DataError(
            f"Row {a.index[row]} has the reference {_shown(a, row)} in a and {_shown(b, row)} in "
            f"b, and {different.sum() - 1} more rows differ. Predict the same version of the data."
        )
    a, b = (
        table if table.references is not None else replace(table, references=references[0])
        for table in (a, b)
    )
    labels = references[0]
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "biu":
        a, b = (table[labels != IGNORE_INDEX] for table in (a, b))
    return a, b


def _renumbered(a: Predictions, b: Predictions) -> Predictions:
    """Return b with the numbers that its rows have in the frame of a, if it has the same rows."""
    ours, theirs = a.inputs.frame_index, b.inputs.frame_index
    if ours is None or theirs is None or b.index is None or len(ours) != len(theirs):
        return b
    if ours.equals(theirs) or not ours.is_unique:
        return b
    numbers = ours.get_indexer(theirs)
    return b if (numbers < 0).any() else replace(b, index=numbers[b.index])


def _by_index(name: str, table: Predictions) -> Predictions:
    if table.index is None:
        raise DataError(
            f"Nobody knows which rows {name} holds: {name}.index is None. Read a stream with "
            "num_workers=0 to get their numbers."
        )
    index = np.asarray(table.index)
    order = np.argsort(index, kind="stable")
    table, index = replace(table, index=index)[order], index[order]
    if (twice := index[1:][np.diff(index) == 0]).size:
        raise DataError(f"{name} holds row {twice[0]} twice. Predict a loader with each row once.")
    return table


def _shown(table: Predictions, row: int) -> str:
    assert table.references is not None
    return f"{table.references[row]!r:.40}".removeprefix("np.")


def _differing(a: Any, b: Any) -> NDArray[np.bool_]:
    """Tell for each row whether two columns differ; padding does not count, and NaN is NaN."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype.kind in "biuf":
        if a.ndim == b.ndim == 2:
            a, b = _same_width(a, b)
        if a.shape != b.shape:
            return np.ones(len(a), np.bool_)
        differs = (a != b) & ((a == a) | (b == b))
        return np.asarray(differs.any(tuple(range(1, a.ndim))))
    pairs = zip(a, b, strict=True)
    return np.array([not np.array_equal(one, other) for one, other in pairs], np.bool_)


def _compare(
    scorer: Scorer, a: Predictions, b: Predictions, confidence: float
) -> dict[str, Difference]:
    """Compare by one metric."""
    is_unclear = a.ignored == IGNORE_INDEX and getattr(a.predictions, "ndim", 1) > 2
    if is_unclear and scorer.takes in ("classes", "values"):
        raise MetricError(
            f"{scorer.name} scores labels, and a row holds a map of them, whose ignored label "
            'nobody knows here. Compare by "mean_iou", or by a function of the rows.'
        )
    sides = given_by(_table_of(a), scorer), given_by(_table_of(b), scorer)
    scores = [score_rows(scorer, side, np.arange(side.num_rows)) for side in sides]
    differs = _differing(sides[0].predictions, sides[1].predictions)
    if (row := sides[0].row) is not None:
        differs = np.bincount(row, differs, minlength=sides[0].num_rows) > 0
    found: dict[str, Difference] = {}
    entries, counts, differ = _grouped(*sides, differs)
    weights = counts.astype(np.float64)
    of_a, of_b = (
        weighted_scores(scorer, entries, expected, np.concatenate(side))
        for expected, side in zip(
            scores, ((weights, 0 * weights), (0 * weights, weights)), strict=True
        )
    )
    if weighted := {key: score for key, score in of_a.items() if key in of_b}:
        number = num_resamples_for(len(counts))
        found = _tested(all_of(weighted), scores, counts, differ, number, confidence)
    if "accuracy" in found and sides[0].row is None:
        found["accuracy"] = _mcnemar(found["accuracy"], entries, counts)
    ones = np.ones(sides[0].num_rows, np.int64)
    if not found:
        only_a, only_b = np.concatenate([ones, 0 * ones]), np.concatenate([0 * ones, ones])
        known = list(zip(scores, (only_a, only_b), strict=True))
        summed, _ = summed_scores(scorer, _stacked(*sides), known)
        if summed is not None:
            number = num_resamples_for(len(ones))
            found = _tested(summed, scores, ones, differs, number, confidence)
    if missing := [key for key in scores[0] if key in scores[1] and key not in found]:
        number = num_calls_for(len(ones))
        calls = called(scorer, _stacked(*sides), missing)
        found |= _tested(calls, scores, ones, differs, number, confidence)
    return {key: found[key] for key in scores[0] if key in found}


def _table_of(predictions: Predictions) -> Table:
    """Return the table that an evaluation makes of the same rows.

    Args:
        predictions: Predictions with references.
    """
    kind = kind_of(predictions)
    predicted: Any = predictions.predictions
    references = predictions.references
    misfit = None
    if kind != "object" and isinstance(references, np.ndarray):
        if predicted.ndim == references.ndim == 2:
            predicted, references = _same_width(predicted, references)
        if predicted.shape != references.shape:
            shapes = f"{predicted.shape}, and those of the labels {references.shape}"
            misfit = 0, f"the shape of the predictions is {shapes}"
    columns = {"predictions": predicted, "references": references, "scores": predictions.scores}
    tasks = {"classes": "multi_label_classification", "value": "regression"}
    if isinstance(references, np.ndarray) and references.dtype.kind == "f":
        tasks["class"] = "regression"  # two classes, told by the sign of one logit
    return Table(
        {name: Column([_plain(values)]) for name, values in columns.items() if values is not None},
        {name: Column([list(values)]) for name, values in predictions.kept.items()},
        None,
        predictions.index,
        len(predictions),
        tasks.get(kind, ""),
        predictions.ignored,
        misfit,
        "decode" if kind == "object" else "rule",
    )


def _same_width(a: NDArray[Any], b: NDArray[Any]) -> list[NDArray[Any]]:
    """Pad the narrower one of two arrays ``(rows, width)`` with -100."""
    widest = max(a.shape[1], b.shape[1])
    return [
        np.pad(side, ((0, 0), (0, widest - side.shape[1])), constant_values=IGNORE_INDEX)
        for side in (a, b)
    ]


def _plain(values: Any) -> Any:
    is_numbers = isinstance(values, np.ndarray) and values.dtype.kind in "biuf"
    return values if is_numbers else list(values)


def _grouped(
    a: Given, b: Given, differs: NDArray[np.bool_]
) -> tuple[Entries, NDArray[np.int64], NDArray[np.bool_]]:
    """Return the rows of a and then those of b, how often each occurs, and which differ.

    Rows that are the same in both are one row with a count, where they hold classes.
    """
    both = _stacked(a, b)
    if both.row is not None or not are_classes(both.predictions):
        row = np.arange(2 * a.num_rows) if both.row is None else both.row
        entries = Entries(both.predictions, both.references, row, both.num_rows)
        return entries, np.ones(a.num_rows, np.int64), differs
    places, counts = group_rows(a.predictions, b.predictions, a.references)
    predictions = np.concatenate([a.predictions[places], b.predictions[places]])
    references = np.concatenate([a.references[places]] * 2)
    rows = np.arange(2 * len(places))
    return Entries(predictions, references, rows, len(rows)), counts, differs[places]


def _stacked(a: Given, b: Given) -> Given:
    """Return the rows of a and then those of b."""
    row = None
    if a.row is not None and b.row is not None:
        row = np.concatenate([a.row, a.num_rows + b.row])
    kept = None
    if a.kept is not None and b.kept is not None:
        kept = {name: [*a.kept[name], *b.kept[name]] for name in a.kept if name in b.kept}
    predictions, references = (_joint(own, other) for own, other in zip(a[:2], b[:2], strict=True))
    return Given(predictions, references, row, kept, a.num_rows + b.num_rows)


def _joint(a: Any, b: Any) -> Any:
    return np.concatenate([a, b]) if isinstance(a, np.ndarray) else type(a)([*a, *b])


def _tested(
    scored: Scored,
    scores: Sequence[Mapping[str, float]],
    counts: NDArray[np.int64],
    differs: NDArray[np.bool_],
    number: int,
    confidence: float,
) -> dict[str, Difference]:
    """Return the difference of each score, with its interval and a permutation test.

    Args:
        scored: Scores by the weights of the rows of a, and then of those of b.
        scores: Scores of a, and of b.
        counts: How often each row occurs.
        differs: Which rows are predicted differently.
        number: Number of resamples, and of exchanges.
        confidence: Confidence of the intervals.
    """

    def difference(of_a: Floats, of_b: Floats) -> dict[str, Floats]:
        first = scored(np.concatenate([of_a, of_b], axis=1))
        second = scored(np.concatenate([of_b, of_a], axis=1))
        return {key: second[key] - first[key] for key in first if key in second}

    intervals = bootstrap(
        lambda weights: difference(weights, np.zeros_like(weights)),
        counts,
        confidence=confidence,
        num_resamples=number,
    )
    parts = [difference(counts - taken, taken) for taken in swaps(counts, differs, number)]
    num_exchanges = sum(len(next(iter(part.values()))) for part in parts)
    is_exact = num_exchanges == 2.0 ** min(int(counts[differs].sum()), 1000)
    test = f"{'all' if is_exact else 'random'} exchanges of predictions: {num_exchanges}"
    found = {}
    for key, interval in intervals.items():
        of_a, of_b = scores[0][key], scores[1][key]
        drawn = np.concatenate([part[key] for part in parts])
        p = p_value(drawn, of_b - of_a, is_exact=is_exact)
        found[key] = Difference(of_a, of_b, of_b - of_a, interval.low, interval.high, p, test)
    return found


def _mcnemar(found: Difference, entries: Entries, counts: NDArray[np.int64]) -> Difference:
    """Return a difference of accuracies with the p-value of McNemar's exact test."""
    from scipy.stats import binomtest

    is_right = (entries.predictions == entries.references).reshape(2, len(counts), -1).all(2)
    only_a, only_b = (
        int(counts[is_right[own] & ~is_right[other]].sum()) for own, other in ((0, 1), (1, 0))
    )
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    test = f"McNemar: {only_a} rows only a has right, {only_b} only b"
    return replace(found, p_value=p, test=test)
