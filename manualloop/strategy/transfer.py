"""Tensors on their way to a device, and back to the host."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def move_optimizer_state(optimizer: Optimizer) -> None:
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


class LateTensor:
    """A tensor on its way to the host; nothing waits for it until ``read``.

    From CUDA the copy goes to pinned memory on the current stream, and an event tells when it has
    landed. Elsewhere the copy is made when it is read.

    Attributes:
        tells: Whether ``has_landed`` knows.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tells = tensor.is_cuda or tensor.device.type == "cpu"
        self._tensor = tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor
        self._event: Any = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def has_landed(self) -> bool:
        """Tell whether reading it would not wait for the work of this moment, or nothing tells."""
        return self._event is None or bool(self._event.query())

    def read(self) -> list[float]:
        """Return the numbers, waiting for them if they are still on their way."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._tensor.tolist()
        return values
