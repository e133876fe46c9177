"""What a ``preprocess`` made of a batch of rows: columns, where each row comes from, and counts.

A function from rows to rows cannot tell how many rows it has left out: ``dataset.map`` calls it for
one batch after the other, in other processes perhaps, and not at all where its result is cached.
``prepare_dataloaders`` therefore calls ``make`` of functions that have it. It stores the counts
beside the rows, adds them up, and logs what ``describe`` returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

Rows: TypeAlias = Mapping[str, Sequence[Any]]
"""A batch of rows as ``dataset.map`` passes it to a function: column names to lists of values."""

Place: TypeAlias = Callable[[int], str]
"""A function that names a row of the batch in messages: ``"row 17 of train"``."""


class Made(NamedTuple):
    """The rows that a function made of a batch.

    Attributes:
        columns: The columns.
        sources: Number in the batch of the row that each row was made of.
        counts: Numbers to be added up over all batches, by name.
    """

    columns: dict[str, list[Any]]
    sources: list[int]
    counts: Counter[str]


@runtime_checkable
class Making(Protocol):
    """A ``preprocess`` that counts what it does.

    It may have an attribute ``cut_call``, the call that cuts its rows at ``{room}`` tokens, and a
    method ``with_model(model)``, which returns the function with what it wants to know of a model.
    """

    def make(self, rows: Rows, place: Place) -> Made:
        """Return what ``preprocess(rows)`` returns, with its counts."""

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return what was done to a split, in parts of a line; nothing if all of it was kept.

        Args:
            counts: The counts, and ``given``, the number of rows that the function got.
        """


def place_in_batch(number: int) -> str:
    """Name a row by its place in the batch, where nothing else is known."""
    return f"row {number} of the batch"


def counted(number: int, name: str, plural: str | None = None) -> str:
    """Return a number with a noun, in the plural where it is not 1.

    >>> counted(1, "row"), counted(1200, "row"), counted(2, "batch", "batches")
    ('1 row', '1,200 rows', '2 batches')
    """
    return f"{number:,} {name if number == 1 else plural or name + 's'}"


def share_of_all(part: int, whole: int) -> str:
    """Return what share of a whole a count is, in words.

    >>> share_of_all(3, 12)
    '25% (3 of 12)'
    """
    return f"{share_of(part, whole)} ({part:,} of {whole:,})"


def share_of(number: float, total: float) -> str:
    """Return a share in percent, which is neither 0% nor 100% unless it is none or all.

    >>> share_of(1, 2), share_of(1, 300), share_of(1, 67349), share_of(299, 300)
    ('50%', '0.3%', 'under 0.1%', '99.7%')
    """
    percent = 100 * number / total
    if 0 < percent < 0.1:
        return "under 0.1%"
    if 99.9 < percent < 100:
        return "over 99.9%"
    return f"{percent:.0f}%" if 10 <= percent <= 90 or percent in (0, 100) else f"{percent:.1f}%"
