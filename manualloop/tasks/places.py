"""Places of answers among the tokens of rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from manualloop.types import Batch

POSITIONS = ("start_positions", "end_positions")
"""Columns of places among the tokens of a row, which padding on the left moves."""


def count_positions(batch: Batch) -> tuple[float, float]:
    """Count the start positions inside the input, and the end positions inside it."""
    length = batch["input_ids"].shape[-1]
    start, end = (int(np.count_nonzero(batch[name].cpu().numpy() < length)) for name in POSITIONS)
    return start, end


def in_batch(positions: Tensor, lengths: Tensor, width: int, *, pads_left: bool) -> Tensor:
    """Return positions among the tokens of rows as those among the tokens of a padded batch.

    A position beyond the tokens of its row is out of the loss, and is so beside padding, too.

    >>> in_batch(torch.tensor([1, 3]), torch.tensor([4, 3]), 5, pads_left=True)
    tensor([2, 5])
    """
    moved = positions + (width - lengths) if pads_left else positions
    return torch.where(positions < lengths, moved, positions.clamp(min=width))
