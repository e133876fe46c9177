"""The ``checkpoint_dir`` of ``train_loop``: locked, resumed from, and written to."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from manualloop.arguments import is_count
from manualloop.checkpoint.api import put_found, read_found, write_checkpoint
from manualloop.checkpoint.contract import Contract, check_contract, check_finished
from manualloop.checkpoint.folders import explain_disk, free_bytes, local_folder, locked
from manualloop.checkpoint.manifest import Found, find_best, find_folders, find_last
from manualloop.checkpoint.parts import saved_part
from manualloop.checkpoint.restore import Saved
from manualloop.checkpoint.snapshot import rehearse
from manualloop.errors import CheckpointError, ConfigError
from manualloop.models import is_sharded
from manualloop.notices import say, warn
from manualloop.run.history_file import HISTORY, HistoryFile, read_history, require_history
from manualloop.state import TrainState
from manualloop.strategy.base import Strategy, on_main
from manualloop.types import Record


class RunFolder:
    """The folder of a run that holds the lock of the folder.

    Args:
        directory: An existing folder.
        state: The state of the run.
        strategy: The strategy of the run.
        resume: As in ``train_loop``.
        keep: As in ``save_checkpoint``.
        best_metric: As in ``save_checkpoint``.

    Attributes:
        directory: The folder.
    """

    def __init__(
        self,
        directory: Path,
        state: TrainState,
        strategy: Strategy,
        *,
        resume: bool | Literal["auto"],
        keep: int,
        best_metric: str | None,
    ) -> None:
        self.directory, self._state, self._strategy = directory, state, strategy
        self._resume, self._keep, self._best_metric = resume, keep, best_metric
        self._history: HistoryFile | None = None
        self._num_lost = 0  # records that the checkpoint knows of, and that cannot be read

    def resume(self, contract: Contract) -> tuple[dict[str, Any], list[Record]]:
        """Load the newest checkpoint that is whole, if there is one and ``resume`` allows it.

        Args:
            contract: The contract of the run.

        Returns:
            The notes that ``save`` was given, and the records of the run; both empty for a new run.

        Raises:
            CheckpointError: The folder is another run's. Nothing was loaded.
        """
        found = on_main(self._strategy, self._find)
        notes: dict[str, Any] = {}
        is_finished = False
        if found is not None:
            saved = read_found(found, self._state, self._strategy)
            is_finished = on_main(self._strategy, lambda: self._is_finished(found, saved, contract))
            if is_finished:
                say(
                    f"the run in {self.directory} is finished: nothing is trained, and its "
                    f"result is returned from {found.path.name}."
                )
            else:
                say(f"resuming from {found.path}.")
            notes = put_found(found, saved, self._state, self._strategy).run
            self._state.is_resumed = not is_finished  # there is nothing to tell of a run to come
        records = on_main(self._strategy, lambda: self._open_history(found, notes))
        self._num_lost = notes.get("num_records", 0) - len(records)
        return notes, records

    def _is_finished(self, found: Found, saved: Saved, contract: Contract) -> bool:
        """Tell whether a checkpoint leaves nothing to do; refuse one of another run.

        Raises:
            CheckpointError: The run is over, and another one than that at hand; or it is not, and
                trains on other data.
        """
        before: Contract | None = (found.manifest or {})["contract"]
        if before is None:
            return False
        is_finished = _is_over(contract["ends"], saved)
        was_finished = _is_over(before.get("ends", {}), saved)
        if is_finished or was_finished:
            check_finished(
                before,
                contract,
                self.directory,
                was_finished=was_finished,
                is_extended=not is_finished,
            )
        check_contract(before, contract)
        return is_finished

    def _find(self) -> Found | None:
        directory = self.directory
        require_history(directory)
        if self._resume is False and (find_folders(directory) or (directory / HISTORY).exists()):
            raise CheckpointError(
                f"{directory} holds a run, and resume=False begins a new one. Give it another "
                'checkpoint_dir, remove this one, or resume it: resume="auto".'
            )
        found = find_last(directory)
        if found is None and self._resume is True:
            raise CheckpointError(
                f"There is no checkpoint in {directory} to resume from. Check the path, or let "
                'resume="auto" begin if there is none.'
            )
        return found

    def _open_history(self, found: Found | None, notes: dict[str, Any]) -> list[Record]:
        """Return the records of the run up to a checkpoint; later ones are written after them."""
        directory = self.directory
        records: list[Record] = []
        if found is not None:
            self._set_aside_damaged(found.path)
            records = read_history(directory, notes.get("num_records", 0))
        with explain_disk(directory):
            self._history = HistoryFile(
                directory,
                self._state.progress.num_steps,
                len(records),
                notes.get("num_records", 0) - len(records),
            )
        return records

    def find_checkpoints(self) -> tuple[Path | None, Path | None]:
        """Return the folders of the best and of the newest checkpoint. Call on every rank."""
        return on_main(self._strategy, self._find_checkpoints)

    def _find_checkpoints(self) -> tuple[Path | None, Path | None]:
        entries = find_folders(self.directory)
        best = find_best(entries)
        last = next((entry.path for entry in entries if entry.manifest is not None), None)
        return None if best is None else best.path, last

    def rehearse(self, notes: dict[str, Any]) -> None:
        """Do what a save does before it writes. Collective.

        Raises:
            CheckpointError: A part of the state cannot be saved; the message names it.
        """
        if not is_sharded(self._state.model):  # asking for its state would make it
            rehearse(self._state, self._strategy, notes)

    def save(
        self,
        notes: dict[str, Any],
        records: list[Record],
        metrics: dict[str, Any],
        scored: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Write records and a checkpoint, then remove old ones. Collective.

        Args:
            notes: Notes that ``resume`` will return.
            records: All records of the run, complete.
            metrics: Metrics of the present weights; empty if they were not evaluated.
            scored: Function that returns the weights with these metrics, if they are others than
                those that are trained.
        """
        on_main(self._strategy, lambda: self.write_records(records))
        write_checkpoint(
            self.directory,
            self._state,
            self._strategy,
            metrics,
            self._best_metric,
            notes | {"num_records": len(records) + self._num_lost},
            self._keep,
            scored,
        )

    def write_records(self, records: list[Record]) -> None:
        """Append new records to the history file."""
        if self._history is not None:
            with explain_disk(self.directory):
                self._history.write(records)

    def write_times(self) -> None:
        """Append where the time of this process went."""
        times = self._state.times
        if self._history is not None and times.total:
            with explain_disk(self.directory):
                self._history.write_times(times.as_dict())

    def check_space(self) -> None:
        """Refuse a run whose first checkpoint has no room; warn if the later ones have none."""
        on_main(self._strategy, self._check_space)

    def _check_space(self) -> None:
        size = _estimate(self._state)
        free = free_bytes(self.directory)
        if free is None:
            return
        if free < size:
            raise CheckpointError(
                f"{self.directory} has {free / 1e6:.0f} MB free, and a checkpoint of this run "
                f"takes about {size / 1e6:.0f} MB. Make room, or use another checkpoint_dir."
            )
        there = sum(entry.manifest is not None for entry in find_folders(self.directory))
        if free < size * (self._keep + 1 - there):
            warn(
                f"{self.directory} has {free / 1e6:.0f} MB free, and {self._keep} checkpoints "
                f"and the one that is being written take about {size * (self._keep + 1) / 1e6:.0f} "
                "MB: the disk may fill up. Keep fewer: keep_checkpoints=1."
            )

    def _set_aside_damaged(self, last: Path) -> None:
        """Rename the folders that are newer than the checkpoint the run resumes from."""
        for entry in find_folders(self.directory):
            if entry.path == last:
                break
            aside = f"damaged-{entry.path.name}-{secrets.token_hex(2)}"
            entry.path.rename(entry.path.with_name(aside))


