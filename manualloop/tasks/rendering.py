"""Chats as texts, the parts of them that a model has to write, and their tokens.

What the model has to write is found without a mark in the template: an answer begins where the
prompt for it ends, as the template renders it for generation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from manualloop.errors import ConfigError, DataError
from manualloop.tasks.task import IGNORE_INDEX

Message: TypeAlias = Mapping[str, Any]

_QUOTED = 40  # characters of a text that a message quotes


class Rendered(NamedTuple):
    """A text and the parts of it that the model has to write.

    Attributes:
        text: The text.
        spans: Start and end of each part, in characters.
    """

    text: str
    spans: list[tuple[int, int]]


class Encoded(NamedTuple):
    """A row of tokens.

    Attributes:
        ids: The tokens.
        labels: The same, and -100 where the model has nothing to write.
        ends: Number of tokens up to the end of each answer.
        stops: The token with which each answer ends.
        num_longer: Number of answers with text behind that token.
    """

    ids: list[int]
    labels: list[int]
    ends: list[int]
    stops: list[int]
    num_longer: int = 0

    def cut(self, max_length: int | None) -> Encoded | None:
        """Return the row with as many whole answers as fit; None if none does."""
        if max_length is None or len(self.ids) <= max_length:
            return self
        kept = [end for end in self.ends if end <= max_length]
        if not kept:
            return None
        ids, labels = self.ids[: kept[-1]], self.labels[: kept[-1]]
        return Encoded(ids, labels, kept, self.stops[: len(kept)], min(self.num_longer, len(kept)))


def without_nones(value: Any) -> Any:
    """Return lists and dicts without the entries that are None.

    A column of dicts has all keys in every row: those that a row did not have are None in it.
    """
    if isinstance(value, Mapping):
        return {key: without_nones(part) for key, part in value.items() if part is not None}
    return [without_nones(part) for part in value] if isinstance(value, list | tuple) else value


def check_messages(messages: Any, where: str, column: str = "messages") -> list[Message]:
    """Return the messages of a chat without the entries that are None.

    Args:
        messages: The messages.
        where: Name of the row in messages of errors.
        column: Column that they are in.

    Raises:
        DataError: They are no list of dicts with a role.
    """
    if isinstance(messages, str):
        raise DataError(
            f"{where} holds a text, {messages!r:.80}, where a list of messages is wanted. If it is "
            f'JSON: import json; dataset.map(lambda row: {{"{column}": json.loads(row["{column}"])'
            "}); to train on prompt and answer as texts use complete(tokenizer, prompt=, "
            "completion=)."
        )
    found: list[Message] = without_nones(messages or [])
    for message in found:
        if not isinstance(message, Mapping) or "role" not in message:
            shown = f"{message!r:.80}"
            fix = 'Make each of them {"role": "user" or "assistant", "content": text}.'
            if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
                fix = (
                    'Rename its keys: {"role": {"human": "user", "gpt": "assistant"}.get('
                    'message["from"], message["from"]), "content": message["value"]}.'
                )
            raise DataError(f"{where} has a message without a role: {shown}. {fix}")
    return found


def render(
    tokenizer: Any, messages: Sequence[Message], where: str, options: Mapping[str, Any], **more: Any
) -> str:
    """Render messages by the chat template.

    Raises:
        DataError: The template refuses them.
    """
    plain = [{key: part for key, part in m.items() if key != "train"} for m in messages]
    try:
        text: str = tokenizer.apply_chat_template(plain, tokenize=False, **{**options, **more})
    except Exception as error:  # of the template: there is no common class for them
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(
            f"The chat template cannot render the messages of {where} ({roles}): {error}. Correct "
            "the chat, filter it out, or pass another chat_template=."
        ) from error
    return text


def render_answers(
    tokenizer: Any,
    messages: Sequence[Message],
    are_trained: Sequence[bool],
    where: str,
    options: Mapping[str, Any],
) -> list[Rendered]:
    """Render a chat: as one text, if the template only appends, else as one text an answer.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: The messages.
        are_trained: Whether the model has to write each of them; never the first, to which there
            is no prompt.
        where: Name of the row in messages.
        options: Arguments of ``apply_chat_template``.

    Raises:
        DataError: The template renders the prompt for an answer otherwise than the text before it.
    """
    found = []
    for number, message in enumerate(messages):
        if not are_trained[number]:
            continue
        prompt = render(tokenizer, messages[:number], where, options, add_generation_prompt=True)
        through = render(tokenizer, messages[: number + 1], where, options)
        if not through.startswith(prompt):
            raise DataError(_other_prompt(prompt, through, number, message, where))
        found.append((through, len(prompt), len(through)))
    if not found:
        return []
    whole = render(tokenizer, messages, where, options)
    ends = [_end_in(whole, through) for through, _, _ in found]
    if None in ends:
        return [Rendered(through, [(start, end)]) for through, start, end in found]
    starts = [start for _, start, _ in found]
    return [Rendered(whole, [(s, e or 0) for s, e in zip(starts, ends, strict=True)])]


def _end_in(whole: str, text: str) -> int | None:
    """Return where a text ends in a longer one that begins with it; None if it does not.

    Some templates strip the white space behind the last message.
    """
    if whole.startswith(text):
        return len(text)
    bare = text.rstrip()
    return len(bare) if whole.startswith(bare) else None


def _other_prompt(prompt: str, through: str, number: int, message: Message, where: str) -> str:
    pairs = zip(prompt, through, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(through)))
    return (
        f"Message {number} ({message['role']}) of {where}: the prompt for generation ends with "
        f"{prompt[same:][-_QUOTED:]!r}, and in the rendered chat "
        f"{through[same : same + _QUOTED]!r} stands there. Trained so, the model would see another "
        "prompt than it gets when it generates. Use a template whose prompt begins the answer, or "
        "template options with which it does (enable_thinking=False, for example)."
    )


def continuation(tokenizer: Any, text: str, last: int | None = None) -> list[int]:
    """Tokenize a text that continues another, without special tokens around it.

    Some tokenizers put a space before the first word of a text, or join it with a line break. So it
    is tokenized behind something else, whose tokens are left out again, and that with which the
    tokens are the text is believed. Behind a special token it is tokenized as there.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        last: The token before it, if the text is a part of a prompt.
    """

    def ids_of(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    found = None
    if last is not None and last in getattr(tokenizer, "added_tokens_decoder", {}):
        token = tokenizer.convert_ids_to_tokens(last)
        if (ids := ids_of(token + text))[:1] == [last]:
            return ids[1:]
    for before in ("\n", getattr(tokenizer, "eos_token", None) or "", "."):
        start = ids_of(before)
        if not start or (ids := ids_of(before + text))[: len(start)] != start:
            continue
        if tokenizer.decode(ids) == tokenizer.decode(start) + text:
            return ids[len(start) :]
        found = ids[len(start) :] if found is None else found
    return ids_of(text) if found is None else found


def encode(
    tokenizer: Any, rendered: Rendered, is_stop: Callable[[int], bool], where: str
) -> Encoded:
    """Tokenize a text without special tokens, and label the parts that the model has to write.

    The labels of a part end with its last stop token; text behind that is counted.

    Raises:
        DataError: A part has no stop token.
    """
    text, spans = rendered
    whole = _whole(tokenizer, text, spans)
    ids, places = whole if whole is not None else _in_parts(tokenizer, text, spans)
    labels = [IGNORE_INDEX] * len(ids)
    ends, stops, num_longer = [], [], 0
    for (first, last), (start, end) in zip(places, spans, strict=True):
        stop = next((n for n in range(last - 1, first - 1, -1) if is_stop(ids[n])), None)
        if stop is None:
            raise DataError(_no_stop(tokenizer, text[start:end], ids[first:last], where))
        labels[first : stop + 1] = ids[first : stop + 1]
        ends.append(stop + 1)
        stops.append(ids[stop])
        behind = ids[stop + 1 : last]
        num_longer += bool(behind) and bool(str(tokenizer.decode(behind)).strip())
    return Encoded(ids, labels, ends, stops, num_longer)


Places: TypeAlias = "list[tuple[int, int]]"
"""The first token of each span, and the one behind its last."""


def _whole(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], Places] | None:
    """Tokenize a text at once; None if a token lies across a border of a span, or nobody knows."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = made["input_ids"]
    offsets: list[tuple[int, int]] = made["offset_mapping"]
    places, added = [], getattr(tokenizer, "added_tokens_decoder", {})
    for start, end in spans:
        first = next((n for n, (_, b) in enumerate(offsets) if b > start), len(ids))
        if first < len(ids) and offsets[first][0] < start:
            return None
        # Behind a token that always stands alone, the text is tokenized as if it began there.
        is_alone = first and offsets[first - 1][1] == start and ids[first - 1] in added
        if not is_alone:
            prompt: list[int] = tokenizer(text[:start], add_special_tokens=False)["input_ids"]
            if ids[: len(prompt)] != prompt:
                return None
            first = len(prompt)
        last = next((n for n in range(first, len(ids)) if offsets[n][1] > end), len(ids))
        if last < len(ids) and offsets[last][0] < end:
            return None
        places.append((first, last))
    return ids, places


