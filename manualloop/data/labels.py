"""Can these labels be learned? The checks that a whole column and a single batch share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from manualloop.errors import DataError
from manualloop.tasks import IGNORE_INDEX


def check_class_ids(
    labels: NDArray[np.integer], num_labels: int, where: Callable[[int], str]
) -> None:
    """Refuse class numbers that the model has no output for.

    Args:
        labels: Of any shape, the first axis being the rows.
        num_labels: Outputs of the model.
        where: Names a row, given its number in ``labels``: "train batch 0 (row id 17)".

    Raises:
        DataError: A label is negative and not -100, or is ``num_labels`` or more.

    >>> check_class_ids(np.array([0, 2]), 2, lambda row: f"row {row} of train")
    Traceback (most recent call last):
    manualloop.errors.DataError: Label 2 in row 1 of train, but the model has num_labels=2 (0..1). \
Build the model with num_labels=3, or mend the label.
    """
    kept = labels[labels != IGNORE_INDEX]
    if kept.size == 0 or (kept.min() >= 0 and kept.max() < num_labels):
        return
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_labels))
    first = tuple(np.argwhere(wrong)[0])
    label, place = int(labels[first]), where(int(first[0]))
    if label < 0:
        raise DataError(
            f"Label {label} in {place}: classes are counted from 0. To leave a row out of the "
            f"loss, label it {IGNORE_INDEX}: "
            f'dataset.map(lambda row: {{"labels": {IGNORE_INDEX} if row["labels"] < 0 else '
            'row["labels"]}).'
        )
    hint = ""
    if int(kept.min()) > 0 and int(kept.max()) == num_labels:
        hint = f" The smallest label is {int(kept.min())}: labels must start at 0."
    raise DataError(
        f"Label {label} in {place}, but the model has num_labels={num_labels} "
        f"(0..{num_labels - 1}).{hint} Build the model with num_labels={int(kept.max()) + 1}, or "
        "mend the label."
    )
