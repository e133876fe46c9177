"""The table of predictions, in the dataset's order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from manualloop.data.sampler import packs_rows
from manualloop.errors import DataError
from manualloop.evaluation.columns import (
    columns_of,
    describe,
    names_of,
    to_csv,
    to_dataset,
    to_pandas,
    to_parquet,
)
from manualloop.evaluation.inputs import Inputs
from manualloop.notices import say
from manualloop.reading.sources import source_of
from manualloop.tasks.task import IGNORE_INDEX


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Predictions:
    """A table of predictions with one row per row of the dataset, in the dataset's order.

    It prints as a few words. ``table[3]`` is a row as a dict, by its place in the table;
    ``table[10:20]`` and ``table[mask]`` are smaller tables. Tables and files have the columns
    ``index``, those of ``kept``, ``prediction`` and ``label`` (its class name), ``reference`` and
    ``reference_label``, and ``score_positive`` for the probability of a class called "positive".
    Columns without content are left out; where there are no names, classes have numbers.

    Attributes:
        index: Row numbers in the dataset, int64 ``(rows,)``; None where nobody knows them, as of a
            stream that several workers read. Rows are then in the order in which they came.
        predictions: Class numbers or values ``(rows,)``; for multi-label ``(rows, classes)``, for
            tokens ``(rows, tokens)``. Rows of batches narrower than the widest are padded with
            -100. A list of one object per row where these were decoded.
        scores: Probability of each class, float32 ``(rows, classes)``; None for a regression, for
            tokens, or with a ``postprocess`` of your own.
        references: The labels, padded as ``predictions`` are; None if the data has none. Those of a
            causal language model are moved by one token, beside what predicts them.
        kept: Columns of the dataset that were kept, by name.
        names: Names of the classes in the order of their numbers; None if they have none.
        inputs: What finds the texts of rows in the dataset, as long as that exists.
        ignored: Label of the references that counts in no metric, such as that of the config for
            pixels of no class; beside -100, which never does.

    >>> table = Predictions(np.arange(3), np.array([1, 0, 1]), None, None, {"id": ["a", "b", "c"]},
    ...                     ("negative", "positive"))
    >>> table
    Predictions(3 rows; index 0 to 2; predictions: int64 (3,) positive 2, negative 1; kept: id)
    >>> table[1]
    {'index': 1, 'id': 'b', 'prediction': 0, 'label': 'negative'}
    >>> table[np.array(table.labels) == "positive"].kept
    {'id': ['a', 'c']}
    """

    index: NDArray[np.int64] | None
    predictions: NDArray[Any] | list[Any]
    scores: NDArray[np.float32] | None
    references: NDArray[Any] | list[Any] | None
    kept: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    inputs: Inputs = field(default_factory=Inputs)
    ignored: int = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.predictions)

    def __repr__(self) -> str:
        return describe(self)

    @property
    def labels(self) -> list[Any] | None:
        """Class name of each prediction; None without names, and for values and objects.

        For several labels a list of the names of a row's labels. For tokens a list of the names of
        a row's tokens, without those whose reference is -100, and without padding.
        """
        return names_of(self, self.predictions)

    @overload
    def __getitem__(self, rows: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, rows: slice | Sequence[Any] | NDArray[Any] | Tensor) -> Predictions: ...
    def __getitem__(self, rows: Any) -> Predictions | dict[str, Any]:
        if isinstance(rows, Integral) and not isinstance(rows, bool):
            place = int(rows)
            if not -len(self) <= place < len(self):  # a loop over the rows ends by this error
                raise IndexError(f"Row {place} of {len(self)}: rows count from 0.")
            place %= len(self)
            columns = columns_of(self[place : place + 1])
            return {
                name: values.tolist()[0] if isinstance(values, np.ndarray) else values[0]
                for name, values in columns.items()
            }
        places = _places(rows, len(self))
        return replace(
            self,
            index=_take(self.index, places),
            predictions=_take(self.predictions, places),
            scores=_take(self.scores, places),
            references=_take(self.references, places),
            kept={name: _take(values, places) for name, values in self.kept.items()},
        )

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per row."""
        return to_pandas(self)

    def to_dataset(self) -> Any:
        """Return a ``datasets.Dataset``.

        Raises:
            DataError: Decoded objects cannot be stored in a table.
        """
        return to_dataset(self)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a Parquet file, which keeps the types of all columns.

        Args:
            path: Path of the file.

        Raises:
            DataError: Decoded objects cannot be stored in a table.
        """
        to_parquet(self, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a CSV file; lists and dicts are written as JSON.

        Args:
            path: Path of the file.
        """
        to_csv(self, path)


def _places(rows: Any, length: int) -> NDArray[np.int64]:
    """Return the places that a slice, a mask or a list of places selects."""
    if isinstance(rows, slice):
        return np.arange(length)[rows]
    places = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
    if places.ndim == 1 and places.size == 0:
        return np.arange(0)
    if places.ndim != 1 or places.dtype.kind not in "biu":
        raise IndexError(
            f"Predictions are indexed by a number, a slice, a mask or a list of places, got "
            f"{rows!r:.60}. One row: table[3]; rows by a condition: table[table.predictions == 1]."
        )
    if places.dtype.kind == "b" and len(places) != length:
        raise IndexError(f"A mask of {len(places)} for {length} rows: it takes one entry a row.")
    chosen: NDArray[np.int64] = np.arange(length)[places]
    return chosen


def _take(values: Any, places: NDArray[np.int64]) -> Any:
    if values is None or isinstance(values, np.ndarray | Tensor):
        return values if values is None else values[places]
    return [values[place] for place in places.tolist()]


def dataset_rows(loader: Iterable[Any]) -> Iterable[int] | None:
    """Return the dataset's row numbers in the loader's order; None: nobody knows them.

    Raises:
        DataError: The loader reads its rows by a sampler that does not tell which they are.
    """
    numbers = source_of(loader).row_numbers()
    if numbers is not None:
        return numbers
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        say(
            "the rows of a stream come as several processes read them, so their numbers are not "
            "known: Predictions.index is None. Read it with num_workers=0 to get them in order."
        )
        return None
    if packs_rows(loader):
        raise DataError(
            "The rows of this loader are packed, several of them in one row of a batch, so there "
            "would be no prediction for each. Prepare them without pack=True, or under a name that "
            'does not begin with "train": such splits are not packed.'
        )
    sampler: Any = getattr(loader, "batch_sampler", None)
    name = type(getattr(sampler, "sampler", sampler) or getattr(loader, "sampler", None)).__name__
    raise DataError(
        f"The loader draws its rows with a {name}, so predictions could not be "
        "put in the dataset's order. Build it with shuffle=False, or use prepare_dataloaders."
    )