def _in_parts(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], Places]:
    """Tokenize the parts of a text apart, as it comes about in generation."""
    ids: list[int] = []
    places, begin = [], 0
    for start, end in spans:
        ids += _part(tokenizer, text, begin, start, ids[-1] if ids else None)
        first = len(ids)
        ids += _part(tokenizer, text, start, end)
        places.append((first, len(ids)))
        begin = end
    return ids + _part(tokenizer, text, begin, len(text), ids[-1] if ids else None), places


def _part(tokenizer: Any, text: str, begin: int, end: int, last: int | None = None) -> list[int]:
    if begin == end:
        return []
    if begin:
        return continuation(tokenizer, text[begin:end], last)
    ids: list[int] = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
    return ids


def _no_stop(tokenizer: Any, answer: str, ids: Sequence[int], where: str) -> str:
    last = next((n for n in reversed(ids) if str(tokenizer.decode([n])).strip()), None)
    ends = f"ends with {answer[-_QUOTED:]!r}"
    advice = "Use a chat template that ends each answer with tokenizer.eos_token"
    if last is not None:
        token = tokenizer.convert_ids_to_tokens(last)
        advice += (
            f", or, if generation is to stop at {token!r} (id {last}), name it: stop={token!r}"
        )
    return (
        f"An answer of {where} {ends} and has no stop token: the model would never learn to stop. "
        f"{advice}."
    )


