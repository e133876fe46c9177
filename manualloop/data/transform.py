"""Random transforms: what is drawn for a row is a function of seed, epoch and row number.

The rows are transformed in the process that reads them. The epoch comes to it with the row numbers,
so workers that are kept from epoch to epoch need not be told of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manualloop.data.columns import LABELS, Taking
from manualloop.data.functions import RAW, Functions
from manualloop.data.sampler import RowNumbers
from manualloop.data.splits import TEXT_KINDS, Split, kind_of_value
from manualloop.errors import DataError
from manualloop.notices import say
from manualloop.randomness import get_random_state, is_same_state, set_random_state

if TYPE_CHECKING:
    from manualloop.data.survey import Survey

Transform: TypeAlias = Callable[[dict[str, Any], torch.Generator], Mapping[str, Any]]
"""``f(row, generator)`` returns the columns that take the place of the row's."""

_MASK = (1 << 64) - 1


def mix(number: int) -> int:
    """Return a number of 64 bits that looks random, another one for each number.

    It is the output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", 2014): a change of one bit changes half of the bits of the result.

    >>> f"{mix(0):x}"
    'e220a8397b1dcdaf'
    """
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def seeds_of_rows(seed: int, epoch: int, rows: Sequence[int], use: str) -> list[int]:
    """Return a seed for each row: a function of the run's seed, the epoch and the row's number.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch.
        rows: Numbers of the rows in the dataset.
        use: What draws. Two that draw for the same row draw other numbers.
    """
    start = mix(int.from_bytes(use.encode()[:8], "little"))
    of_epoch = mix(mix(start ^ (int(seed) & _MASK)) ^ (int(epoch) & _MASK))
    return [mix(of_epoch ^ int(row)) for row in rows]  # perhaps of NumPy, from a user's sampler


class NumberedRows(list[Any]):
    """Rows with their numbers in the dataset.

    Args:
        rows: The rows.
        numbers: Their numbers.
    """

    def __init__(self, rows: Sequence[Any], numbers: Sequence[int]) -> None:
        super().__init__(rows)
        self.numbers = numbers


