"""Whether the weights of a model are those that lie where it was loaded from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from manualloop.strategy.base import STRATEGY_OF


def are_stored(model: Any, where: str, dtype: torch.dtype, *wrappers: Any) -> bool:
    """Tell whether a model has the weights of a folder, or of a name in the cache of the hub.

    The first rows of each weight are compared. A model that a loop has had may be trained, so that
    its weights tell nothing, and neither do other files than ``model.safetensors``.

    Args:
        model: A model of transformers.
        where: The folder, or the name on the hub.
        dtype: The dtype that they are loaded in, apart from those that keep their own.
        wrappers: What a loop may have got instead of it.
    """
    if any(one in STRATEGY_OF for one in (model, *wrappers)):
        return True
    for weight, part in _pairs(model, where):
        if list(weight.shape) != part.get_shape() or not weight.ndim:
            continue
        read, here = part[:1], weight[:1].cpu()
        if not any(torch.equal(one.to(here.dtype), here) for one in (read.to(dtype), read)):
            return False
    return True


def has_other_shapes(model: Any, where: str) -> bool:
    """Tell whether a weight has another shape than it has where the model was loaded from."""
    return any(list(weight.shape) != part.get_shape() for weight, part in _pairs(model, where))


def _pairs(model: Any, where: str) -> Iterator[tuple[torch.Tensor, Any]]:
    """Give the weights of a model with those that are stored under the same name."""
    from safetensors import safe_open

    if (path := _file_of(where)) is None:
        return
    weights = model.state_dict()
    with safe_open(path, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            if name in weights:
                yield weights[name], stored.get_slice(name)


def dtype_of(where: str) -> torch.dtype | None:
    """Return the dtype of the first weight that is stored; None if there is no file to look at."""
    from safetensors import safe_open

    if (path := _file_of(where)) is None:
        return None
    with safe_open(path, "pt") as stored:
        names = list(stored.keys())
        return stored.get_slice(names[0])[:0].dtype if names else None


def _file_of(where: str) -> Path | None:
    path = Path(where) / "model.safetensors"
    if path.is_file():
        return path
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(where, path.name)
    except ValueError:  # no name of the hub
        return None
    return Path(found) if isinstance(found, str) else None
