"""Metrics: embedded, offline, exact however the rows were batched, and open to what others wrote.

`load_metric` gives an accumulator with the interface of an `evaluate` module, so it drops into a
hand-written evaluation loop; `as_metric` turns anything that counts as a metric into one. The
mathematics is scikit-learn's and SciPy's, this module only keeps the rows.

Sources: the GLUE configurations, keys and formulae are those of the `glue` script of
https://github.com/huggingface/evaluate; the tasks are Wang et al., "GLUE: A Multi-Task Benchmark
and Analysis Platform for Natural Language Understanding", ICLR 2019 (arXiv:1804.07461).
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from manualloop.errors import ConfigError, MetricError

Array = NDArray[Any]
Scores = dict[str, float]


class _Rows(NamedTuple):
    predictions: Array  # (num_rows,) or (num_rows, num_labels)
    references: Array  # the same shape
    weights: Array | None  # (num_rows,) how often each row occurred; None: once


# The formulae -------------------------------------------------------------------------------------


def _sklearn(function: str, rows: _Rows, **options: Any) -> float:
    from sklearn import metrics

    score = getattr(metrics, function)
    return float(score(rows.references, rows.predictions, sample_weight=rows.weights, **options))


def _accuracy(rows: _Rows) -> Scores:
    return {"accuracy": _sklearn("accuracy_score", rows)}


def _matthews(rows: _Rows) -> Scores:
    with warnings.catch_warnings():
        # One label only: scikit-learn warns about the shape of a matrix that nobody sees.
        warnings.filterwarnings("ignore", message="A single label", category=UserWarning)
        return {"matthews_correlation": _sklearn("matthews_corrcoef", rows)}


def _averaged(name: str, average: str, rows: _Rows) -> Scores:
    """Computes f1, precision or recall; 0 / 0 is 0.0, scikit-learn's default less its warning."""
    if average == "binary":
        labels = np.union1d(rows.predictions, rows.references)
        if not np.isin(labels, (0, 1)).all():
            raise MetricError(
                f"{name} scores the classes 0 and 1, but the rows hold the classes {_show(labels)}."
                f' For more classes choose an average: "{name}/macro" (or micro, weighted).'
            )
    if average == "samples" and rows.predictions.ndim == 1:
        raise MetricError(
            f"{name}/samples scores rows of several 0/1 labels, but got one class a row. "
            f'Use "{name}/macro" (or micro, weighted).'
        )
    score = _sklearn(f"{name}_score", rows, average=average, zero_division=0)
    return {name if average == "binary" else f"{name}_{average}": score}


def _accuracy_and_f1(rows: _Rows) -> Scores:
    return {**_accuracy(rows), **_averaged("f1", "binary", rows)}


def _correlation(function: str, key: str, rows: _Rows) -> Scores:
    """Computes pearson or spearman; nan where a side is constant, or from a single row."""
    from scipy import stats

    if len(rows.predictions) < 2:
        return {key: float("nan")}
    with warnings.catch_warnings():
        # The nan says it; a model that predicts one value is nothing unusual early in training.
        warnings.simplefilter("ignore", RuntimeWarning)
        return {key: float(getattr(stats, function)(rows.predictions, rows.references)[0])}


def _pearson_and_spearman(rows: _Rows) -> Scores:
    pearson = _correlation("pearsonr", "pearson", rows)
    return {**pearson, **_correlation("spearmanr", "spearmanr", rows)}


def _error(function: str, key: str, rows: _Rows) -> Scores:
    """Computes mse or mae; nan where a row is not finite, which scikit-learn refuses."""
    finite = np.isfinite(rows.predictions).all() and np.isfinite(rows.references).all()
    return {key: _sklearn(function, rows) if finite else float("nan")}


@dataclass(frozen=True)
class _Formula:
    compute: Callable[[_Rows], Scores]
    continuous: bool = False  # float64 rows, all kept; else int64 rows, counted
    max_dims: int = 1  # 2: also rows of several labels or outputs, (num_rows, num_labels)


