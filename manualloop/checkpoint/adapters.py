"""The adapter of a model of PEFT as files that ``PeftModel.from_pretrained`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from manualloop.checkpoint.tensors import save_tensors
from manualloop.models import is_sharded
from manualloop.notices import say

STEM = "adapter_model"
_PREFIX = "base_model.model."
_TOLD: WeakSet[nn.Module] = WeakSet()


def save_adapter(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` of the active adapter.

    The other adapters, and weights that are trained beside it, are in the checkpoint's own files.
    A message tells what these two files leave out.

    Args:
        model: The model; nothing is written for one without adapters.
        weights: Its weights by name, without those of a frozen base.
        folder: The folder.
    """
    adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    if not adapters or is_sharded(model):
        return
    active = _active(model)
    if len(active) != 1 or active[0] not in adapters:
        _tell(model, f"{len(active)} adapters are active at once, and PEFT loads one")
        return
    config = copy(adapters[active[0]])
    if _is_prompt(config) and _are_others(model, weights):
        _tell(model, "the weights saved are an average, and PEFT writes a prompt as it is trained")
        return
    try:
        tensors = _tensors_of(model, weights, active[0])
        config.inference_mode = True
        config.save_pretrained(folder)
        for _ in save_tensors(tensors, folder, STEM, is_split=False):
            pass
    except Exception as error:  # kinds of adapters are many, and the weights are saved anyway
        _tell(model, f"it could not be written ({error!r:.150})")
        for name in ("adapter_config.json", f"{STEM}.safetensors"):
            (folder / name).unlink(missing_ok=True)
        return
    written = {tensor.data_ptr() for tensor in tensors.values()}
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name in weights and weights[name].data_ptr() not in written
    ]
    if left and not _is_prompt(config):
        _tell(model, f"it leaves out {len(left)} trained weights, the first of them {left[0]}")


def _tensors_of(model: Any, weights: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Return the weights of an adapter by the names that PEFT has for them in a file."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=dict(weights), adapter_name=adapter, save_embedding_layers=False
    )
    is_peft = hasattr(model, "get_base_model")  # else of transformers, with adapters of its own
    return {name if is_peft else _PREFIX + name: tensor for name, tensor in found.items()}


def _is_prompt(config: Any) -> bool:
    return bool(getattr(config, "is_prompt_learning", False))


def _are_others(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Tell whether the weights that are saved are not those of the model."""
    pairs = ((weights.get(name), one) for name, one in model.named_parameters())
    return any(saved is not None and saved.data_ptr() != one.data_ptr() for saved, one in pairs)


def _active(model: Any) -> list[str]:
    active = model.active_adapters
    if callable(active):
        active = active()
    return [active] if isinstance(active, str) else list(active)


def _tell(model: nn.Module, reason: str) -> None:
    if model not in _TOLD:
        _TOLD.add(model)
        say(
            f"PeftModel.from_pretrained does not read all of these checkpoints: {reason}. Load "
            "them with load_checkpoint(folder, model)."
        )
