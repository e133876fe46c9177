"""Items: what the mean loss of a batch is a mean over, and how many of them a batch holds.

What an item is depends on the task, and adding up mean losses takes their numbers:

| task | items of a batch |
|---|---|
| single_label_classification, multiple_choice | rows whose label is not -100 |
| multi_label_classification, regression | elements of ``labels``: rows x classes, rows x outputs |
| token_classification, masked_lm, seq2seq_lm | labels that are not -100 |
| causal_lm | labels that are not -100, without each row's first: the model shifts them |
| question_answering | positions inside the input, of starts and of ends: two means |
| any, without labels | rows |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manualloop.errors import DataError
from manualloop.types import Batch

Counts: TypeAlias = tuple[int, ...]
"""The items of a batch, for each of the means that its loss is the mean of.

There is one, except for question answering, whose loss is the mean of two.
"""

IGNORE_INDEX = -100
"""The label that PyTorch's cross-entropy leaves out of the mean."""

_FEW = 64  # labels; a list of them takes 1 us


def count_kept(labels: Tensor) -> int:
    """Count the labels that are not -100.

    On the CPU no ATen operation is called: few labels are counted as a list, more through NumPy,
    which costs 20 us where its code is not in the cache. For labels on an accelerator the host
    waits, so leave batches on the CPU.
    """
    if labels.device.type == "cpu":
        if labels.ndim == 1 and labels.numel() <= _FEW:
            return labels.numel() - labels.tolist().count(IGNORE_INDEX)
        return int(np.count_nonzero(labels.numpy() != IGNORE_INDEX))
    return int(torch.count_nonzero(labels != IGNORE_INDEX))


def count_labels(batch: Batch) -> Counts:
    """Count the labels that are not ignored."""
    return (count_kept(batch["labels"]),)


def count_shifted_labels(batch: Batch) -> Counts:
    """Count the labels of a causal language model: no position predicts the first token."""
    shifted = batch.get("shift_labels")
    return (count_kept(batch["labels"][..., 1:] if shifted is None else shifted),)


def count_elements(batch: Batch) -> Counts:
    """Count the numbers in the labels."""
    return (int(batch["labels"].numel()),)


def count_positions(batch: Batch) -> Counts:
    """Count the start positions inside the input, and the end positions inside it."""
    length = batch["input_ids"].shape[-1]
    start, end = (
        int(np.count_nonzero(batch[name].cpu().numpy() < length))
        for name in ("start_positions", "end_positions")
    )
    return start, end


def count_rows(batch: Any) -> Counts:
    """Count the rows of a batch without labels."""
    return (num_rows(batch),)


def num_rows(batch: Any) -> int:
    """Count the rows of a batch: the length of its first tensor, or list of a dict's values.

    Raises:
        DataError: The batch holds neither.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]  # len() of a tensor is slow
    for value in values if isinstance(batch, Mapping) else ():
        if isinstance(value, list | tuple):
            return len(value)
    raise DataError(
        f"A batch of type {type(batch).__name__} holds no tensor, so its rows cannot be counted. "
        "Let the loader's collate_fn return a dict of tensors, one row per example."
    )
