"""Two columns of text, a prompt and what completes it, to rows of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from manualloop.errors import ConfigError, DataError
from manualloop.models import unwrap_model
from manualloop.tasks.chats import add_row, describe_left, describe_stops, learned
from manualloop.tasks.made import Made, Place, Rows, counted, place_in_batch
from manualloop.tasks.rendering import Encoded, continuation, stops_of
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.tasks.texts import require_columns


def complete(
    tokenizer: Any,
    prompt: str = "prompt",
    completion: str = "completion",
    *,
    max_length: int | None = None,
) -> Complete:
    """Return a ``preprocess`` that turns prompts and completions into tokens.

    Both are tokenized apart, as in generation, the prompt with the special tokens that begin a text
    and the completion with ``eos_token`` at its end. Labels are those of the completion.

    Args:
        tokenizer: Tokenizer with an ``eos_token``.
        prompt: Column of the prompts.
        completion: Column of the completions.
        max_length: Most tokens of a row. Of longer ones the beginning of the prompt is cut off; a
            completion that does not fit itself is left out.

    Returns:
        The function, which returns ``input_ids`` and ``labels``.

    Raises:
        ConfigError: The tokenizer has no ``eos_token``.
    """
    require_eos(tokenizer)
    return Complete(tokenizer, prompt, completion, max_length)


def require_eos(tokenizer: Any) -> None:
    """Refuse a tokenizer with which a model could not learn where a text ends.

    Raises:
        ConfigError: It has no ``eos_token``.
    """
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ConfigError(
            "The tokenizer has no eos_token, so the model would never learn to stop. Name one of "
            'its tokens: tokenizer.eos_token = "</s>".'
        )


@dataclass(frozen=True)
class Complete:
    """A ``preprocess`` for prompts and completions. Made by ``complete``.

    Attributes:
        tokenizer: Tokenizer with an ``eos_token``.
        prompt: Column of the prompts.
        completion: Column of the completions.
        max_length: Most tokens of a row; None: any.
        known: Numbers of the tokens at which the model's generation stops; empty if unknown.
    """

    tokenizer: Any
    prompt: str
    completion: str
    max_length: int | None
    known: frozenset[int] = frozenset()
    cut_call: ClassVar[str] = "complete(tokenizer, max_length={room})"

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return ``input_ids`` and ``labels``."""
        return self.make(rows, place_in_batch).columns

    def with_model(self, model: nn.Module) -> Complete:
        """Return the function with the stop tokens of a model's generation."""
        return replace(self, known=stops_of(unwrap_model(model)))

    def make(self, rows: Rows, place: Place) -> Made:
        """Return the rows with their sources and counts."""
        require_columns(rows, (self.prompt, self.completion), "prompt= and completion=")
        made = Made({"input_ids": [], "labels": []}, [], Counter())
        pairs = zip(rows[self.prompt], rows[self.completion], strict=True)
        for number, (before, after) in enumerate(pairs):
            made.counts["texts"] += 1
            require_text(before, place(number), self.prompt)
            require_text(after, place(number), self.completion)
            if not after:
                made.counts["empty"] += 1
                continue
            head, tail = head_of(self.tokenizer, before or ""), tail_of(self.tokenizer, after)
            kept = cut_head(self.tokenizer, head, len(tail), self.max_length)
            if kept is None:
                made.counts.update(("lost", "long"))
                continue
            made.counts["cut"] += len(kept) < len(head)
            add_row(made, number, joined(kept, tail))
        return made

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return what became of the texts, and what generation would do otherwise."""
        rows, texts = counted(counts["rows"], "row"), counted(counts["texts"], "prompt")
        lines = [f"{texts} with a completion became {rows}, {learned(counts)}"]
        if counts.get("cut"):
            lines.append(f"cut off at the beginning: {counted(counts['cut'], 'prompt')}")
        lines += describe_left(counts, self.max_length, "completion")
        return [*lines, *describe_stops(self.tokenizer, counts, self.known)]


def require_text(value: Any, where: str, column: str) -> None:
    """Refuse a cell that is no text; an empty one is left to the caller.

    Raises:
        DataError: The cell is a list or a number.
    """
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{column!r} in {where} is {value!r:.80}, no text. For lists of messages use "
            f'chat(tokenizer, column="{column}").'
        )


def head_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a prompt, with the special tokens that begin a text.

    A rendered prompt may begin with ``bos_token`` itself, and gets no second one. It keeps the end
    that is in its text, as of an earlier turn; one that the tokenizer adds is left out.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    if ids[:2] == [getattr(tokenizer, "bos_token_id", None)] * 2:
        ids = ids[1:]
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None}
    is_ended = len(ids) > 0 and ids[-1] in ends
    return ids[: len(ids) - _num_added(tokenizer, text or "a")] if is_ended else ids


def _num_added(tokenizer: Any, text: str) -> int:
    """Return the number of tokens that a tokenizer adds behind a text; 1 where nothing tells."""
    whole: list[int] = tokenizer(text)["input_ids"]
    own: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    number = len(whole) - len(own)
    starts = (n for n in range(number + 1) if whole[n : n + len(own)] == own)
    return next((number - start for start in starts), 1)


def tail_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a completion, which ends with ``eos_token``."""
    ids, eos = continuation(tokenizer, text), tokenizer.eos_token_id
    return ids if ids[-1:] == [eos] else [*ids, eos]


def cut_head(
    tokenizer: Any, head: list[int], num_after: int, max_length: int | None
) -> list[int] | None:
    """Cut off the beginning of a prompt, except a token that begins every text.

    Args:
        tokenizer: The tokenizer.
        head: Tokens of the prompt.
        num_after: Number of tokens that come after it.
        max_length: Most tokens of both; None: any.

    Returns:
        What is left of the prompt; None if what comes after it does not fit.
    """
    if max_length is None or len(head) + num_after <= max_length:
        return head
    begin = head[:1] if head[:1] == [getattr(tokenizer, "bos_token_id", None)] else []
    room = max_length - num_after - len(begin)
    return None if room < 1 else [*begin, *head[-room:]]


def joined(head: list[int], tail: list[int]) -> Encoded:
    """Return a prompt and its completion as a row."""
    labels = [IGNORE_INDEX] * len(head) + tail
    return Encoded(head + tail, labels, [len(labels)], tail[-1:])
