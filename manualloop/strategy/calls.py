"""Calls that all ranks must make: what they exchange carries the name of the function it is for.

Ranks exchange values in the order in which their programs come to it. If one rank alone calls a
function that takes all of them, such as an evaluation, its values meet those of something else. The
name of the function travels along, so that every rank notices this at once, and none uses what it
was not sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from manualloop.errors import DistributedError
from manualloop.strategy.base import Strategy, altered


class Tagged(NamedTuple):
    """A value that a rank sends, and what it is for.

    Attributes:
        call: Name of the public function that was called.
        step: Name of what the function does with it: "begin", "counts", "gather".
        value: The value.
    """

    call: str
    step: str
    value: Any


def strategy_of_call(strategy: Strategy, call: str) -> Strategy:
    """Return a strategy for one call: what it exchanges carries the name of the function.

    Args:
        strategy: The strategy of the process.
        call: Name of the public function that was called.
    """

    def gather(value: Any) -> list[Any]:
        if isinstance(value, Tagged):  # of a function that was called inside this one
            return strategy.gather(value)
        return values_of(strategy.gather(Tagged(call, "gather", value)))

    def sum_counts(counts: Sequence[float]) -> list[float]:
        found = values_of(strategy.gather(Tagged(call, "counts", list(counts))))
        return [sum(of_ranks) for of_ranks in zip(*found, strict=True)]

    return altered(strategy, call=call, gather=gather, sum_counts=sum_counts)


def in_call(strategy: Strategy, call: str) -> Strategy:
    """Return the strategy by which the ranks exchange values in a call of a public function.

    On a single rank it is the strategy itself. Inside of another call the name stays that one's.
    """
    if strategy.world_size == 1 or getattr(strategy, "call", None) is not None:
        return strategy
    return strategy_of_call(strategy, call)


def begin_call(strategy: Strategy, call: str, **arguments: Any) -> Strategy:
    """Return the strategy of a call once all ranks have made it, with the same arguments.

    Call it before anything that takes all ranks, such as preparing a model. Collective.

    Args:
        strategy: The strategy of the process, or of a call that this one is part of.
        call: Name of the public function.
        arguments: What decides in which order the ranks exchange values.

    Raises:
        DistributedError: On every rank: one of them called another function, or differs in an
            argument.
    """
    if strategy.world_size == 1:
        return strategy
    own = strategy_of_call(strategy, call)
    agree(own, call, **arguments)
    return own


def agree(strategy: Strategy, call: str, **arguments: Any) -> None:
    """Refuse a call whose arguments differ from rank to rank. Collective.

    Raises:
        DistributedError: On every rank.
    """
    if strategy.world_size == 1:
        return
    described = {name: _describe(value) for name, value in arguments.items()}
    found = values_of(strategy.gather(Tagged(call, "begin", described)))
    problems = []
    for name in described:
        values = [of_rank.get(name) for of_rank in found]
        if len(set(values)) > 1:
            ranks = {value: [r for r, v in enumerate(values) if v == value] for value in values}
            problems.append(
                f"{name} is "
                + ", and ".join(f"{value} on {name_ranks(on)}" for value, on in ranks.items())
            )
    if problems:
        raise DistributedError(
            f"{call} was called with different arguments: {'; '.join(problems)}. Pass the same on "
            "every rank: what is written and printed comes from rank 0 alone."
        )


def _describe(value: Any) -> str:
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else "given"


def values_of(found: Sequence[Any]) -> list[Any]:
    """Take the values of all ranks out of their tags.

    Raises:
        DistributedError: They are for different things.
    """
    tagged = [t if isinstance(t, Tagged) else Tagged("strategy.gather", "gather", t) for t in found]
    first = tagged[0]
    if all(t.call == first.call and t.step == first.step for t in tagged):
        return [t.value for t in tagged]
    raise DistributedError(explain_crossing([(t.call, t.step) for t in tagged]))


def explain_crossing(places: Sequence[tuple[str, str]]) -> str:
    """Say which ranks are in which function, given the function and its step for each rank.

    >>> explain_crossing([("evaluate_loop", "begin"), ("train_steps", "counts")])[:77]
    'evaluate_loop must be called on every rank: rank 0 is in evaluate_loop, and r'
    """
    ranks: dict[str, list[int]] = {}
    for rank, (call, _) in enumerate(places):
        ranks.setdefault(call, []).append(rank)
    where = ", and ".join(f"{name_ranks(on, 'is', 'are')} in {call}" for call, on in ranks.items())
    if len(ranks) == 1:
        (call,) = ranks
        return (
            f"The ranks are at different places of {call}: they read other data, were given other "
            "arguments, or have called it another number of times. Call it on every rank, equally "
            "often and with the same arguments."
        )
    inner = [call for call in ranks if call not in _AROUND] or list(ranks)
    return f"{must_be_called(' and '.join(inner))}: {where}. {OUTSIDE}"


_AROUND = ("train_loop", "train_steps", "strategy.gather", "strategy.sum_counts")
"""Functions that the others are called beside, or inside of."""

OUTSIDE = (
    "Take the call out of `if rank == 0:` and use its result there; of what it prints and writes, "
    "rank 0 does so alone."
)


def must_be_called(call: str) -> str:
    """Return the beginning of a message about a function that some rank has not called."""
    return f"{call} must be called on every rank"


def name_ranks(ranks: Sequence[int], *verbs: str) -> str:
    """Name some ranks in words, with a verb for one of them and for several.

    >>> name_ranks([3], "is", "are"), name_ranks([0, 2]), name_ranks(range(1, 8), "is", "are")
    ('rank 3 is', 'ranks 0 and 2', 'ranks 1 to 7 are')
    """
    if len(ranks) == 1:
        return " ".join((f"rank {ranks[0]}", *verbs[:1]))
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        name = f"ranks {ranks[0]} to {ranks[-1]}"
    else:
        name = f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
    return " ".join((name, *verbs[1:]))
