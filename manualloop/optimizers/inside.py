"""Optimizers that hold another one: SAM, Lookahead, and wrappers of the script's own.

They are given the other's groups, so that both have the same learning rate. What the other keeps
for its parameters, such as momentum, is often in no ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from manualloop.objects import is_of_library
from manualloop.optimizers.form import inner_of


def optimizers_in(path: str, optimizer: Any) -> dict[str, Any]:
    """Return an optimizer and those among its attributes, and theirs, by their paths."""
    found, waiting = {path: optimizer}, [(path, optimizer)]
    while waiting:
        path, holder = waiting.pop()
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if isinstance(value, Optimizer) and all(value is not one for one in found.values()):
                found[f"{path}.{name}"] = value
                waiting.append((f"{path}.{name}", value))
    return found


def kept_beside(path: str, optimizer: Any, extras: Collection[int]) -> Iterator[tuple[str, Any]]:
    """Yield what an optimizer keeps, by its path, and does not return from ``state_dict``.

    Of its attributes and those of optimizers inside of it these are the states of parameters, and
    what classes of the script's own hold in public attributes.

    Args:
        path: The optimizer's path.
        optimizer: The optimizer.
        extras: Identities of objects that are saved beside it.
    """
    optimizer = inner_of(optimizer)
    if type(optimizer).__module__.startswith(_SAVE_ALL):
        return
    saves_torchs = type(optimizer).state_dict is Optimizer.state_dict
    try:
        saved = list(_leaves(optimizer.state_dict()))
    except Exception:  # the first save reports it
        return
    is_saved = {id(value) for value in saved if isinstance(value, Tensor)}
    for where, one in optimizers_in(path, optimizer).items():
        if id(one) in extras:
            continue
        is_own = not is_of_library(type(one).__module__)
        for name, value in list(vars(one).items()):
            if name == "state":
                value = list(value.values())
            elif (
                not is_own
                or name.startswith("_")
                or name in _SAVED
                or callable(value)
                or isinstance(value, Optimizer)
            ):
                continue
            left = [
                leaf
                for leaf in _leaves(value)
                if id(leaf) not in is_saved and not _is_among(leaf, saved)
            ]
            if left or (saves_torchs and name != "state"):
                yield f"{where}.{name}", value


_SAVE_ALL = ("torch.", "deepspeed.")
_SAVED = ("param_groups", "defaults")


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors and numbers in nested containers."""
    if isinstance(value, Tensor | bool | int | float):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _leaves(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)


def _is_among(leaf: Any, saved: Iterable[Any]) -> bool:
    if not isinstance(leaf, Tensor):
        return any(type(one) is type(leaf) and one == leaf for one in saved)
    alike = (one for one in saved if isinstance(one, Tensor) and one.shape == leaf.shape)
    return any(one.dtype == leaf.dtype and torch.equal(one.to(leaf.device), leaf) for one in alike)


def has_own_schedule(optimizer: Any, extras: Iterable[Any]) -> bool:
    """Tell whether a schedule was built for an optimizer that none of the extras is or holds.

    Args:
        optimizer: The optimizer, in whose groups a schedule of torch notes the first rates.
        extras: Objects that are saved beside it.
    """
    inner = inner_of(optimizer)
    for extra in extras:
        for part in (extra, *getattr(extra, "__dict__", {}).values()):
            driven = getattr(part, "optimizer", None)
            if driven is optimizer or driven is inner:
                return False
    return any("initial_lr" in group for group in optimizer.param_groups)


def remember_shared(optimizers: Iterable[Any]) -> Callable[[], None]:
    """Return a function that lets optimizers share their groups and states as they do now.

    Loading one gives it new ones, and leaves those of an optimizer inside of it as they were: a
    schedule would move a learning rate that no step reads.
    """
    holders = [one for root in optimizers for one in optimizers_in("", root).values()]
    before = [_Held(one, one.param_groups, [*one.param_groups], _state_of(one)) for one in holders]

    def share() -> None:
        fresh: dict[int, Any] = {}
        for one, groups, entries, state in before:
            old = (groups, state, *entries)
            new = (one.param_groups, _state_of(one), *one.param_groups)
            for was, now in zip(old, new, strict=False):
                if now is not was:
                    fresh.setdefault(id(was), now)
        for one, groups, entries, state in before:
            if id(state) in fresh:
                _put(one, "state", fresh[id(state)])
            shared = fresh.get(id(groups), groups)
            if len(shared) == len(entries):  # lists of their own may hold the same groups
                shared[:] = [fresh.get(id(entry), entry) for entry in entries]
            _put(one, "param_groups", shared)

    return share


class _Held(NamedTuple):
    one: Any
    groups: list[Any]
    entries: list[Any]
    state: Any


def _state_of(optimizer: Any) -> Any:
    return getattr(optimizer, "state", None)


def _put(optimizer: Any, name: str, value: Any) -> None:
    with suppress(AttributeError):  # a property, which reads it from the optimizer inside
        setattr(optimizer, name, value)
