"""Datasets from a user's own files and frames: CSV, TSV, JSON, Parquet, ``pandas.DataFrame``."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manualloop.errors import DataError
from manualloop.mistakes import LABEL_LIKE

if TYPE_CHECKING:
    from collections.abc import Iterator

_SEPARATORS = ",;\t|"
_NAMES = (*LABEL_LIKE, "text", "sentence", "content", "review", "document", "id", "name")
_BYTES_OF_HEADER = 65_536
_NUM_ROWS = 2_000  # that the first line is compared with
_SHORTEST = 0.05  # of the texts of a column are shorter than a text is expected to be


def read_rows(name: str, source: Any) -> Any:
    """Return the dataset of a split: one that is given, or one made of a file or a frame.

    Args:
        name: Name of the split, for messages.
        source: The path of a file, a frame, or anything else, which is returned as it is.

    Raises:
        DataError: The file is missing, is of another kind, or cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        source = _read_file(name, Path(source))
    if not is_frame(source):
        return source
    from manualloop.data.tables import from_frame

    advice = "Look at its columns: print(frame.dtypes), or make them texts: frame.astype(str)"
    with _explaining(f"The table of {name}", advice):
        return from_frame(source)


def is_frame(source: Any) -> bool:
    """Tell whether an object is a ``pandas.DataFrame``, without loading pandas."""
    return type(source).__name__ == "DataFrame" and hasattr(source, "columns")


def note_on_sources(datasets: Any) -> str:
    """Return the sentence that tells what ``dataset`` is in the lines of a message.

    It is empty where the caller has passed datasets, and such a variable is likely to be there.

    >>> note_on_sources({"train": "rows.csv"})
    ' Here dataset = {"train": datasets.Dataset.from_csv("rows.csv")}.'
    """
    if isinstance(datasets, Mapping):
        made = {str(name): code_of_file(rows) for name, rows in datasets.items()}
        if not any(made.values()):
            return ""
        pairs = [f'"{name}": {code or "..."}' for name, code in made.items()]
        return f" Here dataset = {{{', '.join(pairs)}}}."
    code = code_of_file(datasets)
    return f" Here dataset = {code}." if code else ""


def code_of_file(source: Any) -> str:
    """Return the code that makes a dataset of a file or a frame; empty for anything else."""
    if is_frame(source):
        return "datasets.Dataset.from_pandas(frame, preserve_index=False)"
    if not isinstance(source, str | os.PathLike):
        return ""
    path = Path(source)
    kind = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
    maker, option = f"from_{kind.get(path.suffix.lower(), 'csv')}", ""
    if maker == "from_csv":
        separator = _separator_in(path) if path.is_file() else "\t" if ".tsv" in path.name else ","
        option = "" if separator == "," else f", sep={_quoted(separator)}"
    return f'datasets.Dataset.{maker}("{path}"{option})'


def _quoted(separator: str) -> str:
    return '"\\t"' if separator == "\t" else f'"{separator}"'


def _separator_in(path: Path) -> str:
    """Return what separates the cells of a table of text, by its header without quoted parts."""
    with path.open("rb") as file:
        header = file.readline(_BYTES_OF_HEADER).decode("latin-1")
    return max(_SEPARATORS, key=re.sub('"[^"]*"', "", header).count)


def _read_file(name: str, path: Path) -> Any:
    import pandas

    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file"
        raise DataError(
            f"{name} is the path {str(path)!r}, and there is {found}. Pass the path of a CSV, "
            "JSON or Parquet file, or load a dataset: datasets.load_dataset(...)."
        )
    kind = path.suffix.lower()
    with _explaining(str(path), f'Look at its first rows: print(open("{path}").read(500))'):
        if kind in (".csv", ".tsv", ".txt"):
            return _read_csv(path)
        if kind in (".json", ".jsonl", ".ndjson"):
            return _read_json(path)
        if kind in (".parquet", ".pq"):
            return pandas.read_parquet(path)
    how = f'pandas.read_excel("{path}")' if kind in (".xlsx", ".xls", ".ods") else "pandas.read_..."
    raise DataError(
        f"{name} is the file {str(path)!r}, whose kind {kind!r} is unknown. Pass a .csv, .tsv, "
        f".json, .jsonl or .parquet file, or a pandas.DataFrame: {how}."
    )


def _read_json(path: Path) -> Any:
    """Read rows as they are written: pandas would make numbers and dates of their strings."""
    import pandas

    with path.open(encoding="utf-8-sig") as file:
        if _is_lines(path):
            return pandas.DataFrame([json.loads(line) for line in file if line.strip()])
        return pandas.DataFrame(json.load(file))


