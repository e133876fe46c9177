"""``history.jsonl``: the records of a run over all its processes, one a line, only ever appended.

A process begins with a line that says from which step it goes on, and how many records its
checkpoint knew of. What others had written beyond those was lost with them, so readers leave it
out: the later run wins. It ends with a line that says where its time went, if it can.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from manualloop.checkpoint.nested import as_json, from_json

LEDGER = "history.jsonl"
_FROM, _KNOWN = "from_step", "num_records"


class Ledger:
    """Appends to the ledger of a folder.

    Args:
        directory: Of the checkpoints.
        from_step: At which this process begins.
        num_records: Of the run until then.
    """

    def __init__(self, directory: Path, from_step: int, num_records: int) -> None:
        self._path = directory / LEDGER
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
        """Append where the time of a process went; it is no record of the run."""
        self._append([{"times": times}])

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(as_json(record), allow_nan=False) + "\n" for record in records)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with open(descriptor, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                text = "\n" + text  # behind the half line of a process that was killed
            file.write(text.encode())
            os.fsync(descriptor)


def read_ledger(directory: Path) -> list[dict[str, Any]]:
    """Return the records of a folder's run, oldest first; none if there is no ledger."""
    records: list[dict[str, Any]] = []
    try:
        lines = (directory / LEDGER).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line, object_hook=from_json)
        except ValueError:
            continue  # half a line: its writer was killed, and nothing refers to it
        if isinstance(record, dict) and _FROM in record:
            del records[record[_KNOWN] :]
        elif isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
