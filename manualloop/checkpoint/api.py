"""Save and load checkpoints: folders that hold everything a run needs, or do not exist."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from manualloop import __version__
from manualloop.arguments import check_arguments
from manualloop.checkpoint.changes import note_model, tell_rebuilt, tell_unsaved
from manualloop.checkpoint.contract import check_state, log_kept
from manualloop.checkpoint.finite import require_finite
from manualloop.checkpoint.folders import (
    explain_disk,
    explain_memory,
    local_folder,
    locked,
    make_aside,
    remove_folder,
    write_folder,
)
from manualloop.checkpoint.manifest import Found, find, find_best, find_folders, naming
from manualloop.checkpoint.nested import as_json
from manualloop.checkpoint.parts import saved_part, write_shards
from manualloop.checkpoint.restore import Saved, load_weights, put_state_back, read_snapshot
from manualloop.checkpoint.snapshot import take_state_apart
from manualloop.errors import CheckpointError
from manualloop.models import sample_weights, unwrap_model
from manualloop.notices import say
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy, on_main, prepare
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.types import Scores


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """Which checkpoint was loaded.

    Attributes:
        path: Folder of the checkpoint.
        step: Number of updates that had been applied.
        metrics: Metrics that were saved with it.
        run: What ``train_loop`` saved beside them.
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

    It is written under another name, forced to disk and renamed, so that a kill or a power cut at
    any moment leaves either the whole checkpoint or none, and the older ones as they were. The
    weights are in ``model.safetensors`` beside the model's config: ``from_pretrained(folder)``
    loads them. The rest is safetensors and JSON too, with a sha256 of each file. Call on every
    rank: rank 0 writes, with the random states of all.

    The frozen base of a model with PEFT adapters is left out, and so are quantized frozen weights:
    the checkpoint is loaded into a model that the script builds on the same base. The active
    adapter is beside them as PEFT writes it: ``PeftModel.from_pretrained(base, folder)`` loads it.

    Args:
        checkpoint_dir: Folder of one run, created if missing.
        state: The state of the run, between two updates.
        metrics: Results of an evaluation of these weights. If ``evaluate_loop`` has scored other
            weights, such as an average, ``model.safetensors`` holds those, and a resumed run
            continues with those that were trained.
        keep: Number of newest checkpoints to keep; older ones are removed, except the best.
        best_metric: Name of the metric that decides, as in ``train_loop``: the best checkpoint is
            kept, and ``load_checkpoint(which="best")`` finds it.
        strategy: The strategy of the run; None takes the one that prepared the model, or else
            ``prepare_strategy("auto")``.

    Raises:
        CheckpointError: It cannot be written: the disk is full, the folder read-only, in use by
            another run, or holds a later step. Older checkpoints stay as they were.
        NonFiniteError: An update has made weights NaN or infinite; the message names them.

    >>> import tempfile, torch
    >>> model = torch.nn.Linear(2, 1)
    >>> state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_checkpoint(folder, state)
    ...     info = load_checkpoint(folder, state)
    >>> saved.name, info.step
    ('step-00000000', 0)
    """
    check_arguments(state=state, metrics=metrics, keep=keep, best_metric=best_metric)
    directory = local_folder(checkpoint_dir)
    try:  # no context manager: the end of one needs memory itself
        with ExitStack() as stack:
            strategy = strategy_for(state.model, strategy)
            strategy = begin_call(strategy, "save_checkpoint", step=state.progress.num_steps)
            on_main(strategy, lambda: stack.enter_context(locked(directory, again=True)))
            scored = _scored_weights(state, metrics)
            return write_checkpoint(
                directory, state, strategy, metrics, best_metric, {}, keep, scored
            )
    except Exception as error:
        explain_memory(error, directory)
        raise


def _scored_weights(
    state: TrainState, metrics: Mapping[str, Any] | None
) -> Callable[[], Mapping[str, Any]] | None:
    """Return the weights that ``evaluate_loop`` has scored, if they are others than the model's."""
    if not isinstance(metrics, Scores) or metrics.model is None or metrics.sample is None:
        return None
    model, own = metrics.model(), unwrap_model(state.model, adapters=False)
    model = None if model is None else unwrap_model(model, adapters=False)
    if model is None or not torch.equal(sample_weights(model), metrics.sample):
        say(
            "the metrics are of other weights than those that the model has now: they are saved "
            "with the latter. Save before the next update, and before optimizer.train()."
        )
        return None
    if model is own or saved_part(model).state_dict().keys() != saved_part(own).state_dict().keys():
        return None
    return lambda: saved_part(model).state_dict()


