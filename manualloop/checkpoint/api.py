"""Checkpoints: folders that hold all of a run, or are not there."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from manualloop.checkpoint.folders import (
    Found,
    find_folders,
    list_names,
    make_aside,
    read_manifest,
    remove_folder,
    sweep,
    verify_folder,
    write_folder,
)
from manualloop.checkpoint.lock import hold_lock
from manualloop.checkpoint.nested import as_json, from_json
from manualloop.checkpoint.parts import write_shards
from manualloop.checkpoint.snapshot import put_state_back, read_snapshot, take_state_apart
from manualloop.checkpoint.tensors import num_bytes
from manualloop.errors import CheckpointError, ConfigError, ManualLoopError
from manualloop.notices import logger
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy, on_main
from manualloop.strategy.select import strategy_for

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """Which checkpoint was loaded.

    Attributes:
        path: Its folder.
        step: Updates that had been applied.
        metrics: That it was saved with.
        run: What else ``train_loop`` had noted.
    """

    path: Path
    step: int
    metrics: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict, repr=False)


def save_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    state: TrainState,
    *,
    metrics: Mapping[str, Any] | None = None,
    keep: int = 2,
    best_metric: str | None = None,
    strategy: Strategy | None = None,
) -> Path:
    """Save all of a run in ``checkpoint_dir/step-00000500``; return that folder.

    It is written aside, forced to disk and renamed, so that a kill or a power cut at any moment
    leaves either the whole checkpoint or none, and the older ones as they were. The weights are in
    ``model.safetensors`` beside the model's config: ``from_pretrained(folder)`` loads them. All
    else is safetensors and JSON too, with a sha256 of each file. Call on every rank: rank 0 writes,
    with the random states of all.

    Of a model with adapters of PEFT the frozen base is left out, and so are frozen weights that are
    quantized: they are loaded into what the script builds on the same base.
    ``model.save_pretrained`` then writes the adapters for others.

    Args:
        checkpoint_dir: Of one run. Made if it is not there.
        state: As it is between two updates.
        metrics: Of an evaluation of these weights.
        keep: Newest checkpoints to keep; older ones are removed, but for the best.
        best_metric: A metric to maximise, or with "-" before it to minimise: the best checkpoint
            is kept, and ``load_checkpoint(which="best")`` finds it.
        strategy: None: the one that prepared the model, else ``prepare_strategy("auto")``.

    Raises:
        CheckpointError: It cannot be written: the disk is full, the folder read-only, in use by
            another run, or holds a later step. What was there before still is.

    >>> import tempfile, torch
    >>> model = torch.nn.Linear(2, 1)
    >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_checkpoint(folder, state)
    ...     info = load_checkpoint(folder, state)
    >>> saved.name, info.step
    ('step-00000000', 0)
    """
    if keep < 1:
        raise ConfigError(f"keep must be at least 1 checkpoint, got {keep!r}.")
    strategy = strategy_for(state.model, strategy)
    directory = Path(checkpoint_dir)
    with ExitStack() as stack:

        def open_folder() -> None:
            with explain_disk(directory):
                directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold_lock(directory, again=True))
                sweep(directory)

        on_main(strategy, open_folder)
        return write_checkpoint(directory, state, strategy, metrics, best_metric, {}, keep)


def write_checkpoint(
    directory: Path,
    state: TrainState,
    strategy: Strategy,
    metrics: Mapping[str, Any] | None,
    best_metric: str | None,
    run: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint for the holder of the folder's lock, then rotate. Collective.

    ``run`` goes into it as it is.
    """
    snapshot = take_state_apart(state, strategy, run)
    content = {
        "metrics": as_json(dict(metrics or {})),
        "best_metric": best_metric,
        "contract": state.contract,
    }

    step = state.progress.num_steps
    size = sum(map(num_bytes, snapshot.tensors.values()))
    size += sum(shard.nbytes for shard in snapshot.shards.values())

    def begin() -> Path | None:
        _check_writable(directory, state)
        with explain_disk(directory, size):
            return make_aside(directory, step) if snapshot.shards else None

    aside = on_main(strategy, begin)
    if aside is not None:
        with explain_disk(directory, size):
            write_shards(aside, snapshot.shards)

    def write() -> Path:
        with explain_disk(directory, size):
            path = write_folder(directory, step, snapshot.write, content, aside)
        with explain_disk(directory):
            rotate(directory, keep)
        return path

    return on_main(strategy, write)


