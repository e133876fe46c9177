"""What a metric returns, as scores: nested results are flattened, matrices and texts kept aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from manualloop.errors import MetricError
from manualloop.types import Matrix, Scores

_MOST = 1000  # numbers in a list; more are the points of a curve, or one of each row


def to_scores(name: str, result: Any, names: Sequence[str] | None = None) -> Scores:
    """Return the result of a metric as floats by key, with matrices and texts beside them.

    Args:
        name: Name of the metric, which is the key of a lone number.
        result: A number; an array; a tuple of numbers, named or not; or a mapping of these, of
            texts and of such mappings.
        names: Names of the classes, for a confusion matrix.

    Raises:
        MetricError: The result holds something else, or two results have the same key.

    >>> to_scores("report", {"cat": {"f1": 0.5}, "macro": [0.25, 1]})
    {'cat_f1': 0.5, 'macro_0': 0.25, 'macro_1': 1.0}
    """
    scores = Scores()
    if isinstance(result, str):
        raise MetricError(
            f"{name} returned a text, and a result is made of numbers: {result!r:.60}. Let it "
            f"return them: partial({name}, output_dict=True), if it is scikit-learn's report."
        )
    _add(scores, name, str(name), result, names, is_whole=True)
    return scores


def _add(
    scores: Scores,
    metric: str,
    key: str,
    value: Any,
    names: Sequence[str] | None,
    *,
    is_whole: bool = False,
) -> None:
    value = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind in "biuf":
        _once(scores.matrices, metric, key)[key] = _matrix(key, value, names)
        return
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        value, is_whole = dict(zip((f"{key}_{n}" for n in value._fields), value, strict=True)), True
    elif isinstance(value, tuple) and all(map(_is_number, value)):
        value = list(value)
    if isinstance(value, Mapping):
        for inner, entry in value.items():
            _add(scores, metric, str(inner) if is_whole else f"{key}_{inner}", entry, names)
    elif isinstance(value, list) and len(value) <= _MOST:
        for number, entry in enumerate(value):
            _add(scores, metric, f"{key}_{number}", entry, names)
    elif isinstance(value, str):
        _once(scores.texts, metric, key)[key] = value
    elif isinstance(value, Real):
        _once(scores, metric, key)[key] = float(value)
    else:
        size = f" of {len(value)} entries" if isinstance(value, list | tuple) else ""
        raise MetricError(
            f"{metric} gave {type(value).__name__}{size} for {key!r}, not a number. Return a "
            f"number, or a mapping of numbers: return {{{metric!r}: 0.5}}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (hasattr(value, "tolist") and np.ndim(value) == 0)


def _once(scores: Any, metric: str, key: str) -> Any:
    if key in scores:
        raise MetricError(
            f"{metric} gave two results of the name {key!r}, nested ones being joined by '_'. "
            "Rename one of them."
        )
    return scores


def _matrix(key: str, values: Any, names: Sequence[str] | None) -> Matrix:
    rows, columns = (tuple(map(str, range(size))) for size in values.shape)
    if "confusion" in key and names is not None and values.shape == (len(names),) * 2:
        rows = columns = tuple(names)
    return Matrix(values, rows, columns)
