"""Whether the weights of a model are those that lie where it was loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from manualloop.strategy.base import STRATEGY_OF


def are_stored(model: Any, where: str, *wrappers: Any) -> bool:
    """Tell whether a model has the weights of a folder, or of a name in the cache of the hub.

    The first rows of each weight are compared. A model that a loop has had may be trained, so that
    its weights tell nothing, and neither do other files than ``model.safetensors``.

    Args:
        model: A model of transformers.
        where: The folder, or the name on the hub.
        wrappers: What a loop may have got instead of it.
    """
    if any(one in STRATEGY_OF for one in (model, *wrappers)) or (path := _file_of(where)) is None:
        return True
    from safetensors import safe_open

    weights = model.state_dict()
    with safe_open(path, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            weight, part = weights.get(name), stored.get_slice(name)
            if weight is None or list(weight.shape) != part.get_shape() or not weight.ndim:
                continue
            if not torch.equal(part[:1].to(weight.dtype), weight[:1].cpu()):
                return False
    return True


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
