"""The delivery of a run's records to its trackers: in order, each of them once.

A record beyond the newest checkpoint belongs to work that a kill would lose, and that the resumed
run makes again. So there are two kinds of trackers. One whose ``open_run`` brings its backend back
to the records of the checkpoint says so by ``is_live``, and gets each record when it is complete.
Every other one gets a record when a checkpoint knows it.

Where a tracker stands is asked of the tracker: ``open_run`` returns how many records its backend
has. Of a function without ``open_run`` it is noted after each record, in a journal that no kill can
take back. The journal is not forced to disk, which would take longer than the record. Where a
delivery ends, ``tracking.json`` takes its place, and is.
"""

from __future__ import annotations

import inspect
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from manualloop.arguments import problem_of_call
from manualloop.checkpoint.contract import Contract, version_of
from manualloop.checkpoint.files import open_regular, parse_json, read_json, read_regular
from manualloop.errors import CheckpointError, ConfigError, ManualLoopError
from manualloop.models import unwrap_model
from manualloop.notices import say
from manualloop.reading.describe import batch_size_of
from manualloop.state import TrainState
from manualloop.types import Plan, Record, TrackedRun, Tracker

TRACKING = "tracking.json"
_JOURNAL = ".tracking.journal"
_MAX_BYTES, _MAX_JOURNAL = 1 << 20, 1 << 30
_SECONDS_BETWEEN_TRIES = 60.0


class Notes(NamedTuple):
    """The content of ``tracking.json``.

    Attributes:
        id: The id of the run; empty where runs send no records.
        directory: The folder it was written in, by which a copy of it is told.
        delivered: Number of records that each tracker has, by its name.
    """

    id: str
    directory: str
    delivered: dict[str, int]


@dataclass
class _Receiver:
    """A tracker and how far it is.

    Attributes:
        function: The tracker.
        name: Its name in messages and notes.
        position: Number of records it has.
        is_open: Whether it takes records.
        is_live: Whether it takes them before a checkpoint knows them.
        is_noted: Whether its position is noted after each record.
        error: What it raised at the next record, or None.
        next_try: Time before which that record is not sent again.
    """

    function: Tracker
    name: str
    position: int = 0
    is_open: bool = False
    is_live: bool = False
    is_noted: bool = False
    error: Exception | None = None
    next_try: float = 0.0


