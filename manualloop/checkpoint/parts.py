"""Parts of a model that are saved in their own way: adapters on a frozen base, and shards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manualloop.internals import unwrap_optimizer
from manualloop.models import unwrap_model

BASE = "frozen weights"
"""Name of the fingerprint of the frozen base in the state of an ``AdaptedModel``."""

_NUM_SAMPLED = 16


def base_weights(model: nn.Module) -> set[str]:
    """Name the parameters that come with a model's base, and that training leaves alone.

    Those are the frozen ones of a model of PEFT, which keeps what is an adapter's under the
    adapter's name, and everywhere the frozen ones that are quantized.

    >>> model = nn.Linear(2, 2)
    >>> base_weights(model.requires_grad_(False))
    set()
    >>> model.peft_config = {"default": ...}
    >>> sorted(base_weights(model))
    ['bias', 'weight']
    """
    adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    return {
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if not weight.requires_grad
        and (not weight.is_floating_point() or adapters)
        and adapters.keys().isdisjoint(name.split("."))
    }


def saved_part(model: nn.Module) -> nn.Module | AdaptedModel:
    """Return the object whose ``state_dict`` goes into a checkpoint of the model."""
    model = unwrap_model(model, adapters=False)
    base = base_weights(model)
    return AdaptedModel(model, base) if base else model


class AdaptedModel:
    """A model without the weights of its base, as something with a state.

    The base is loaded anew by the script, as it was. It may be a hundred times the adapters' size,
    and quantized weights have a state that they do not take back.
    """

    takes_its_own = True  # every state with its own names and shapes

    def __init__(self, model: nn.Module, base: set[str]) -> None:
        self._model, self._base = model, base

    def state_dict(self) -> dict[str, Any]:
        """Return everything except the weights of the base, and a fingerprint of those."""
        state = self._model.state_dict()
        rest = {
            name: value
            for name, value in state.items()
            if self._base.isdisjoint(accumulate(name.split("."), "{}.{}".format))
        }
        return rest | {BASE: self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` of a model with the same names returned."""
        rest = {name: value for name, value in state.items() if name != BASE}
        self._model.load_state_dict(rest, strict=False)

    def _fingerprint(self) -> str:
        sampled = [
            weight.detach().reshape(-1)[:: max(1, weight.numel() // _NUM_SAMPLED)].float()
            for name, weight in self._model.named_parameters(remove_duplicate=False)
            if name in self._base
        ]
        numbers = torch.cat([part.cpu() for part in sampled]).numpy()
        return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


PREFIX = "shard-"
"""First part of the names of the files."""


class ShardedModel:
    """The weights of a sharded model, as something with a state."""

    takes_its_own = True  # every state with its own names and shapes

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """Return the weights by name; sharded ones stay sharded. Collective."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return dict(get_model_state_dict(self._model))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. Collective."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self._model, state)


class ShardedOptimizer:
    """The state of a sharded model's optimizers, by the names of the weights."""

    takes_its_own = True  # every state with its own names and shapes

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model = model
        self._optimizers = [unwrap_optimizer(optimizer) for optimizer in optimizers]

    def state_dict(self) -> dict[str, Any]:
        """Return the state; entries that do not exist yet are zeros. Collective."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return dict(get_optimizer_state_dict(self._model, self._optimizers, options=_flat()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned. Collective."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(self._model, self._optimizers, state, options=_flat())
        for name, parameter in unwrap_model(self._model, adapters=False).named_parameters():
            for optimizer in self._optimizers:
                _undo_casts(optimizer.state.get(parameter, {}), state, f"state.{name}")


def _undo_casts(entry: dict[Any, Any], state: Mapping[str, Any], path: str) -> None:
    """Put back what was only cast to the dtype of its parameter, as torch does on loading."""
    for key, loaded in entry.items():
        saved: Any = state.get(f"{path}.{key}")
        both = isinstance(saved, Tensor) and isinstance(loaded, Tensor)
        if both and saved.dtype != loaded.dtype and saved.shape == loaded.shape:
            entry[key] = saved.to(loaded.device)


def _flat() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def is_shard(tensor: Tensor) -> bool:
    """Tell whether a tensor is sharded over the ranks."""
    return hasattr(tensor, "placements")  # of a DTensor, without the import


def take_shards(groups: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Remove the tensors that are sharded over the ranks from groups of tensors; return them."""
    shards = {}
    for stem in ("model", "optimizer"):
        for name in [name for name, value in groups[stem].items() if is_shard(value)]:
            shards[f"{stem}/{name}"] = groups[stem].pop(name)
    return shards


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the shards of this rank. Call on every rank."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer)


def read_shards(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read tensors, sharded like those of the same names in ``like``. Call on every rank."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    return tensors
