"""``inspect_batch``: look at what the model will see, before it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from manualloop.arguments import check_arguments
from manualloop.batches import Kept, begin_pass
from manualloop.data.marks import (
    Piece,
    answer_of,
    as_ansi,
    as_html,
    decoder,
    mark_row,
    shows_color,
)
from manualloop.data.pictures import Picture, pictures_of
from manualloop.errors import DataError
from manualloop.objects import remember, walk
from manualloop.randomness import random_states_kept
from manualloop.tasks.names import notes_of
from manualloop.tasks.pixels import image_processor
from manualloop.tasks.task import IGNORE_INDEX

Paint = Callable[[Sequence[Piece]], str]
"""From pieces of text to a line in color."""

_NUM_ROWS_SHOWN = 3
_NUM_CLASSES_SHOWN = 10


@dataclass(frozen=True, slots=True)
class BatchReport:
    """The first batch of a loader, described. Prints as a table, also in a notebook.

    Attributes:
        columns: Name to ``(shape, dtype)``, sorted by name.
        num_rows: Rows in the batch.
        padding: Share of the token positions that are padding, 0.0 to 1.0; None without an
            ``attention_mask``.
        rows: The first rows: decoded text (or token numbers) and label, or the answer.
        ignored: Share of the labels that are -100, 0.0 to 1.0, without those of padding; None
            without ``labels``.
        cut: Share of the split's texts that are cut off; None if it is unknown.
        max_length: Number of tokens at which they are cut off; None if it is unknown.
        classes: Number of labels in the batch of each class, by its name; empty if the classes
            have no names.
        pieces: The text of each of the rows in pieces, with what is trained in them; empty where no
            token is. In a terminal and a notebook they are printed in color.
        pictures: The first images with what their labels say drawn on them, which a notebook shows;
            empty without images.
    """

    columns: dict[str, tuple[tuple[int, ...], str]]
    num_rows: int
    padding: float | None
    rows: list[dict[str, Any]]
    ignored: float | None = None
    cut: float | None = None
    max_length: int | None = None
    classes: dict[str, int] = field(default_factory=dict)
    pieces: list[list[Piece]] = field(default_factory=list)
    pictures: tuple[Picture, ...] = ()

    def _lines(self, paint: Paint | None) -> list[tuple[str, str]]:
        """Return the lines; with ``paint`` as it returns them."""
        plain = paint or _as_text
        lines = [(name, f"{shape} {dtype}") for name, (shape, dtype) in self.columns.items()]
        if self.padding is not None:
            lines.append(("padding", f"{self.padding:.1%} of the token positions"))
        if self.cut is not None and self.max_length is not None:
            whole = f"{self.cut:.1%} of all texts of the split, at {self.max_length} tokens"
            lines.append(("cut off", whole))
        if self.ignored:
            lines.append(("ignored", f"{self.ignored:.1%} of the labels, which are {IGNORE_INDEX}"))
        lines = [(name, plain([Piece(text)])) for name, text in lines]
        are_marked = any(self.pieces)
        lines += [
            (name, plain([Piece(text, color if are_marked else None)]))
            for name, text, color in _class_lines(self.classes)
        ]
        for number, row in enumerate(() if self.pictures else self.rows):
            if paint is not None and number < len(self.pieces) and self.pieces[number]:
                lines.append((f"row {number}", paint(self.pieces[number])))
            else:
                text = "  ->  ".join(_shown(row, tuple(self.classes)))
                lines.append((f"row {number}", plain([Piece(text)])))
        lines += [(f"image {p.place}", plain([Piece(p.line)])) for p in self.pictures]
        return lines

    def __str__(self) -> str:
        lines = self._lines(as_ansi if shows_color() else None)
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cell = '<td style="text-align: left; white-space: pre-wrap">'
        rows = "".join(
            f"<tr><th>{escape(name)}</th>{cell}{text}</td></tr>"
            for name, text in self._lines(as_html)
        )
        return f"<table>{rows}</table>" + "".join(map(Picture.html, self.pictures))


def _as_text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _class_lines(classes: Mapping[str, int]) -> list[tuple[str, str, int | None]]:
    """Return a line for each class: number, name and count, in columns; and its number."""
    numbered = [(str(number), *found) for number, found in enumerate(classes.items())]
    if len(numbered) > _NUM_CLASSES_SHOWN:
        numbered.sort(key=lambda found: -found[2])
    shown = numbered[:_NUM_CLASSES_SHOWN]
    number, name, count = (max((len(str(f[i])) for f in shown), default=0) for i in range(3))
    lines: list[tuple[str, int | None]] = [
        (f"{f[0]:>{number}} {f[1]:<{name}}  {f[2]:>{count}}", int(f[0])) for f in shown
    ]
    lines += [(f"... ({len(numbered)} classes)", None)] if len(shown) < len(numbered) else []
    return [("" if place else "classes", *line) for place, line in enumerate(lines)]


def _shown(row: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Give the values of a row as text, with the names of its classes."""
    for column, value in row.items():
        if column != "labels" or not names:
            yield str(value)
        elif isinstance(value, list):
            yield f"[{', '.join(_named(value, names))}]"
        else:
            name = _named([value], names)[0]
            yield str(value) if name == str(value) else f"{value} {name}"


