"""Random generators that samplers and datasets own: their states, by attribute."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

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
