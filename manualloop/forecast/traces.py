"""What a look at a run may change, and how it is put back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from manualloop.models import (
    digest_of_weights,
    is_sharded,
    own_part,
    remember_configs,
    remember_modes,
)
from manualloop.notices import say
from manualloop.objects import numbers_in, remember
from manualloop.randomness import remember_random_states


@contextmanager
def without_a_trace(
    model: nn.Module, device: torch.device, *, loaders: Any, **functions: Any
) -> Iterator[None]:
    """Put everything back that forward and backward passes and reading batches may change.

    These are weights, gradients, buffers, other tensors of the modules and functions, modes,
    configs, attributes, the positions of loaders, and random states: global ones, and those of
    generators that any of these objects hold.

    Args:
        model: The model, where it runs.
        device: The device it is on.
        loaders: The loaders that are read.
        functions: The user's functions that are called, by name.
    """
    owners = {"model": model, "loaders": loaders, **functions}
    gradients = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    put_back: list[Callable[[], None]] = [
        remember_random_states(devices=device.type != "cpu", **owners),
        _remember_tensors(model, functions),
        _remember_weights(model),
        remember(owners),
        remember_configs(model),
        remember_modes(model),
    ]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for call in reversed(put_back):
            call()


def _remember_tensors(model: nn.Module, functions: Mapping[str, Any]) -> Callable[[], None]:
    """Return a function that gives buffers and other tensors the numbers that they have now."""
    tensors = [*model.buffers(), *_plain_tensors(model)]
    tensors += numbers_in(functions, beside={"model": model}).values()
    return _copier(tensors)


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Give the tensors that modules hold beside parameters and buffers, also in containers."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from _tensors_in(value)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            if isinstance(entry, Tensor):
                yield entry


def _copier(tensors: Iterable[Any], device: str | None = None) -> Callable[[], None]:
    kept = [
        (tensor, own_part(tensor).detach().to(device or tensor.device, copy=True))
        for tensor in tensors
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
    ]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, before in kept:
                own = own_part(tensor).detach()
                # Only what has changed: a graph of the user's may hold the others.
                if own.shape == before.shape and not _has_same_bits(own, before):
                    own.copy_(before)

    return put_back


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one.to(other.device), other)]
    return torch.equal(*bits)


def _remember_weights(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives the weights the numbers that they have now.

    No update is made, and hardly a forward pass writes into weights. Where a copy would take more
    than a quarter of the memory that is free, a change is only told.
    """
    num_bytes = sum(own_part(p).numel() * p.element_size() for p in model.parameters())
    free = _free_memory()
    if free is None or num_bytes <= free / 4:
        return _copier(model.parameters(), "cpu")
    before = "" if is_sharded(model) else digest_of_weights(model)

    def tell() -> None:
        if before and digest_of_weights(model) != before:
            say("the forward pass writes into weights, and these are not what they were before")

    return tell


def _free_memory() -> int | None:
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
