"""Modules of ``evaluate``: each is given what its features declare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from manualloop.errors import ConfigError, ManualLoopError, MetricError
from manualloop.evaluation.forms import (
    Takes,
    count_rows,
    require_kind,
    require_rows,
    to_array,
    to_scores,
)
from manualloop.libraries import options_of_module
from manualloop.types import Scores


def load_module(name: str, config: str | None, options: Mapping[str, Any]) -> Any:
    """Load a module of ``evaluate``; with options it is one that computes with them.

    Raises:
        ConfigError: It does not take an option.
        Exception: It cannot be loaded; a script may raise anything.
    """
    import evaluate

    module = evaluate.load(name, config)
    return Module(module, options) if options else module


class Module:
    """A module of ``evaluate``, or several under ``evaluate.combine``, as a metric.

    Args:
        module: The module; it starts without rows.
        options: Arguments of its ``compute`` by name.

    Raises:
        ConfigError: It does not take an option, or modules that are combined take different things.
    """

    def __init__(self, module: Any, options: Mapping[str, Any] | None = None) -> None:
        self.name = str(getattr(module, "name", type(module).__name__))
        self.names: Sequence[str] | None = None
        self._module, self._options = module, dict(options or {})
        self._members = getattr(module, "evaluation_modules", [module])
        self._num_rows = self._num_batches = 0
        self._require_options()
        found = {given_to(member) for member in self._members}
        if len(found) > 1:
            raise ConfigError(
                f"The modules that evaluate.combine joined take different things: "
                f"{', '.join(sorted(found))}. Pass them as a list: "
                "[evaluate.load(...), evaluate.load(...)]."
            )
        self.takes: Takes = found.pop()
        for member in self._members:
            # It has no reset: compute() is the only public way to drop the rows of an aborted
            # evaluation, and they may not be fit to be scored.
            if hasattr(member, "__len__") and len(member) > 0:
                with suppress(Exception):
                    member.compute()

    def _require_options(self) -> None:
        for member in self._members:
            accepted = options_of_module(member)
            unknown = [] if accepted is None else [o for o in self._options if o not in accepted]
            if unknown and accepted is not None:
                raise ConfigError(
                    f"The metric {self.name!r} does not take {', '.join(unknown)}: its compute "
                    f"takes {', '.join(accepted) or 'no options'}."
                )

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add the rows of one batch."""
        num_rows = count_rows(self.name, predictions, references, self._num_batches)
        batch = {"predictions": predictions, "references": references}
        for role, values in batch.items():
            # The module checks texts, dicts and lists itself, but where it declares integers it
            # would silently truncate 0.9 to 0.
            if any(_declares_integers(member, role) for member in self._members):
                require_kind(self.name, role, to_array(values), self._num_batches)
        if num_rows:
            for member in self._members:
                try:
                    member.add_batch(**self._columns(member, batch))
                except ManualLoopError:
                    raise
                except (TypeError, ValueError) as error:
                    raise MetricError(
                        f"{self.name} does not take the rows of batch {self._num_batches}: {error}"
                    ) from error
        self._num_rows += num_rows
        self._num_batches += 1

    def _columns(self, member: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns of a batch in the form that a module declares."""
        columns, formats = dict(batch), _formats(member)
        if not formats:
            return {name: _plain(values) for name, values in columns.items()}
        name = _predicted(formats[0])
        if self.takes == "scores" and not _is_nested(formats[0][name]):
            is_first = self._options.get("pos_label", 1) == 0
            columns["predictions"] = _of_one_class(self.name, columns["predictions"], 1 - is_first)
        columns[name] = columns.pop("predictions")
        for column, values in columns.items():
            features = [of_format[column] for of_format in formats if column in of_format]
            columns[column] = self._as_declared(features, _plain(values))
        return columns

    def _as_declared(self, features: list[Any], values: Any) -> Any:
        if not isinstance(values, list) or not features:
            return values
        if all(_is_nested(feature) for feature in features):
            # A lone right text, where the module wants all of them.
            values = [[row] if isinstance(row, str) else row for row in values]
        if self.names is not None and all(_dtype(feature) == "string" for feature in features):
            values = [_named(row, self.names) for row in values]
        return values

    def compute(self, *, predictions: Any = None, references: Any = None) -> Scores:
        """Score all rows added and those given as arguments, then forget them."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        require_rows(self.name, self._num_rows, self._num_batches)
        self._num_rows = self._num_batches = 0
        return to_scores(self.name, self._module.compute(**self._options), self.names)


def module_of(metric: Any) -> Module | None:
    """Return a scorer of a module, of its ``compute``, or of a ``partial`` of that; else None."""
    options: Mapping[str, Any] = {}
    if isinstance(metric, partial):
        metric, options = metric.func, metric.keywords
    if getattr(metric, "__name__", None) == "compute" and hasattr(metric, "__self__"):
        metric = metric.__self__
    elif options:
        return None
    if hasattr(metric, "add_batch") and hasattr(metric, "compute"):
        return Module(metric, options)
    return None


def given_to(module: Any) -> Takes:
    """Return what a module scores, by the features that it declares."""
    kinds: set[Takes] = set()
    for of_format in _formats(module):
        name = _predicted(of_format)
        feature = of_format[name]
        is_number = _dtype(feature).startswith(("int", "uint", "float", "bool"))
        if is_number and "score" in name:
            kinds.add("scores")
        elif not is_number or (_is_nested(feature) and not _dtype(feature).startswith("float")):
            kinds.add("rows")
        else:
            kinds.add("values" if _dtype(feature).startswith("float") else "classes")
    order: tuple[Takes, ...] = ("rows", "scores", "values", "classes")
    return next((kind for kind in order if kind in kinds), "classes")


def _formats(module: Any) -> list[Mapping[str, Any]]:
    """Return the forms of columns that a module takes; none where it declares nothing."""
    features = getattr(module, "features", None)
    found = features if isinstance(features, list) else [features]
    return [one for one in found if isinstance(one, Mapping) and one]


def _predicted(columns: Mapping[str, Any]) -> str:
    """Return the name of the column of predictions."""
    others = (name for name in columns if name != "references")
    return "predictions" if "predictions" in columns else next(others, "predictions")


def _is_nested(feature: Any) -> bool:
    return hasattr(feature, "feature") or isinstance(feature, list)


def _dtype(feature: Any) -> str:
    """Return the type of the innermost values: "" for rows with names."""
    while _is_nested(feature):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return "" if isinstance(feature, Mapping) else str(getattr(feature, "dtype", ""))


def _declares_integers(module: Any, role: str) -> bool:
    features = [of_format.get(role) for of_format in _formats(module)]
    return any(
        feature is not None
        and not _is_nested(feature)
        and _dtype(feature).startswith(("int", "ui"))
        for feature in features
    )


def _plain(values: Any) -> Any:
    """Return an array for a tensor or an array; lists keep their entries, without arrays."""
    if hasattr(values, "detach"):
        return to_array(values)
    if isinstance(values, list):
        return [row.tolist() if hasattr(row, "tolist") else row for row in values]
    return values


def _named(row: Any, names: Sequence[str]) -> Any:
    """Return the names of a row of class numbers; texts stay as they are."""
    if isinstance(row, list):
        return [_named(entry, names) for entry in row]
    is_number = isinstance(row, int) and not isinstance(row, bool)
    return names[row] if is_number and 0 <= row < len(names) else row


def _of_one_class(name: str, scores: Any, number: int) -> Any:
    scores = to_array(scores)
    if scores.ndim == 2 and scores.shape[1] == 2:
        return scores[:, number]
    if scores.ndim == 1:
        return scores
    raise MetricError(
        f"{name} scores the probability of one class of two, and got probabilities of shape "
        f"{scores.shape}. Take its configuration for more classes, such as "
        f'evaluate.load("{name}", "multiclass"), or the built-in metric of the name.'
    )
