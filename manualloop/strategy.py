"""Where and in which precision a model runs: what the loop asks of the hardware.

The loop asks a strategy for a few things and knows nothing else about devices. ``SingleDevice`` is
plain torch; ``Accelerated`` hands the same to an ``accelerate.Accelerator``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manualloop.accelerated import Accelerated as Accelerated
from manualloop.accelerated import is_launched, start_accelerator
from manualloop.cadence import parse_seconds
from manualloop.compiled import CompileOptions
from manualloop.devices import (
    STRATEGY_OF,
    MixedPrecision,
    SingleDevice,
    best_accelerator,
    checked_device,
    has_bf16,
)
from manualloop.devices import heeds_found_inf as heeds_found_inf
from manualloop.devices import move as move
from manualloop.devices import parameters_of as parameters_of
from manualloop.devices import zero_gradients as zero_gradients
from manualloop.errors import ConfigError, DistributedError, ManualLoopError
from manualloop.votes import Votes

if TYPE_CHECKING:
    from accelerate import Accelerator

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


def prepare_strategy(
    spec: str | torch.device | Accelerator | Strategy = "auto",
    *,
    mixed_precision: MixedPrecision | Literal["auto"] = "no",
    compile: CompileOptions = False,
    timeout: float | str = "10 min",
) -> Strategy:
    """Choose the device and the precision of a run.

    Args:
        spec: ``"auto"``: accelerate if a launcher started this process (``accelerate launch``,
            ``torchrun``, ``launch``), else the best of cuda, mps, xpu and cpu. A device name
            (``"cpu"``, ``"cuda:1"``) or ``torch.device``; an ``accelerate.Accelerator``; or a
            strategy, which is returned as it is.
        mixed_precision: ``"no"`` (default) computes in the parameters' dtype; ``"bf16"``;
            ``"fp16"``; ``"auto"`` is bf16 where the device has it, else fp16 on cuda, else no.
            Under a launcher of accelerate ``"no"`` and ``"auto"`` are what it was configured for.
        compile: Compile models in place when they are prepared: True, or options of
            ``torch.compile``. Of a model of repeated blocks only those, with open lengths: a batch
            of another length compiles nothing anew. The numbers then differ in their last bits.
        timeout: Seconds, or ``"10 min"``, that ranks wait for one that does not come, before they
            fail. The default is torch's for NCCL; for gloo torch's own is 30 minutes.

    Raises:
        ConfigError: The device is not there, or cannot compute in this precision; or a precision
            or ``compile`` is given beside an Accelerator or Strategy, which has its own.
        DistributedError: A launcher started several processes, and ``spec`` is one device.

    >>> prepare_strategy("cpu", mixed_precision="bf16")
    SingleDevice(device='cpu', mixed_precision='bf16')
    """
    if mixed_precision not in ("no", "bf16", "fp16", "auto"):
        raise ConfigError(
            f'mixed_precision={mixed_precision!r} is none of "no", "bf16", "fp16", "auto".'
        )
    seconds = parse_seconds("timeout", timeout)
    if spec == "auto":
        if is_launched():
            precision = None if mixed_precision in ("no", "auto") else mixed_precision
            return start_accelerator(precision, seconds, compile)
        spec = str(best_accelerator() or "cpu")
    if not isinstance(spec, str | torch.device):
        if mixed_precision != "no":
            raise ConfigError(
                f"{type(spec).__name__} has its own precision: say mixed_precision="
                f'"{mixed_precision}" where it is built, not here.'
            )
        if compile:
            raise ConfigError(
                f"compile={compile!r} is said where the {type(spec).__name__} is built: "
                "SingleDevice(device, compile=True), Accelerated(accelerator, compile=True)."
            )
        return spec if hasattr(spec, "prepare_model") and hasattr(spec, "apply") else _wrap(spec)
    _refuse_many_processes()
    device = checked_device(spec)
    if mixed_precision == "auto":
        without_bf16: MixedPrecision = "fp16" if device.type == "cuda" else "no"
        mixed_precision = "bf16" if has_bf16(device) else without_bf16
    if mixed_precision == "bf16" and not has_bf16(device):
        raise ConfigError(f'{device} does not compute in bfloat16. Use mixed_precision="fp16".')
    return SingleDevice(device, mixed_precision=mixed_precision, compile=compile)


def strategy_for(model: nn.Module, strategy: Strategy | None) -> Strategy:
    """Return the given strategy, else the one that prepared this model, else an "auto" one."""
    if strategy is not None:
        return prepare_strategy(strategy)
    return _strategy_that_prepared(model) or prepare_strategy("auto")


def strategy_in_place(model: nn.Module) -> Strategy:
    """Return the strategy that prepared this model, else plain torch on the device it is on."""
    strategy = _strategy_that_prepared(model)
    if strategy is None and not is_launched():
        parameter = next(model.parameters(), None)
        return SingleDevice("cpu" if parameter is None else parameter.device)
    return strategy or prepare_strategy("auto")


def _strategy_that_prepared(model: nn.Module) -> Strategy | None:
    prepared_by = STRATEGY_OF.get(model)
    return prepared_by() if prepared_by else None


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


def _wrap(spec: Any) -> Strategy:
    if hasattr(spec, "prepare_model") and hasattr(spec, "gradient_accumulation_steps"):
        return getattr(spec, "manualloop_strategy", None) or Accelerated(spec)
    raise ConfigError(
        f"strategy={spec!r} is neither a device name, a torch.device, an Accelerator nor a "
        'Strategy. Use prepare_strategy("auto").'
    )


def _refuse_many_processes() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise DistributedError(
            f"A launcher started {world_size} processes (WORLD_SIZE), and a strategy of one device "
            'would train the same model in each. Use prepare_strategy("auto").'
        )
