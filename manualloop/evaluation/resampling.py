"""Resampling: bootstrap intervals and permutation tests of scores, as functions over arrays.

A resample of rows is a vector of weights: how often each row occurs in it. Rows that are the same
are one group with a count, so that ten thousand resamples of a hundred thousand rows of two classes
are ten thousand vectors of four numbers. A score is a function of many such vectors at once.

Nothing here draws from a global random generator: the same rows give the same interval.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 (percentile
intervals), 15 and 16 (tests).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Weighted: TypeAlias = Callable[[Floats], Floats]
"""``score(weights) -> scores``: for each of ``(resamples, groups)`` weights the score of the rows,
each taken as often as its weight tells."""

Scored: TypeAlias = Callable[[Floats], Mapping[str, Floats]]
"""Several scores of the same weights, by name."""

NUM_RESAMPLES = 10_000
_LEAST = 1_000
_MOST_WORK = 100_000_000  # draws of a row
_AT_ONCE = 100_000  # weights in memory: more do not fit into a processor's cache
_LARGE = 16  # rows of a group, from which on it is faster to draw their number
_SEED = 20_260_101


class Interval(NamedTuple):
    """An interval of a score.

    Attributes:
        low: Lower end.
        high: Upper end.
        num_undefined: Resamples in which the score is not defined; they are left out.
    """

    low: float
    high: float
    num_undefined: int


def num_resamples_for(num_groups: int) -> int:
    """Return how many resamples are taken: 10,000, or fewer of many groups, at least 1,000.

    >>> num_resamples_for(4), num_resamples_for(50_000)
    (10000, 2000)
    """
    return int(np.clip(_MOST_WORK // num_groups, _LEAST, NUM_RESAMPLES))


def resamples(counts: NDArray[Any], num_resamples: int, seed: int = _SEED) -> Iterator[Floats]:
    """Yield bootstrap resamples of rows, in parts that fit into memory.

    Args:
        counts: How often each group of the same rows occurs, ``(groups,)``.
        num_resamples: Number of resamples over all parts.
        seed: Seed of the draws.

    Yields:
        Weights ``(resamples, groups)``. Each sums to the number of rows.
    """
    counts = np.asarray(counts, np.int64)
    generator = np.random.default_rng(seed)
    # How often a large group occurs is drawn at once; of small ones the rows are drawn.
    large = np.flatnonzero(counts >= _LARGE)
    small = np.flatnonzero(counts < _LARGE)
    rows = np.repeat(small, counts[small])
    chances = np.append(counts[large], len(rows)) / counts.sum()
    step = max(1, _AT_ONCE // max(len(counts), len(rows)))
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        numbers = generator.multinomial(counts.sum(), chances, size)
        weights = np.zeros((size, len(counts)))
        if len(rows):
            places = rows[generator.integers(len(rows), size=numbers[:, -1].sum())]
            places += len(counts) * np.repeat(np.arange(size), numbers[:, -1])
            flat = np.bincount(places, minlength=weights.size)
            weights = flat.reshape(weights.shape).astype(np.float64)
        weights[:, large] = numbers[:, :-1]
        yield weights


def bootstrap(
    scores: Scored,
    counts: NDArray[Any],
    *,
    confidence: float = 0.95,
    num_resamples: int | None = None,
    seed: int = _SEED,
) -> dict[str, Interval]:
    """Return the percentile bootstrap intervals of scores, all of the same resamples.

    Args:
        scores: Function from weights to scores by name.
        counts: How often each group of the same rows occurs.
        confidence: Probability with which such an interval holds the true score.
        num_resamples: Number of resamples; None: see ``num_resamples_for``.
        seed: Seed of the draws.

    >>> def accuracy(weights):
    ...     return {"accuracy": weights @ [0, 1] / weights.sum(1)}
    >>> interval = bootstrap(accuracy, np.array([81, 327]))["accuracy"]
    >>> round(interval.low, 2), round(interval.high, 2)
    (0.76, 0.84)
    """
    number = num_resamples or num_resamples_for(len(counts))
    parts = [scores(weights) for weights in resamples(counts, number, seed)]
    return {
        name: interval_of(np.concatenate([part[name] for part in parts]), confidence)
        for name in parts[0]
    }


def interval_of(scores: Floats, confidence: float) -> Interval:
    """Return the percentile interval of the scores of resamples; NaN if half are not defined."""
    defined = scores[~np.isnan(scores)]
    num_undefined = len(scores) - len(defined)
    if 2 * num_undefined >= len(scores):
        return Interval(float("nan"), float("nan"), num_undefined)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(low), float(high), num_undefined)


def swaps(counts: NDArray[Any], differs: NDArray[np.bool_], num_resamples: int) -> Iterator[Floats]:
    """Yield random exchanges of two predictions of the same row, in parts that fit into memory.

    Args:
        counts: How often each group of the same rows occurs, ``(groups,)``.
        differs: Which groups have two predictions that differ. Others are never exchanged.
        num_resamples: Number of exchanges. All possible ones are taken if they are not more.

    Yields:
        Number of rows of each group whose predictions are exchanged, ``(exchanges, groups)``.
    """
    counts, places = np.asarray(counts, np.int64), np.flatnonzero(differs)
    if (single := int(counts[places].sum())) < 40 and 2**single <= num_resamples:
        rows = np.repeat(places, counts[places])
        bits = np.arange(2**single)[:, None] >> np.arange(single) & 1
        taken = np.zeros((2**single, len(counts)))
        for number, place in enumerate(rows):
            taken[:, place] += bits[:, number]
        yield taken
        return
    generator = np.random.default_rng(_SEED)
    step = max(1, _AT_ONCE // len(counts))
    for start in range(0, num_resamples, step):
        taken = np.zeros((min(step, num_resamples - start), len(counts)))
        taken[:, places] = generator.binomial(counts[places], 0.5, (len(taken), len(places)))
        yield taken


def p_value(differences: Floats, observed: float, *, is_exact: bool) -> float:
    """Return the share of differences at least as large as the observed one, of either sign.

    Args:
        differences: Differences under random exchanges.
        observed: The difference without an exchange.
        is_exact: Whether these are all possible exchanges. Otherwise the observed one is counted as
            one more, so that a p-value is never 0.
    """
    defined = differences[~np.isnan(differences)]
    extra = 0 if is_exact else 1
    if np.isnan(observed) or len(defined) + extra == 0:
        return float("nan")
    # Sums in another order differ in their last bits.
    reaches = np.abs(defined) >= abs(observed) * (1 - 1e-10) - 1e-13
    return float((reaches.sum() + extra) / (len(defined) + extra))
