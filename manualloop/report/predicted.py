"""What predictions show: which classes are confused, how far, and in which rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from manualloop.data.files import is_frame
from manualloop.errors import ConfigError
from manualloop.evaluation.inputs import texts_of
from manualloop.evaluation.predictions import Kind, Predictions, is_ignored, kind_of
from manualloop.report.calibration import (
    SOURCE,
    calibration_bins,
    calibration_error,
    confidences,
)
from manualloop.report.parts import Cell, Chart, Example, Examples, Part, Section, Table, Text
from manualloop.report.svg import reliability_chart, scatter_chart
from manualloop.report.text import number, percent, shorten
from manualloop.tasks.task import IGNORE_INDEX

_MOST_CLASSES = 20
_MOST_WRONG = 20
_MOST_POINTS = 1_000
_LONGEST_TEXT = 800


def predicted(
    table: Predictions,
    rows: Any = None,
    tokenizer: Any = None,
    accuracies: Collection[float] = (),
) -> list[Section]:
    """Show what a table of predictions tells.

    Args:
        table: The predictions.
        rows: Rows of the dataset by their numbers: texts, or dicts with texts; None looks them up.
        tokenizer: Tokenizer for loaders that have none.
        accuracies: Accuracies that the evaluations of the run have found, if they looked for it.
    """
    if not len(table):
        return []
    kind = kind_of(table)
    return [
        Section("confusion", "Confusion matrix", _confusions(table, kind, accuracies)),
        Section("values", "Predicted and true values", _values(table, kind)),
        Section("calibration", "Calibration", _calibration(table, kind)),
        Section("wrong", *_wrong_rows(table, kind, rows, tokenizer)),
    ]


def _class_name(table: Predictions, label: int) -> str:
    names = table.names
    known = names is not None and 0 <= label < len(names)
    return shorten(names[label], 60) if known and names is not None else str(label)


def _pairs(table: Predictions, kind: Kind) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return the true and the predicted class of every row or token that counts."""
    right, found = table.references, table.predictions
    if not isinstance(right, np.ndarray) or not isinstance(found, np.ndarray):
        return None
    if right.shape != found.shape or right.dtype.kind not in "biu":
        return None
    if kind not in ("class", "tokens") or (kind == "tokens" and table.names is None):
        return None
    counts = (right >= 0) & (found >= 0) & ~is_ignored(table, right)
    return right[counts].astype(np.int64), found[counts].astype(np.int64)


def _confusions(table: Predictions, kind: Kind, accuracies: Collection[float]) -> list[Part]:
    if kind == "classes":
        return _labels(table)
    if (pairs := _pairs(table, kind)) is None or not len(pairs[0]):
        return []
    right, found = pairs
    num_outputs = len(table.names or ())
    if kind == "class" and table.scores is not None and table.scores.ndim == 2:
        num_outputs = max(num_outputs, table.scores.shape[1])
    classes = np.union1d(np.union1d(right, found), np.arange(num_outputs))
    unit = "tokens" if kind == "tokens" else "rows"
    places = np.searchsorted(classes, right), np.searchsorted(classes, found)
    if len(classes) > _MOST_CLASSES:
        return [_most_confused(table, classes, *places, unit)]
    matrix = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(matrix, places, 1)
    shown = [_class_name(table, label) for label in classes.tolist()]
    totals = matrix.sum(axis=1, keepdims=True)
    heat = matrix / np.maximum(totals, 1)
    rows: list[list[str | Cell]] = [
        [
            name,
            *(
                Cell(f"{count:,}", heat=share, is_strong=at == place)
                for at, (count, share) in enumerate(zip(counts, shares, strict=True))
            ),
        ]
        for place, (name, counts, shares) in enumerate(
            zip(shown, matrix.tolist(), heat.tolist(), strict=True)
        )
    ]
    share = float((right == found).mean())
    note = (
        f"{int((right == found).sum()):,} of {len(right):,} {unit} are right ({percent(share)}). "
        f"The colour is the share of the {unit} of a true class."
    )
    if kind == "class" and accuracies and all(abs(share - a) > 1e-6 for a in accuracies):
        note += (
            " Neither the best nor the last evaluation of the run has this accuracy, so the "
            "predictions are of other rows or of other weights."
        )
    title = f"Numbers of {unit} by true and predicted class"
    columns = ["true class", *shown]
    return [Table(title, columns, rows, note=note, is_matrix=True, across="predicted class")]


