"""Images, masks and boxes whose numbers may mean something else than the functions of tasks take.

Some rows from all over a split are looked at, until one of them settles the doubt, which is nearly
always the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from manualloop.data.judge import advice_on_missing
from manualloop.data.splits import Split
from manualloop.data.values import missing_in
from manualloop.errors import DataError
from manualloop.mistakes import as_map as change_of
from manualloop.mistakes import filter_missing
from manualloop.notices import say
from manualloop.tasks.pixels import as_map, is_pil, size_of

_NUM_ROWS = 64
_NUM_OF_STREAM = 16
_FEW_BOXES = 4


def refuse_doubtful(split: Split, transform: Any, fitted: Any) -> None:
    """Refuse a split whose images, masks or boxes are something else than they are taken for.

    Args:
        split: The split.
        transform: The transform of its rows, which names its columns.
        fitted: The same transform with what it has learned of processor and model.

    Raises:
        DataError: Some cells are missing, or their numbers mean something else.
    """
    column = getattr(transform, "column", None)
    if column not in split.kinds:
        return  # which is told where a row is read
    _refuse_missing(split, column, may_be_all=False)
    if hasattr(transform, "mask_among"):
        if (mask := transform.mask_among(split.kinds)) is not None:
            _refuse_missing(split, mask)
            _refuse_binary(split, mask, fitted)
    elif getattr(transform, "objects", None) in split.kinds:
        _refuse_missing(split, transform.objects)
        _refuse_other_boxes(split, transform)
    processor = getattr(fitted, "processor", None)
    if processor and getattr(processor, "do_rescale", True) and fitted.augment is None:
        _refuse_black(split, column)


def _refuse_missing(split: Split, column: str, *, may_be_all: bool = True) -> None:
    """Refuse a column that is None in some rows; in all of them it may stand for no labels."""
    is_missing = missing_in(split, column)
    if is_missing is None or not is_missing.any() or (may_be_all and is_missing.all()):
        return
    advice = advice_on_missing(split, column, is_blank=False)
    if not may_be_all:
        advice = f"Filter them out: {split.fix(filter_missing(column, of=''))}."
    raise DataError(
        f"Row {int(np.argmax(is_missing))} of {split.name} has {column}=None or None in it. Rows "
        f"without a value: {int(is_missing.sum())} of {len(is_missing)}. {advice}"
    )


def _rows_of(split: Split, columns: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Give some rows of a split with these columns, and their numbers.

    Rows in which one of them is None are left out.
    """
    rows = split.select([name for name in split.kinds if name in columns]).rows
    found: Iterator[tuple[int, Any]]
    if split.is_stream:
        found = enumerate(islice(rows, _NUM_OF_STREAM))
    else:
        places = np.linspace(0, len(rows) - 1, min(len(rows), _NUM_ROWS)).astype(int).tolist()
        found = ((place, rows[place]) for place in places)
    return (pair for pair in found if all(cell is not None for cell in pair[1].values()))


def _read(split: Split, number: int, read: Callable[[Any], Any], cell: Any) -> Any:
    """Return what a function makes of a cell; an error of ours gets the number of the row."""
    try:
        return read(cell)
    except DataError as error:
        raise DataError(f"Row {number} of {split.name}: {error}") from error.__cause__


def _refuse_binary(split: Split, column: str, transform: Any) -> None:
    """Refuse masks of 0 and 255, of which the loss would see the background alone."""
    _refuse_channels(split, column)
    if transform.ignored != 255:
        return  # else 255 is refused where it is no class
    found: set[int] = set()
    for number, row in _rows_of(split, [column]):
        found |= {*np.unique(_read(split, number, as_map, row[column])).tolist()}
        if found - {0, 255}:
            return
    if 255 not in found:
        return
    code, cell = f'row["{column}"]', split.first[column]
    ones = f"{code}.point(lambda pixel: pixel // 255)"
    if is_pil(cell) and cell.mode not in ("L", "P"):  # of which PIL takes no such function
        ones = f'PIL.Image.fromarray((numpy.asarray({code}) // 255).astype("uint8"))'
    if not is_pil(cell):
        ones = f"[[pixel // 255 for pixel in line] for line in {code}]"
    message = (
        f"The masks {column!r} of {split.name} hold 0 and 255 alone, and the loss ignores 255, so "
        "that every pixel that counts is of class 0. If 255 is the second class, make 1 of it: "
        f"{split.fix(change_of(column, ones))}"
    )
    if transform.num_labels is None or transform.num_labels > 2:
        say(message)
        return
    raise DataError(f"{message}.")