def _named(labels: Sequence[Any], names: Sequence[str]) -> list[str]:
    """Return labels by their names: those of a multi-label row that are set, or those of tokens."""
    if labels and all(isinstance(label, float) for label in labels):
        return [name for name, target in zip(names, labels, strict=False) if target > 0.5]
    return [names[label] if label in range(len(names)) else str(label) for label in labels]


def inspect_batch(loader: Iterable[Any], tokenizer: Any = None) -> BatchReport:
    """Describe the first batch that a loader gives.

    The look changes nothing: random states, positions, counters and caches of the loader and of
    what it is made of are put back, and workers that it starts are ended. What the loader changes
    inside an array, a tensor, a file or another process stays changed.

    Args:
        loader: A loader whose batches are dicts of tensors.
        tokenizer: The tokenizer that decodes ``input_ids`` back to text; None: the numbers are
            shown. Of images the processor, by which their colours are shown; None takes that of a
            prepared loader.

    Raises:
        DataError: The loader gives no batch, or one that is not a dict, or its batches can be read
            only once.

    >>> import torch
    >>> print(inspect_batch([{"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([1])}]))
    input_ids  (1, 2) int64
    labels     (1,) int64
    row 0      [4, 5]  ->  1
    """
    processor = image_processor(tokenizer) or image_processor(getattr(loader, "tokenizer", None))
    tokenizer = None if image_processor(tokenizer) is not None else tokenizer
    check_arguments(loader=loader, tokenizer=tokenizer)
    batch = first_batch(loader)
    if not isinstance(batch, Mapping):
        got = "no batch" if batch is None else f"a {type(batch).__name__}"
        raise DataError(
            f"The loader gave {got}, not a dict of tensors. Use prepare_dataloaders, or a "
            "collate_fn that returns a dict."
        )
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    mask, labels = _mask_of_tokens(tensors), tensors.get("labels")
    notes = notes_of(loader)
    num_rows = next((len(tensor) for tensor in tensors.values() if tensor.ndim), 0)
    return BatchReport(
        columns={name: _describe(batch[name]) for name in sorted(batch)},
        num_rows=num_rows,
        padding=None if mask is None else 1 - mask.float().mean().item(),
        rows=[_show_row(tensors, n, tokenizer) for n in range(min(num_rows, _NUM_ROWS_SHOWN))],
        ignored=None if labels is None else _ignored(labels, mask),
        cut=None if notes.num_cut is None else notes.num_cut / notes.num_texts,
        max_length=notes.max_length,
        classes=_count_classes(labels, notes.names) if notes.names and labels is not None else {},
        pieces=[
            mark_row(tensors, n, notes.names or (), tokenizer)
            for n in range(min(num_rows, _NUM_ROWS_SHOWN))
        ],
        pictures=pictures_of(batch, processor, notes.names),
    )


