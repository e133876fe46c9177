"""What ``from_pretrained`` needs beside the weights: configs, the tokenizer, names of classes."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from copy import copy
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from manualloop.checkpoint.adapters import save_adapter
from manualloop.checkpoint.files import MAX_JSON_BYTES, read_regular
from manualloop.checkpoint.nested import UNREADABLE, parse_json
from manualloop.checkpoint.parts import base_weights
from manualloop.errors import CheckpointError
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
) -> Iterator[Path]:
    """Write the files into a folder, and yield each.

    Args:
        model: The model.
        weights: The weights that are saved, by name; not those of a frozen base.
        tokenizer: Its tokenizer or processor; None for none.
        names: The names of the classes; None for none.
        folder: The folder.
    """
    before = set(folder.iterdir())
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        # The weights of an adapter are not those of the class that the config names.
        if hasattr(config, "save_pretrained") and not _is_adapted(model):
            config = copy(config)
            if name == "config":
                config.architectures = [type(model).__name__]
                if names is not None and names_in_config(model) is None:
                    put_names(model, config, names)
            config.save_pretrained(folder)
    save_adapter(model, weights, folder)
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
            saved: Any = parse_json(read_regular(folder / name, MAX_JSON_BYTES)[0])
        except (*UNREADABLE, OSError) as error:
            raise CheckpointError(f"{name} cannot be read: {error!r:.200}.") from error
        if name == "class_names.json":
            return tuple(map(str, saved))
        return names_by_number(saved.get("id2label"), model)
    return None


def _is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") or bool(base_weights(model))
