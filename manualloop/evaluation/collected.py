"""Built-in metrics that score whole rows at the end, or the loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from manualloop.errors import MetricError
from manualloop.evaluation.detection import mean_average_precision
from manualloop.evaluation.forms import (
    Takes,
    count_rows,
    explaining,
    require_options,
    require_rows,
    to_array,
    to_scores,
)
from manualloop.evaluation.probabilities import average_precision, log_loss, roc_auc
from manualloop.evaluation.spans import seqeval
from manualloop.evaluation.texts import bleu, chrf, exact_match, rouge
from manualloop.tasks.answers import squad, squad_v2
from manualloop.types import Scores


class _Kind(NamedTuple):
    function: Callable[..., Mapping[str, float]]
    takes: Takes = "rows"
    example: tuple[list[Any], list[Any]] | None = None  # a row that tries the options
    has_fixed_keys: bool = True


_TEXT = (["a cat"], ["a cat"])
_NO_BOXES: dict[str, list[Any]] = {"boxes": [], "labels": [], "scores": []}
COLLECTED: dict[str, _Kind] = {
    "average_precision": _Kind(average_precision, "scores"),
    "bleu": _Kind(bleu, example=_TEXT),
    "chrf": _Kind(chrf, example=_TEXT),
    "exact_match": _Kind(exact_match, example=_TEXT),
    "log_loss": _Kind(log_loss, "scores"),
    "map": _Kind(mean_average_precision, example=([_NO_BOXES], [_NO_BOXES])),
    "roc_auc": _Kind(roc_auc, "scores"),
    "rouge": _Kind(rouge, example=_TEXT),
    "seqeval": _Kind(seqeval, example=([["O"]], [["O"]]), has_fixed_keys=False),
    "squad": _Kind(squad, example=_TEXT),
    "squad_v2": _Kind(squad_v2, example=_TEXT, has_fixed_keys=False),
}


class Collected:
    """A built-in metric that keeps all rows and scores them at once, made by ``load_metric``.

    Args:
        name: Key of ``COLLECTED``.
        options: Arguments of its function by name.

    Raises:
        ConfigError: The function does not take an option.
        MetricError: A library is missing, or refuses the value of an option.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.options, self._kind = name, dict(options), COLLECTED[name]
        self.names: Sequence[str] | None = None  # of the classes, where the options hold none
        self.takes: Takes = self._kind.takes
        accepted = list(inspect.signature(self._kind.function).parameters)[2:]
        require_options(name, options, accepted)
        self._takes_names = "names" in accepted
        self.reset()
        if self._kind.example is not None:
            self._score(*self._kind.example)

    @property
    def has_fixed_keys(self) -> bool:
        """Whether its keys are the same for any rows."""
        is_by_class = self.options.get("class_metrics") or self.options.get("average", "") is None
        return self._kind.has_fixed_keys and not is_by_class

    def fresh(self, names: Sequence[str] | None = None) -> Collected:
        """Return such a metric without rows, with names of the classes if it has none."""
        given = self._takes_names and names is not None and self.options.get("names") is None
        return Collected(self.name, self.options | ({"names": names} if given else {}))

    def reset(self) -> None:
        """Forget all rows."""
        self._num_rows = self._num_batches = 0
        self._batches: list[tuple[Any, Any]] = []

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Add the rows of one batch.

        Args:
            predictions: One entry per row; for a metric of probabilities ``(rows, classes)``.
            references: The right entry of each row.

        Raises:
            MetricError: Their numbers differ.
        """
        num_rows = count_rows(self.name, predictions, references, self._num_batches)
        if num_rows:
            self._batches.append((_owned(predictions), _owned(references)))
        self._num_rows += num_rows
        self._num_batches += 1

    def compute(self, *, predictions: Any = None, references: Any = None) -> Scores:
        """Score all rows added and those given as arguments, then forget them.

        Args:
            predictions: Last rows to add, as for ``add_batch``; None adds none.
            references: Their references.

        Raises:
            MetricError: There are no rows, or they cannot be scored.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        require_rows(self.name, self._num_rows, self._num_batches)
        batches = self._batches
        self.reset()
        sides = list(zip(*batches, strict=True))
        if self.takes == "scores":
            return self._score(*(np.concatenate([*map(to_array, side)]) for side in sides))
        return self._score(*([row for batch in side for row in batch] for side in sides))

    def _score(self, predictions: Any, references: Any) -> Scores:
        options = dict(self.options)
        if self._takes_names and options.get("names") is None:
            options["names"] = self.names
        with explaining(self.name):
            return to_scores(self.name, self._kind.function(predictions, references, **options))


def _owned(rows: Any) -> Any:
    """Return the rows as an array or list that no caller changes."""
    if hasattr(rows, "detach") or isinstance(rows, np.ndarray):
        return np.array(to_array(rows))
    return list(rows)


class Perplexity:
    """The exponential of the loss, which is the mean over all items; made by ``load_metric``."""

    name = "perplexity"
    takes: Takes = "loss"
    has_fixed_keys = True

    def fresh(self, names: Sequence[str] | None = None) -> Perplexity:
        """Return the metric, which keeps nothing."""
        return self

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Refuse rows.

        Raises:
            MetricError: Always.
        """
        raise MetricError(
            "perplexity is the exponential of the loss, and takes no predictions. Write "
            'evaluate_loop(model, loader, "perplexity"), or compute(loss=...).'
        )

    def compute(self, *, loss: float | None = None) -> Scores:
        """Return the perplexity of a mean loss.

        Args:
            loss: Mean loss over all items.

        Raises:
            MetricError: There is no loss.
        """
        if loss is None:
            raise MetricError(
                "perplexity is the exponential of the loss, and there is none. Give the batches "
                'labels, or pass a loss_fn: evaluate_loop(model, loader, "perplexity").'
            )
        try:
            return Scores(perplexity=math.exp(loss))
        except OverflowError:
            return Scores(perplexity=math.inf)