_bind = functools.partial
_AVERAGED = ("f1", "precision", "recall")
_AVERAGES = ("macro", "micro", "weighted", "samples")
_GLUE_ACCURACY = ("sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "hans")
_FORMULAS: dict[str, _Formula] = {
    "accuracy": _Formula(_accuracy, max_dims=2),
    **{name: _Formula(_bind(_averaged, name, "binary")) for name in _AVERAGED},
    "matthews_correlation": _Formula(_matthews),
    "pearson": _Formula(_bind(_correlation, "pearsonr", "pearson"), continuous=True),
    "spearman": _Formula(_bind(_correlation, "spearmanr", "spearmanr"), continuous=True),
    "mse": _Formula(_bind(_error, "mean_squared_error", "mse"), continuous=True, max_dims=2),
    "mae": _Formula(_bind(_error, "mean_absolute_error", "mae"), continuous=True, max_dims=2),
    "glue/cola": _Formula(_matthews),
    "glue/mrpc": _Formula(_accuracy_and_f1),
    "glue/qqp": _Formula(_accuracy_and_f1),
    "glue/stsb": _Formula(_pearson_and_spearman, continuous=True),
    **{f"glue/{task}": _Formula(_accuracy) for task in _GLUE_ACCURACY},
    **{
        f"{name}/{average}": _Formula(_bind(_averaged, name, average), max_dims=2)
        for name in _AVERAGED
        for average in _AVERAGES
    },
}
_ALIASES = {"pearsonr": "pearson", "spearmanr": "spearman"}


# Rows: taken over and checked ---------------------------------------------------------------------


def _to_array(values: Any) -> Array:
    if hasattr(values, "detach"):  # a tensor, on any device
        values = values.detach().cpu()
        try:
            return np.asarray(values.numpy())
        except TypeError:  # bfloat16 and float8 have no numpy dtype, float32 holds their values
            return np.asarray(values.float().numpy())
    try:
        return np.asarray(values)
    except ValueError as error:
        raise MetricError(
            f"A batch has rows of different lengths ({error}). Flatten it: "
            f"predictions = [label for row in predictions for label in row]."
        ) from error


def _show(values: Array) -> str:
    """Shows at most three values, such as `(0.9, 1.2)`; `str` keeps a float32 short."""
    shown = [repr(str(v)) if isinstance(v, str) else str(v) for v in values.ravel()[:3]]
    return f"({', '.join(shown)}{', ...' if values.size > 3 else ''})"


def _check_dtype(name: str, role: str, array: Array, batch: int, *, continuous: bool) -> None:
    """Refuses what would be scored wrongly in silence: scores and floats taken for classes."""
    kind, where = array.dtype.kind, f"in the {role} of batch {batch}"
    if kind in "biu" or (continuous and kind == "f"):
        return
    if kind == "f" and array.ndim > 1:
        raise MetricError(
            f"{name} got float scores of shape {array.shape} {where}. Take the argmax first: "
            f"{role} = logits.argmax(-1) (several labels a row: (logits > 0).astype(int))."
        )
    wanted = "numbers" if continuous else "integers"
    dtype = "str" if kind in "US" else array.dtype.name
    mend = f"{role} = [label2id[label] for label in {role}]"
    if kind == "f":
        mend = f"{role} = (scores > 0.5).astype(int), or {role}.astype(int) for whole numbers"
    raise MetricError(
        f"{name} expects {wanted}, got {dtype} {_show(array)} {where}. Convert them: {mend}."
    )


def _check_shapes(name: str, formula: _Formula, rows: _Rows, batch: int) -> None:
    """Refuses rows that cannot be compared entry by entry."""
    shape, where = rows.predictions.shape, f"in batch {batch}"
    if shape != rows.references.shape:
        raise MetricError(
            f"{name} got predictions of shape {shape} but references of shape "
            f"{rows.references.shape} {where}. Use one shape, e.g. predictions.squeeze(-1)."
        )
    if len(shape) == 1:
        return
    if len(shape) > formula.max_dims or shape[1] < 2:
        raise MetricError(
            f"{name} got rows of shape {shape[1:]} {where}, but scores one value a row. One column:"
            f" predictions.squeeze(-1); tokens: predictions[references != -100], references alike."
        )
    for role, array in (("predictions", rows.predictions), ("references", rows.references)):
        if not formula.continuous and (array.min() < 0 or array.max() > 1):
            raise MetricError(
                f"{name} takes rows of several labels as 0 and 1, but the {role} hold "
                f"{_show(array[(array < 0) | (array > 1)])} {where}. "
                f"For tokens give predictions[references != -100], and the references alike."
            )


class Accumulator:
    """What takes rows batch by batch and scores them: the interface of an `evaluate` module.

    Attributes:
        name: The metric's, for messages.
        num_rows: Rows added since the last `compute` or `reset`.
        num_batches: Batches, likewise.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, num_rows={self.num_rows})"

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Adds the rows of one batch.

        Args:
            predictions: Tensor (any device), array or list with one entry per row. For a `Metric`
                of classes integers or booleans, else real numbers: shape (num_rows,), or
                (num_rows, num_labels) where the metric takes it.
            references: The same shape and kind.

        Raises:
            MetricError: If lengths or shapes differ, or the values are not what the metric scores
                (logits, floats where classes are wanted, strings). Nothing is added then.
        """
        try:
            num_rows, num_references = len(predictions), len(references)
        except TypeError as error:
            raise MetricError(
                f"{self.name} got no rows in batch {self.num_batches} ({error}). Give one entry "
                f"per row: add_batch(predictions=[1], references=[0])."
            ) from error
        if num_rows != num_references:
            raise MetricError(
                f"{self.name} got {num_rows} predictions but {num_references} references in batch "
                f"{self.num_batches}. Give those of the same rows: references=batch['labels']."
            )
        if num_rows:
            self._add(predictions, references)
        self.num_rows += num_rows
        self.num_batches += 1

    def compute(self, *, predictions: Any = None, references: Any = None) -> Scores:
        """Scores all rows added, and those given here, then forgets them.

        Args:
            predictions: Last rows to add, as for `add_batch`; None: no more.
            references: The same.

        Returns:
            The scores by key. nan where one is undefined (a correlation with a constant, an error
            of rows that are not finite), 0.0 for f1, precision and recall of 0 / 0.

        Raises:
            MetricError: If there are no rows, or they hold classes that cannot be scored.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self.num_rows == 0:
            raise MetricError(
                f"No rows to score: {self.name} got {self.num_batches} batches and no row. Check "
                f"the evaluation loader, and call add_batch(...) for each batch before compute()."
            )
        try:
            return self._score()
        finally:
            self.reset()

    def reset(self) -> None:
        """Forgets all rows."""
        self.num_rows = self.num_batches = 0
        self._clear()

    def _add(self, predictions: Any, references: Any) -> None:
        raise NotImplementedError

    def _score(self) -> Scores:
        raise NotImplementedError

    def _clear(self) -> None:
        raise NotImplementedError


# The built-in metrics -----------------------------------------------------------------------------

# Rows that wait before they are counted: to sort 4096 rows takes 0.2 ms, to sort each batch of 8
# would take longer than the rest of `add_batch`.
_FOLD_AT = 4096


def _distinct(rows: Array, counts: Array) -> tuple[Array, Array]:
    """Returns the distinct rows, sorted, and the sum of the counts of each."""
    # np.unique(rows, axis=0) takes 8 times as long for classes.
    order = np.lexsort(rows.T)
    rows = rows[order]
    starts = np.flatnonzero(np.append(True, (rows[1:] != rows[:-1]).any(axis=1)))
    return rows[starts], np.add.reduceat(counts[order], starts)


class Metric(Accumulator):
    """A built-in metric, made by `load_metric`.

    Metrics of classes keep each distinct (prediction, reference) row once, with its count: their
    memory does not grow with the data (beyond 4096 rows that wait to be counted), and scores are
    exact and independent of how rows were batched. Continuous metrics (pearson, spearman, mse, mae,
    glue/stsb) keep all rows as float64: 16 bytes a row of one prediction and one reference.
    """

    def _clear(self) -> None:
        self._pending: list[Array] = []  # (num_rows, 2 * width): predictions, then references
        self._num_pending = 0
        self._rows: list[Array] = []  # classes: one array of distinct rows; continuous: chunks
        self._counts = np.zeros(0, np.int64)  # classes only, one for each distinct row
        self._row_shape: tuple[int, ...] | None = None  # () or (num_labels,); None: no row yet

    def _add(self, predictions: Any, references: Any) -> None:
        formula = _FORMULAS[self.name]
        rows = _Rows(_to_array(predictions), _to_array(references), None)
        for role, array in (("predictions", rows.predictions), ("references", rows.references)):
            _check_dtype(self.name, role, array, self.num_batches, continuous=formula.continuous)
        _check_shapes(self.name, formula, rows, self.num_batches)
        shape = rows.predictions.shape
        self._check_row_shape(shape[1:], f"batch {self.num_batches}")
        width = 1 if len(shape) == 1 else shape[1]
        # A new array: a caller may fill the same buffer again.
        pairs = np.empty((shape[0], 2 * width), np.float64 if formula.continuous else np.int64)
        pairs[:, :width] = rows.predictions.reshape(-1, width)
        pairs[:, width:] = rows.references.reshape(-1, width)
        self._pending.append(pairs)
        self._num_pending += shape[0]
        # No sooner than there are as many as distinct ones: the cost a row does not grow then.
        if self._num_pending >= max(_FOLD_AT, len(self._counts)):
            self._fold()

    def _check_row_shape(self, shape: tuple[int, ...], where: str) -> None:
        if self._row_shape not in (None, shape):
            raise MetricError(
                f"{self.name} got rows of shape {shape} in {where}, of shape {self._row_shape} "
                f"before. Give all batches the same number of labels a row."
            )
        self._row_shape = shape

    def _fold(self) -> None:
        if self._pending:
            rows = np.concatenate(self._pending)
            self._pending, self._num_pending = [], 0
            self._absorb(rows, np.ones(len(rows), np.int64))

    def _absorb(self, rows: Array, counts: Array) -> None:
        if _FORMULAS[self.name].continuous:
            self._rows.append(rows)
            return
        rows = np.concatenate([*self._rows, rows])
        rows, self._counts = _distinct(rows, np.concatenate([self._counts, counts]))
        self._rows = [rows]

    def merge(self, other: Metric) -> None:
        """Adds the rows of another metric of the same name, such as another rank's.

        Args:
            other: Keeps its own rows.

        Raises:
            ConfigError: If the names differ.
            MetricError: If the rows have another shape.
        """
        if self.name != other.name:
            raise ConfigError(
                f"Cannot merge the rows of {other.name!r} into {self.name!r}. Make both by the "
                f"same name: load_metric({self.name!r})."
            )
        if other._row_shape is not None:
            self._check_row_shape(other._row_shape, "the metric to merge")
        self._fold()
        other._fold()
        self.num_rows += other.num_rows
        self.num_batches += other.num_batches
        for rows in tuple(other._rows):  # a copy, for other may be self
            self._absorb(rows, other._counts)

    def _score(self) -> Scores:
        self._fold()
        formula, rows = _FORMULAS[self.name], np.concatenate(self._rows)
        predictions, references = (np.ascontiguousarray(side) for side in np.split(rows, 2, axis=1))
        if self._row_shape == ():
            predictions, references = predictions[:, 0], references[:, 0]
        if not formula.continuous and (references == -100).any():
            raise MetricError(
                f"{self.name} got references of -100, which mark entries to leave out. Drop them: "
                f"predictions[references != -100], references[references != -100]."
            )
        weights = None if formula.continuous else self._counts
        return formula.compute(_Rows(predictions, references, weights))


def load_metric(name: str, config: str | None = None) -> Accumulator:
    """Loads a metric by name, without network where it is built in.

    Built in: accuracy, f1, precision, recall, matthews_correlation, pearson, spearman, mse, mae and
    the configurations of GLUE. f1, precision and recall score class 1 of {0, 1}; with an average
    they score more classes or labels, and the key says so: "f1/macro" (micro, weighted, samples)
    gives {"f1_macro": ...}. Keys and values are those of the hub's scripts, except that continuous
    rows are not rounded to float32 first. Any other name goes to `evaluate.load`.

    Args:
        name: Such as "accuracy", or "glue/mrpc" for ("glue", "mrpc").
        config: The configuration or the average.

    Returns:
        A `Metric`, or the module that `evaluate.load(name, config)` gives, which has its methods.

    Raises:
        ConfigError: If the name is not a string.
        MetricError: If it is neither built in nor to be had.

    Example:
        >>> metric = load_metric("glue", "mrpc")
        >>> metric.add_batch(predictions=[0, 1], references=[0, 1])
        >>> metric.add_batch(predictions=[1, 1], references=[0, 1])
        >>> metric.compute()
        {'accuracy': 0.75, 'f1': 0.8}
        >>> load_metric("f1/macro").compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 2])
        {'f1_macro': 1.0}
    """
    if not isinstance(name, str):
        raise ConfigError(
            f"load_metric takes a name, got {type(name).__name__}. Give other kinds of "
            f"metrics as they are: evaluate_loop(model, loader, metric)."
        )
    key = name if config is None else f"{name}/{config}"
    key = _ALIASES.get(key, key)
    if key in _FORMULAS:
        return Metric(key)
    # A typo must not wait for a network, nor must a GLUE configuration that does not exist. 0.86
    # lets the hub's "mape" and "mase" pass, 0.857 from "mae". A local script may have any name.
    if (key.split("/")[0] == "glue" or _similar(key, 0.86)) and not os.path.exists(name):
        raise _unknown(key, "offline or unknown")
    try:
        import evaluate
    except ImportError as error:
        raise _unknown(key, "needs `pip install manualloop[metrics]`") from error
    try:
        module: Accumulator = evaluate.load(name, config)
    except OSError as error:  # both not found and no connection
        raise _unknown(key, "offline or unknown") from error
    except Exception as error:  # the script is another's: it may raise anything
        raise _unknown(key, f"{type(error).__name__}: {error}") from error
    return module


def _similar(key: str, cutoff: float) -> list[str]:
    return difflib.get_close_matches(key, [*_FORMULAS, *_ALIASES], n=1, cutoff=cutoff)


def _unknown(key: str, reason: str) -> MetricError:
    names = ", ".join(name for name in _FORMULAS if not name.endswith(_AVERAGES))
    suggestion = "".join(f" Did you mean {name!r}?" for name in _similar(key, 0.6))
    return MetricError(
        f"Cannot fetch metric {key!r} ({reason}). Built in: {names}; {', '.join(_AVERAGED)} also "
        f"with /{', /'.join(_AVERAGES)}.{suggestion}"
    )


# Metrics of others --------------------------------------------------------------------------------


def as_metric(metric: Any) -> Accumulator:
    """Makes an accumulator of anything that is taken as a metric; it starts without rows.

    Args:
        metric: A name, as for `load_metric`; a `Metric`; an `evaluate` module (has `add_batch` and
            `compute`); a torchmetrics `Metric` or `MetricCollection` (has `update`, `compute`,
            `reset`), which gets tensors on its own device; a function `fn(predictions, references)`
            of all rows at once, as numpy arrays in the order added, which returns a number or a
            mapping of numbers; or a list or tuple of these, whose results are merged.

    Returns:
        The accumulator. Its scores are Python floats. A lone number is named by the function, or by
        the class in snake case; what `evaluate` and torchmetrics nest is flattened ("PER_f1",
        "multiclass_accuracy_0"). Functions keep all rows in memory.

    Raises:
        ConfigError: If `metric` is none of these.
        MetricError: From its methods: lengths differ, no rows, a result that is not a number, the
            same key from two metrics.

    Example:
        >>> def errors(predictions, references):
        ...     return (predictions != references).sum()
        >>> metric = as_metric(["accuracy", errors])
        >>> metric.add_batch(predictions=[0, 1], references=[0, 0])
        >>> metric.compute()
        {'accuracy': 0.5, 'errors': 1.0}
    """
    if isinstance(metric, str):
        metric = load_metric(metric)
    if isinstance(metric, Accumulator):
        metric.reset()
        return metric
    if isinstance(metric, type):
        name = metric.__name__
        raise ConfigError(f"Got the class {name} as metric, not an object. Use {name}(...).")
    if hasattr(metric, "add_batch") and hasattr(metric, "compute"):
        return _Evaluate(metric)
    if all(hasattr(metric, method) for method in ("update", "compute", "reset")):
        return _Torchmetrics(metric)
    if callable(metric):
        return _Function(metric)
    if isinstance(metric, (list, tuple)) and metric:
        return _Several([as_metric(one) for one in metric])
    raise ConfigError(
        f"Got {metric!r} ({type(metric).__name__}) as metric. Give a name, an evaluate module, a "
        f"torchmetrics Metric, fn(predictions, references), or a list of these: 'accuracy'."
    )


class _Evaluate(Accumulator):
    """A module of `evaluate`, or several under `evaluate.combine`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._members = getattr(module, "evaluation_modules", [module])
        super().__init__(str(getattr(module, "name", type(module).__name__)))

    def _clear(self) -> None:
        # evaluate cannot reset: to compute is its only public way to let go of rows.
        for module in self._members:
            if hasattr(module, "__len__") and len(module) > 0:
                try:
                    module.compute()
                except Exception:  # rows of an aborted evaluation need not be fit to be scored
                    continue

    def _add(self, predictions: Any, references: Any) -> None:
        batch = {"predictions": predictions, "references": references}
        for role, values in batch.items():
            # Texts, dicts and lists are the module's affair, but where it declares integers it
            # would cut 0.9 to 0 in silence.
            if any(_declares_integers(module, role) for module in self._members):
                _check_dtype(self.name, role, _to_array(values), self.num_batches, continuous=False)
            if hasattr(values, "detach"):
                batch[role] = _to_array(values)
        self._module.add_batch(**batch)

    def _score(self) -> Scores:
        return _as_floats(self.name, self._module.compute(), nested=True)


