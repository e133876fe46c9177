"""Transforms of images that ask what ``prepare_dataloaders`` knows: processor, model, classes.

Such a transform has a method ``fitted``, which takes a ``Given`` and returns the transform that is
used. It names the columns that skip the model in its attribute ``made``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from manualloop.arguments import Checks
from manualloop.data.columns import LABELS
from manualloop.data.doubts import refuse_doubtful
from manualloop.data.functions import Functions
from manualloop.data.grouping import Ints
from manualloop.data.splits import Split, reference_of
from manualloop.data.values import is_list_type
from manualloop.errors import DataError
from manualloop.internals import stored_table
from manualloop.models import num_classes
from manualloop.notices import say
from manualloop.tasks.names import Naming, are_given, are_numbers, names_of, show_names
from manualloop.tasks.pixels import Given

_RENAMED = "class_map"
"""Name of a column of masks whose own name would be taken for that of the labels."""


def fit_transforms(
    splits: Mapping[Any, Split],
    functions: Mapping[Any, Functions],
    processor: Any,
    model: nn.Module | None,
    check: Checks,
) -> tuple[dict[Any, Split], dict[Any, Functions], Naming]:
    """Fit the transforms that ask for it.

    Args:
        splits: The splits.
        functions: The functions of each.
        processor: The processor that the user passed.
        model: The model; None if it is unknown.
        check: Keeps the errors.

    Returns:
        The splits, their functions, and the names of the classes in columns of boxes.
    """
    splits, functions = dict(splits), dict(functions)
    fitting = [key for key in splits if hasattr(functions[key].transform, "fitted")]
    found = {key: _objects_of(splits[key], functions[key].transform) for key in fitting}
    boxes = {key: objects for key, objects in found.items() if objects is not None}
    names = check(_names_that_count, splits, boxes, model)
    renumbered = []
    for key in fitting:
        transform: Any = functions[key].transform
        raw = splits[key]  # with the columns under the user's names
        if hasattr(transform, "mask_among"):
            splits[key], transform = _without_labels(splits[key], transform)
        here = boxes[key].names if key in boxes else None
        split = splits[key]
        given = Given(processor, model, names, here, split.is_train, split.kinds)
        fitted = check(transform.fitted, given) or transform
        check(refuse_doubtful, raw, functions[key].transform, fitted)
        functions[key] = functions[key]._replace(
            transform=fitted, makes=tuple(getattr(fitted, "made", ()))
        )
        if getattr(fitted, "numbers", None) is not None:
            renumbered.append(splits[key].name)
    for key, objects in boxes.items():
        if not splits[key].is_stream:
            _tell_boxes(splits[key], objects)
    if names is None and any(hasattr(functions[key].transform, "mask_among") for key in fitting):
        names = names_of(model)  # masks hold numbers without names
    return splits, functions, Naming(names, tuple(renumbered), is_numbered=True)


def _without_labels(split: Split, transform: Any) -> tuple[Split, Any]:
    """Give a column of masks another name if it would be taken for the labels of the rows."""
    from dataclasses import replace

    column = transform.mask_among(split.kinds)
    if column is None or column.lower() not in LABELS:
        return split, transform
    return split.rename(column, _RENAMED), replace(transform, mask=_RENAMED)


class _Objects(NamedTuple):
    """The boxes of a split.

    Attributes:
        names: Names of their classes by number; None if they are numbers without names, or texts.
        texts: Names that occur, sorted; None if the classes are numbers.
        num_boxes: Number of boxes in each row.
        num_crowds: Number of boxes of crowds.
        num_flat: Number of boxes without an area.
    """

    names: tuple[str, ...] | None
    texts: tuple[str, ...] | None
    num_boxes: Ints
    num_crowds: int
    num_flat: int


def _objects_of(split: Split, transform: Any) -> _Objects | None:
    """Describe the boxes of a split; None if it has none, or nobody can tell."""
    column = getattr(transform, "objects", None)
    if column is None or column not in split.kinds:
        return None
    if split.is_stream:
        feature = _feature((split.rows.features or {}).get(column), transform.label)
        own = tuple(getattr(feature, "names", None) or ())
        own_names = own if own and not are_numbers(own) else None
        return _Objects(own_names, None, np.zeros(0, np.int64), 0, 0)
    stored, numbers = stored_table(split.rows.select_columns([column]))
    array = stored.table.column(column).combine_chunks()
    array = array if numbers is None else array.take(pa.array(numbers))
    if array.null_count == len(array):
        return None
    boxes, classes = _leaves(array, transform.box), _leaves(array, transform.label)
    if boxes is None or classes is None:
        return None
    crowds = _leaves(array, "iscrowd")
    is_text = pa.types.is_string(classes.values.type)
    names = getattr(_feature(split.rows.features[column], transform.label), "names", None)
    is_flat = _are_flat(boxes.values)
    return _Objects(
        tuple(names) if names and not are_numbers(names) else None,
        tuple(sorted({t for t in classes.values.to_pylist() if t})) if is_text else None,
        boxes.lengths,
        0 if crowds is None else sum(map(bool, crowds.values.to_pylist())),
        int(is_flat.sum()),
    )


class _Leaves(NamedTuple):
    values: pa.Array
    lengths: Ints


def _leaves(array: pa.Array, name: str) -> _Leaves | None:
    """Return the entries of all rows under a name: of a dict of lists, or of a list of dicts."""
    if is_list_type(array.type):
        lengths, inner = pc.list_value_length(array), array.flatten()
        if not pa.types.is_struct(inner.type) or inner.type.get_field_index(name) < 0:
            return None
        return _Leaves(pc.struct_field(inner, name), lengths.fill_null(0).to_numpy())
    if not pa.types.is_struct(array.type) or array.type.get_field_index(name) < 0:
        return None
    lists = pc.struct_field(array, name)
    if not is_list_type(lists.type):
        return None
    return _Leaves(lists.flatten(), pc.list_value_length(lists).fill_null(0).to_numpy())


def _are_flat(boxes: pa.Array) -> Any:
    numbers = np.asarray(boxes.flatten().to_pylist() if is_list_type(boxes.type) else [], object)
    if len(numbers) % 4:
        return np.zeros(0, bool)  # boxes of other lengths are refused where they are read
    return (numbers.reshape(-1, 4)[:, 2:] == 0).any(1)


def _feature(feature: Any, name: str) -> Any:
    """Return the feature of the entries under a name."""
    while feature is not None and not isinstance(feature, Mapping):
        feature = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    feature = None if feature is None else feature.get(name)
    while (item := getattr(feature, "feature", None)) is not None:
        feature = item
    return feature


def _names_that_count(
    splits: Mapping[Any, Split], boxes: Mapping[Any, _Objects], model: nn.Module | None
) -> tuple[str, ...] | None:
    """Return the names by which the classes of boxes are numbered; None if there are none.

    They are those of the model, unless it has them from other data; else those of the training
    split.

    Raises:
        DataError: The model has fewer outputs.
    """
    if not boxes:
        return None
    own = names_of(model)
    reference = reference_of({key: splits[key] for key in boxes})
    found = next(objects for key, objects in boxes.items() if splits[key] is reference)
    names = found.names or found.texts
    if own is not None and not (model is not None and are_given(model) and names):
        return own
    number = None if model is None else num_classes(model)
    if names is not None and number is not None and len(names) > number:
        raise DataError(
            f"The boxes of {reference.name} have {len(names)} classes: {show_names(names)}. The "
            f"model has num_labels={number}. Load it with more: from_pretrained(name, "
            f"num_labels={len(names)})."
        )
    return names


def _tell_boxes(split: Split, objects: _Objects) -> None:
    """Log how many boxes a split has, and which of them are left out of the training."""
    num_rows, num_empty = len(objects.num_boxes), int((objects.num_boxes == 0).sum())
    line = f"{split.name}: {int(objects.num_boxes.sum())} boxes in {num_rows} images"
    line += f", {num_empty} of them without a box" if num_empty else ""
    left = [
        f"{number} {what}"
        for number, what in (
            (objects.num_crowds, "of crowds"),
            (objects.num_flat, "without an area"),
        )
        if number
    ]
    line += f"; left out of the training: {' and '.join(left)}" if left else ""
    say(line)
