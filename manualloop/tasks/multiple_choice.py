"""Multiple choice: a text and several continuations a row, one of which is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np

from manualloop.errors import DataError
from manualloop.tasks.made import Made, Place, Rows, place_in_batch, share_of_all
from manualloop.tasks.numbers import whole_number
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.tasks.texts import are_cut, limit_of, require_columns

Texts: TypeAlias = "str | Sequence[str] | Callable[[Mapping[str, Any]], str | Sequence[str]]"
"""A column of texts or of lists of them, columns of one text for each choice, or a function."""


def flatten_choices(
    tokenizer: Any,
    first: Texts,
    second: Texts,
    *,
    label: str | Callable[[Mapping[str, Any]], int] = "label",
    max_length: int | None = None,
) -> Callable[[Rows], dict[str, list[Any]]]:
    """Return a ``preprocess`` that tokenizes a pair of texts for each choice of a row.

    ::

        loaders = prepare_dataloaders(
            data,
            tokenizer,
            model=model,
            preprocess=flatten_choices(
                tokenizer, first="sent1", second=["ending0", "ending1", "ending2", "ending3"]
            ),
        )

    Batches are ``(rows, choices, tokens)``, as AutoModelForMultipleChoice takes them.
    ``prepare_dataloaders`` refuses a split whose rows have different numbers of choices, and
    reports how many choices are cut off.

    Args:
        tokenizer: Tokenizer, fast or not.
        first: What the first texts are: a column with one text a row, which stands before every
            choice, or anything that ``second`` may be.
        second: What the second texts are: a list of columns, one for each choice; a column of lists
            of texts; or a function from a row to a list of texts. It is called with a dict of all
            columns.
        label: Column of the numbers of the right choices, from 0, or a function from a row to one.
            Rows of a split without the column get no labels.
        max_length: Number of tokens at which pairs are cut off, the longer text first; None uses
            the tokenizer's limit.

    Returns:
        A function from a batch of rows to what the tokenizer makes of them, with a list of tokens
        for each choice, and ``labels``.
    """
    return FlattenChoices(tokenizer, first, second, label, max_length)


@dataclass(frozen=True, eq=False)
class FlattenChoices:
    """The function that ``flatten_choices`` returns; its arguments are the attributes."""

    tokenizer: Any = field(repr=False)
    first: Texts
    second: Texts
    label: str | Callable[[Mapping[str, Any]], int]
    max_length: int | None
    cut_call: ClassVar[str] = "flatten_choices(tokenizer, ..., max_length={room})"
    of_task: ClassVar[str] = "multiple_choice"  # which the rows alone do not tell

    @property
    def label_column(self) -> str | None:
        """The column that labels are made of; None: a function makes them."""
        return self.label if isinstance(self.label, str) else None

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return tokens and labels."""
        return self.make(rows, place_in_batch).columns

    def make(self, rows: Rows, place: Place) -> Made:
        """Return tokens and labels, and how many choices are cut off.

        Raises:
            DataError: A row has no choice, or its label is none of them.
        """
        names = list(rows)
        cells = [dict(zip(names, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        pairs = [
            _pairs_of(row, self.first, self.second, place(number))
            for number, row in enumerate(cells)
        ]
        limit = limit_of(self.tokenizer, self.max_length)
        options = {"truncation": limit is not None, "max_length": limit}
        sides = zip(*(pair for row in pairs for pair in row), strict=True)
        texts = dict(zip(("text", "text_pair"), map(list, sides), strict=True))
        encoded = self.tokenizer(**texts, **options)
        ends = np.cumsum([len(row) for row in pairs]).tolist()
        parts = [slice(end - len(row), end) for row, end in zip(pairs, ends, strict=True)]
        made: dict[str, list[Any]] = {
            name: [list(column[part]) for part in parts] for name, column in encoded.items()
        }
        if callable(self.label) or self.label in rows:
            made["labels"] = [
                _label_of(row, self.label, len(pair), place(number))
                for number, (row, pair) in enumerate(zip(cells, pairs, strict=True))
            ]
        num_cut = sum(are_cut(self.tokenizer, encoded, limit, texts))
        counts = Counter(choices=sum(map(len, pairs)), cut=num_cut)
        return Made(made, list(range(len(pairs))), counts)

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return how many choices are cut off."""
        if not counts.get("cut"):
            return []
        limit = limit_of(self.tokenizer, self.max_length)
        share = share_of_all(counts["cut"], counts["choices"])
        return [f"choices are cut off at {limit} tokens: {share}"]


def _pairs_of(
    row: Mapping[str, Any], first: Texts, second: Texts, where: str
) -> list[tuple[str, str]]:
    """Return the two texts of each choice of a row.

    Raises:
        DataError: There is no choice, or something else than texts.
    """
    before, after = _texts_of(row, first), _texts_of(row, second)
    after = after if isinstance(after, list | tuple) else [after]
    before = before if isinstance(before, list | tuple) else [before] * len(after)
    are_texts = all(isinstance(text, str) for text in (*before, *after))
    if after and are_texts and len(before) == len(after):
        return list(zip(before, after, strict=True))
    raise DataError(
        f"flatten_choices takes a text for each choice of a row, and of {where} there are "
        f"{list(before)!r:.80} and {list(after)!r:.80}. Name columns of texts, or return lists of "
        "them: second=lambda row: [row[name] for name in names]."
    )


def _texts_of(row: Mapping[str, Any], texts: Texts) -> Any:
    if callable(texts):
        return texts(row)
    names = (texts,) if isinstance(texts, str) else tuple(texts)
    require_columns(row, names, "flatten_choices(tokenizer, first=, second=)")
    return row[texts] if isinstance(texts, str) else [row[name] for name in texts]


def _label_of(row: Mapping[str, Any], label: Any, num_choices: int, where: str) -> int | None:
    """Return the label of a row; None and negative numbers without -100 stand for none.

    Raises:
        DataError: It is no number of a choice.
    """
    found = label(row) if callable(label) else row[label]
    if found is None:
        return None
    choice = whole_number(found)
    if choice is not None and choice < num_choices:
        return choice if choice >= 0 or choice == IGNORE_INDEX else None
    name = "the label" if callable(label) else f"{label}="
    raise DataError(
        f"{where.capitalize()} has {name}{found!r} and {num_choices} choices, which are "
        f'numbered from 0. Number them: label=lambda row: "ABCD".index(row["answer"]).'
    )