def _read_csv(path: Path) -> Any:
    """Read a table of text, whose header tells how its cells are separated."""
    import pandas

    separator, encoding = _separator_in(path), _encoding_of(path)
    frame = pandas.read_csv(path, sep=separator, encoding=encoding)
    if not isinstance(frame.index, pandas.RangeIndex):
        frame = _without_names(path, frame, separator, encoding)
    with path.open(newline="", encoding=encoding) as file, suppress(csv.Error):
        first = next(filter(None, csv.reader(file, delimiter=separator)), [])
        if len(first) == len(frame.columns) and _is_row(first, frame.head(_NUM_ROWS)):
            names = [f"column{number}" for number in range(len(frame.columns))]
            option = "" if separator == "," else f", sep={_quoted(separator)}"
            shown = ", ".join(f"{cell:.40}" for cell in first[:8])
            raise DataError(
                f"{path} has no header: its first line, {shown}, is like the rows "
                f'below it. If it is a header, pass a frame: pandas.read_csv("{path}"{option}). '
                f'Else name its columns: pandas.read_csv("{path}"{option}, names={names}).'
            )
    return frame


def _without_names(path: Path, frame: Any, separator: str, encoding: str) -> Any:
    """Return a table whose rows have more cells than its header, where those are no content.

    pandas takes the first cells of such rows for their names, so that each column has the cells of
    the one after it.

    Raises:
        DataError: They may be content.
    """
    import pandas

    option = "" if separator == "," else f", sep={_quoted(separator)}"
    numbers: Any = frame.index if frame.index.dtype.kind in "iu" else ()
    if len(numbers) and (numbers[1:] - numbers[:-1] == 1).all():
        return frame  # of R, which numbers rows without a name in the header
    with path.open(newline="", encoding=encoding) as file:
        rows = filter(None, csv.reader(file, delimiter=separator))
        names = next(rows, [])
        longer = [row for row in rows if len(row) > len(names)]
    if all(not any(row[len(names) :]) for row in longer):  # a separator ends each row
        options: Any = {"sep": separator, "encoding": encoding, "index_col": False}
        return pandas.read_csv(path, usecols=range(len(names)), **options)
    raise DataError(
        f"{path} has {len(names)} names in its header, and {len(longer[0])} cells in the row "
        f"{separator.join(longer[0])!r:.80}. Put quotes around texts that hold {separator!r}. If "
        f'the first cell names the row, pass a frame: pandas.read_csv("{path}"{option}).'
    )


def _is_row(cells: Sequence[str], frame: Any) -> bool:
    """Tell whether the first line of a table is a row, and no header.

    One cell that its column could not have tells a header: a word above numbers, a class that no
    row has, a word above sentences. A row has a value again that its column has, or a number.

    Args:
        cells: The cells of the line.
        frame: The first rows below it.
    """
    has_value, numbers = False, []
    for place, cell in enumerate(cells):
        values = frame.iloc[:, place].dropna()
        if cell.strip().lower() in _NAMES:
            return False
        if not len(values) or not cell.strip():
            continue
        texts, is_number = values.astype(str), values.dtype.kind in "biuf"
        if is_number and not _is_number(cell):
            return False
        numbers += [float(cell)] if is_number and values.dtype.kind != "b" else []
        is_there = bool((texts == cell).any())
        is_class = 2 * values.nunique() <= len(values)
        is_like_it = is_there or is_number or len(cell) >= texts.str.len().quantile(_SHORTEST)
        if not is_like_it or (is_class and not is_there and not is_number):
            return False
        has_value |= is_there or is_number
    return has_value and not _are_counted(numbers)


def _is_number(cell: str) -> bool:
    try:
        return cell in ("True", "False", "TRUE", "FALSE") or float(cell) == float(cell)
    except ValueError:
        return False


def _are_counted(numbers: Sequence[float]) -> bool:
    """Tell whether numbers are names: 0, 1, ..., as of a frame without names, or years.

    >>> _are_counted([1, 2]), _are_counted([2019, 2020, 2021]), _are_counted([6, 148, 72])
    (True, True, False)
    """
    steps = {after - before for before, after in pairwise(numbers)}
    starts_as_names = len(numbers) > 1 and numbers[0] in (0, 1) and steps == {1}
    return starts_as_names or (len(numbers) > 2 and len(steps) == 1 and steps.pop() > 0)


def _encoding_of(path: Path) -> str:
    """Return the encoding of a text file, which is UTF-8 or, by its first bytes, UTF-16.

    Raises:
        DataError: It is another one, which the bytes do not tell.
    """
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        separator = _separator_in(path)
        option = "" if separator == "," else f", sep={_quoted(separator)}"
        raise DataError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} in line {line}. Older Windows "
            f"programs write cp1252; read it so, and pass the frame: pandas.read_csv("
            f'"{path}"{option}, encoding="cp1252").'
        ) from error
    return "utf-8-sig"


def _is_lines(path: Path) -> bool:
    """Tell whether a JSON file has an object in each line, instead of one list."""
    with path.open("rb") as file:
        return not file.read(_BYTES_OF_HEADER).lstrip().startswith(b"[")


@contextmanager
def _explaining(what: str, advice: str) -> Iterator[None]:
    """Name the file in the error of a library that cannot read it.

    Raises:
        DataError: The library raised an error.
    """
    try:
        yield
    except DataError:
        raise
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise DataError(f"{what} cannot be read: {found}. {advice}.") from error
