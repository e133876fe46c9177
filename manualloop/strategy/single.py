"""One process on one device, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import has_torch_function

from manualloop.errors import ConfigError
from manualloop.internals import find_engine, step_optimizer, watch_scale
from manualloop.optimizers.access import parameters_of, whole_norm
from manualloop.optimizers.together import each
from manualloop.strategy.base import STRATEGY_OF, MixedPrecision
from manualloop.strategy.compiled import CompileOptions, compile_model
from manualloop.strategy.transfer import move, move_optimizer_state

_NOTHING = nullcontext()
_ENGINE = find_engine()


class SingleDevice:
    """One process, one device, plain torch: no accelerate in the path.

    Args:
        device: ``"cpu"``, ``"cuda:1"``, ``"mps"``, ``"xpu"``, or a ``torch.device``.
        mixed_precision: ``"no"`` runs in the parameters' dtype. ``"bf16"`` and ``"fp16"`` run
            forward passes under autocast, fp16 with a ``GradScaler``. The host then waits for the
            device twice an update, to learn whether the loss is finite and whether the update was
            skipped, and three times if the optimizer is not fused.
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
        self.precision: MixedPrecision = mixed_precision
        self.compile = compile
        if mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(
                f"SingleDevice does not know mixed_precision={mixed_precision!r}. Use "
                'prepare_strategy(device, mixed_precision="auto").'
            )
        self._dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type) if mixed_precision == "fp16" else None

    def __repr__(self) -> str:
        return f"SingleDevice(device={str(self.device)!r}, mixed_precision={self.precision!r})"

    @property
    def mixed_precision(self) -> MixedPrecision:
        """The argument of this name, which is the precision."""
        return self.precision

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Put a model and its optimizer where they run; return prepared ones as they are."""
        parameters = parameters_of(optimizer)
        before = [parameter.device for parameter in parameters]
        model = self.prepare_model(model)
        if before != [parameter.device for parameter in parameters]:
            for one in each(optimizer):
                move_optimizer_state(one)
        return model, optimizer

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Put a model where it runs; return a prepared one as it is."""
        STRATEGY_OF[model] = lambda: self
        model = model.to(self.device)
        if self.compile:
            compile_model(model, self.compile)
        return model

    def to_device(self, batch: Any) -> Any:
        """Copy a batch to the device without waiting for the copy."""
        return batch if self.device.type == "cpu" else move(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run."""
        if self._dtype is None:
            return _NOTHING
        return torch.autocast(self.device.type, dtype=self._dtype)

    def hold_gradients(self, model: nn.Module, hold: bool) -> AbstractContextManager[Any]:
        """Return a context without effect: there are no gradients to reduce."""
        return _NOTHING

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return a tensor as it is: there is one rank."""
        return values

    def sum_counts(self, counts: Sequence[float]) -> list[float]:
        """Return numbers as they are: there is one rank."""
        return list(counts)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of the only rank in a list."""
        return [value]

    def explain(self, error: BaseException) -> None:
        """Do nothing: no rank can be gone."""
        pass

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those of the parameters."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        if (
            _ENGINE is None
            or scaled.ndim
            or not scaled.is_floating_point()
            or has_torch_function((scaled,))
            or _ENGINE.is_refused()
            or (Tensor.backward, torch.autograd.backward) != _ENGINE.methods
        ):
            scaled.backward()  # type: ignore[no-untyped-call]
        else:
            _ENGINE.run((scaled,), (torch.ones_like(scaled),), *_ENGINE.defaults)

    def clip_gradients(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of at most ``max_norm``; return the norm before."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        return whole_norm(nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm))

    @property
    def scales_losses(self) -> bool:
        """Whether gradients overflow now and then as a matter of course, which skips an update."""
        return self.scaler is not None

    def apply(self, optimizer: Optimizer) -> bool:
        """Make the update; return whether it was made, which an overflow prevents."""
        if self.scaler is None:
            step_optimizer(optimizer)
            return True
        was_made = watch_scale(self.scaler)
        self.scaler.step(optimizer)
        self.scaler.update()
        return was_made()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the strategy: the loss scale, if there is one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict)
