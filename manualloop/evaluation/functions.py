"""Functions of predictions and references: each is called as its parameters' names tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from manualloop.errors import ConfigError, MetricError
from manualloop.evaluation.forms import Array, Rows, Takes, explaining, to_array, to_scores
from manualloop.evaluation.parameters import (
    PREDICTIONS,
    PROBABILITIES,
    REFERENCES,
    asks_for_more,
    parameters_of,
    role_of,
)
from manualloop.evaluation.reports import class_name, require_apart
from manualloop.evaluation.torch_metrics import as_tensor, in_single, is_of_classes, taken_in
from manualloop.libraries import parts_of_scorer
from manualloop.notices import say
from manualloop.randomness import random_states_kept
from manualloop.types import Scores

_OF_PROBABILITIES = {"log_loss", "d2_log_loss_score"}  # scikit-learn's, whose y_pred are such
_SYMMETRIC = {"cohen_kappa_score"}  # scikit-learn's, which does not tell its sides apart
_OF_VALUES = (
    *("_error", "_deviance", "r2_score", "pinball_loss", "variance_score", "tweedie_score"),
    *("_error_score", "pinball_score"),
)
# Of functions of scikit-learn that return several numbers.
_RETURNED = {
    "precision_recall_fscore_support": ("precision", "recall", "fscore", "support"),
    "class_likelihood_ratios": ("positive_likelihood_ratio", "negative_likelihood_ratio"),
    "homogeneity_completeness_v_measure": ("homogeneity", "completeness", "v_measure"),
}
# Parts of the names of losses of torch that are made of logits or of their logarithms.
_OF_LOGITS = ("crossentropy", "bce", "nll", "kldiv", "marginloss", "hinge")


class _Call(NamedTuple):
    """How a function is called."""

    function: Callable[..., Any]
    takes: Takes
    sides: tuple[str, str] | None  # parameters for predictions and references; None by position
    name: str
    sign: int = 1
    is_sklearns: bool = False
    takes_tensors: bool = False
    is_guess: bool = False  # the parameters' names tell no order


class Function:
    """A function of all rows, as a metric.

    Args:
        function: ``function(predictions, references)``, in the other order where the parameters'
            names tell so; a function of scikit-learn, a ``partial`` of one, or what its
            ``make_scorer`` returns; one of torch or of torchmetrics, which gets tensors. A
            parameter ``kept`` gets the columns that skipped the model.

    Raises:
        ConfigError: It does not take two arguments, or nothing tells which is which.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._call = _call_of(function)
        self.name, self.takes = self._call.name, self._call.takes
        self.names: Sequence[str] | None = None
        self._batches: list[tuple[Any, Any]] = []
        self._kept: dict[str, list[Any]] = {}
        self.takes_kept = self.takes in ("rows", "scores") and accepts_kept(self._call.function)
        self.by_unit: Any = getattr(function, "by_unit", None)

    def require_predictions(self) -> None:
        """Refuse a function whose first parameter is named after what it does not get.

        Raises:
            ConfigError: It asks for logits or probabilities, and gets the predictions of the task.
        """
        names = [*parameters_of(self._call.function)][:2]
        asked = [name for name in names if asks_for_more(name)]
        wrong = [name for name in asked if role_of(name) != "references"]
        if asked and wrong == asked:  # pred_scores and true_scores are values
            right = wrong[0].replace("y_", "").replace("_", " ")
            raise ConfigError(
                f"{self.name} has a parameter {wrong[0]!r}, and gets class numbers there. Name it "
                "predictions if that is what it scores; name it y_score to get probabilities, of "
                f"two classes those of the second; for the {right} themselves pass "
                "decode=lambda outputs, batch: "
                'list((outputs if hasattr(outputs, "dtype") else outputs["logits"]).float().cpu()).'
            )

    def add_batch(
        self, *, predictions: Any, references: Any, kept: Mapping[str, Any] | None = None
    ) -> None:
        """Add the rows of one batch."""
        # Copies, because a caller may reuse its buffer.
        self._batches.append((_copy(predictions), _copy(references)))
        for name, values in (kept or {}).items():
            self._kept.setdefault(name, []).extend(values)

    def compute(self) -> Scores:
        """Return the scores of all rows, and forget the rows."""
        batches, self._batches = self._batches, []
        kept, self._kept = self._kept, {}
        options: dict[str, Any] = {"kept": kept} if self.takes_kept else {}
        predictions, references = (self._join(side) for side in zip(*batches, strict=True))
        names, labels = self.names, self._labels(predictions, references)
        if self.takes == "scores":
            predictions = self._probabilities(predictions, references, options)
        if labels is not None:  # the rows of its matrix, too
            names = [class_name(label, names) for label in labels]
        is_known = self._call.is_sklearns or self._call.takes_tensors
        with explaining(self.name) if is_known else nullcontext():
            sides: tuple[Any, Any] = (predictions, references)
            if self._call.takes_tensors:
                predicted = in_single(predictions) if self.takes == "scores" else predictions
                sides = as_tensor(predicted), as_tensor(references)
            if self._call.sides is None:
                result = self._call.function(*sides, **options)
            else:
                by_name = dict(zip(self._call.sides, sides, strict=True))
                result = self._call.function(**by_name, **options)
            result = result if self._call.sign > 0 else -result
        if self._call.is_guess:
            _tell_order(self._call, sides, options, result)
        returned = _RETURNED.get(self.name) if self._call.is_sklearns else None
        if returned is not None:
            pairs = zip(returned, result, strict=True)  # there is no support of an average
            parts = {key: self._by_class(key, part, names) for key, part in pairs}
            result = _flat({key: part for key, part in parts.items() if part is not None})
        elif labels is not None:
            result = self._by_class(self.name, result, names)
        return to_scores(self.name, result, names)

    def _labels(self, predictions: Array, references: Array) -> Any:
        """Return the classes that scikit-learn has an entry for, in its order; None for values.

        It leaves out those that do not occur, so their place is not their number.
        """
        if not self._call.is_sklearns or self.takes not in ("classes", "scores"):
            return None
        if (bound := _bound(self._call.function).get("labels")) is not None:
            return bound
        if self.takes == "scores":
            return np.arange(predictions.shape[1] if predictions.ndim == 2 else 1)
        if references.ndim == 2:
            return np.arange(references.shape[1])
        return np.union1d(predictions, references)

    def _by_class(self, key: str, result: Any, names: Sequence[str] | None) -> Any:
        """Put the names of the classes to a result that has an entry for each."""
        if not isinstance(result, np.ndarray) or result.ndim in (0, 2) or names is None:
            return result
        if len(names) != len(result) or _bound(self._call.function).get("samplewise"):
            return result
        require_apart(names)
        return {f"{key}_{name}": entry for name, entry in zip(names, result, strict=True)}

    def _probabilities(self, scores: Array, references: Array, options: dict[str, Any]) -> Array:
        """Return what a function of probabilities gets: of two classes that of the second."""
        num_classes = scores.shape[1] if scores.ndim == 2 else 1
        if references.ndim > 1 or num_classes == 1:
            return scores
        parameters, bound = parameters_of(self._call.function), _bound(self._call.function)
        is_free = "labels" in parameters and "labels" not in bound
        is_whole = num_classes > 2 or (self._call.is_sklearns and "y_pred" in parameters)
        if self._call.takes_tensors:  # torchmetrics', which take those of all, unless for two
            is_whole = self.name.startswith("multiclass_") or bound.get("task") == "multiclass"
        if self._call.is_sklearns and is_free and is_whole:
            options["labels"] = np.arange(num_classes)  # some may not occur
        return scores if is_whole else scores[:, 0 if bound.get("pos_label", 1) == 0 else 1]

    def _join(self, batches: Sequence[Any]) -> Any:
        if isinstance(batches[0], Rows):
            return list(chain.from_iterable(batches))
        try:
            return batches[0] if len(batches) == 1 else np.concatenate(batches)
        except ValueError as error:
            raise MetricError(
                f"{self.name} gets all rows at once, but batches differ in width ({error}). Pad "
                "them to one width, or flatten them: predictions[references != -100]."
            ) from error


