"""What is done to the rows of a dataset, as objects that can be sent to other processes.

``dataset.map`` of a stream runs in the workers of a loader. Functions that are defined inside
functions cannot be sent to workers that are spawned, as on macOS and Windows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from manualloop.data.splits import Rows, fix_of
from manualloop.errors import DataError
from manualloop.mistakes import fill_argument, filter_missing, no_tokens_fix
from manualloop.tasks.made import Making, place_in_batch
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.tasks.texts import are_cut
from manualloop.tasks.words import require_spaces

QUOTES = '""'  # an empty string, as code


CUT = "is_cut_off"
"""Column that notes which texts are cut off. It is kept with the tokens, where ``map`` caches."""

ORIGIN = "overflow_to_sample_mapping"
"""Column that tells of which row of a batch each row is made, under transformers' name for it."""

COUNTS = "counts of preprocess"
"""Column of what ``preprocess`` counts, in the first row of each batch, where ``map`` caches."""

_ENDLESS = 1_000_000  # transformers' number for a tokenizer without a limit is far above


def is_empty(value: Any) -> bool:
    """Tell whether a cell is empty: None, NaN, or an empty string.

    >>> [is_empty(value) for value in (None, float("nan"), "", " ", 0, [])]
    [True, True, True, False, False, False]
    """
    return value is None or (isinstance(value, float) and value != value) or value == ""


@dataclass(frozen=True)
class Fill:
    """Replaces empty cells.

    Attributes:
        values: What an empty cell becomes, by the name of its column.
    """

    values: Mapping[str, Any]

    def __call__(self, rows: Rows) -> Rows:
        """Return the columns with every cell filled."""
        return {
            name: [value if is_empty(cell) else cell for cell in rows[name]]
            for name, value in self.values.items()
        }


@dataclass(frozen=True)
class Encode:
    """Turns texts into tokens.

    Attributes:
        tokenizer: The tokenizer.
        texts: One column of text, or two for pairs.
        options: Arguments of the tokenizer.
        stream: Name of the stream whose rows are checked on the way; None for a dataset, whose rows
            were checked before.
        key: Key of the stream among the splits, as code; None if there is no mapping.
        marks: Whether a column notes which texts are cut off, where the tokenizer tells.
    """

    tokenizer: Any
    texts: tuple[str, ...]
    options: Mapping[str, Any]
    stream: str | None = None
    key: str | None = None
    marks: bool = True

    @property
    def limit(self) -> int | None:
        """Number of tokens at which texts are cut off; None if they are not."""
        own = getattr(self.tokenizer, "model_max_length", None)
        limit = self.options.get("max_length") or own
        return limit if isinstance(limit, int) and limit < _ENDLESS else None

    def __call__(self, rows: Rows) -> Rows:
        """Return what the tokenizer makes of the texts.

        Raises:
            DataError: A row of a stream has no text, or no token.
        """
        for name in self.texts if self.stream else ():
            if None in (cells := rows[name]):
                fix = f"Fill it: {fill_argument([name], QUOTES)}, or filter such rows out: "
                line = fix_of(self.key, filter_missing(name, of=""))
                self._refuse(rows, cells.index(None), f"{name}=None", fix + line)
        if self.options.get("is_split_into_words"):
            require_spaces(self.tokenizer, rows[self.texts[0]], self.texts[0])
        encoded: Rows = self.tokenizer(*(rows[name] for name in self.texts), **self.options)
        if self.stream and (row := first_without_tokens(encoded)) is not None:
            cells = {name: rows[name][row] for name in self.texts}
            line = fix_of(self.key, self.filter_call())
            fix = no_tokens_fix(self.texts, cells, self.tokenizer, line)
            self._refuse(rows, row, "no tokens", fix.removesuffix("."))
        cut = self._are_cut(rows, encoded) if self.marks and not self.stream else None
        return encoded if cut is None else {**encoded, CUT: cut}

    def _are_cut(self, rows: Rows, encoded: Rows) -> list[bool] | None:
        """Tell for each text whether tokens of it were left out; None if nobody knows."""
        is_told = bool(getattr(encoded, "encodings", None))
        if not is_told and (getattr(self.tokenizer, "is_fast", True) or self.limit is None):
            return None
        options = {k: v for k, v in self.options.items() if k not in ("truncation", "max_length")}
        names = ("text", "text_pair")
        texts = {name: rows[column] for name, column in zip(names, self.texts, strict=False)}
        return are_cut(self.tokenizer, encoded, self.limit, texts, **options)

    def filter_call(self) -> str:
        """Return the call that filters out rows of which the tokenizer makes no token."""
        arguments = ", ".join(f'row["{name}"]' for name in self.texts)
        return f'filter(lambda row: len(tokenizer({arguments})["input_ids"]) > 0)'

    def _refuse(self, rows: Rows, row: int, found: str, fix: str) -> NoReturn:
        cells = {name: cells[row] for name, cells in rows.items()}
        raise DataError(f"A row of {self.stream} has {found}: {cells!r:.200}. {fix}.")


def first_without_tokens(encoded: Rows) -> int | None:
    """Return the first row without a token; None if each has one."""
    for row, ids in enumerate(encoded.get("input_ids", ())):
        if hasattr(ids, "__len__") and len(ids) == 0:
            return row
    return None


@dataclass(frozen=True)
class Copy:
    """Gives a column a second name.

    Attributes:
        column: Its name.
        name: The second one.
    """

    column: str
    name: str

    def __call__(self, rows: Rows) -> Rows:
        """Return the column under its second name."""
        return {self.name: rows[self.column]}


