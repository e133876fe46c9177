"""Records as metrics of a run of MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from manualloop.tracking.records import Numbers, load
from manualloop.types import Record, TrackedRun, Tracker, flat

_TAG = "manualloop.run"
_NOT_IN_NAMES = re.compile(r"[^/\w.\- ]")
_MAX_PARAMS, _MAX_LENGTH, _LONGEST_NAME = 100, 500, 250


def mlflow(
    experiment: str | None = None,
    *,
    name: str | None = None,
    tracking_uri: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Tracker:
    """Show a run in MLflow.

    Metrics have the names that the Trainer gives them, such as ``train/loss`` and ``eval/f1``, over
    the updates, and the settings of the run are its params. A run with a ``checkpoint_dir`` sends
    the records that a checkpoint knows, and continues the same run when it is resumed.

    Args:
        experiment: Name of the experiment, which is created if it does not exist; None leaves it to
            MLflow.
        name: Name of the run; None takes that of the ``checkpoint_dir``, or leaves it to MLflow.
        tracking_uri: Where the runs are kept, such as a folder, a database or a server; None leaves
            it to MLflow.
        config: Settings of yours that become params beside those of the run.
        tags: Tags of the run.

    Raises:
        ImportError: MLflow is missing: ``pip install "manualloop[mlflow]"``.
    """
    module = load("mlflow", "mlflow")
    return _MlflowRun(module, experiment, name, tracking_uri, dict(config or {}), dict(tags or {}))


class _MlflowRun:
    def __init__(
        self,
        module: Any,
        experiment: str | None,
        name: str | None,
        tracking_uri: str | None,
        config: dict[str, Any],
        tags: dict[str, str],
    ) -> None:
        self._module, self._uri = module, tracking_uri
        self._experiment, self._name, self._config, self._tags = experiment, name, config, tags
        self._numbers = Numbers("mlflow")
        self._client: Any = None
        self._run_id = ""
        self._seen: set[tuple[str, int]] | None = set()

    @property
    def tracker_name(self) -> str:
        return f"mlflow({self._experiment!r}, name={self._name!r})"

    def open_run(self, run: TrackedRun) -> int:
        self._client = self._module.MlflowClient(tracking_uri=self._uri)
        experiment_id = self._find_experiment()
        found = self._client.search_runs([experiment_id], f"tags.`{_TAG}` = '{run.id}'")
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            tags = {**self._tags, _TAG: run.id}
            created = self._client.create_run(
                experiment_id, tags=tags, run_name=self._name or run.name
            )
            self._run_id = created.info.run_id
        self._log_params(run.config | self._config)
        # A call of log_batch that was killed may have written some metrics of its record.
        self._seen = self._read_seen()
        has_all = [
            all((name, record["step"]) in self._seen for name in self._metrics(record))
            for record in run.records
        ]
        return has_all.index(False) if False in has_all else len(has_all)

    def __call__(self, record: Record) -> None:
        if self._seen is None:
            self._seen = self._read_seen()
        now, step = int(time.time() * 1000), record["step"]
        metrics = [
            self._module.entities.Metric(name, value, now, step)
            for name, value in self._metrics(record).items()
            if (name, step) not in self._seen
        ]
        seen, self._seen = self._seen, None  # unknown, if this is interrupted
        self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        self._seen = seen

    def close_run(self, is_finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if is_finished else "KILLED")

    def _metrics(self, record: Record) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in self._numbers(record).items():
            valid = _valid(name)
            while valid in found:  # of "C+" and "C#"
                valid = f"{valid[: _LONGEST_NAME - 1]}_"
            found[valid] = value
        return found

    def _find_experiment(self) -> str:
        name = self._experiment or _default_experiment()
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _log_params(self, config: dict[str, Any]) -> None:
        # MLflow keeps the first value of a param.
        there = self._client.get_run(self._run_id).data.params
        new = {_valid(name): str(value)[:_MAX_LENGTH] for name, value in flat(config).items()}
        params = [
            self._module.entities.Param(name, value)
            for name, value in new.items()
            if name not in there
        ]
        for begin in range(0, len(params), _MAX_PARAMS):
            part = params[begin : begin + _MAX_PARAMS]
            self._client.log_batch(self._run_id, params=part, synchronous=True)

    def _read_seen(self) -> set[tuple[str, int]]:
        """Return name and step of each metric that the run has."""
        names = self._client.get_run(self._run_id).data.metrics
        return {
            (name, metric.step)
            for name in names
            for metric in self._client.get_metric_history(self._run_id, name)
        }


def _default_experiment() -> str:
    import os

    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")


def _valid(name: str) -> str:
    """Return a name that MLflow takes: it refuses most signs of punctuation, and odd paths."""
    parts = _NOT_IN_NAMES.sub("_", name).split("/")
    return "/".join(part if part.strip(".") else f"{part}_" for part in parts)[:_LONGEST_NAME]
