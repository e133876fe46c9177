"""The columns of a split: which are the text and the label, and which go into batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from manualloop.data.splits import TEXT_KINDS
from manualloop.errors import ConfigError, DataError
from manualloop.mistakes import LABEL_LIKE
from manualloop.models import forward_columns

if TYPE_CHECKING:
    from torch import nn

_TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
_TEXTS = ("text", "sentence", "content", "review", "document")

LABELS = ("labels", "label", "label_ids")
"""Names that transformers' collators take for the labels, whatever else a batch holds."""

Takes = Callable[[str, str], bool]
"""A function of a column's name and kind that tells whether the column goes into batches."""


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
    examples: Mapping[str, Any] | None = None,
) -> Columns:
    """Find the columns of text and of labels in a split.

    Args:
        split: Name of the split in messages.
        kinds: Kind of each column, by its name.
        text_columns: The user's choice; None infers it.
        label_column: The user's choice; None infers it.
        needs_text: Whether to look for text that the user did not name.
        examples: A value of each column, by which an id, a path or a url is recognized.

    Raises:
        ConfigError: A column that the user named does not exist or is not text.
        DataError: No column is text, or several may be.

    >>> find_columns("train", {"sentence1": "text", "sentence2": "text", "label": "class"})
    Columns(texts=('sentence1', 'sentence2'), label='label')
    """
    texts = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns or ())
    require_columns(split, kinds, (*texts, *([label_column] if label_column else [])))
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
        texts = _find_texts(split, kinds, label, examples or {})
    return Columns(texts, label)


def require_columns(
    split: str,
    kinds: Mapping[str, str],
    names: Sequence[str],
    arguments: str = "text_columns= and label_column=",
) -> None:
    """Refuse names that no column of a split has.

    Raises:
        ConfigError: A column does not exist.
    """
    for name in names:
        if name not in kinds:
            raise ConfigError(
                f"{split} has no column {name!r}. Its columns: {', '.join(kinds)}. Name some of "
                f"these in {arguments}."
            )


def find_label(kinds: Mapping[str, str]) -> str | None:
    """Return the name of the label column; None if no column can be identified as such.

    >>> find_label({"text": "text", "Label": "int"})
    'Label'
    """
    for name in LABELS:
        if name in kinds:
            return name
    for name in kinds:
        if name.lower() in LABELS:
            return name
    classes = [name for name, kind in kinds.items() if kind == "class"]
    return classes[0] if len(classes) == 1 else None


def is_label_like(name: str) -> bool:
    """Tell whether a column may hold labels, by its name."""
    return name.lower() in LABEL_LIKE


_ID_NAME = re.compile(
    r"(^|_)(id|ids|idx|index|uid|uuid|guid|key|hash|md5|sha1|sha256|url|uri|link|path|file|"
    r"filename|filepath)$"
)
_ID_VALUE = re.compile(
    r"\w+://\S+|[\w.~-]*[/\\][\w.~/\\-]+\.\w+|\S+\.(jpe?g|png|gif|webp|bmp|tiff?|wav|mp3|flac|"
    r"ogg|mp4|avi|pdf|txt|json)|[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{8,}|"
    r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ]\d{1,2}:\d{2}\S*)?",
    re.IGNORECASE,
)


def is_id(name: str, example: Any) -> bool:
    """Tell whether a column of strings holds ids, paths, urls or dates, by its name or a value.

    >>> is_id("imageId", "a b"), is_id("source", "images/17.jpg"), is_id("source", "see a/b.")
    (True, True, False)
    >>> is_id("when", "2024-01-31 10:05"), is_id("when", "in May")
    (True, False)
    """
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s.-]", "_", name).lower()
    is_id_value = isinstance(example, str) and _ID_VALUE.fullmatch(example.strip()) is not None
    return _ID_NAME.search(snake) is not None or is_id_value


