"""Intervals and tests over arrays: against plain loops and against SciPy."""

import numpy as np
import pytest
from helpers import correlation, seeded
from scipy import stats
from sklearn import metrics

from manualloop import load_metric
from manualloop.evaluation.resampling import (
    bootstrap,
    interval_of,
    num_resamples_for,
    p_value,
    resamples,
    swaps,
)
from manualloop.evaluation.weighted import (
    BY_KEY,
    Entries,
    area_under_curve,
    average_precision,
    group_rows,
)

AVERAGES = ("macro", "micro", "weighted")
OF_CLASSES = ["accuracy", "matthews_correlation"]
OF_CLASSES += [
    f"{name}/{average}" for name in ("f1", "precision", "recall") for average in AVERAGES
]
OF_LABELS = [name for name in OF_CLASSES if name != "matthews_correlation"]
OF_LABELS += [f"{name}/samples" for name in ("f1", "precision", "recall")]
BINARY = ["f1", "precision", "recall"]
OF_VALUES = ["mse", "mae", "pearson", "spearman"]
KEY = {"spearman": "spearmanr"}


def key_of(name):
    return KEY.get(name, name.replace("/", "_"))


def by_plain_loop(name, entries, weights):
    """Score each resample by itself: its rows, each repeated."""
    found = []
    for row_weights in weights.astype(int):
        times = row_weights[entries.row]
        predictions = np.repeat(entries.predictions, times, axis=0)
        references = np.repeat(entries.references, times, axis=0)
        (score,) = (
            load_metric(name).compute(predictions=predictions, references=references).values()
        )
        found.append(score)
    return np.array(found)


def sides(generator, kind):
    number = int(generator.integers(1, 30))
    if kind == "classes":
        return generator.integers(0, generator.integers(1, 6), (2, number))
    if kind == "binary":
        return generator.integers(0, generator.integers(1, 3), (2, number))
    if kind == "labels":
        return generator.integers(0, 2, (2, number, generator.integers(2, 5)))
    if kind == "ties":
        return generator.integers(0, 4, (2, number)) / 4
    return generator.normal(size=(2, number)) * 10.0 ** generator.integers(-3, 4) + 7


def entries_of(predictions, references):
    """The entries of arrays with one entry a row."""
    return Entries(predictions, references, np.arange(len(references)), len(references))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "classes") for name in OF_CLASSES),
        *((name, "binary") for name in (*BINARY, "matthews_correlation", "f1/macro")),
        *((name, "labels") for name in OF_LABELS),
        *((name, kind) for name in OF_VALUES for kind in ("values", "ties")),
    ],
)
def test_weighted_scores_equal_those_of_repeated_rows(name, kind):
    generator = np.random.default_rng(len(name + kind))
    for _ in range(4):
        entries = entries_of(*sides(generator, kind))
        if entries.num_rows == 1 and name in ("pearson", "spearman"):
            continue
        weights = next(resamples(np.ones(entries.num_rows), 4, seed=int(generator.integers(99))))
        found = BY_KEY[key_of(name)](entries)(weights)
        expected = by_plain_loop(name, entries, weights)
        if name in ("pearson", "spearman"):
            # SciPy returns rounding errors where a resample has a single value.
            constant = [
                min(
                    len(np.unique(side[w > 0]))
                    for side in (entries.predictions, entries.references)
                )
                == 1
                for w in weights
            ]
            assert np.isnan(found[constant]).all()
            found, expected = found[~np.array(constant)], expected[~np.array(constant)]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_rows_of_several_entries_are_resampled_whole():
    generator = np.random.default_rng(0)
    row = np.sort(generator.integers(0, 7, 40))  # row 0 to 6, of different lengths
    predictions, references = generator.integers(0, 4, (2, 40))
    entries = Entries(predictions, references, row, 8)  # the last row has no entry
    weights = next(resamples(np.ones(8), 20))
    for name in OF_CLASSES:
        np.testing.assert_allclose(
            BY_KEY[key_of(name)](entries)(weights),
            by_plain_loop(name, entries, weights),
            rtol=1e-12,
        )


def test_areas_equal_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    for number in (5, 40):
        is_positive = generator.random(number) < 0.4
        is_positive[:2] = True, False
        scores = generator.integers(0, 9, number) / 8 + is_positive / 4
        weights = next(resamples(np.ones(number), 30))
        weights = np.vstack([weights, is_positive, ~is_positive])  # of one class alone
        for area, plain in (
            (area_under_curve, metrics.roc_auc_score),
            (average_precision, metrics.average_precision_score),
        ):
            for found, row_weights in zip(area(scores, is_positive)(weights), weights, strict=True):
                times = row_weights.astype(int)
                rights, given = np.repeat(is_positive, times), np.repeat(scores, times)
                if not rights.any() or (rights.all() and plain is metrics.roc_auc_score):
                    assert np.isnan(found)
                else:
                    assert found == pytest.approx(plain(rights, given), rel=1e-12)


def test_groups_hold_every_row_once():
    generator = np.random.default_rng(0)
    for _ in range(50):
        columns = generator.integers(0, 3, (3, generator.integers(1, 40)))
        places, counts = group_rows(*columns)
        found = sorted(np.repeat(columns[:, places].T, counts, axis=0).tolist())
        assert found == sorted(columns.T.tolist())
        assert len(np.unique(columns[:, places].T, axis=0)) == len(places)


