"""The metric of spans of tags: names of persons, organizations, places in a sentence.

seqeval computes the scores: Nakayama, "seqeval: A Python framework for sequence labeling
evaluation", 2018. Keys are those of the ``seqeval`` script of
https://github.com/huggingface/evaluate, which counts as CoNLL-2003's ``conlleval`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.forms import load_extra

SCHEMES = ("IOB1", "IOB2", "IOE1", "IOE2", "IOBES", "BILOU")
_PREFIXES = {"IOBES": "BIES", "BILOU": "BILU"}


def seqeval(
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    mode: str | None = None,
    scheme: str | None = None,
    suffix: bool = False,
    zero_division: float = 0.0,
) -> dict[str, float]:
    """Score spans of tags such as ``B-PER``: a span counts if its type and both ends are right.

    Args:
        predictions: The tags of each sentence: their names, or numbers of ``names``.
        references: The right tags, as many for each sentence.
        names: The names of the tags by number.
        mode: None counts spans as ``conlleval`` does, whatever the scheme; ``"strict"`` only those
            that follow the scheme.
        scheme: Scheme of the tags for ``mode="strict"``: IOB1, IOB2, IOE1, IOE2, IOBES or BILOU.
        suffix: Whether tags end with the letter, as in ``PER-B``.
        zero_division: Score where there is nothing to divide by, 0 or 1.

    Returns:
        ``overall_precision``, ``overall_recall``, ``overall_f1`` and ``overall_accuracy`` of tags;
        ``PER_precision``, ``PER_recall``, ``PER_f1`` and ``PER_number`` of each type.

    >>> seqeval([["B-PER", "O"], ["O", "B-LOC"]], [["B-PER", "O"], ["B-LOC", "I-LOC"]])[
    ...     "overall_f1"
    ... ]
    0.5
    """
    labeling, v1, schemes = load_seqeval()
    check_spans(mode=mode, scheme=scheme)
    predicted = as_tags("predictions", predictions, names)
    right = as_tags("references", references, names)
    _require_same_lengths(predicted, right)
    _require_spans(predicted + right, scheme, suffix)
    options: dict[str, Any] = {"suffix": suffix, "zero_division": zero_division}
    if mode == "strict":
        options["scheme"] = getattr(schemes, str(scheme))
        score = v1.precision_recall_fscore_support
    else:
        score = labeling.precision_recall_fscore_support
    spans = spans_of([*right, *predicted], scheme, suffix)
    types = sorted({type_name for row in spans for type_name, _, _ in row})
    scores: dict[str, float] = {}
    precision, recall, f1, _ = score(right, predicted, average="micro", **options)
    scores |= {"overall_precision": precision, "overall_recall": recall, "overall_f1": f1}
    num_tags = sum(map(len, right))
    scores["overall_accuracy"] = (
        labeling.accuracy_score(right, predicted) if num_tags else float("nan")
    )
    of_types = score(right, predicted, average=None, **options) if types else [[]] * 4
    for type_name, *values in zip(types, *of_types, strict=True):
        keys = ("precision", "recall", "f1", "number")
        scores |= {f"{type_name}_{key}": v for key, v in zip(keys, values, strict=True)}
    return {key: float(value) for key, value in scores.items()}


def spans_of(
    rows: list[list[str]], scheme: str | None, suffix: bool
) -> list[set[tuple[str, int, int]]]:
    """Return the spans of each sentence: type, first and last tag."""
    labeling, _, schemes = load_seqeval()
    if scheme is None:
        return [set(labeling.get_entities(row, suffix)) for row in rows]
    found = schemes.Entities(rows, getattr(schemes, scheme), suffix).entities
    return [{(span.tag, span.start, span.end) for span in row} for row in found]


def load_seqeval() -> tuple[Any, Any, Any]:
    """Import seqeval."""
    return (
        load_extra("seqeval.metrics.sequence_labeling", "seqeval"),
        load_extra("seqeval.metrics.v1", "seqeval"),
        load_extra("seqeval.scheme", "seqeval"),
    )


def check_spans(*, mode: str | None = None, scheme: str | None = None, **options: Any) -> None:
    """Check the options of ``seqeval``; it would leave a scheme out of account without a word.

    Raises:
        ConfigError: They do not fit together.
    """
    if mode not in (None, "strict") or scheme not in (None, *SCHEMES):
        raise ConfigError(
            f"seqeval got mode={mode!r} and scheme={scheme!r}. mode is None or 'strict', scheme "
            f"None or one of {', '.join(SCHEMES)}: mode='strict', scheme='IOB2'."
        )
    if (mode == "strict") != (scheme is not None):
        raise ConfigError(
            f"seqeval got mode={mode!r} and scheme={scheme!r}, and counts by a scheme only in "
            "strict mode. Pass both, or none: mode='strict', scheme='IOB2'."
        )


def as_tags(role: str, rows: Sequence[Any], names: Sequence[str] | None) -> list[list[str]]:
    """Return the names of the tags of each row."""
    tags = []
    for number, row in enumerate(rows):
        if isinstance(row, str) or not hasattr(row, "__iter__"):
            raise MetricError(
                f"seqeval scores the tags of sentences, but row {number} of the {role} is "
                f"{row!r:.60}. Give it a list of tags for each row: [['B-PER', 'O'], ['O']]."
            )
        row = row.tolist() if hasattr(row, "tolist") else list(row)
        if all(isinstance(tag, str) for tag in row):
            tags.append(row)
        else:
            tags.append([_tag_of(tag, role, number, names) for tag in row])
    return tags


def _tag_of(tag: Any, role: str, row: int, names: Sequence[str] | None) -> str:
    if isinstance(tag, str):
        return tag
    if names is None:
        raise MetricError(
            f"seqeval got the number {tag!r} for a tag in row {row} of the {role}, and nothing "
            "tells the names of the tags. Pass them: load_metric('seqeval', names=['O', 'B-PER', "
            "'I-PER']), or set model.config.id2label."
        )
    if isinstance(tag, Integral) and int(tag) in range(len(names)):
        return names[int(tag)]
    raise MetricError(
        f"seqeval got {tag!r} for a tag in row {row} of the {role}, and knows the numbers 0 to "
        f"{len(names) - 1}. Leave ignored tokens out of both sides."
    )


def _require_same_lengths(predicted: list[list[str]], right: list[list[str]]) -> None:
    for number, (row, expected) in enumerate(zip(predicted, right, strict=True)):
        if len(row) != len(expected):
            raise MetricError(
                f"seqeval got {len(row)} predicted tags and {len(expected)} right ones in row "
                f"{number}. Leave ignored tokens out of both sides."
            )


def _require_spans(rows: list[list[str]], scheme: str | None, suffix: bool) -> None:
    """Refuse tags that are none of spans, of which seqeval would make types all the same."""
    letters = "BILU" if scheme == "BILOU" else "BIES"
    for tag in sorted({tag for row in rows for tag in row} - {"O", *letters}):
        letter, dash = (tag[-1:], tag[-2:-1]) if suffix else (tag[:1], tag[1:2])
        if letter not in letters or dash != "-":
            raise MetricError(
                f"seqeval scores spans of tags such as {'PER-B' if suffix else 'B-PER'} and O, but "
                f"there is a tag {tag!r}. For a class a token pass 'accuracy' or 'f1/macro'; for "
                "BILOU tags mode='strict', scheme='BILOU'."
            )
