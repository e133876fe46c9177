"""Folders that transformers' ``Trainer`` has written, and how to begin from their weights."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from manualloop.checkpoint.files import MAX_JSON_BYTES, read_regular
from manualloop.errors import CheckpointError

_NAME = re.compile(r"checkpoint-([0-9]+)")
_STATE = "trainer_state.json"


def refuse_trainers(directory: Path) -> None:
    """Refuse a folder that the ``Trainer`` has written, which cannot be resumed from.

    Raises:
        CheckpointError: The message has the line that loads its weights.
    """
    folder = _newest(directory)
    if folder is None:
        return
    steps = _read(folder / _STATE).get("global_step")
    kinds = _read(folder / "config.json").get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    loader = f"transformers.{kind}" if isinstance(kind, str) and kind.isidentifier() else "Model"
    where = f"{folder.name}, after {steps} steps" if steps is not None else folder.name
    raise CheckpointError(
        f"{directory} was written by transformers' Trainer ({where}). Its weights can be trained "
        "further; its optimizer, its schedule and its place in the data are not read. Begin from "
        f"the weights: model = {loader}.from_pretrained({str(folder)!r}), with a checkpoint_dir of "
        f'the new run\'s own, such as "{directory.name}-continued".'
    )


def _newest(directory: Path) -> Path | None:
    """Return the newest folder of weights that the ``Trainer`` wrote; None: it wrote none."""
    if _is_file(directory / _STATE) or _is_file(directory / "training_args.bin"):
        return directory
    found = []
    with suppress(OSError):
        for path in directory.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is not None and not path.is_symlink() and _is_file(path / _STATE):
                found.append((int(name[1]), path))
    return max(found)[1] if found else None


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing if it cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(read_regular(path, MAX_JSON_BYTES)[0])
        return content if isinstance(content, dict) else {}
    return {}
