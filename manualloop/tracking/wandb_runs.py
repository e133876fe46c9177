"""Records as rows of a run of Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manualloop.tracking.records import STEP, Numbers, load
from manualloop.types import Record, TrackedRun, Tracker


def wandb(
    project: str | None = None,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tracker:
    """Show a run in Weights & Biases.

    Each record is a row, with the names that the Trainer gives them, such as ``train/loss`` and
    ``eval/f1``, over ``train/global_step``. A run with a ``checkpoint_dir`` sends the records that
    a checkpoint knows, and continues the same run when it is resumed. Offline, where W&B cannot
    continue a run, each process writes the whole run into a folder of its own: sync the newest.

    Args:
        project: Name of the project; None leaves it to W&B.
        name: Name of the run; None takes that of the ``checkpoint_dir``, or leaves it to W&B.
        config: Settings of yours that are shown beside those of the run.
        **options: Other arguments of ``wandb.init``, such as ``entity``, ``group``, ``tags`` and
            ``mode``.

    Raises:
        ImportError: W&B is missing: ``pip install "manualloop[wandb]"``.
    """
    return _WandbRun(load("wandb", "wandb"), project, name, dict(config or {}), options)


class _WandbRun:
    def __init__(
        self,
        module: Any,
        project: str | None,
        name: str | None,
        config: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self._module, self._project, self._name = module, project, name
        self._config, self._options = config, options
        self._numbers = Numbers("wandb")
        self._run: Any = None
        self._number = 0
        self.is_live = False

    @property
    def tracker_name(self) -> str:
        return f"wandb(project={self._project!r}, name={self._name!r})"

    def open_run(self, run: TrackedRun) -> int:
        given = {
            "project": self._project,
            "name": self._name or run.name,
            "id": run.id,
            "config": run.config | self._config,
            "resume": "allow",
            # A row of somebody else in this run would move its steps, by which rows are counted.
            "reinit": "create_new",
        }
        self._run = self._module.init(**given | self._options)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)
        # One offline folder replaces another when it is synced, so each must hold the whole run.
        self.is_live = bool(self._run.offline)
        self._number = 0 if self.is_live else self._run.starting_step
        if self.is_live:
            for record in run.records:
                self(record)
        return self._number

    def __call__(self, record: Record) -> None:
        self._run.log(self._numbers.row(record), step=self._number)
        self._number += 1

    def close_run(self, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)
