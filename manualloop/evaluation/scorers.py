"""Scorers: anything that is accepted as a metric, behind the interface of ``evaluate_loop``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.inputs import (
    Array,
    count_rows,
    require_kind,
    require_rows,
    to_array,
)
from manualloop.evaluation.metrics import Metric, load_metric
from manualloop.internals import computing_alone
from manualloop.strategy.base import Strategy, on_main

Takes: TypeAlias = Literal["classes", "values", "rows", "scores"]
"""What a scorer gets, whatever the shapes of a batch are.

``"classes"``: flat class numbers of all labels that are not ignored; multi-label ``(rows,
classes)``. ``"values"``: real numbers in the same form. ``"rows"``: one entry a row, in the order
of the dataset. ``"scores"``: probabilities ``(rows, classes)`` beside flat class numbers.
"""


class Rows(list[Any]):
    """One entry a row, of any kind, which a function gets as a list and not as an array."""


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

    def compute(self) -> dict[str, float]:
        """Return the scores of all rows by name, and forget the rows."""
        ...


def as_metric(metric: Any) -> Scorer:
    """Make a scorer from a metric of any accepted kind; it starts without rows.

    Args:
        metric: A name, as for ``load_metric``; a ``Metric``; an ``evaluate`` module (has
            ``add_batch`` and ``compute``); a torchmetrics ``Metric`` or ``MetricCollection`` (has
            ``update``, ``compute``, ``reset``), which gets tensors on its own device; a function
            ``fn(predictions, references)`` of all rows at once, as NumPy arrays, which returns a
            number or a mapping of numbers; or a list or tuple of these, whose results are merged.

    Returns:
        The scorer. A single number is named after the function ("metric" for a lambda), or after
        the class in snake case; nested results of ``evaluate`` and torchmetrics are flattened
        (``"PER_f1"``,
        ``"multiclass_accuracy_0"``). For a function all rows are kept in memory.

    Raises:
        ConfigError: ``metric`` is none of these.
        MetricError: Raised by its methods: lengths differ, there are no rows, a result is not a
            number, or two metrics have the same key.

    >>> def errors(predictions, references):
    ...     return (predictions != references).sum()
    >>> scorer = as_metric(["accuracy", errors])
    >>> scorer.add_batch(predictions=[0, 1], references=[0, 0])
    >>> scorer.compute()
    {'accuracy': 0.5, 'errors': 1.0}
    """
    if isinstance(metric, str):
        metric = load_metric(metric)
    if isinstance(metric, type):
        name = metric.__name__
        raise ConfigError(f"Got the class {name} as metric, not an object. Use {name}(...).")
    if isinstance(metric, Metric):
        metric.reset()
        return metric
    if hasattr(metric, "add_batch") and hasattr(metric, "compute"):
        return _Checked([_Evaluate(metric)])
    if all(hasattr(metric, method) for method in ("update", "compute", "reset")):
        return _Checked([_Torchmetrics(metric)])
    if callable(metric):
        return _Checked([_Function(metric)])
    if isinstance(metric, (list, tuple)) and metric:
        return _Checked([as_metric(one) for one in metric])
    raise ConfigError(
        f"Got {metric!r} ({type(metric).__name__}) as metric. Pass a name, an evaluate module, a "
        "torchmetrics Metric, fn(predictions, references), or a list of these: 'accuracy'."
    )


class Gathered:
    """A scorer that sees the rows of all ranks as if one process had read them in dataset order.

    Where a metric only counts classes, each rank counts its own rows and the counts are added up;
    any other metric gets the rows themselves, on rank 0.

    Args:
        scorer: Scorer of all rows.
        strategy: Strategy whose ranks take part.
        rows: The dataset's row numbers in the order in which rows are added, int64; None if they
            are added in the dataset's order.
    """

    def __init__(
        self, scorer: Scorer, strategy: Strategy, rows: NDArray[np.int64] | None = None
    ) -> None:
        self._scorer, self._strategy, self._rows = scorer, strategy, rows
        self._counts = counts_classes(scorer)
        self._batches: list[tuple[Any, Any, Any]] = []

    def add_batch(self, predictions: Any, references: Any, kept: Tensor | None) -> None:
        """Add the rows of a batch of this rank.

        Args:
            predictions: Predictions of the batch.
            references: References of the batch, the same number.
            kept: Which of the rows' predictions these are, bool ``(rows, ...)``; None for all.
        """
        if self._counts:
            self._scorer.add_batch(predictions=predictions, references=references)
        else:
            # A copy: the labels of a worker's batch keep its file open.
            if kept is None and isinstance(references, Tensor):
                references = references.clone()
            self._batches.append((predictions, references, kept))

    def compute(self) -> dict[str, float]:
        """Return the scores of all rows, the same on every rank. Call it on every rank."""
        own = self._scorer if self._counts else self._batches
        self._batches = []
        found = self._strategy.gather(own)
        if self._counts and isinstance(self._scorer, Metric) and not self._strategy.is_main:
            self._scorer.reset()
        return on_main(self._strategy, lambda: self._compute(found))

    def _compute(self, found: list[Any]) -> dict[str, float]:
        if isinstance(self._scorer, Metric) and self._counts:
            for other in found[1:]:
                self._scorer.merge(other)
            return self._scorer.compute()
        # Batch k is on rank k % world_size, so one from each rank in turn is the loader's order.
        rounds = zip_longest(*found)
        batches = [batch for of_ranks in rounds for batch in of_ranks if batch is not None]
        if self._rows is not None:
            batches = [_in_order(batches, self._rows)]
        for predictions, references, _ in batches:
            self._scorer.add_batch(predictions=predictions, references=references)
        return self._scorer.compute()


def counts_classes(scorer: Scorer) -> bool:
    """Tell whether a scorer only counts classes, so that the order of the rows does not matter."""
    return isinstance(scorer, Metric) and scorer.takes == "classes"


def _in_order(
    batches: list[tuple[Tensor, Tensor, Tensor | None]], rows: NDArray[np.int64]
) -> tuple[Tensor, Tensor, None]:
    """Return the predictions and references of all batches in the order of their rows."""
    numbers = [
        len(predictions) * [1] if kept is None else kept.reshape(len(kept), -1).sum(1).tolist()
        for predictions, _, kept in batches
    ]
    order = np.argsort(np.repeat(rows, np.concatenate(numbers)), kind="stable")
    predictions = torch.cat([predictions for predictions, _, _ in batches])[order]
    references = torch.cat([references for _, references, _ in batches])[order]
    return predictions, references, None


class _Checked:
    """Scorers that get the same rows, checked to be as many on both sides and at least one."""

    def __init__(self, scorers: list[Scorer]) -> None:
        self.name = " + ".join(scorer.name for scorer in scorers)
        self.scorers = scorers
        self._num_rows = self._num_batches = 0

    @property
    def takes(self) -> Takes:
        return self.scorers[0].takes

    @property
    def takes_kept(self) -> bool:
        return any(getattr(scorer, "takes_kept", False) for scorer in self.scorers)

    def add_batch(self, *, predictions: Any, references: Any, **more: Any) -> None:
        num_rows = count_rows(self.name, predictions, references, self._num_batches)
        for scorer in self.scorers if num_rows else ():
            scorer.add_batch(predictions=predictions, references=references, **more)
        self._num_rows += num_rows
        self._num_batches += 1

    def compute(self) -> dict[str, float]:
        require_rows(self.name, self._num_rows, self._num_batches)
        self._num_rows = self._num_batches = 0
        return compute_all(self.scorers)


def parts_of(scorer: Scorer) -> list[Scorer]:
    """Return the scorers that one is made of, each of which takes something of its own."""
    if isinstance(scorer, _Checked) and len(scorer.scorers) > 1:
        return [part for one in scorer.scorers for part in parts_of(one)]
    return [scorer]


def compute_all(scorers: Iterable[Scorer]) -> dict[str, float]:
    """Return the scores of several scorers as one mapping.

    Raises:
        MetricError: Two of them have the same key.
    """
    merged: dict[str, float] = {}
    for scorer in scorers:
        scores = scorer.compute()
        for key in merged.keys() & scores.keys():
            raise MetricError(
                f"Key {key!r} comes from {scorer.name} and from an earlier metric. Leave one "
                f"out, or rename it: lambda p, r: {{'other_{key}': ...}}."
            )
        merged.update(scores)
    return merged


class _Evaluate:
    """A module of ``evaluate``, or several under ``evaluate.combine``."""

    takes: Takes = "classes"

    def __init__(self, module: Any) -> None:
        self.name = str(getattr(module, "name", type(module).__name__))
        self._module = module
        self._members = getattr(module, "evaluation_modules", [module])
        self._num_batches = 0
        for member in self._members:
            # It has no reset: compute() is the only public way to drop the rows of an aborted
            # evaluation, and they may not be fit to be scored.
            if hasattr(member, "__len__") and len(member) > 0:
                with suppress(Exception):
                    member.compute()

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        batch = {"predictions": predictions, "references": references}
        for role, values in batch.items():
            # The module checks texts, dicts and lists itself, but where it declares integers it
            # would silently truncate 0.9 to 0.
            if any(_declares_integers(member, role) for member in self._members):
                require_kind(self.name, role, to_array(values), self._num_batches)
            if hasattr(values, "detach"):
                batch[role] = to_array(values)
        self._module.add_batch(**batch)
        self._num_batches += 1

    def compute(self) -> dict[str, float]:
        self._num_batches = 0
        return _to_floats(self.name, self._module.compute(), flatten=True)


def _declares_integers(module: Any, role: str) -> bool:
    features = getattr(module, "features", None)
    dtype = getattr(features.get(role), "dtype", "") if isinstance(features, Mapping) else ""
    return str(dtype).startswith(("int", "uint"))


class _Torchmetrics:
    """A torchmetrics ``Metric`` or ``MetricCollection``."""

    takes: Takes = "classes"

    def __init__(self, metric: Any) -> None:
        words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
        self.name = re.sub(words, "_", type(metric).__name__).lower()
        self._metric = metric
        # A collection has no device of its own, its members have.
        modules = list(metric.modules()) if hasattr(metric, "modules") else [metric]
        self._device = next((one.device for one in modules if hasattr(one, "device")), None)
        # It would gather rows from the other ranks, which are already on this rank only.
        self._syncing = [one for one in modules if hasattr(one, "sync")]
        metric.reset()

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        self._metric.update(self._to_tensor(predictions), self._to_tensor(references))

    def _to_tensor(self, values: Any) -> Any:
        try:
            return torch.as_tensor(values, device=self._device)
        except (TypeError, ValueError):  # texts are not converted
            return values

    def compute(self) -> dict[str, float]:
        with computing_alone(self._syncing):
            result = self._metric.compute()
        self._metric.reset()
        return _to_floats(self.name, result, flatten=True)


class _Function:
    """A function of all rows."""

    takes: Takes = "rows"

    def __init__(self, function: Callable[[Array, Array], Any]) -> None:
        named = getattr(function, "func", function)  # functools.partial has no name of its own
        name = getattr(named, "__name__", type(named).__name__)
        self.name = "metric" if name == "<lambda>" else name
        self._function = function
        self._batches: list[tuple[Any, Any]] = []
        self._kept: dict[str, list[Any]] = {}
        self.takes_kept = _has_parameter(function, "kept")

    def add_batch(
        self, *, predictions: Any, references: Any, kept: Mapping[str, Any] | None = None
    ) -> None:
        # Copies, because a caller may reuse its buffer.
        self._batches.append((_copy(predictions), _copy(references)))
        for name, values in (kept or {}).items():
            self._kept.setdefault(name, []).extend(values)

    def compute(self) -> dict[str, float]:
        batches, self._batches = self._batches, []
        kept, self._kept = self._kept, {}
        more = {"kept": kept} if self.takes_kept else {}
        sides = [self._join(side) for side in zip(*batches, strict=True)]
        return _to_floats(self.name, self._function(*sides, **more), flatten=False)

    def _join(self, batches: Sequence[Any]) -> Any:
        if isinstance(batches[0], Rows):
            return list(chain.from_iterable(batches))
        try:
            return np.concatenate(batches)
        except ValueError as error:
            raise MetricError(
                f"{self.name} gets all rows at once, but batches differ in width ({error}). Pad "
                "them to one width, or flatten them: predictions[references != -100]."
            ) from error


def _copy(values: Any) -> Any:
    return Rows(values) if isinstance(values, Rows) else np.array(to_array(values))


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function that is not written in Python
        return False


def _to_floats(name: str, result: Any, *, flatten: bool) -> dict[str, float]:
    """Return a number or a mapping of numbers as floats by key."""
    floats: dict[str, float] = {}
    for key, value in (result if isinstance(result, Mapping) else {name: result}).items():
        value = value.tolist() if hasattr(value, "tolist") else value  # numpy or torch
        if flatten and isinstance(value, (list, Mapping)):
            items = enumerate(value) if isinstance(value, list) else value.items()
            inner = {f"{key}_{inner_key}": inner_value for inner_key, inner_value in items}
            floats.update(_to_floats(name, inner, flatten=True))
        elif isinstance(value, Real):
            floats[str(key)] = float(value)
        else:
            raise MetricError(
                f"{name} gave {type(value).__name__} for {key!r}, not a number. Return a number, "
                f"or a mapping of numbers: return {{{name!r}: 0.5}}."
            )
    return floats
