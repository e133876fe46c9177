"""Where and in which precision a model runs: the only module that knows about devices.

The loop asks a strategy for a few things and knows nothing else about hardware. ``SingleDevice`` is
plain torch; ``Accelerated`` hands the same to an ``accelerate.Accelerator``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manualloop.errors import ConfigError, DistributedError

if TYPE_CHECKING:
    from accelerate import Accelerator

MixedPrecision = Literal["no", "bf16", "fp16"]


class Strategy(Protocol):
    """How the loop runs a model. Any object with these members will do.

    Attributes:
        device: Where the model's parameters and its batches are.
        is_main: Whether this process prints, logs and writes shared files.
        world_size: Processes that train the model together.
    """

    device: torch.device
    is_main: bool
    world_size: int

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


class SingleDevice:
    """One process, one device, plain torch: no accelerate in the path.

    Args:
        device: ``"cpu"``, ``"cuda:1"``, ``"mps"``, ``"xpu"``, or a ``torch.device``.
        mixed_precision: ``"no"`` runs in the parameters' dtype. ``"bf16"`` and ``"fp16"`` run
            forward passes under autocast, fp16 with a ``GradScaler``, which costs one
            host-device synchronisation an update: PyTorch's scaler decides on the host whether to
            skip.

    >>> SingleDevice("cpu")
    SingleDevice(device='cpu', mixed_precision='no')
    """

    is_main = True
    world_size = 1

    def __init__(
        self, device: str | torch.device = "cpu", *, mixed_precision: MixedPrecision = "no"
    ) -> None:
        self.device = torch.device(device)
        self.mixed_precision = mixed_precision
        if mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(
                f"SingleDevice takes mixed_precision={mixed_precision!r} from prepare_strategy "
                'only: prepare_strategy(device, mixed_precision="auto").'
            )
        self._dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type) if mixed_precision == "fp16" else None

    def __repr__(self) -> str:
        return (
            f"SingleDevice(device={str(self.device)!r}, mixed_precision={self.mixed_precision!r})"
        )

    def prepare_model(self, model: nn.Module) -> nn.Module:
        _STRATEGY_OF[model] = lambda: self
        return model.to(self.device)

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        return optimizer

    def to_device(self, batch: Any) -> Any:
        return batch if self.device.type == "cpu" else move(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def hold_gradients(self, model: nn.Module, hold: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def backward(self, loss: Tensor) -> None:
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()  # type: ignore[no-untyped-call]

    def clip_gradients(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm)

    @property
    def scales_losses(self) -> bool:
        return self.scaler is not None

    def apply(self, optimizer: Optimizer) -> bool:
        if self.scaler is None:
            optimizer.step()
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale


class Accelerated:
    """The strategy of an ``accelerate.Accelerator``: its device, precision and plugins.

    Args:
        accelerator: With ``gradient_accumulation_steps=1``: accumulation is the loop's business,
            since accelerate divides by a constant, also in a window that holds fewer batches.

    Raises:
        ConfigError: The accelerator divides losses for accumulation by itself.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        if accelerator.gradient_accumulation_steps != 1:
            raise ConfigError(
                "The Accelerator has gradient_accumulation_steps="
                f"{accelerator.gradient_accumulation_steps}. Build it with 1 and pass "
                "gradient_accumulation_steps to train_loop, which weighs micro-batches by items."
            )
        self.accelerator = accelerator
        self.device = accelerator.device
        self.is_main = accelerator.is_main_process
        self.world_size = accelerator.num_processes
        accelerator.manualloop_strategy = self  # to live as long: see _STRATEGY_OF

    def __repr__(self) -> str:
        precision = self.accelerator.mixed_precision
        return f"Accelerated(device={str(self.device)!r}, mixed_precision={precision!r})"

    def prepare_model(self, model: nn.Module) -> nn.Module:
        # Older versions of accelerate do not know their own models, and would wrap them again.
        is_held = any(model is held for held in self.accelerator._models)
        prepared: nn.Module = model if is_held else self.accelerator.prepare_model(model)
        _STRATEGY_OF[model] = _STRATEGY_OF[prepared] = ref(self)
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        # accelerate would wrap what it has wrapped, and then unscale its gradients twice.
        for held in self.accelerator._optimizers:
            if optimizer is held or optimizer is held.optimizer:
                return held  # type: ignore[no-any-return]
        prepared: Optimizer = self.accelerator.prepare_optimizer(optimizer)
        return prepared

    def to_device(self, batch: Any) -> Any:
        return batch if self.device.type == "cpu" else move(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def hold_gradients(self, model: nn.Module, hold: bool) -> AbstractContextManager[Any]:
        if not hold or self.world_size == 1:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values)
        return total

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip_gradients(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters_of(optimizer), max_norm)
        return norm

    @property
    def scaler(self) -> Any:
        return self.accelerator.scaler

    @property
    def scales_losses(self) -> bool:
        return self.accelerator.scaler is not None

    def apply(self, optimizer: Optimizer) -> bool:
        # Not AcceleratedOptimizer.step_was_skipped: a fused optimizer is always called, and skips
        # inside its kernel. The scale only ever falls after an overflow.
        scaler = self.accelerator.scaler
        scale = 0.0 if scaler is None else scaler.get_scale()
        optimizer.step()
        return scaler is None or scaler.get_scale() >= scale