def _most_confused(
    table: Predictions, classes: NDArray[Any], right: NDArray[Any], found: NDArray[Any], unit: str
) -> Table:
    """List the confusions that are most frequent, where a matrix would be too large to read."""
    totals = np.bincount(right, minlength=len(classes))
    is_wrong = right != found
    codes, counts = np.unique(right[is_wrong] * len(classes) + found[is_wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MOST_CLASSES]
    rows: list[list[str | Cell]] = []
    for code, count in zip(codes[order].tolist(), counts[order].tolist(), strict=True):
        true, other = divmod(code, len(classes))
        share = count / int(totals[true])
        names = [_class_name(table, int(classes[place])) for place in (true, other)]
        rows.append([*names, f"{count:,}", Cell(percent(share), share=share)])
    note = (
        f"{int((~is_wrong).sum()):,} of {len(right):,} {unit} are right "
        f"({percent(float((~is_wrong).mean()))}). There are {len(classes):,} classes."
    )
    columns = ["true class", "predicted as", unit, f"share of its {unit}"]
    return Table("The most frequent confusions", columns, rows, frozenset({0, 1}), note)


def _labels(table: Predictions) -> list[Part]:
    """Count for each of several labels how often it is found, missed, and wrongly found."""
    right, found = table.references, table.predictions
    if not isinstance(right, np.ndarray) or not isinstance(found, np.ndarray):
        return []
    if right.shape != found.shape:
        return []
    is_known = right >= 0
    true, given = (right > 0.5) & is_known, (found > 0.5) & is_known
    rows: list[list[str | Cell]] = []
    for label in range(right.shape[1]):
        has, gets = true[:, label], given[:, label]
        numbers = has.sum(), (has & gets).sum(), (has & ~gets).sum(), (~has & gets).sum()
        rows.append([_class_name(table, label), *(f"{int(n):,}" for n in numbers)])
    columns = ["label", "rows with it", "found", "missed", "found without it"]
    return [Table("Labels found and missed", columns, rows)]


def _values(table: Predictions, kind: Kind) -> list[Part]:
    right, found = table.references, table.predictions
    if kind != "value" or not isinstance(right, np.ndarray) or not isinstance(found, np.ndarray):
        return []
    if right.size != found.size:
        return []
    true, given = (values.reshape(len(table), -1).astype(np.float64) for values in (right, found))
    errors = (given - true).ravel()
    sound = errors[np.isfinite(errors)]
    if not sound.size:
        return []
    rows: list[list[str | Cell]] = [
        ["mean error", number(sound.mean())],
        ["mean absolute error", number(np.abs(sound).mean())],
        ["root of the mean squared error", number(np.sqrt(np.square(sound).mean()))],
        ["95 % of the errors are below", number(np.quantile(np.abs(sound), 0.95))],
    ]
    num_bad = errors.size - sound.size
    note = f"Without {num_bad:,} values that are NaN or infinite." if num_bad else ""
    parts: list[Part] = []
    if true.shape[1] == 1:
        step = max(len(true) / _MOST_POINTS, 1)
        places = [int(n * step) for n in range(int(len(true) / step))]
        points = [(float(true[n, 0]), float(given[n, 0])) for n in places]
        picture = scatter_chart("scatter", "Predicted over true values", points)
        if picture is not None:
            of = "" if len(points) == len(true) else f" ({len(points):,} of {len(true):,} rows)"
            parts.append(Chart(f"Predicted over true values{of}", picture))
    return [*parts, Table("Errors", ["measure", "value"], rows, note=note)]


def _calibration(table: Predictions, kind: Kind) -> list[Part]:
    found = confidences(table, kind)
    if found is None:
        return []
    bins = calibration_bins(*found)
    error = calibration_error(bins)
    unit = "rows" if kind == "class" else "labels"
    rows = [
        [
            f"{entry.low:.1f} to {entry.high:.1f}",
            f"{entry.num_rows:,}",
            number(entry.confidence) if entry.num_rows else "",
            number(entry.accuracy) if entry.num_rows else "",
        ]
        for entry in bins
    ]
    share = "share that is right" if kind == "class" else "share that has it"
    columns = ["confidence", unit, "mean confidence", share]
    title = "Reliability diagram"
    legend = [("accent", share), ("quiet", f"number of {unit}")]
    gap = found[0].astype(np.float64).mean() - found[1].mean()
    word = "above" if gap > 0 else "below"
    text = (
        f"ECE {error:.4f} over {len(found[0]):,} {unit}. Confidence is {abs(gap):.4f} {word} the "
        f"{share} on average."
    )
    picture = reliability_chart("reliability", title, bins)
    source = Text(SOURCE, is_small=True)
    return [
        Chart(title, picture, Table("Bins of confidence", columns, rows), legend),
        Text(text),
        source,
    ]


def _wrong_rows(
    table: Predictions, kind: Kind, rows: Any, tokenizer: Any
) -> tuple[str, list[Part]]:
    """Return the heading of the rows that are most wrong, and these."""
    title = "Rows the model was most wrong about"
    found = _ranked(table, kind)
    if found is None:
        return title, []
    places, facts, summary = found
    parts: list[Part] = [Text(summary)]
    if len(places):
        texts, note = _texts(table, places, rows, tokenizer)
        parts += [Text(note, is_small=True)] if note else []
        examples = [
            Example(_row_name(table, place), {**of_row, **_kept(table, place)}, of_texts)
            for place, of_row, of_texts in zip(places, facts, texts, strict=True)
        ]
        parts.append(Examples(examples) if any(texts) else _as_table(examples))
    return title, parts


def _as_table(examples: Sequence[Example]) -> Table:
    columns = list(dict.fromkeys(name for one in examples for name in one.facts))
    rows = [[one.title, *(one.facts.get(name, "") for name in columns)] for one in examples]
    return Table("Wrong rows", ["row", *columns], rows, frozenset(range(len(columns) + 1)))


_Ranked: TypeAlias = tuple[list[int], list[dict[str, str]], str]
"""Places of wrong rows, the worst first, facts on each of them, and a sentence on all."""


def _ranked(table: Predictions, kind: Kind) -> _Ranked | None:
    """Rank the rows that are wrong; None without references."""
    if table.references is None:
        return None
    rank = {"class": _rank_classes, "classes": _rank_labels, "value": _rank_values}
    return {**rank, "tokens": _rank_tokens, "object": _rank_objects}[kind](table)


def _summary(num_wrong: int, total: int, order: str) -> str:
    if not num_wrong:
        return f"All {total:,} rows are right." if total != 1 else "The only row is right."
    start = f"{num_wrong:,} of {total:,} rows {'is' if num_wrong == 1 else 'are'} wrong."
    if num_wrong == 1:
        return start
    first = f"These are the first {_MOST_WRONG}," if num_wrong > _MOST_WRONG else "They are"
    return f"{start} {first} sorted by {order}."


def _rank_classes(table: Predictions) -> _Ranked | None:
    right, found, scores = table.references, table.predictions, table.scores
    if not isinstance(right, np.ndarray) or right.shape != np.shape(found):
        return None
    wrong = np.flatnonzero((right >= 0) & (right != found))
    of_true = None
    if scores is not None and scores.ndim == 2 and right.max(initial=0) < scores.shape[1]:
        of_true = scores[wrong, right[wrong].astype(np.int64)]
        wrong = wrong[np.argsort(of_true, kind="stable")]  # NaN comes last
    places = wrong[:_MOST_WRONG].tolist()
    facts = []
    for place in places:
        true, given = int(right[place]), int(found[place])
        fact = {"true": _class_name(table, true), "predicted": _class_name(table, given)}
        if of_true is not None and scores is not None:
            fact["probability of the true class"] = number(float(scores[place, true]))
            if 0 <= given < scores.shape[1]:
                fact["of the predicted one"] = number(float(scores[place, given]))
        facts.append(fact)
    order = "the probability of the true class" if of_true is not None else "their numbers"
    return places, facts, _summary(len(wrong), int((right >= 0).sum()), order)


def _rank_labels(table: Predictions) -> _Ranked | None:
    right, found, scores = table.references, table.predictions, table.scores
    if not isinstance(right, np.ndarray) or right.shape != np.shape(found):
        return None
    is_known = right >= 0
    is_wrong = ((right > 0.5) != (np.asarray(found) > 0.5)) & is_known
    wrong = np.flatnonzero(is_wrong.any(axis=1))
    worst = -is_wrong[wrong].sum(axis=1).astype(float)
    if scores is not None and scores.shape == right.shape:
        true = np.where(right > 0.5, scores, 1 - scores).clip(1e-12)
        worst = np.where(is_known, np.log(true), 0)[wrong].sum(axis=1)
    wrong = wrong[np.argsort(worst, kind="stable")]
    places = wrong[:_MOST_WRONG].tolist()
    facts = []
    for place in places:
        missed = np.flatnonzero(is_wrong[place] & (right[place] > 0.5)).tolist()
        extra = np.flatnonzero(is_wrong[place] & (right[place] <= 0.5)).tolist()
        lists = {"missed": missed, "found without being there": extra}
        facts.append(
            {n: ", ".join(_class_name(table, i) for i in v) for n, v in lists.items() if v}
        )
    order = "the loss of all labels" if scores is not None else "the number of wrong labels"
    return places, facts, _summary(len(wrong), len(table), order)


def _rank_values(table: Predictions) -> _Ranked | None:
    right, found = table.references, table.predictions
    if not isinstance(right, np.ndarray) or right.size != np.size(found):
        return None
    true, given = (np.asarray(v, np.float64).reshape(len(table), -1) for v in (right, found))
    errors = np.abs(given - true).mean(axis=1)
    order = np.argsort(-np.where(np.isnan(errors), np.inf, errors), kind="stable")
    places = order[:_MOST_WRONG].tolist()
    facts = [
        {
            "true": ", ".join(map(number, true[place].tolist())),
            "predicted": ", ".join(map(number, given[place].tolist())),
            "error": number(float(errors[place])),
        }
        for place in places
    ]
    shown = min(_MOST_WRONG, len(table))
    return places, facts, f"The {shown:,} of {len(table):,} rows with the largest error."


def _rank_tokens(table: Predictions) -> _Ranked | None:
    right, found = table.references, np.asarray(table.predictions)
    if not isinstance(right, np.ndarray) or right.shape != found.shape:
        return None
    is_known = ~is_ignored(table, right) & (found != IGNORE_INDEX)
    right, found, is_known = (part.reshape(len(table), -1) for part in (right, found, is_known))
    is_wrong = (right != found) & is_known
    numbers, totals = is_wrong.sum(axis=1), is_known.sum(axis=1)
    wrong = np.flatnonzero(numbers)
    wrong = wrong[np.argsort(-numbers[wrong], kind="stable")]
    places = wrong[:_MOST_WRONG].tolist()
    facts = []
    for place in places:
        fact = {"wrong tokens": f"{int(numbers[place]):,} of {int(totals[place]):,}"}
        if table.names is not None:
            pairs = Counter(
                (int(right[place, at]), int(found[place, at]))
                for at in np.flatnonzero(is_wrong[place])
            )
            fact["true → predicted"] = ", ".join(
                f"{_class_name(table, a)} → {_class_name(table, b)} ({count})"
                for (a, b), count in pairs.most_common(5)
            )
        facts.append(fact)
    share = float(1 - is_wrong.sum() / max(is_known.sum(), 1))
    text = _summary(len(wrong), len(table), "the number of wrong tokens")
    return places, facts, f"{percent(share)} of all tokens are right. {text}"


def _rank_objects(table: Predictions) -> _Ranked | None:
    right, found = table.references, table.predictions
    if right is None or len(right) != len(found):
        return None
    sides = {"true": right, "predicted": found}
    pairs = enumerate(zip(right, found, strict=True))
    wrong = [place for place, (a, b) in pairs if _object(a) != _object(b)]
    places = wrong[:_MOST_WRONG]
    facts = [
        {name: shorten(_object(side[place]), _LONGEST_TEXT) for name, side in sides.items()}
        for place in places
    ]
    return places, facts, _summary(len(wrong), len(table), "their numbers")


def _object(value: Any) -> str:
    return str(value.tolist() if hasattr(value, "tolist") else value)


def _row_name(table: Predictions, place: int) -> str:
    split = table.inputs.split
    if table.index is None:
        return f"prediction {place:,}"
    return f"row {int(table.index[place]):,}" + (f" of {shorten(split, 60)}" if split else "")


def _kept(table: Predictions, place: int) -> dict[str, str]:
    """Return what was kept of a row and is no text."""
    values = {name: column[place] for name, column in table.kept.items()}
    return {
        shorten(name, 60): shorten(value, 200)
        for name, value in values.items()
        if not isinstance(value, str | list | Mapping)
    }


def _texts(
    table: Predictions, places: Sequence[int], rows: Any, tokenizer: Any
) -> tuple[list[dict[str, str]], str]:
    """Return the texts of rows, and a sentence on where they come from, or why there are none."""
    kept = [{n: column[p] for n, column in table.kept.items()} for p in places]
    texts = texts_of(kept) or [{} for _ in places]
    numbers = list(places) if table.index is None else table.index[list(places)].tolist()
    names, note = table.inputs.names, ""
    if rows is not None:
        texts = texts_of(_taken(rows, _found_in(rows, numbers, table)), tokenizer, names) or texts
    elif not names or not set(names) <= {name for of_row in texts for name in of_row}:
        found = None if table.index is None else table.inputs.texts(numbers, tokenizer)
        if found is not None:
            texts = [{**a, **b} for a, b in zip(found.texts, texts, strict=True)]
            note = _DECODED if found.are_decoded else ""
        elif not any(texts):
            note = _NO_TEXTS
    shown = [{shorten(n, 60): shorten(t, _LONGEST_TEXT) for n, t in row.items()} for row in texts]
    return shown, note


def _found_in(rows: Any, numbers: Sequence[int], table: Predictions) -> Sequence[int]:
    """Return the places of rows in a frame with other rows or another order than the predicted one.

    Raises:
        ConfigError: Its index counts its rows, which may be in either order.
    """
    index = table.inputs.frame_index
    if not is_frame(rows) or index is None or rows.index.equals(index):
        return numbers
    labels = index.take(numbers)
    if not rows.index.is_unique or not labels.isin(rows.index).all():
        return numbers
    if len(rows) == len(index) and rows.index.tolist() == list(range(len(rows))):
        raise ConfigError(
            "rows has the index 0, 1, 2, ..., and the frame that was predicted has it in another "
            "order, so nothing tells which rows are meant. Pass the frame that was predicted."
        )
    places: list[int] = rows.index.get_indexer(labels).tolist()
    return places


def _taken(rows: Any, numbers: Sequence[int]) -> list[Any]:
    """Return rows by their numbers, of a list, a dataset or a table of pandas.

    Raises:
        ConfigError: There are fewer rows than were predicted.
    """
    if max(numbers) >= len(rows):
        raise ConfigError(
            f"rows has {len(rows):,} rows, and row {max(numbers):,} was predicted. Pass the "
            'dataset of the loader that was predicted, such as rows=dataset["validation"].'
        )
    by_place = getattr(rows, "iloc", rows)
    found = [by_place[number] for number in numbers]
    return [row.to_dict() if hasattr(row, "to_dict") else row for row in found]


_DECODED = (
    "The texts are decoded from tokens, as the model got them. rows=dataset shows the original "
    'ones: write_report(result, "report.html", predictions, rows=dataset).'
)
_NO_TEXTS = (
    "The texts of these rows are not at hand, because the loader that gave them is gone or reads "
    "no text. Pass the dataset or a list of texts: "
    'write_report(result, "report.html", predictions, rows=dataset).'
)