def _declares_integers(module: Any, role: str) -> bool:
    features = getattr(module, "features", None)
    dtype = getattr(features.get(role), "dtype", "") if isinstance(features, Mapping) else ""
    return str(dtype).startswith(("int", "uint"))


class _Torchmetrics(Accumulator):
    """A torchmetrics `Metric` or `MetricCollection`."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        # A collection has no device of its own, its members have.
        modules = metric.modules() if hasattr(metric, "modules") else [metric]
        self._device = next((one.device for one in modules if hasattr(one, "device")), None)
        words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
        super().__init__(re.sub(words, "_", type(metric).__name__).lower())

    def _clear(self) -> None:
        self._metric.reset()

    def _add(self, predictions: Any, references: Any) -> None:
        self._metric.update(self._to_tensor(predictions), self._to_tensor(references))

    def _to_tensor(self, values: Any) -> Any:
        import torch

        try:
            return torch.as_tensor(values, device=self._device)
        except (TypeError, ValueError):  # texts stay what they are
            return values

    def _score(self) -> Scores:
        return _as_floats(self.name, self._metric.compute(), nested=True)


class _Function(Accumulator):
    """A function of all rows."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self._function = function
        named = getattr(function, "func", function)  # functools.partial has no name of its own
        super().__init__(getattr(named, "__name__", type(named).__name__))

    def _clear(self) -> None:
        self._batches: list[tuple[Array, Array]] = []

    def _add(self, predictions: Any, references: Any) -> None:
        # Copies: a caller may fill the same buffer again.
        self._batches.append((np.array(_to_array(predictions)), np.array(_to_array(references))))

    def _score(self) -> Scores:
        try:
            sides = [np.concatenate(side) for side in zip(*self._batches, strict=True)]
        except ValueError as error:
            raise MetricError(
                f"{self.name} gets all rows at once, but batches differ in width ({error}). Pad "
                f"them to one width or flatten them: predictions[references != -100]."
            ) from error
        return _as_floats(self.name, self._function(*sides), nested=False)


