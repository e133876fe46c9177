"""SQuAD: the official scripts, written out."""

from __future__ import annotations

import collections
import random
import re
import string
from typing import Any

import pytest
from helpers import A_THOUSAND

from manualloop.errors import MetricError
from manualloop.evaluation.metrics import load_metric
from manualloop.tasks.answers import squad, squad_v2

WORDS = [
    *(
        "the",
        "a",
        "an",
        "Normans",
        "normans",
        "Rollo",
        "in",
        "10th",
        "century",
        "1066",
        "U.S.",
        "-",
    ),
    *("", " ", "  ", "!", "Ærøskøbing", "東京", "the-a", "A.", "theory", "\t", "naïve", "ǅ"),
]


def text(rng: random.Random) -> str:
    return rng.choice(["", " "]).join(rng.choice(WORDS) for _ in range(rng.randint(0, 5)))


# The official scripts -----------------------------------------------------------------------------


def normalize_answer(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def remove_punc(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punc(s.lower())).split())


def f1_v1(prediction: str, ground_truth: str) -> float:
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


def official_v1(predictions: list[str], answers: list[list[str]]) -> dict[str, float]:
    f1 = exact = 0.0
    for prediction, truths in zip(predictions, answers, strict=True):
        exact += max(normalize_answer(prediction) == normalize_answer(truth) for truth in truths)
        f1 += max(f1_v1(prediction, truth) for truth in truths)
    total = len(answers)
    return {"exact_match": 100.0 * exact / total, "f1": 100.0 * f1 / total}


def f1_v2(a_gold: str, a_pred: str) -> float:
    gold_toks = normalize_answer(a_gold).split() if a_gold else []
    pred_toks = normalize_answer(a_pred).split() if a_pred else []
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def official_v2(
    preds: dict[int, str], golds: dict[int, list[str]], na_probs: dict[int, float], thresh: float
) -> dict[str, float]:
    has_ans = {qid: bool(texts) for qid, texts in golds.items()}
    exact_raw, f1_raw = {}, {}
    for qid, texts in golds.items():
        gold_answers = [t for t in texts if normalize_answer(t)] or [""]
        exact_raw[qid] = max(
            int(normalize_answer(a) == normalize_answer(preds[qid])) for a in gold_answers
        )
        f1_raw[qid] = max(f1_v2(a, preds[qid]) for a in gold_answers)

    def apply(scores: dict[int, float]) -> dict[int, float]:
        return {
            qid: float(not has_ans[qid]) if na_probs[qid] > thresh else s
            for qid, s in scores.items()
        }

    def find_best(scores: dict[int, float]) -> tuple[float, float]:
        cur_score = sum(1 for k in has_ans if not has_ans[k])
        best_score, best_thresh = cur_score, 0.0
        for qid in sorted(na_probs, key=lambda k: na_probs[k]):
            diff = scores[qid] if has_ans[qid] else -1 if preds[qid] else 0
            cur_score += diff
            if cur_score > best_score:
                best_score, best_thresh = cur_score, na_probs[qid]
        return 100.0 * best_score / len(scores), best_thresh

    exact, f1 = apply(exact_raw), apply(f1_raw)
    out = {
        "exact": 100.0 * sum(exact.values()) / len(exact),
        "f1": 100.0 * sum(f1.values()) / len(f1),
        "total": len(exact),
    }
    for prefix, wanted in (("HasAns", True), ("NoAns", False)):
        if qids := [qid for qid in golds if has_ans[qid] is wanted]:
            out[f"{prefix}_exact"] = 100.0 * sum(exact[k] for k in qids) / len(qids)
            out[f"{prefix}_f1"] = 100.0 * sum(f1[k] for k in qids) / len(qids)
            out[f"{prefix}_total"] = len(qids)
    out["best_exact"], out["best_exact_thresh"] = find_best(exact_raw)
    out["best_f1"], out["best_f1_thresh"] = find_best(f1_raw)
    return out


# --------------------------------------------------------------------------------------------------


@A_THOUSAND
def test_sets_of_answers_equal_the_official_script(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        answers = [[text(rng) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(1, 6))]
        predictions = [rng.choice([text(rng), rng.choice(row)]) for row in answers]
        forms = [answers, [{"text": row} for row in answers]]
        forms.append([{"id": i, "answers": {"text": row}} for i, row in enumerate(answers)])
        expected = official_v1(predictions, answers)
        for references in forms:
            assert squad(predictions, references) == pytest.approx(expected, rel=0, abs=1e-9)
        with_ids = [{"id": i, "prediction_text": one} for i, one in enumerate(predictions)]
        assert squad(with_ids, forms[2]) == pytest.approx(expected, rel=0, abs=1e-9)


@A_THOUSAND
def test_sets_with_unanswerable_questions_equal_the_official_script(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        size = rng.randint(1, 6)
        kind = rng.choice([0.0, 0.5, 1.0])  # share of questions that can be answered
        answers = [
            [text(rng) for _ in range(rng.randint(1, 3))] if rng.random() < kind else []
            for _ in range(size)
        ]
        predictions = [rng.choice(["", text(rng), *row]) for row in answers]
        probabilities = [rng.choice([0.0, 0.2, 0.5, 0.5, 1.0, rng.random()]) for _ in answers]
        threshold = rng.choice([1.0, 0.5, 0.0])
        rows = [
            {"prediction_text": one, "no_answer_probability": probability}
            for one, probability in zip(predictions, probabilities, strict=True)
        ]
        found = squad_v2(rows, answers, no_answer_threshold=threshold)
        columns = (dict(enumerate(column)) for column in (predictions, answers, probabilities))
        expected = official_v2(*columns, threshold)
        assert list(found) == list(expected)
        assert found == pytest.approx(expected, rel=0, abs=1e-9), seed


@pytest.mark.parametrize(
    ("name", "predictions", "references", "message"),
    [
        ("squad", ["a"], [{"text": []}], r'row 0 has none.*"squad_v2"'),
        ("squad", [3], ["a"], r"squad got 3 .* in row 0.*Let decode return"),
        ("squad", ["a"], [5], r"and the right answers \[5\]"),
        ("squad_v2", [None], ["a"], r"squad_v2 got None"),
        ("squad", [{"id": 1, "prediction_text": "a"}], [{"id": 2, "text": ["a"]}],
         r"Row 0 holds the answer to question 1 and the right answers to 2"),
    ],
)  # fmt: skip
def test_refused(name: str, predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        load_metric(name).compute(predictions=predictions, references=references)
