"""Orders of rows in which the rows of a batch have about the same length, to save padding.

All orders are pure functions. The batch with the longest row comes first, so that a lack of memory
shows at once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_Lengths = TypeVar("_Lengths", int, Ints)

# Number of batches. transformers sorts 50 together. On SST-2 in batches of 32, padding brings the
# number of tokens to 1.052 with 48 batches and to 1.014 with 192; the longest of 8 neighbouring
# batches is 1.40 and 1.13 times their mean. (Consecutive steps on batches of one length cost
# accuracy, so there are only as many neighbours as ranks.)
_SORTED_TOGETHER = 192
_NUM_PARTS = 4  # at least, as in transformers: a few rows would else share batches in every epoch
_RUNG = 1.03  # lengths within 3 % count as equal; up to 33 tokens each length counts by itself


def grouped_order(
    lengths: Ints, batch_size: int, seed: int, epoch: int, num_ranks: int = 1
) -> list[int]:
    """Return the rows in an order in which those of a batch have about the same length.

    Rows are drawn as by ``order`` and sorted within parts of at most 192 batches and a quarter of
    all rows. Then the order of the batches is drawn, with one neighbour for each rank, so that
    ranks read batches of about the same length at the same time.

    Args:
        lengths: Number of tokens of each row, int64 ``(rows,)``.
        batch_size: Number of rows per batch.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        num_ranks: Number of ranks that read a batch each.

    >>> lengths = np.array([3, 9] * 8)
    >>> lengths[grouped_order(lengths, batch_size=2, seed=42, epoch=0)].reshape(-1, 2).tolist()
    [[9, 9], [9, 3], [9, 9], [9, 9], [9, 3], [3, 3], [3, 3], [3, 3]]
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    drawn = torch.randperm(len(lengths), generator=generator).numpy()
    num_batches, unit = len(drawn) // batch_size, num_ranks * batch_size
    end = len(drawn) // unit * unit
    num_parts = max(-(-num_batches // _SORTED_TOGETHER), _NUM_PARTS)
    size = max(-(-end // unit // num_parts), 1) * unit
    # The last batch must not hold the shortest rows: drop_last would drop them in every epoch.
    parts = np.split(drawn, [*range(size, end, size), end, num_batches * batch_size])
    rows = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    units = [rows[start : start + unit] for start in range(0, end, unit)]
    rest = rows[end:]
    order = torch.randperm(len(units), generator=generator).tolist()
    most = lengths.max()
    order.sort(key=lambda unit: bool(lengths[units[unit][0]] == most), reverse=True)
    rows = np.concatenate([*(units[unit] for unit in order), rest])
    longest = int(lengths[rows].argmax())  # in the rest at the end, or first already
    rows[[0, longest]] = rows[[longest, 0]]
    numbers: list[int] = rows.tolist()
    return numbers


def budgeted_batches(
    lengths: Ints, max_tokens: int, seed: int, epoch: int, num_ranks: int = 1
) -> list[list[int]]:
    """Return batches that hold at most a number of tokens each, padding included.

    Rows are drawn, sorted by length and cut into batches, and the order of the batches is drawn as
    by ``grouped_order``. Sorting treats lengths within 3 % as equal, so batches begin at the same
    lengths in every epoch, and every epoch has the same number of batches.

    Args:
        lengths: Number of tokens of each row, int64 ``(rows,)``, none above ``max_tokens``.
        max_tokens: Most tokens per batch: its number of rows times the length of its longest row.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        num_ranks: Number of ranks that read a batch each.

    >>> budgeted_batches(np.array([3, 9, 2, 8, 1, 7, 5]), max_tokens=10, seed=42, epoch=0)
    [[1], [3], [2, 4], [6, 0], [5]]
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    drawn = torch.randperm(len(lengths), generator=generator).numpy()
    rungs = rungs_of(lengths, max_tokens)
    rows = drawn[np.argsort(-rungs[drawn], kind="stable")]
    longest = int(lengths[rows].argmax())
    rows[[0, longest]] = rows[[longest, 0]]  # the longest row is on the first rung
    starts = cut(rungs[rows], max_tokens)
    batches = [rows[begin:end].tolist() for begin, end in pairwise([*starts, len(rows)])]
    units = [batches[n : n + num_ranks] for n in range(0, len(batches), num_ranks)]
    last = len(units) - (len(units[-1]) < num_ranks)  # the incomplete one stays at the end
    order = (1 + torch.randperm(max(last - 1, 0), generator=generator)).tolist()
    units = [units[0], *(units[number] for number in order), *units[max(last, 1) :]]
    return [batch for unit in units for batch in unit]


def longest_first(lengths: Ints) -> list[int]:
    """Return the rows from the longest to the shortest; rows of one length keep their order.

    >>> longest_first(np.array([3, 9, 2, 9]))
    [1, 3, 0, 2]
    """
    rows: list[int] = np.argsort(-lengths, kind="stable").tolist()
    return rows


def cut(lengths: Ints, max_tokens: int) -> list[int]:
    """Return the positions at which to cut an order of rows into batches that fit a budget.

    Args:
        lengths: Length of each row, int64 ``(rows,)``, in the order of the rows.
        max_tokens: Most tokens per batch: its number of rows times the length of its longest row.
            A longer row is a batch of its own.

    >>> cut(np.array([5, 3, 3, 2, 6]), max_tokens=10)
    [0, 2, 4]
    """
    starts, longest = [0] if len(lengths) else [], 0
    for row, length in enumerate(lengths.tolist()):
        longest = max(longest, length, 1)  # a row without tokens counts as one token
        if row > starts[-1] and longest * (row - starts[-1] + 1) > max_tokens:
            starts.append(row)
            longest = max(length, 1)
    return starts


def round_up(lengths: _Lengths, multiple: int) -> _Lengths:
    """Round lengths up to a multiple of a number.

    >>> round_up(13, 8), round_up(np.array([7, 8, 9]), 8)
    (16, array([ 8,  8, 16]))
    """
    return -(-lengths // multiple) * multiple


def rungs_of(lengths: Ints, most: int) -> Ints:
    """Round lengths up to the next rung of a ladder of 3 % steps, and to at most ``most``."""
    rungs = [1]
    while rungs[-1] < int(lengths.max()):
        rungs.append(max(rungs[-1] + 1, int(rungs[-1] * _RUNG)))
    rounded: Ints = np.minimum(np.array(rungs)[np.searchsorted(rungs, lengths)], most)
    return rounded