@dataclass(frozen=True)
class Preprocess:
    """Runs the user's function instead of the tokenizer.

    Attributes:
        function: The function, from a batch of rows to columns.
        kept: Columns that stay beside what it returns, those of the row that each row is made of.
        label: The column of labels, which goes if the function returns ``labels``, unless it is
            one of those to keep.
        keep: Columns that skip the model.
        split: Name of the split in messages; None for a stream, whose rows have no numbers.
    """

    function: Callable[[Rows], Rows]
    kept: tuple[str, ...]
    label: str | None
    keep: tuple[str, ...] = ()
    split: str | None = None

    def __call__(self, rows: Rows, numbers: Sequence[int] = ()) -> Rows:
        """Return the columns that stay and those that the function made.

        Args:
            rows: The rows.
            numbers: Their numbers in the dataset, where they are known.

        Raises:
            DataError: It made more or fewer rows than it got, and nothing tells what of the columns
                to keep belongs to each.
        """
        if isinstance(self.function, Making):
            return self._counted(rows, numbers)
        made = dict(self.function(rows) or {})
        # A function that returns labels may also return more or fewer rows than it got.
        left = [
            name
            for name in self.kept
            if name != self.label or "labels" not in made or name in self.keep
        ]
        if (origin := made.pop(ORIGIN, None)) is not None:
            return {**{name: [rows[name][row] for row in origin] for name in left}, **made}
        stays = [name for name in left if name in self.keep and name not in made]
        if stays and made and (rows_made := len(next(iter(made.values())))) != len(rows[stays[0]]):
            raise DataError(
                f"preprocess returned {rows_made} rows for {len(rows[stays[0]])}, so nothing tells "
                f"the {stays[0]!r} of each, which keep= names. Let preprocess return a column "
                f"{stays[0]!r} with one entry for each row that it makes, or a column {ORIGIN!r} "
                "with the number of the row that each is made of, as a fast tokenizer does."
            )
        return {**{name: rows[name] for name in left}, **made}

    def _counted(self, rows: Rows, numbers: Sequence[int]) -> Rows:
        """Return what a function made that tells where its rows come from, with its counts."""
        assert isinstance(self.function, Making)

        def place(row: int) -> str:
            return f"row {numbers[row]} of {self.split}" if numbers else place_in_batch(row)

        columns, sources, counts = self.function.make(rows, place)
        others = [name for name in self.keep if name in rows and name not in columns]
        kept = {name: [rows[name][row] for row in sources] for name in others}
        counts["given"] = len(next(iter(rows.values())))
        notes = [json.dumps(counts), *[""] * (len(sources) - 1)][: len(sources)]
        return {**kept, **columns, COUNTS: notes}


@dataclass(frozen=True)
class Number:
    """Turns classes into numbers: strings, or the numbers that a split gives them.

    Attributes:
        column: Column of the labels.
        numbers: Number of each class, by its string or the number it had.
        split: Name of the split in messages.
        classes: The sentence on which classes there are.
    """

    column: str
    numbers: Mapping[Any, int]
    split: str
    classes: str

    def __call__(self, rows: Rows) -> Rows:
        """Return the labels.

        Raises:
            DataError: A row of a stream has another class.
        """
        return {self.column: [self._number(label) for label in rows[self.column]]}

    def _number(self, label: Any) -> Any:
        if isinstance(label, list | tuple):
            return [self._number(one) for one in label]
        if label is None or (not isinstance(label, str) and label < 0):  # -100 and the like
            return label
        if label not in self.numbers:
            raise DataError(
                f"A row of {self.split} has {self.column}={label!r}, which is no class. "
                f"{self.classes}"
            )
        return self.numbers[label]


@dataclass(frozen=True)
class AsZerosAndOnes:
    """Turns lists of class numbers into a row of 0 and 1 with an entry for each class.

    Attributes:
        num_classes: Number of classes.
    """

    num_classes: int

    def __call__(self, rows: Rows) -> Rows:
        """Return the labels."""
        classes = range(self.num_classes)
        for row in rows["labels"]:
            if wrong := [n for n in row if n not in classes and n != IGNORE_INDEX]:
                raise DataError(
                    f"Label {wrong[0]} in a row with labels {row} is not one of the "
                    f"{self.num_classes} classes (0..{self.num_classes - 1}). Correct the label, "
                    "or load the model with more classes: "
                    f"from_pretrained(name, num_labels={max(wrong) + 1})."
                )
        return {"labels": [[float(n in row) for n in classes] for row in rows["labels"]]}


@dataclass(frozen=True)
class Join:
    """Makes one multi-label target of several columns.

    Attributes:
        columns: Names of the columns, in the order of the classes.
    """

    columns: tuple[str, ...]

    def __call__(self, rows: Rows) -> Rows:
        """Return the labels."""
        cells = zip(*(rows[name] for name in self.columns), strict=True)
        return {"labels": [[None if x is None else float(x) for x in row] for row in cells]}


@dataclass(frozen=True)
class RequireHidden:
    """Refuses a label in a stream whose labels are hidden, as its first rows show.

    Attributes:
        split: Name of the split in messages.
        column: Column of the labels.
        fix: The line that the message ends with.
    """

    split: str
    column: str
    fix: str

    def __call__(self, rows: Rows) -> Rows:
        """Return nothing, so that the column can be removed."""
        for label in rows[self.column]:
            if not is_hidden(label):
                raise DataError(
                    f"A row of {self.split} has {self.column}={label!r}, but the labels of its "
                    f"first rows are hidden. {self.fix}"
                )
        return {}


def is_hidden(label: Any) -> bool:
    """Tell whether a label is one of those that stand for none.

    >>> [is_hidden(label) for label in (None, float("nan"), "", -1, -1.0, [-1, None], 0, [])]
    [True, True, True, True, True, True, False, False]
    """
    if isinstance(label, list | tuple):
        return len(label) > 0 and all(map(is_hidden, label))
    return is_empty(label) or label == -1
