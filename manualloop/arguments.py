"""The arguments of a call are checked together: one error lists everything that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeGuard, TypeVar, cast

import numpy as np

from manualloop.errors import ConfigError, ManualLoopError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Checks:
    """Calls functions that check arguments, and keeps the errors they raise."""

    def __init__(self) -> None:
        self.errors: list[ManualLoopError] = []

    def __call__(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what a function returns. If it raises an error of ours, keep that, return None.

        The error is raised at the end of the ``with`` block, so that nobody sees the None behind
        it; inside the block ``ok`` tells.
        """
        try:
            return function(*args, **kwargs)
        except ManualLoopError as error:
            self.errors.append(error)
            return cast("_T", None)

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong so far."""
        return not self.errors


@contextmanager
def all_at_once() -> Iterator[Checks]:
    """Raise the errors of several checks as one, at the end of the block.

    Raises:
        ManualLoopError: The error has the class of the first one, and a line for every problem.

    >>> def require_positive(name, value):
    ...     if value <= 0:
    ...         raise ConfigError(f"{name} must be above 0, got {value}.")
    >>> from manualloop import ConfigError
    >>> with all_at_once() as check:
    ...     check(require_positive, "lr", -1)
    ...     check(require_positive, "momentum", 0.9)
    ...     check(require_positive, "eps", 0)
    Traceback (most recent call last):
    manualloop.errors.ConfigError: lr must be above 0, got -1.
    eps must be above 0, got 0.
    """
    checks = Checks()
    yield checks
    if len(checks.errors) == 1:
        raise checks.errors[0]
    if checks.errors:
        lines = dict.fromkeys("\n".join(map(str, checks.errors)).split("\n"))
        raise type(checks.errors[0])("\n".join(lines)) from checks.errors[0]


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number of at least 1, of Python or of NumPy.

    >>> [is_count(value) for value in (2, 0, 2.0, True)]
    [True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_positive(value: Any) -> bool:
    """Tell whether a value is a number above 0.

    >>> [is_positive(value) for value in (0.5, float("nan"), "1.0")]
    [True, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0


def require_count(name: str, value: object, *, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        ConfigError: The message names the argument.

    >>> require_count("size", 0)
    Traceback (most recent call last):
    manualloop.errors.ConfigError: size must be a whole number of at least 1, got 0.
    """
    if not _is_whole(value) or int(value) < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r:.60}.")


def require_seed(name: str, value: object) -> None:
    """Refuse what seeds no generator: a whole number of 64 bits does.

    Raises:
        ConfigError: The message names the argument.
    """
    if not _is_whole(value) or not -(2**63) <= int(value) < 2**63:
        raise ConfigError(f"{name} must be a whole number of 64 bits, got {value!r:.60}.")


def _is_whole(value: object) -> TypeGuard[Integral]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False, of Python or of NumPy.

    Raises:
        ConfigError: The message names the argument.
    """
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name} must be True or False, got {value!r:.60}.")


def require_function(name: str, value: object, arguments: str) -> None:
    """Refuse what cannot be called; None is let through.

    Args:
        name: Name of the argument.
        value: Its value.
        arguments: The arguments that it will be called with.

    Raises:
        ConfigError: The message names the argument.
    """
    if value is not None and not callable(value):
        example = f"lambda {arguments}: ..." if arguments else "lambda: ..."
        raise ConfigError(f"{name} is a {type(value).__name__}. Pass a function: {name}={example}.")


def require_kind(name: str, value: object, kind: type | tuple[type, ...], hint: str) -> None:
    """Refuse what is not of a class.

    Args:
        name: Name of the argument.
        value: Its value.
        kind: The class, or several.
        hint: What to pass instead.

    Raises:
        ConfigError: The message names the argument.
    """
    if not isinstance(value, kind):
        shown = f"{value!r:.60}" if isinstance(value, str | int | float) else "it"
        raise ConfigError(f"{name} is a {type(value).__name__} ({shown}). Pass {hint}.")
