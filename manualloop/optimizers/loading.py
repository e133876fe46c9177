"""Load the states of several parts: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from manualloop.errors import ManualLoopError
from manualloop.internals import unwrap_optimizer
from manualloop.optimizers.form import inner_of
from manualloop.optimizers.inside import remember_shared
from manualloop.optimizers.states import OptimizerStates


def load_together(
    parts: Mapping[str, Any],
    states: Mapping[str, Any],
    kind: type[ManualLoopError],
    *,
    copies: bool = True,
) -> None:
    """Load each part's state; if one does not take its own, put back those before it.

    Args:
        parts: Parts by name, with states that fit by their names and shapes.
        states: What their ``state_dict`` had returned, by the same names.
        kind: Class of the error.
        copies: Whether optimizers copy what they load; without, the states are theirs.

    Raises:
        ManualLoopError: A part refuses its state. The message tells which, and nothing was loaded.
    """
    put_back: list[Callable[[], None]] = []
    optimizers = [part.optimizers for part in parts.values() if isinstance(part, OptimizerStates)]
    share = remember_shared(inner_of(one) for several in optimizers for one in several)
    for name in sorted(parts, key=lambda name: cannot_fail(parts[name])):
        part = parts[name]
        try:
            put_back.append(_remember(part))
            if isinstance(part, OptimizerStates):
                part.load_state_dict(states[name], copies=copies)
            else:
                part.load_state_dict(states[name])
        except Exception as error:
            for undo in reversed(put_back):
                undo()
            raise kind(
                f"{name} ({type(part).__name__}) does not take the state it was saved with: "
                f"{type(error).__name__}: {error}. Nothing was loaded."
            ) from error
    share()


def cannot_fail(part: Any) -> bool:
    """Tell whether a part takes every state whose names, shapes and dtypes are its own."""
    return bool(getattr(type(part), "takes_its_own", False)) or (
        isinstance(part, nn.Module)
        and type(part).load_state_dict is nn.Module.load_state_dict
        and all(isinstance(value, Tensor) for value in part.state_dict().values())
    )


def _remember(part: Any) -> Callable[[], None]:
    """Return a function that puts a part back to what it is now."""
    if cannot_fail(part):
        return lambda: None  # of the weights there is no second copy
    if isinstance(part, OptimizerStates):
        return _remember_all([unwrap_optimizer(optimizer) for optimizer in part.optimizers])
    state, attributes = deepcopy(part.state_dict()), getattr(part, "__dict__", {})
    kept = dict(attributes)

    def put_back() -> None:
        with suppress(Exception):  # it may refuse every state
            part.load_state_dict(state)
        attributes.update(kept)

    return put_back


def _remember_all(optimizers: list[Optimizer]) -> Callable[[], None]:
    # Loading replaces these objects, and does not change what is in them.
    kept = [
        (optimizer, dict(vars(optimizer)), [dict(group) for group in optimizer.param_groups])
        for optimizer in optimizers
    ]

    def put_back() -> None:
        for optimizer, attributes, groups in kept:
            vars(optimizer).update(attributes, param_groups=groups)

    return put_back
