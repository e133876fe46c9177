"""Weights that are spread over the ranks: their state, and their files.

Each rank writes its own part, as safetensors, by torch's distributed checkpoint; another number of
ranks reads them again, each what is its part now.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PREFIX = "shard-"
"""What the names of the files begin with."""


class ShardedModel:
    """The weights of a sharded model, as something with a state."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """Return the weights by name; those that are spread as they are. Collective."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return dict(get_model_state_dict(self._model))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. Collective."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self._model, state)


class ShardedOptimizer:
    """The state of a sharded model's optimizer, by the names of the weights."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps another
        self.param_groups = optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Return the state; one that is still to come as zeros. Collective."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return dict(get_optimizer_state_dict(self._model, self._optimizer, options=_flat()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. Collective."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(self._model, self._optimizer, state, options=_flat())


def _flat() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def is_shard(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over the ranks."""
    return hasattr(tensor, "placements")  # of a DTensor, without the import


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's part of some tensors. Call on every rank."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer)


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read tensors, spread as those of the same names are. Call on every rank."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    return tensors
