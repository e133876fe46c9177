"""Rows that are several lists of tokens each, such as a better and a worse answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manualloop.data.grouping import round_up
from manualloop.data.splits import Split
from manualloop.errors import DataError
from manualloop.tasks.task import IGNORE_INDEX


def holds_nested(split: Split) -> bool:
    """Tell whether a row of a split is several lists of tokens, with a list of labels for each."""
    if not all(_is_nested(split.first.get(name)) for name in ("input_ids", "labels")):
        return False
    kinds = split.kinds  # of arrays of a fixed shape another
    return kinds["input_ids"] == kinds["labels"] == "list"


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], list)


class NestedCollate:
    """A ``collate_fn`` that pads rows of several lists of tokens to ``(rows, lists, tokens)``.

    They are padded on the right: only generation needs the left.

    Args:
        tokenizer: Tokenizer whose padding token is used.
        pad_to_multiple_of: Number of which the padded length is a multiple.
    """

    def __init__(self, tokenizer: Any, pad_to_multiple_of: int | None = None) -> None:
        self._tokenizer, self._multiple = tokenizer, pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of some rows; ``attention_mask`` is 0 at the padding.

        Raises:
            DataError: Rows differ in their number of lists, or lists in their number of entries.
        """
        _check(rows)
        longest = max(len(ids) for row in rows for ids in row["input_ids"])
        width = int(round_up(longest, self._multiple))
        ends = {
            "input_ids": self._tokenizer.pad_token_id,
            "token_type_ids": getattr(self._tokenizer, "pad_token_type_id", 0),
            "attention_mask": 0,
            "labels": IGNORE_INDEX,
        }
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        ones = [[[1] * len(ids) for ids in lists] for lists in columns["input_ids"]]
        columns = {"attention_mask": ones, **columns}
        batch = {
            name: self._pad(cells, width, ends[name])
            if name in ends and _is_nested(cells[0])
            else torch.tensor(cells)
            for name, cells in columns.items()
        }
        batch["labels"] = batch.pop("labels")  # last, as elsewhere
        return batch

    def _pad(self, cells: list[Any], width: int, end: int) -> Tensor:
        padded = torch.full((len(cells), len(cells[0]), width), end)
        for row, lists in enumerate(cells):
            for number, values in enumerate(lists):
                padded[row, number, : len(values)] = torch.tensor(values)
        return padded


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that do not fit together."""
    number = len(rows[0]["input_ids"])
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        if len(ids) != number or len(labels) != number:
            raise DataError(
                f"A row has {len(ids)} lists of input_ids and {len(labels)} of labels, where the "
                f"first of its batch has {number}. Give all rows the same number of lists."
            )
        if [*map(len, ids)] != [*map(len, labels)]:
            raise DataError(
                f"A row has lists of {', '.join(map(str, map(len, ids)))} input_ids and of "
                f"{', '.join(map(str, map(len, labels)))} labels. Give each token a label; "
                f"{IGNORE_INDEX} for those that are not learned."
            )
