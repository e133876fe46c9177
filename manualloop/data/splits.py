"""The splits of a dataset: opened, changed, and named in the code that messages print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from manualloop.arguments import Checks
from manualloop.data.files import read_rows
from manualloop.errors import DataError

TEXT_KINDS = ("text", "texts")
"""Kinds of columns that a model cannot read: strings, and lists of strings."""

_KINDS: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
"""Kinds of columns by their dataset, which copies all of its features whenever it is asked."""

Rows = Mapping[str, Any]
"""A batch of rows as ``dataset.map`` passes it to a function: column names to lists of values."""


class Split(NamedTuple):
    """A split of a dataset, with its first row.

    A stream often does not know its columns, and reading from it starts it anew. Its first row is
    therefore read once, and every change of the split is made to that row as well.

    Attributes:
        name: Name of the split in messages.
        rows: A ``datasets.Dataset`` or ``IterableDataset``.
        first: The first row.
        key: Key of the split in the mapping that the user passed, as code; None if there is no
            mapping.
        form: The format of the user's dataset, which the rows have not; None if it had none.
        num_cut: Number of texts that were cut off by the tokenizer; None if nobody knows.
        made_of: Names of the classes in the column that a function of the user's made the labels
            of; empty if it has none. None for labels as they are in the dataset.
        is_unchanged: Whether the labels that the function made are those of that column.
        maker: Name of the argument whose function makes the labels; None: the dataset has them.
    """

    name: str
    rows: Any
    first: Mapping[str, Any]
    key: str | None = None
    form: Mapping[str, Any] | None = None
    num_cut: int | None = None
    made_of: tuple[str, ...] | None = None
    is_unchanged: bool = False
    maker: str | None = None

    @property
    def is_train(self) -> bool:
        """Whether the split is shuffled."""
        return self.name.startswith("train")

    @property
    def is_stream(self) -> bool:
        """Whether the rows can only be read one after the other."""
        return not hasattr(self.rows, "__len__")

    @property
    def code(self) -> str:
        """The expression for the split in a line that a message prints."""
        return code_of(self.key)

    @property
    def kinds(self) -> dict[str, str]:
        """Map each column's name to the kind of its values.

        Kinds are "text", "class", "int", "float", "list", "texts" (lists of text), "media" (images,
        sounds, arrays) and "other".
        """
        if (known := _KINDS.get(self.rows)) is not None:
            return dict(known)
        if (features := self.rows.features) is None:
            return {name: kind_of_value(value) for name, value in self.first.items()}
        kinds = {name: _kind_of_feature(feature) for name, feature in features.items()}
        if not self.is_stream:
            _KINDS[self.rows] = kinds
        return dict(kinds)

    def feature(self, name: str) -> Any:
        """Return the feature of a column, or of the items in its lists; None if it is unknown."""
        feature = (self.rows.features or {}).get(name)
        return feature if (item := _item_feature(feature)) is None else item

    def fix(self, call: str) -> str:
        """Return the line of code that changes this split alone, by a call of its method."""
        return fix_of(self.key, call)

    def select(self, names: Sequence[str]) -> Split:
        """Keep these columns."""
        first = {name: self.first[name] for name in names}
        return self._replace(rows=self.rows.select_columns(list(names)), first=first)

    def rename(self, old: str, new: str) -> Split:
        """Give a column another name."""
        first = {new if name == old else name: value for name, value in self.first.items()}
        return self._replace(rows=self.rows.rename_column(old, new), first=first)

    def map(
        self,
        function: Callable[[Rows], Rows],
        remove: Sequence[str] = (),
        classes: tuple[str, Sequence[str]] | None = None,
        num_proc: int | None = None,
        types: Mapping[str, str] | None = None,
    ) -> Split:
        """Add the columns that a function computes from a batch of rows, and remove others.

        Args:
            function: The function.
            remove: Names of the columns to remove.
            classes: A column whose values become class numbers, and the names of the classes.
            num_proc: Number of processes that compute; None: this one alone. Of a stream, the
                workers of its loader do.
            types: For each column that the function adds, the one whose type it has; all others
                keep theirs. None: nothing tells, and a stream then knows no types any more.
        """
        from manualloop.data.tables import bars_only_where_seen, with_classes  # it loads datasets

        # The first row comes first: the call may change the tokenizer, whose hash is part of the
        # key under which `map` caches its results.
        made = function({name: [value] for name, value in self.first.items()})
        first = {name: value for name, value in self.first.items() if name not in remove}
        first |= {name: values[0] for name, values in made.items()}
        options: dict[str, Any] = {"remove_columns": list(remove)}
        if classes is not None:
            options["features"] = with_classes(self.rows.features, *classes)
        elif types is not None and self.is_stream and (features := self.rows.features) is not None:
            kept = {name: feature for name, feature in features.items() if name not in remove}
            options["features"] = type(features)(
                kept | {name: features[source] for name, source in types.items()}
            )
        if num_proc is not None and not self.is_stream:
            options["num_proc"] = num_proc
        with bars_only_where_seen():
            rows = self.rows.map(function, batched=True, **options)
        return self._replace(rows=rows, first=first)


def code_of(key: str | None) -> str:
    """Return the expression for a split, by its key in a mapping; None: there is no mapping."""
    return "dataset" if key is None else f"dataset[{key}]"


def fix_of(key: str | None, call: str) -> str:
    """Return the line of code that changes a split by a call of its method."""
    changed = f"{code_of(key)}.{call}"
    return changed if key is None else f"{code_of(key)} = {changed}"


def fix_all(keys: Sequence[str | None], call: str, names: str | None = None) -> str:
    """Return the line of code that changes several splits in the same way.

    Args:
        keys: Keys of the splits, as code; a single None if there is no mapping.
        call: The call of a method that changes one.
        names: Code whose value the call uses as ``names``, and which is run before any split is
            changed.
    """
    if len(keys) == 1:
        return fix_of(keys[0], call)
    listed = f"[{', '.join(map(str, keys))}]"
    each = f"name in {listed}"
    if names is not None:
        each = f"name, names in zip({listed}, {len(keys)} * [{names}])"
    return f"for {each}: dataset[name] = dataset[name].{call}"


def open_splits(datasets: Any, check: Checks) -> dict[Any, Split]:
    """Open every split, without its format. A single dataset becomes the split "train".

    Args:
        datasets: A dataset, or a mapping of datasets.
        check: Keeps the error of a split that is not a dataset, is empty, or has a transform. The
            others are opened all the same.

    Raises:
        DataError: There is no split.
    """
    is_mapping = isinstance(datasets, Mapping)
    given = dict(datasets) if is_mapping else {"train": datasets}
    if not given:
        raise DataError(
            "The mapping of datasets is empty. Pass load_dataset(...), or a dict such as "
            '{"train": dataset}.'
        )
    splits = {}
    for name, rows in given.items():
        key = (repr(name) if isinstance(name, int) else f'"{name}"') if is_mapping else None
        split = check(_open, str(name), rows, key)
        if split is not None:
            splits[name] = split
    return splits


def _open(name: str, rows: Any, key: str | None) -> Split:
    rows = read_rows(name, rows)
    if not hasattr(rows, "features") or not hasattr(rows, "map"):
        raise DataError(
            f"{name} is a {type(rows).__name__}, not a datasets.Dataset. Pass one, a "
            "pandas.DataFrame or the path of a CSV, JSON or Parquet file, or build one from rows: "
            "datasets.Dataset.from_list(rows)."
        )
    form = getattr(rows, "format", {})  # a stream has none
    if form.get("type") == "custom":
        raise DataError(
            f"{name} has a transform, so its columns are unknown until the transform runs. "
            "Pass it as a function. If it is the same at every call, of a batch of rows: "
            "prepare_dataloaders(dataset.with_format(None), preprocess=transform). If it draws "
            "random numbers, as augmentation does, of one row: prepare_dataloaders("
            "dataset.with_format(None), transform=transform) calls transform(row, generator)."
        )
    # Tokenizers and collators expect rows of plain Python values.
    plain = rows.with_format(None)
    if form and not form["output_all_columns"]:
        plain = plain.select_columns(form["columns"])
    return open_split(name, plain, key)._replace(form=form or None)


def open_split(name: str, rows: Any, key: str | None) -> Split:
    """Return a split with its first row.

    Raises:
        DataError: The split has no rows.
    """
    for first in rows:
        return Split(name, rows, first, key)
    raise DataError(
        f"{name} has 0 rows. Check the filter and the name of the split: print(dataset)."
    )


def reference_of(splits: Mapping[Any, Split]) -> Split:
    """Return the split whose columns the others are compared with: train, else the first."""
    return max(splits.values(), key=lambda split: split.is_train)


def _item_feature(feature: Any) -> Any:
    # In datasets a list is a List, a LargeList, a Sequence(feature) (before 4.0) or [feature].
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


_MEDIA = ("Array2D", "Array3D", "Array4D", "Array5D", "Audio", "Image", "Nifti", "Pdf", "Video")


def _kind_of_feature(feature: Any) -> str:
    if hasattr(feature, "str2int"):
        return "class"
    if type(feature).__name__ in _MEDIA:
        return "media"
    if (item := _item_feature(feature)) is not None:
        return "texts" if _kind_of_feature(item) in TEXT_KINDS else "list"
    dtype = str(getattr(feature, "dtype", ""))
    for kind, dtypes in (
        ("text", ("string", "large_string")),
        ("int", ("int", "uint", "bool")),
        ("float", ("float", "double")),
    ):
        if dtype.startswith(dtypes):
            return kind
    return "other"


def kind_of_value(value: Any) -> str:
    """Return the kind of a single value: see ``Split.kinds``."""
    if isinstance(value, list | tuple) or getattr(value, "ndim", None):
        return "texts" if len(value) and kind_of_value(value[0]) in TEXT_KINDS else "list"
    if type(value).__module__.startswith("PIL."):
        return "media"
    for kind, types in (("text", str), ("int", Integral), ("float", Real)):
        if isinstance(value, types):
            return kind
    return "other"
