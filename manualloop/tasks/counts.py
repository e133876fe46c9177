"""What a function that makes rows counts on the way, as columns beside the tokens.

``dataset.map`` caches its results, so that a function of another run is not called at all, and it
may call it in several processes. Counts are therefore columns: an entry for each row that is made.
``prepare_dataloaders`` gives them back to the function as a whole, logs the line that it makes of
them, and drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

_ENDLESS = 1_000_000  # transformers' number for a tokenizer without a limit is far above


class Counted(NamedTuple):
    """What was counted in one split.

    Attributes:
        num_rows: Number of rows before.
        columns: The counts by their names, int64, with an entry for each row that was made.
    """

    num_rows: int
    columns: Mapping[str, NDArray[np.int64]]

    def total(self, name: str) -> int:
        """Return the sum of one count over all rows."""
        return int(self.columns[name].sum())

    @property
    def num_made(self) -> int:
        """Number of rows that were made."""
        return len(next(iter(self.columns.values())))


@runtime_checkable
class Counting(Protocol):
    """A ``preprocess`` that counts.

    Attributes:
        counts: Names of the columns of counts among those that it returns.
    """

    @property
    def counts(self) -> tuple[str, ...]:
        """The names."""
        ...

    def tell(self, splits: Mapping[str, Counted]) -> str | None:
        """Return the line on what was counted; None if there is nothing to say.

        Raises:
            DataError: The rows do not fit together.
        """
        ...


def shares(splits: Mapping[str, Counted], part: str, whole: str | None = None) -> str:
    """Return what share of each split a count is, in words; empty where it is 0 in all of them.

    Args:
        splits: The counts by split.
        part: Name of the count.
        whole: Name of the count of everything; None: the rows before.

    >>> found = Counted(4, {"cut": np.array([1, 0, 2]), "all": np.array([4, 4, 4])})
    >>> shares({"train": found}, "cut", "all")
    '25% of train (3 of 12)'
    """
    found = []
    for name, counted in splits.items():
        number = counted.total(part)
        total = counted.num_rows if whole is None else counted.total(whole)
        if number:
            found.append(f"{share_of(number, total)} of {name} ({number} of {total})")
    return ", ".join(found)


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


def limit_of(tokenizer: Any, max_length: int | None) -> int | None:
    """Return the number of tokens at which texts are cut off; None if they are not.

    Args:
        tokenizer: The tokenizer, whose own limit holds as well.
        max_length: The user's choice; None leaves it to the tokenizer.
    """
    own = getattr(tokenizer, "model_max_length", None)
    limits = [n for n in (max_length, own) if isinstance(n, int) and n < _ENDLESS]
    return min(limits, default=None)
