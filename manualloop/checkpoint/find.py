"""Which checkpoint of a directory to use: the last, the best, or a named one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from manualloop.checkpoint.manifest import (
    Found,
    find_folders,
    list_names,
    read_manifest,
    verify_folder,
)
from manualloop.errors import CheckpointError
from manualloop.notices import logger

_T = TypeVar("_T")


def find(directory: Path, which: str | os.PathLike[str], *, verify: bool) -> Found:
    """Return the checkpoint that ``load_checkpoint`` is asked for.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if which == "last":
        found = find_last(directory, verify=verify)
        if found is None:
            raise CheckpointError(f"There is no checkpoint in {directory}.")
        return found
    if which == "best":
        found = find_best(find_folders(directory))
        if found is None:
            raise CheckpointError(
                f"No checkpoint in {directory} was saved with a best_metric. Save them with "
                'save_checkpoint(..., metrics=scores, best_metric="f1"), or load which="last".'
            )
    else:
        path = Path(which) if Path(which).is_dir() else directory / which
        found = Found(path, explain(path, read_manifest, path))
    if verify:
        explain(found.path, verify_folder, found.path, found.manifest)
    return found


def explain(path: Path, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function, and name the checkpoint in what it raises."""
    try:
        return function(*args)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def find_last(directory: Path, *, verify: bool = True) -> Found | None:
    """Return the newest checkpoint that is whole; None if there is no checkpoint.

    Raises:
        CheckpointError: There are some, and each is damaged.
    """
    damaged: list[Found] = []
    for entry in find_folders(directory):
        try:
            if entry.manifest is None:
                raise CheckpointError(entry.problem)
            if verify:
                verify_folder(entry.path, entry.manifest)
        except CheckpointError as error:
            damaged.append(Found(entry.path, None, str(error)))
            continue
        if damaged:
            logger.warning(
                f"skipped {', '.join(list_names(damaged))}: resuming from {entry.path.name}."
            )
        return entry
    if damaged:
        raise CheckpointError(
            f"No checkpoint in {directory} is whole: {', '.join(list_names(damaged))}. To begin "
            "anew, remove them or use another checkpoint_dir."
        )
    return None


def find_best(entries: list[Found]) -> Found | None:
    """Return the checkpoint with the best metrics, by the ``best_metric`` of the newest.

    Args:
        entries: What ``find_folders`` returned.

    Returns:
        Of equals the oldest; None if no checkpoint was saved with a ``best_metric``.
    """
    usable = [(entry, entry.manifest) for entry in entries if entry.manifest is not None]
    best_metric = next((m["best_metric"] for _, m in usable if m["best_metric"]), None)
    if best_metric is None:
        return None
    scored = [
        (entry, score(metrics, best_metric))
        for entry, manifest in reversed(usable)  # oldest first: max takes the first of equals
        if isinstance((metrics := manifest["metrics"]).get(_name(best_metric)), int | float)
    ]
    return max(scored, key=lambda one: one[1])[0] if scored else None


def score(metrics: Mapping[str, Any], best_metric: str) -> float:
    """Return how good metrics are: the higher, the better; NaN is the worst.

    Args:
        metrics: Values by name.
        best_metric: Name of the one that counts, with "-" before it if lower is better.

    >>> score({"loss": 0.5}, "-loss"), score({"loss": float("nan")}, "-loss")
    (-0.5, -inf)
    """
    value = metrics[_name(best_metric)]
    value = -value if best_metric.startswith("-") else value
    return -math.inf if math.isnan(value) else value


def _name(best_metric: str) -> str:
    return best_metric.removeprefix("-")
