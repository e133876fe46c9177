"""What the ranks of a run want, counted on all of them before any acts on it."""

from __future__ import annotations

from collections.abc import Sequence

KINDS = (
    "SIGINT",
    "SIGTERM",
    "SIGUSR1",
    "max_time",
    "evaluate_every",
    "checkpoint_every",
    "log_every",
)
"""What can be voted for: reasons to stop, and cadences that go by the clock."""


class Votes:
    """Wishes of this rank, and those of any rank that all ranks know of.

    A clock or a signal tells each rank something else. So a rank only votes; the votes ride along
    with the item count of the next update, and are seen on every rank after that same update.

    Args:
        rank: That votes.
        world_size: How many do. A single one's votes count at once.

    Attributes:
        is_alone: Whether there is one rank.
        has_clock: Whether it is this rank's clock that all go by.

    >>> votes = Votes(rank=1, world_size=2)
    >>> votes.cast("SIGTERM")
    >>> votes.has("SIGTERM"), votes.ballot()
    (False, [0, 1, 0, 0, 0, 0, 0])
    >>> votes.count([0, 2, 0, 0, 0, 0, 0])
    >>> votes.has("SIGTERM")
    True
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.is_alone, self.has_clock = world_size == 1, rank == 0
        self._cast: set[str] = set()
        self._counted: set[str] = set()

    def cast(self, kind: str) -> None:
        """Vote for something."""
        (self._counted if self.is_alone else self._cast).add(kind)

    def ballot(self) -> list[int]:
        """Return this rank's votes as numbers, to be added up over the ranks."""
        return [int(kind in self._cast) for kind in KINDS]

    def count(self, totals: Sequence[float]) -> None:
        """Take note of the sums of all ranks' ballots."""
        for kind, total in zip(KINDS, totals, strict=True):
            if total:
                self._counted.add(kind)
                self._cast.discard(kind)

    def has(self, kind: str) -> bool:
        """Tell whether some rank has voted for something, and every rank knows."""
        return kind in self._counted

    def take(self, kind: str) -> bool:
        """Tell it, and forget it: the wish is granted."""
        if kind not in self._counted:
            return False
        self._counted.remove(kind)
        return True
