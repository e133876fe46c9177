"""What the history of a run shows: curves, and the scores of its evaluations."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from manualloop.report.parts import Cell, Chart, Charts, Details, Part, Section, Table
from manualloop.report.svg import Band, Line, Point, line_chart, thin
from manualloop.report.text import number, shorten
from manualloop.run.table import ends_of_intervals
from manualloop.types import Record, is_training

_MOST_CHARTS = 8
_MOST_ROWS = 60
_BY_CLASS = ("precision", "recall", "f1-score", "support")


def curves(history: Sequence[Record], best_step: int | None, best_metric: str | None) -> Section:
    """Draw losses, scores and rates over the updates of a run.

    Args:
        history: Records of the run.
        best_step: Number of updates before the best evaluation; None: nothing decides.
        best_metric: Name of the metric that decides.
    """
    training = [record for record in history if is_training(record)]
    evaluations = [record for record in history if not is_training(record)]
    loss = [
        Line("training", "quiet", _points(training, "loss")),
        _scored(evaluations, "eval_loss", "evaluation"),
    ]
    last = max((record["step"] for record in history), default=0)
    charts = [_chart("loss", "Loss", loss, best_step, last)]
    if len({record["step"] for record in evaluations}) > 1:
        for place, name in enumerate(_charted(evaluations, best_metric)):
            title = name.removeprefix("eval_")
            line = _scored(evaluations, name, title)
            charts.append(_chart(f"score-{place}", title, [line], best_step, last))
    rate = Line("learning rate", "quiet", _points(training, "lr"))
    norm = Line("gradient norm", "quiet", _points(training, "grad_norm"))
    charts += [
        _chart("rate", "Learning rate", [rate], None, last),
        _chart("norm", "Gradient norm before clipping", [norm], None, last),
    ]
    drawn = [chart for chart in charts if chart is not None]
    parts: list[Part] = [Charts(drawn)] if drawn else []
    if training:
        parts.append(Details("Records of training", [_training_table(training)]))
    return Section("curves", "Curves", parts)


def scores(
    history: Sequence[Record],
    last: Mapping[str, Any],
    best: Mapping[str, Any],
    best_step: int | None,
    best_metric: str | None,
) -> Section:
    """Show the scores of the last and of the best evaluation, with their intervals.

    Args:
        history: Records of the run.
        last: Scores of the last evaluation.
        best: Scores of the best one; empty if nothing decides.
        best_step: Number of updates before it.
        best_metric: Name of the metric that decides.
    """
    evaluations = [record for record in history if not is_training(record)]
    if not last:
        return Section("metrics", "Metrics", [])
    last_step = evaluations[-1]["step"] if evaluations else None
    shown = [(best, best_step, "best")] if best else []
    if not best or best_step != last_step:
        shown.append((last, last_step, "last"))
    by_class = classes_in(last)
    columns, rows = ["metric"], []
    has_interval = [bool(ends_of_intervals(scores)) for scores, _, _ in shown]
    for (_, step, name), has_ends in zip(shown, has_interval, strict=True):
        columns.append(name if step is None else f"{name}, update {step:,}")
        columns += ["interval"] if has_ends else []
    for metric in scalars_of(last):
        row: list[str | Cell] = [Cell(metric, is_strong=metric == best_metric)]
        for (found, _, _), has_ends in zip(shown, has_interval, strict=True):
            row.append(Cell(number(found.get(metric)), is_strong=metric == best_metric))
            row += [_interval(found, metric)] if has_ends else []
        rows.append(row)
    note = "An interval shows how far a score would vary on other rows like these."
    note = note if any(has_interval) else ""
    scores_table = Table("Scores of the evaluation", columns, rows, note=note)
    parts: list[Part] = [scores_table] if rows else []
    if by_class:
        parts.append(_class_table(by_class, best or last))
    texts = {n: v for n, v in last.items() if not isinstance(v, Real | None)}
    if texts:
        rows = [[name, shorten(value, 400)] for name, value in texts.items()]
        parts.append(Table("Other results", ["name", "result"], rows, frozenset({0, 1})))
    if len(evaluations) > 1:
        parts.append(Details("All evaluations", [_all_evaluations(evaluations)]))
    return Section("metrics", "Metrics", parts)


def _points(records: Sequence[Record], name: str) -> list[Point]:
    return [
        (record["step"], float(record[name])) for record in records if _is_number(record.get(name))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _scored(evaluations: Sequence[Record], name: str, title: str) -> Line:
    band: list[Band] = []
    if ends := ends_of_intervals({name, f"{name}_low", f"{name}_high"}).get(name):
        names = name, *ends
        band = [
            (record["step"], float(record[ends[0]]), float(record[ends[1]]))
            for record in evaluations
            if all(_is_number(record.get(n)) for n in names)
        ]
    points = _points(evaluations, name)
    return Line(title, "accent", points, _thinned(band), has_dots=len(points) <= _MOST_ROWS)


def _thinned(band: list[Band]) -> list[Band]:
    size = len(band) / 300
    return band if size <= 1 else [band[int(n * size)] for n in range(300)]


def _chart(
    key: str, title: str, lines: Sequence[Line], best_step: int | None, last: float
) -> Chart | None:
    lines = [line for line in lines if line.points]
    picture = line_chart(key, title, lines, mark=best_step, last=last)
    if picture is None:
        return None
    legend = [(line.kind, line.name) for line in lines] if len(lines) > 1 else []
    return Chart(title, picture, _table_of(title, lines), legend)


def _table_of(title: str, lines: Sequence[Line]) -> Table:
    """Return the points of curves as a table: those that are drawn, up to a number."""
    values: dict[float, dict[str, float]] = {}
    is_cut = False
    for line in lines:
        points = thin(line.points, _MOST_ROWS)
        is_cut = is_cut or len(points) < len(line.points)
        for step, value in points:
            values.setdefault(step, {})[line.name] = value
    rows = [
        [f"{step:,.0f}", *(number(values[step].get(line.name), 4) for line in lines)]
        for step in sorted(values)
    ]
    num_points = sum(len(line.points) for line in lines)
    note = f"Some of {num_points:,} values; all are in result.history." if is_cut else ""
    return Table(title, ["update", *(line.name for line in lines)], rows, frozenset(), note)


def _charted(evaluations: Sequence[Record], best_metric: str | None) -> list[str]:
    """Return the scores that get a chart, the one that decides first."""
    names = [
        name for name in dict.fromkeys(n for r in evaluations for n in r) if name[:5] == "eval_"
    ]
    plain = {name.removeprefix("eval_") for name in names}
    by_class = _names_by_class(classes_in(plain))
    ends = {end for pair in ends_of_intervals(names).values() for end in pair}
    kept = [
        name
        for name in names
        if name not in ends
        and name != "eval_loss"
        and name.removeprefix("eval_") not in by_class
        and len(_points(evaluations, name)) > 1
    ]
    kept.sort(key=lambda name: name != f"eval_{best_metric}")
    return kept[:_MOST_CHARTS]


def classes_in(names: Collection[str]) -> list[str]:
    """Return the classes whose scores are those of a report of classification."""
    ending = f"_{_BY_CLASS[-1]}"
    classes = [name.removesuffix(ending) for name in names if name.endswith(ending)]
    return [c for c in classes if all(f"{c}_{column}" in names for column in _BY_CLASS)]


def _names_by_class(classes: Iterable[str]) -> set[str]:
    return {f"{name}_{column}" for name in classes for column in _BY_CLASS}


def _class_table(classes: Sequence[str], scores: Mapping[str, Any]) -> Table:
    rows: list[list[str | Cell]] = []
    for name in classes:
        values = [scores.get(f"{name}_{column}") for column in _BY_CLASS]
        rows.append([name, *map(number, values[:-1]), _count_or_number(values[-1])])
    return Table("Scores by class", ["class", *_BY_CLASS[:-1], "rows"], rows)


def scalars_of(scores: Mapping[str, Any]) -> list[str]:
    """Return the names of scores that are numbers, without intervals and scores by class."""
    hidden = {end for pair in ends_of_intervals(scores).values() for end in pair}
    hidden |= _names_by_class(classes_in(scores))
    return [n for n, value in scores.items() if n not in hidden and isinstance(value, Real | None)]


def _interval(scores: Mapping[str, Any], name: str) -> str:
    ends = ends_of_intervals(scores).get(name)
    return "" if ends is None else " to ".join(number(scores[end]) for end in ends)


def _all_evaluations(evaluations: Sequence[Record]) -> Table:
    newest = {k.removeprefix("eval_"): v for record in evaluations for k, v in record.items()}
    names = [n for n in scalars_of(newest) if n not in ("step", "epoch")][:8]
    shown = evaluations[-_MOST_ROWS:]
    rows: list[list[str | Cell]] = [
        [f"{r['step']:,}", f"{r['epoch']:.2f}", *(number(r.get(f"eval_{n}")) for n in names)]
        for r in shown
    ]
    note = "" if len(shown) == len(evaluations) else f"The last {len(shown)} of {len(evaluations)}."
    return Table("All evaluations", ["update", "epoch", *names], rows, frozenset(), note)


def _training_table(training: Sequence[Record]) -> Table:
    names = [n for n in ("loss", "lr", "grad_norm", "num_items") if n in training[-1]]
    size = max(len(training) / _MOST_ROWS, 1)
    places = dict.fromkeys([int(n * size) for n in range(int(len(training) / size))])
    shown = [training[place] for place in (*places, len(training) - 1)]
    shown = shown if len(places) < len(training) else list(training)
    rows: list[list[str | Cell]] = [
        [f"{r['step']:,}", f"{r['epoch']:.2f}", *(_count_or_number(r.get(n)) for n in names)]
        for r in shown
    ]
    titles = {"lr": "learning rate", "grad_norm": "gradient norm", "num_items": "items"}
    columns = ["update", "epoch", *(titles.get(n, n) for n in names)]
    note = "" if len(shown) == len(training) else f"{len(shown)} of {len(training):,} records."
    return Table("Records of training", columns, rows, frozenset(), note)


def _count_or_number(value: Any) -> str:
    is_whole = isinstance(value, Real) and math.isfinite(value) and float(value).is_integer()
    return number(int(value) if is_whole else value)
