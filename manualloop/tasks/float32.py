"""A pass through a model in float32, whatever kind of numbers its weights have.

A trial compares what a model makes of a row in two ways. In bfloat16 rounding alone makes a few
percent of difference, behind which smaller ones would hide.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

_HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Let all functions of torch compute in float32 where they would in half precision.

    Numbers are widened function by function, so that no second copy of the weights is made.
    Autocast has no effect, and products of float32 have all of its digits. Weights are not changed.

    Args:
        device: The device of the model.
    """
    digits = torch.get_float32_matmul_precision()
    if digits != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with not_compiled(), _Widened(device.type):
            yield
    finally:
        if digits != "highest":
            torch.set_float32_matmul_precision(digits)


def not_compiled() -> Any:
    """Return a context in which compiled modules run as they were written.

    They would be compiled with what a trial does to them.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class _Widened(TorchFunctionMode):
    """The mode in which functions of torch get float32 for what has half of its digits.

    Args:
        device_type: Type of the device on which autocast is switched off.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch with widened numbers."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # an attribute
            return _widened(func(*args, **kwargs), dtypes_alone=True)
        with torch.autocast(self._device_type, enabled=False):
            if func is embedding:  # of whose table a few rows are used
                return _widened(func(*args, **kwargs))
            func = Tensor.float if func in (Tensor.half, Tensor.bfloat16) else func
            return func(*_widened(args), **_widened(kwargs))


def _widened(value: Any, *, dtypes_alone: bool = False) -> Any:
    kind = type(value)
    if kind in (list, tuple):
        return kind(_widened(one) for one in value)
    if kind is dict:
        return {name: _widened(one) for name, one in value.items()}
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _HALVES else value
    if dtypes_alone or not isinstance(value, Tensor) or value.dtype not in _HALVES:
        return value
    return value.float()