@pytest.mark.parametrize("counts", [[1] * 9, [5000, 3, 1, 16, 15], [40], [1], [20, 20], [0, 3, 0]])
def test_resamples_have_all_rows_and_the_right_share_of_each(counts):
    counts = np.array(counts)
    parts = list(resamples(counts, 30_000))
    weights = np.concatenate(parts)
    assert weights.shape == (30_000, len(counts))
    assert (weights.sum(1) == counts.sum()).all()
    assert ((weights >= 0) & (weights == weights.astype(int))).all()
    # The number of a group is binomial: its mean and variance are known.
    share = counts / counts.sum()
    spread = np.sqrt(counts.sum() * share * (1 - share))
    np.testing.assert_allclose(weights.mean(0), counts, atol=5 * spread.max() / 30_000**0.5)
    np.testing.assert_allclose(weights.std(0), spread, rtol=0.03)
    again = np.concatenate(list(resamples(counts, 30_000)))
    assert np.array_equal(weights, again)
    if len(counts) > 1 and counts.sum() > 3:
        assert not np.array_equal(weights, np.concatenate(list(resamples(counts, 30_000, seed=1))))


def test_no_global_generator_is_touched():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    bootstrap(lambda weights: {"n": weights.sum(1)}, np.ones(5))
    list(swaps(np.ones(30), np.ones(30, bool), 1000))
    assert np.array_equal(np.random.get_state()[1], before)


def one(score):
    return lambda weights: {"score": score(weights)}


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation", "mse", "pearson"])
def test_intervals_are_those_of_scipy(name):
    generator = np.random.default_rng(0)
    if name in OF_VALUES:
        predictions, references = generator.normal(size=(2, 60))
        predictions += references
    else:
        references = generator.integers(0, 2, 60)
        predictions = np.where(generator.random(60) < 0.8, references, 1 - references)
    plain = {
        "accuracy": lambda p, r: np.mean(p == r, axis=-1),
        "mse": lambda p, r: np.mean((p - r) ** 2, axis=-1),
        "pearson": correlation,
        "f1": lambda p, r: 2 * (p * r).sum(-1) / (p.sum(-1) + r.sum(-1)),
        "matthews_correlation": correlation,
    }[name]
    theirs = stats.bootstrap(
        (predictions, references),
        lambda p, r, axis: plain(p, r),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        vectorized=True,
        **seeded(stats.bootstrap, 5),
    )
    score = BY_KEY[name](entries_of(predictions, references))
    found = bootstrap(one(score), np.ones(60), num_resamples=20_000)["score"]
    # Of 20,000 resamples, an end is exact to about 0.02 standard errors; rows are 60 steps wide.
    near = 0.1 * theirs.standard_error + (1 / 60 if name == "accuracy" else 0)
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=near)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=near)
    assert found.num_undefined == 0


def test_groups_give_the_interval_of_single_rows():
    grouped = bootstrap(one(lambda w: w @ [0, 1] / 400), np.array([80, 320]))["score"]
    rows = np.repeat([0.0, 1.0], [80, 320])
    single = bootstrap(one(lambda w: w @ rows / 400), np.ones(400), num_resamples=10_000)["score"]
    assert grouped.low == pytest.approx(single.low, abs=0.005)
    assert grouped.high == pytest.approx(single.high, abs=0.005)


def test_intervals_hold_the_truth_as_often_as_they_promise():
    """300 data sets of 408 rows, of which 80 % are right in truth."""
    generator = np.random.default_rng(0)
    holds = 0
    for number_right in generator.binomial(408, 0.8, 300):
        counts = np.array([408 - number_right, number_right])
        found = bootstrap(one(lambda w: w[:, 1] / 408), counts, num_resamples=2000)["score"]
        holds += found.low <= 0.8 <= found.high
    assert 0.92 <= holds / 300 <= 0.97


def test_resamples_without_a_score_are_left_out():
    scores = np.append(np.arange(101.0), [np.nan] * 7)
    assert interval_of(scores, 0.9) == pytest.approx((5, 95, 7))
    assert np.isnan(interval_of(np.append([1.0], [np.nan] * 2), 0.9)[:2]).all()


def test_many_rows_get_fewer_resamples():
    assert num_resamples_for(4) == 10_000
    assert num_resamples_for(50_000) == 2000
    assert num_resamples_for(10**7) == 1000


@pytest.mark.parametrize("number", [6, 60])
def test_p_values_are_those_of_scipy(number):
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, number))
    b += 0.3
    theirs = stats.permutation_test(
        (a, b),
        lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        **seeded(stats.permutation_test, 2),
    ).pvalue
    taken = np.concatenate(list(swaps(np.ones(number), np.ones(number, bool), 20_000)))
    differences = ((1 - 2 * taken) @ (b - a)) / number
    is_exact = number == 6
    assert len(differences) == (2**6 if is_exact else 20_000)
    found = p_value(differences, float(np.mean(b - a)), is_exact=is_exact)
    assert found == pytest.approx(theirs, abs=1e-12 if is_exact else 0.015)


def test_exchanges_of_groups_are_those_of_rows():
    counts, differs = np.array([2, 5, 1]), np.array([True, False, True])
    (taken,) = swaps(counts, differs, 100)
    found = sorted(map(tuple, taken.astype(int).tolist()))
    rows = [(x + y, 0, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    assert found == sorted(rows)
    many = np.concatenate(list(swaps(counts * 100, differs, 5000)))
    assert many.shape == (5000, 3)
    assert (many[:, 1] == 0).all()
    assert many.mean(0) == pytest.approx([100, 0, 50], rel=0.02)
    (none,) = swaps(counts, np.zeros(3, bool), 100)
    assert none.tolist() == [[0, 0, 0]]
