"""What of a row is trained, marked in its text: labelled tokens, answers, right choices."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor

from manualloop.tasks.places import POSITIONS
from manualloop.tasks.task import IGNORE_INDEX

_COLORS = (
    *(("#ffe08a", 222), ("#a8d8ff", 153), ("#b8efb0", 157), ("#ffc0cb", 218)),
    *(("#d8c6ff", 183), ("#ffc999", 216), ("#a8efe6", 159), ("#dcdcdc", 252)),
)
"""Backgrounds in HTML, and the same in the palette of a terminal."""


class Piece(NamedTuple):
    """A part of a row's text.

    Attributes:
        text: The part.
        color: Number of its color; None where nothing is trained.
        name: What is trained there, such as the name of a class.
    """

    text: str
    color: int | None = None
    name: str = ""


Decode = Callable[[Sequence[int]], str]
"""From tokens to their text."""


def mark_row(
    tensors: Mapping[str, Tensor], number: int, names: Sequence[str], tokenizer: Any
) -> list[Piece]:
    """Return the text of a row with what is trained in it; nothing where no token is trained.

    Args:
        tensors: The tensors of a batch.
        number: Number of the row in it.
        names: Names of the classes; empty for none.
        tokenizer: The tokenizer; None: the numbers of the tokens are the text.
    """
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if ids is None or ids.ndim < 2:
        return []
    decode = decoder(tokenizer)
    if mask is None or mask.shape != ids.shape:
        mask = ids == ids
    own, kept, labels = ids[number], mask[number].bool(), tensors.get("labels")
    if ids.ndim == 3 and labels is not None and labels.shape == ids.shape:
        inner = {name: t[number] for name, t in tensors.items() if t.shape == ids.shape}
        parts = [mark_row(inner, n, names, tokenizer) for n in range(len(own))]
        return [piece for part in parts for piece in (Piece(" | "), *part)][1:]
    if ids.ndim == 3:
        label = int(labels[number]) if labels is not None and labels.ndim == 1 else None
        return _choices(own, kept, label, decode)
    if {*POSITIONS} <= tensors.keys():
        start, end = (int(tensors[name][number]) for name in POSITIONS)
        return _answer(own, kept, start, end, decode)
    if labels is None or labels.ndim != 2 or labels.is_floating_point():
        return []
    if labels.shape != ids.shape:
        target = labels[number][labels[number] != IGNORE_INDEX].tolist()
        return [Piece(decode(own[kept].tolist())), Piece("  ->  "), Piece(decode(target), 0)]
    is_labelled = labels[number] != IGNORE_INDEX
    is_mask = own == getattr(tokenizer, "mask_token_id", None)
    of_vocabulary = not names and bool((is_labelled & ((own == labels[number]) | is_mask)).any())
    marks = []
    for token, label in zip(own[kept].tolist(), labels[number][kept].tolist(), strict=True):
        if label == IGNORE_INDEX:
            marks.append(Piece(""))
        elif of_vocabulary:
            marks.append(Piece("", 0, "" if token == label else decode([label])))
        else:
            name = names[label] if label in range(len(names)) else str(label)
            marks.append(Piece("", label, name))
    pieces = _pieces(own[kept].tolist(), marks, decode)
    return [
        piece._replace(text=f"{piece.text}={piece.name}") if of_vocabulary and piece.name else piece
        for piece in pieces
    ]


def decoder(tokenizer: Any) -> Decode:
    """Return a function that gives tokens as text, or as numbers where they have none.

    Args:
        tokenizer: The tokenizer; None gives the numbers of all tokens.
    """

    def decode(ids: Sequence[int]) -> str:
        try:
            return str(tokenizer.decode(ids))
        except Exception:  # what a tokenizer raises for -100 is its own affair
            return _as_numbers(ids)

    return _as_numbers if tokenizer is None else decode


def answer_of(tensors: Mapping[str, Tensor], number: int, decode: Decode) -> str | None:
    """Return the text of the answer in a row of question answering; None if it is another task."""
    if not {"input_ids", *POSITIONS} <= tensors.keys():
        return None
    start, end = (int(tensors[name][number]) for name in POSITIONS)
    return decode(tensors["input_ids"][number][start : end + 1].tolist())


def _answer(ids: Tensor, kept: Tensor, start: int, end: int, decode: Decode) -> list[Piece]:
    places = kept.nonzero()[:, 0].tolist()
    marks = [Piece("", 0, "answer") if start <= place <= end else Piece("") for place in places]
    return _pieces(ids[kept].tolist(), marks, decode)


def _choices(ids: Tensor, kept: Tensor, label: int | None, decode: Decode) -> list[Piece]:
    pieces = []
    for number, (choice, own) in enumerate(zip(ids, kept, strict=True)):
        color, name = (0, "right") if number == label else (None, "")
        pieces += [Piece(" | ")] if number else []
        pieces.append(Piece(decode(choice[own].tolist()), color, name))
    return pieces


def _pieces(ids: Sequence[int], marks: Sequence[Piece], decode: Decode) -> list[Piece]:
    """Return the text of tokens in pieces of the same mark."""
    pieces, end, before = [], 0, ""
    for mark, run in groupby(marks):
        start, end = end, end + len(list(run))
        # Spaces between tokens are known from what stands before.
        text = decode(ids[:end])
        piece = text[len(before) :] if text.startswith(before) else f" {decode(ids[start:end])}"
        pieces.append(mark._replace(text=piece))
        before = text
    return pieces


def _as_numbers(ids: Sequence[int]) -> str:
    return "".join(f"{' ' if place else ''}{token}" for place, token in enumerate(ids))


def shows_color() -> bool:
    """Tell whether what is printed reaches a terminal that shows colors."""
    is_terminal = getattr(sys.stdout, "isatty", lambda: False)()
    return is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def as_ansi(pieces: Sequence[Piece]) -> str:
    r"""Return pieces as a line for a terminal.

    >>> as_ansi([Piece("a "), Piece("b", 0)])
    'a \x1b[30;48;5;222mb\x1b[0m'
    """
    return "".join(
        f"\x1b[30;48;5;{_COLORS[piece.color % len(_COLORS)][1]}m{piece.text}\x1b[0m"
        if piece.color is not None
        else piece.text
        for parts in map(_without_edges, pieces)
        for piece in parts
    )


def as_html(pieces: Sequence[Piece]) -> str:
    """Return pieces as HTML.

    >>> as_html([Piece("a "), Piece("<b>", 0, "B-PER")])
    'a <mark style="color: black; background: #ffe08a" title="B-PER">&lt;b&gt;</mark>'
    """
    return "".join(
        f'<mark style="color: black; background: {_COLORS[piece.color % len(_COLORS)][0]}" '
        f'title="{escape(piece.name)}">{escape(piece.text)}</mark>'
        if piece.color is not None
        else escape(piece.text)
        for parts in map(_without_edges, pieces)
        for piece in parts
    )


def _without_edges(piece: Piece) -> Iterator[Piece]:
    """Yield a piece without the spaces around it, which no color is put on."""
    text = piece.text.strip()
    start = piece.text.find(text) if text else 0
    if start:
        yield Piece(piece.text[:start])
    yield piece._replace(text=text or piece.text)
    if text and (rest := piece.text[start + len(text) :]):
        yield Piece(rest)
