"""Exact match; ROUGE, BLEU and chrF, equal to rouge-score and sacrebleu in any split of rows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from helpers import A_THOUSAND

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.metrics import load_metric
from manualloop.evaluation.texts import bleu, chrf, exact_match, rouge

WORDS = [
    *("the", "The", "cat", "cats", "sat", "sitting", "on", "a", "mat", ".", "!", "?", ",", "42"),
    *("-", "", "  ", "\n", "naïve", "Straße", "東京", "كتاب", "🙂", "don't", "U.S.", "\u00a0"),
]


def text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([0, 1, 3, 4, 9])))


def rows(seed: int) -> tuple[list[str], list[Any]]:
    """Texts and right texts: empty ones, equal ones, other numbers of right ones."""
    rng = random.Random(seed)
    predictions, references = [], []
    for _ in range(rng.randint(1, 3)):
        right = [text(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        predictions.append(rng.choice([text(rng), right[0], "", right[-1] + " cat"]))
        references.append(right if len(right) > 1 or rng.random() < 0.5 else right[0])
    return predictions, references


def as_lists(references: list[Any]) -> list[list[str]]:
    return [[row] if isinstance(row, str) else row for row in references]


@A_THOUSAND
def test_sets_of_texts_equal_rouge_score(seeds: range) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    types = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorers = {stems: RougeScorer(types, use_stemmer=stems) for stems in (False, True)}
    for seed in seeds:
        predictions, references = rows(seed)
        stems = seed % 4 == 0
        expected = dict.fromkeys(types, 0.0)
        for prediction, right in zip(predictions, as_lists(references), strict=True):
            best = [scorers[stems].score(one, prediction) for one in right]
            for key in types:
                expected[key] += max(one[key].fmeasure for one in best) / len(predictions)
        found = rouge(predictions, references, use_stemmer=stems)
        assert list(found) == types
        assert found == pytest.approx(expected, rel=0, abs=1e-9), seed


@A_THOUSAND
def test_sets_of_texts_equal_sacrebleu(seeds: range) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    options: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"lowercase": True, "tokenize": "intl"}, {"word_order": 2}),
        ({"smooth_method": "floor", "effective_order": True}, {"lowercase": True}),
        ({"tokenize": "char", "max_ngram_order": 2}, {"beta": 1, "eps_smoothing": True}),
    ]
    for seed in seeds:
        predictions, references = rows(seed)
        of_bleu, of_chrf = options[seed % 4]
        # sacrebleu's own form: the first right texts of all rows, then the second; "" is skipped
        # by neither, so rows with fewer get None.
        right = as_lists(references)
        streams = [
            [row[i] if i < len(row) else None for row in right] for i in range(max(map(len, right)))
        ]
        expected = BLEU(**of_bleu).corpus_score(predictions, streams).score
        assert bleu(predictions, references, **of_bleu)["bleu"] == pytest.approx(
            expected, rel=0, abs=1e-9
        )
        expected = CHRF(**of_chrf).corpus_score(predictions, streams).score
        assert chrf(predictions, references, **of_chrf)["chrf"] == pytest.approx(
            expected, rel=0, abs=1e-9
        )


def test_rows_with_fewer_right_texts_equal_sacrebleus_statistics_of_single_rows() -> None:
    from sacrebleu.metrics import BLEU

    predictions, references = (
        ["a cat sat here", "the dog ran off"],
        [["a cat sat"], ["dog", "the dog ran off"]],
    )
    once = bleu(predictions[1:], references[1:])
    assert once == pytest.approx({"bleu": 100.0})
    metric = BLEU()
    parts = [metric.sentence_score(p, r) for p, r in zip(predictions, references, strict=True)]
    counts = np.sum([part.counts for part in parts], axis=0)
    assert bleu(predictions, references)["bleu"] < 100.0
    assert counts.tolist() == [7, 5, 3, 1]


@pytest.mark.parametrize("name", ["rouge", "bleu", "chrf", "exact_match", "squad", "squad_v2"])
def test_any_split_into_batches_gives_the_same(name: str) -> None:
    predictions, references = rows(3)
    more = rows(4)
    predictions, references = predictions + more[0], references + more[1]
    expected = load_metric(name).compute(predictions=predictions, references=references)
    rng = random.Random(0)
    for _ in range(10):
        metric, start = load_metric(name), 0
        while start < len(predictions):
            end = start + rng.randint(0, 3)
            metric.add_batch(predictions=predictions[start:end], references=references[start:end])
            start = end
        assert metric.compute() == expected


def test_exact_match() -> None:
    predictions = ["the cat", "The cat!", "cat 12", "ab"]
    references: list[Any] = ["the cat", "the cat", "cat", ["x", "ab"]]
    assert exact_match(predictions, references) == {"exact_match": 0.5}
    assert exact_match(predictions, references, ignore_case=True)["exact_match"] == 0.5
    options = {"ignore_case": True, "ignore_punctuation": True}
    assert exact_match(predictions, references, **options)["exact_match"] == 0.75
    found = exact_match(predictions, references, regexes_to_ignore=[" 12"])
    assert found["exact_match"] == 0.75
    assert exact_match(["cat 12"], ["cat "], ignore_numbers=True) == {"exact_match": 1.0}
    assert exact_match([[1, 2], [3]], [[1, 2], [4]]) == {"exact_match": 0.5}  # rows of tokens


def test_tokenizers_of_ones_own() -> None:
    assert rouge(["東京 は"], ["東京 だ"])["rouge1"] == 0.0  # by default only a to z and digits
    assert rouge(["東京 は"], ["東京 だ"], tokenizer=str.split)["rouge1"] == 0.5


@pytest.mark.parametrize("name", ["rouge", "bleu", "chrf"])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[5, 6]], ["a"], r"row 0 holds \[5, 6\] and the right 'a'\. Let decode return them"),
        (["a"], [np.array([5, 6])], r"the right array\(\[5, 6\]\)"),
        (["a"], [[]], r"the right \[\]"),
        (["a", None], ["a", "b"], "row 1 holds None"),
    ],
)
def test_what_is_no_text_is_refused(
    name: str, predictions: Any, references: Any, message: str
) -> None:
    with pytest.raises(MetricError, match=rf"{name} compares texts, and .*{message}"):
        load_metric(name).compute(predictions=predictions, references=references)


def test_options_are_checked_when_the_metric_is_loaded() -> None:
    with pytest.raises(
        ConfigError, match=r"'bleu' does not take use_stemmer: it takes lowercase, "
    ):
        load_metric("bleu", use_stemmer=True)
    with pytest.raises(MetricError, match=r"bleu cannot score .* options"):
        load_metric("bleu", smooth_method="none at all")
    with pytest.raises(MetricError, match=r"rouge cannot score"):
        load_metric("rouge", rouge_types=["rougeX"])
