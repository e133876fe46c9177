"""What ``from_pretrained`` needs beside the weights: configs, adapters, a tokenizer, names."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from copy import copy
from operator import attrgetter
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from manualloop.checkpoint.files import read_json
from manualloop.checkpoint.nested import UNREADABLE
from manualloop.checkpoint.tensors import save_tensors
from manualloop.errors import CheckpointError
from manualloop.models import is_sharded
from manualloop.notices import say
from manualloop.objects import walk
from manualloop.tasks.names import Names, names_by_number, names_in_config, put_names

_KINDS = {
    "PreTrainedTokenizerBase",
    "ProcessorMixin",
    "ImageProcessingMixin",
    "FeatureExtractionMixin",
}


def find_tokenizer(loader: Any) -> Any:
    """Return the tokenizer or processor that a loader holds; None if there is none.

    >>> find_tokenizer([1, 2]) is None
    True
    """
    held = {name: getattr(loader, name, None) for name in ("tokenizer", "collate_fn", "dataset")}
    for _, part in walk(held, skips_empty=True):
        if not _KINDS.isdisjoint(map(_NAME, type(part.value).__mro__)):
            return part.value
    return None


_NAME = attrgetter("__name__")


def save_pretrained(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    tokenizer: Any,
    names: Names | None,
    folder: Path,
    *,
    is_whole: bool,
) -> Iterator[Path]:
    """Write the files into a folder, and yield each.

    Args:
        model: The model.
        weights: The weights that are saved, by name; not those of a frozen base.
        tokenizer: Its tokenizer or processor; None for none.
        names: The names of the classes; None for none.
        folder: The folder.
        is_whole: Whether the weights are all of the class that the config names: neither those of
            adapters alone, nor without a frozen base.
    """
    before = set(folder.iterdir())
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if hasattr(config, "save_pretrained") and is_whole:
            config = copy(config)
            if name == "config":
                config.architectures = [type(model).__name__]
                if names is not None and names_in_config(model) is None:
                    put_names(model, config, names)
            config.save_pretrained(folder)
    _save_adapter(model, weights, folder)
    if names is not None and not (folder / "config.json").exists():
        (folder / "class_names.json").write_text(json.dumps(names, ensure_ascii=False))
    if tokenizer is not None and hasattr(model, "config"):
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # any class may stand behind it, and the weights matter more
            name = type(tokenizer).__name__
            say(f"the {name} is not in the checkpoint: its save_pretrained raised {error!r:.100}.")
    yield from sorted(path for path in folder.iterdir() if path not in before and path.is_file())


def saved_names(model: nn.Module, folder: Path, files: Container[str]) -> Names | None:
    """Return the names of the classes that a checkpoint was trained on; None if it has none.

    Args:
        model: The model that gets its weights.
        folder: The folder of the checkpoint.
        files: Names of the files that belong to it.

    Raises:
        CheckpointError: They cannot be read.
    """
    for name in ("class_names.json", "config.json"):
        if name not in files:
            continue
        try:
            saved: Any = read_json(folder / name)
        except (*UNREADABLE, OSError) as error:
            raise CheckpointError(f"{name} cannot be read: {error!r:.200}.") from error
        if name == "class_names.json":
            return tuple(map(str, saved))
        return names_by_number(saved.get("id2label"), model)
    return None


_ADAPTER = "adapter_model"
_OF_PEFT = "base_model.model."
_TOLD: WeakSet[nn.Module] = WeakSet()


def _save_adapter(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
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
        for _ in save_tensors(tensors, folder, _ADAPTER, is_split=False):
            pass
    except Exception as error:  # kinds of adapters are many, and the weights are saved anyway
        _tell(model, f"it could not be written ({error!r:.150})")
        for name in ("adapter_config.json", f"{_ADAPTER}.safetensors"):
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
    return {name if is_peft else _OF_PEFT + name: tensor for name, tensor in found.items()}


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
