"""The columns of a split: what each one holds, and which are the text and the label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

from manualloop.errors import ConfigError, DataError
from manualloop.mistakes import LABEL_LIKE
from manualloop.models import forward_columns

if TYPE_CHECKING:
    from torch import nn

TEXT_KINDS = ("text", "texts")
"""Kinds of columns that a model cannot read: strings, and lists of strings."""

Rows = Mapping[str, Any]
"""A batch of rows as ``dataset.map`` passes it to a function: column names to lists of values."""

_TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
_TEXTS = ("text", "sentence", "content", "review", "document")
_LABELS = ("labels", "label", "label_ids")

Takes = Callable[[str, str], bool]
"""A function of a column's name and kind that tells whether the column goes into batches."""


class Split(NamedTuple):
    """A split of a dataset, with its first row.

    A stream often does not know its columns, and reading from it starts it anew. Its first row is
    therefore read once, and every change of the split is made to that row as well.

    Attributes:
        name: Name of the split in messages.
        rows: A ``datasets.Dataset`` or ``IterableDataset``.
        first: The first row.
    """

    name: str
    rows: Any
    first: Mapping[str, Any]

    @property
    def is_train(self) -> bool:
        """Whether the split is shuffled."""
        return self.name.startswith("train")

    @property
    def kinds(self) -> dict[str, str]:
        """Map each column's name to the kind of its values.

        Kinds are "text", "class", "int", "float", "list", "texts" (lists of text) and "other".
        """
        if self.rows.features is not None:
            return {name: _kind_of_feature(f) for name, f in self.rows.features.items()}
        return {name: _kind_of_value(value) for name, value in self.first.items()}

    def column(self, name: str) -> Any:
        """Return a column as Arrow data; None for a stream, whose batches are checked later."""
        if not hasattr(self.rows, "__len__"):
            return None
        return self.rows.select_columns([name]).with_format("arrow")[:].column(name)

    def item_feature(self, name: str) -> Any:
        """Return the feature of the items in a column's lists; None if it is unknown."""
        return _item_feature((self.rows.features or {}).get(name))

    def first_misaligned(self, name: str) -> int | None:
        """Return the first row whose number of values differs from its number of tokens.

        None means that no row differs; only the first row of a stream is checked.
        """
        import pyarrow.compute as pc

        in_lists = self.kinds[name] == "list"
        if (len(self.first[name]) if in_lists else 1) != len(self.first["input_ids"]):
            return 0
        values, tokens = self.column(name), self.column("input_ids")
        if values is None or not in_lists:
            return None
        differ = pc.not_equal(pc.list_value_length(values), pc.list_value_length(tokens))
        row = int(pc.index(differ, True).as_py())
        return None if row < 0 else row

    def select(self, names: Sequence[str]) -> Split:
        """Keep these columns."""
        first = {name: self.first[name] for name in names}
        return self._replace(rows=self.rows.select_columns(list(names)), first=first)

    def rename(self, old: str, new: str) -> Split:
        """Give a column another name."""
        first = {new if name == old else name: value for name, value in self.first.items()}
        return self._replace(rows=self.rows.rename_column(old, new), first=first)

    def map(self, function: Callable[[Rows], Rows], remove: Sequence[str] = ()) -> Split:
        """Add the columns that a function computes from a batch of rows, and remove others."""
        # The first row comes first: the call may change the tokenizer, whose hash is part of the
        # key under which `map` caches its results.
        made = function({name: [value] for name, value in self.first.items()})
        first = {name: value for name, value in self.first.items() if name not in remove}
        first |= {name: values[0] for name, values in made.items()}
        rows = self.rows.map(function, batched=True, remove_columns=list(remove))
        return self._replace(rows=rows, first=first)


def open_splits(datasets: Any) -> dict[Any, Split]:
    """Open every split, without its format. A single dataset becomes the split "train".

    Raises:
        DataError: A split is not a dataset, is empty, or has a transform.
    """
    splits = dict(datasets) if isinstance(datasets, Mapping) else {"train": datasets}
    if not splits:
        raise DataError(
            "The mapping of datasets is empty. Pass load_dataset(...), or a dict such as "
            '{"train": dataset}.'
        )
    for name, rows in splits.items():
        if not hasattr(rows, "features") or not hasattr(rows, "map"):
            raise DataError(
                f"{name} is a {type(rows).__name__}, not a datasets.Dataset. Load files with "
                "datasets.load_dataset, or build one from rows: datasets.Dataset.from_list(rows)."
            )
        form = getattr(rows, "format", {})  # a stream has none
        if form.get("type") == "custom":
            raise DataError(
                f"{name} has a transform, so its columns are unknown until the transform runs. "
                "Pass the transform as a function: prepare_dataloaders(dataset.with_format(None), "
                "preprocess=transform). Or build the loader: DataLoader(dataset, batch_size=8)."
            )
        # Tokenizers and collators expect rows of plain Python values.
        plain = rows.with_format(None)
        plain = plain.select_columns(form["columns"]) if form else plain
        splits[name] = open_split(str(name), plain)
    return splits


