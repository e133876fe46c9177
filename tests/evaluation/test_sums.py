"""Scores of sums of counts: equal to calls of the metric on resampled rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from manualloop import Predictions, compare_predictions, evaluate_loop, load_metric
from manualloop.evaluation.intervals import (
    all_of,
    called,
    score_rows,
    summed_scores,
    weighted_scores,
)
from manualloop.evaluation.resampling import resamples
from manualloop.evaluation.scoring import Given
from manualloop.evaluation.weighted import Entries

NUM_ROWS = 12
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG"]
WORDS = ["the", "cat", "The", "dog.", "sea", "(one", "a", "b,"]


def tags(seed: int, *, suffix: bool = False, numbers: bool = False) -> list[list[Any]]:
    """Sentences of any lengths, of which the last alone may hold a B-ORG."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(NUM_ROWS):
        last = len(TAGS) if row == NUM_ROWS - 1 else len(TAGS) - 1
        chosen = rng.integers(0, last, 1 + row % 4)
        names = [TAGS[number] for number in chosen]
        if suffix:
            names = ["-".join(reversed(name.split("-"))) for name in names]
        rows.append(chosen.tolist() if numbers else names)
    return rows


def spans(suffix: bool = False, numbers: bool = False) -> tuple[Any, Any]:
    right = tags(0, suffix=suffix, numbers=numbers)
    others = tags(1, suffix=suffix, numbers=numbers)
    mixed = [a if row % 3 else b for row, (a, b) in enumerate(zip(right, others, strict=True))]
    return mixed, right


def texts(num_right: int = 1) -> tuple[Any, Any]:
    rng = np.random.default_rng(2)
    sides: list[list[Any]] = [[], []]
    for row in range(NUM_ROWS):
        right = [[*rng.choice(WORDS, 2 + row % 6)] for _ in range(1 + row % num_right)]
        own = [word if rng.random() < 0.8 else "sea" for word in right[0]]
        sides[0].append(" ".join(own if row else []))
        sides[1].append([" ".join(one) for one in right])
    return sides[0], sides[1]