def write_checkpoint(
    directory: Path,
    state: TrainState,
    strategy: Strategy,
    metrics: Mapping[str, Any] | None,
    best_metric: str | None,
    run: Mapping[str, Any],
    keep: int,
    scored: Callable[[], Mapping[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint and remove old ones. Collective.

    The caller holds the lock of the folder. ``run`` is saved as it is. ``scored`` returns the
    weights that the metrics are of, if they are others than those that are trained.
    """
    try:
        require_finite(state, strategy)
        snapshot = take_state_apart(state, strategy, run, scored)
    except Exception as error:
        explain_memory(error, directory)
        raise
    content = {
        "release": __version__,  # for people who look at it: nothing depends on it
        "metrics": as_json(dict(metrics or {})),
        "best_metric": best_metric,
        "contract": state.contract,
    }
    step, aside = state.progress.num_steps, None

    def begin() -> Path:
        with explain_disk(directory, snapshot.num_bytes):
            _check_writable(directory, state)
            return make_aside(directory, step)

    if snapshot.shards:  # which every rank writes itself
        aside = on_main(strategy, begin)
        with explain_disk(directory, snapshot.num_bytes):
            write_shards(aside, snapshot.shards)

    def write() -> Path:
        with explain_disk(directory, snapshot.num_bytes):
            if aside is None:
                _check_writable(directory, state)
            path = write_folder(directory, step, snapshot.write, content, aside)
            _rotate(directory, keep)
        return path

    path = on_main(strategy, write)
    tell_unsaved(state, snapshot.unsaved)
    tell_rebuilt(state)
    return path


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
            "nothing is saved. Train on: within a few steps the loop names the rows."
        )


def load_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    state: TrainState | nn.Module,
    *,
    which: str | os.PathLike[str] = "last",
    strategy: Strategy | None = None,
    verify: bool = True,
) -> CheckpointInfo:
    """Restore a state and the random states of this process, or only a model's weights.

    ``load_checkpoint("runs/mrpc", model, which="best")`` loads the weights that have the metrics of
    the checkpoint, and changes nothing else. Where an average or the weights of a schedule-free
    optimizer were scored, those are not the ones that a resumed run continues with.

    Every file is compared with its sha256, and every name and shape with the state, before
    anything is changed. The next ``train_steps`` resumes with the next window, and logs what
    differs from the run that was saved. Call on every rank: rank 0 finds the checkpoint, and each
    rank reads it.

    Args:
        checkpoint_dir: The folder that was given to ``save_checkpoint``.
        state: A state that was built like the one that was saved, or a model.
        which: ``"last"`` for the newest checkpoint that is whole; damaged ones are skipped with a
            warning. ``"best"`` for the best by the ``best_metric`` they were saved with. Or a
            folder.
        strategy: The strategy of the run; None takes the one that prepared the model, or else
            ``prepare_strategy("auto")``.
        verify: Whether every file is compared with its sha256. Without, a flipped bit in a tensor
            goes unnoticed.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or it does not fit the state; the
            message names the part. Nothing was loaded.
        ConfigError: A ``train_steps`` is open on the state.
    """
    check_arguments(which=which, verify=verify)
    if not isinstance(state, nn.Module):
        check_arguments(state=state)
    strategy = strategy_for(state if isinstance(state, nn.Module) else state.model, strategy)
    strategy = begin_call(strategy, "load_checkpoint", which=str(which))
    directory = local_folder(checkpoint_dir)
    found = on_main(strategy, lambda: find(directory, which, verify=verify))
    if not isinstance(state, nn.Module):
        return put_found(found, read_found(found, state, strategy), state, strategy)
    manifest: dict[str, Any] = found.manifest or {}
    with naming(found.path):
        load_weights(found.path, manifest["files"], state)
    return CheckpointInfo(found.path, manifest["step"], dict(manifest["metrics"]))


def find_checkpoint(
    checkpoint_dir: str | os.PathLike[str], which: str | os.PathLike[str] = "last"
) -> Path:
    """Return the folder of a checkpoint, which ``from_pretrained`` takes.

    ::

        model = AutoModelForSequenceClassification.from_pretrained(find_checkpoint(folder, "best"))

    Args:
        checkpoint_dir: The folder that was given to ``train_loop`` or ``save_checkpoint``.
        which: As in ``load_checkpoint``.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    check_arguments(which=which)
    return find(local_folder(checkpoint_dir), which, verify=True).path


def read_found(found: Found, state: TrainState, strategy: Strategy) -> Saved:
    """Read a checkpoint that was found and verified. Call on every rank, with the same one."""
    state.require_closed()
    if not found.path.is_dir():
        raise CheckpointError(
            f"{found.path} is not to be seen from rank {strategy.rank}. Give all ranks a "
            "checkpoint_dir on a file system that they share."
        )
    manifest: dict[str, Any] = found.manifest or {}
    check_state(manifest["contract"], state)  # which describes it as the script has built it
    state.model, state.optimizer = prepare(strategy, state.model, state.optimizer)
    note_model(state)
    with naming(found.path):
        return read_snapshot(found.path, manifest, state, strategy)


def put_found(found: Found, saved: Saved, state: TrainState, strategy: Strategy) -> CheckpointInfo:
    """Load a checkpoint that was read into the state."""
    manifest: dict[str, Any] = found.manifest or {}
    put_state_back(saved, state, strategy)
    log_kept(manifest["contract"], state)
    state.contract, state.is_resumed = manifest["contract"], True
    return CheckpointInfo(found.path, manifest["step"], dict(manifest["metrics"]), saved.run)


def _rotate(directory: Path, keep: int) -> None:
    """Remove all but the newest checkpoints and the best one; those that are damaged stay.

    Of two of the same step the older goes: it was replaced.
    """
    entries = find_folders(directory)
    best = find_best(entries)
    steps: list[int] = []
    for entry in entries:
        if entry.manifest is None:
            continue
        step = entry.manifest["step"]
        is_kept = step not in steps and len(steps) < keep
        if not is_kept and (best is None or entry.path != best.path):
            remove_folder(entry.path)
        steps.append(step)
