"""Weights that a run has made NaN or infinite: no checkpoint holds them, no result returns them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manualloop.errors import NonFiniteError
from manualloop.internals import unwrap_optimizer
from manualloop.models import digest_of_weights, is_sharded, names_not_finite, own_part
from manualloop.notices import say
from manualloop.optimizers.together import class_of, each
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy
from manualloop.strategy.calls import name_ranks

_NUM_NAMED = 3
HOW_TO_FIX = (
    "Begin with finite weights, or resume from a checkpoint that has them. If an update made them "
    "so, its gradient was NaN or infinite where its loss was finite: max_grad_norm=1.0 looks at "
    "the gradient, too."
)


def require_finite(state: TrainState, strategy: Strategy) -> None:
    """Refuse weights that a run has made NaN or infinite, or log them once where that is allowed.

    The gradient of an update may be NaN where its loss is finite. The next loss tells, and the last
    update of a run has none. That the optimizer keeps such numbers is logged once, too: the square
    of a large gradient overflows where the gradient does not, and stays in the average. So is that
    the ranks have other weights than rank 0.

    Collective; waits for the device once.

    Raises:
        NonFiniteError: Some are, and ``on_nonfinite`` is not ``"ignore"``.
    """
    weights = updated_weights(state)
    moments = {} if state.has_told_moments else _moments(state, weights)
    found = names_not_finite(weights | moments)
    if of_moments := [name for name in found if name in moments]:
        state.has_told_moments = True
        say(
            f"the state of {class_of(state.optimizer)} is not finite: {shown(of_moments)}. Such "
            "weights may not move any more. A gradient was NaN, or too large for its square: "
            "max_grad_norm=1.0 limits it."
        )
    _tell_apart(state, strategy)
    spoilt = _on_any_rank(_spoilt(state, [name for name in found if name in weights]), strategy)
    if not spoilt or (state.allows_nonfinite and state.has_told_spoilt):
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


def _tell_apart(state: TrainState, strategy: Strategy) -> None:
    """Log once that the ranks have not trained the same weights. Collective."""
    if strategy.world_size == 1 or state.has_told_apart or is_sharded(state.model):
        return
    first, *others = strategy.gather(digest_of_weights(state.model))
    apart = [rank for rank, digest in enumerate(others, 1) if digest != first]
    if apart:
        state.has_told_apart = True
        say(
            f"the weights of {name_ranks(apart)} are not those of rank 0 after step "
            f"{state.progress.num_steps}: something changes them on each rank for itself, such as "
            "on_step, a step_fn that does not add up gradients over the ranks, or an optimizer "
            "that draws random numbers. Those of rank 0 are saved."
        )


def _moments(state: TrainState, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the optimizer's state, each with the name of its weight."""
    names = {id(weight): name for name, weight in weights.items()}
    return {
        f"{key} of {names.get(id(weight), 'a weight')}": value
        for optimizer in map(unwrap_optimizer, each(state.optimizer))
        for weight, of_weight in optimizer.state.items()
        for key, value in of_weight.items()
        if isinstance(value, Tensor)
    }


def all_spoilt(state: TrainState, strategy: Strategy) -> list[str]:
    """Name the weights that a run has made NaN or infinite on any rank. Collective."""
    return _on_any_rank(names_spoilt(state), strategy)


def names_spoilt(state: TrainState) -> list[str]:
    """Name the weights of the optimizer that the run has made NaN or infinite."""
    return _spoilt(state, names_not_finite(updated_weights(state)))


def _spoilt(state: TrainState, names: list[str]) -> list[str]:
    """Leave out the weights that were infinite before the run."""
    known = () if state.baseline is None else state.baseline.infinite
    return [name for name in names if name not in known]


def _on_any_rank(names: list[str], strategy: Strategy) -> list[str]:
    return list(dict.fromkeys(name for of_rank in strategy.gather(names) for name in of_rank))


def names_infinite(state: TrainState) -> list[str]:
    """Name the weights of the optimizer that hold infinity and no NaN, such as a fixed mask."""
    weights = updated_weights(state)
    found = names_not_finite(weights)
    return [name for name in found if not bool(torch.isnan(own_part(weights[name])).any())]


def updated_weights(state: TrainState) -> dict[str, Tensor]:
    """Return the weights that the optimizer updates, each by its own name."""
    names = {id(weight): name for name, weight in reversed(state.parameter_names().items())}
    weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    return {
        names.get(id(weight), f"parameter {number} of the optimizer"): weight
        for number, weight in enumerate(weights)
    }


def shown(names: list[str]) -> str:
    """Return the first few of some names, and the number of the others."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f"{', '.join(names[:_NUM_NAMED])}{more}"
