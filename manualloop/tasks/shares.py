"""How much of a window's loss each of its micro-batches is.

A micro-batch weighs by its share of the items of the window, for each term of the loss. Where the
items come from:

1. The function that makes the loss may declare them: ``loss_fn.items``, ``terms.items``.
2. A loss of one term that is made by the user's function is weighed by a guess, and the gradients
   of the window are multiplied once by what the guess was off: those of all its graphs' leaves.
3. The terms of several are counted ahead, by a forward pass without gradients of each micro-batch
   but the first: their gradients are one sum, in which no term can be corrected afterwards.
4. Without such a function the task counts the batch.
5. Where nothing tells, all micro-batches weigh the same, and a message tells that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import isclose
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manualloop.batches import is_spare
from manualloop.errors import DataError, ModelError
from manualloop.mistakes import unclear_rows_message
from manualloop.models import is_sharded, unwrap_model
from manualloop.notices import say
from manualloop.randomness import random_states_kept
from manualloop.strategy.base import Strategy
from manualloop.tasks.loss import Loss, Term, loss_terms, read_items
from manualloop.tasks.task import Counts, Task


class Shares(NamedTuple):
    """The items of a window, by which its micro-batches are weighed.

    Attributes:
        counts: Items of each micro-batch, for each term.
        totals: Items of each term in the window, on all ranks.
        spare: Whether the items of a micro-batch count on another rank.
        num_unknown: Number of micro-batches, on all ranks, of which nothing tells the items. If
            there are any, all micro-batches have one.
        is_guess: Whether the function that makes the loss may have counted other items.
        is_own: Whether a function of the user's makes the loss.
        is_counted: Whether the terms of the micro-batches have their items already.
        is_settled: Whether earlier windows of the run were weighed by rows.
    """

    counts: Sequence[Counts]
    totals: Sequence[float]
    spare: Sequence[bool]
    num_unknown: float
    is_guess: bool
    is_own: bool
    is_counted: bool
    is_settled: bool

    def are_equal(self, found: Sequence[Term]) -> bool:
        """Tell whether micro-batches weigh the same: nobody has counted these terms' items."""
        return self.num_unknown > 0 and not (self.is_own and found[0][1] is not None)


def share_out(
    batches: Sequence[Any],
    counts: Sequence[Counts],
    task: Task,
    strategy: Strategy,
    loss: Loss,
    *,
    is_settled: bool = False,
) -> Shares:
    """Find the shares of the micro-batches of a window. Collective.

    Args:
        batches: The micro-batches.
        counts: The items that the task has counted in each.
        task: The task of the last one.
        strategy: The strategy.
        loss: What makes the loss.
        is_settled: Whether earlier windows of the run were weighed by rows.

    Raises:
        DataError: The micro-batches differ in the terms of their loss.
        ModelError: The model's loss is known to be no mean over items that can be counted.
    """
    is_own = not loss.is_models
    if task.objection and not is_own:
        raise ModelError(task.objection)
    if loss.declared is not None:
        counts = [loss.declared(batch) for batch in batches]
    several = strategy.world_size > 1
    spare = [is_spare(batch) for batch in batches] if several else [False] * len(batches)
    used = [count for count, is_none in zip(counts, spare, strict=True) if not is_none]
    told = [count for count in used if count]
    is_guess = is_own and loss.declared is None
    num_terms = 1 if is_guess else max(map(len, counts)) or 1
    if min(map(len, told), default=num_terms) < num_terms:
        raise DataError(_mixed_terms("items") if is_own else _MIXED)
    items = [*map(sum, zip(*told, strict=False))][:num_terms] or [0] * num_terms
    here = [*items, used.count(()), len(used)]
    *totals, num_unknown, num_used = strategy.sum_counts(here) if several else here
    if num_unknown:
        counts, totals = [(1,)] * len(batches), [num_used]
    elif is_guess:
        totals = [totals[0] or 1]  # the function may count items that the labels do not show
    is_counted = not is_own and not num_unknown and not any(spare)
    return Shares(counts, totals, spare, num_unknown, is_guess, is_own, is_counted, is_settled)


_MIXED = (
    "The micro-batches of a window differ: some have start and end positions, others do not. Give "
    "all batches start_positions and end_positions; rows without an answer get a position beyond "
    "the tokens."
)


def _mixed_terms(name: str) -> str:
    return (
        f"{name} returned other numbers of terms for the micro-batches of a window. Let it return "
        "the same terms for each; one without items in a batch gets 0 of them."
    )