def _mask_of_tokens(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the mask that has a 0 or 1 for each token; None where it tells of pairs of tokens."""
    mask, ids = tensors.get("attention_mask"), tensors.get("input_ids")
    if mask is None or not mask.numel() or (ids is not None and mask.shape != ids.shape):
        return None
    is_binary = ((mask == 0) | (mask == 1)).all()  # others are added to the scores
    return mask if bool(is_binary) else None


def _ignored(labels: Tensor, mask: Tensor | None) -> float | None:
    """Return the share of the labels that are -100; None if there is no label."""
    if mask is not None and labels.ndim > 1 and mask.shape == labels.shape:
        labels = labels[mask.bool()]
    return (labels == IGNORE_INDEX).float().mean().item() if labels.numel() else None


def _count_classes(labels: Tensor, names: Sequence[str]) -> dict[str, int]:
    """Count the labels of each class: class numbers, or rows of 0 and 1."""
    if labels.is_floating_point() and labels.ndim:
        counts = (labels > 0.5).reshape(-1, labels.shape[-1]).sum(dim=0)
    else:
        counts = torch.bincount(labels[labels >= 0].long(), minlength=len(names))
    return {name: int(counts[number]) for number, name in enumerate(names) if number < len(counts)}


def first_batch(loader: Any) -> Any:
    """Read the first batch and leave the loader as it was; None if it gives none.

    Raises:
        DataError: Its batches can be read only once.
    """
    with reading(loader) as batches:
        return next(batches, None)


@contextmanager
def reading(loader: Any) -> Iterator[Iterator[Any]]:
    """Give the batches of a pass from its start, and leave the loader as it was afterwards.

    Raises:
        DataError: Its batches can be read only once.
    """
    if hasattr(type(loader), "__next__"):
        raise DataError(_read_once_message("", loader))
    parts = [part.value for _, part in walk({"loader": loader})]
    iterators = {id(value) for value in parts if _is_read_once(value)}
    with random_states_kept(loader=loader):
        restore = remember({"loader": loader})
        try:
            for part in parts:
                if isinstance(part, DataLoader):
                    vars(part)["_iterator"] = None  # workers that are kept would move on
            batches = begin_pass(loader)
            if not isinstance(loader, DataLoader) and iter(loader) is batches:
                raise DataError(_read_once_message("", batches))
            for path, part in walk({"loader": loader}):
                if id(part.value) in iterators:  # it was there before iter()
                    raise DataError(_read_once_message(f" at {path}", part.value))
            yield batches
        finally:
            restore()


def _is_read_once(value: Any) -> bool:
    kind = type(value)
    return hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools")


def _read_once_message(place: str, iterator: Any) -> str:
    return (
        f"The batches come from a {type(iterator).__name__}{place}, which can be read only once: "
        "a look would use up the first one. Pass a DataLoader or a list: "
        "batches = list(batches)."
    )


def _describe(value: Any) -> tuple[tuple[int, ...], str]:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype).removeprefix("torch.")
    kind = type(value).__name__
    if isinstance(value, list | tuple) and value:
        if isinstance(value, Kept):
            return (len(value),), f"list of {type(value[0]).__name__}, kept"
        return (len(value),), f"{kind} of {type(value[0]).__name__}, no tensor"
    return (), f"{kind}, no tensor"


def _show_row(tensors: Mapping[str, Tensor], number: int, tokenizer: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    decode = decoder(tokenizer)
    if "input_ids" in tensors:
        ids = tensors["input_ids"][number]
        if (mask := _mask_of_tokens(tensors)) is not None:
            ids = ids[mask[number].bool()]
        if tokenizer is None:
            row["input_ids"] = ids.tolist()
        elif ids.ndim > 1:
            row["input_ids"] = [decode(part) for part in ids.flatten(0, -2).tolist()]
        else:
            row["input_ids"] = decode(ids.reshape(-1).tolist())
    labels = tensors.get("labels")
    if labels is not None and 0 < labels.ndim < 3 and number < len(labels):
        row["labels"] = labels[number].tolist()  # the map of an image is drawn
    if (answer := answer_of(tensors, number, decode if tokenizer else str)) is not None:
        row["answer"] = answer
    return row
