"""Extractive question answering: windows over long contexts, and where in them answers are.

A context that is too long becomes several windows, each a row with the question.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from manualloop.arguments import is_count
from manualloop.errors import ConfigError, DataError
from manualloop.tasks.answers import answers_of
from manualloop.tasks.made import Made, Place, Rows, counted, place_in_batch, share_of_all
from manualloop.tasks.places import POSITIONS
from manualloop.tasks.texts import limit_of, texts_of


def answer_windows(
    tokenizer: Any,
    max_length: int = 384,
    stride: int = 128,
    *,
    pad: bool = True,
    question: str = "question",
    context: str = "context",
    answers: str = "answers",
) -> Callable[[Rows], dict[str, list[Any]]]:
    """Return a ``preprocess`` that makes windows of questions with parts of their contexts.

    ::

        loaders = prepare_dataloaders(
            data,
            tokenizer,
            model=model,
            preprocess=answer_windows(tokenizer, max_length=384, stride=128),
            keep=("id", "context", "offset_mapping"),
        )

    The question comes first where the tokenizer pads on the right, and the context where it pads on
    the left. An answer that is not whole in a window, or that there is none of, is at the token
    [CLS] (or else that of the beginning of the text, or else the first one outside of the context).
    Of several right answers the first is trained. ``prepare_dataloaders`` reports how many rows
    became how many windows, and how many answers are in no window.

    Args:
        tokenizer: A fast tokenizer: others do not tell the characters of a token.
        max_length: Number of tokens in a window, at most the tokenizer's limit.
        stride: Number of tokens of the context that two windows share.
        pad: Whether every window is padded to ``max_length``, as the scripts of transformers do. A
            batch that is padded to its longest window takes less time, but padding counts in the
            loss of the models, which then depends on the windows that are in a batch together.
        question: Column of questions.
        context: Column of the texts that hold the answers.
        answers: Column of ``{"text": [...], "answer_start": [...]}``, the characters of the context
            at which answers start; empty lists for none. Rows of a split without it, or in which
            it is None throughout, get no labels.

    Returns:
        A function from a batch of rows to windows: what the tokenizer makes of them;
        ``start_positions`` and ``end_positions``; ``offset_mapping``, the characters of the context
        for each token without padding, None outside of it, and empty at the token of no answer; and
        ``overflow_to_sample_mapping``, the row of each window.

    Raises:
        ConfigError: The tokenizer is not a fast one, or windows share all their tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"answer_windows needs the characters of each token, which {type(tokenizer).__name__} "
            "does not tell. Load a fast tokenizer: AutoTokenizer.from_pretrained(name, "
            "use_fast=True)."
        )
    if not (is_count(max_length) and isinstance(stride, int) and 0 <= stride < max_length):
        raise ConfigError(
            f"answer_windows got max_length={max_length!r} and stride={stride!r}. They are numbers "
            "of tokens, and windows share fewer than they have: answer_windows(tokenizer, "
            "max_length=384, stride=128)."
        )
    return AnswerWindows(tokenizer, max_length, stride, pad, question, context, answers)


