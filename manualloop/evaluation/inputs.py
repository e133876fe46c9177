"""The texts of the rows that predictions were made of, looked up when a report asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

from manualloop.data.collate import tokenizer_of
from manualloop.data.preparation import preparation_of
from manualloop.tasks.names import notes_of

Texts = dict[str, str]
"""The texts of a row, by the names of their columns."""


class Found(NamedTuple):
    """The texts of some rows.

    Attributes:
        texts: Texts of each row.
        are_decoded: Whether they were made of tokens, and may differ from the original ones.
    """

    texts: list[Texts]
    are_decoded: bool


class Inputs:
    """Finds the texts of rows in the dataset of a loader, as long as that exists.

    It does not keep the dataset in memory. A copy, in this process or another, finds no texts.

    Args:
        loader: The loader that the rows come from; None for none.
        frame_index: What the loader knows, for a copy.
        task: Name of the task of the rows; "" if nobody knows it.

    Attributes:
        split: Name of the split; None if nobody knows it.
        names: Names of the columns of text that its tokens were made of.
        frame_index: The index of the ``pandas.DataFrame`` that the rows were; None of others.
        task: As the argument.
    """

    def __init__(self, loader: Any = None, frame_index: Any = None, task: str = "") -> None:
        made, self.task = preparation_of(loader), task
        self.frame_index = frame_index if made is None else made.frame_index
        self.split: str | None = getattr(getattr(loader, "batch_sampler", None), "split", None)
        self.names = notes_of(loader).texts
        self._tokenizer = tokenizer_of(loader)
        try:
            self._dataset: Any = ref(loader.dataset)
        except (AttributeError, TypeError):  # there is none, or none that can be referred to
            self._dataset = _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return Inputs, (None, self.frame_index, self.task)

    def texts(self, numbers: Sequence[int], tokenizer: Any = None) -> Found | None:
        """Return the texts of some rows; None if they cannot be had.

        They are the columns of text that the dataset still has, or what the tokenizer makes of the
        tokens. No code of the user's is called: a transform of the rows is passed over.

        Args:
            numbers: Numbers of the rows in the dataset.
            tokenizer: Tokenizer for loaders that have none.
        """
        dataset = self._dataset()
        rows = getattr(dataset, "rows", dataset)
        if not hasattr(rows, "with_format") or not hasattr(rows, "__len__"):
            return None
        names = [name for name, feature in (rows.features or {}).items() if _is_read(name, feature)]
        plain = rows.with_format(None).select_columns(names)
        if not names or any(not 0 <= number < len(plain) for number in numbers):
            return None
        found = [plain[n] for n in numbers]
        texts = texts_of(found, self._tokenizer or tokenizer, self.names)
        return None if texts is None else Found(texts, are_decoded=names == ["input_ids"])


def _nothing() -> None:
    return None


def _is_read(name: str, feature: Any) -> bool:
    # In datasets a list is a List, a LargeList, a Sequence(feature) (before 4.0) or [feature].
    while isinstance(feature, list) or getattr(feature, "feature", None) is not None:
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return name == "input_ids" or "string" in str(getattr(feature, "dtype", ""))


def texts_of(
    rows: Sequence[Any], tokenizer: Any = None, names: Sequence[str] = ()
) -> list[Texts] | None:
    """Return the texts of rows as a dataset gives them; None if there are none.

    Args:
        rows: The rows: texts, or dicts with texts, words or tokens.
        tokenizer: Tokenizer that decodes tokens; None leaves them out.
        names: Names of the texts that the tokens were made of.

    >>> texts_of([{"text": "a b", "words": ["c", "d"], "label": 1}, "e"])
    [{'text': 'a b', 'words': 'c d'}, {'text': 'e'}]
    """
    found = [_texts_of(row, tokenizer, tuple(names)) for row in rows]
    return found if any(found) else None


def _texts_of(row: Any, tokenizer: Any, names: tuple[str, ...]) -> Texts:
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, Mapping):
        return {}
    found = {str(name): text for name, cell in row.items() if (text := _text(cell)) is not None}
    ids = row.get("input_ids")
    if found or ids is None or not hasattr(tokenizer, "decode"):
        return found
    return _decoded(list(ids), tokenizer, names)


def _text(cell: Any) -> str | None:
    if isinstance(cell, str):
        return cell
    is_words = isinstance(cell, list) and cell and all(isinstance(word, str) for word in cell)
    return " ".join(cell) if is_words else None


def _decoded(ids: list[int], tokenizer: Any, names: tuple[str, ...]) -> Texts:
    """Decode tokens: one text for each of the names, if special tokens stand between them."""
    special = set(getattr(tokenizer, "all_special_ids", ())) - {
        getattr(tokenizer, "unk_token_id", None)
    }
    parts: list[list[int]] = [[]]
    for number in ids:
        if number not in special:
            parts[-1].append(number)
        elif parts[-1]:
            parts.append([])
    parts = [part for part in parts if part]
    if len(parts) != len(names):
        parts, names = [[number for number in ids if number not in special]], ("text",)
    return {name: tokenizer.decode(part) for name, part in zip(names, parts, strict=True)}
