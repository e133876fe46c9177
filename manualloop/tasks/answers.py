"""Scores of answers that are spans of a text, by the formulae of the official scripts of SQuAD.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016,
arXiv:1606.05250; "Know What You Don't Know", ACL 2018, arXiv:1806.03822. The keys are those of the
scripts of the same names in https://github.com/huggingface/evaluate.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from manualloop.errors import MetricError
from manualloop.tasks.numbers import whole_number

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad(predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Score answers as SQuAD 1.1 does, in percent.

    Args:
        predictions: The answer to each question: a text, or ``{"prediction_text": text}``.
        references: The right answers to each: a text, a list of texts, ``{"text": [...]}`` or
            ``{"answers": {"text": [...]}}``. Where both sides have an ``id``, it must be the same.

    Returns:
        ``exact_match`` and ``f1``: the mean over the questions of the best over the right answers.

    >>> squad(["the Normans", "in 1066"], [{"text": ["Normans"]}, ["1066"]])["exact_match"]
    50.0
    """
    questions = _questions("squad", predictions, references)
    for number, question in enumerate(questions):
        if not question.answers:
            raise MetricError(
                f"squad needs a right answer to each question, and row {number} has none. For "
                'questions that cannot be answered pass "squad_v2".'
            )
    exact = [_best(_exact, question.text, question.answers) for question in questions]
    f1 = [_best(_f1, question.text, question.answers) for question in questions]
    return {"exact_match": _percent(exact), "f1": _percent(f1)}


def squad_v2(
    predictions: Sequence[Any], references: Sequence[Any], *, no_answer_threshold: float = 1.0
) -> dict[str, float]:
    """Score answers as SQuAD 2.0 does, in percent: questions without an answer want an empty one.

    Args:
        predictions: The answer to each question: a text, which is empty for no answer, or
            ``{"prediction_text": text, "no_answer_probability": number}``; 0 where it is missing.
        references: The right answers to each, as for ``squad``; none where there is no answer.
        no_answer_threshold: Probability above which a prediction counts as no answer.

    Returns:
        ``exact``, ``f1`` and ``total``; the same of questions with an answer (``HasAns_exact``,
        ...) and without one (``NoAns_exact``, ...), where there are such; and the best of both over
        all thresholds, with the threshold (``best_exact``, ``best_exact_thresh``, ...).

    >>> squad_v2(["", "Rollo"], [{"text": []}, {"text": ["Rollo"]}])["f1"]
    100.0
    """
    questions = _questions("squad_v2", predictions, references)
    scores: dict[str, float] = {}
    raw: dict[str, list[float]] = {"exact": [], "f1": []}
    for question in questions:
        # An answer that is only an article or a mark counts as none.
        answers = [answer for answer in question.answers if _words(answer)] or [""]
        raw["exact"].append(_best(_exact, question.text, answers))
        raw["f1"].append(_best(_f1_or_none, question.text, answers))
    for key, values in raw.items():
        scores[key] = _percent(_thresholded(values, questions, no_answer_threshold))
    scores["total"] = len(questions)
    for prefix, has_answer in (("HasAns", True), ("NoAns", False)):
        if chosen := [i for i, one in enumerate(questions) if bool(one.answers) is has_answer]:
            for key, values in raw.items():
                found = _thresholded(values, questions, no_answer_threshold)
                scores[f"{prefix}_{key}"] = _percent([found[i] for i in chosen])
            scores[f"{prefix}_total"] = len(chosen)
    for key, values in raw.items():
        scores[f"best_{key}"], scores[f"best_{key}_thresh"] = _best_threshold(values, questions)
    return {key: float(value) for key, value in scores.items()}