_COMPARED: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How often a function was called in both orders: on a first batch, and in a first evaluation."""


def _tell_order(call: _Call, sides: tuple[Any, Any], options: Any, result: Any) -> None:
    """Report that a function whose parameters are called anything gives another score by order."""
    function, name = call.function, call.name
    try:
        if (times := _COMPARED.get(function, 0)) == 2:
            return
        _COMPARED[function] = times + 1
        if not inspect.isroutine(function):
            function = deepcopy(function)  # an object may collect what it gets
        with random_states_kept(devices=False):
            other, again = function(*sides[::-1], **options), function(*sides, **options)
        found = [to_scores(name, one) for one in (result, again, other)]
        keys = [key for key in found[0] if all(isinstance(one.get(key), float) for one in found)]
        values = np.array([[one[key] for key in keys] for one in found])
        is_other = ~np.isclose(values[0], values[2], rtol=1e-6, equal_nan=True)
        is_random = not np.allclose(values[0], values[1], rtol=1e-6, equal_nan=True)
    except Exception:  # of the user's function, which takes one order alone
        return
    if is_random or not is_other.any():
        return
    _COMPARED[call.function] = 2
    first, second = list(parameters_of(function))[:2]
    key = int(np.flatnonzero(is_other)[0])
    say(
        f"{name} gets predictions as {first} and references as {second}, and gives another score "
        f"the other way round ({values[0][key]:.4g}, {values[2][key]:.4g}). Name its parameters "
        "predictions and references in the order that you mean."
    )


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of mappings, and what is none, in one mapping."""
    flat: dict[str, Any] = {}
    for key, part in parts.items():
        flat |= part if isinstance(part, Mapping) else {key: part}
    return flat