def _check_writable(directory: Path, state: TrainState) -> None:
    step = state.progress.num_steps
    later = [f for f in find_folders(directory) if f.manifest and f.manifest["step"] > step]
    if later:
        raise CheckpointError(
            f"{directory} holds {later[0].path.name}, and this run is at step {step}: it would be "
            "taken for the older one. Give each run its own checkpoint_dir, or remove the later "
            "checkpoints."
        )
    if state.has_failed is not None and bool(state.has_failed):
        raise CheckpointError(
            "The loss was not finite some updates ago, and the weights have not moved since: "
            "nothing is saved. Go on, and the loop says within a few steps which rows it was."
        )


def load_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    state: TrainState,
    *,
    which: str | os.PathLike[str] = "last",
    strategy: Strategy | None = None,
    verify: bool = True,
) -> CheckpointInfo:
    """Put a state, and the random states of this process, where a checkpoint has left them.

    Every file is compared with its sha256, and every name and shape with the state, before
    anything is changed. The next ``train_steps`` goes on with the next window, and says what
    differs from the run that was saved. Call on every rank: rank 0 finds it, each reads it.

    Args:
        checkpoint_dir: That ``save_checkpoint`` was given.
        state: Built as the one that was saved.
        which: ``"last"``: the newest that is whole; ones that are damaged are skipped with a
            warning. ``"best"``: by the ``best_metric`` that they were saved with. Or a folder.
        strategy: None: the one that prepared the model, else ``prepare_strategy("auto")``.
        verify: False trusts the disk: a flipped bit in a tensor then goes unnoticed.

    Raises:
        CheckpointError: There is none, it is damaged, or does not fit the state; the message names
            the part. Nothing was loaded.
        ConfigError: A ``train_steps`` is open on the state.
    """
    strategy = strategy_for(state.model, strategy)
    found = on_main(strategy, lambda: _find(Path(checkpoint_dir), which, verify))
    return load_found(found, state, strategy)


def _find(directory: Path, which: str | os.PathLike[str], verify: bool) -> Found:
    if which == "last":
        found = find_last(directory, verify=verify)
        if found is None:
            raise CheckpointError(f"There is no checkpoint in {directory}.")
        return found
    if which == "best":
        found = _require_best(directory)
    else:
        path = Path(which) if Path(which).is_dir() else directory / which
        found = Found(path, _explain(path, read_manifest, path))
    if verify:
        _explain(found.path, verify_folder, found.path, found.manifest)
    return found


def load_found(found: Found, state: TrainState, strategy: Strategy) -> CheckpointInfo:
    """Load a checkpoint that was found and verified. Every rank reads the same one."""
    state.require_closed()
    if not found.path.is_dir():
        raise CheckpointError(
            f"{found.path} is not to be seen from rank {strategy.rank}. Give all ranks a "
            "checkpoint_dir on a file system that they share."
        )
    manifest: dict[str, Any] = found.manifest or {}
    state.model, state.optimizer = strategy.prepare(state.model, state.optimizer)
    files = manifest["files"]
    saved = _explain(found.path, read_snapshot, found.path, files, state, strategy)
    put_state_back(saved, state, strategy)
    state.contract, state.is_resumed = manifest["contract"], True
    return CheckpointInfo(found.path, manifest["step"], from_json(manifest["metrics"]), saved.run)