@dataclass(frozen=True, eq=False)
class AnswerWindows:
    """The function that ``answer_windows`` returns; its arguments are the attributes."""

    tokenizer: Any = field(repr=False)
    max_length: int
    stride: int
    pad: bool
    question: str
    context: str
    answers: str
    cut_call: ClassVar[str] = "answer_windows(tokenizer, max_length={room})"

    @property
    def label_column(self) -> str:
        """The column that positions are made of."""
        return self.answers

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return windows and positions, and the row of each window."""
        made = self.make(rows, place_in_batch)
        return {**made.columns, "overflow_to_sample_mapping": made.sources}

    def make(self, rows: Rows, place: Place) -> Made:
        """Return windows and positions, and how many answers are lost.

        Raises:
            DataError: A row has no texts or no answers, or a question leaves no room for the
                context.
        """
        encoded = self._tokenize(rows, place)
        made = {name: list(column) for name, column in encoded.items()}
        origin = made.pop("overflow_to_sample_mapping")
        counts = Counter(windows=len(origin))
        windows = [
            self._window(encoded, number, made["offset_mapping"][number])
            for number in range(len(origin))
        ]
        made["offset_mapping"] = [window.offsets for window in windows]
        if self.answers not in rows:
            return Made(made, origin, counts)
        spans = [
            self._span_of(cell, place(number)) for number, cell in enumerate(rows[self.answers])
        ]
        positions = [window.find(spans[row]) for window, row in zip(windows, origin, strict=True)]
        is_known = [rows[self.answers][row] is not None for row in origin]
        for name, side in zip(POSITIONS, zip(*positions, strict=True), strict=True):
            made[name] = [n if known else None for n, known in zip(side, is_known, strict=True)]
        found = {
            row
            for row, window, place in zip(origin, windows, positions, strict=True)
            if place != (window.nothing,) * 2
        }
        contexts = rows[self.context]
        for row, span in enumerate(spans):
            if span is not None:
                counts["cut"] += row not in found
                counts["misplaced"] += contexts[row][span.start : span.end] != span.text
        return Made(made, origin, counts)

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return how many windows there are, and what became of the answers."""
        rows, windows = counted(counts["given"], "row"), counted(counts["windows"], "window")
        lines = [f"{rows} became {windows} of at most {self._limit} tokens"]
        if not self.pad:
            lines.append("the loss depends on the batch size, because it counts padding")
        for name, words in (
            ("cut", "answers that are in no window, and count as none"),
            ("misplaced", "answers that are not the text at their answer_start"),
        ):
            if counts.get(name):
                lines.append(f"{words}: {share_of_all(counts[name], counts['given'])}")
        return lines

    @property
    def _limit(self) -> int:
        return limit_of(self.tokenizer, self.max_length) or self.max_length

    @property
    def _is_question_first(self) -> bool:
        return bool(self.tokenizer.padding_side == "right")

    def _tokenize(self, rows: Rows, place: Place) -> Any:
        # Spaces before a question would count as its tokens and leave less room.
        questions = [text.lstrip() for text in texts_of(rows, self.question, place)]
        sides = questions, texts_of(rows, self.context, place)
        try:
            return self.tokenizer(
                *(sides if self._is_question_first else sides[::-1]),
                truncation="only_second" if self._is_question_first else "only_first",
                max_length=self._limit,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                padding="max_length" if self.pad else False,
            )
        except BaseException as error:  # of Rust: no class of its own
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            reason = self._explain(questions)
            if reason is None:
                raise
            raise DataError(reason) from error

    def _span_of(self, cell: Any, where: str) -> _Span | None:
        """Return the first answer of a row; None if there is none.

        Raises:
            DataError: It is something else.
        """
        found = answers_of(cell)
        if found is not None and not (found[0] and found[0][0]):
            return None
        if found is not None and (start := found[1][0]) is not None:
            text = found[0][0]
            return _Span(start, start + len(text), text)
        raise DataError(
            f"Answers are {{'text': [...], 'answer_start': [...]}} with as many whole numbers as "
            f"texts, and {self.answers!r} in {where} is {cell!r:.120}. Make them so; of a column "
            f'of texts: dataset.map(lambda row: {{"{self.answers}": {{"text": [row["answer"]], '
            f'"answer_start": [row["{self.context}"].index(row["answer"])]}}}}).'
        )

    def _explain(self, questions: Sequence[str]) -> str | None:
        """Return the reason why there is no window; None if it is another one."""
        lengths = [
            len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in questions
        ]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        room = self._limit - self.tokenizer.num_special_tokens_to_add(pair=True) - lengths[longest]
        if room > self.stride:
            return None
        most = self._limit - self.stride - self.tokenizer.num_special_tokens_to_add(pair=True)
        shorter = (
            f'dataset.filter(lambda row: len(tokenizer(row["{self.question}"], '
            f'add_special_tokens=False)["input_ids"]) < {most})'
        )
        return (
            f"A question of {lengths[longest]} tokens leaves {max(room, 0)} of {self._limit} "
            f"tokens for its context, and windows that share {self.stride} need more: "
            f"{questions[longest]!r:.120}. Pass a larger max_length or a smaller stride"
            f"{f', or leave such rows out: {shorter}' if most > 0 else ''}."
        )

    def _window(self, encoded: Any, number: int, offsets: Sequence[tuple[int, int]]) -> _Window:
        sides, ids = encoded.sequence_ids(number), encoded["input_ids"][number]
        is_token = encoded.encodings[number].attention_mask
        side = 1 if self._is_question_first else 0
        inside = [place for place, found in enumerate(sides) if found == side]
        outside = [n for n, found in enumerate(sides) if found != side and is_token[n]]
        names = (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id)
        special = [n for name in names for n in outside if sides[n] is None and ids[n] == name]
        if not outside:
            raise DataError(
                f"A question in {self.question!r} has no token, and neither has the tokenizer one "
                "for no answer. Leave such rows out: "
                f'dataset.filter(lambda row: row["{self.question}"].strip()).'
            )
        nothing = (special or outside)[0]
        of_tokens: dict[int, list[int] | None] = {
            n: None for n, found in enumerate(is_token) if found
        }
        of_tokens |= {place: list(offsets[place]) for place in inside}
        of_tokens[nothing] = []
        return _Window(
            [*of_tokens.values()],
            inside,
            [offsets[place][0] for place in inside],
            [offsets[place][1] for place in inside],
            nothing,
        )


class _Span(NamedTuple):
    """An answer: its characters in the context, and its text."""

    start: int
    end: int
    text: str


class _Window(NamedTuple):
    """A window over a context.

    Attributes:
        offsets: As the column ``offset_mapping``: without padding.
        inside: Places of the tokens of the context, ascending.
        starts: First character of each of them.
        ends: Last character of each, and one more.
        nothing: Place of the token of no answer.
    """

    offsets: list[list[int] | None]
    inside: list[int]
    starts: list[int]
    ends: list[int]
    nothing: int

    def find(self, span: _Span | None) -> tuple[int, int]:
        """Return the places of the first and last token of an answer, or twice that of none."""
        if span is None or not self.inside:
            return self.nothing, self.nothing
        if not (self.starts[0] <= span.start and span.end <= self.ends[-1]):
            return self.nothing, self.nothing
        first = bisect_right(self.ends, span.start)
        last = bisect_left(self.starts, span.end) - 1
        if first > last:
            return self.nothing, self.nothing
        return self.inside[first], self.inside[last]
