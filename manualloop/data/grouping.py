"""Orders in which the rows of a batch are about as long as each other, so that little is padding.

All are pure functions. The batch with the longest row comes first, so that a lack of memory shows
at once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_Lengths = TypeVar("_Lengths", int, Ints)

# Batches. transformers takes 50. On SST-2 in batches of 32, 48 make 1.052 of the tokens, and 192
# make 1.014; of 8 neighbours the longest is 1.40 and 1.13 times their mean. (Steps that follow each
# other on batches of one length cost accuracy, so that there are as many neighbours as ranks.)
_SORTED_TOGETHER = 192
_NUM_PARTS = 4  # at least, as in transformers: else few rows would meet the same ones every epoch
_RUNG = 1.03  # lengths within 3 % count as one; up to 33 tokens each counts for itself


def grouped_order(
    lengths: Ints, batch_size: int, seed: int, epoch: int, num_ranks: int = 1
) -> list[int]:
    """Return the rows so that those of a batch are about as long as each other.

    Rows are drawn as by ``order``, sorted within parts of at most 192 batches, a quarter of
    all, and then the batches are drawn, for each rank a neighbour: what ranks read at once is about
    as long, too.

    Args:
        lengths: int64 ``(rows,)``: tokens of each row.
        batch_size: Rows a batch.
        seed: Of the whole run.
        epoch: From 0.
        num_ranks: That read a batch each.

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
    # The rows of the last batch are not the shortest, which drop_last would leave out every epoch.
    parts = np.split(drawn, [*range(size, end, size), end, num_batches * batch_size])
    rows = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    units = [rows[start : start + unit] for start in range(0, end, unit)]
    rest = rows[end:]
    order = torch.randperm(len(units), generator=generator).tolist()
    most = lengths.max()
    order.sort(key=lambda unit: bool(lengths[units[unit][0]] == most), reverse=True)
    rows = np.concatenate([*(units[unit] for unit in order), rest])
    longest = int(lengths[rows].argmax())  # in the rest, which stays at the end, or first already
    rows[[0, longest]] = rows[[longest, 0]]
    numbers: list[int] = rows.tolist()
    return numbers


def budgeted_batches(
    lengths: Ints, max_tokens: int, seed: int, epoch: int, num_ranks: int = 1
) -> list[list[int]]:
    """Return batches that hold, padded, at most so many tokens each.

    Rows are drawn, then sorted by length, then cut into batches, and those are drawn as by
    ``grouped_order``. For sorting, lengths within 3 % count as one. So batches begin at the same
    lengths in every epoch: an epoch always has as many.

    Args:
        lengths: int64 ``(rows,)``: tokens of each row, none above ``max_tokens``.
        max_tokens: Of a batch: its rows times its longest one.
        seed: Of the whole run.
        epoch: From 0.
        num_ranks: That read a batch each.

    >>> budgeted_batches(np.array([3, 9, 2, 8, 1, 7, 5]), max_tokens=10, seed=42, epoch=0)
    [[1], [3], [2, 4], [6, 0], [5]]
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    drawn = torch.randperm(len(lengths), generator=generator).numpy()
    rungs = _rungs_of(lengths, max_tokens)
    rows = drawn[np.argsort(-rungs[drawn], kind="stable")]
    longest = int(lengths[rows].argmax())
    rows[[0, longest]] = rows[[longest, 0]]  # it is on the first rung
    starts = cut(rungs[rows], max_tokens)
    batches = [rows[begin:end].tolist() for begin, end in pairwise([*starts, len(rows)])]
    units = [batches[n : n + num_ranks] for n in range(0, len(batches), num_ranks)]
    last = len(units) - (len(units[-1]) < num_ranks)  # the incomplete one stays at the end
    order = (1 + torch.randperm(max(last - 1, 0), generator=generator)).tolist()
    units = [units[0], *(units[number] for number in order), *units[max(last, 1) :]]
    return [batch for unit in units for batch in unit]


def longest_first(lengths: Ints) -> list[int]:
    """Return the rows from the longest to the shortest; those of one length in their order.

    >>> longest_first(np.array([3, 9, 2, 9]))
    [1, 3, 0, 2]
    """
    rows: list[int] = np.argsort(-lengths, kind="stable").tolist()
    return rows


def cut(lengths: Ints, max_tokens: int) -> list[int]:
    """Return where batches begin that hold as many rows of an order as fit into a budget.

    Args:
        lengths: int64 ``(rows,)``: in the order of the rows.
        max_tokens: Of a batch: its rows times its longest one. A longer row is a batch for itself.

    >>> cut(np.array([5, 3, 3, 2, 6]), max_tokens=10)
    [0, 2, 4]
    """
    starts, longest = [0] if len(lengths) else [], 0
    for row, length in enumerate(lengths.tolist()):
        longest = max(longest, length, 1)  # a row without tokens still takes a place
        if row > starts[-1] and longest * (row - starts[-1] + 1) > max_tokens:
            starts.append(row)
            longest = max(length, 1)
    return starts


def round_up(lengths: _Lengths, multiple: int) -> _Lengths:
    """Round up to a multiple.

    >>> round_up(13, 8), round_up(np.array([7, 8, 9]), 8)
    (16, array([ 8,  8, 16]))
    """
    return -(-lengths // multiple) * multiple


def _rungs_of(lengths: Ints, most: int) -> Ints:
    """Round lengths up to the next rung of a ladder, and to no more than so much."""
    rungs = [1]
    while rungs[-1] < int(lengths.max()):
        rungs.append(max(rungs[-1] + 1, int(rungs[-1] * _RUNG)))
    rounded: Ints = np.minimum(np.array(rungs)[np.searchsorted(rungs, lengths)], most)
    return rounded
