"""Copies of tensors to a device, and of numbers back to the host, that nothing waits for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from manualloop.batches import Kept, rebuild


def move_optimizer_state(optimizer: Optimizer) -> None:
    """Move the state of an optimizer to the device where its parameters are now.

    ``load_state_dict`` would do so too, but it casts to the parameters' dtype and makes new groups.
    """
    for group in optimizer.param_groups:
        # Otherwise torch keeps its step counts on the CPU, where it reads them.
        counts_move = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if not isinstance(value, Tensor) or value.ndim > 0 or counts_move:
                    state[name] = move(value, parameter.device)


_SMALL = 64 * 1024  # bytes; to copy so few takes less time than to switch streams


def move(value: Any, device: torch.device, is_whole: bool = True) -> Any:
    """Copy the tensors of a batch of any kind to a device, without blocking.

    They are found in nested mappings, lists, tuples, dataclasses, namespaces and other objects. An
    object with a method ``to`` moves itself. On cuda large tensors are copied on a stream of their
    own, while the device still computes.

    Args:
        value: A batch, or an entry of one.
        device: Where to.
        is_whole: Whether it is a whole batch.
    """
    if isinstance(value, Tensor):
        if device.type == "cuda" and value.nbytes > _SMALL:
            return _copy_beside(value, device)
        return value.to(device, non_blocking=True)
    if type(value) is Kept:
        return value
    if hasattr(value, "to"):  # a BatchEncoding, a packed sequence, a batch class of the user
        try:
            moved = value.to(device, non_blocking=True)
        except TypeError:  # most classes of users take the device alone
            moved = value.to(device)
        return value if moved is None else moved  # some move themselves in place
    if isinstance(value, Mapping):
        return {name: move(item, device, False) for name, item in value.items()}
    return rebuild(value, partial(move, device=device, is_whole=False), is_whole)


def _copy_beside(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor.to(device, non_blocking=True)  # after the work that computes it there
    # Copying from memory that is not pinned, the driver may wait for the stream of the copy. If
    # that were the stream that computes, every batch would wait for the device.
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copied = tensor.to(device, non_blocking=True)
    current.wait_stream(stream)
    copied.record_stream(current)  # otherwise its memory could be reused too early
    return copied


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class LateTensor:
    """A tensor that is copied to the host; nothing waits for the copy until ``read``.

    From CUDA the copy goes to pinned memory on the current stream, and an event marks its end. On
    other devices the copy is made when it is read.

    Attributes:
        tells: Whether ``has_landed`` can tell that the copy is complete.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tells = tensor.is_cuda or tensor.device.type == "cpu"
        self._tensor = tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor
        self._event: Any = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def has_landed(self) -> bool:
        """Tell whether the copy is complete; always true where that is unknown."""
        return self._event is None or bool(self._event.query())

    def read(self) -> list[float]:
        """Return the numbers, waiting for the copy if it is not complete."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._tensor.tolist()
        return values
