"""What all metrics share: what they are given, what they return, and how they report mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from manualloop.errors import ConfigError, ManualLoopError, MetricError
from manualloop.types import Matrix, Scores

Array = NDArray[Any]

Takes: TypeAlias = Literal["classes", "values", "rows", "scores", "maps", "loss"]
"""What a scorer gets, whatever the shapes of a batch are.

``"classes"``: flat class numbers of all labels that are not ignored; multi-label ``(rows,
classes)``. ``"values"``: real numbers in the same form. ``"rows"``: one entry a row, in the order
of the dataset. ``"scores"``: probabilities ``(rows, classes)`` beside flat class numbers.
``"maps"``: class maps, one a row, beside the labels of each row, ignored ones included. ``"loss"``:
the mean loss alone.
"""


class Scorer(Protocol):
    """An object that takes rows batch by batch and scores all of them.

    A scorer of ``"rows"`` may have an attribute ``takes_kept``. If it is true, ``add_batch`` gets a
    third argument ``kept``: the columns that skipped the model, by name.

    Attributes:
        name: Name in messages.
    """

    name: str

    @property
    def takes(self) -> Takes:
        """What it is given."""
        ...

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add the rows of one batch: tensors, arrays or lists with one entry per row."""
        ...

    def compute(self) -> Scores:
        """Return the scores of all rows by name, and forget the rows."""
        ...


class Rows(list[Any]):
    """One entry a row, of any kind, which a function gets as a list and not as an array."""


_PLAIN = frozenset((str, int, float, bool, type(None)))


def owned(entry: Any) -> Any:
    """Return a copy of an entry and of what is in it, so that a metric may change it.

    >>> row = [{"tags": ["B", "O"]}]
    >>> owned(row)[0]["tags"].clear()
    >>> row
    [{'tags': ['B', 'O']}]
    """
    if isinstance(entry, list):
        are_plain = _PLAIN.issuperset(map(type, entry))
        return type(entry)(entry if are_plain else map(owned, entry))
    if type(entry) is tuple:
        return tuple(map(owned, entry))
    if type(entry) is dict:
        return {name: owned(one) for name, one in entry.items()}
    if isinstance(entry, np.ndarray):
        return entry.copy()
    return entry.clone() if hasattr(entry, "clone") and hasattr(entry, "detach") else entry


def to_array(values: Any) -> Array:
    """Convert a tensor of any device and dtype, an array or a list to a NumPy array."""
    if hasattr(values, "detach"):
        try:
            return np.asarray(values.numpy())  # most are on the CPU, without a graph
        except (RuntimeError, TypeError):
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


def require_options(name: str, options: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """Refuse options that a metric does not take.

    Raises:
        ConfigError: There are some.
    """
    if unknown := [option for option in options if option not in accepted]:
        takes = f"takes {', '.join(accepted)}" if accepted else "takes no options"
        call = f'load_metric("{name}", {accepted[0]}=...)' if accepted else f'load_metric("{name}")'
        raise ConfigError(
            f"The metric {name!r} does not take {', '.join(unknown)}: it {takes}. Write {call}."
        )


def load_extra(module: str, metric: str) -> Any:
    """Import a module of an optional library.

    Raises:
        MetricError: It is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.split(".")[0].replace("_", "-")
        raise MetricError(
            f"The metric {metric!r} needs {library}, which cannot be imported ({error}). Install "
            'it: pip install "manualloop[metrics]".'
        ) from error


_OF_LIBRARIES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError),
    ValueError,
)


@contextmanager
def explaining(name: str) -> Iterator[None]:
    """Name the metric in the error that a library raises.

    Raises:
        MetricError: The library raised an error.
    """
    try:
        yield
    except ManualLoopError:
        raise
    except _OF_LIBRARIES as error:
        raise MetricError(
            f"{name} cannot score these rows with these options: {type(error).__name__}: {error}"
        ) from error
