"""Trackers, which show the records of a run in TensorBoard, W&B, MLflow, Trackio or a file.

Each of these functions returns a function of one record, for ``train_loop(..., trackers=[...])``.
Nothing is registered: a function of the user that takes a record stands in the same list.

Names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME: dict[str, str] = {
    "csv_file": "csv_files",
    "mlflow": "mlflow_runs",
    "tensorboard": "event_files",
    "trackio": "trackio_runs",
    "wandb": "wandb_runs",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:  # the same names, for readers that do not run __getattr__
    from manualloop.tracking.csv_files import csv_file as csv_file
    from manualloop.tracking.event_files import tensorboard as tensorboard
    from manualloop.tracking.mlflow_runs import mlflow as mlflow
    from manualloop.tracking.trackio_runs import trackio as trackio
    from manualloop.tracking.wandb_runs import wandb as wandb