def items_of(
    shares: Shares, number: int, found: Sequence[Term], batch: Any
) -> list[tuple[Tensor, float]]:
    """Return the terms of a micro-batch's loss with their items.

    Args:
        shares: The shares of the window.
        number: Number of the micro-batch in the window.
        found: The terms; their items may be missing, or tensors.
        batch: The micro-batch.

    Raises:
        DataError: In a run that weighs by rows, nothing tells how many a batch of any rank has.
        ModelError: There are more or fewer terms than in other micro-batches, or other items than
            were declared.
    """
    if len(found) != len(shares.totals):
        raise ModelError(_mixed_terms("terms"))
    if shares.spare[number]:
        return [(mean, 0) for mean, _ in found]
    counts = shares.counts[number]
    if shares.num_unknown and shares.is_settled and shares.are_equal(found):
        raise DataError(unclear_rows_message(batch))
    if shares.is_guess:
        return own_items(found, counts)
    return expected_items(found, counts) if shares.is_own else with_items(found, counts)


def items_alone(
    found: Sequence[Term], batch: Any, counts: Counts, loss: Loss
) -> list[tuple[Tensor, float]]:
    """Return the terms of the loss of the only micro-batch of a window with their items."""
    if loss.declared is None:
        return own_items(found, counts)
    return expected_items(found, loss.declared(batch))


def with_items(found: Sequence[Term], counts: Counts) -> list[tuple[Tensor, float]]:
    """Return terms with the items that were counted before."""
    return [(mean, items) for (mean, _), items in zip(found, counts, strict=True)]


def own_items(found: Sequence[Term], counts: Counts) -> list[tuple[Tensor, float]]:
    """Return terms with the items that the function counts; where it counts none, with the task's.

    A tensor is waited for.
    """
    default = counts[0] if counts else 1
    return [(mean, default if n is None else read_items(n)) for mean, n in found]


def expected_items(found: Sequence[Term], counts: Counts) -> list[tuple[Tensor, float]]:
    """Return terms with the items that are known before; no tensor is waited for.

    Raises:
        ModelError: The function has counted others.
    """
    if len(found) != len(counts):
        raise ModelError(_mixed_terms("items and terms"))
    for (_, items), known in zip(found, counts, strict=True):
        if not isinstance(items, Tensor | None) and not isclose(items, known, rel_tol=1e-6):
            raise ModelError(
                f"The loss of a micro-batch is a mean over {items} items, and {known} were "
                "declared or counted before. Let items(batch) return what the loss is a mean over; "
                "without it, let terms count the same in a second pass over the same batch."
            )
    return with_items(found, counts)


def count_ahead(
    shares: Shares,
    found: Sequence[Term],
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    strategy: Strategy,
) -> Shares:
    """Find the shares of a loss of several terms, once those of the first micro-batch are known.

    The other micro-batches run through the model without gradients. Random states and buffers are
    put back, so that the passes that follow draw the same numbers. Collective.
    """
    counts = [_read(found)]
    if len(batches) > 1:
        inner = model if is_sharded(model) else unwrap_model(model, adapters=False)
        with (
            random_states_kept(
                devices=strategy.device.type != "cpu", model=model, terms=loss.terms
            ),
            buffers_kept(inner),
            torch.no_grad(),
        ):
            for batch in batches[1:]:
                with strategy.autocast():
                    ahead = loss_terms(inner, strategy.to_device(batch), (), terms=loss.terms)
                counts.append(_read(ahead))
    if len({*map(len, counts)}) > 1:
        raise ModelError(_mixed_terms("terms"))
    used = [count for count, is_none in zip(counts, shares.spare, strict=True) if not is_none]
    totals = strategy.sum_counts([sum(c[term] for c in used) for term in range(len(found))])
    return shares._replace(counts=counts, totals=totals, is_guess=False)


def leaves_of(roots: Iterable[Any]) -> list[Tensor]:
    """List the tensors whose gradients some graphs have added to.

    The weights of a loss may belong to no model and no optimizer that the loop knows.

    Args:
        roots: The ``grad_fn`` of each graph.
    """
    leaves: dict[int, Tensor] = {}
    seen, nodes = set(roots), list(roots)
    while nodes:
        node = nodes.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return list(leaves.values())


def _read(found: Sequence[Term]) -> Counts:
    return tuple(read_items(num_items, "terms") for _, num_items in found)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the buffers of a model back, such as the statistics of batch normalisation."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # of a graph that waits for its backward pass: no new version


def tell_equal(batch: Any) -> None:
    """Report that micro-batches weigh the same."""
    say(
        f"all micro-batches weigh the same: nothing tells how many rows a {type(batch).__name__} "
        "has, whose tensors and lists have different lengths. To weigh by items, let loss_fn "
        "return (mean_loss, num_items), or pass terms=."
    )
