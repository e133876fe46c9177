"""Pairs of answers, a better and a worse one to the same prompt, to rows of two lists of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from manualloop.errors import DataError
from manualloop.models import unwrap_model
from manualloop.tasks.chats import (
    check_template,
    describe_stops,
    is_trained,
    options_of_row,
)
from manualloop.tasks.completions import (
    cut_head,
    head_of,
    joined,
    require_eos,
    require_text,
    tail_of,
)
from manualloop.tasks.made import Made, Place, Rows, counted, place_in_batch
from manualloop.tasks.rendering import (
    Encoded,
    Message,
    check_messages,
    encode,
    render_answers,
    stop_ids,
    stops_of,
)
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.tasks.texts import require_columns


def preference_pairs(
    tokenizer: Any,
    *,
    prompt: str = "prompt",
    chosen: str = "chosen",
    rejected: str = "rejected",
    max_length: int | None = None,
    stop: str | Collection[str] | None = None,
    **template_options: Any,
) -> PreferencePairs:
    """Return a ``preprocess`` that turns preferences into pairs of rows, the better one first.

    Prompts and answers are texts, tokenized as by ``complete``, or lists of messages, rendered as
    by ``chat``. Without a column of prompts, or with whole chats as answers, the prompt is what
    both begin with: of chats the messages, of texts the tokens. Batches are ``(pairs, 2, tokens)``.

    Args:
        tokenizer: Tokenizer with an ``eos_token``, and with a chat template for messages.
        prompt: Column of the prompts.
        chosen: Column of the better answers.
        rejected: Column of the worse answers.
        max_length: Most tokens of a row. Of a longer prompt that is a text the beginning is cut
            off, the same in both rows; of messages the pair is left out.
        stop: As in ``chat``.
        template_options: As in ``chat``.

    Returns:
        The function, which returns ``input_ids`` and ``labels``: lists of two lists.

    Raises:
        ConfigError: Nothing tells where answers end.
    """
    stops = stop_ids(tokenizer, stop)
    return PreferencePairs(tokenizer, prompt, chosen, rejected, max_length, stops, template_options)


@dataclass(frozen=True)
class PreferencePairs:
    """A ``preprocess`` for preferences. Made by ``preference_pairs``.

    Attributes:
        tokenizer: The tokenizer.
        prompt: Column of the prompts.
        chosen: Column of the better answers.
        rejected: Column of the worse answers.
        max_length: Most tokens of a row; None: any.
        stops: Numbers of the tokens with which an answer may end.
        options: Arguments of ``apply_chat_template``.
        known: Numbers of the tokens at which the model's generation stops; empty if unknown.
    """

    tokenizer: Any
    prompt: str
    chosen: str
    rejected: str
    max_length: int | None
    stops: frozenset[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    known: frozenset[int] = frozenset()
    cut_call: ClassVar[str] = "preference_pairs(tokenizer, max_length={room})"

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return ``input_ids`` and ``labels``."""
        return self.make(rows, place_in_batch).columns

    def with_model(self, model: nn.Module) -> PreferencePairs:
        """Return the function with the stop tokens of a model's generation."""
        known = stops_of(unwrap_model(model))
        return replace(self, stops=self.stops | known, known=known)

    def make(self, rows: Rows, place: Place) -> Made:
        """Return the rows with their sources and counts."""
        named = (self.prompt,) if self.prompt != "prompt" else ()  # which may be missing
        wanted = (*named, self.chosen, self.rejected)
        require_columns(rows, wanted, "prompt=, chosen= and rejected=")
        made = Made({"input_ids": [], "labels": []}, [], Counter())
        prompts = rows.get(self.prompt) or [None] * len(rows[self.chosen])
        tools = rows.get("tools") if "tools" not in self.options else None
        pairs = zip(prompts, rows[self.chosen], rows[self.rejected], strict=True)
        for number, (before, *answers) in enumerate(pairs):
            made.counts["pairs"] += 1
            if not all(answers):
                made.counts["empty"] += 1
                continue
            if any(isinstance(answer, str) for answer in answers):
                both = self._of_texts(before, answers, place(number), made.counts)
            else:
                options = options_of_row(self.options, None if tools is None else tools[number])
                both = self._of_chats(before, answers, place(number), options, made.counts)
            if both is not None and both[0].ids == both[1].ids:
                made.counts["same"] += 1
            elif both is not None:
                _add_pair(made, number, both)
        return made

    def _of_texts(
        self, prompt: Any, answers: list[Any], where: str, counts: Any
    ) -> list[Encoded] | None:
        require_eos(self.tokenizer)
        for name, text in zip(
            (self.prompt, self.chosen, self.rejected), (prompt, *answers), strict=True
        ):
            require_text(text, where, name)
        head = head_of(self.tokenizer, prompt or "")
        tails = [tail_of(self.tokenizer, answer) for answer in answers]
        if not prompt:
            same = _num_same(*tails)
            head, tails = head + tails[0][:same], [tail[same:] for tail in tails]
        elif all(answer.startswith(prompt) for answer in answers):
            counts["twice"] += 1
        kept = cut_head(self.tokenizer, head, max(map(len, tails)), self.max_length)
        counts["cut"] += kept is not None and len(kept) < len(head)
        counts["long"] += kept is None
        return None if kept is None else [joined(kept, tail) for tail in tails]

    def _of_chats(
        self, prompt: Any, answers: list[Any], where: str, options: Mapping[str, Any], counts: Any
    ) -> list[Encoded] | None:
        check_template(self.tokenizer, options)
        chats, num_before = _chats_of(prompt, answers, where)
        both = []
        for messages in chats:
            trained = [n >= num_before and is_trained(m, None) for n, m in enumerate(messages)]
            texts = render_answers(self.tokenizer, messages, trained, where, options)
            if len(texts) != 1:
                raise DataError(_not_one(len(texts), where))
            both.append(encode(self.tokenizer, texts[0], self.stops.__contains__, where))
        if self.max_length is not None and max(len(row.ids) for row in both) > self.max_length:
            counts["long"] += 1
            return None
        return both

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return what became of the pairs, and what generation would do otherwise."""
        lines = [
            f"{counted(counts['pairs'], 'pair')} became {counted(counts.get('rows', 0), 'row')} of "
            f"two, with labels at {counts.get('labels', 0):,} of {counts.get('tokens', 0):,} tokens"
        ]
        for name, reason in (
            ("long", f"longer than {self.max_length} tokens"),
            ("empty", "without both answers"),
            ("same", "with the same answer twice"),
        ):
            if counts.get(name):
                lines.append(f"left out, {reason}: {counted(counts[name], 'pair')}")
        if counts.get("cut"):
            lines.append(f"cut off at the beginning: {counted(counts['cut'], 'prompt')}")
        if 2 * counts.get("twice", 0) > counts.get("rows", 0):
            lines.append(
                f"in {counts['twice']:,} of them both answers begin with the prompt, which then "
                "stands there twice. If they are whole texts, leave the prompts out: "
                f'dataset.remove_columns("{self.prompt}")'
            )
        return [*lines, *describe_stops(self.tokenizer, counts, self.known)]


def _num_same(better: list[int], worse: list[int]) -> int:
    """Return the number of tokens that both answers begin with; each keeps one of its own."""
    pairs = enumerate(zip(better, worse, strict=False))
    most = min(len(better), len(worse)) - 1
    return min(most, next((n for n, (a, b) in pairs if a != b), most))


def _chats_of(prompt: Any, answers: list[Any], where: str) -> tuple[list[list[Message]], int]:
    """Return both chats, and the number of messages that are their prompt.

    Raises:
        DataError: They begin with different prompts.
    """
    both = [check_messages(answer, where) for answer in answers]
    if prompt and not isinstance(prompt, str):
        before = check_messages(prompt, where)
        if all(messages[: len(before)] == before for messages in both):
            return both, len(before)
        return [before + messages for messages in both], len(before)
    pairs = enumerate(zip(*both, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(map(len, both)))
    same = min(same, *(len(messages) - 1 for messages in both))  # equal chats have answers, too
    if prompt and not any(message.get("content") == prompt for message in both[0][:same]):
        question: Message = {"role": "user", "content": prompt}
        return [[question, *messages] for messages in both], same + 1
    if not same:
        raise DataError(
            f"The chats of {where} have no prompt: there is no column of prompts, and they begin "
            "with different messages. Add a column of prompts, or give both the same beginning."
        )
    return both, same


def _not_one(number: int, where: str) -> str:
    if not number:
        return (
            f"An answer of {where} has no message of the assistant, so nothing of it is to be "
            'compared. Let it end with {"role": "assistant", "content": text}.'
        )
    return (
        f"An answer of {where} has {number} messages of the assistant, and the chat template "
        "changes the earlier ones, so that they are no single text. Leave all but the last out of "
        'the comparison: {"train": False} in the others.'
    )


def _add_pair(made: Made, source: int, both: list[Encoded]) -> None:
    made.columns["input_ids"].append([row.ids for row in both])
    made.columns["labels"].append([row.labels for row in both])
    made.sources.append(source)
    made.counts["rows"] += 1
    for row in both:
        made.counts["tokens"] += len(row.ids)
        made.counts["labels"] += len(row.labels) - row.labels.count(IGNORE_INDEX)
        made.counts["longer"] += row.num_longer
        made.counts.update(f"stop {stop}" for stop in row.stops)
