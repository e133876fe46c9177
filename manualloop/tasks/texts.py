"""Columns of text, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manualloop.errors import ConfigError, DataError
from manualloop.mistakes import filter_missing
from manualloop.tasks.made import Place, Rows

_ENDLESS = 1_000_000  # transformers' number for a tokenizer without a limit is far above


def limit_of(tokenizer: Any, max_length: int | None) -> int | None:
    """Return the number of tokens at which texts are cut off; None if they are not.

    Args:
        tokenizer: The tokenizer, whose own limit holds as well.
        max_length: The user's choice; None leaves it to the tokenizer.
    """
    own = getattr(tokenizer, "model_max_length", None)
    limits = [n for n in (max_length, own) if isinstance(n, int) and n < _ENDLESS]
    return min(limits, default=None)


def require_columns(rows: Rows, names: tuple[str, ...], arguments: str) -> None:
    """Refuse rows without a column that was named.

    Raises:
        DataError: The message lists the columns that there are.
    """
    if missing := [name for name in names if name not in rows]:
        raise DataError(
            f"There is no column {missing[0]!r}. The columns: {', '.join(rows)}. Name them in "
            f"{arguments}."
        )


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
    cut = are_cut(tokenizer, encoded, max_length, {name: texts})
    return {name: list(column) for name, column in encoded.items()}, cut


def are_cut(
    tokenizer: Any,
    encoded: Any,
    max_length: int | None,
    texts: Mapping[str, Sequence[Any]],
    **options: Any,
) -> list[bool]:
    """Tell which texts, or pairs of them, were cut off.

    Args:
        tokenizer: The tokenizer, fast or slow.
        encoded: What it made of the texts.
        max_length: Number of tokens at which they are cut; None: nowhere.
        texts: The texts, by the names of the tokenizer's arguments.
        options: Other arguments of the tokenizer.
    """
    ids = encoded["input_ids"]
    if max_length is None:
        return [False] * len(ids)
    if encodings := getattr(encoded, "encodings", None):
        return [bool(encoding.overflowing) for encoding in encodings]

    def whole(row: int) -> int:
        cells: Any = {name: column[row] for name, column in texts.items()}
        return len(tokenizer(**cells, **options, truncation=False, verbose=False)["input_ids"])

    # A tokenizer in Python does not tell: what may be cut is tokenized whole.
    return [len(one) >= max_length and whole(row) > len(one) for row, one in enumerate(ids)]
