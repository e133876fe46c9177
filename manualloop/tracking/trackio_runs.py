"""Records as rows of a run of Trackio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manualloop.tracking.records import Numbers, load
from manualloop.types import Record, TrackedRun, Tracker


def trackio(
    project: str,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tracker:
    """Show a run in Trackio: ``trackio show``.

    Each record is a row, with the names that the Trainer gives them, such as ``train/loss`` and
    ``eval/f1``. A run with a ``checkpoint_dir`` sends the records that a checkpoint knows, and
    continues the same run when it is resumed.

    Args:
        project: Name of the project.
        name: Name of the run, to which the first digits of its id are added, so that another run of
            this name is another one; None takes that of the ``checkpoint_dir``.
        config: Settings of yours that are shown beside those of the run.
        **options: Other arguments of ``trackio.init``, such as ``group`` and ``space_id``.

    Raises:
        ImportError: Trackio is missing: ``pip install "manualloop[trackio]"``.
    """
    return _TrackioRun(load("trackio", "trackio"), project, name, dict(config or {}), options)


class _TrackioRun:
    def __init__(
        self,
        module: Any,
        project: str,
        name: str | None,
        config: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self._module, self._project, self._name = module, project, name
        self._config, self._options = config, options
        self._numbers = Numbers("trackio")
        self._run: Any = None

    @property
    def tracker_name(self) -> str:
        return f"trackio({self._project!r}, name={self._name!r})"

    def open_run(self, run: TrackedRun) -> int | None:
        self._run = self._module.init(
            project=self._project,
            name=f"{self._name or run.name or 'run'}-{run.id[:6]}",
            config=run.config | self._config,
            resume="allow",
            **self._options,
        )
        if self._options.keys() & {"space_id", "server_url"}:
            return None  # its rows are elsewhere
        storage = load("trackio.sqlite_storage", "trackio").SQLiteStorage
        return len(storage.get_logs(self._project, self._run.name))

    def __call__(self, record: Record) -> None:
        self._run.log(self._numbers.row(record), step=record["step"])

    def close_run(self, is_finished: bool) -> None:
        self._run.finish()
