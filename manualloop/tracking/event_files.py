"""Records as scalars in the event files of TensorBoard."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manualloop.checkpoint.folders import local_folder
from manualloop.tracking.records import Numbers, load
from manualloop.types import Record, TrackedRun, Tracker


def tensorboard(
    directory: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None
) -> Tracker:
    """Show a run in TensorBoard: ``tensorboard --logdir runs``.

    Scalars have the names that the Trainer gives them, such as ``train/loss`` and ``eval/f1``, over
    the updates. The settings of the run are a text, and the hyperparameters of its tab HPARAMS. A
    resumed run writes its event file again up to the checkpoint, with the times of the first one.

    Args:
        directory: Folder of the event files. Each run has its own, usually inside one ``--logdir``.
        config: Settings of yours that are shown beside those of the run.

    Raises:
        ImportError: TensorBoard is missing: ``pip install "manualloop[tensorboard]"``.
    """
    load("tensorboard", "tensorboard")
    writer = load("torch.utils.tensorboard", "tensorboard")
    return _EventFile(local_folder(directory, "directory"), dict(config or {}), writer)


class _EventFile:
    is_live = True  # what is behind the checkpoint is written again by open_run

    def __init__(self, directory: Path, config: dict[str, Any], module: Any) -> None:
        self._directory, self._config, self._module = directory, config, module
        self._numbers = Numbers("tensorboard")
        self._writer: Any = None

    @property
    def tracker_name(self) -> str:
        return f"tensorboard({str(self._directory)!r})"

    def open_run(self, run: TrackedRun) -> int:
        self._directory.mkdir(parents=True, exist_ok=True)
        suffix = f".{run.id}"
        before = sorted(self._directory.glob(f"events.out.tfevents.*{suffix}"))
        times = _times(before)
        _make_way(before)
        self._writer = self._module.SummaryWriter(
            str(self._directory),
            purge_step=0,  # hides the events of the file before
            flush_secs=10,
            filename_suffix=suffix,
        )
        self._write_settings(run.config | self._config)
        for record in run.records:
            self._write(record, times)
        self._writer.flush()
        return len(run.records)

    def __call__(self, record: Record) -> None:
        self._write(record, {})

    def close_run(self, is_finished: bool) -> None:
        self._writer.close()

    def _write(self, record: Record, times: Mapping[tuple[str, int], float]) -> None:
        step = record["step"]
        for name, value in self._numbers(record).items():
            self._writer.add_scalar(name, value, step, walltime=times.get((name, step)))

    def _write_settings(self, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, indent=2, default=str)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)
        plain = {n: v for n, v in settings.items() if isinstance(v, bool | int | float | str)}
        hparams = self._module.summary.hparams(plain, {"train/loss": None})
        for summary in hparams:
            self._writer.file_writer.add_summary(summary, 0)


def _make_way(files: list[Path]) -> None:
    """Let the next event file be read after those of earlier processes, and remove old ones.

    TensorBoard reads files in the order of their names, which begin with the second in which they
    were made. It never leaves a file that is deleted while it reads it, so the newest one stays.
    """
    for path in files[:-1]:
        path.unlink()
    deadline = time.monotonic() + 2.0
    while files and _next_name() <= files[-1].name:
        if time.monotonic() > deadline:  # the clock was set back
            files.pop().unlink()
        time.sleep(0.01)


def _next_name() -> str:
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}."


def _times(paths: list[Path]) -> dict[tuple[str, int], float]:
    """Return when each scalar of some event files was written, by its name and step."""
    if not paths:
        return {}
    loader = load("tensorboard.backend.event_processing.event_file_loader", "tensorboard")
    return {
        (value.tag, event.step): event.wall_time
        for path in paths
        for event in loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
