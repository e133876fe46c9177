"""Multiple choice: a text and several continuations a row, one of which is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from manualloop.errors import DataError
from manualloop.tasks.counts import Counted, limit_of, shares
from manualloop.tasks.made import Rows

Texts: TypeAlias = "str | Sequence[str] | Callable[[Mapping[str, Any]], str | Sequence[str]]"
"""A column of texts or of lists of them, columns of one text for each choice, or a function."""

_MOST_LISTED = 100


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
        for each choice, and ``labels``; beside them the counts ``num_choices`` and
        ``num_choices_cut``.
    """
    return FlattenChoices(tokenizer, first, second, label, max_length)


@dataclass(frozen=True, eq=False)
class FlattenChoices:
    """The function that ``flatten_choices`` returns; its arguments are the attributes.

    Attributes:
        counts: Names of the columns of counts.
    """

    tokenizer: Any = field(repr=False)
    first: Texts
    second: Texts
    label: str | Callable[[Mapping[str, Any]], int]
    max_length: int | None
    counts: tuple[str, ...] = ("num_choices", "num_choices_cut")

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return tokens, labels and counts.

        Raises:
            DataError: A row has no choice, or its label is none of them.
        """
        names = list(rows)
        cells = [dict(zip(names, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        pairs = [_pairs_of(row, self.first, self.second) for row in cells]
        limit = limit_of(self.tokenizer, self.max_length)
        options = {"truncation": limit is not None, "max_length": limit}
        sides = zip(*(pair for row in pairs for pair in row), strict=True)
        encoded = self.tokenizer(*map(list, sides), **options)
        ends = np.cumsum([len(row) for row in pairs]).tolist()
        parts = [slice(end - len(row), end) for row, end in zip(pairs, ends, strict=True)]
        made: dict[str, list[Any]] = {
            name: [list(column[part]) for part in parts] for name, column in encoded.items()
        }
        if callable(self.label) or self.label in rows:
            made["labels"] = [
                _label_of(row, self.label, len(pair))
                for row, pair in zip(cells, pairs, strict=True)
            ]
        is_cut = [bool(one.overflowing) for one in getattr(encoded, "encodings", None) or ()]
        made["num_choices"] = [len(row) for row in pairs]
        made["num_choices_cut"] = [sum(is_cut[part]) for part in parts]
        return made

    def tell(self, splits: Mapping[str, Counted]) -> str | None:
        """Return the line on choices that are cut off.

        Raises:
            DataError: Rows of a split have different numbers of choices.
        """
        for name, counted in splits.items():
            numbers = counted.columns["num_choices"]
            usual = int(np.bincount(numbers).argmax())
            others = np.flatnonzero(numbers != usual)
            if len(others):
                raise DataError(_message_on_others(name, numbers.tolist(), usual, others.tolist()))
        cut = shares(splits, "num_choices_cut", "num_choices")
        limit = limit_of(self.tokenizer, self.max_length)
        return f"choices are cut off at {limit} tokens: {cut}" if cut else None


def _message_on_others(
    split: str, numbers: Sequence[int], usual: int, others: Sequence[int]
) -> str:
    """Return the message about rows with another number of choices than most have."""
    line = "Leave them out with dataset.select."
    if len(others) <= _MOST_LISTED:
        line = (
            "Leave them out: dataset = dataset.select([n for n in range(len(dataset)) if n not in "
            f"{set(others)}])."
        )
    return (
        f"Row {others[0]} of {split} has {numbers[others[0]]} choices, and most rows have {usual}; "
        f"a batch holds as many choices of each row. Rows with another number: {len(others)} of "
        f"{len(numbers)}. {line}"
    )


def _pairs_of(row: Mapping[str, Any], first: Texts, second: Texts) -> list[tuple[str, str]]:
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
        "flatten_choices takes a text for each choice of a row, and of a row there are "
        f"{list(before)!r:.80} and {list(after)!r:.80}. Name columns of texts, or return lists of "
        "them: second=lambda row: [row[name] for name in names]."
    )


def _texts_of(row: Mapping[str, Any], texts: Texts) -> Any:
    if callable(texts):
        return texts(row)
    if isinstance(texts, str):
        return row[texts]
    return [row[name] for name in texts]


def _label_of(row: Mapping[str, Any], label: Any, num_choices: int) -> int | None:
    """Return the label of a row; None and negative numbers stand for none.

    Raises:
        DataError: It is no number of a choice.
    """
    found = label(row) if callable(label) else row[label]
    if found is None:
        return None
    if isinstance(found, int | np.integer) and found < num_choices:
        return int(found)
    name = "the label" if callable(label) else f"{label}="
    raise DataError(
        f"A row has {name}{found!r} and {num_choices} choices, which are numbered from 0. Number "
        f'them: label=lambda row: "ABCD".index(row["answer"]).'
    )
