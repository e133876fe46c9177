"""Which columns are the text, which is the label: inferred, and said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from manualloop.errors import ConfigError, DataError
from manualloop.tasks import LABEL_LIKE

_TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
_TEXTS = ("text", "sentence", "content", "review", "document")
_LABELS = ("labels", "label", "label_ids")


class Columns(NamedTuple):
    """The roles of a dataset's columns.

    Attributes:
        texts: One column, or two for sentence pairs; empty if the rows are already tokenized.
        label: None for rows without labels.
    """

    texts: tuple[str, ...]
    label: str | None


def column_kinds(dataset: Any) -> dict[str, str]:
    """Tell what each column holds: "text", "class", "int", "float", "list" or "other".

    Args:
        dataset: A ``datasets.Dataset`` or ``IterableDataset``; of one that does not know its
            features (a stream), the first row is read.
    """
    if dataset.features is not None:
        return {name: _kind_of_feature(feature) for name, feature in dataset.features.items()}
    return {name: _kind_of_value(value) for name, value in next(iter(dataset), {}).items()}


def _kind_of_feature(feature: Any) -> str:
    if hasattr(feature, "names") and hasattr(feature, "str2int"):
        return "class"
    if isinstance(feature, list | tuple) or "List" in (name := type(feature).__name__):
        return "list"
    if name == "Sequence":
        return "list"
    dtype = str(getattr(feature, "dtype", ""))
    if "string" in dtype:
        return "text"
    if dtype.startswith(("int", "uint", "bool")):
        return "int"
    return "float" if dtype.startswith(("float", "double")) else "other"


def _kind_of_value(value: Any) -> str:
    for kind, types in (("text", str), ("int", int), ("float", float), ("list", (list, tuple))):
        if isinstance(value, types):
            return kind
    return "list" if getattr(value, "ndim", 0) else "other"


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
        kinds: What ``column_kinds`` returns.
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
    if wrong := [name for name in texts if kinds[name] not in ("text", "list", "other")]:
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
