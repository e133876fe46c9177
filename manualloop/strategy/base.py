"""What the loop asks of the hardware: the protocol of a strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manualloop.errors import DistributedError, ManualLoopError
from manualloop.strategy.votes import Votes

_T = TypeVar("_T")


class Strategy(Protocol):
    """How the loop runs a model. Any object with these members will do.

    Attributes:
        device: Where the model's parameters and its batches are.
        is_main: Whether this process prints, logs and writes shared files: that of rank 0.
        rank: Number of this process among those that train the model together.
        world_size: How many they are.
        votes: What some rank wants of the run; see ``manualloop.votes``.
    """

    device: torch.device
    is_main: bool
    rank: int
    world_size: int
    votes: Votes

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Put a model and its optimizer where they run. Again, it returns the same objects."""
        ...

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put a model where it runs. Preparing it again returns the same object."""
        ...

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Make an optimizer fit for this device. Preparing it again returns the same object."""
        ...

    def to_device(self, batch: Any) -> Any:
        """Copy a batch to the device, without waiting for the copy."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""
        ...

    def hold_gradients(self, model: nn.Module, hold: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch; with ``hold`` its gradients are not reduced yet."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes. Call on every rank, or the others wait for ever."""
        ...

    def sum_counts(self, counts: Sequence[float]) -> list[float]:
        """Add up numbers of the host over all processes; the votes ride along. Collective."""
        ...

    def any(self, flag: bool) -> bool:
        """Tell whether a flag is true in any process. Call on every rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in the order of ranks. Call on every rank."""
        ...

    def explain(self, error: BaseException) -> None:
        """Raise, from an error of a collective call, which rank is gone; return if none is."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to the parameters'."""
        ...

    def clip_gradients(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of at most ``max_norm``; return the norm before."""
        ...

    def apply(self, optimizer: Optimizer) -> bool:
        """Make the update; tell whether it was made (an fp16 overflow skips it)."""
        ...

    @property
    def scales_losses(self) -> bool:
        """Whether gradients may overflow as a matter of course, and updates then be skipped."""
        ...


def on_main(strategy: Strategy, function: Callable[[], _T]) -> _T:
    """Call a function on rank 0 alone; return what it returned, or raise its error, on every rank.

    Call on every rank.

    Raises:
        DistributedError: On the other ranks, for an error that is none of ours.
    """
    if strategy.world_size == 1:
        return function()
    value, error, told = None, None, None
    if strategy.is_main:
        try:
            value = function()
        except Exception as caught:
            error = caught
            is_ours = isinstance(caught, ManualLoopError)
            told = (type(caught) if is_ours else DistributedError, f"rank 0: {caught}")
    value, told = strategy.gather((value, told))[0]
    if error is not None:
        raise error
    if told is not None:
        raise told[0](told[1])
    return cast("_T", value)


MixedPrecision = Literal["no", "bf16", "fp16"]


# Beside the model, not on it: an attribute would travel into its state, its copies and its pickles.
# An Accelerator holds its models, so a strategy that holds an Accelerator is referred to weakly:
# else no model in here would ever be freed.
STRATEGY_OF: WeakKeyDictionary[nn.Module, Callable[[], Any]] = WeakKeyDictionary()
"""Which strategy has prepared a model."""
