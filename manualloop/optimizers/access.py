"""What a loop reads and sets of an optimizer: its parameters and their gradients, rate and mode."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from manualloop.internals import unwrap_optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List the parameters that an optimizer updates, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def whole_norm(norm: Any) -> Tensor:
    """Return the norm of sharded gradients as one of all ranks; any other as it is. Collective.

    ``fully_shard`` makes shards on a single rank, too.
    """
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def zero_gradients(optimizer: Optimizer) -> None:
    """Set the gradients of an optimizer's parameters to None.

    What ``Optimizer.zero_grad`` does, without its record for the profiler, which costs 6 us; an
    optimizer that has a ``zero_grad`` of its own gets it called.
    """
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def plain_lr(lr: Any) -> Any:
    """Return a learning rate as a number; one on a device stays there, where nothing waits for it.

    NaN of an optimizer without one, such as Adafactor's ``relative_step``.
    """
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return lr.clone()  # a scheduler changes it in place
    return math.nan if lr is None else float(lr)


def put_into_training(optimizer: Any) -> None:
    """Let schedule-free optimizers give the model the weights that are trained."""
    for one in schedule_free(optimizer):
        one.train()


def schedule_free(optimizer: Any) -> list[Any]:
    """Return those among one or several optimizers that have modes, as schedule-free ones do.

    Their ``eval()`` gives the model the weights that are to be evaluated, ``train()`` those that
    are trained.

    >>> import torch
    >>> schedule_free(torch.optim.SGD(torch.nn.Linear(1, 1).parameters()))
    []
    """
    several = optimizer if isinstance(optimizer, list | tuple) else (optimizer,)
    inner = map(unwrap_optimizer, several)
    return [one for one in inner if all(callable(getattr(one, m, None)) for m in ("train", "eval"))]
