"""Numbers of classes and tags: whole ones, in whatever form a dataset has them."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def whole_number(value: Any) -> int | None:
    """Return a number of a class or a tag as an integer; None for what is no whole number.

    >>> [whole_number(value) for value in (2, 2.0, True, 1.7, float("nan"), "2", None)]
    [2, 2, 1, None, None, None, None]
    """
    if isinstance(value, Integral):
        return int(value)
    return int(float(value)) if isinstance(value, Real) and float(value).is_integer() else None
