"""``history.jsonl``: the records of a run over all its processes, one a line, only ever appended.

Each process that resumes first writes a line with its first step and the number of records that its
checkpoint knew of. Records that an earlier process wrote beyond those belong to updates that were
lost with it, so readers leave them out. The last line of a process tells where its time went.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from manualloop.checkpoint.nested import as_json, from_json, parse_json

HISTORY = "history.jsonl"
_FROM, _KNOWN = "from_step", "num_records"


class HistoryFile:
    """Appends to the history file of a run.

    Args:
        directory: Folder of the run's checkpoints.
        from_step: Step at which this process begins.
        num_records: Number of records of the run until then.
    """

    def __init__(self, directory: Path, from_step: int, num_records: int) -> None:
        self._path = directory / HISTORY
        self._num_written = num_records
        if self._path.exists():
            self._append([{_FROM: from_step, _KNOWN: num_records}])

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append those records of the list that are not there yet, and force them to disk."""
        new = records[self._num_written :]
        if new:
            self._append(new)
        self._num_written = len(records)

    def write_times(self, times: dict[str, float]) -> None:
        """Append where the time of this process went, which is not a record of the run."""
        self._append([{"times": times}])

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(as_json(record), allow_nan=False) + "\n" for record in records)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with open(descriptor, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                text = "\n" + text  # after the half line of a process that was killed
            file.write(text.encode())
            os.fsync(descriptor)


def read_history(directory: Path) -> list[dict[str, Any]]:
    """Return the records of a run, oldest first; none if its folder has no history file."""
    records: list[dict[str, Any]] = []
    try:
        lines = (directory / HISTORY).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = from_json(parse_json(line))
        except (ValueError, RecursionError):
            continue  # half a line: its writer was killed, and no checkpoint counts it
        if isinstance(record, dict) and _FROM in record:
            del records[record[_KNOWN] :]
        elif isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