class _Several(Accumulator):
    """Metrics that all get the same rows."""

    def __init__(self, metrics: Sequence[Accumulator]) -> None:
        self._metrics = metrics
        super().__init__(" + ".join(metric.name for metric in metrics))

    def _clear(self) -> None:
        for metric in self._metrics:
            metric.reset()

    def _add(self, predictions: Any, references: Any) -> None:
        for metric in self._metrics:
            metric.add_batch(predictions=predictions, references=references)

    def _score(self) -> Scores:
        merged: Scores = {}
        for metric in self._metrics:
            scores = metric.compute()
            for key in merged.keys() & scores.keys():
                raise MetricError(
                    f"Key {key!r} comes from {metric.name} and from a metric before it. Leave one "
                    f"out, or rename it: lambda p, r: {{'other_{key}': ...}}."
                )
            merged.update(scores)
        return merged


def _as_floats(name: str, result: Any, *, nested: bool) -> Scores:
    """Makes Python floats of a number or a mapping; nested ones and 1-D lists are flattened."""
    floats: Scores = {}
    for key, value in (result if isinstance(result, Mapping) else {name: result}).items():
        if hasattr(value, "tolist"):  # numpy or torch
            value = value.tolist()
        if nested and isinstance(value, list) and all(isinstance(v, Real) for v in value):
            value = dict(enumerate(value))
        if nested and isinstance(value, Mapping):
            flat = {f"{key}_{inner}": value[inner] for inner in value}
            floats.update(_as_floats(name, flat, nested=True))
        elif isinstance(value, Real):
            floats[str(key)] = float(value)
        else:
            raise MetricError(
                f"{name} gave {type(value).__name__} for {key!r}, not a number. Return a number, "
                f"or a mapping of numbers: return {{{name!r}: 0.5}}."
            )
    return floats
