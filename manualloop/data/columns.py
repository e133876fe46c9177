"""A split and its columns: what each of them holds, which are the text, which is the label."""

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
"""What no model reads: strings, and lists of them."""

Rows = Mapping[str, Any]
"""A batch of rows, as ``dataset.map`` gives it to a function: column name to list of values."""

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
"""Whether a column, by its name and kind, goes into batches."""


class Split(NamedTuple):
    """A split of a dataset, and its first row.

    A stream often does not know its columns, and every look at it starts it anew. So its first row
    is read once, and then goes through the same steps as all the others.

    Attributes:
        name: For messages.
        rows: A ``datasets.Dataset`` or ``IterableDataset``.
        first: The first of the rows.
    """

    name: str
    rows: Any
    first: Mapping[str, Any]

    @property
    def is_train(self) -> bool:
        """Whether it is to be shuffled."""
        return self.name.startswith("train")

    @property
    def kinds(self) -> dict[str, str]:
        """Each column's name, and what it holds.

        That is "text", "class", "int", "float", "list", "texts" (lists of text) or "other".
        """
        if self.rows.features is not None:
            return {name: _kind_of_feature(f) for name, f in self.rows.features.items()}
        return {name: _kind_of_value(value) for name, value in self.first.items()}

    def column(self, name: str) -> Any:
        """Return a column as Arrow holds it; None of a stream, which is checked as it comes."""
        if not hasattr(self.rows, "__len__"):
            return None
        return self.rows.select_columns([name]).with_format("arrow")[:].column(name)

    def item_feature(self, name: str) -> Any:
        """Return the feature of what the lists of a column hold, None if nobody knows."""
        return _item_feature((self.rows.features or {}).get(name))

    def first_misaligned(self, name: str) -> int | None:
        """Return the first row with another number of values than of tokens.

        None: there is none, or it is a stream and its first row is not one.
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
        """Add the columns that a function makes of a batch of rows, row by row; remove others."""
        # In this order: a call may change the tokenizer, by whose hash `map` finds what it has
        # made before.
        made = function({name: [value] for name, value in self.first.items()})
        first = {name: value for name, value in self.first.items() if name not in remove}
        first |= {name: values[0] for name, values in made.items()}
        rows = self.rows.map(function, batched=True, remove_columns=list(remove))
        return self._replace(rows=rows, first=first)


def open_splits(datasets: Any) -> dict[Any, Split]:
    """Take one dataset, which is "train", or a mapping of them; undo what formats them.

    Raises:
        DataError: A split is no dataset, is empty, or has a transform.
    """
    splits = dict(datasets) if isinstance(datasets, Mapping) else {"train": datasets}
    if not splits:
        raise DataError("No split was given. Pass load_dataset(...), or a dict of datasets.")
    for name, rows in splits.items():
        if not hasattr(rows, "features") or not hasattr(rows, "map"):
            raise DataError(
                f"{name} is a {type(rows).__name__}, not a datasets.Dataset. Load files with "
                "datasets.load_dataset, or build one from rows: datasets.Dataset.from_list(rows)."
            )
        form = getattr(rows, "format", {})  # a stream has none
        if form.get("type") == "custom":
            raise DataError(
                f"{name} has a transform, so its columns are not known before it runs. Pass it as "
                "the function that it is: prepare_dataloaders(dataset.with_format(None), "
                "preprocess=transform); or build the loader: DataLoader(dataset, batch_size=8)."
            )
        # Rows of plain Python are what tokenizers and collators want.
        plain = rows.with_format(None)
        plain = plain.select_columns(form["columns"]) if form else plain
        splits[name] = open_split(str(name), plain)
    return splits


def open_split(name: str, rows: Any) -> Split:
    """Read the first row of a split.

    Raises:
        DataError: There is none.
    """
    for first in rows:
        return Split(name, rows, first)
    raise DataError(
        f"{name} has 0 rows. Check the filter or the name of the split: dataset.num_rows."
    )


def _item_feature(feature: Any) -> Any:
    # datasets writes a list as List, LargeList or (before 4.0) Sequence(feature), or as [feature].
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
        texts: One column, or two for sentence pairs; empty if the rows are already tokenized.
        label: None for rows without labels.
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
    """Find the text and the label among a split's columns.

    Args:
        split: The split's name, for messages.
        kinds: Of its columns.
        text_columns: The user's choice; None: inferred.
        label_column: The user's choice; None: inferred.
        needs_text: False leaves text alone that the user did not name.

    Raises:
        ConfigError: A column that the user named is not there.
        DataError: The text cannot be told from other columns of strings.

    >>> find_columns("train", {"sentence1": "text", "sentence2": "text", "label": "class"})
    Columns(texts=('sentence1', 'sentence2'), label='label')
    """
    texts = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns or ())
    for name in (*texts, *([label_column] if label_column else [])):
        if name not in kinds:
            raise ConfigError(
                f"{split} has no column {name!r}. It has: {', '.join(kinds)}. "
                "Name them with text_columns= and label_column=."
            )
    if wrong := [name for name in texts if kinds[name] in ("class", "int", "float")]:
        raise ConfigError(
            f"Column {wrong[0]!r} of {split} is no text: it holds values of kind "
            f"{kinds[wrong[0]]!r}. Name columns of strings with text_columns=."
        )
    if len(texts) > 2:
        raise ConfigError(
            f"text_columns={texts}: a tokenizer takes one text or a pair. Join them into one "
            'column first: dataset.map(lambda row: {"text": row["title"] + " " + row["body"]}).'
        )
    label = label_column or find_label(kinds)
    if not texts and needs_text and "input_ids" not in kinds:
        texts = _find_texts(split, kinds, label)
    return Columns(texts, label)


def find_label(kinds: Mapping[str, str]) -> str | None:
    """Return the name of the label column, None where no name tells."""
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
            "Pass rows with a column of strings, or tokenized rows."
        )
    raise DataError(
        f"Which columns of {split} are the text? {', '.join(candidates)} hold strings. Say "
        f"text_columns={candidates[0]!r}, or a pair: text_columns={tuple(candidates[:2])!r}."
    )


def column_filter(tokenizer: Any, model: nn.Module | None, *, takes_all: bool) -> Takes:
    """Say which columns go into batches: those that the model reads, and its labels."""
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
