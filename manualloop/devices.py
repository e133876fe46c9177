"""One process on one device, in plain torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from manualloop.compiled import CompileOptions, compile_model
from manualloop.errors import ConfigError
from manualloop.votes import Votes

MixedPrecision = Literal["no", "bf16", "fp16"]


class SingleDevice:
    """One process, one device, plain torch: no accelerate in the path.

    Args:
        device: ``"cpu"``, ``"cuda:1"``, ``"mps"``, ``"xpu"``, or a ``torch.device``.
        mixed_precision: ``"no"`` runs in the parameters' dtype. ``"bf16"`` and ``"fp16"`` run
            forward passes under autocast, fp16 with a ``GradScaler``, for which the host waits
            for the device twice an update, to learn whether the loss is finite and whether the
            update was skipped; three times, if the optimizer is not fused.
        compile: As in ``prepare_strategy``.

    >>> SingleDevice("cpu")
    SingleDevice(device='cpu', mixed_precision='no')
    """

    is_main = True
    rank = 0
    world_size = 1

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        mixed_precision: MixedPrecision = "no",
        compile: CompileOptions = False,
    ) -> None:
        self.device = torch.device(device)
        self.mixed_precision = mixed_precision
        self.compile = compile
        if mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(
                f"SingleDevice takes mixed_precision={mixed_precision!r} from prepare_strategy "
                'only: prepare_strategy(device, mixed_precision="auto").'
            )
        self.votes = Votes()
        self._dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type) if mixed_precision == "fp16" else None

    def __repr__(self) -> str:
        return (
            f"SingleDevice(device={str(self.device)!r}, mixed_precision={self.mixed_precision!r})"
        )

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        parameters = parameters_of(optimizer)
        before = [parameter.device for parameter in parameters]
        model = self.prepare_model(model)
        if optimizer.state and before != [parameter.device for parameter in parameters]:
            _bring_along(optimizer)
        return model, optimizer

    def prepare_model(self, model: nn.Module) -> nn.Module:
        STRATEGY_OF[model] = lambda: self
        model = model.to(self.device)
        compile_model(model, self.compile)
        return model

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

    def sum_counts(self, counts: Sequence[float]) -> list[float]:
        return list(counts)

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def explain(self, error: BaseException) -> None:
        pass

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
            step_optimizer(optimizer)
            return True
        was_made = watch_scale(self.scaler)
        self.scaler.step(optimizer)
        self.scaler.update()
        return was_made()


def watch_scale(scaler: Any) -> Callable[[], bool]:
    """Return what tells, after an update, whether it was made: the scale falls if it overflowed.

    The host waits for the device once; with ``get_scale()`` it would before the update, too.
    """
    scale = scaler._get_scale_async()
    before = scale.clone()
    return lambda: bool(scale >= before)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List the parameters that an optimizer updates, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def zero_gradients(optimizer: Optimizer) -> None:
    """Set the gradients of an optimizer's parameters to None.

    What ``Optimizer.zero_grad`` does, less its record for the profiler, which costs 6 us; an
    optimizer that has a ``zero_grad`` of its own gets it called.
    """
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


_HOOKED = Optimizer.profile_hook_step(lambda self: None).__code__  # the method as torch makes it


def step_optimizer(optimizer: Optimizer) -> None:
    """Let an optimizer make its update.

    ``Optimizer.step`` less its record for the profiler, which costs 20 us, a tenth of the step of a
    small model. With a profiler, with hooks, or where the method is not as torch has made it, it is
    called as it is.
    """
    hooked: Any = type(optimizer).step
    own: Any = vars(optimizer).get("step")  # that of a scheduler, which only notes the call
    is_torchs = getattr(hooked, "__code__", None) is _HOOKED
    is_torchs = is_torchs and getattr(own, "__wrapped__", hooked) is hooked
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        is_torchs = False
    if not is_torchs or torch._C._autograd._profiler_enabled() or _has_hooks(optimizer):
        optimizer.step()
        return
    optimizer._opt_called = True  # type: ignore[attr-defined]
    hooked.__wrapped__(optimizer)


def _has_hooks(optimizer: Any) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def _bring_along(optimizer: Optimizer) -> None:
    """Move an optimizer's state to where its parameters are now.

    ``load_state_dict`` does so too, but casts to the parameters' dtype and makes new groups.
    """
    for group in optimizer.param_groups:
        # Else torch keeps its counts on the CPU, where it reads them.
        counts_move = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if not isinstance(value, Tensor) or value.ndim > 0 or counts_move:
                    state[name] = move(value, parameter.device)


def heeds_found_inf(optimizer: Optimizer, device: torch.device) -> bool:
    """Tell whether an optimizer leaves the weights alone where its ``found_inf`` is 1.

    The fused ones of torch should, for the sake of fp16's loss scaling. Those of mps took the flag
    and the scale of the gradients without looking at them before torch 2.13 (pytorch/pytorch, pull
    request 186360), so the kernel itself is asked, once in a process. Nothing is known of a
    ``step`` that is not torch's.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps another
    kind: Any = type(inner)
    is_fused = getattr(inner, "_step_supports_amp_scaling", False)
    return is_fused and _kernel_heeds_found_inf(kind, device)