def maps() -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    right = [rng.integers(0, 2 + row // 6, (2, 1 + row % 3)) for row in range(NUM_ROWS)]
    predicted = [np.where(rng.random(one.shape) < 0.7, one, 0) for one in right]
    right = [np.where(rng.random(one.shape) < 0.1, 255, one) for one in right]
    return predicted, right


CASES: list[tuple[str, dict[str, Any], tuple[Any, Any]]] = [
    ("seqeval", {}, spans()),
    ("seqeval", {"names": TAGS}, spans(numbers=True)),
    ("seqeval", {"suffix": True}, spans(suffix=True)),
    ("seqeval", {"mode": "strict", "scheme": "IOB2"}, spans()),
    ("seqeval", {"zero_division": 1.0}, spans()),
    ("bleu", {}, texts()),
    ("bleu", {}, texts(3)),
    ("bleu", {"smooth_method": "floor", "smooth_value": 0.2}, texts()),
    ("bleu", {"smooth_method": "add-k", "max_ngram_order": 2, "lowercase": True}, texts(2)),
    ("bleu", {"smooth_method": "none", "effective_order": True}, texts()),
    ("chrf", {}, texts()),
    ("chrf", {"word_order": 2}, texts(3)),
    ("chrf", {"word_order": 1, "lowercase": True, "beta": 1, "char_order": 3}, texts(2)),
    ("chrf", {"whitespace": True, "eps_smoothing": True}, texts(2)),
    ("mean_iou", {}, maps()),
    ("mean_iou", {"ignore_index": 0, "names": ["a", "b", "c", "d"]}, maps()),
    ("exact_match", {"ignore_case": True}, texts(2)),
    ("squad", {}, texts(2)),
]


def draws(num_rows: int, num_resamples: int = 25) -> np.ndarray:
    return np.concatenate([*resamples(np.ones(num_rows, np.int64), num_resamples)])


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, values in found.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-12, atol=1e-12, err_msg=key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options", "rows"), CASES)
def test_scores_of_sums_equal_calls_of_the_metric(
    name: str, options: dict[str, Any], rows: tuple[Any, Any]
) -> None:
    metric = load_metric(name, **options)
    inputs = Given(*rows, None, None, NUM_ROWS)
    keys = score_rows(metric, inputs, np.arange(NUM_ROWS))
    # In groups of the same rows, and not.
    for known in ([(keys, np.ones(NUM_ROWS))], [(keys, np.ones(NUM_ROWS))] * 2):
        scored, counts = summed_scores(metric, inputs, known)
        assert scored is not None
        if len(known) == 1:
            assert counts.sum() == NUM_ROWS
            whole = scored(counts[None].astype(float))
            assert_same(whole, {key: [value] for key, value in keys.items()})
            continue
        weights = draws(NUM_ROWS)
        found = scored(weights)
        assert found.keys() == keys.keys()
        assert_same(found, called(metric, inputs, list(keys))(weights))


def of_classes(kind: str) -> Given:
    rng = np.random.default_rng(4)
    row = None
    right = rng.integers(0, 4, NUM_ROWS)
    if kind == "tokens":
        row = np.sort(rng.integers(0, NUM_ROWS, 40))
        row[:NUM_ROWS] = np.arange(NUM_ROWS)
        row.sort()
        right = rng.integers(0, 4, 40)
    elif kind == "labels":
        right = rng.integers(0, 2, (NUM_ROWS, 3))
    predicted = np.where(rng.random(right.shape) < 0.6, right, right[::-1])
    return Given(predicted, right, row, None, NUM_ROWS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["rows", "tokens", "labels"])
@pytest.mark.parametrize("names", [None, ["cat", "dog"], list("abcdef")])
@pytest.mark.parametrize("name", ["f1/none", "recall/none", "classification_report"])
def test_scores_of_classes_equal_calls_of_the_metric(
    name: str, names: list[str] | None, kind: str
) -> None:
    metric = load_metric(name, **({} if names is None else {"names": names}))
    inputs = of_classes(kind)
    keys = score_rows(metric, inputs, np.arange(NUM_ROWS))
    row = np.arange(NUM_ROWS) if inputs.row is None else inputs.row
    entries = Entries(inputs.predictions, inputs.references, row, NUM_ROWS)
    weighted = weighted_scores(metric, entries, keys, np.ones(NUM_ROWS))
    assert weighted.keys() == keys.keys()
    weights = draws(NUM_ROWS)
    assert_same(dict(all_of(weighted)(weights)), dict(called(metric, inputs, list(keys))(weights)))


@pytest.mark.parametrize(("name", "rows"), [("bleu", texts()), ("seqeval", spans())])
def test_two_models_are_compared_by_sums(
    name: str, rows: tuple[Any, Any], monkeypatch: Any
) -> None:
    a = Predictions(np.arange(NUM_ROWS), rows[0], None, rows[1])
    perfect = [row[0] if isinstance(row[0], str) and name == "bleu" else row for row in rows[1]]
    b = Predictions(np.arange(NUM_ROWS), perfect, None, rows[1])
    found = compare_predictions(a, b, name)
    key = "bleu" if name == "bleu" else "overall_f1"
    assert found[key].b == pytest.approx(100 if name == "bleu" else 1)
    assert found[key].low <= found[key].difference <= found[key].high
    assert found[key].test.startswith("all exchanges of predictions")


def test_scores_without_width_are_reported_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.nn.functional.one_hot(torch.arange(12) % 4).float()
    batch = {"x": x, "labels": torch.arange(12) % 4}

    class Echo(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return {"logits": x}

    with caplog.at_level("INFO"):
        evaluate_loop(Echo(), [batch], "classification_report", confidence=0.9)
    first, second = [message for message in caplog.messages if "resample" in message]
    assert first.startswith("the intervals of accuracy, 0_precision, 0_recall and ")
    assert second == (
        "0_precision, 0_recall, 0_f1-score and 13 more are not defined in some resamples, which "
        "their intervals leave out."
    )
