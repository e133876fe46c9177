"""A position in the batches of a loader, as plain data that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, cast

from manualloop.errors import CheckpointError
from manualloop.randomness import RandomState


class WorkerState(TypedDict, total=False):
    """What one worker process of a DataLoader reported with its batches.

    Attributes:
        base_seed: Seed from which torch derives the seeds of all workers of a pass.
        random: Global random states in the worker, if they have moved.
        generators: States of the generators that the rows draw from, by path.
        dataset: What the dataset's ``state_dict`` returned.
        is_at_end: Whether the worker has read its part of the stream to the end.
    """

    base_seed: int
    random: RandomState
    generators: dict[str, Any]
    dataset: Any
    is_at_end: bool


class Position(TypedDict, total=False):
    """A position in a pass over a loader; empty: the start of a first pass.

    Which keys are there depends on the kind of the loader (see ``manualloop.reading.sources``).

    Attributes:
        kind: Kind of the loader.
        data: Digest of the data, by which the loader is recognized in another process.
        num_batches: Batches of the pass that were used.
        num_samples: Rows of the pass that were used, on all ranks.
        num_parts: Parts into which the user has split the rows, one for each rank; 1: none.
        num_workers: Worker processes of the loader.
        batch_size: Rows per batch, if the loader has a fixed number.
        seed: Seed of the order of a prepared loader.
        max_tokens: Token budget of its batches.
        num_ranks: Ranks that read batches of about one length side by side.
        random: Global random states at the start of the pass.
        generators: States at the start of the pass of the generators that draw the order.
        reuses_workers: Whether workers of an earlier pass were kept for this one.
        row_generators: States of the generators that the rows draw from, at the position.
        dataset: What the dataset's ``state_dict`` returned, where rows are read in this process.
        workers: State of each worker, by its number.
        last_worker: Number of the worker that gave the last batch.
        loader: What the ``state_dict`` of a stateful loader returned.
        pending: Batches that the loader has given and no update has used.
        is_at_end: Whether the pending batches are the last ones of the pass.
    """

    kind: str
    data: str
    num_batches: int
    num_samples: int
    num_parts: int
    num_workers: int
    batch_size: int | None
    seed: int
    max_tokens: int | None
    num_ranks: int
    random: RandomState
    generators: dict[str, Any]
    reuses_workers: bool
    row_generators: dict[str, Any]
    dataset: Any
    workers: dict[str, WorkerState]
    last_worker: int | None
    loader: Any
    pending: list[Any]
    is_at_end: bool


def keeps_pending(position: Position) -> bool:
    """Tell whether a state in a position counts batches that were read ahead of it."""
    return "loader" in position or (position["kind"] == "stream" and "dataset" in position)


def read_position(saved: Mapping[str, Any] | None, num_samples: int) -> Position:
    """Return the position that a checkpoint holds, also one that an older version has written.

    Args:
        saved: What a reader's ``position`` returned; None: nothing is known of it.
        num_samples: Rows of the pass that were used, as the progress of the run counts them.
    """
    position = cast("Position", dict(saved or {}))
    position["num_samples"] = num_samples
    if "generators" in position and "row_generators" not in position:
        # Once one key held either; which states are whose is told by their paths.
        position["row_generators"] = position["generators"]
    return position


def require_inside(num_used: int, num_there: int, what: str = "rows") -> None:
    """Refuse a position behind the end of the data.

    Raises:
        CheckpointError: There is less data than was used of it.
    """
    if num_used > num_there:
        raise CheckpointError(
            f"The position is behind {num_used} {what} of the epoch, and the data has {num_there}. "
            "Resume with the data that the run was begun with."
        )