def _refuse_channels(split: Split, column: str) -> None:
    """Refuse masks that have the class of each pixel several times, as grey in colours."""
    first: Any = next(_rows_of(split, [column]), (0, {column: None}))
    cell = first[1][column]
    if not is_pil(cell) or len(cell.getbands()) == 1:
        return
    array = np.asarray(cell)
    if cell.mode == "LA" or (cell.mode in ("RGB", "RGBA") and not np.ptp(array[..., :3], -1).any()):
        one = f'row["{column}"].getchannel(0)'
        raise DataError(
            f"The masks {column!r} of {split.name} are of mode {cell.mode}, with the same number "
            f"in each of their colours. Take one of these: {split.fix(change_of(column, one))}."
        )


def _refuse_black(split: Split, column: str) -> None:
    """Refuse images of whole numbers 0 and 1, which a processor divides by 255."""
    largest = 0
    for _, row in _rows_of(split, [column]):
        if is_pil(row[column]):
            return
        array = np.asarray(row[column])
        if array.dtype.kind not in "iu" or array.max(initial=0) > 1:
            return
        largest = max(largest, int(array.max(initial=0)))
    if largest == 1:
        scaled = f'(numpy.asarray(row["{column}"]) * 255).tolist()'
        raise DataError(
            f"The images {column!r} of {split.name} hold the whole numbers 0 and 1 alone, and a "
            "processor takes whole numbers for those from 0 to 255: they would be nearly black. "
            f"Scale them: {split.fix(change_of(column, scaled))}."
        )


def _refuse_other_boxes(split: Split, transform: Any) -> None:
    """Refuse boxes that are corners, or fractions of the image."""
    boxes, sizes = [], []
    for number, row in _rows_of(split, [transform.column, transform.objects]):
        image = row[transform.column]
        if isinstance(image, str | bytes | Mapping):
            return
        found = _read(split, number, transform.corners_of, row[transform.objects])
        height, width = size_of(image if is_pil(image) else np.asarray(image))
        boxes.append(found)
        sizes.append(np.broadcast_to((width, height), (len(found), 2)))
        are_corners = ((found[:, 2:] > found[:, :2]) & (found[:, 2:] <= sizes[-1])).all()
        if not (are_corners or (found <= 1).all()):
            return
    if not boxes:
        return
    whole, limits = np.concatenate(boxes), np.concatenate(sizes)
    cell, name = f'row["{transform.objects}"]', transform.box
    if len(whole) >= _FEW_BOXES and 0 < whole.max() <= 1:
        size = f'row["{transform.column}"].width, row["{transform.column}"].height'
        made = (
            f"[[(x - w / 2) * W, (y - h / 2) * H, w * W, h * H] for x, y, w, h in {cell}[{name!r}]]"
        )
        change = f"{{**{cell}, {name!r}: {made}}} for W, H in [({size})]"
        raise DataError(
            f"The boxes {name!r} of {split.name} are fractions of their images, and a box is left, "
            "top, width and height in pixels. If they are centre, width and height, as YOLO has "
            f"them: {split.fix(change_of(transform.objects, f'next({change})'))}."
        )
    reach_out = (whole[:, :2] + whole[:, 2:] > limits + 1).any(1)
    if len(whole) >= _FEW_BOXES and reach_out.any():
        made = f"[[x, y, r - x, b - y] for x, y, r, b in {cell}[{name!r}]]"
        change = f"{{**{cell}, {name!r}: {made}}}"
        raise DataError(
            f"The boxes {name!r} of {split.name} are left, top, right and bottom: taken for left, "
            f"top, width and height, {int(reach_out.sum())} of {len(whole)} would reach out of "
            f"their images. Make sizes of them: {split.fix(change_of(transform.objects, change))}."
        )
