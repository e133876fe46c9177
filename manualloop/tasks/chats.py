"""Chats to rows of tokens, of which only what the model has to write is learned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from manualloop.errors import ConfigError, DataError
from manualloop.models import unwrap_model
from manualloop.tasks.made import Made, Place, Rows, counted, place_in_batch
from manualloop.tasks.rendering import (
    Encoded,
    Message,
    check_messages,
    encode,
    render,
    render_answers,
    stop_ids,
    stops_of,
    without_nones,
)
from manualloop.tasks.task import IGNORE_INDEX

Trains = Callable[[Message], bool]
"""A function of a message that tells whether the model has to write it."""

_OWN_OPTIONS = ("add_generation_prompt", "continue_final_message", "padding", "truncation")
_STARTS = ("return_", "tokenize", "sanitize_control_tokens", *_OWN_OPTIONS)


def chat(
    tokenizer: Any,
    *,
    column: str = "messages",
    max_length: int | None = None,
    trains: Trains | None = None,
    stop: str | Collection[str] | None = None,
    **template_options: Any,
) -> Chat:
    """Return a ``preprocess`` that turns chats into tokens, and labels those of the answers.

    Works with any chat template. An answer begins where the prompt for it ends, as the template
    renders it for generation, and its labels end with its stop token. If the template only appends,
    a chat becomes one row; if it changes what came before, as those do that drop earlier thoughts,
    one row for each answer. A message with ``"train": False`` is not learned.

    Keys that are None in messages and tools are left out: a column of dicts has all keys in each
    row. A column ``tools`` reaches the template.

    Args:
        tokenizer: Tokenizer with a chat template.
        column: Column of the chats: lists of dicts with ``role`` and ``content``.
        max_length: Most tokens of a row. A longer one keeps the whole answers that fit.
        trains: ``trains(message)`` tells whether the model has to write a message; None: if its
            role is "assistant".
        stop: Tokens with which an answer may end, beside the tokenizer's ``eos_token`` and those of
            the model's ``generation_config``.
        template_options: Arguments of ``apply_chat_template``, such as ``tools`` or
            ``enable_thinking``.

    Returns:
        The function, which returns ``input_ids`` and ``labels``.

    Raises:
        ConfigError: The tokenizer has no chat template, or nothing tells where answers end.
    """
    check_template(tokenizer, template_options)
    return Chat(
        tokenizer,
        column,
        max_length,
        trains,
        stop_ids(tokenizer, stop),
        template_options,
    )


def check_template(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Refuse a tokenizer without a chat template, and options that are set here.

    Raises:
        ConfigError: The message has the line that fixes it.
    """
    if own := [name for name in options if name.startswith(_STARTS)]:
        raise ConfigError(
            f"{own[0]!r} is no option of a chat template: the function itself renders prompts and "
            "answers and tokenizes them. Leave it out."
        )
    if not getattr(tokenizer, "chat_template", None) and "chat_template" not in options:
        raise ConfigError(
            f"The {type(tokenizer).__name__} has no chat template. Take that of the model to come: "
            "tokenizer.chat_template = AutoTokenizer.from_pretrained(name).chat_template, or pass "
            "chat_template=."
        )