def prepare_strategy(
    spec: str | torch.device | Accelerator | Strategy = "auto",
    *,
    mixed_precision: MixedPrecision | Literal["auto"] = "no",
) -> Strategy:
    """Choose the device and the precision of a run.

    Args:
        spec: ``"auto"``: accelerate if its launcher started this process, else the best of cuda,
            mps, xpu and cpu. A device name (``"cpu"``, ``"cuda:1"``) or ``torch.device``; an
            ``accelerate.Accelerator``; or a strategy, which is returned as it is.
        mixed_precision: ``"no"`` (default) computes in the parameters' dtype; ``"bf16"``;
            ``"fp16"``; ``"auto"`` is bf16 where the device has it, else fp16 on cuda, else no.
            Under a launcher of accelerate ``"no"`` and ``"auto"`` are what it was configured for.

    Raises:
        ConfigError: The device is not there, or cannot compute in this precision; or a precision
            is given beside an Accelerator or Strategy, which has its own.
        DistributedError: A launcher started several processes.

    >>> prepare_strategy("cpu", mixed_precision="bf16")
    SingleDevice(device='cpu', mixed_precision='bf16')
    """
    if mixed_precision not in ("no", "bf16", "fp16", "auto"):
        raise ConfigError(
            f'mixed_precision={mixed_precision!r} is none of "no", "bf16", "fp16", "auto".'
        )
    if spec == "auto":
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by accelerate launch, always
            from accelerate import Accelerator

            precision = None if mixed_precision in ("no", "auto") else mixed_precision
            return Accelerated(Accelerator(mixed_precision=precision))
        spec = str(_accelerator() or "cpu")
    if not isinstance(spec, str | torch.device):
        if mixed_precision != "no":
            raise ConfigError(
                f"{type(spec).__name__} has its own precision: say mixed_precision="
                f'"{mixed_precision}" where it is built, not here.'
            )
        return spec if hasattr(spec, "prepare_model") and hasattr(spec, "apply") else _wrap(spec)
    _refuse_many_processes()
    device = _checked_device(spec)
    if mixed_precision == "auto":
        without_bf16: MixedPrecision = "fp16" if device.type == "cuda" else "no"
        mixed_precision = "bf16" if _has_bf16(device) else without_bf16
    if mixed_precision == "bf16" and not _has_bf16(device):
        raise ConfigError(f'{device} does not compute in bfloat16. Use mixed_precision="fp16".')
    return SingleDevice(device, mixed_precision=mixed_precision)


def strategy_for(model: nn.Module, strategy: Strategy | None) -> Strategy:
    """Return the given strategy, else the one that prepared this model, else an "auto" one."""
    if strategy is not None:
        return prepare_strategy(strategy)
    prepared_by = _STRATEGY_OF.get(model)
    return (prepared_by and prepared_by()) or prepare_strategy("auto")


def require_one_process(strategy: Strategy) -> Strategy:
    """Refuse a strategy of several processes where the data is not dealt to them.

    Raises:
        DistributedError: It runs more than one.
    """
    if strategy.world_size > 1:
        raise DistributedError(
            f"{strategy} runs {strategy.world_size} processes; this version of manualloop trains "
            "and evaluates in one, and would use every row in each. Start it with plain python."
        )
    return strategy


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List the parameters that an optimizer updates, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def move(value: Any, device: torch.device) -> Any:
    """Copy the tensors in a nest of mappings, lists and tuples to a device, without blocking."""
    if hasattr(value, "to"):  # a tensor, a BatchEncoding, a packed sequence
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: move(item, device) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    return value


# Beside the model, not on it: an attribute would travel into its state, its copies and its pickles.
# An Accelerator holds its models, so a strategy that holds an Accelerator is referred to weakly:
# else no model in here would ever be freed.
_STRATEGY_OF: WeakKeyDictionary[nn.Module, Callable[[], Strategy | None]] = WeakKeyDictionary()


def _wrap(spec: Any) -> Strategy:
    if hasattr(spec, "prepare_model") and hasattr(spec, "gradient_accumulation_steps"):
        return getattr(spec, "manualloop_strategy", None) or Accelerated(spec)
    raise ConfigError(
        f"strategy={spec!r} is neither a device name, a torch.device, an Accelerator nor a "
        'Strategy. Use prepare_strategy("auto").'
    )


def _checked_device(spec: str | torch.device) -> torch.device:
    known: Iterable[str] = ("cpu", "cuda", "mps", "xpu")
    try:
        device = torch.device(spec)
    except RuntimeError as error:
        raise ConfigError(
            f'{spec!r} is not a device. Use "auto", or one of {", ".join(known)}.'
        ) from error
    if device.type == "cpu":
        return device
    available = _accelerator()
    count = torch.accelerator.device_count() if available else 0
    if available is None or available.type != device.type or (device.index or 0) >= count:
        found = f"{count} x {available.type}" if available else "no accelerator"
        raise ConfigError(f'Device "{device}" is not here: torch sees {found}. Use "auto".')
    return device


def _accelerator() -> torch.device | None:
    # current_accelerator() alone names what torch was built for, also where there is none.
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type in ("cpu", "xpu")


def _refuse_many_processes() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise DistributedError(
            f"A launcher started {world_size} processes (WORLD_SIZE); this version of manualloop "
            "trains in one, and would train the same model in each. Start it with plain python."
        )
