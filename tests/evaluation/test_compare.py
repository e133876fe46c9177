"""``compare_predictions``: against SciPy, for every kind of rows, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import correlation, seeded
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from manualloop import (
    ConfigError,
    DataError,
    MetricError,
    Predictions,
    compare_predictions,
    evaluate_loop,
    predict_loop,
)


def noisy(generator, references, share, num_classes=2):
    other = (references + generator.integers(1, num_classes, len(references))) % num_classes
    return np.where(generator.random(len(references)) < share, references, other)


def two_models(num_rows=120, shares=(0.75, 0.85), num_classes=2, seed=0):
    generator = np.random.default_rng(seed)
    references = generator.integers(0, num_classes, num_rows)
    rows = np.arange(num_rows)
    return [
        Predictions(rows, noisy(generator, references, share, num_classes), None, references)
        for share in shares
    ]


def test_an_accuracy_is_tested_by_mcnemar():
    a, b = two_models()
    found = compare_predictions(a, b, "accuracy")["accuracy"]
    rights = [(table.predictions == table.references).astype(float) for table in (a, b)]
    assert (found.a, found.b) == (rights[0].mean(), rights[1].mean())
    assert found.difference == found.b - found.a
    only_a, only_b = int((rights[0] > rights[1]).sum()), int((rights[0] < rights[1]).sum())
    assert found.p_value == stats.binomtest(only_a, only_a + only_b).pvalue
    assert found.test == f"McNemar: {only_a} rows only a has right, {only_b} only b"
    theirs = stats.bootstrap(
        tuple(rights),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        **seeded(stats.bootstrap, 0),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(theirs, abs=1 / 120)


@pytest.mark.parametrize("num_rows", [10, 120])
def test_other_scores_are_tested_by_exchanges(num_rows):
    a, b = two_models(num_rows, shares=(0.6, 0.9))

    def f1(p):
        return 2 * (p * a.references).sum(-1) / (p.sum(-1) + a.references.sum())

    theirs = stats.permutation_test(
        (a.predictions, b.predictions),
        lambda p, q, axis: f1(q) - f1(p),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        **seeded(stats.permutation_test, 0),
    )
    found = compare_predictions(a, b, "f1")["f1"]
    assert found.difference == pytest.approx(theirs.statistic, rel=1e-12)
    is_exact = num_rows == 10
    assert found.p_value == pytest.approx(theirs.pvalue, abs=1e-12 if is_exact else 0.02)
    assert found.test.startswith("all" if is_exact else "random")


@pytest.mark.parametrize("metric", ["mse", "pearson"])
def test_values_are_compared(metric):
    generator = np.random.default_rng(0)
    references = generator.normal(size=80)
    tables = [
        Predictions(np.arange(80), references + generator.normal(size=80) * s, None, references)
        for s in (1.0, 0.8)
    ]
    plain = {"mse": lambda p, r: ((p - r) ** 2).mean(-1), "pearson": correlation}[metric]
    theirs = stats.permutation_test(
        tuple(table.predictions for table in tables),
        lambda p, q, axis: plain(q, references) - plain(p, references),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        **seeded(stats.permutation_test, 0),
    )
    found = compare_predictions(*tables, metric)[metric]
    assert found.difference == pytest.approx(theirs.statistic)
    assert found.p_value == pytest.approx(theirs.pvalue, abs=0.02)
    assert found.low < found.difference < found.high


def agreement(predictions, references):
    is_same = np.asarray(predictions) == np.asarray(references)
    return float(is_same.reshape(len(is_same), -1).all(1).mean())


@pytest.mark.parametrize("kind", ["class", "labels", "texts"])
def test_a_function_finds_what_the_built_in_metric_finds(kind):
    a, b = two_models(60, shares=(0.6, 0.9))
    if kind == "labels":
        a, b = (
            replace(
                table,
                predictions=np.eye(2)[table.predictions].astype(int),
                references=np.eye(2, dtype=np.float32)[table.references],
                scores=np.eye(2, dtype=np.float32)[table.predictions],
            )
            for table in (a, b)
        )
    expected = compare_predictions(a, b, "accuracy")["accuracy"]
    if kind == "texts":
        names = np.array(["no", "yes"], object)
        a, b = (
            replace(table, predictions=names[table.predictions], references=names[table.references])
            for table in (a, b)
        )
    comparison = compare_predictions(a, b, agreement)
    found = comparison["agreement"]
    assert (found.a, found.b) == pytest.approx((expected.a, expected.b))
    assert found.p_value == pytest.approx(expected.p_value, abs=0.03)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.04)
    assert comparison.num_rows == 60
    assert comparison.num_different == sum(map(np.any, np.asarray(a.predictions != b.predictions)))


def of_tokens(predictions, references, width):
    padded = [
        np.array([np.pad(row, (0, width - len(row)), constant_values=-100) for row in side])
        for side in (predictions, references)
    ]
    return Predictions(np.arange(len(predictions)), padded[0], None, padded[1])


def test_rows_of_tokens_are_exchanged_whole():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, 12)
    references = [generator.integers(0, 3, length) for length in lengths]
    references[3][0] = -100
    sides = [[noisy(generator, row, share, 3) for row in references] for share in (0.5, 0.8)]
    a, b = of_tokens(sides[0], references, 8), of_tokens(sides[1], references, 11)
    found = compare_predictions(a, b, "accuracy")["accuracy"]

    def accuracy(side):
        kept = [row != -100 for row in references]
        right = sum((p == r)[k].sum() for p, r, k in zip(side, references, kept, strict=True))
        return right / sum(map(np.sum, kept))

    assert (found.a, found.b) == pytest.approx((accuracy(sides[0]), accuracy(sides[1])))
    differences = []
    for bits in range(2**12):  # every exchange of rows
        pairs = [
            (two, one) if bits >> row & 1 else (one, two)
            for row, (one, two) in enumerate(zip(*sides, strict=True))
        ]
        first, second = zip(*pairs, strict=True)
        differences.append(accuracy(second) - accuracy(first))
    reaches = np.abs(differences) >= abs(found.difference) - 1e-12
    assert found.p_value == pytest.approx(
        reaches.mean(), abs=1e-12 if "all" in found.test else 0.02
    )


def test_rows_are_joined_by_their_numbers():
    a, b = two_models(50)
    expected = compare_predictions(a, b, "glue/mrpc")
    order = np.random.default_rng(1).permutation(50)
    found = compare_predictions(a, b[order], "glue/mrpc")
    assert found == expected
    assert compare_predictions(a, replace(b, references=None), "glue/mrpc") == expected
    assert list(found.differences) == ["accuracy", "f1"]


def test_rows_without_a_label_are_left_out():
    a, b = two_models(50)
    expected = compare_predictions(a[10:], b[10:], ["f1", agreement])
    hidden = np.where(np.arange(50) < 10, -100, a.references)
    a, b = (replace(table, references=hidden) for table in (a, b))
    assert compare_predictions(a, b, ["f1", agreement]) == expected


def test_the_same_predictions_do_not_differ():
    a, _ = two_models()
    for metric in ("accuracy", "f1", "matthews_correlation", agreement):
        (found,) = compare_predictions(a, a, metric).differences.values()
        assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_nothing_is_drawn_from_global_generators():
    a, b = two_models()
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    first, second = (compare_predictions(a, b, ["f1", agreement]) for _ in range(2))
    assert first == second
    assert np.array_equal(state, np.random.get_state()[1])


def test_a_comparison_prints_as_a_table():
    a, b = two_models()
    text = str(compare_predictions(a, b, "glue/mrpc"))
    head, *lines = text.splitlines()
    assert head.startswith("120 rows, 4")
    assert head.endswith("predicted differently; intervals of 0.95 around b - a")
    assert [line.split()[0] for line in lines] == ["accuracy", "f1"]
    assert "p = " in lines[0]
    assert "McNemar: " in lines[0]


def test_wider_for_more_confidence():
    a, b = two_models()
    narrow, wide = (compare_predictions(a, b, "f1", confidence=c)["f1"] for c in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


REFUSED = {
    "other rows": (lambda a, b: (a, b[1:]), DataError, "Only a has row 0 .and 0 more."),
    "other numbers": (
        lambda a, b: (a, replace(b, index=b.index + 5)),
        DataError,
        "Only a has row 0 .and 4 more.",
    ),
    "a row twice": (
        lambda a, b: (a, b[np.r_[0, 0:49]]),
        DataError,
        "b holds row 0 twice",
    ),
    "other references": (
        lambda a, b: (a, replace(b, references=np.where(b.index == 7, 5, b.references))),
        DataError,
        r"Row 7 has the reference int64\(\d\) in a and int64\(5\) in b, and 0 more",
    ),
    "no references": (
        lambda a, b: (replace(a, references=None), replace(b, references=None)),
        DataError,
        "Neither a nor b has references",
    ),
    "no index": (
        lambda a, b: (replace(a, index=None), b),
        DataError,
        "a.index is None",
    ),
    "other names": (
        lambda a, b: (replace(a, names=("no", "yes")), replace(b, names=("yes", "no"))),
        DataError,
        "The classes of a are no, yes, those of b yes, no",
    ),
    "other kinds": (
        lambda a, b: (a, replace(b, predictions=b.predictions / 2)),
        DataError,
        "A row of a is a class, one of b a value",
    ),
    "no predictions": (lambda a, b: (a, {"f1": 0.5}), ConfigError, "b must be Predictions, got a"),
    "no rows": (lambda a, b: (a[:0], b[:0]), DataError, "no row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_compare_is_refused(case):
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        compare_predictions(*change(*two_models(50)), "accuracy")


@pytest.mark.parametrize("confidence", [0, 1, 95, True, "0.95", None, float("nan")])
def test_a_confidence_is_between_0_and_1(confidence):
    with pytest.raises(ConfigError, match="confidence must be a number between 0 and 1"):
        compare_predictions(*two_models(), "accuracy", confidence=confidence)


@pytest.fixture
def few_calls(monkeypatch):
    """Call a metric for few resamples, where its numbers do not matter."""
    monkeypatch.setattr("manualloop.evaluation.compare.num_calls_for", lambda num_rows: 20)


def test_scores_of_classes_have_their_names(few_calls):
    a, b = (replace(table[:40], names=("no", "yes")) for table in two_models())
    found = compare_predictions(a, replace(b, names=None, index=list(range(40))), "f1/none")
    assert list(found.differences) == ["f1_no", "f1_yes"]


def test_a_metric_without_a_number_is_refused():
    with pytest.raises(MetricError, match="nothing can be compared"):
        compare_predictions(*two_models(), "confusion_matrix")


def test_maps_of_classes_are_compared_by_a_metric_of_maps():
    generator = np.random.default_rng(0)
    maps = generator.integers(0, 2, (12, 4, 4))
    maps[0, 0] = 255
    tables = [
        Predictions(
            np.arange(12), np.where(generator.random(maps.shape) < s, maps, 1) % 2, None, maps
        )
        for s in (0.3, 0.9)
    ]
    with pytest.raises(MetricError, match='Compare by "mean_iou"'):
        compare_predictions(*tables, "accuracy")
    found = compare_predictions(*tables, "mean_iou").differences
    assert found["mean_iou"].low > 0


@pytest.mark.parametrize("ignored", [0, 2, 255])
def test_labels_that_count_in_no_score_are_those_of_both_tables(ignored):
    generator = np.random.default_rng(0)
    maps = generator.choice([0, 1, ignored], (12, 4, 4))
    tables = [
        Predictions(
            np.arange(12),
            np.where(generator.random(maps.shape) < share, maps, 1) % 3,
            None,
            maps,
            names=("a", "b", "c"),
            ignored=ignored,
        )
        for share in (0.3, 0.9)
    ]
    counts = maps != ignored
    for metric in ("accuracy", "mean_iou"):
        found = compare_predictions(*tables, metric).differences
        for table, score in zip(tables, ("a", "b"), strict=True):
            right, predicted = maps[counts], table.predictions[counts]
            expected = (right == predicted).mean()
            name = {"accuracy": "accuracy", "mean_iou": "overall_accuracy"}[metric]
            assert getattr(found[name], score) == pytest.approx(expected)
    assert (
        f" {'abc'[ignored] if ignored < 3 else 255} " not in repr(tables[0]).split("references")[1]
    )
    row = tables[0][0]
    labels = np.array([["abc"[n] if n != ignored else None for n in line] for line in maps[0]])
    assert np.array_equal(np.array(row["reference_label"]), labels)
    assert None not in np.array(row["label"])
    unknown = replace(tables[1], ignored=-100)
    assert compare_predictions(tables[0], unknown, "mean_iou")["mean_iou"].b == found["mean_iou"].b
    other = replace(tables[1], ignored=7)
    with pytest.raises(DataError, match="Give both configs one semantic_loss_ignore_index"):
        compare_predictions(tables[0], other, "mean_iou")


def test_language_models_are_compared_on_the_next_token():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(9, (10, 6), generator=generator)
    sides = []
    for share in (0.3, 0.8):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        )
        after = torch.roll(ids, -1, 1)
        is_right = torch.rand(ids.shape, generator=generator) < share
        logits = torch.nn.functional.one_hot(torch.where(is_right, after, (after + 1) % 9), 9)
        model.forward = lambda input_ids, labels=None, found=logits: {"logits": found.float()}
        batches = [{"input_ids": ids, "labels": ids}]
        sides.append((model, batches))
    tables = [predict_loop(*side) for side in sides]
    assert (tables[0].references[:, -1] == -100).all()
    found = compare_predictions(*tables, "accuracy")["accuracy"]
    for (model, batches), score in zip(sides, (found.a, found.b), strict=True):
        assert score == evaluate_loop(model, batches, "accuracy")["accuracy"]
    assert found.b - found.a > 0.3


def test_probabilities_are_compared_where_the_classes_are_the_same():
    generator = np.random.default_rng(0)
    a, _ = two_models(60)
    scores = generator.random((60, 1)) * 0.5 + a.predictions[:, None] * 0.5
    noise = np.clip(scores + generator.normal(size=(60, 1)) * 0.1 * (scores > 0.6), 0.51, 1)
    a, b = (
        replace(a, scores=np.concatenate([1 - s, s], 1).astype(np.float32))
        for s in (scores, np.where(scores > 0.5, noise, scores))
    )
    comparison = compare_predictions(a, b, ["accuracy", "roc_auc"])
    assert comparison["accuracy"].p_value == 1
    found = comparison["roc_auc"]
    assert found.difference != 0
    assert 0 < found.p_value < 1
    assert found.low < found.difference < found.high
    with pytest.raises(MetricError):
        compare_predictions(replace(a, scores=None), b, "roc_auc")


def test_a_score_of_two_built_in_metrics_is_compared_once(few_calls):
    references = np.arange(40) % 3
    a = Predictions(np.arange(40), np.where(np.arange(40) % 5, references, 0), None, references)
    b = Predictions(np.arange(40), np.where(np.arange(40) % 7, references, 1), None, references)
    found = compare_predictions(a, b, ["accuracy", "classification_report"])
    assert repr(found["accuracy"]) == repr(compare_predictions(a, b, "accuracy")["accuracy"])
    assert "0_f1-score" in found.differences
    with pytest.raises(MetricError, match="Key 'accuracy' comes from two metrics"):
        compare_predictions(a, b, ["accuracy", lambda p, r: {"accuracy": 0.0 * len(p)}])


def test_small_differences_are_not_printed_as_none(few_calls):
    references = np.linspace(0, 0.01, 40)
    numbers = np.arange(40)
    a, b = (Predictions(numbers, references + e, None, references) for e in (1e-3, 2e-3))
    printed = repr(compare_predictions(a, b, "mse"))
    assert "1e-06 -> 4e-06, +3.00e-06 (+3.00e-06 to +3.00e-06), p = " in printed
    assert repr(compare_predictions(a[:1], b[:1], "mse")).startswith("1 row, 1 of them")
