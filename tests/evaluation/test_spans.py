"""Span F1: equal to seqeval, and nothing scored that is no span."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
from helpers import A_THOUSAND

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.metrics import load_metric
from manualloop.evaluation.spans import seqeval

TYPES = ["PER", "LOC", "ORG", "Größe-1"]


def tags(rng: random.Random, letters: str, length: int) -> list[str]:
    """Any tags: spans that begin with I, change their type within, or have no type."""
    bare = [*letters] if rng.random() < 0.1 else []
    names = ["O", "O", *bare, *(f"{letter}-{kind}" for letter in letters for kind in TYPES)]
    return [rng.choice(names) for _ in range(length)]


def sentences(seed: int) -> tuple[list[list[str]], list[list[str]], str]:
    rng = random.Random(seed)
    letters = rng.choice(["BI", "BIES", "IE"])
    right = [tags(rng, letters, rng.choice([0, 1, 2, 5, 9])) for _ in range(rng.randint(1, 5))]
    kind = seed % 5
    if kind == 0:  # no entity at all
        right = [["O"] * len(row) for row in right]
    keep = rng.choice([0.0, 0.6, 1.0])
    predicted = [
        [
            tag if rng.random() < keep else new
            for tag, new in zip(row, tags(rng, letters, len(row)), strict=True)
        ]
        for row in right
    ]
    if kind in (0, 1):
        predicted = [["O"] * len(row) for row in right]
    return predicted, right, letters


def expected_scores(right: Any, predicted: Any, **options: Any) -> dict[str, float]:
    """seqeval's own report, with the keys of the hub's script."""
    from seqeval.metrics import accuracy_score, classification_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = classification_report(right, predicted, output_dict=True, **options)
        overall = report.pop("micro avg")
        expected = {
            "overall_precision": overall["precision"],
            "overall_recall": overall["recall"],
            "overall_f1": overall["f1-score"],
        }
        del report["macro avg"], report["weighted avg"]
        has_tags = any(map(len, right))
        expected["overall_accuracy"] = accuracy_score(right, predicted) if has_tags else np.nan
    for kind, row in report.items():
        keys = {"precision": "precision", "recall": "recall", "f1": "f1-score", "number": "support"}
        expected |= {f"{kind}_{key}": row[name] for key, name in keys.items()}
    return expected


@A_THOUSAND
def test_sets_of_sentences_equal_seqeval(seeds: range) -> None:
    for seed in seeds:
        predicted, right, _ = sentences(seed)
        expected = expected_scores(right, predicted)
        found = seqeval(predicted, right)
        assert list(found) == list(expected)
        assert found == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True), seed


@pytest.mark.parametrize("name", ["IOB2", "IOBES"])
def test_strict_mode_equals_seqeval(name: str) -> None:
    from seqeval import scheme

    for seed in range(0, 400):
        predicted, right, letters = sentences(seed)
        if letters != ("BIES" if name == "IOBES" else "BI"):
            continue
        options = {"mode": "strict", "scheme": getattr(scheme, name)}
        expected = expected_scores(right, predicted, **options)
        found = seqeval(predicted, right, mode="strict", scheme=name)
        assert found == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True), seed


def test_suffixes_and_zero_division() -> None:
    predicted, right = [["PER-B", "PER-I", "O"]], [["PER-B", "O", "O"]]
    expected = expected_scores(right, predicted, suffix=True, zero_division=1)
    assert seqeval(predicted, right, suffix=True, zero_division=1) == expected
    assert seqeval([["O"]], [["O"]], zero_division=1)["overall_precision"] == 1.0


def test_numbers_are_named_and_batches_do_not_matter() -> None:
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    rng = np.random.default_rng(0)
    right = [rng.integers(0, 4, size) for size in (3, 0, 5, 1, 4)]
    predicted = [np.where(rng.random(len(row)) < 0.5, row, 0) for row in right]
    as_tags = [[[names[tag] for tag in row] for row in side] for side in (predicted, right)]
    expected = seqeval(*as_tags)
    for cuts in ([5], [1, 1, 1, 1, 1], [2, 3]):
        metric, start = load_metric("seqeval", names=names), 0
        for size in cuts:
            rows = slice(start, start + size)
            metric.add_batch(predictions=predicted[rows], references=right[rows])
            start += size
        assert metric.compute() == expected
    metric = load_metric("seqeval")
    metric.names = names  # as the loop tells it
    assert metric.compute(predictions=predicted, references=right) == expected


@pytest.mark.parametrize(
    ("predicted", "right", "message"),
    [
        ([[1]], [[0]], r"number 1 for a tag in row 0 .*load_metric\('seqeval', names="),
        ([["O", "O"]], [["O"]], r"2 predicted tags and 1 right ones in row 0"),
        (["O"], ["O"], r"row 0 of the predictions is 'O'"),
        ([3], [3], r"row 0 of the predictions is 3"),
        ([["NOUN"]], [["VERB"]], r"a tag 'NOUN'\. For a class a token pass 'accuracy'"),
        ([["L-PER"]], [["U-PER"]], r"a tag 'L-PER'.*scheme='BILOU'"),
    ],
)
def test_what_is_no_span_is_refused(predicted: Any, right: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        load_metric("seqeval").compute(predictions=predicted, references=right)


def test_a_number_beyond_the_names_is_refused() -> None:
    with pytest.raises(MetricError, match=r"seqeval got -100 for a tag in row 0 of the references"):
        seqeval([[0, 0]], [[0, -100]], names=["O"])


@pytest.mark.parametrize(
    "options", [{"mode": "loose"}, {"mode": "strict"}, {"scheme": "IOB2"}, {"scheme": "BIO"}]
)
def test_options_are_checked_when_the_metric_is_loaded(options: Any) -> None:
    with pytest.raises(ConfigError, match="mode='strict', scheme='IOB2'"):
        load_metric("seqeval", **options)
