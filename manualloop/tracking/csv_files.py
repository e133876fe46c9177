"""Records as rows of a CSV file, which may hold several runs."""

from __future__ import annotations

import csv
import json
import os
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from manualloop.checkpoint.folders import local_folder
from manualloop.errors import ConfigError
from manualloop.types import Record, TrackedRun, Tracker

_FIRST = ["run", "step", "epoch"]


def csv_file(path: str | os.PathLike[str]) -> Tracker:
    """Write each record as a row of a CSV file.

    The columns are those of ``TrainResult.to_pandas()``, after a column ``run`` that tells several
    runs in one file apart. A resumed run replaces its own rows behind the checkpoint, and leaves
    those of other runs. Only one run at a time can write to a file.

    Args:
        path: Path of the file. It is created, with its folder, if it does not exist.

    >>> import tempfile
    >>> from manualloop.types import TrackedRun
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tracker = csv_file(folder + "/history.csv")
    ...     tracker.open_run(TrackedRun("4f2a", None, [], {}))
    ...     tracker({"step": 1, "epoch": 0.5, "loss": 0.7})
    ...     tracker.close_run(True)
    ...     print(Path(folder, "history.csv").read_text().strip())
    0
    run,step,epoch,loss
    4f2a,1,0.5,0.7
    """
    return _CsvFile(local_folder(path, "path"))


class _CsvFile:
    is_live = True  # what is behind the checkpoint is written again by open_run

    def __init__(self, path: Path) -> None:
        self._path, self._id = path, ""
        self._columns: list[str] = []
        self._file: TextIO | None = None

    @property
    def tracker_name(self) -> str:
        return f"csv_file({str(self._path)!r})"

    def open_run(self, run: TrackedRun) -> int:
        self._id = run.id
        self._path.parent.mkdir(parents=True, exist_ok=True)
        columns, rows = self._read()
        rows = [row for row in rows if row["run"] != run.id]
        self._rewrite(columns, rows + [self._row(record) for record in run.records])
        return len(run.records)

    def __call__(self, record: Record) -> None:
        row = self._row(record)
        if not row.keys() <= set(self._columns):
            columns, rows = self._read()
            self._rewrite(columns, [*rows, row])
            return
        assert self._file is not None
        end = self._file.tell()
        try:
            self._file.write(_line(row.get(name) for name in self._columns))
            self._file.flush()
        except BaseException:
            os.ftruncate(self._file.fileno(), end)  # no half row, such as on a full disk
            raise

    def close_run(self, is_finished: bool) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _row(self, record: Record) -> dict[str, Any]:
        values = {name: _cell(value) for name, value in record.items()}
        return {"run": self._id, **values}

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return columns and rows of the file as it is.

        Raises:
            ConfigError: It is a file of something else.
        """
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return [], []
        except UnicodeDecodeError:
            text = "\0"
        whole = text[: text.rfind("\n") + 1]  # a killed process may have left half a row
        columns, *rows = _cells(whole) or [[]]
        if text and columns[:3] != _FIRST:
            raise ConfigError(
                f"{self._path} is there, and is not a file of csv_file: it does not begin with the "
                f"columns {', '.join(_FIRST)}. Name another file."
            )
        return columns, [dict(zip(columns, row, strict=False)) for row in rows]

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self.close_run(False)
        self._columns = list(dict.fromkeys([*_FIRST, *columns, *(n for row in rows for n in row)]))
        aside = self._path.with_name(f".{self._path.name}.tmp")
        with open(aside, "w", encoding="utf-8", newline="") as file:
            file.write(_line(self._columns))
            file.writelines(_line(row.get(name) for name in self._columns) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self._path)
        self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115


def _cells(text: str) -> list[list[str]]:
    """Return the cells of all rows, however long: such as the texts that an evaluation returned."""
    before = csv.field_size_limit(max(len(text), 1))
    try:
        return [*csv.reader(StringIO(text, newline=""))]
    finally:
        csv.field_size_limit(before)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _line(cells: Any) -> str:
    text = StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
