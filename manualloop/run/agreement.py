"""What the ranks of a run agree on: to stop, or to do what is due by the clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from manualloop.strategy.base import Strategy, altered
from manualloop.types import Step

KINDS = (
    "SIGINT",
    "SIGTERM",
    "SIGUSR1",
    "max_time",
    "evaluate_every",
    "checkpoint_every",
    "log_every",
)
"""What a rank can propose: a reason to stop, or a cadence whose time has come."""


class Agreement:
    """The proposals of this rank, and those of any rank that every rank knows of.

    Clocks and signals differ between ranks, so a rank never acts on its own. It makes a proposal,
    which travels with the item counts of the next update, and every rank acts on it after that
    update. An agreement belongs to one run: a proposal that was never counted ends with it.

    Args:
        rank: Number of this rank.
        world_size: Number of ranks. The proposals of a single one are agreed on at once.

    Attributes:
        is_alone: Whether there is only one rank.
        has_clock: Whether cadences by time follow the clock of this rank.

    >>> agreement = Agreement(rank=1, world_size=2)
    >>> agreement.propose("SIGTERM")
    >>> agreement.has("SIGTERM"), agreement.proposals()
    (False, [0, 1, 0, 0, 0, 0, 0])
    >>> agreement.count([0, 2, 0, 0, 0, 0, 0])
    >>> agreement.has("SIGTERM")
    True
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.is_alone, self.has_clock = world_size == 1, rank == 0
        self._proposed: set[str] = set()
        self._agreed: set[str] = set()

    def propose(self, kind: str) -> None:
        """Propose something to all ranks."""
        (self._agreed if self.is_alone else self._proposed).add(kind)

    def proposals(self) -> list[int]:
        """Return the proposals of this rank as numbers, to be added up over all ranks."""
        return [int(kind in self._proposed) for kind in KINDS]

    def count(self, totals: Sequence[float]) -> None:
        """Agree on everything that at least one rank has proposed, given the sums."""
        for kind, total in zip(KINDS, totals, strict=True):
            if total:
                self._agreed.add(kind)
                self._proposed.discard(kind)

    def has(self, kind: str) -> bool:
        """Tell whether the ranks have agreed on something."""
        return kind in self._agreed

    def take(self, kind: str) -> bool:
        """Tell whether the ranks have agreed on something, and forget it."""
        if kind not in self._agreed:
            return False
        self._agreed.remove(kind)
        return True


def agree_at_updates(strategy: Strategy) -> tuple[Agreement, Strategy]:
    """Return the agreement of a new run, and the strategy by which its ranks agree.

    Every update counts its items over all ranks, and the counts carry the proposals along at no
    cost. On a single rank the strategy stays as it is.
    """
    agreement = Agreement(strategy.rank, strategy.world_size)
    if agreement.is_alone:
        return agreement, strategy

    def sum_counts(counts: Sequence[float]) -> list[float]:
        totals = strategy.sum_counts([*counts, *agreement.proposals()])
        agreement.count(totals[len(counts) :])
        return totals[: len(counts)]

    return agreement, altered(strategy, sum_counts=sum_counts)


def counted(
    steps: Iterable[Step | None], strategy: Strategy, step_fn: object
) -> Iterable[Step | None]:
    """Return the steps of a run, such that there is a count before each.

    A ``step_fn`` of the user may do without, so nothing is counted there, which carries the
    proposals.
    """
    if step_fn is None or strategy.world_size == 1:
        return steps
    return _count_before_each(iter(steps), strategy)


def _count_before_each(steps: Iterator[Step | None], strategy: Strategy) -> Iterator[Step | None]:
    while True:
        strategy.sum_counts([])
        try:
            step = next(steps)
        except StopIteration:
            return
        yield step
