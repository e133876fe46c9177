"""The built-in metrics: offline, and exact however the rows are batched.

``load_metric`` returns an object with the interface of an ``evaluate`` module. scikit-learn, SciPy
and the libraries of the extra ``metrics`` compute the scores; ``Metric`` counts classes and keeps
numbers, ``Collected`` keeps whole rows.

Sources: the GLUE configurations, keys and formulae are those of the ``glue`` script of
https://github.com/huggingface/evaluate; the tasks are Wang et al., "GLUE: A Multi-Task Benchmark
and Analysis Platform for Natural Language Understanding", ICLR 2019 (arXiv:1804.07461).
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from manualloop.arguments import check_arguments
from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.collected import COLLECTED, Collected, Perplexity
from manualloop.evaluation.forms import (
    Array,
    Takes,
    count_rows,
    explaining,
    require_kind,
    require_options,
    require_rows,
    show,
    to_array,
    to_scores,
)
from manualloop.evaluation.modules import Module, load_module
from manualloop.evaluation.reports import (
    Counted,
    class_name,
    classes_of,
    classification_report,
    confusion_matrix,
    require_apart,
)
from manualloop.evaluation.segmentation import IGNORED, mean_iou, pixels_of
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.types import Scores

if TYPE_CHECKING:
    from evaluate import EvaluationModule


def _sklearn(function: str, rows: Counted, **options: Any) -> Any:
    from sklearn import metrics

    score = getattr(metrics, function)
    return score(rows.references, rows.predictions, sample_weight=rows.weights, **options)


def _matthews(rows: Counted) -> Any:
    with warnings.catch_warnings():
        # With a single label scikit-learn warns about the shape of an internal matrix.
        warnings.filterwarnings("ignore", message="A single label", category=UserWarning)
        return _sklearn("matthews_corrcoef", rows)


def _averaged(name: str, default: str, rows: Counted, **options: Any) -> Any:
    """Return f1, precision or recall; 0 / 0 is 0.0, scikit-learn's default without its warning."""
    names = options.pop("names", None)
    options = {"average": default, "zero_division": 0, **options}
    if default == "none":
        labels = options.setdefault("labels", classes_of(rows, names))
        scores = _sklearn(f"{name}_score", rows, **options | {"average": None})
        keys = [f"{name}_{class_name(label, names)}" for label in labels]
        require_apart(keys)
        return dict(zip(keys, scores.tolist(), strict=True))
    if default == "binary":
        labels = np.union1d(rows.predictions, rows.references)
        if not np.isin(labels, (0, 1)).all():
            raise MetricError(
                f"{name} scores the classes 0 and 1, but the rows hold the classes {show(labels)}."
                f' For more classes choose an average: "{name}/macro" (or micro, weighted).'
            )
    return _sklearn(f"{name}_score", rows, **options)


def _correlation(function: str, rows: Counted) -> float:
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


def _error(function: str, rows: Counted, **options: Any) -> Any:
    """Return mse or mae; nan if a row is not finite, which scikit-learn refuses."""
    finite = np.isfinite(rows.predictions).all() and np.isfinite(rows.references).all()
    return _sklearn(function, rows, **options) if finite else float("nan")


