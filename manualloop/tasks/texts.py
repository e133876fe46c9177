"""Columns of text, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manualloop.errors import ConfigError, DataError
from manualloop.mistakes import filter_missing
from manualloop.tasks.made import Place, Rows


def texts_of(rows: Rows, column: str, place: Place) -> list[str]:
    """Return the texts of a column; ``"translation.en"`` is an entry of the dicts in a column.

    Raises:
        ConfigError: There is no such column.
        DataError: A row has no text.

    >>> texts_of({"translation": [{"en": "cat"}, {"en": "dog"}]}, "translation.en", str)
    ['cat', 'dog']
    """
    outer, _, inner = column.partition(".")
    cells: Sequence[Any]
    if column in rows:
        cells = rows[column]
    elif inner and outer in rows:
        cells = [None if row is None else row.get(inner) for row in rows[outer]]
    else:
        raise ConfigError(
            f"There is no column {column!r} among {', '.join(rows)}. Name the column of the texts."
        )
    for number, text in enumerate(cells):
        if isinstance(text, str):
            continue
        if text is None:
            fix = f"Leave such rows out: {filter_missing(column)}."
            if column not in rows:
                fix = (
                    f'Leave such rows out: dataset.filter(lambda row: row["{outer}"]["{inner}"] '
                    "is not None)."
                )
            raise DataError(f"{place(number).capitalize()} has {column}=None, no text. {fix}")
        raise DataError(
            f"{place(number).capitalize()} has {column}={text!r:.60}, a {type(text).__name__} and "
            "no text. Name a column of strings."
        )
    return list(cells)


def encode_texts(
    tokenizer: Any, texts: list[str], max_length: int | None, *, are_targets: bool = False
) -> tuple[dict[str, list[Any]], list[bool]]:
    """Return the tokens of texts, and which texts are cut off.

    Args:
        tokenizer: The tokenizer, fast or slow.
        texts: The texts.
        max_length: Number of tokens, special ones included, at which they are cut; None: nowhere.
        are_targets: Whether the model writes the texts, rather than reads them.
    """
    name = "text_target" if are_targets else "text"
    options = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
    encoded = tokenizer(**{name: texts}, **options)
    ids = encoded["input_ids"]
    if max_length is None:
        are_cut = [False] * len(texts)
    elif encodings := getattr(encoded, "encodings", None):
        are_cut = [bool(encoding.overflowing) for encoding in encodings]
    else:  # a tokenizer in Python does not tell: what may be cut is tokenized whole
        whole = {"truncation": False, "verbose": False}
        are_cut = [
            len(ids[row]) >= max_length
            and len(tokenizer(**{name: text}, **whole)["input_ids"]) > len(ids[row])
            for row, text in enumerate(texts)
        ]
    return {name: list(column) for name, column in encoded.items()}, are_cut
