"""The random states of a process: Python's, NumPy's, torch's and every device's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

RandomState: TypeAlias = dict[str, Any]
"""Numbers, tensors, and lists of them, by the name of the generator."""


def get_random_state(*, devices: bool = True) -> RandomState:
    """Return the states of all global generators.

    Args:
        devices: Also those of accelerators, which waits for the device.
    """
    state: RandomState = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # legacy: of the Mersenne twister only
        "torch": torch.get_rng_state(),
    }
    if devices and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if devices and torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    if devices and hasattr(torch, "xpu") and torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        state["xpu"] = torch.xpu.get_rng_state_all()
    return state


def set_random_state(state: RandomState) -> None:
    """Put the generators back to what ``get_random_state`` returned.

    Devices that are not here any more are left out.

    >>> state = get_random_state()
    >>> drawn = torch.rand(3)
    >>> set_random_state(state)
    >>> torch.equal(torch.rand(3), drawn)
    True
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        for number, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(of_device, number)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "xpu" in state and hasattr(torch, "xpu") and torch.xpu.is_available():
        for number, of_device in enumerate(state["xpu"][: torch.xpu.device_count()]):
            torch.xpu.set_rng_state(of_device, number)


def is_same_random_state(one: RandomState, other: RandomState) -> bool:
    """Tell whether nothing was drawn on the host between the two."""
    return (
        one["python"] == other["python"]
        and torch.equal(one["torch"], other["torch"])
        and _is_same(one["numpy"], other["numpy"])
    )


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    return np.array_equal(one, other)


SAMPLERS = ("base_dataloader", "batch_sampler", "sampler")  # the first is accelerate's
DATASETS = ("dataset",)


def get_generator_states(owner: Any, parts: Sequence[str]) -> dict[str, Any]:
    """Return the states of the generators that an object and its parts have as attributes.

    Args:
        owner: A loader, a sampler, a dataset.
        parts: Attributes whose value is looked into as well, and into theirs.

    >>> loader = torch.utils.data.DataLoader([1], shuffle=True, generator=torch.Generator())
    >>> list(get_generator_states(loader, SAMPLERS))
    ['sampler.generator', 'generator']
    """
    return {path: _get(generator) for path, generator in _find(owner, parts, "", set())}


def set_generator_states(owner: Any, parts: Sequence[str], states: dict[str, Any]) -> None:
    """Put the generators back; those that are not there any more are left out."""
    for path, generator in list(_find(owner, parts, "", set())):
        if path in states:
            _set(generator, states[path])


def _find(owner: Any, parts: Sequence[str], path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(owner) in seen or not hasattr(owner, "__dict__"):
        return
    seen.add(id(owner))
    for name, value in vars(owner).items():
        if isinstance(value, _KINDS):
            yield f"{path}{name}", value
        elif name in parts:
            yield from _find(value, parts, f"{path}{name}.", seen)


_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _get(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