def _find_texts(
    split: str, kinds: Mapping[str, str], label: str | None, examples: Mapping[str, Any]
) -> tuple[str, ...]:
    strings = [name for name, kind in kinds.items() if kind == "text" and name != label]
    for pair in _TEXT_PAIRS:
        if set(pair) <= set(strings):
            return pair
    ids = [n for n in strings if n not in _TEXTS and is_id(n, examples.get(n))]
    candidates = [name for name in strings if name not in ids]
    candidates.sort(key=is_label_like)
    known = [name for name in _TEXTS if name in candidates]
    words = [name for name, kind in kinds.items() if kind == "texts" and name != label]
    media = [name for name, kind in kinds.items() if kind == "media"]
    others = [name for name in candidates if name not in known and not is_label_like(name)]
    if len(known) == 1 and not others:
        return (known[0],)
    if len(candidates) == 1 and not (words or media or is_label_like(candidates[0])):
        return (candidates[0],)
    columns = ", ".join(kinds) or "none"
    plain = [name for name in candidates if not is_label_like(name)]
    if label is None and len(plain) == 1 and len(candidates) > 1 and not (words or media):
        return (plain[0],)  # the others are labels, of which the user is asked
    if len(candidates) > 1:
        raise DataError(
            f"Several columns of {split} hold strings: {', '.join(candidates)}. Name the text: "
            f"text_columns={candidates[0]!r}, or for a pair text_columns={tuple(candidates[:2])!r}."
        )
    if media and not words:
        raise DataError(
            f"{split} has {media[0]!r} beside strings that may be anything. Its columns: "
            f"{columns}. Turn rows into the columns that the model takes with preprocess=, or name "
            f"the text: text_columns={(candidates or ids or ['text'])[0]!r}."
            if candidates or ids
            else f"{split} has neither text nor input_ids. Its columns: {columns}. Turn rows into "
            "the columns that the model takes: preprocess=."
        )
    if found := [*words, *candidates, *ids]:
        raise DataError(
            f"No column of {split} is clearly the text. Its columns: {columns}. Name it: "
            f"text_columns={found[0]!r}."
        )
    if numbers := [name for name in _TEXTS if kinds.get(name) in ("int", "float")]:
        raise DataError(
            f"Column {numbers[0]!r} of {split} holds numbers, not text. Turn them into text: "
            f'dataset.cast_column("{numbers[0]}", datasets.Value("string")).'
        )
    raise DataError(
        f"{split} has neither text nor input_ids. Its columns: {columns}. "
        "Pass a dataset with a column of strings, or a tokenized one."
    )


@dataclass(frozen=True)
class Taking:
    """A test for columns that the model takes, which can be sent to workers.

    Attributes:
        names: Names of the columns; None: any.
        takes_text: Whether they may be text.
        keep: Columns that skip the model.
    """

    names: frozenset[str] | None
    takes_text: bool
    keep: tuple[str, ...] = ()

    def __call__(self, name: str, kind: str) -> bool:
        """Tell whether the model takes a column."""
        is_named = self.names is None or name in self.names
        is_kind = self.takes_text or kind not in TEXT_KINDS
        return is_named and is_kind and name not in self.keep


def column_filter(
    tokenizer: Any, model: nn.Module | None, *, takes_all: bool, keep: tuple[str, ...] = ()
) -> Taking:
    """Return the test for columns that the model takes, and the labels.

    Args:
        tokenizer: As in ``prepare_dataloaders``.
        model: As in ``prepare_dataloaders``.
        takes_all: Whether a ``collate_fn`` of the user's takes all columns.
        keep: Columns that skip the model.
    """
    names: set[str] | None = None
    if takes_all:
        return Taking(None, True, keep)
    if model is not None:
        names = {*forward_columns(model), "labels"}
    elif tokenizer is not None:
        extra = ("labels", "start_positions", "end_positions", "position_ids")
        names = {*tokenizer.model_input_names, *extra}
    return Taking(None if names is None else frozenset(names), False, keep)
