"""What metrics are given: arrays of the right kind, as many on both sides."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from manualloop.errors import MetricError

Array = NDArray[Any]

Takes: TypeAlias = Literal["classes", "values", "rows", "scores", "maps", "loss"]
"""What a scorer gets, whatever the shapes of a batch are.

``"classes"``: flat class numbers of all labels that are not ignored; multi-label ``(rows,
classes)``. ``"values"``: real numbers in the same form. ``"rows"``: one entry a row, in the order
of the dataset. ``"scores"``: probabilities ``(rows, classes)`` beside flat class numbers.
``"maps"``: class maps, one a row, beside the labels of each row, ignored ones included. ``"loss"``:
the mean loss alone.
"""


class Rows(list[Any]):
    """One entry a row, of any kind, which a function gets as a list and not as an array."""


def to_array(values: Any) -> Array:
    """Convert a tensor of any device and dtype, an array or a list to a NumPy array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        try:
            return np.asarray(values.numpy())
        except TypeError:  # bfloat16 and float8 have no NumPy dtype; float32 holds their values
            return np.asarray(values.float().numpy())
    try:
        return np.asarray(values)
    except ValueError as error:
        raise MetricError(
            f"A batch has rows of different lengths ({error}). Flatten it: "
            "predictions = [label for row in predictions for label in row]."
        ) from error


def count_rows(name: str, predictions: Any, references: Any, batch: int) -> int:
    """Return the number of rows in a batch, which must be the same on both sides."""
    try:
        num_rows, num_references = len(predictions), len(references)
    except TypeError as error:
        raise MetricError(
            f"{name} got no rows in batch {batch} ({error}). Pass one entry per row: "
            "add_batch(predictions=[1], references=[0])."
        ) from error
    if num_rows != num_references:
        raise MetricError(
            f"{name} got {num_rows} predictions but {num_references} references in batch {batch}. "
            "Pass those of the same rows: references=batch['labels']."
        )
    return num_rows


def require_rows(name: str, num_rows: int, num_batches: int) -> None:
    """Raise an error if there is nothing to score."""
    if num_rows == 0:
        raise MetricError(
            f"No rows to score: {name} got {num_batches} batches and no row. Check the evaluation "
            "loader, and call add_batch(...) for each batch before compute()."
        )


def require_kind(name: str, role: str, values: Array, batch: int, kinds: str = "biu") -> None:
    """Refuse values that would silently be scored wrongly: scores and floats taken for classes."""
    if (kind := values.dtype.kind) in kinds:
        return
    got = f"{'str' if kind in 'US' else values.dtype.name} {show(values)}"
    fix = f"Convert them: {role} = [label2id[label] for label in {role}]"
    if kind == "f" and values.ndim > 1:
        got = f"float scores of shape {values.shape}"
        fix = f"Take the argmax: {role} = logits.argmax(-1), or several labels: (logits > 0).int()"
    elif kind == "f":
        fix = f"Convert them: {role} = (scores > 0.5).astype(int)"
    raise MetricError(
        f"{name} expects {'numbers' if 'f' in kinds else 'integers'}, got {got} in the {role} of "
        f"batch {batch}. {fix}."
    )


def show(values: Array) -> str:
    """Format at most three values, such as ``(0.9, 1.2)``; ``str`` keeps a float32 short."""
    shown = [repr(str(v)) if isinstance(v, str) else str(v) for v in values.ravel()[:3]]
    return f"({', '.join(shown)}{', ...' if values.size > 3 else ''})"
