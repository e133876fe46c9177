"""``history.jsonl``: the records of a run over all its processes, one a line, only ever appended.

Each process that resumes first writes a line with its first step and the number of records that its
checkpoint knew of. Records that an earlier process wrote beyond those belong to updates that were
lost with it, so readers leave them out. The last line of a process tells where its time went.

Every line ends with its guard: where in the file its process began, the number of records before
that, the number of records before the line, and a checksum: ``"guard": "812.4.17-89abcdef"``. So a
damaged line is noticed, and a line that is missing too. Lines of release 0.1.0 have no guard; they
are counted.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from manualloop.checkpoint.files import open_regular, parse_json, require_regular
from manualloop.checkpoint.nested import as_json, from_json
from manualloop.errors import CheckpointError
from manualloop.notices import say
from manualloop.times import Times

HISTORY = "history.jsonl"
_FROM, _KNOWN = "from_step", "num_records"
_GUARD = r"([0-9]{1,15})\.([0-9]{1,15})\.([0-9]{1,15})-([0-9a-f]{8})"
_GUARDED = re.compile(rf'(\{{.*), "guard": "{_GUARD}"\}}'.encode())
_MAX_BYTES, _MAX_LINE_BYTES = 1 << 32, 1 << 24
_NUM_NAMED = 5


class HistoryFile:
    """Appends to the history file of a run.

    Args:
        directory: Folder of the run's checkpoints.
        from_step: Step at which this process begins.
        num_records: Number of records of the run until then.
        num_lost: Number of records before those that could not be read.
    """

    def __init__(
        self, directory: Path, from_step: int, num_records: int, num_lost: int = 0
    ) -> None:
        self._path = directory / HISTORY
        self._num_written, self._num_lost = num_records, num_lost
        self._first, self._begin = num_records + num_lost, 0
        if os.path.lexists(self._path):
            self._begin = os.lstat(self._path).st_size
            self._append([(self._first, {_FROM: from_step, _KNOWN: self._first})])

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append those records of the list that are not there yet, and force them to disk."""
        new = records[self._num_written :]
        if new:
            self._append(enumerate(new, self._num_written + self._num_lost))
        self._num_written = len(records)

    def write_times(self, times: dict[str, float]) -> None:
        """Append where the time of this process went, which is not a record of the run."""
        self._append([(self._num_written + self._num_lost, {"times": times})])

    def _append(self, records: Iterable[tuple[int, dict[str, Any]]]) -> None:
        text = b"".join(
            _line((self._begin, self._first, number), record) for number, record in records
        )
        with open(_open_own(self._path), "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                text = b"\n" + text  # after the half line of a process that was killed
            file.write(text)
            os.fsync(file.fileno())


def _open_own(path: Path) -> int:
    """Open a history file to append to it.

    A second name that it has elsewhere, as in a backup by hard links, keeps the old content.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    descriptor = open_regular(path, flags)
    if os.fstat(descriptor).st_nlink == 1:
        return descriptor
    own = path.with_name(f".{path.name}.tmp")
    try:
        with open(descriptor, "rb") as old, open(own, "xb") as new:
            while chunk := old.read(1 << 20):
                new.write(chunk)
            new.flush()
            os.fsync(new.fileno())
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)
    return open_regular(path, flags)


_Guard = tuple[int, int, int]
"""Where the process of a line began, the records before that, and those before the line."""


def _line(guard: _Guard, record: dict[str, Any]) -> bytes:
    body = json.dumps(as_json(record), allow_nan=False).encode()
    numbers = ".".join(map(str, guard))
    return body[:-1] + f', "guard": "{numbers}-{_checksum(guard, body):08x}"}}\n'.encode()


def _checksum(guard: _Guard, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(repr(guard).encode()))


def read_history(directory: Path, num_records: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first; none if its folder has no history file.

    A damaged line is reported and left out.

    Args:
        directory: Folder of the run's checkpoints.
        num_records: Number of records that the checkpoint knows of; later ones are left out.

    Raises:
        CheckpointError: The file is a link, a pipe, ..., or too large for a history.
    """
    found: dict[int, dict[str, Any]] = {}
    unreadable: list[int] = []
    number, top, process = 0, 0, -1
    for place, line in enumerate(_lines(directory), 1):
        read = _read(line)
        if read is None:
            unreadable += [place] if len(unreadable) <= _NUM_NAMED else []
            number += process < 0  # it may have been a record
            continue
        guard, record = read
        cut = record.get(_KNOWN, number)
        if guard is not None:
            cut = guard[1] if guard[0] != process else guard[2]
            process, number = guard[0], guard[2]
        elif _FROM in record:
            number = cut
        if cut < top:  # what is there from here on belongs to updates that were lost
            found, top = {n: kept for n, kept in found.items() if n < cut}, cut
        if "step" in record:
            if num_records is None or number < num_records:
                found[number] = record
            number = top = number + 1
    expected = max(found, default=-1) + 1 if num_records is None else num_records
    if len(found) < expected:
        _tell_missing(directory / HISTORY, expected - len(found), unreadable)
    return [found[n] for n in sorted(found)]


def read_times(directory: Path) -> tuple[list[Times], int]:
    """Return where the time of a run went, and in how many processes it was opened.

    A process that was killed, or had nothing to do, has no times.

    Args:
        directory: Folder of the run's checkpoints.

    Raises:
        CheckpointError: The file is a link, a pipe, ..., or too large for a history.
    """
    known = [field.name for field in fields(Times)]
    found, num_processes = [], 1
    for line in _lines(directory):
        record = (_read(line) or (None, {}))[1]
        num_processes += _FROM in record
        times = record.get("times")
        if isinstance(times, dict) and all(_is_amount(times.get(name)) for name in known):
            found.append(Times(**{name: times[name] for name in known}))
    return found, num_processes


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _lines(directory: Path) -> Iterator[bytes]:
    """Give the lines of a history file without their ends; a line that is too long is b""."""
    require_history(directory)
    try:
        descriptor = open_regular(directory / HISTORY)
    except FileNotFoundError:
        return
    with open(descriptor, "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            is_whole = len(line) < _MAX_LINE_BYTES or line.endswith(b"\n")
            while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE_BYTES)
            yield line.removesuffix(b"\n") if is_whole else b""


def require_history(directory: Path) -> None:
    """Refuse a history file that cannot be read, without opening it.

    Raises:
        CheckpointError: It is a link, a pipe, ..., or too large for a history.
    """
    path = directory / HISTORY
    try:
        if require_regular(path).st_size > _MAX_BYTES:
            raise CheckpointError(f"{HISTORY} has more than {_MAX_BYTES >> 30} GiB")
    except FileNotFoundError:
        return
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} cannot be used: {error}. Remove it, and the run resumes without the records "
            "in it; or use another checkpoint_dir."
        ) from error.__cause__


