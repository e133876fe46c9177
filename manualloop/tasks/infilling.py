"""Fill-in-the-middle: documents whose middle comes last, so that a model learns to fill gaps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch

from manualloop.errors import ConfigError, DataError
from manualloop.tasks.task import IGNORE_INDEX

_KNOWN = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 - DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>"),
)


def fill_in_middle(
    tokenizer: Any,
    rate: float = 0.5,
    *,
    spm_rate: float = 0.5,
    tokens: Sequence[str] | None = None,
    max_length: int | None = None,
) -> FillInMiddle:
    """Return a ``transform`` that moves the middle of documents to their end.

    A document is split at two places, drawn from all characters, and becomes ``<PRE> prefix <SUF>
    suffix <MID> middle`` (PSM) or ``<PRE> <SUF> suffix <MID> prefix middle`` (SPM), as in Bavarian
    et al., "Efficient Training of Language Models to Fill in the Middle", 2022. Documents that the
    tokenizer does not give back as they were, and those with special tokens, are split between
    tokens instead; one that holds any of the three tokens itself stays as it is. In a row of
    several documents, each ended by EOS, every document is drawn by itself. All tokens are labels,
    as in the paper.

    A row becomes longer by three tokens for each document that is changed. What has no room is cut
    from the end of its last document if that is unfinished, else from the beginning of its first.

    Args:
        tokenizer: Tokenizer of the model.
        rate: Probability with which a document is changed.
        spm_rate: Share of the changed documents in the order SPM.
        tokens: The three tokens before prefix, suffix and middle; None finds those of StarCoder,
            Qwen, CodeGemma, SantaCoder, DeepSeek and Code Llama.
        max_length: Number of tokens beyond which no row becomes longer; None takes the limit of the
            tokenizer (``model_max_length``), if it has one.

    Returns:
        A function for ``prepare_dataloaders(transform=)`` of rows that ``pack`` or ``cut`` makes.
        What it draws is a function of seed, epoch and row.

    Raises:
        ConfigError: The tokenizer does not have the three tokens, or a rate is not between 0 and 1.
    """
    for name, value in (("rate", rate), ("spm_rate", spm_rate)):
        if not isinstance(value, float | int) or not 0 <= value <= 1:
            raise ConfigError(f"{name} must be between 0 and 1, got {value!r}.")
    vocabulary = tokenizer.get_vocab()
    sets = _KNOWN if tokens is None else (tuple(tokens),)
    found = next((names for names in sets if all(name in vocabulary for name in names)), None)
    if found is None or len(found) != 3:
        wanted = f"tokens={tokens!r}" if tokens is not None else "tokens for prefix, suffix, middle"
        raise ConfigError(
            f"The tokenizer does not have the {wanted}. Add them, and embeddings for them: "
            'tokenizer.add_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], '
            "special_tokens=True); model.resize_token_embeddings(len(tokenizer))."
        )
    ids = [vocabulary[name] for name in found]
    limit = tokenizer.model_max_length if max_length is None else max_length
    special = frozenset(getattr(tokenizer, "added_tokens_decoder", {}))
    sentinels = ids[0], ids[1], ids[2]
    return FillInMiddle(tokenizer, float(rate), float(spm_rate), sentinels, limit, special)


# Columns that would no longer fit the tokens.
_BY_TOKEN = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")


class _Part(NamedTuple):
    """A document, or what a row has of it.

    Attributes:
        head: BOS, if it begins with that.
        prefix: Its tokens, or those before the middle.
        suffix: Tokens after the middle.
        middle: Tokens in the middle.
        tail: EOS, if it is finished.
        order: "psm" or "spm"; empty if it is not changed.
    """

    head: list[int]
    prefix: list[int]
    suffix: list[int]
    middle: list[int]
    tail: list[int]
    order: str = ""


@dataclass(frozen=True)
class FillInMiddle:
    """What ``fill_in_middle`` returns.

    Attributes:
        tokenizer: Tokenizer of the model.
        rate: Probability with which a document is changed.
        spm_rate: Share of the changed documents in the order SPM.
        sentinels: The tokens before prefix, suffix and middle.
        max_length: Number of tokens beyond which no row becomes longer.
        special: Tokens that no split goes through.
        lengthens: Words on how it makes rows longer.
    """

    tokenizer: Any
    rate: float
    spm_rate: float
    sentinels: tuple[int, int, int]
    max_length: int
    special: frozenset[int] = frozenset()
    lengthens: ClassVar[str] = "fill_in_middle adds three tokens to each document that it changes"
    cut_call: ClassVar[str] = "fill_in_middle(tokenizer, max_length={room})"

    def __call__(self, row: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the row with documents changed, and the labels.

        Raises:
            DataError: The row is not tokenized, or some of its tokens are no labels.
        """
        if "input_ids" not in row:
            raise DataError(
                f"fill_in_middle splits rows of tokens, and a row has only {', '.join(row)}. "
                "Tokenize first: prepare_dataloaders(..., preprocess=pack(tokenizer, 1024))."
            )
        ids = torch.as_tensor(row["input_ids"]).tolist()
        if "labels" in row and IGNORE_INDEX in torch.as_tensor(row["labels"]).tolist():
            raise DataError(
                "fill_in_middle changes the order of tokens, and some of a row have the label -100:"
                " nothing tells which of the new ones should. Use it with rows of plain text: "
                "preprocess=pack(tokenizer, 1024)."
            )
        parts = [self._drawn(part, generator) for part in self._parts_of(ids)]
        made = self._fitted(parts, max(self.max_length, len(ids))) or ids
        unchanged = {name: cell for name, cell in row.items() if name not in _BY_TOKEN}
        return {**unchanged, "input_ids": made, "labels": list(made)}

    def _parts_of(self, ids: list[int]) -> Iterator[_Part]:
        """Yield the documents of a row."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = 0
        for end in [n + 1 for n, token in enumerate(ids) if token == eos] + [len(ids)]:
            tokens = ids[start:end]
            start = end
            if not tokens:
                continue
            head = tokens[:1] if tokens[0] == bos and bos != eos else []
            tail = tokens[-1:] if tokens[-1] == eos else []
            yield _Part(head, tokens[len(head) : len(tokens) - len(tail)], [], [], tail)

    def _drawn(self, part: _Part, generator: torch.Generator) -> _Part:
        """Return a document, changed or not."""
        chance, kind = torch.rand(2, generator=generator).tolist()
        if chance >= self.rate or not part.prefix or not {*self.sentinels}.isdisjoint(part.prefix):
            return part
        prefix, middle, suffix = self._split(part.prefix, generator)
        order = "spm" if kind < self.spm_rate else "psm"
        return part._replace(prefix=prefix, middle=middle, suffix=suffix, order=order)

    def _split(self, ids: list[int], generator: torch.Generator) -> list[list[int]]:
        """Return the tokens of prefix, middle and suffix."""
        places = torch.rand(2, generator=generator).sort().values.tolist()
        text = self._text(ids) if self.special.isdisjoint(ids) else ""
        if text and self._ids(text) == ids:
            first, second = (int(place * (len(text) + 1)) for place in places)
            texts = [text[:first], text[first:second], text[second:]]
            parts = [self._ids(part) if part else [] for part in texts]
            whole = [token for part in parts for token in part]  # some put a space before each
            if list(map(self._text, parts)) == texts and self._text(whole) == text:
                return parts
        first, second = (int(place * (len(ids) + 1)) for place in places)
        return [ids[:first], ids[first:second], ids[second:]]

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    def _fitted(self, parts: list[_Part], length: int) -> list[int] | None:
        """Return the documents as a row of at most that length; None if there is no room."""
        made = list(chain.from_iterable(map(self._written, parts)))
        over = len(made) - length
        if over <= 0 or not parts[-1].tail:
            return made[:length]
        first = parts[0]
        if len(first.prefix) < over:
            return None
        parts = [first._replace(prefix=first.prefix[over:]), *parts[1:]]
        return list(chain.from_iterable(map(self._written, parts)))

    def _written(self, part: _Part) -> list[int]:
        """Return the tokens of a document in their order."""
        before, after, between = self.sentinels
        inner = part.prefix
        if part.order == "psm":
            inner = [before, *part.prefix, after, *part.suffix, between, *part.middle]
        elif part.order == "spm":
            inner = [before, after, *part.suffix, between, *part.prefix, *part.middle]
        return [*part.head, *inner, *part.tail]
