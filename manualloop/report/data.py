"""What a run was given: splits, classes, lengths, and what of the texts was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from manualloop.report.parts import Cell, Part, Section, Table
from manualloop.report.text import number, percent, shorten
from manualloop.types import SplitNotes

_MOST_CLASSES = 40


def data(splits: Mapping[str, SplitNotes], names: Sequence[str] | None) -> Section:
    """Show the splits that the loaders of a run were prepared with.

    Args:
        splits: Notes on the splits, by name.
        names: Names of the classes.
    """
    if not splits:
        return Section("data", "Data", [])
    parts: list[Part] = [_splits(splits)]
    parts += _classes(splits, names)
    parts += _values(splits)
    parts += _lengths(splits)
    return Section("data", "Data", parts)


def _splits(splits: Mapping[str, SplitNotes]) -> Table:
    rows: list[list[str | Cell]] = []
    for name, notes in splits.items():
        used = [*notes.texts, *([notes.label] if notes.label is not None else [])]
        others = [column for column in notes.columns if column not in used]
        rows.append(
            [
                shorten(name, 60),
                "stream" if notes.num_rows is None else f"{notes.num_rows:,}",
                shorten(", ".join(notes.texts), 300),
                shorten(notes.label or "", 100),
                shorten(", ".join(others), 300),
            ]
        )
    columns = ["split", "rows", "texts", "labels", "other columns"]
    kept = [n for n in range(len(columns)) if n < 2 or any(row[n] for row in rows)]
    texts = frozenset(place for place, n in enumerate(kept) if n != 1)
    return Table(
        "Splits", [columns[n] for n in kept], [[row[n] for n in kept] for row in rows], texts
    )


def _classes(splits: Mapping[str, SplitNotes], names: Sequence[str] | None) -> list[Part]:
    counted = {n: s.num_per_class for n, s in splits.items() if s.num_per_class}
    if not counted:
        return []
    found = names or next((s.names for s in splits.values() if s.names), None) or ()
    number_of_classes = max(len(found), *map(len, counted.values()))
    totals = {name: sum(counts) for name, counts in counted.items()}
    order = list(range(number_of_classes))
    note = ""
    if number_of_classes > _MOST_CLASSES:
        first = next(iter(counted.values()))
        order.sort(key=lambda label: -(first[label] if label < len(first) else 0))
        order = order[:_MOST_CLASSES]
        note = f"The {_MOST_CLASSES} most frequent of {number_of_classes:,} classes."
    columns = ["class"]
    for name in counted:
        columns += [shorten(name, 60), "share"]
    rows: list[list[str | Cell]] = []
    for label in order:
        row: list[str | Cell] = [shorten(found[label], 80) if label < len(found) else str(label)]
        for name, counts in counted.items():
            count = counts[label] if label < len(counts) else 0
            share = count / totals[name] if totals[name] else 0.0
            row += [f"{count:,}", Cell(percent(share), share=share)]
        rows.append(row)
    return [Table("Labels of each class", columns, rows, note=note)]


def _values(splits: Mapping[str, SplitNotes]) -> list[Part]:
    rows: list[list[str | Cell]] = [
        [shorten(name, 60), *map(number, notes.quantiles)]
        for name, notes in splits.items()
        if notes.quantiles
    ]
    columns = ["split", "least", "first quartile", "median", "third quartile", "greatest"]
    return [Table("Labels", columns, rows)] if rows else []


def _lengths(splits: Mapping[str, SplitNotes]) -> list[Part]:
    rows: list[list[str | Cell]] = []
    for name, notes in splits.items():
        if notes.lengths is None:
            continue
        is_known = notes.num_cut is not None and notes.num_texts
        cut = f"{notes.num_cut:,}" if is_known else ""
        share = (notes.num_cut or 0) / notes.num_texts if notes.num_texts else 0.0
        limit = "" if notes.max_length is None else f"{notes.max_length:,}"
        lengths = [f"{length:,}" for length in notes.lengths]
        rows.append([shorten(name, 60), *lengths, limit, cut, percent(share) if is_known else ""])
    columns = [
        "split",
        "least",
        "median",
        "95 % up to",
        "most",
        "cut off at",
        "texts cut off",
        "share",
    ]
    kept = [n for n in range(len(columns)) if n < 5 or any(row[n] for row in rows)]
    if not rows:
        return []
    return [
        Table(
            "Tokens of a row, and truncation",
            [columns[n] for n in kept],
            [[row[n] for n in kept] for row in rows],
        )
    ]