_AVERAGED = ("f1", "precision", "recall")
_AVERAGES = ("none", "macro", "micro", "weighted", "samples")
_PAIRS = [(name, average) for name in _AVERAGED for average in _AVERAGES]
_FORMULAS: dict[str, Callable[..., Any]] = {  # by the key of the score
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
_REPORTS: dict[str, Callable[..., Scores]] = {
    "classification_report": classification_report,
    "confusion_matrix": confusion_matrix,
    "mean_iou": mean_iou,
}
_KEYS |= dict.fromkeys(_REPORTS, ())
_SEVERAL_LABELS = (
    *("accuracy", "classification_report", "mse", "mae"),
    *(f"{name}/{average}" for name, average in _PAIRS),
)
# scikit-learn takes pos_label and labels in any case, and leaves one of them out of account.
_OF_POSITIVE = ("names", "pos_label", "zero_division")
_OF_AVERAGED = ("labels", "names", "zero_division")
_OPTIONS: dict[str, tuple[str, ...]] = {  # by the name of the metric
    "accuracy": ("normalize",),
    **dict.fromkeys(_AVERAGED, _OF_POSITIVE),
    **dict.fromkeys((f"{name}/{average}" for name, average in _PAIRS), _OF_AVERAGED),
    **dict.fromkeys(("mse", "mae"), ("multioutput",)),
    "classification_report": ("names", "zero_division"),
    "confusion_matrix": ("names", "normalize"),
    "mean_iou": ("ignore_index", "names"),
}


def keys_of(name: str) -> tuple[str, ...]:
    """Return the keys of the scores of a built-in metric; none where they depend on the rows.

    >>> keys_of("glue/mrpc")
    ('accuracy', 'f1')
    """
    return _KEYS.get(name, ())


# Number of rows that wait until they are counted. Sorting 4096 rows takes 0.2 ms; sorting each
# batch of 8 would take longer than the rest of ``add_batch``.
_FOLD_AT = 4096


class Metric:
    """A built-in metric, made by ``load_metric``.

    Metrics of classes keep each distinct (prediction, reference) row once, with its count. Their
    memory does not grow with the data (beyond 4096 rows that wait to be counted), and scores are
    exact however rows are batched. Continuous metrics (pearson, spearman, mse, mae, glue/stsb) keep
    all rows as float64, which takes 16 bytes for one prediction and one reference.

    Attributes:
        name: Name of the metric, with its average.
        options: Arguments of its function by name.
        names: Names of the classes, where the options hold none.
        ignored: Labels of pixels that do not count, where the options name none.
        takes: What it scores: class numbers, real numbers, or a class map a row.
        counts: Whether rows are counted at once, so that their order does not matter.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        self.name, self.options = name, dict(options or {})
        self.names: Sequence[str] | None = None  # of the classes, where the options hold none
        self.ignored: Sequence[int] = IGNORED
        if self.options:
            require_options(name, self.options, _OPTIONS.get(name, ()))
        self._continuous = name not in _REPORTS and _KEYS[name][0] in _CONTINUOUS
        self.takes: Takes = "values" if self._continuous else "classes"
        if name == "mean_iou":
            self.takes = "maps"
        self.counts = not self._continuous
        self.reset()

    @property
    def has_fixed_keys(self) -> bool:
        """Whether its keys are the same for any rows."""
        is_by_class = self.name == "classification_report" or self.name.endswith("/none")
        return not is_by_class or self.options.get("names") is not None

    @property
    def left_out(self) -> list[int]:
        """The labels of pixels that do not count; torch's never does."""
        chosen = self.options.get("ignore_index", self.ignored)
        return [*np.atleast_1d(chosen).tolist(), IGNORE_INDEX]

    def fresh(self, names: Sequence[str] | None = None) -> Metric:
        """Return such a metric without rows, with names of the classes if it has none."""
        takes_names = names is not None and "names" in _OPTIONS.get(self.name, ())
        given = {"names": names} if takes_names and self.options.get("names") is None else {}
        return Metric(self.name, self.options | given)

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
            if self.name == "mean_iou":
                predictions, references = pixels_of(
                    predictions, references, self._num_batches, self.left_out
                )
            sides = to_array(predictions), to_array(references)
            kinds = "biuf" if self._continuous else "biu"
            require_kind(self.name, "predictions", sides[0], self._num_batches, kinds)
            require_kind(self.name, "references", sides[1], self._num_batches, kinds)
            self._rows.append(self._to_rows(*sides))
            self._num_rows += num_rows
            self._num_waiting += len(self._rows[-1])
            # Not before there are as many as distinct ones, so that the cost per row does not grow.
            if self._num_waiting >= max(_FOLD_AT, len(self._rows[0])):
                self._fold()
        self._num_batches += 1

    def _to_rows(self, predictions: Array, references: Array) -> Array:
        """Return the rows as a new array, because a caller may reuse its buffer."""
        where = f"in batch {self._num_batches}"
        wanted, shape = {1: "one value", 2: "several labels"}, predictions.shape
        if self.name.endswith("/samples"):
            del wanted[1]
        elif self.name not in _SEVERAL_LABELS:
            del wanted[2]
        if shape != references.shape or len(shape) not in wanted or shape[1:] in ((0,), (1,)):
            advice = "One column: predictions.squeeze(-1); tokens: predictions[references != -100]"
            if shape == references.shape and len(shape) == 2 and shape[1] > 1 and 2 not in wanted:
                advice = f"For several labels a row: {_for_several(self.name)}"
            raise MetricError(
                f"{self.name} got predictions of shape {shape} and references of shape "
                f"{references.shape} {where}, but scores {' or '.join(wanted.values())} a row. "
                f"{advice}."
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
        if not self._continuous and len(rows):
            rows = _pairs_counted(rows) if rows.shape[1] == 3 else rows
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
        if (self.name, self.options) != (other.name, other.options):
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

    def compute(self, *, predictions: Any = None, references: Any = None) -> Scores:
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
        rows = Counted(predictions, references, None if self._continuous else table[:, -1])
        options = {name: value for name, value in self.options.items() if name != "ignore_index"}
        if "names" in _OPTIONS.get(self.name, ()) and options.get("names") is None:
            options["names"] = self.names
        with explaining(self.name):
            if self.name in _REPORTS:
                return _REPORTS[self.name](rows, **options)
            found: dict[str, Any] = {}
            for key in _KEYS[self.name]:
                score = _FORMULAS[key](rows, **options)
                found |= score if isinstance(score, dict) else {key: score}
            return to_scores(self.name, found)

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
                f"{show(labels)}. Score one class a row: predictions.ravel(), references.ravel()."
            )


BuiltIn: TypeAlias = Metric | Collected | Perplexity


def _for_several(name: str) -> str:
    """Return the metrics that score several labels a row, in the place of one that does not."""
    if name in _AVERAGED:
        return f'"{name}/macro" (or micro, weighted, samples, none)'
    return '"f1/macro" (or micro, weighted, samples, none), "accuracy" or "classification_report"'


def _pairs_counted(rows: Array) -> Array:
    """Count equal pairs of small class numbers, which takes a tenth of the time of sorting them."""
    pairs = rows[:, :2]
    width = int(pairs.max()) + 1
    if pairs.min() < 0 or width * width > 4 * len(rows):
        return rows
    places = pairs[:, 0] * width + pairs[:, 1]
    counts = np.bincount(places, rows[:, 2], width * width).astype(np.int64)
    found = np.flatnonzero(counts)
    return np.column_stack([found // width, found % width, counts[found]])


def load_metric(
    name: str, config: str | None = None, **options: Any
) -> BuiltIn | Module | EvaluationModule:
    """Load a metric by name, without network where it is built in.

    Built in, by what they score (those marked * need ``pip install "manualloop[metrics]"``):

    - classes: accuracy, f1, precision, recall, matthews_correlation, classification_report,
      confusion_matrix, and the configurations of GLUE. f1, precision and recall score class 1 of
      {0, 1}; with an average they score more classes or labels, and the key tells which:
      ``"f1/macro"`` (micro, weighted, samples) gives ``{"f1_macro": ...}``, ``"f1/none"`` a key for
      each class.
    - numbers: pearson, spearman, mse, mae.
    - probabilities: roc_auc, average_precision, log_loss.
    - tags of tokens: seqeval*.
    - texts: exact_match, squad, squad_v2, rouge*, bleu*, chrf*.
    - class maps of images: mean_iou. Boxes: map*.
    - the loss: perplexity.

    Keys and values are those of the hub's scripts or of the libraries, except that continuous rows
    are not rounded to float32 first. Any other name is passed to ``evaluate.load``.

    Args:
        name: Name of the metric, such as ``"accuracy"``, or ``"glue/mrpc"`` for
            ``("glue", "mrpc")``.
        config: Configuration or average.
        options: Arguments of the function that computes the scores: ``average="macro"``,
            ``use_stemmer=True``, ``mode="strict"``; ``names`` of the classes, if the model has
            none. For a metric of the hub they are passed to its ``compute``.

    Returns:
        A built-in metric, or the module of ``evaluate.load(name, config)``. All have
        ``add_batch(predictions=, references=)`` and ``compute(predictions=, references=)``.

    Raises:
        ConfigError: The metric does not take an option.
        MetricError: The metric is not built in and cannot be loaded, or a library is missing.

    >>> metric = load_metric("glue", "mrpc")
    >>> metric.add_batch(predictions=[0, 1], references=[0, 1])
    >>> metric.add_batch(predictions=[1, 1], references=[0, 1])
    >>> metric.compute()
    {'accuracy': 0.75, 'f1': 0.8}
    >>> load_metric("f1/macro").compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 2])
    {'f1_macro': 1.0}
    >>> metric = load_metric("f1", average=None, names=["no", "yes"])
    >>> metric.compute(predictions=[0, 1], references=[0, 1])
    {'f1_no': 1.0, 'f1_yes': 1.0}
    """
    check_arguments(name=name, config=config)
    key = name if config is None else f"{name}/{config}"
    if key in _AVERAGED and "average" in options:
        average = options.pop("average")
        if average != "binary":
            key = f"{key}/{'none' if average is None else average}"
    if key in _KEYS:
        return Metric(key, options)
    if key in COLLECTED:
        return Collected(key, options)
    if key == Perplexity.name:
        require_options(key, options, ())
        return Perplexity()
    # A typo, or a GLUE configuration that does not exist, must not wait for a network. The cutoff
    # lets the hub's "mape" and "mase" pass, which are 0.857 from "mae". A local script may have
    # any name.
    is_typo = key.split("/")[0] == "glue" or difflib.get_close_matches(key, _BUILT_IN, cutoff=0.86)
    if is_typo and not os.path.exists(name):
        raise _unknown(key, "offline or unknown")
    try:
        return load_module(name, config, options)
    except ConfigError:  # about an option
        raise
    except OSError as error:  # both not found and no connection
        raise _unknown(key, "offline or unknown") from error
    except Exception as error:  # a script of the hub may raise anything
        raise _unknown(key, f"{type(error).__name__}: {error}") from error


_BUILT_IN = (*_KEYS, *COLLECTED, Perplexity.name)


def _unknown(key: str, reason: str) -> MetricError:
    names = ", ".join(name for name in _BUILT_IN if not name.endswith(_AVERAGES))
    similar = difflib.get_close_matches(key, _BUILT_IN, n=1)
    suggestion = f" Did you mean {similar[0]!r}?" if similar else ""
    return MetricError(
        f"Cannot fetch metric {key!r} ({reason}). Built in: {names}; {', '.join(_AVERAGED)} also "
        f"with /{', /'.join(_AVERAGES)}.{suggestion}"
    )
