"""Renaming public names: the old one works for some releases, and warns which one to write.

``docs/contributing.md`` shows how. A ``FutureWarning`` is shown by default, also from within
libraries, unlike a ``DeprecationWarning``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["renamed", "renamed_keyword"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def renamed_keyword(
    old: str, new: str, *, ends: str
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Let a function take a keyword by its old name, too.

    Args:
        old: The old name.
        new: The name in the signature of the function.
        ends: Release in which the old name ends.

    >>> @renamed_keyword("size", "batch_size", ends="0.4.0")
    ... def read(*, batch_size):
    ...     return batch_size
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     read(size=8)
    8
    >>> print(caught[0].message)
    read(size=...) ends with manualloop 0.4.0. Write read(batch_size=...).
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        name = function.__name__

        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{name} got {new} and its old name {old}. Pass {new} alone.")
                _warn(f"{name}({old}=...)", f"{name}({new}=...)", ends, 3)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed(old: str, new: str, value: _T, *, ends: str) -> _T:
    """Return what an old public name stands for, with a warning, in a module's ``__getattr__``.

    Args:
        old: The old name.
        new: The new name.
        value: The object that has it.
        ends: Release in which the old name ends.
    """
    _warn(f"manualloop.{old}", f"manualloop.{new}", ends, 4)
    return value


def _warn(old: str, new: str, ends: str, level: int) -> None:
    warnings.warn(
        f"{old} ends with manualloop {ends}. Write {new}.", FutureWarning, stacklevel=level
    )
