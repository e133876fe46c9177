"""The settings of a run as plain values, for trackers and reports."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from manualloop.checkpoint.contract import Contract
from manualloop.models import unwrap_model
from manualloop.reading.describe import batch_size_of
from manualloop.state import TrainState
from manualloop.types import Plan

_ARGUMENTS = (
    "num_warmup_steps",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "on_nonfinite",
    "best_metric",
    "patience",
)
_LIBRARIES = ("manualloop", "torch", "transformers", "datasets", "accelerate")


def describe_settings(
    state: TrainState, plan: Plan, contract: Contract, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of a run by name: numbers, texts, and the dict ``model_config``.

    Args:
        state: The state of the run.
        plan: Length of the run.
        contract: The contract of the run.
        arguments: All arguments of ``train_loop``.
    """
    same, settings, exact = (contract[name] for name in ("same", "settings", "exact"))
    parameters = list(unwrap_model(state.model, adapters=False).parameters())
    found: dict[str, Any] = {
        "model": settings["model"],
        "num_parameters": sum(p.numel() for p in parameters),
        "num_trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "optimizer": same["optimizer"],
        **{name: _plain(value) for name, value in next(iter(contract["groups"]), {}).items()},
        "lr_scheduler": settings["lr_scheduler"],
        "num_epochs": plan.num_epochs,
        "num_steps": plan.num_steps,
        "batch_size": batch_size_of(arguments["train_dataloader"]),
        **{name: _plain(arguments[name]) for name in _ARGUMENTS},
        "mixed_precision": settings["mixed_precision"],
        "device": exact["device"],
        "num_processes": exact["world_size"],
        "version_of_python": exact["python"],
        **{f"version_of_{name}": _version(name) for name in _LIBRARIES},
        "model_config": settings["config"],
    }
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
