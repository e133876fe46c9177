"""What a script must build alike on every rank, because each makes its updates itself."""

from __future__ import annotations

from manualloop.checkpoint.contract import Contract, Difference, differences
from manualloop.errors import DistributedError
from manualloop.strategy.base import Strategy
from manualloop.strategy.calls import name_ranks

_NUM_LISTED = 9
_BUILT = ("same", "groups", "schedule")
_OF_UPDATES = ("lr_scheduler", "model", "frozen parameters", "names of frozen parameters")


def agreed(contract: Contract, strategy: Strategy) -> Contract:
    """Return the contract of a run whose ranks have built the same model, optimizer and schedule.

    Gradients are added up over the ranks, and the update is made on each: with another learning
    rate the weights of a rank would become others. Collective.

    Raises:
        DistributedError: They have not; the message lists the settings that differ.
    """
    if strategy.world_size == 1:
        return contract
    settings = {name: contract["settings"].get(name) for name in _OF_UPDATES}
    own = {**{group: contract[group] for group in _BUILT}, "settings": settings}
    of_ranks = strategy.gather(own)
    for rank, other in enumerate(of_ranks[1:], 1):
        found = [d for d in differences(of_ranks[0], other) if _is_built(d)]
        if found:
            listed = "".join(f"\n- {d.name}: {d.old}, {d.new}" for d in found[:_NUM_LISTED])
            raise DistributedError(
                f"Rank 0 and {name_ranks([rank])} would make different updates: they have built "
                f"them with other settings.{listed}\nBuild the same model, optimizer and schedule "
                "on every rank: what is drawn needs a generator with a seed, and nothing may "
                "depend on the rank."
            )
    return contract


def _is_built(found: Difference) -> bool:
    """Tell whether a difference is one of the objects of a run, and not of its rows."""
    return found.group != "same" or found.name in ("optimizer", "class of lr_scheduler")
