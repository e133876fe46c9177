"""Packs: batches of several rows one after the other, without padding.

As many packs come in every epoch, with other rows in them. All functions are pure.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from itertools import accumulate

import torch

from manualloop.data.grouping import Ints, rungs_of


def packed_batches(
    lengths: Ints, max_tokens: int, seed: int, epoch: int, num_ranks: int = 1
) -> list[list[int]]:
    """Return the rows of each pack of an epoch.

    Lengths are rounded up to a ladder of 3 % steps, and packs of slots are made for the rounded
    lengths by best fit decreasing: every slot goes into the pack with the least room that it fits
    into. The slots depend on the lengths alone, so every epoch has as many packs. Which row of a
    length takes which slot, and the order of the packs, is drawn.

    Args:
        lengths: Number of tokens of each row, int64 ``(rows,)``, none above ``max_tokens``.
        max_tokens: Most tokens per pack.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        num_ranks: Number of ranks that read a pack each; makes no difference.

    >>> import numpy as np
    >>> packed_batches(np.array([3, 9, 2, 8, 1, 7, 5]), max_tokens=10, seed=42, epoch=0)
    [[1, 4], [6], [5, 0], [3, 2]]
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    drawn = torch.randperm(len(lengths), generator=generator).numpy()
    slots = rungs_of(lengths, max_tokens)
    rows_of: defaultdict[int, list[int]] = defaultdict(list)
    for row, slot in zip(drawn.tolist(), slots[drawn].tolist(), strict=True):
        rows_of[slot].append(row)
    packs = [[rows_of[slot].pop() for slot in pack] for pack in plan_packs(slots, max_tokens)]
    order = torch.randperm(len(packs), generator=generator).tolist()
    return [packs[number] for number in order]


def plan_packs(slots: Ints, max_tokens: int) -> list[list[int]]:
    """Put slots into packs by best fit decreasing.

    Args:
        slots: Length of each slot, int64 ``(rows,)``, none above ``max_tokens``.
        max_tokens: Most tokens per pack.

    >>> import numpy as np
    >>> plan_packs(np.array([3, 9, 2, 8, 1, 7, 5]), max_tokens=10)
    [[9, 1], [8, 2], [7, 3], [5]]
    """
    packs: list[list[int]] = []
    rooms: list[int] = []  # numbers of tokens that some pack has left, sorted
    packs_with: defaultdict[int, list[int]] = defaultdict(list)
    for slot, number in sorted(Counter(slots.tolist()).items(), reverse=True):
        for _ in range(number):
            place = bisect_left(rooms, slot)
            if place == len(rooms):
                room, pack = max_tokens, len(packs)
                packs.append([])
            else:
                room = rooms[place]
                pack = packs_with[room].pop()
                if not packs_with[room]:
                    rooms.pop(place)
            packs[pack].append(slot)
            if left := room - slot:
                if not packs_with[left]:
                    insort(rooms, left)
                packs_with[left].append(pack)
    return packs


def cut_sums(lengths: Ints, max_tokens: int) -> list[int]:
    """Return the positions at which to cut an order of rows into packs.

    >>> import numpy as np
    >>> cut_sums(np.array([5, 3, 3, 2, 6]), max_tokens=10)
    [0, 2, 4]
    """
    starts, before = [0] if len(lengths) else [], 0
    for row, end in enumerate(accumulate(lengths.tolist())):
        if row > starts[-1] and end - before > max_tokens:
            starts.append(row)
            before = end - int(lengths[row])
    return starts


def fill_of(lengths: Ints, num_packs: int, max_tokens: int) -> float:
    """Return the share of the tokens of packs that are used, 0.0 to 1.0."""
    return float(lengths.sum()) / (num_packs * max_tokens)
