"""Masks that belong to the row, so that each evaluation of a masked language model has the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from manualloop.data.grouping import round_up
from manualloop.data.transform import (
    NumberedRows,
    global_states_kept,
    seed_global,
    seeds_of_rows,
)
from manualloop.tasks.task import IGNORE_INDEX

_COLLATOR = "DataCollatorForLanguageModeling"


def masks_rows(collate_fn: Any) -> bool:
    """Tell whether a ``collate_fn`` is transformers' collator that masks tokens at random.

    One for whole words, or of a class of the user's that inherits from it, is one as well.
    """
    names = [base.__name__ for base in type(collate_fn).__mro__ if _is_of_transformers(base)]
    is_torch = getattr(collate_fn, "return_tensors", "pt") == "pt"
    return _COLLATOR in names and bool(getattr(collate_fn, "mlm", False)) and is_torch


def _is_of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


class RowMasks:
    """A ``collate_fn`` that masks each row by a generator of its own, whatever stands beside it.

    Args:
        collate_fn: A collator that ``masks_rows`` knows. It masks one row at a time.
        seed: Seed of the run; with the number of the row it determines the masks.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Mapping[str, Any]], seed: int) -> None:
        self.collate_fn, self._seed = collate_fn, seed

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Return the batch of some rows; rows without numbers are masked as ever."""
        whole: Any = self.collate_fn
        if not isinstance(rows, NumberedRows):
            return whole(rows)
        alone: Any = copy(whole)
        alone.pad_to_multiple_of, alone.seed, alone.generator = None, None, torch.Generator()
        # Collators of whole words, in older versions, draw from Python's generator as well.
        names = () if type(whole).__name__ == _COLLATOR else ("python", "numpy", "torch")
        singles = []
        with global_states_kept(names):
            for row, seed in zip(
                rows, seeds_of_rows(self._seed, 0, rows.numbers, "mask"), strict=True
            ):
                alone.generator.manual_seed(seed)
                seed_global(names, seed)
                singles.append(dict(alone([row])))
        return self._together(singles)

    def _together(self, singles: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return rows that were masked alone as one batch, padded as the collator pads."""
        collator: Any = self.collate_fn
        tokenizer = collator.tokenizer
        multiple = collator.pad_to_multiple_of or 1
        width = int(round_up(max(single["input_ids"].shape[1] for single in singles), multiple))
        ends = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            "attention_mask": 0,
            "labels": IGNORE_INDEX,
        }
        is_left = tokenizer.padding_side == "left"
        batch = {}
        for name in singles[0]:
            columns = [single[name] for single in singles]
            if name in ends:
                columns = [_widen(column, width, ends[name], is_left) for column in columns]
            batch[name] = torch.cat(columns)
        return batch


def _widen(column: Tensor, width: int, end: int, is_left: bool) -> Tensor:
    missing = width - column.shape[1]
    return torch.nn.functional.pad(column, (missing, 0) if is_left else (0, missing), value=end)
