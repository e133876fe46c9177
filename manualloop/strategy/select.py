"""The choice of a strategy: the device, the precision and the ranks of a run.

The loop knows nothing about devices except the members of a strategy. ``SingleDevice`` implements
them in plain torch, ``Accelerated`` by an ``accelerate.Accelerator``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from manualloop.arguments import check_arguments
from manualloop.errors import ConfigError, DistributedError
from manualloop.strategy.accelerated import Accelerated, start_accelerator
from manualloop.strategy.base import MEMBERS, STRATEGY_OF, MixedPrecision, Strategy
from manualloop.strategy.compiled import CompileOptions
from manualloop.strategy.launch import is_launched, num_launched, refuse_training_alone
from manualloop.strategy.single import SingleDevice
from manualloop.times import parse_seconds

if TYPE_CHECKING:
    from accelerate import Accelerator


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
            ``torchrun``, ``launch``), else the best of cuda, mps, xpu and cpu. Or a device name
            (``"cpu"``, ``"cuda:1"``), a ``torch.device``, an ``accelerate.Accelerator``, or any
            object with the members of ``Strategy``, which is returned as it is.
        mixed_precision: ``"no"`` (default) computes in the parameters' dtype; ``"bf16"``;
            ``"fp16"``; ``"auto"`` is bf16 where the device has it, else fp16 on cuda, else no.
            Under a launcher, ``"no"`` and ``"auto"`` mean the precision it was configured for.
        compile: Compile models in place when they are prepared: True, or options of
            ``torch.compile``. In a model of repeated blocks only these are compiled. Lengths are
            dynamic, so that a batch of another length compiles nothing again. The numbers then
            differ in their last bits.
        timeout: Time that ranks wait for each other before they fail: seconds, or ``"10 min"``.
            torch's own default is 10 minutes for NCCL and 30 minutes for gloo.

    Raises:
        ConfigError: The device is missing, or cannot compute in this precision; or a precision or
            ``compile`` is given together with an Accelerator or Strategy, which has its own; or an
            object lacks members of ``Strategy``.
        DistributedError: A launcher started several processes, and ``spec`` is one device; or a
            scheduler started several tasks that do not know of each other, and it is ``"auto"``.

    >>> prepare_strategy("cpu", mixed_precision="bf16")
    SingleDevice(device='cpu', mixed_precision='bf16')
    """
    if mixed_precision not in ("no", "bf16", "fp16", "auto"):
        raise ConfigError(
            f'mixed_precision={mixed_precision!r} is none of "no", "bf16", "fp16", "auto".'
        )
    check_arguments(compile=compile)
    seconds = parse_seconds("timeout", timeout)
    if spec == "auto":
        if is_launched():
            precision = None if mixed_precision in ("no", "auto") else mixed_precision
            return start_accelerator(precision, seconds, compile)
        refuse_training_alone()
        spec = str(best_accelerator() or "cpu")
    if not isinstance(spec, str | torch.device):
        if mixed_precision != "no":
            raise ConfigError(
                f"{type(spec).__name__} has its own precision: give mixed_precision="
                f'"{mixed_precision}" where it is built.'
            )
        if compile:
            raise ConfigError(
                f"compile={compile!r} belongs to where the {type(spec).__name__} is built: "
                "SingleDevice(device, compile=True), Accelerated(accelerator, compile=True)."
            )
        return _own_strategy(spec)
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
        refuse_training_alone()
        parameter = next(model.parameters(), None)
        return SingleDevice("cpu" if parameter is None else parameter.device)
    return strategy or prepare_strategy("auto")


def _strategy_that_prepared(model: nn.Module) -> Strategy | None:
    prepared_by = STRATEGY_OF.get(model)
    return prepared_by() if prepared_by else None


def _own_strategy(spec: Any) -> Strategy:
    missing = [name for name in MEMBERS if not hasattr(spec, name)]
    if not missing:
        strategy: Strategy = spec
        return strategy
    if hasattr(spec, "prepare_model") and hasattr(spec, "gradient_accumulation_steps"):
        return getattr(spec, "manualloop_strategy", None) or Accelerated(spec)
    if len(missing) < len(MEMBERS) / 2:
        raise ConfigError(
            f"{type(spec).__name__} lacks members of a Strategy: {', '.join(missing)}. "
            "help(manualloop.Strategy) describes them all."
        )
    raise ConfigError(
        f"strategy={spec!r} is neither a device name, a torch.device, an Accelerator nor a "
        'Strategy. Use prepare_strategy("auto").'
    )


def _refuse_many_processes() -> None:
    world_size = num_launched()
    if world_size > 1:
        raise DistributedError(
            f"A launcher started {world_size} processes (WORLD_SIZE), and a strategy of one device "
            'would train the same model in each. Use prepare_strategy("auto").'
        )


def checked_device(spec: str | torch.device) -> torch.device:
    """Return a device that this process can use.

    Raises:
        ConfigError: There is no such device.
    """
    known: Iterable[str] = ("cpu", "cuda", "mps", "xpu")
    try:
        device = torch.device(spec)
    except RuntimeError as error:
        raise ConfigError(
            f'{spec!r} is not a device. Use "auto", or one of {", ".join(known)}.'
        ) from error
    if device.type == "cpu":
        return device
    available = best_accelerator()
    count = torch.accelerator.device_count() if available else 0
    if available is None or available.type != device.type or (device.index or 0) >= count:
        found = f"{count} x {available.type}" if available else "no accelerator"
        raise ConfigError(f'Device "{device}" is not available: torch sees {found}. Use "auto".')
    return device


def best_accelerator() -> torch.device | None:
    """Return cuda, mps or xpu, whichever is available; None without any."""
    # current_accelerator() alone names what torch was built for, also where there is none.
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16 without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type in ("cpu", "xpu")