class Delivery:
    """The trackers of a run.

    Args:
        trackers: Functions of a record; none on other ranks than 0.
        directory: Folder of the run's checkpoints; None without one.
    """

    def __init__(self, trackers: Sequence[Tracker], directory: Path | None) -> None:
        names = _names_of(trackers)
        self._receivers = [_Receiver(*pair) for pair in zip(trackers, names, strict=True)]
        self._directory = directory
        self._notes = Notes(secrets.token_hex(8), str(directory), {})
        self._settled: dict[str, int] = {}  # what is in the notes on the disk
        self._journal: int | None = None  # its descriptor, while there is something in it
        self._is_told = False  # that the notes cannot be written

    def open(self, records: list[Record], config: dict[str, Any], *, is_finished: bool) -> None:
        """Open the trackers, and send them what they lack of the records so far.

        Args:
            records: Records of the run that its checkpoint knows.
            config: Settings of the run by name.
            is_finished: Whether there will be no others. A tracker that has all of them stays
                closed.

        Raises:
            ConfigError: A tracker cannot be opened.
        """
        if not self._receivers:
            return
        if self._directory is not None:
            self._notes = _read(self._directory) or self._notes
            if not self._notes.id:
                self._receivers = []
                return
            self._write()  # before a tracker knows the id
        name = None if self._directory is None else self._directory.name
        run = TrackedRun(self._notes.id, name, records, config)
        for receiver in self._receivers:
            receiver.position = self._notes.delivered.get(receiver.name, 0)
            if not is_finished or receiver.position < len(records):
                self._open(receiver, run)
            if receiver.is_open and (num_more := receiver.position - len(records)) > 0:
                say(
                    f"{receiver.name} has {num_more} records of steps behind the checkpoint that "
                    "the run resumes from. They stay, and are not sent again."
                )
        self.deliver(records, len(records), len(records))

    def _open(self, receiver: _Receiver, run: TrackedRun) -> None:
        opener = getattr(receiver.function, "open_run", None)
        position = None
        if opener is not None:
            try:
                position = opener(run._replace(records=[dict(record) for record in run.records]))
            except ManualLoopError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"{receiver.name} cannot be opened: {error or repr(error)}. Fix that, or leave "
                    "it out of trackers."
                ) from error
        is_kept = self._directory is not None
        receiver.is_live = not is_kept or bool(getattr(receiver.function, "is_live", False))
        receiver.is_noted = is_kept and position is None
        receiver.position = receiver.position if position is None else position
        receiver.is_open = True

    def deliver(
        self, records: list[Record], num_complete: int, num_known: int, *, is_last: bool = False
    ) -> None:
        """Send records that are due. What a tracker raises ends no run: it gets the record later.

        Args:
            records: Records of the run, oldest first.
            num_complete: Number of those before the first whose loss is not known yet.
            num_known: Number of those that a checkpoint knows.
            is_last: Whether this is the last try.
        """
        for receiver in self._receivers:
            end = num_complete if receiver.is_live else num_known
            is_due = is_last or time.monotonic() >= receiver.next_try
            if receiver.is_open and receiver.position < end and is_due:
                self._send(receiver, records, end)
        self._settle()

    def _send(self, receiver: _Receiver, records: list[Record], end: int) -> None:
        while receiver.position < end:
            record = records[receiver.position]
            try:
                receiver.function(dict(record))
            except Exception as error:
                if receiver.error is None:
                    say(
                        f"{receiver.name} raised {error!r:.300} at the record of step "
                        f"{record['step']}. The run continues, and this record and those after it "
                        "are sent again later."
                    )
                receiver.error = error
                receiver.next_try = time.monotonic() + _SECONDS_BETWEEN_TRIES
                return
            receiver.position += 1
            if receiver.is_noted:
                self._jot(receiver)
        if receiver.error is not None:
            say(f"{receiver.name} has taken the records that it had refused.")
            receiver.error = None

    def close(
        self, records: list[Record], num_complete: int, num_known: int, *, is_finished: bool
    ) -> None:
        """Send what is due, for the last time, and close the trackers.

        Args:
            records: Records of the run, oldest first.
            num_complete: Number of those before the first whose loss is not known.
            num_known: Number of those that a checkpoint knows.
            is_finished: Whether the run has come to its end.
        """
        self.deliver(records, num_complete, num_known, is_last=True)
        for receiver in self._receivers:
            if not receiver.is_open:
                continue
            receiver.is_open = False
            try:
                getattr(receiver.function, "close_run", lambda is_finished: None)(is_finished)
            except Exception as error:
                say(f"{receiver.name} raised {error!r:.300} when it was closed.")
                receiver.error = error
            if receiver.position < (end := num_complete if receiver.is_live else num_known):
                self._tell_missing(receiver, end - receiver.position, end, records)
            if receiver.is_noted or receiver.error is None:
                self._notes.delivered[receiver.name] = min(receiver.position, num_known)
        self._settle()

    def _tell_missing(
        self, receiver: _Receiver, num_missing: int, end: int, records: list[Record]
    ) -> None:
        line = (
            f"{receiver.name} lacks {num_missing} of {end} records, from step "
            f"{records[receiver.position]['step']} on ({receiver.error!r:.300})."
        )
        if self._directory is not None:
            line += f" They are in {self._directory}, and the same command sends them."
        say(line)

    def _jot(self, receiver: _Receiver) -> None:
        """Note where a tracker is, so that it is known if the process is killed now."""
        assert self._directory is not None
        self._notes.delivered[receiver.name] = receiver.position
        path = self._directory / _JOURNAL
        try:
            if self._journal is None:
                self._journal = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(self._journal, json.dumps({receiver.name: receiver.position}).encode() + b"\n")
        except OSError as error:
            self._tell_unwritten(path, error)

    def _settle(self) -> None:
        """Write the notes if a tracker has got something since they were written."""
        if self._directory is not None and self._notes.delivered != self._settled:
            self._write()

    def _write(self) -> None:
        """Write the notes, whole or not at all, in place of the journal."""
        assert self._directory is not None
        path = self._directory / TRACKING
        aside = path.with_name(f".{TRACKING}.tmp")
        if self._journal is not None:
            os.close(self._journal)
        self._journal = None
        try:
            with open(aside, "wb") as file:
                file.write(json.dumps(self._notes._asdict()).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            path.with_name(_JOURNAL).unlink(missing_ok=True)
            self._settled = dict(self._notes.delivered)
        except OSError as error:
            self._tell_unwritten(path, error)

    def _tell_unwritten(self, path: Path, error: OSError) -> None:
        if not self._is_told:
            say(f"{path} cannot be written ({error}): trackers may get records twice.")
        self._is_told = True


def _read(directory: Path) -> Notes | None:
    """Return the notes of a run; None if there are none, or if the folder is a copy of another."""
    try:
        content = read_json(directory / TRACKING, _MAX_BYTES)
        notes = Notes(str(content["id"]), content["directory"], content["delivered"])
        if not all(type(number) is int and number >= 0 for number in notes.delivered.values()):
            raise ValueError("a position is no number")
    except FileNotFoundError:
        return None
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        say(f"{directory / TRACKING} cannot be read ({error!r:.200}): trackers begin a new run.")
        return None
    if notes.directory != str(directory) and notes.id:
        with suppress(Exception):  # the other may be gone, or unreadable
            other = read_json(Path(notes.directory) / TRACKING, _MAX_BYTES)
            if other["id"] == notes.id:
                return None  # which still exists
    for name, position in _journal_in(directory):
        notes.delivered[name] = max(position, notes.delivered.get(name, 0))
    return notes._replace(directory=str(directory))


def _journal_in(directory: Path) -> Iterator[tuple[str, int]]:
    """Give the positions in the journal of a process that was killed, without its half lines."""
    with suppress(OSError):
        for line in read_regular(directory / _JOURNAL, _MAX_JOURNAL)[0].splitlines():
            with suppress(ValueError, AttributeError, RecursionError):
                for name, position in parse_json(line).items():
                    if type(position) is int and position >= 0:
                        yield name, position


def send_nothing(directory: Path) -> None:
    """Let the runs in a folder send no records: they rehearse, as those of ``verify_resume``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TRACKING).write_text(json.dumps(Notes("", str(directory), {})._asdict()))


def _names_of(trackers: Sequence[Tracker]) -> list[str]:
    """Return a name for each tracker, which is the same when the script is started again."""
    names: list[str] = []
    counts: Counter[str] = Counter()
    for tracker in trackers:
        function: Any = tracker
        while isinstance(function, partial):
            function = function.func
        qualname = getattr(function, "__qualname__", type(function).__qualname__)
        name = str(getattr(function, "tracker_name", qualname))  # of ours, with what it writes to
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return names


def check_trackers(trackers: object) -> None:
    """Check the argument ``trackers`` of ``train_loop``.

    Raises:
        ConfigError: It is not a list of functions that can be called with a record.
    """
    if not isinstance(trackers, list | tuple):
        raise ConfigError(
            f"trackers is a {type(trackers).__name__}, not a list of functions. Write a list, also "
            'of one: trackers=[csv_file("history.csv")].'
        )
    problems = []
    for tracker in trackers:
        module = getattr(tracker, "__module__", None) or ""
        if inspect.isfunction(tracker) and module.startswith("manualloop.tracking."):
            problems.append(
                f"trackers holds the function {tracker.__name__} itself. Call it: "
                f"trackers=[{tracker.__name__}(...)]."
            )
        elif not callable(tracker) or isinstance(tracker, type):
            problems.append(
                f"trackers holds {tracker!r:.60}, which is no function. Pass functions of a "
                "record: trackers=[lambda record: ...]."
            )
        else:
            problems += filter(None, [problem_of_call("trackers", tracker)])
    if problems:
        raise ConfigError("\n".join(problems))


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
        **{f"version_of_{name}": version_of(name) for name in _LIBRARIES},
        "model_config": settings["config"],
    }
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
