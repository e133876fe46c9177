"""Metrics of texts, such as answers, translations and summaries.

rouge-score computes ROUGE (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004);
sacrebleu computes BLEU and chrF (Post, "A Call for Clarity in Reporting BLEU Scores", WMT 2018,
arXiv:1804.08771; Popovic, "chrF: character n-gram F-score for automatic MT evaluation", WMT 2015).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.forms import load_extra

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def exact_match(
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    regexes_to_ignore: Sequence[str] | None = None,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> dict[str, float]:
    """Return the share of rows whose prediction equals the reference.

    Args:
        predictions: A text, or anything else that can be compared, such as a row of tokens.
        references: The right one; for a text also a list of several right ones.
        regexes_to_ignore: Patterns that are cut out of texts, before anything else; also of those
            in a row of several texts, as the options below.
        ignore_case: Whether upper and lower case are equal.
        ignore_punctuation: Whether ASCII punctuation is cut out.
        ignore_numbers: Whether the digits 0 to 9 are cut out.

    >>> exact_match(["a cat", "dogs"], ["a cat", ["a dog", "dogs"]])
    {'exact_match': 1.0}
    """

    def clean(text: Any) -> Any:
        text = text.tolist() if hasattr(text, "tolist") else text
        if type(text) in (list, tuple):
            return type(text)(map(clean, text))
        if not isinstance(text, str):
            return text
        for pattern in regexes_to_ignore or ():
            text = re.sub(pattern, "", text)
        text = text.lower() if ignore_case else text
        text = text.translate(_PUNCTUATION) if ignore_punctuation else text
        return text.translate(_DIGITS) if ignore_numbers else text

    num_equal = 0
    for prediction, reference in zip(predictions, references, strict=True):
        has_several = isinstance(prediction, str) and isinstance(reference, list | tuple)
        right = map(clean, reference if has_several else [reference])
        num_equal += clean(prediction) in list(right)
    return {"exact_match": num_equal / len(predictions)}


def rouge(
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    rouge_types: Sequence[str] = ROUGE_TYPES,
    use_stemmer: bool = False,
    split_summaries: bool = False,
    tokenizer: Callable[[str], list[str]] | None = None,
) -> dict[str, float]:
    """Return the mean F-measure of shared words, pairs of words, and longest sequences of words.

    Args:
        predictions: A text a row.
        references: The right text, or a list of right ones, of which the best counts.
        rouge_types: Scores to compute: ``rouge1`` to ``rouge9``, ``rougeL``, ``rougeLsum``.
        use_stemmer: Whether words are cut to their stems (English).
        split_summaries: Whether ``rougeLsum`` splits sentences by nltk; by default there must be a
            newline between them.
        tokenizer: Function from a text to its words; None takes lower-case letters a to z and
            digits, which leaves nothing of other scripts.

    Returns:
        A score between 0 and 1 for each type.
    """
    if use_stemmer and tokenizer is not None:
        raise ConfigError(
            "rouge cuts words to their stems with its own tokenizer only. Pass use_stemmer=True or "
            "tokenizer, not both, or let the tokenizer return stems."
        )
    scorer = load_extra("rouge_score.rouge_scorer", "rouge")
    own = None if tokenizer is None else _Tokenizer(tokenizer)
    rouge = scorer.RougeScorer(list(rouge_types), use_stemmer, split_summaries, own)
    totals = dict.fromkeys(rouge_types, 0.0)
    predicted, right = require_texts("rouge", predictions, references)
    for prediction, texts in zip(predicted, right, strict=True):
        for key, score in rouge.score_multi(texts, prediction).items():
            totals[key] += score.fmeasure
    return {key: total / len(predicted) for key, total in totals.items()}


class _Tokenizer:
    """A function in the shape that rouge-score calls."""

    def __init__(self, function: Callable[[str], list[str]]) -> None:
        self.tokenize = function


def bleu(
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    lowercase: bool = False,
    force: bool = False,
    tokenize: str | None = None,
    smooth_method: str = "exp",
    smooth_value: float | None = None,
    max_ngram_order: int = 4,
    effective_order: bool = False,
    trg_lang: str = "",
) -> dict[str, float]:
    """Return sacrebleu's BLEU of all rows, between 0 and 100.

    Args:
        predictions: A text a row, with its spaces and punctuation as people write them.
        references: The right text, or a list of right ones; rows may have other numbers of them.
        lowercase: Whether upper and lower case are equal.
        force: Whether texts that look tokenized already are scored without a warning.
        tokenize: sacrebleu's tokenizer: ``"13a"``, ``"intl"``, ``"zh"``, ``"char"``, ``"none"``.
        smooth_method: Smoothing of orders without a match: exp, floor, add-k or none.
        smooth_value: Value for floor and add-k.
        max_ngram_order: Number of words in the longest sequence that is counted.
        effective_order: Whether orders without any match are left out, for single sentences.
        trg_lang: Language of the texts, which may choose the tokenizer.
    """
    if smooth_value is not None and smooth_method not in ("floor", "add-k"):
        raise ConfigError(
            f"bleu takes no smooth_value with smooth_method={smooth_method!r}. Pass the method "
            "that it is for: smooth_method='floor' or 'add-k'."
        )
    metric = load_extra("sacrebleu.metrics", "bleu").BLEU(
        lowercase=lowercase,
        force=force,
        tokenize=tokenize,
        smooth_method=smooth_method,
        smooth_value=smooth_value,
        max_ngram_order=max_ngram_order,
        effective_order=effective_order,
        trg_lang=trg_lang,
    )
    return {"bleu": _corpus_score("bleu", metric, predictions, references)}


def chrf(
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    char_order: int = 6,
    word_order: int = 0,
    beta: int = 2,
    lowercase: bool = False,
    whitespace: bool = False,
    eps_smoothing: bool = False,
) -> dict[str, float]:
    """Return sacrebleu's chrF of all rows, between 0 and 100.

    Args:
        predictions: A text a row.
        references: The right text, or a list of right ones; rows may have other numbers of them.
        char_order: Number of characters in the longest sequence that is counted.
        word_order: Number of words in it; 2 makes chrF++.
        beta: Weight of recall against precision.
        lowercase: Whether upper and lower case are equal.
        whitespace: Whether spaces count as characters.
        eps_smoothing: Whether to smooth as chrF++.py, nltk and Moses do.
    """
    metric = load_extra("sacrebleu.metrics", "chrf").CHRF(
        char_order=char_order,
        word_order=word_order,
        beta=beta,
        lowercase=lowercase,
        whitespace=whitespace,
        eps_smoothing=eps_smoothing,
    )
    return {"chrf": _corpus_score("chrf", metric, predictions, references)}


def _corpus_score(name: str, metric: Any, predictions: Any, references: Any) -> float:
    predicted, right = require_texts(name, predictions, references)
    return float(metric.corpus_score(predicted, streams_of(right)).score)


def streams_of(right: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Return the first right text of all rows, then the second; None where a row has fewer."""
    return [
        [row[i] if i < len(row) else None for row in right] for i in range(max(map(len, right)))
    ]


def require_texts(
    name: str, predictions: Sequence[Any], references: Sequence[Any]
) -> tuple[list[str], list[list[str]]]:
    """Return a text a row, and a list of right texts a row.

    Raises:
        MetricError: They are something else.
    """
    right = [[row] if isinstance(row, str) else row for row in references]
    for row, (prediction, texts) in enumerate(zip(predictions, right, strict=True)):
        is_list = isinstance(texts, list | tuple) and len(texts) > 0
        if (
            not isinstance(prediction, str)
            or not is_list
            or not all(isinstance(text, str) for text in texts)
        ):
            raise MetricError(
                f"{name} compares texts, and row {row} holds {prediction!r:.60} and the right "
                f"{references[row]!r:.60}. Let decode return them: decode=lambda outputs, batch: "
                "(predicted_texts, right_texts)."
            )
    return list(predictions), [list(texts) for texts in right]