def _is_over(ends: Mapping[str, Any], saved: Saved) -> bool:
    """Tell whether a checkpoint is at one of the ends of a run, and its evaluations are made."""
    progress, patience = saved.values["progress"], ends.get("patience")
    if saved.run.get("is_pending"):
        return False
    evaluations, num_since_best = saved.run.get("evaluations"), 0
    if isinstance(evaluations, Mapping):  # a list in older checkpoints
        num_since_best = evaluations["num_since_best"]
    if patience is not None and num_since_best >= patience:
        return True
    if ends.get("num_epochs") is not None:
        return bool(progress["epoch"] >= ends["num_epochs"])
    return ends.get("max_steps") is not None and bool(progress["num_steps"] >= ends["max_steps"])


def check_folder(checkpoint_dir: object, resume: object, keep: object) -> None:
    """Check the arguments of ``train_loop`` that concern its folder.

    Raises:
        ConfigError: What does not fit together, every problem on a line of its own.
    """
    problems = []
    if checkpoint_dir is not None:
        try:
            local_folder(checkpoint_dir)
        except ConfigError as error:
            problems.append(str(error))
    if resume not in (True, False, "auto"):
        problems.append(f'resume={resume!r} is none of "auto", True, False.')
    if resume is True and checkpoint_dir is None:
        problems.append("resume=True needs the checkpoint_dir to resume from.")
    if not is_count(keep):
        problems.append(f"keep_checkpoints must be a whole number of at least 1, got {keep!r}.")
    if problems:
        raise ConfigError("\n".join(problems))


@contextmanager
def open_run_folder(
    checkpoint_dir: str | os.PathLike[str] | None,
    state: TrainState,
    strategy: Strategy,
    resume: bool | Literal["auto"],
    keep: int,
    best_metric: str | None,
) -> Iterator[RunFolder | None]:
    """Lock the folder of a run, on rank 0; yield None without a folder. Collective.

    Raises:
        CheckpointError: It cannot be written to, or another run holds it.
    """
    if checkpoint_dir is None:
        yield None
        return
    directory = local_folder(checkpoint_dir)
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(locked(directory))
            with explain_disk(directory):
                _probe(directory)

        on_main(strategy, enter)
        yield RunFolder(
            directory, state, strategy, resume=resume, keep=keep, best_metric=best_metric
        )


def _probe(directory: Path) -> None:
    """Write and remove a file, so that a folder that is not writable fails now."""
    path = directory / f".probe-{secrets.token_hex(4)}"
    try:
        path.write_bytes(b"manualloop")
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def _estimate(state: TrainState) -> int:
    """Return about how many bytes a checkpoint takes, before the optimizer has its state."""
    values = saved_part(state.model).state_dict().values()
    weights = sum(value.nbytes for value in values if isinstance(value, Tensor))
    moments = 0
    for group in state.optimizer.param_groups:
        num_moments = 2 if "betas" in group else int(bool(group.get("momentum")))
        moments += num_moments * sum(p.nbytes for p in group["params"] if isinstance(p, Tensor))
    return int(weights + moments)