@cache
def _kernel_heeds_found_inf(kind: Any, device: torch.device) -> bool:
    torchs = (parent for parent in kind.__mro__ if parent.__module__.startswith("torch.optim."))
    own_step, kind = kind.step, next(torchs, Optimizer)
    if inspect.unwrap(own_step) is not inspect.unwrap(kind.step):
        return False
    weight = torch.ones(1, dtype=torch.float32, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], lr=1.0, fused=True)
    optimizer.found_inf, optimizer.grad_scale = torch.ones_like(weight[0]), None
    kind.step.__wrapped__(optimizer)  # past hooks that the user has set for all optimizers
    return bool(weight == 1)


_SMALL = 64 * 1024  # bytes, which take a few microseconds: less than to switch streams


def move(value: Any, device: torch.device) -> Any:
    """Copy the tensors in a nest of mappings, lists and tuples to a device, without blocking.

    On cuda large ones take a stream of their own, and are on their way while the device still
    computes what it was given before.
    """
    if device.type == "cuda" and isinstance(value, Tensor) and value.nbytes > _SMALL:
        return _copy_beside(value, device)
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if hasattr(value, "to"):  # a BatchEncoding, a packed sequence, a batch class of the user
        try:
            return value.to(device, non_blocking=True)
        except TypeError:  # most classes of users take the device alone
            return value.to(device)
    if isinstance(value, Mapping):
        return {name: move(item, device) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    return value


def _copy_beside(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor.to(device, non_blocking=True)  # after what computes it there
    # From memory that is not pinned the driver may wait for the stream that it copies on, which
    # on the one that computes would be a wait for the device at every batch.
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copied = tensor.to(device, non_blocking=True)
    current.wait_stream(stream)
    copied.record_stream(current)  # else its memory could be given away when the copy is done
    return copied


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


# Beside the model, not on it: an attribute would travel into its state, its copies and its pickles.
# An Accelerator holds its models, so a strategy that holds an Accelerator is referred to weakly:
# else no model in here would ever be freed.
STRATEGY_OF: WeakKeyDictionary[nn.Module, Callable[[], Any]] = WeakKeyDictionary()
"""Which strategy has prepared a model."""


def checked_device(spec: str | torch.device) -> torch.device:
    """Return a device that is here.

    Raises:
        ConfigError: It is not, or is no device.
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
        raise ConfigError(f'Device "{device}" is not here: torch sees {found}. Use "auto".')
    return device


def best_accelerator() -> torch.device | None:
    """Return cuda, mps or xpu, whichever is here; None: there is none."""
    # currentbest_accelerator() alone names what torch was built for, also where there is none.
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16 without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type in ("cpu", "xpu")
