"""Plain text as rows of a language model: one document a row, or documents one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from manualloop.arguments import is_count
from manualloop.errors import ConfigError
from manualloop.tasks.made import Made, Place, Rows, counted, place_in_batch
from manualloop.tasks.texts import encode_texts, texts_of


def cut(tokenizer: Any, max_length: int, column: str = "text") -> Cut:
    """Return a ``preprocess`` that makes a row of each document, cut at a number of tokens.

    A document that fits ends with the token by which the tokenizer ends texts, or else with its EOS
    token; one that is cut off at its end does so only if the tokenizer adds that token to every
    text, and one that is cut off at its beginning (``truncation_side="left"``) always does. The
    labels are the tokens themselves, for a causal language model, which learns to write each of
    them after those before it. A masked one gets its labels from ``mask_tokens``. Documents without
    a token of text are left out.

    Args:
        tokenizer: Tokenizer of the model.
        max_length: Number of tokens of the longest rows.
        column: Column of the documents.

    Returns:
        A function for ``prepare_dataloaders(preprocess=)``, which makes the columns ``input_ids``
        and ``labels``. A line reports how many documents are cut off or left out.

    Raises:
        ConfigError: ``max_length`` is not a whole number of at least 2.
    """
    _require_length("max_length", max_length)
    return Cut(tokenizer, max_length, column)


def pack(tokenizer: Any, length: int, column: str = "text") -> Pack:
    """Return a ``preprocess`` that puts documents one after the other, and cuts rows of one length.

    This is how language models are pretrained. Between two documents is the token by which the
    tokenizer ends texts, or else its EOS token. What is left at the end of each batch of documents
    that ``dataset.map`` passes (1,000) is too short for a row, and is left out; a line reports how
    many tokens that are.

    Documents in one row see each other: attention runs from each to those before it, as in
    transformers' ``run_clm.py``. Where they should not, make a row of each by ``cut`` or ``chat``,
    and let ``prepare_dataloaders(pack=True)`` put rows into packs, in which they are kept apart.

    Args:
        tokenizer: Tokenizer of the model.
        length: Number of tokens of every row.
        column: Column of the documents.

    Returns:
        A function for ``prepare_dataloaders(preprocess=)``, which makes the columns ``input_ids``
        and ``labels``. They are equal: the model shifts the labels.

    Raises:
        ConfigError: ``length`` is not a whole number of at least 2.
    """
    _require_length("length", length)
    return Pack(tokenizer, length, column)


def _require_length(name: str, value: Any) -> None:
    if not is_count(value) or value < 2:
        raise ConfigError(f"{name} must be a whole number of at least 2, got {value!r}.")


@dataclass(frozen=True)
class Cut:
    """What ``cut`` returns; the attributes are its arguments."""

    tokenizer: Any
    max_length: int
    column: str
    cut_call: ClassVar[str] = "cut(tokenizer, max_length={room})"

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return a row of tokens for each document."""
        return self.make(rows, place_in_batch).columns

    def make(self, rows: Rows, place: Place) -> Made:
        """Return a row of tokens for each document, and how many are cut off or left out."""
        texts = texts_of(rows, self.column, place)
        is_left = getattr(self.tokenizer, "truncation_side", "right") == "left"
        most = None if is_left else self.max_length
        columns, are_cut = encode_texts(self.tokenizer, texts, most)
        ending = Ending(self.tokenizer)
        made, sources = list[list[int]](), list[int]()
        counts = Counter(documents=len(texts))
        for number, (ids, is_cut) in enumerate(zip(columns["input_ids"], are_cut, strict=True)):
            if not ending.has_text(ids):
                counts["empty"] += 1
                continue
            if is_left:
                ids = ending.ended(ids)
                is_cut = len(ids) > self.max_length
                ids = ending.last(ids, self.max_length) if is_cut else ids
            elif not is_cut and not ending.is_ended(ids):
                is_cut = len(ids) >= self.max_length  # there is no room for the end
                ids = ids if is_cut else ending.ended(ids)
            counts["cut"] += is_cut
            counts["labels"] += len(ids)
            made.append(ids)
            sources.append(number)
        return Made({"input_ids": made, "labels": list(map(list, made))}, sources, counts)

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return how many documents are cut off, and how many left out."""
        documents = counted(counts["documents"], "document")
        lines = [f"{documents} with {counted(counts.get('labels', 0), 'token')}"]
        if number := counts.get("cut"):
            lines.append(f"{number:,} cut at {self.max_length} tokens")
        if number := counts.get("empty"):
            lines.append(f"{number:,} left out, without text")
        return lines


@dataclass(frozen=True)
class Pack:
    """What ``pack`` returns; the attributes are its arguments."""

    tokenizer: Any
    length: int
    column: str
    cut_call: ClassVar[str] = "pack(tokenizer, length={room})"

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return rows of one length."""
        return self.make(rows, place_in_batch).columns

    def make(self, rows: Rows, place: Place) -> Made:
        """Return rows of one length, and how many tokens are left out.

        Raises:
            ConfigError: The tokenizer has no token to end a document with.
        """
        texts = texts_of(rows, self.column, place)
        columns, _ = encode_texts(self.tokenizer, texts, None)
        ending = Ending(self.tokenizer)
        documents = [
            ending.ended(ids) if ending.has_text(ids) else [] for ids in columns["input_ids"]
        ]
        tokens = list(chain.from_iterable(documents))
        starts = range(0, len(tokens) - self.length + 1, self.length)
        made = [tokens[start : start + self.length] for start in starts]
        left = len(tokens) - len(made) * self.length
        counts = Counter(documents=len(texts), rows=len(made), left=left)
        counts["empty"] = sum(not document for document in documents)
        sources = _documents_at(starts, documents)
        return Made({"input_ids": made, "labels": list(map(list, made))}, sources, counts)

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return how many rows there are, and how many tokens are left out."""
        rows = f"{counted(counts['rows'], 'row')} of {self.length} tokens"
        lines = [f"{counted(counts['documents'], 'document')} became {rows}"]
        if number := counts.get("left"):
            lines.append(f"{counted(number, 'token')} left out, too few for a row")
        if number := counts.get("empty"):
            lines.append(f"{counted(number, 'document')} left out, without text")
        return lines


def _documents_at(starts: Sequence[int], documents: Sequence[Sequence[int]]) -> list[int]:
    """Return the number of the document in which each row begins."""
    found, number, end = list[int](), -1, 0
    for start in starts:
        while end <= start:
            number += 1
            end += len(documents[number])
        found.append(number)
    return found


class Ending:
    """How a tokenizer ends a document.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._special = frozenset(tokenizer.all_special_ids)
        self._unknown = tokenizer.unk_token_id
        self._eos = tokenizer.eos_token_id
        self._begins = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
        # Some add a token to the end of every text, such as [SEP] or </s>.
        alone = tokenizer("", verbose=False)["input_ids"]
        self._own = alone[-1] if alone else None

    def has_text(self, ids: Sequence[int]) -> bool:
        """Tell whether a document has a token that is not special."""
        return any(token not in self._special or token == self._unknown for token in ids)

    def is_ended(self, ids: Sequence[int]) -> bool:
        """Tell whether the last token is one that ends a document."""
        return len(ids) > 0 and (ids[-1] == self._eos or self._ends_itself(ids))

    def _ends_itself(self, ids: Sequence[int]) -> bool:
        # A token that begins every text is no end, though it is the only one of an empty text.
        return ids[-1] == self._own and (len(ids) == 1 or ids[0] != self._own)

    def last(self, ids: list[int], number: int) -> list[int]:
        """Return the last tokens of a document, behind a token that begins every text."""
        begin = ids[:1] if ids[0] in self._begins else []
        return [*begin, *ids[len(ids) - number + len(begin) :]]

    def ended(self, ids: list[int]) -> list[int]:
        """Return a document with its end.

        Raises:
            ConfigError: The tokenizer has no such token.
        """
        if self.is_ended(ids):
            return ids
        if self._eos is None:
            raise ConfigError(
                "The tokenizer has no EOS token, so that nothing would end a document. Name one of "
                'its tokens: tokenizer.eos_token = "</s>".'
            )
        return [*ids, self._eos]