def stop_ids(tokenizer: Any, stop: str | Collection[str] | None) -> frozenset[int]:
    """Return the numbers of the tokens with which an answer may end.

    Raises:
        ConfigError: The tokenizer has no end-of-sequence token, or not one that was named.
    """
    names = (stop,) if isinstance(stop, str) else tuple(stop or ())
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names}
    unknown = [n for n in names if tokenizer.convert_tokens_to_ids(n) in (None, _unk(tokenizer))]
    if unknown:
        raise ConfigError(
            f"stop names {unknown[0]!r}, which is no token of the tokenizer. Name one of its "
            "tokens, such as tokenizer.eos_token."
        )
    if (eos := getattr(tokenizer, "eos_token_id", None)) is not None:
        ids.add(eos)
    if not ids:
        raise ConfigError(
            "The tokenizer has no eos_token, so nothing tells where an answer ends. Name the token "
            'with which it ends: tokenizer.eos_token = "</s>", or stop="</s>".'
        )
    return frozenset(ids)


def _unk(tokenizer: Any) -> Any:
    return getattr(tokenizer, "unk_token_id", None)


def stops_of(model: Any) -> frozenset[int]:
    """Return the numbers of the tokens at which a model's generation stops; empty if unknown."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    listed = found if isinstance(found, list | tuple) else [] if found is None else [found]
    return frozenset(int(number) for number in listed)