def answers_of(cell: Any) -> tuple[list[str], list[int | None]] | None:
    """Return the texts of the answers of a row, and where they start; None if it holds none.

    Args:
        cell: None or empty for no answer; ``{"text": [...], "answer_start": [...]}``; the same
            with one of each; or a list of such dicts.

    >>> answers_of({"text": ["b"], "answer_start": [2]}), answers_of([{"text": "b"}])
    ((['b'], [2]), (['b'], [None]))
    """
    if cell is None:
        return [], []
    if isinstance(cell, list | tuple) and all(isinstance(one, Mapping) for one in cell):
        cell = {name: [one.get(name) for one in cell] for name in ("text", "answer_start")}
    if not isinstance(cell, Mapping) or "text" not in cell:
        return None
    texts, starts = cell["text"], cell.get("answer_start")
    texts = [texts] if isinstance(texts, str) else _listed(texts)
    starts = [None] * len(texts) if starts is None else _listed(starts)
    numbers = [None if start is None else whole_number(start) for start in starts]
    if len(numbers) != len(texts) or not all(isinstance(text, str) for text in texts):
        return None
    return texts, numbers


def _listed(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    return [*value] if isinstance(value, list | tuple) else [value]


class _Question(NamedTuple):
    text: str  # the predicted answer
    answers: list[str]
    no_answer: float  # probability that there is no answer


def _questions(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> list[_Question]:
    questions = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        no_answer, ids = 0.0, []
        if isinstance(reference, Mapping):
            ids.append(reference.get("id"))
            reference = reference.get("answers", reference)
            reference = reference.get("text") if isinstance(reference, Mapping) else reference
        if isinstance(prediction, Mapping):
            ids.append(prediction.get("id"))
            no_answer = float(prediction.get("no_answer_probability", 0.0))
            prediction = prediction.get("prediction_text")
        if len(ids) == 2 and None not in ids and ids[0] != ids[1]:
            raise MetricError(
                f"Row {row} holds the answer to question {ids[1]!r} and the right answers to "
                f"{ids[0]!r}. Give {name} both in the same order."
            )
        answers = [reference] if isinstance(reference, str) else reference
        answers = list(answers) if hasattr(answers, "__iter__") else [answers]
        if not isinstance(prediction, str) or not all(isinstance(one, str) for one in answers):
            raise MetricError(
                f"{name} got {prediction!r:.60} and the right answers {answers!r:.60} in row "
                f"{row}, and compares texts. Let decode return (predictions, references), such as "
                '(["Rollo"], [{"text": ["Rollo"]}]).'
            )
        questions.append(_Question(prediction, answers, no_answer))
    return questions


def _words(text: str) -> list[str]:
    """Return the words of a text as the official scripts normalise it."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def _exact(prediction: str, answer: str) -> float:
    return float(_words(prediction) == _words(answer))


def _f1(prediction: str, answer: str) -> float:
    predicted, right = _words(prediction), _words(answer)
    num_same = sum((Counter(predicted) & Counter(right)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(right)
    return (2 * precision * recall) / (precision + recall)


def _f1_or_none(prediction: str, answer: str) -> float:
    """Return the F1; where a side has no words, whether both have none."""
    predicted, right = _words(prediction), _words(answer)
    return _f1(prediction, answer) if predicted and right else float(predicted == right)


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max(score(prediction, answer) for answer in answers)


def _percent(scores: Sequence[float]) -> float:
    return 100.0 * sum(scores) / len(scores)


def _thresholded(
    scores: Sequence[float], questions: Sequence[_Question], threshold: float
) -> list[float]:
    """Return the scores, where a prediction above the threshold counts as no answer."""
    return [
        float(not question.answers) if question.no_answer > threshold else score
        for score, question in zip(scores, questions, strict=True)
    ]


def _best_threshold(scores: Sequence[float], questions: Sequence[_Question]) -> tuple[float, float]:
    """Return the best score over all thresholds, in percent, and its threshold."""
    best = score = float(sum(not question.answers for question in questions))
    threshold = 0.0
    pairs = list(zip(scores, questions, strict=True))
    for of_row, question in sorted(pairs, key=lambda pair: pair[1].no_answer):
        score += of_row if question.answers else -bool(question.text)
        if score > best:
            best, threshold = score, question.no_answer
    return 100.0 * best / len(questions), threshold