def _read(line: bytes) -> tuple[_Guard | None, dict[str, Any]] | None:
    """Return the guard and the content of a line; None if it is damaged."""
    guard = None
    if guarded := _GUARDED.fullmatch(line):
        line, guard = guarded[1] + b"}", (int(guarded[2]), int(guarded[3]), int(guarded[4]))
        if _checksum(guard, line) != int(guarded[5], 16):
            return None
    try:
        record = from_json(parse_json(line))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not _is_known(record):
        return None
    if guard is None and _has_broken_guard(record):
        return None
    return guard, record


def _is_known(record: dict[str, Any]) -> bool:
    counts = [record[name] for name in (_FROM, _KNOWN, "step") if name in record]
    if any(type(count) is not int or count < 0 for count in counts):
        return False
    return _KNOWN in record if _FROM in record else "step" in record or "times" in record


def _has_broken_guard(record: dict[str, Any]) -> bool:
    last = next(reversed(record.values()), None)
    is_guard = isinstance(last, str) and re.fullmatch(_GUARD, last) is not None
    return is_guard or "guard" in record


def _tell_missing(path: Path, num_missing: int, unreadable: list[int]) -> None:
    named = ", ".join(map(str, unreadable[:_NUM_NAMED]))
    named += ", ..." if len(unreadable) > _NUM_NAMED else ""
    why = f"damaged: line {named}" if named else "removed"
    plural = "s are" if num_missing > 1 else " is"
    say(f"{path}: {num_missing} record{plural} missing ({why}); the others are used.")
