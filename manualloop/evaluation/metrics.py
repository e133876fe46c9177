"""The built-in metrics: offline, and exact however the rows are batched.

``load_metric`` returns an object with the interface of an ``evaluate`` module. scikit-learn and
SciPy compute the scores; this module only keeps the rows.

Sources: the GLUE configurations, keys and formulae are those of the ``glue`` script of
https://github.com/huggingface/evaluate; the tasks are Wang et al., "GLUE: A Multi-Task Benchmark
and Analysis Platform for Natural Language Understanding", ICLR 2019 (arXiv:1804.07461).
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manualloop.arguments import check_arguments
from manualloop.errors import ConfigError, MetricError

if TYPE_CHECKING:
    from evaluate import EvaluationModule

Array = NDArray[Any]


class _Rows(NamedTuple):
    predictions: Array  # (num_rows,) or (num_rows, num_labels)
    references: Array  # the same shape
    weights: Array | None  # (num_rows,) how often each row occurred; None for once


def _sklearn(function: str, rows: _Rows, **options: Any) -> float:
    from sklearn import metrics

    score = getattr(metrics, function)
    return float(score(rows.references, rows.predictions, sample_weight=rows.weights, **options))


def _matthews(rows: _Rows) -> float:
    with warnings.catch_warnings():
        # With a single label scikit-learn warns about the shape of an internal matrix.
        warnings.filterwarnings("ignore", message="A single label", category=UserWarning)
        return _sklearn("matthews_corrcoef", rows)


def _averaged(name: str, average: str, rows: _Rows) -> float:
    """Return f1, precision or recall; 0 / 0 is 0.0, scikit-learn's default without its warning."""
    if average == "binary":
        labels = np.union1d(rows.predictions, rows.references)
        if not np.isin(labels, (0, 1)).all():
            raise MetricError(
                f"{name} scores the classes 0 and 1, but the rows hold the classes {_show(labels)}."
                f' For more classes choose an average: "{name}/macro" (or micro, weighted).'
            )
    return _sklearn(f"{name}_score", rows, average=average, zero_division=0)


def _correlation(function: str, rows: _Rows) -> float:
    """Return pearson or spearman; nan if a side is constant or there is a single row."""
    from scipy import stats

    if len(rows.predictions) == 1:
        return float("nan")
    with warnings.catch_warnings():
        # nan is the answer; a model often predicts one value early in training.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return float(getattr(stats, function)(rows.predictions, rows.references)[0])
        except ValueError:  # older SciPy refuses rows that are not finite
            return float("nan")


def _error(function: str, rows: _Rows) -> float:
    """Return mse or mae; nan if a row is not finite, which scikit-learn refuses."""
    finite = np.isfinite(rows.predictions).all() and np.isfinite(rows.references).all()
    return _sklearn(function, rows) if finite else float("nan")


