"""Metrics that are functions of sums over rows: what each row counts, and the scores of the sums.

A bootstrap of ten thousand resamples then takes as many sums, instead of calls of the metric. The
formulas are those of the libraries, and are used only if they give the score that the metric gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from operator import eq
from string import punctuation
from typing import Any, NamedTuple

import numpy as np

from manualloop.evaluation.collected import Collected
from manualloop.evaluation.forms import Scorer, load_extra
from manualloop.evaluation.metrics import Metric
from manualloop.evaluation.resampling import Floats
from manualloop.evaluation.scoring import Given
from manualloop.evaluation.segmentation import pixels_of
from manualloop.evaluation.spans import as_tags, spans_of
from manualloop.evaluation.texts import require_texts, streams_of


class Sums(NamedTuple):
    """What a metric counts of each row, and the scores that it makes of sums of these counts.

    Attributes:
        counts: Counts of each row, ``(rows, counts)``.
        scores: Function from sums ``(resamples, counts)`` to scores by name, ``(resamples,)`` each.
    """

    counts: Floats
    scores: Callable[[Floats], dict[str, Floats]]


def sums_of(scorer: Scorer, given: Given, keys: Mapping[str, float]) -> Sums | None:
    """Return the counts of the rows of a metric; None for one that is no function of sums.

    Args:
        scorer: The metric.
        given: What it gets.
        keys: Its scores of all rows, by name.
    """
    if not isinstance(scorer, Metric | Collected):
        return None
    if scorer.name in _MEANS:
        return _of_means(scorer, given, keys)
    make = _MAKERS.get(scorer.name)
    own = {"names": scorer.options.get("names") or scorer.names}
    if isinstance(scorer, Metric):
        own["left_out"] = scorer.left_out
    return None if make is None else make(given, scorer.options | own)


def _of_means(scorer: Scorer, given: Given, keys: Mapping[str, float]) -> Sums:
    """Count the scores of each row, whose means are those of all."""
    counts = np.ones((given.num_rows, len(keys) + 1))
    for row in range(given.num_rows):
        scorer.add_batch(**given.take(np.array([row])))
        counts[row, :-1] = [*scorer.compute().values()]

    def scores(sums: Floats) -> dict[str, Floats]:
        return dict(zip(keys, (sums[:, :-1] / sums[:, -1:]).T, strict=True))

    return Sums(counts, scores)


def _of_spans(given: Given, options: Mapping[str, Any]) -> Sums:
    """Count spans by type, the right ones, those predicted, those wanted; right tags, and all."""
    predicted = as_tags("predictions", given.predictions, options["names"])
    right = as_tags("references", given.references, options["names"])
    scheme, suffix = options.get("scheme"), options.get("suffix", False)
    found, wanted = (spans_of(side, scheme, suffix) for side in (predicted, right))
    types = sorted({kind for row in (*found, *wanted) for kind, _, _ in row})
    counts = np.zeros((len(right), 3 * len(types) + 2))
    for row, (own, others) in enumerate(zip(found, wanted, strict=True)):
        for group, spans in enumerate((own & others, own, others)):
            for kind, _, _ in spans:
                counts[row, group * len(types) + types.index(kind)] += 1
        counts[row, -2:] = sum(map(eq, predicted[row], right[row])), len(right[row])
    none = float(options.get("zero_division", 0.0) not in ("warn", 0))

    def rates(found: Floats, predicted: Floats, actual: Floats) -> list[Floats]:
        precision, recall = _share(found, predicted, none), _share(found, actual, none)
        return [precision, recall, _share(2 * precision * recall, precision + recall, 0.0)]

    def scores(sums: Floats) -> dict[str, Floats]:
        parts = np.split(sums[:, :-2], 3, axis=1)
        overall = rates(*(part.sum(1) for part in parts))
        scored = dict(
            zip(("overall_precision", "overall_recall", "overall_f1"), overall, strict=True)
        )
        scored["overall_accuracy"] = _share(sums[:, -2], sums[:, -1], np.nan)
        of_types = [*rates(*parts), parts[2]]
        occurs = parts[1] + parts[2] > 0
        for key, values in zip(("precision", "recall", "f1", "number"), of_types, strict=True):
            for kind, column in zip(types, np.where(occurs, values, np.nan).T, strict=True):
                scored[f"{kind}_{key}"] = column
        return scored

    return Sums(counts, scores)


def _of_maps(given: Given, options: Mapping[str, Any]) -> Sums:
    """Count pixels by class: the right ones, those predicted, those wanted."""
    rows = [
        pixels_of([one], [other], 0, options["left_out"])
        for one, other in zip(given.predictions, given.references, strict=True)
    ]
    classes = np.unique(np.concatenate([np.unique(side) for row in rows for side in row]))
    counts = np.zeros((len(rows), 3, len(classes)))
    for row, (predicted, right) in enumerate(rows):
        for group, values in enumerate((right[predicted == right], predicted, right)):
            places = np.searchsorted(classes, values)
            counts[row, group] = np.bincount(places, minlength=len(classes))

    def scores(sums: Floats) -> dict[str, Floats]:
        both, predicted, right = np.split(sums, 3, axis=1)
        return {
            "mean_iou": _mean_defined(_share(both, predicted + right - both, np.nan)),
            "mean_accuracy": _mean_defined(_share(both, right, np.nan)),
            "overall_accuracy": _share(both.sum(1), right.sum(1), np.nan),
        }

    return Sums(counts.reshape(len(rows), -1), scores)


def _of_bleu(given: Given, options: Mapping[str, Any]) -> Sums:
    """Count n-grams by length, the right ones and all; and the words predicted and wanted."""
    kind = load_extra("sacrebleu.metrics", "bleu").BLEU
    options = {name: value for name, value in options.items() if name != "names"}
    texts = require_texts("bleu", given.predictions, given.references)
    plain = kind(**{**options, "smooth_method": "none", "smooth_value": None, "force": True})
    found = [
        plain.corpus_score([text], streams_of([right])) for text, right in zip(*texts, strict=True)
    ]
    counts = np.array(
        [[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], float
    )
    names = ("smooth_value", "effective_order", "max_ngram_order")
    chosen = {name: options[name] for name in names if name in options}
    chosen["smooth_method"] = options.get("smooth_method", "exp")

    def score(sums: list[int]) -> float:
        orders, (length, wanted) = sums[:-2], sums[-2:]
        half = len(orders) // 2
        return float(
            kind.compute_bleu(orders[:half], orders[half:], length, wanted, **chosen).score
        )

    def scores(sums: Floats) -> dict[str, Floats]:
        return {"bleu": np.array([score(row) for row in sums.astype(np.int64).tolist()])}

    return Sums(counts, scores)


def _of_chrf(given: Given, options: Mapping[str, Any]) -> Sums:
    """Count n-grams by length, of characters and words: predicted, wanted, and those in both."""
    predicted, right = require_texts("chrf", given.predictions, given.references)
    beta, smooths = options.get("beta", 2), options.get("eps_smoothing", False)

    def scores(sums: Floats) -> dict[str, Floats]:
        return {"chrf": _chrf(sums, beta, smooths)}

    counts = []
    for text, texts in zip(predicted, right, strict=True):
        own = _ngrams(text, options)
        tables = np.array([_matches(own, _ngrams(one, options)) for one in texts], float)
        counts.append(tables[np.argmax(_chrf(tables, beta, smooths))])
    return Sums(np.array(counts), scores)


def _ngrams(text: str, options: Mapping[str, Any]) -> list[Counter[str]]:
    helpers = load_extra("sacrebleu.metrics.helpers", "chrf")
    text = text.lower() if options.get("lowercase") else text
    order, whitespace = options.get("char_order", 6), options.get("whitespace", False)
    found: list[Counter[str]] = helpers.extract_all_char_ngrams(text, order, whitespace)
    if num_words := options.get("word_order", 0):
        words = [part for word in text.split() for part in _without_mark(word)]
        found += [helpers.extract_word_ngrams(words, n + 1) for n in range(num_words)]
    return found


def _without_mark(word: str) -> list[str]:
    """Split the mark at the end of a word from it, or else the one at its beginning."""
    if len(word) > 1 and word[-1] in punctuation:
        return [word[:-1], word[-1]]
    return [word[0], word[1:]] if len(word) > 1 and word[0] in punctuation else [word]


def _matches(own: list[Counter[str]], others: list[Counter[str]]) -> list[int]:
    counts = []
    for one, other in zip(own, others, strict=True):
        same = sum(min(number, other[ngram]) for ngram, number in one.items() if ngram in other)
        counts += [one.total() if other else 0, other.total(), same]
    return counts


def _chrf(sums: Floats, beta: float, smooths: bool) -> Floats:
    """Return chrF of the counts of n-grams, as sacrebleu computes it."""
    tiny, factor = 1e-16, beta**2
    predicted, wanted, same = (sums[:, group::3] for group in range(3))
    precision, recall = _share(same, predicted, tiny), _share(same, wanted, tiny)
    if smooths:
        f = _share((1 + factor) * precision * recall, factor * precision + recall, tiny)
        return np.asarray(100 * f.sum(1) / f.shape[1])
    counts = (predicted > 0) & (wanted > 0)
    precision, recall = (
        _share((side * counts).sum(1), counts.sum(1).astype(float), 0.0)
        for side in (precision, recall)
    )
    return 100 * _share((1 + factor) * precision * recall, factor * precision + recall, 0.0)


def _share(part: Floats, whole: Floats, otherwise: float) -> Floats:
    """Divide; where there is nothing to divide by, return another number."""
    out = np.full(part.shape, otherwise)
    return np.asarray(np.divide(part, whole, out=out, where=whole != 0))


def _mean_defined(values: Floats) -> Floats:
    """Return the means of the rows without NaN; NaN where nothing else is in one."""
    is_defined = ~np.isnan(values)
    return _share(np.where(is_defined, values, 0.0).sum(1), is_defined.sum(1).astype(float), np.nan)


_MEANS = ("exact_match", "rouge", "squad")
_MAKERS: dict[str, Callable[[Given, Mapping[str, Any]], Sums]] = {
    "bleu": _of_bleu,
    "chrf": _of_chrf,
    "mean_iou": _of_maps,
    "seqeval": _of_spans,
}