@dataclass(frozen=True)
class Chat:
    """A ``preprocess`` for chats. Made by ``chat``.

    Attributes:
        tokenizer: Tokenizer with a chat template.
        column: Column of the chats.
        max_length: Most tokens of a row; None: any.
        trains: Function of a message that tells whether it is learned; None: by its role.
        stops: Numbers of the tokens with which an answer may end.
        options: Arguments of ``apply_chat_template``.
        known: Numbers of the tokens at which the model's generation stops; empty if unknown.
    """

    tokenizer: Any
    column: str
    max_length: int | None
    trains: Trains | None
    stops: frozenset[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    known: frozenset[int] = frozenset()
    cut_call: ClassVar[str] = "chat(tokenizer, max_length={room})"

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return ``input_ids`` and ``labels``."""
        return self.make(rows, place_in_batch).columns

    def with_model(self, model: nn.Module) -> Chat:
        """Return the function with the stop tokens of a model's generation."""
        known = stops_of(unwrap_model(model))
        return replace(self, stops=self.stops | known, known=known)

    def make(self, rows: Rows, place: Place) -> Made:
        """Return the rows with their sources and counts."""
        if self.column not in rows:
            raise DataError(
                f"There is no column {self.column!r}. The columns: {', '.join(rows)}. Name the one "
                f'with the chats: chat(tokenizer, column="{next(iter(rows), "messages")}").'
            )
        made = Made({"input_ids": [], "labels": []}, [], Counter())
        tools = rows.get("tools") if "tools" not in self.options else None
        for number, messages in enumerate(rows[self.column]):
            options = options_of_row(self.options, None if tools is None else tools[number])
            found = check_messages(messages, place(number), self.column)
            encoded = self._encode(found, place(number), options, made.counts)
            made.counts["chats"] += 1
            made.counts["empty"] += not encoded
            kept = [one for whole in encoded if (one := self._cut(whole, made.counts)) is not None]
            for row in kept:
                add_row(made, number, row)
            made.counts["dated"] += number == 0 and self._is_dated(found, options)
        return made

    def _encode(
        self, messages: Sequence[Message], where: str, options: Mapping[str, Any], counts: Any
    ) -> list[Encoded]:
        trained = [is_trained(message, self.trains) for message in messages]
        if trained and trained[0]:
            trained[0] = False  # no prompt leads to it
            counts["first"] += 1
        texts = render_answers(self.tokenizer, messages, trained, where, options)
        return [encode(self.tokenizer, text, self.stops.__contains__, where) for text in texts]

    def _cut(self, encoded: Encoded, counts: Any) -> Encoded | None:
        kept = encoded.cut(self.max_length)
        num_kept = 0 if kept is None else len(kept.ends)
        counts["lost"] += len(encoded.ends) - num_kept
        counts["long"] += kept is None
        return kept

    def _is_dated(self, messages: Sequence[Message], options: Mapping[str, Any]) -> bool:
        """Tell whether the text of a chat depends on the day on which it is rendered."""
        template = options.get("chat_template") or self.tokenizer.chat_template
        if not messages or "strftime_now" not in str(template):
            return False
        text = render(self.tokenizer, messages, "a chat", options)
        try:
            other = render(self.tokenizer, messages, "a chat", options, strftime_now=_no_day)
        except DataError:  # newer versions of transformers do not let templates call functions
            return True
        return text != other

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return what became of the chats, and what generation would do otherwise."""
        rows, chats = counted(counts["rows"], "row"), counted(counts["chats"], "chat")
        lines = [f"{chats} became {rows}, {learned(counts)}"]
        lines += describe_left(counts, self.max_length, "chat")
        if counts.get("dated"):
            lines.append(
                "the chat template writes today's date, so rows that are made on another day "
                "differ, and cached ones keep theirs. Fix it if the template takes it: "
                'chat(tokenizer, date_string="26 Jul 2024")'
            )
        return [*lines, *describe_stops(self.tokenizer, counts, self.known)]


def _no_day(form: str) -> str:
    return "some day"


def is_trained(message: Message, trains: Trains | None) -> bool:
    """Tell whether the model has to write a message."""
    if message.get("train") is False:
        return False
    return bool(message["role"] == "assistant" if trains is None else trains(message))


def options_of_row(options: Mapping[str, Any], tools: Any) -> Mapping[str, Any]:
    """Return the arguments of the template for a row that may have tools of its own."""
    if not tools:
        return options
    return {
        **options,
        "tools": json.loads(tools) if isinstance(tools, str) else without_nones(tools),
    }


def add_row(made: Made, source: int, row: Encoded) -> None:
    """Add a row of tokens to those that were made."""
    made.columns["input_ids"].append(row.ids)
    made.columns["labels"].append(row.labels)
    made.sources.append(source)
    made.counts["rows"] += 1
    made.counts["tokens"] += len(row.ids)
    made.counts["labels"] += len(row.labels) - row.labels.count(IGNORE_INDEX)
    made.counts["longer"] += row.num_longer
    made.counts.update(f"stop {stop}" for stop in row.stops)


def learned(counts: Mapping[str, int]) -> str:
    """Return the words on how many tokens are learned."""
    return f"with labels at {counts.get('labels', 0):,} of {counts.get('tokens', 0):,} tokens"


def describe_left(counts: Mapping[str, int], max_length: int | None, noun: str) -> list[str]:
    """Return the sentences on what was left out."""
    lines = []
    if counts.get("lost"):
        lines.append(
            f"left out beyond {max_length} tokens: {counted(counts['lost'], 'answer')}; "
            f"{counted(counts.get('long', 0), 'row')} had none that fits"
        )
    if counts.get("empty"):
        lines.append(
            f"left out, because nothing is to be learned: {counted(counts['empty'], noun)}"
        )
    if counts.get("first"):
        lines.append(
            f"not learned, because no message comes before it: {counted(counts['first'], 'answer')}"
        )
    return lines


def describe_longer(counts: Mapping[str, int]) -> list[str]:
    """Return the sentence on answers with text behind their stop token."""
    if not (number := counts.get("longer")):
        return []
    return [
        f"text behind the stop token, which is not learned: in {counted(number, 'answer')}. If the "
        "text of an answer holds that token, take it out; if the template ends answers with "
        "another one, name it: stop="
    ]


def describe_stops(tokenizer: Any, counts: Mapping[str, int], known: frozenset[int]) -> list[str]:
    """Return the sentence on stop tokens at which the model's generation would not stop."""
    lines = describe_longer(counts)
    used = {int(name.removeprefix("stop ")) for name in counts if name.startswith("stop ")}
    if not known or not (unknown := sorted(used - known)):
        return lines
    token, after = tokenizer.convert_ids_to_tokens(unknown[0]), sorted(known | used)
    return [
        *lines,
        f"answers end with {token!r} (id {unknown[0]}), at which generation would not stop: "
        f"model.generation_config.eos_token_id is {sorted(known)}. Add it: "
        f"model.generation_config.eos_token_id = {after}",
    ]
