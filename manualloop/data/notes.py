"""What is noted about a split when it is prepared, so that a report need not keep its data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manualloop.data.mapping import Encode
from manualloop.data.splits import Split
from manualloop.types import SplitNotes

if TYPE_CHECKING:
    from manualloop.data.survey import Survey

_OF_CLASSES = (
    *("single_label_classification", "multi_label_classification", "token_classification"),
)


def notes_on(
    split: Split,
    encode: Encode | None,
    names: tuple[str, ...] | None,
    found: Survey,
    columns: Sequence[str],
) -> SplitNotes:
    """Return the notes on a prepared split.

    Args:
        split: The split, with its labels under the name ``labels``.
        encode: What has tokenized its texts; None if something else has.
        names: Names of the classes.
        found: What was found out about all splits.
        columns: Columns of the dataset, or those that ``preprocess`` has made of them.
    """
    notes = SplitNotes(
        names,
        columns=tuple(columns),
        texts=found.columns.texts,
        label=found.columns.label,
        source=hub_source(split.rows),
    )
    if encode is not None and split.num_cut is not None:
        notes = notes._replace(
            num_cut=split.num_cut, num_texts=len(split.rows), max_length=encode.limit
        )
    if split.is_stream:
        return notes
    return notes._replace(
        num_rows=len(split.rows), lengths=_lengths(split), **_labels(split, found.labels.task)
    )


def hub_source(rows: Any) -> tuple[str, str | None] | None:
    """Return the dataset on the hub that rows were downloaded from, by the addresses of its files.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"text": ["a"]})
    >>> rows.info.download_checksums = {"hf://datasets/nyu-mll/glue@bc4a/mrpc/train.parquet": {}}
    >>> hub_source(rows)
    ('nyu-mll/glue', None)
    """
    files = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    names = {found[1] for file in files if (found := _ON_HUB.match(str(file)))}
    return (names.pop(), rows.info.config_name) if len(names) == 1 else None


_ON_HUB = re.compile(r"hf://datasets/([\w.-]+(?:/[\w.-]+)?)@")


def _lengths(split: Split) -> tuple[int, ...] | None:
    from manualloop.data.values import lengths_of

    if split.kinds.get("input_ids") != "list":
        return None
    lengths = lengths_of(split, "input_ids")
    if lengths is None or not len(lengths):
        return None
    marks = np.quantile(lengths, [0, 0.5, 0.95, 1], method="inverted_cdf")
    return tuple(marks.astype(int).tolist())


def _labels(split: Split, task: str | None) -> dict[str, Any]:
    from manualloop.data.values import count_classes, numbers_in

    kind = split.kinds.get("labels")
    if task in _OF_CLASSES and kind in ("class", "int", "list"):
        is_by_column = task == "multi_label_classification"
        counts = count_classes(split, "labels", is_by_column=is_by_column)
        return {} if counts is None else {"num_per_class": tuple(counts.tolist())}
    if task == "regression" and kind in ("float", "int"):
        numbers = numbers_in(split, "labels")
        numbers = numbers[np.isfinite(numbers)]
        if numbers.size:
            return {"quantiles": tuple(np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]).tolist())}
    return {}
