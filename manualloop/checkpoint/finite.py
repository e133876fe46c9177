"""Weights that a run has made NaN or infinite: no checkpoint holds them, no result returns them."""

from __future__ import annotations

import torch
from torch import Tensor

from manualloop.errors import NonFiniteError
from manualloop.internals import unwrap_optimizer
from manualloop.models import names_not_finite, own_part
from manualloop.notices import say
from manualloop.optim import parameters_of
from manualloop.optimizers.together import class_of, each
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy

_NUM_NAMED = 3
HOW_TO_FIX = (
    "Begin with finite weights, or resume from a checkpoint that has them. If an update made them "
    "so, its gradient was NaN or infinite where its loss was finite: max_grad_norm=1.0 looks at "
    "the gradient, too."
)


def require_finite(state: TrainState, strategy: Strategy) -> None:
    """Refuse weights that a run has made NaN or infinite, or log them once where that is allowed.

    Collective; waits for the device once.

    The gradient of an update may be NaN where its loss is finite. The next loss tells, and the last
    update of a run has none.

    Raises:
        NonFiniteError: Some are, and ``on_nonfinite`` is not ``"ignore"``.
    """
    _tell_of_moments(state)
    is_told = state.allows_nonfinite and state.has_told_spoilt
    if is_told or not (spoilt := all_spoilt(state, strategy)):
        return
    if state.allows_nonfinite:
        state.has_told_spoilt = True
        say(
            f"the weights are not finite after step {state.progress.num_steps}, and are saved and "
            f'returned all the same, because of on_nonfinite="ignore": {shown(spoilt)}.'
        )
        return
    raise NonFiniteError(
        f"The weights are not finite after step {state.progress.num_steps}, and "
        f"are neither saved nor returned: {shown(spoilt)}. {HOW_TO_FIX}"
    )


def _tell_of_moments(state: TrainState) -> None:
    """Log once that the optimizer keeps numbers that are not finite: some weights may never move.

    The square of a large gradient overflows where the gradient does not, and stays in the average.
    """
    if state.has_told_moments:
        return
    names = {id(weight): name for name, weight in updated_weights(state).items()}
    moments = {
        f"{key} of {names.get(id(weight), 'a weight')}": value
        for optimizer in each(state.optimizer)
        for weight, of_weight in unwrap_optimizer(optimizer).state.items()
        for key, value in of_weight.items()
        if isinstance(value, Tensor)
    }
    if found := names_not_finite(moments):
        state.has_told_moments = True
        say(
            f"the state of {class_of(state.optimizer)} is not finite: {shown(found)}. Such weights "
            "may not move any more. A gradient was NaN, or too large for its square: "
            "max_grad_norm=1.0 limits it."
        )


def all_spoilt(state: TrainState, strategy: Strategy) -> list[str]:
    """Name the weights that a run has made NaN or infinite on any rank. Collective."""
    found = strategy.gather(names_spoilt(state))
    return list(dict.fromkeys(name for of_rank in found for name in of_rank))


def names_spoilt(state: TrainState) -> list[str]:
    """Name the weights of the optimizer that the run has made NaN or infinite."""
    known = () if state.baseline is None else state.baseline.infinite
    return [name for name in names_not_finite(updated_weights(state)) if name not in known]


def names_infinite(state: TrainState) -> list[str]:
    """Name the weights of the optimizer that hold infinity and no NaN, such as a fixed mask."""
    weights = updated_weights(state)
    found = names_not_finite(weights)
    return [name for name in found if not bool(torch.isnan(own_part(weights[name])).any())]


def updated_weights(state: TrainState) -> dict[str, Tensor]:
    """Return the weights that the optimizer updates, each by its own name."""
    names = {id(weight): name for name, weight in reversed(state.parameter_names().items())}
    return {
        names.get(id(weight), f"parameter {number} of the optimizer"): weight
        for number, weight in enumerate(parameters_of(state.optimizer))
    }


def shown(names: list[str]) -> str:
    """Return the first few of some names, and the number of the others."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"{', '.join(names[:_NUM_NAMED])}{more}"
