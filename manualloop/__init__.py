"""The training loop you would write by hand, as functions: without its bugs, without a Trainer.

There are three levels, each built from the one below it:

1. calls: ``prepare_dataloaders``, ``train_loop``, ``evaluate_loop``, ``predict_loop``
2. a ``for`` loop: ``train_steps`` yields one ``Step`` per optimizer update
3. the parts: ``windows``, ``accumulate_gradients``, ``prepare_optimizer`` and others

Public names are loaded when they are first used, so importing this package imports nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "Accelerated": "strategy.accelerated",
    "AccumulationReport": "accumulation",
    "BatchReport": "data.inspect",
    "CheckpointError": "errors",
    "CheckpointInfo": "checkpoint.api",
    "ConfigError": "errors",
    "DataError": "errors",
    "DistributedError": "errors",
    "ManualLoopError": "errors",
    "MetricError": "errors",
    "ModelError": "errors",
    "NonFiniteError": "errors",
    "Predictions": "evaluation.predictions",
    "PredictionsComparison": "evaluation.compare",
    "PreflightReport": "forecast.report",
    "ResumeReport": "verify",
    "RunComparison": "run.compare",
    "SingleDevice": "strategy.single",
    "Step": "types",
    "Strategy": "strategy.base",
    "TrainResult": "loop",
    "TrainState": "state",
    "Update": "types",
    "Window": "types",
    "accumulate_gradients": "update",
    "apply_update": "update",
    "check_accumulation": "accumulation",
    "compare_predictions": "evaluation.compare",
    "compare_runs": "run.compare",
    "count_items": "tasks.task",
    "eject": "script.eject",
    "evaluate_loop": "evaluation.loop",
    "find_checkpoint": "checkpoint.api",
    "inspect_batch": "data.inspect",
    "launch": "strategy.launch",
    "load_checkpoint": "checkpoint.api",
    "load_metric": "evaluation.metrics",
    "plot_history": "run.plot",
    "predict_loop": "evaluation.predict",
    "preflight": "forecast.api",
    "prepare_dataloaders": "data.prepare",
    "prepare_optimizer": "optimizers.prepare",
    "prepare_scheduler": "optimizers.schedules",
    "prepare_strategy": "strategy.select",
    "save_checkpoint": "checkpoint.api",
    "train_loop": "loop",
    "train_steps": "steps",
    "verify_resume": "verify",
    "windows": "reading.reader",
    "write_model_card": "report.card",
    "write_report": "report.page",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])  # of a completion, without modules and private names


if TYPE_CHECKING:  # the same names, for readers that do not run __getattr__
    from manualloop.accumulation import AccumulationReport as AccumulationReport
    from manualloop.accumulation import check_accumulation as check_accumulation
    from manualloop.checkpoint.api import CheckpointInfo as CheckpointInfo
    from manualloop.checkpoint.api import find_checkpoint as find_checkpoint
    from manualloop.checkpoint.api import load_checkpoint as load_checkpoint
    from manualloop.checkpoint.api import save_checkpoint as save_checkpoint
    from manualloop.data.inspect import BatchReport as BatchReport
    from manualloop.data.inspect import inspect_batch as inspect_batch
    from manualloop.data.prepare import prepare_dataloaders as prepare_dataloaders
    from manualloop.errors import CheckpointError as CheckpointError
    from manualloop.errors import ConfigError as ConfigError
    from manualloop.errors import DataError as DataError
    from manualloop.errors import DistributedError as DistributedError
    from manualloop.errors import ManualLoopError as ManualLoopError
    from manualloop.errors import MetricError as MetricError
    from manualloop.errors import ModelError as ModelError
    from manualloop.errors import NonFiniteError as NonFiniteError
    from manualloop.evaluation.compare import PredictionsComparison as PredictionsComparison
    from manualloop.evaluation.compare import compare_predictions as compare_predictions
    from manualloop.evaluation.loop import evaluate_loop as evaluate_loop
    from manualloop.evaluation.metrics import load_metric as load_metric
    from manualloop.evaluation.predict import predict_loop as predict_loop
    from manualloop.evaluation.predictions import Predictions as Predictions
    from manualloop.forecast.api import preflight as preflight
    from manualloop.forecast.report import PreflightReport as PreflightReport
    from manualloop.loop import TrainResult as TrainResult
    from manualloop.loop import train_loop as train_loop
    from manualloop.optimizers.prepare import prepare_optimizer as prepare_optimizer
    from manualloop.optimizers.schedules import prepare_scheduler as prepare_scheduler
    from manualloop.reading.reader import windows as windows
    from manualloop.report.card import write_model_card as write_model_card
    from manualloop.report.page import write_report as write_report
    from manualloop.run.compare import RunComparison as RunComparison
    from manualloop.run.compare import compare_runs as compare_runs
    from manualloop.run.plot import plot_history as plot_history
    from manualloop.script.eject import eject as eject
    from manualloop.state import TrainState as TrainState
    from manualloop.steps import train_steps as train_steps
    from manualloop.strategy.accelerated import Accelerated as Accelerated
    from manualloop.strategy.base import Strategy as Strategy
    from manualloop.strategy.launch import launch as launch
    from manualloop.strategy.select import prepare_strategy as prepare_strategy
    from manualloop.strategy.single import SingleDevice as SingleDevice
    from manualloop.tasks.task import count_items as count_items
    from manualloop.types import Step as Step
    from manualloop.types import Update as Update
    from manualloop.types import Window as Window
    from manualloop.update import accumulate_gradients as accumulate_gradients
    from manualloop.update import apply_update as apply_update
    from manualloop.verify import ResumeReport as ResumeReport
    from manualloop.verify import verify_resume as verify_resume