def _explain(path: Path, function: Callable[..., _T], *args: Any) -> _T:
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
                f"skipped {', '.join(list_names(damaged))}: going on from {entry.path.name}."
            )
        return entry
    if damaged:
        raise CheckpointError(
            f"No checkpoint in {directory} is whole: {', '.join(list_names(damaged))}. To begin "
            "anew, remove them or use another checkpoint_dir."
        )
    return None


def find_best(directory: Path) -> Found | None:
    """Return the checkpoint with the best metrics, by the ``best_metric`` of the newest.

    None: no checkpoint was saved with a ``best_metric``.
    """
    entries = [entry for entry in find_folders(directory) if entry.manifest is not None]
    entries.reverse()  # oldest first: of equals it is the best
    names = [name for entry in entries if (name := _manifest(entry)["best_metric"])]
    if not names:
        return None
    scored = [e for e in entries if names[-1].removeprefix("-") in _manifest(e)["metrics"]]
    metrics = [from_json(_manifest(entry)["metrics"]) for entry in scored]
    return scored[best_of(metrics, names[-1])] if scored else None


def _require_best(directory: Path) -> Found:
    found = find_best(directory)
    if found is None:
        raise CheckpointError(
            f"No checkpoint in {directory} was saved with a best_metric. Save them with "
            'save_checkpoint(..., metrics=scores, best_metric="f1"), or load which="last".'
        )
    return found


def _manifest(entry: Found) -> dict[str, Any]:
    assert entry.manifest is not None
    return entry.manifest


def rotate(directory: Path, keep: int) -> None:
    """Remove all but the newest checkpoints and the best one; those that are damaged stay.

    Of two of the same step the older goes: it was replaced.
    """
    best = find_best(directory)
    steps: list[int] = []
    for entry in find_folders(directory):
        if entry.manifest is None:
            continue
        step = entry.manifest["step"]
        is_kept = step not in steps and len(steps) < keep
        if not is_kept and (best is None or entry.path != best.path):
            remove_folder(entry.path)
        steps.append(step)


@contextmanager
def explain_disk(directory: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an error of the disk into one that tells what to do.

    Args:
        directory: Of the checkpoints.
        num_bytes: That a checkpoint takes.
    """
    try:
        yield
    except ManualLoopError:
        raise
    except OSError as error:
        needed = "" if num_bytes is None else f" It takes {num_bytes / 1e6:.1f} MB."
        free = free_bytes(directory)
        space = "" if free is None else f" Free there: {free / 1e6:.1f} MB."
        entry = next((e for e in find_folders(directory) if e.manifest is not None), None)
        last = "There is none from before." if entry is None else f"The last is {entry.path}."
        raise CheckpointError(
            f"No checkpoint could be written in {directory}: {error}.{needed}{space} {last} "
            "Make room, or the folder writable; the run goes on from there when it is started "
            "again."
        ) from error


def free_bytes(directory: Path) -> int | None:
    """Return the room on a folder's disk, or on that of the parent that is there; None: unknown."""
    for folder in (directory, *directory.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def best_of(evaluations: Sequence[Mapping[str, float]], best_metric: str | None) -> int:
    """Return which evaluation is the best so far: the first of equals, and NaN is the worst.

    Args:
        evaluations: At least one, oldest first.
        best_metric: As in ``train_loop``; None: the newest is the best.

    Raises:
        ConfigError: The metric is not among the results.

    >>> best_of([{"loss": 0.7}, {"loss": 0.4}, {"loss": float("nan")}], "-loss")
    1
    """
    if best_metric is None:
        return len(evaluations) - 1
    name = best_metric.removeprefix("-")
    if name not in evaluations[-1]:
        raise ConfigError(
            f"best_metric={best_metric!r}, and evaluate returned no {name!r}: "
            f"{', '.join(evaluations[-1]) or 'nothing'}. Name one of its results."
        )
    sign = -1 if best_metric.startswith("-") else 1
    values = [sign * metrics[name] for metrics in evaluations]
    return max(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])