def accepts_kept(function: Callable[..., Any]) -> bool:
    """Tell whether a function has a parameter for the columns that skip the model."""
    return "kept" in parameters_of(function)


def _copy(values: Any) -> Any:
    return Rows(values) if isinstance(values, Rows) else np.array(to_array(values))


def _call_of(function: Callable[..., Any]) -> _Call:
    """Tell how a function is called, by where it comes from and how its parameters are named."""
    sign = 1
    method = "predict"
    if (parts := parts_of_scorer(function)) is not None:
        inner, sign, options, method = parts
        function = partial(inner, **options)
    named = function.func if isinstance(function, partial) else function
    name = getattr(named, "__name__", type(named).__name__)
    name = "metric" if name == "<lambda>" else name if sign > 0 else f"neg_{name}"
    parameters = list(parameters_of(function))
    library = str(getattr(named, "__module__", "")).split(".")
    is_sklearns = library[0] == "sklearn"
    if library[0] in ("torch", "torchmetrics"):
        return _call_of_torch(function, name, library, parameters)
    if not parameters and not is_sklearns:
        return _Call(function, "rows", None, name)
    wanted, predicted, scored = (
        next((parameter for parameter in parameters if parameter in group), None)
        for group in (REFERENCES, PREDICTIONS, PROBABILITIES)
    )
    if is_sklearns:
        side = scored or predicted
        if named.__name__ in _SYMMETRIC:
            return _Call(function, "classes", None, name, sign, True)
        if wanted is None or side is None:
            raise ConfigError(
                f"scikit-learn's {named.__name__} takes {', '.join(parameters[:2])}, which are no "
                "predictions and references. Wrap it: lambda predictions, references: ..."
            )
        takes: Takes = "values" if name.endswith(_OF_VALUES) else "classes"
        if scored or method != "predict" or named.__name__ in _OF_PROBABILITIES:
            takes = "scores"
        return _Call(function, takes, (side, wanted), name, sign, True)
    by_names = _by_names(function, name, parameters[:2])
    named_first = parameters[:1] == ["p"] or any(map(role_of, parameters[:2]))
    return _Call(function, *by_names, name, sign, is_guess=len(parameters) > 1 and not named_first)


def _call_of_torch(
    function: Callable[..., Any], name: str, library: Sequence[str], parameters: Sequence[str]
) -> _Call:
    """Tell how a function of torch or of torchmetrics.functional is called: with tensors."""
    takes: Takes = "values"
    plain = name.replace("_", "").lower()
    if library[0] == "torch" and any(part in plain for part in _OF_LOGITS):
        raise ConfigError(
            f"torch's {name} scores logits, and a metric gets predictions. Leave it out: "
            "evaluate_loop returns the loss of the model, of loss_fn or of terms without a metric."
        )
    if library[0] == "torchmetrics":
        options = _bound(function)
        is_plain = options.get("threshold", 0.5) == 0.5 and (options.get("top_k") or 1) == 1
        takes = taken_in("".join(library[2:3]))
        if takes == "classes" and not (is_plain and is_of_classes(name)):
            takes = "scores"
    wanted, predicted = (
        next((parameter for parameter in parameters[:2] if parameter in group), None)
        for group in (REFERENCES, PREDICTIONS)
    )
    sides = None if wanted is None or predicted is None else (predicted, wanted)
    return _Call(function, takes, sides, name, takes_tensors=True)


def _by_names(
    function: Callable[..., Any], name: str, first_two: list[str]
) -> tuple[Takes, tuple[str, str] | None]:
    """Tell what the user's own function takes, and by which parameters."""
    try:
        inspect.signature(function).bind(
            None, None, **({"kept": None} if accepts_kept(function) else {})
        )
    except TypeError as error:
        raise ConfigError(
            f"{name} cannot be called with two arguments ({error}). Write it as "
            f"def {name}(predictions, references)."
        ) from error
    roles = [role_of(parameter) for parameter in first_two]
    takes: Takes = "scores" if "scores" in roles else "rows"
    if len(roles) < 2 or (None not in roles and roles[0] == roles[1]):
        return takes, None
    if roles[0] == "references" and roles[1] is not None:
        return takes, (first_two[1], first_two[0])
    if roles[0] == "references" or (roles[0] is None and roles[1] not in (None, "references")):
        raise ConfigError(
            f"{name} takes {' and '.join(first_two)}, and a metric gets predictions first, then "
            "references: the names tell that one of them would be taken for the other. Rename "
            f"them: def {name}(predictions, references)."
        )
    return takes, None


def _bound(function: Callable[..., Any]) -> Mapping[str, Any]:
    return function.keywords if isinstance(function, partial) else {}
