"""Checks that a resumed run matches its checkpoint."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from manualloop.errors import CheckpointError
from manualloop.internals import unwrap_optimizer
from manualloop.models import model_name
from manualloop.notices import say
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy
from manualloop.types import LoaderFacts

Contract = dict[str, Any]
"""Facts about a run by their names, grouped by what a difference means."""

_LIBRARIES = ("torch", "numpy", "transformers", "datasets", "accelerate", "safetensors")


def describe_run(
    state: TrainState, loader: LoaderFacts, strategy: Strategy, **settings: Any
) -> Contract:
    """Describe a run: what goes into the manifest of its checkpoints.

    Args:
        state: The state of the run.
        loader: Facts about the loader that gives its batches.
        strategy: The strategy of the run.
        settings: Other settings that its numbers depend on.

    Returns:
        Three groups of facts. A difference in "same" is refused. One in "exact" is logged, because
        the run is no longer bit-exact. One in "kept" is logged, because the value of the
        checkpoint is used.
    """
    scheduler = state.lr_scheduler
    return {
        "same": {
            **loader.same,
            "optimizer": type(unwrap_optimizer(state.optimizer)).__name__,
        },
        "exact": {
            **loader.exact,
            **settings,
            "model": model_name(state.model),
            "lr_scheduler": None if scheduler is None else type(scheduler).__name__,
            "world_size": strategy.world_size,
            "device": strategy.device.type,
            "mixed_precision": strategy.precision,
            "compile": bool(strategy.compile),
            "python": platform.python_version(),
            **{name: _version(name) for name in _LIBRARIES},
        },
        "kept": {
            name: value
            for name, value in state.optimizer.defaults.items()
            if isinstance(value, bool | int | float | str | tuple | None)
        },
    }


def check_contract(saved: Contract, now: Contract, *, workers_matter: bool) -> None:
    """Compare the run of a checkpoint with the run that resumes from it.

    Args:
        saved: The contract of the checkpoint.
        now: The contract of the run that resumes.
        workers_matter: Whether batches depend on the number of processes that read them: they
            draw random numbers there, or read a stream.

    Raises:
        CheckpointError: They train on other data, or with another optimizer.
    """
    if differences := _differences(saved["same"], now["same"]):
        raise CheckpointError(
            "The checkpoint is of another run, and nothing was trained:\n"
            + "\n".join(f"- {difference}" for difference in differences)
            + "\nResume with what it was begun with, or begin anew in another checkpoint_dir. To "
            "begin with the weights alone: from_pretrained(checkpoint)."
        )
    exact = dict(saved["exact"])
    if not workers_matter:
        exact["num_workers"] = now["exact"]["num_workers"]
    for difference in _differences(exact, now["exact"]):
        say(f"going on, not bit-exact because {difference}.")
    for difference in _differences(saved["kept"], now["kept"]):
        say(f"going on with the optimizer's settings of the checkpoint, not {difference}.")


def contract_differences(a: Contract, b: Contract) -> list[str]:
    """List the settings in which two runs differ: ``"seed: 1 -> 2"``."""
    groups = dict.fromkeys((*a, *b))
    return [line for group in groups for line in _differences(a.get(group, {}), b.get(group, {}))]


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {saved.get(name)} -> {now.get(name)}"
        for name in dict.fromkeys((*saved, *now))
        if _plain(saved.get(name)) != _plain(now.get(name))
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