_AVERAGED = ("f1", "precision", "recall")
_AVERAGES = ("macro", "micro", "weighted", "samples")
_PAIRS = [(name, average) for name in _AVERAGED for average in _AVERAGES]
_FORMULAS: dict[str, Callable[[_Rows], float]] = {  # by the key of the score
    "accuracy": partial(_sklearn, "accuracy_score"),
    "matthews_correlation": _matthews,
    "pearson": partial(_correlation, "pearsonr"),
    "spearmanr": partial(_correlation, "spearmanr"),
    "mse": partial(_error, "mean_squared_error"),
    "mae": partial(_error, "mean_absolute_error"),
    **{name: partial(_averaged, name, "binary") for name in _AVERAGED},
    **{f"{name}_{average}": partial(_averaged, name, average) for name, average in _PAIRS},
}
_CONTINUOUS = ("pearson", "spearmanr", "mse", "mae")
_GLUE_ACCURACY = ("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "hans")
_KEYS: dict[str, tuple[str, ...]] = {  # of the scores, by the name of the metric
    **{name: (name,) for name in ("accuracy", *_AVERAGED, "matthews_correlation", "mse", "mae")},
    **dict.fromkeys(("pearson", "pearsonr"), ("pearson",)),
    **dict.fromkeys(("spearman", "spearmanr"), ("spearmanr",)),
    "glue/cola": ("matthews_correlation",),
    **dict.fromkeys(("glue/mrpc", "glue/qqp"), ("accuracy", "f1")),
    "glue/stsb": ("pearson", "spearmanr"),
    **{f"glue/{task}": ("accuracy",) for task in _GLUE_ACCURACY},
    **{f"{name}/{average}": (f"{name}_{average}",) for name, average in _PAIRS},
}
_SEVERAL_LABELS = ("accuracy", "mse", "mae", *(f"{n}/{a}" for n, a in _PAIRS))


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
    got = f"{'str' if kind in 'US' else values.dtype.name} {_show(values)}"
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


def _show(values: Array) -> str:
    """Format at most three values, such as ``(0.9, 1.2)``; ``str`` keeps a float32 short."""
    shown = [repr(str(v)) if isinstance(v, str) else str(v) for v in values.ravel()[:3]]
    return f"({', '.join(shown)}{', ...' if values.size > 3 else ''})"


# Number of rows that wait until they are counted. Sorting 4096 rows takes 0.2 ms; sorting each
# batch of 8 would take longer than the rest of ``add_batch``.
_FOLD_AT = 4096


class Metric:
    """A built-in metric, made by ``load_metric``.

    Metrics of classes keep each distinct (prediction, reference) row once, with its count. Their
    memory does not grow with the data (beyond 4096 rows that wait to be counted), and scores are
    exact however rows are batched. Continuous metrics (pearson, spearman, mse, mae, glue/stsb) keep
    all rows as float64, which takes 16 bytes for one prediction and one reference.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._continuous = _KEYS[name][0] in _CONTINUOUS
        self.reset()

    @property
    def takes(self) -> Literal["classes", "values"]:
        """What the metric scores: class numbers, or real numbers."""
        return "values" if self._continuous else "classes"

    def reset(self) -> None:
        """Forget all rows."""
        self._num_rows = self._num_batches = 0
        # Columns: predictions, references, and for classes the count. The first array is counted.
        self._rows: list[Array] = []
        self._num_waiting = 0  # rows in the others

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add the rows of one batch.

        Args:
            predictions: Tensor (any device), array or list with one entry per row: integers or
                booleans for a metric of classes, otherwise real numbers. Shape ``(num_rows,)``, or
                ``(num_rows, num_labels)`` where the metric takes it.
            references: The same shape and kind.

        Raises:
            MetricError: Lengths or shapes differ, or the values are not what the metric scores
                (logits, floats instead of classes, strings). Nothing is added then.
        """
        num_rows = count_rows(self.name, predictions, references, self._num_batches)
        if num_rows:
            self._rows.append(self._to_rows(to_array(predictions), to_array(references)))
            self._num_rows += num_rows
            self._num_waiting += num_rows
            # Not before there are as many as distinct ones, so that the cost per row does not grow.
            if self._num_waiting >= max(_FOLD_AT, len(self._rows[0])):
                self._fold()
        self._num_batches += 1

    def _to_rows(self, predictions: Array, references: Array) -> Array:
        """Return the rows as a new array, because a caller may reuse its buffer."""
        where = f"in batch {self._num_batches}"
        kinds = "biuf" if self._continuous else "biu"
        require_kind(self.name, "predictions", predictions, self._num_batches, kinds)
        require_kind(self.name, "references", references, self._num_batches, kinds)
        wanted, shape = {1: "one value", 2: "several labels"}, predictions.shape
        if self.name.endswith("/samples"):
            del wanted[1]
        elif self.name not in _SEVERAL_LABELS:
            del wanted[2]
        if shape != references.shape or len(shape) not in wanted or shape[1:] in ((0,), (1,)):
            raise MetricError(
                f"{self.name} got predictions of shape {shape} and references of shape "
                f"{references.shape} {where}, but scores {' or '.join(wanted.values())} a row. One "
                "column: predictions.squeeze(-1); tokens: predictions[references != -100]."
            )
        counts = [] if self._continuous else [np.ones(len(predictions), np.int64)]
        rows = np.column_stack([predictions, references, *counts])
        rows = rows.astype(np.float64 if self._continuous else np.int64, copy=False)
        self._require_same_width(rows, where)
        return rows

    def _require_same_width(self, rows: Array, where: str) -> None:
        if self._rows and rows.shape[1] != self._rows[0].shape[1]:
            raise MetricError(
                f"{self.name} got rows of {rows.shape[1] // 2} labels {where}, of "
                f"{self._rows[0].shape[1] // 2} before. Give all batches the same number."
            )

    def _fold(self) -> None:
        """Join the rows into one array; for classes count the distinct rows, sorted."""
        rows = np.concatenate(self._rows)
        if not self._continuous:
            # np.unique(rows, axis=0) takes 8 times as long for classes.
            rows = rows[np.lexsort(rows[:, :-1].T)]
            is_new = np.append(True, (rows[1:, :-1] != rows[:-1, :-1]).any(axis=1))
            counts = np.add.reduceat(rows[:, -1], np.flatnonzero(is_new))
            rows = np.column_stack([rows[is_new, :-1], counts])
        self._rows, self._num_waiting = [rows], 0

    def merge(self, other: Metric) -> None:
        """Add the rows of another metric of the same name, such as that of another rank.

        Raises:
            ConfigError: The names differ.
            MetricError: The rows have another number of labels.
        """
        if self.name != other.name:
            raise ConfigError(
                f"Cannot merge the rows of {other.name!r} into {self.name!r}. Make both by the "
                f"same name: load_metric({self.name!r})."
            )
        if other._rows:
            self._require_same_width(other._rows[0], "in the metric to merge")
            self._rows += other._rows
            self._fold()
        self._num_rows += other._num_rows
        self._num_batches += other._num_batches

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, float]:
        """Score all rows added and those given as arguments, then forget them.

        Args:
            predictions: Last rows to add, as for ``add_batch``; None adds none.
            references: Their references.

        Returns:
            The scores by name; nan where one is undefined (a correlation with a constant, an error
            of rows that are not finite), 0.0 for f1, precision and recall of 0 / 0.

        Raises:
            MetricError: There are no rows, or their classes cannot be scored.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        require_rows(self.name, self._num_rows, self._num_batches)
        self._fold()
        table = self._rows[0]
        self.reset()
        width = table.shape[1] // 2
        sides = (np.ascontiguousarray(table[:, i * width : (i + 1) * width]) for i in range(2))
        predictions, references = (side[:, 0] if width == 1 else side for side in sides)
        if not self._continuous:
            self._require_classes(predictions, references)
        rows = _Rows(predictions, references, None if self._continuous else table[:, -1])
        return {key: _FORMULAS[key](rows) for key in _KEYS[self.name]}

    def _require_classes(self, predictions: Array, references: Array) -> None:
        if (references == -100).any():
            raise MetricError(
                f"{self.name} got references of -100, which mark entries to leave out. Drop them: "
                "predictions[references != -100], references[references != -100]."
            )
        labels = np.union1d(predictions, references)
        if predictions.ndim == 2 and not np.isin(labels, (0, 1)).all():
            raise MetricError(
                f"{self.name} takes rows of several labels as 0 and 1, but they hold "
                f"{_show(labels)}. Score one class a row: predictions.ravel(), references.ravel()."
            )


def load_metric(name: str, config: str | None = None) -> Metric | EvaluationModule:
    """Load a metric by name, without network where it is built in.

    Built in: accuracy, f1, precision, recall, matthews_correlation, pearson, spearman, mse, mae and
    the configurations of GLUE. f1, precision and recall score class 1 of {0, 1}; with an average
    they score more classes or labels, and the key says so: ``"f1/macro"`` (micro, weighted,
    samples) gives ``{"f1_macro": ...}``. Keys and values are those of the hub's scripts, except
    that continuous rows are not rounded to float32 first. Any other name is passed to
    ``evaluate.load``.

    Args:
        name: Name of the metric, such as ``"accuracy"``, or ``"glue/mrpc"`` for
            ``("glue", "mrpc")``.
        config: Configuration or average.

    Returns:
        A ``Metric``, or the module of ``evaluate.load(name, config)``, which has its methods.

    Raises:
        MetricError: The metric is not built in and cannot be loaded.

    >>> metric = load_metric("glue", "mrpc")
    >>> metric.add_batch(predictions=[0, 1], references=[0, 1])
    >>> metric.add_batch(predictions=[1, 1], references=[0, 1])
    >>> metric.compute()
    {'accuracy': 0.75, 'f1': 0.8}
    >>> load_metric("f1/macro").compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 2])
    {'f1_macro': 1.0}
    """
    check_arguments(name=name, config=config)
    key = name if config is None else f"{name}/{config}"
    if key in _KEYS:
        return Metric(key)
    # A typo, or a GLUE configuration that does not exist, must not wait for a network. The cutoff
    # lets the hub's "mape" and "mase" pass, which are 0.857 from "mae". A local script may have
    # any name.
    is_typo = key.split("/")[0] == "glue" or difflib.get_close_matches(key, _KEYS, cutoff=0.86)
    if is_typo and not os.path.exists(name):
        raise _unknown(key, "offline or unknown")
    import evaluate

    try:
        return evaluate.load(name, config)
    except OSError as error:  # both not found and no connection
        raise _unknown(key, "offline or unknown") from error
    except Exception as error:  # a script of the hub may raise anything
        raise _unknown(key, f"{type(error).__name__}: {error}") from error


def _unknown(key: str, reason: str) -> MetricError:
    names = ", ".join(name for name in _KEYS if not name.endswith(_AVERAGES))
    similar = difflib.get_close_matches(key, _KEYS, n=1)
    suggestion = f" Did you mean {similar[0]!r}?" if similar else ""
    return MetricError(
        f"Cannot fetch metric {key!r} ({reason}). Built in: {names}; {', '.join(_AVERAGED)} also "
        f"with /{', /'.join(_AVERAGES)}.{suggestion}"
    )