def open_split(name: str, rows: Any) -> Split:
    """Return a split with its first row.

    Raises:
        DataError: The split has no rows.
    """
    for first in rows:
        return Split(name, rows, first)
    raise DataError(
        f"{name} has 0 rows. Check the filter and the name of the split: print(dataset)."
    )


def _item_feature(feature: Any) -> Any:
    # In datasets a list is a List, a LargeList, a Sequence(feature) (before 4.0) or [feature].
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _kind_of_feature(feature: Any) -> str:
    if hasattr(feature, "str2int"):
        return "class"
    if (item := _item_feature(feature)) is not None:
        return "texts" if _kind_of_feature(item) in TEXT_KINDS else "list"
    dtype = "" if hasattr(feature, "shape") else str(getattr(feature, "dtype", ""))
    for kind, dtypes in (
        ("text", ("string", "large_string")),
        ("int", ("int", "uint", "bool")),
        ("float", ("float", "double")),
    ):
        if dtype.startswith(dtypes):
            return kind
    return "other"


def _kind_of_value(value: Any) -> str:
    if isinstance(value, list | tuple) or getattr(value, "ndim", None):
        return "texts" if len(value) and _kind_of_value(value[0]) in TEXT_KINDS else "list"
    for kind, types in (("text", str), ("int", Integral), ("float", Real)):
        if isinstance(value, types):
            return kind
    return "other"


class Columns(NamedTuple):
    """The roles of a dataset's columns.

    Attributes:
        texts: One column of text, or two for pairs; none if the rows are already tokenized.
        label: The column of labels; None for rows without labels.
    """

    texts: tuple[str, ...]
    label: str | None


def find_columns(
    split: str,
    kinds: Mapping[str, str],
    text_columns: str | Sequence[str] | None = None,
    label_column: str | None = None,
    *,
    needs_text: bool = True,
) -> Columns:
    """Find the columns of text and of labels in a split.

    Args:
        split: Name of the split in messages.
        kinds: Kind of each column, by its name.
        text_columns: The user's choice; None infers it.
        label_column: The user's choice; None infers it.
        needs_text: Whether to look for text that the user did not name.

    Raises:
        ConfigError: A column that the user named does not exist or is not text.
        DataError: No column is text, or several may be.

    >>> find_columns("train", {"sentence1": "text", "sentence2": "text", "label": "class"})
    Columns(texts=('sentence1', 'sentence2'), label='label')
    """
    texts = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns or ())
    for name in (*texts, *([label_column] if label_column else [])):
        if name not in kinds:
            raise ConfigError(
                f"{split} has no column {name!r}. Its columns: {', '.join(kinds)}. Name some of "
                "these in text_columns= and label_column=."
            )
    if wrong := [name for name in texts if kinds[name] in ("class", "int", "float")]:
        raise ConfigError(
            f"Column {wrong[0]!r} of {split} holds values of kind {kinds[wrong[0]]!r}, not text. "
            "Name columns of strings in text_columns=."
        )
    if len(texts) > 2:
        joined = ' + " " + '.join(f'row["{name}"]' for name in texts)
        raise ConfigError(
            f"text_columns={texts} names {len(texts)} columns, but a tokenizer takes one text or a "
            f'pair. Join them into one column: dataset.map(lambda row: {{"text": {joined}}}).'
        )
    label = label_column or find_label(kinds)
    if not texts and needs_text and "input_ids" not in kinds:
        texts = _find_texts(split, kinds, label)
    return Columns(texts, label)


def find_label(kinds: Mapping[str, str]) -> str | None:
    """Return the name of the label column; None if no column can be identified as such."""
    for name in _LABELS:
        if name in kinds:
            return name
    classes = [name for name, kind in kinds.items() if kind == "class"]
    return classes[0] if len(classes) == 1 else None


def _find_texts(split: str, kinds: Mapping[str, str], label: str | None) -> tuple[str, ...]:
    candidates = [name for name, kind in kinds.items() if kind == "text" and name != label]
    for pair in _TEXT_PAIRS:
        if set(pair) <= set(candidates):
            return pair
    if len(candidates) == 1:
        return (candidates[0],)
    known = [name for name in _TEXTS if name in candidates]
    others = [name for name in candidates if name not in known and name not in LABEL_LIKE]
    if len(known) == 1 and not others:
        return (known[0],)
    if not candidates:
        raise DataError(
            f"{split} has neither text nor input_ids. Its columns: {', '.join(kinds) or 'none'}. "
            "Pass a dataset with a column of strings, or a tokenized one."
        )
    raise DataError(
        f"Several columns of {split} hold strings: {', '.join(candidates)}. Name the text: "
        f"text_columns={candidates[0]!r}, or for a pair text_columns={tuple(candidates[:2])!r}."
    )


def column_filter(tokenizer: Any, model: nn.Module | None, *, takes_all: bool) -> Takes:
    """Return the test for columns that go into batches: those the model takes, and the labels."""
    if takes_all:
        return lambda name, kind: True
    if model is not None:
        names = {*forward_columns(model), "labels"}
    elif tokenizer is not None:
        extra = ("labels", "start_positions", "end_positions", "position_ids")
        names = {*tokenizer.model_input_names, *extra}
    else:
        return lambda name, kind: kind not in TEXT_KINDS
    return lambda name, kind: name in names and kind not in TEXT_KINDS