class TransformedRows:
    """A dataset whose rows are transformed when they are read, and know their numbers.

    Args:
        rows: A ``datasets.Dataset``, or the first rows of a stream.
        split: Name of the split in messages.
        seed: Seed of the run.
        transform: The user's function; None leaves rows as they are.
        takes: Test for those columns that it returns which reach the batch.
        aliases: Columns that the transform gets under a second name: the second name of each.
        raw: Column whose cells, as they are in the dataset, are in ``RAW``; None: no such column.
        kept: Columns that skip the model.
        makes: Such columns that the transform makes of each row.
        kept_rows: Rows that hold the kept columns as plain values; None: ``rows`` do.
        has_labels: Whether the split has labels. Hidden ones are left out of the batch.
        are_stacked: Whether each column that is returned is stacked, which None cannot be.

    Attributes:
        rows: As the argument.
        split: As the argument.
        transform: As the argument.
        kept: Columns that skip the model, those that are made included.
        left_out: Columns that the transform returns as None.
        makes_labels: Whether the transform was seen to return other labels than the row's.
    """

    def __init__(
        self,
        rows: Any,
        split: str,
        seed: int,
        transform: Transform | None = None,
        takes: Taking | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        raw: str | None = None,
        kept: Sequence[str] = (),
        makes: Sequence[str] = (),
        kept_rows: Any = None,
        has_labels: bool = True,
        are_stacked: bool = False,
    ) -> None:
        self.rows, self.transform = rows, transform
        self.split, self._seed = split, seed
        self._takes = takes or Taking(None, takes_text=True)
        self._aliases, self._raw, self._has_labels = dict(aliases or {}), raw, has_labels
        self._copied = tuple(name for name in kept if name not in makes)
        self.kept = (*self._copied, *makes)
        self._kept_rows, self._are_stacked, self.makes_labels = kept_rows, are_stacked, False
        self.left_out: frozenset[str] = frozenset()
        self._draws_from: tuple[str, ...] = ()  # global generators that the transform draws from
        self._num_reads = 0
        self._reader: Callable[[Sequence[int]], list[Any]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.__getitems__([range(len(self))[row]])[0]

    def __getitems__(self, numbers: list[int]) -> NumberedRows:
        """Return rows, transformed as in the epoch that comes with their numbers."""
        rows = self._read(numbers)
        if self.transform is None:
            return NumberedRows(rows, numbers)
        epoch = numbers.epoch if isinstance(numbers, RowNumbers) else 0
        plain = rows if self._kept_rows is None else self._kept_rows.__getitems__(list(numbers))
        return self.transformed(rows, plain, numbers, epoch)

    def transformed(
        self, rows: Sequence[Any], plain: Sequence[Any], numbers: Sequence[int], epoch: int
    ) -> NumberedRows:
        """Return rows as they are transformed in an epoch.

        Args:
            rows: The rows.
            plain: The same rows with the kept columns as plain values.
            numbers: Their numbers.
            epoch: Number of the epoch.
        """
        seeds = seeds_of_rows(self._seed, epoch, numbers, "transform")
        generator = torch.Generator()
        self._num_reads += 1
        watches = self._num_reads & (self._num_reads - 1) == 0  # reads 1, 2, 4, 8, ...
        before = get_random_state(devices=False) if watches else None
        with global_states_kept(self._draws_from):
            made = [
                self._transformed(row, kept, number, seed, generator)
                for row, kept, number, seed in zip(rows, plain, numbers, seeds, strict=True)
            ]
        if before is not None and (moved := moved_since(before)):
            set_random_state(before)
            say(
                f"the transform of {self.split} draws from {' and '.join(map(_named, moved))}, at "
                "some rows alone: what a row becomes depends on the batch size and the number of "
                f"workers there. {_FIX}",
                from_every_rank=True,
            )
            self._draws_from += tuple(moved)
        return NumberedRows(made, numbers)

    def _read(self, numbers: Sequence[int]) -> list[Any]:
        if isinstance(self.rows, list):  # the first of a stream
            return [deepcopy(self.rows[number]) for number in numbers]
        if self._reader is None:
            from manualloop.data.arrays import ArrayReader  # loads pyarrow

            self._reader = ArrayReader(self.rows)
        return self._reader(numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}  # of parts of the table, which go with the rows

    def _transformed(
        self,
        row: Mapping[str, Any],
        kept: Mapping[str, Any],
        number: int,
        seed: int,
        generator: torch.Generator,
    ) -> dict[str, Any]:
        generator.manual_seed(seed)
        if self._draws_from:
            seed_global(self._draws_from, seed)
        if self._copied and kept is row:  # the transform may change lists of the row
            kept = {name: deepcopy(row[name]) for name in map(self._held, self._copied)}
        made = self.apply(row, number, generator)
        goes_on = {name: cell for name, cell in made.items() if self._reaches(name, cell)}
        if self._are_stacked:
            goes_on = self._complete(goes_on, number)
        if "labels" in goes_on and not self._takes.takes_text:
            for name in LABELS[1:]:  # which collators would take for the labels
                goes_on.pop(name, None)
        for name in self.kept:
            goes_on[name] = made[name] if name in made else kept[self._held(name)]
        return goes_on

    def apply(
        self, row: Mapping[str, Any], number: int, generator: torch.Generator
    ) -> Mapping[str, Any]:
        """Return what the transform makes of a row.

        Raises:
            DataError: It is no dict.
        """
        given = dict(row)
        for name, second in self._aliases.items():
            given[second] = row[name]
        given.pop(RAW, None)
        assert self.transform is not None
        try:
            made = self.transform(given, generator)
        except DataError as error:  # of a transform of ours, which does not know the number
            raise DataError(f"Row {number} of {self.split}: {error}") from error.__cause__
        if not isinstance(made, Mapping):
            raise DataError(
                f"The transform of {self.split} returned a {type(made).__name__} for row "
                f"{number}. Let it return a dict of the columns that take the place of the row's."
            )
        return made

    def _complete(self, reaching: dict[str, Any], number: int) -> dict[str, Any]:
        """Leave out the columns that are None in every row, since no tensor holds them.

        Raises:
            DataError: A column is None in some rows alone.
        """
        for name, cell in reaching.items():
            if (cell is None) is not (name in self.left_out):
                others = "values" if cell is None else "None"
                more = "; -100 stands for a class that is missing" if name in LABELS else ""
                raise DataError(
                    f"The transform of {self.split} returned {name}={cell!r:.60} for row {number}, "
                    f"and {others} for other rows. Let it return a value for every row, or for "
                    f"none{more}."
                )
        return {name: cell for name, cell in reaching.items() if cell is not None}

    def _held(self, name: str) -> str:
        if name == self._raw:
            return RAW
        return next((held for held, second in self._aliases.items() if second == name), name)

    def _reaches(self, name: str, cell: Any) -> bool:
        if name in LABELS and not self._has_labels:
            return False
        known = "labels" if name in LABELS else name
        # Asking a tensor for its kind reads a number of it.
        kind = "list" if isinstance(cell, Tensor) else kind_of_value(cell)
        return name not in self.kept and self._takes(known, kind)

    def _other_numbers(self, row: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
        """Tell which class gets another number from the transform than its name has."""
        if RAW not in self._aliases:
            return []
        number, own = _plain(row.get("labels")), _plain(made.get("labels"))
        is_other = isinstance(number, int) and isinstance(own, int) and own != number
        return [f"{own} for {row[RAW]!r}, which is {number}"] if is_other else []

    def try_out(self) -> tuple[list[str], list[str]]:
        """Transform the first rows, and report numbers that are not drawn from the generator.

        Returns:
            The columns that the transform returns and that reach the batch, and those that do not.

        Raises:
            DataError: It returns no dict, or None for some of the rows.
        """
        numbers = range(min(len(self), _NUM_TRIED))
        seeds = seeds_of_rows(self._seed, 0, numbers, "transform")
        tried: list[dict[str, Any]] = []
        reaches: dict[str, bool] = {}
        is_same, generator, moved, others = True, torch.Generator(), set[str](), list[str]()
        with global_states_kept(_GLOBAL):
            for number, seed in zip(numbers, seeds, strict=True):
                results = []
                for _ in range(2):
                    seed_global(_GLOBAL, seed)
                    before = get_random_state(devices=False)
                    row = self._read([number])[0]
                    made = self.apply(row, number, generator.manual_seed(seed))
                    moved |= set(moved_since(before))
                    results.append(made)
                is_same &= are_alike(*results)
                others += self._other_numbers(row, made)
                reaches |= {name: self._reaches(name, cell) for name, cell in made.items()}
                tried.append({name: cell for name, cell in made.items() if reaches[name]})
                self.makes_labels |= not are_alike(row.get("labels"), made.get("labels"))
        self._draws_from = tuple(name for name in _GLOBAL if name in moved)
        if not is_same:
            say(
                f"the transform of {self.split} makes two things of one row and the same "
                "generator, so what a row becomes depends on when it is read: it draws from a "
                f"generator of its own, or from the system. {_FIX}"
            )
        elif self._draws_from:
            say(
                f"the transform of {self.split} draws from "
                f"{' and '.join(map(_named, self._draws_from))}, which is seeded for each row, by "
                f"its number and the epoch. That takes time. {_FIX}"
            )
        if others:
            say(
                f"the transform of {self.split} returns other numbers for classes than those that "
                f"their names have: {', '.join(dict.fromkeys(others))}. Predictions would get "
                'wrong names. Let it return row["labels"].'
            )
        if self._are_stacked:
            empty = [{n for n, cell in one.items() if cell is None} for one in tried]
            self.left_out = frozenset(set.intersection(*empty))
            for number, one in enumerate(tried):
                self._complete(one, number)
        passed = [n for n, reach in reaches.items() if reach and n not in self.left_out]
        used = {*passed, *self.kept, *self.left_out}
        left = [name for name in reaches if name not in used]
        return passed, left


def transformed_rows(
    split: Split, functions: Functions, found: Survey, hidden: str | None, seed: int
) -> TransformedRows:
    """Return the rows of a prepared split as they are read with its transform.

    Args:
        split: The split, with all of its columns.
        functions: The functions of the split.
        found: What was found out about all splits.
        hidden: The form in which the split hides its labels; None: it does not.
        seed: Seed of the run.
    """
    label, kinds = found.columns.label, split.kinds
    rows: Any = list(islice(split.rows, _NUM_TRIED)) if split.is_stream else split.rows
    aliases = {}
    if label is not None and kinds.get(RAW) in TEXT_KINDS:
        aliases[RAW] = label
    elif label is not None and label not in kinds and "labels" in kinds:
        aliases["labels"] = label
    elif label in kinds and "labels" not in kinds:
        aliases[label] = "labels"  # hidden, so that a transform for all splits finds them
    kept = [name for name in functions.keep if name in kinds or name in aliases.values()]
    kept_rows = None
    if split.form and split.form["type"] is not None:
        kept_rows = rows if kept else None
        rows = rows.with_format(split.form["type"], **split.form["format_kwargs"])
    return TransformedRows(
        rows,
        split.name,
        seed,
        functions.transform,
        functions.takes,
        aliases=aliases,
        raw=label if RAW in kinds else None,
        kept=kept,
        makes=functions.makes,
        kept_rows=kept_rows,
        has_labels=hidden is None or bool(functions.makes),  # a mask or boxes: labels of its own
        are_stacked=functions.collate_fn is None,
    )


def transform_of(loader: Any) -> Transform | None:
    """Return the transform of a prepared loader; None if it has none."""
    dataset = getattr(loader, "dataset", None)
    dataset = getattr(dataset, "by_row", dataset)  # of a stream
    return dataset.transform if isinstance(dataset, TransformedRows) else None


def transform_note(rows: TransformedRows, found: Survey, taker: str, hidden: str | None) -> str:
    """Try a transform; return the line on which of the columns that it returns are used.

    Args:
        rows: The rows with their transform.
        found: What was found out about all splits.
        taker: Words on what takes the columns.
        hidden: The form in which the split hides its labels; None: it does not.

    Raises:
        DataError: It returns no column that is used.
    """
    passed, left = rows.try_out()
    inputs = [name for name in passed if name not in LABELS]
    has_labels = len(inputs) < len(passed)
    if not inputs:
        raise DataError(
            f"The transform of {rows.split} returns no column that the model takes{taker}, only "
            f"{', '.join((*passed, *left)) or 'nothing'}. Let it return what the model is called "
            'with: return {"pixel_values": image, "labels": row["labels"]}.'
        )
    note = f"using what transform returns: {', '.join(inputs)}{' -> labels' if has_labels else ''}"
    if rows.kept:
        note += f"; keeping {', '.join(rows.kept)}"
    if dropped := [n for n in left if n not in LABELS]:
        note += f"; dropped: {', '.join(dropped)}{taker}"
    if empty := [n for n in sorted(rows.left_out) if n not in LABELS]:
        note += f"; left out, since they are None: {', '.join(empty)}"
    if hidden is not None:
        note += f"; every {found.columns.label} is {hidden}, so there are no labels"
    elif not has_labels and (found.columns.label is not None or rows.left_out & {*LABELS}):
        note += "; it returns no labels"
    return note


_NUM_TRIED = 4
_FIX = "Draw from the second argument: torch.rand(2, generator=generator)."
_GLOBAL = ("python", "numpy", "torch")


def _plain(cell: Any) -> Any:
    """Return a number of an array or tensor as one of Python; anything else as it is."""
    is_number = isinstance(cell, Tensor | np.ndarray | np.generic) and cell.ndim == 0
    return cell.item() if is_number else cell


def _named(name: str) -> str:
    return f"the global generator of {'Python' if name == 'python' else name}"


def moved_since(before: Mapping[str, Any]) -> list[str]:
    """Name the global generators that something has drawn from since a state."""
    now = get_random_state(devices=False)
    return [name for name in _GLOBAL if not is_same_state(before[name], now[name])]


def seed_global(names: Sequence[str], seed: int) -> None:
    """Seed some of the global generators, so that none repeats the numbers of another.

    Each has a seed of its own: those of torch and NumPy are Mersenne Twisters as that which the
    transform gets, and would repeat it.
    """
    of_python, of_numpy, of_torch = (mix(seed + number) for number in (1, 2, 3))
    if "torch" in names:
        torch.default_generator.manual_seed(of_torch)  # torch.manual_seed seeds devices, too
    if "python" in names:
        random.seed(of_python)
    if "numpy" in names:
        np.random.seed(of_numpy & 0xFFFFFFFF)


@contextmanager
def global_states_kept(names: Sequence[str]) -> Iterator[None]:
    """Put global generators back afterwards; nothing is done for no names."""
    if not names:
        yield
        return
    before = get_random_state(devices=False)
    try:
        yield
    finally:
        set_random_state(before)


def are_alike(one: Any, other: Any) -> bool:
    """Tell whether two results are equal, as far as they hold numbers and texts."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(are_alike(one[k], other[k]) for k in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype.kind == "O" or one.tobytes() == other.tobytes()
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(are_alike, one, other))
    if isinstance(one, bool | int | float | str):
        other = _plain(other)
        if isinstance(other, Tensor | np.ndarray):
            return False  # a map of classes in the place of one
        return bool(one == other) or (one != one and other != other)
    return True
