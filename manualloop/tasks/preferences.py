"""Losses of pairs, a better and a worse answer to the same prompt: DPO and reward models.

Their batches are ``(pairs, 2, tokens)``, as those of ``preference_pairs``: ``[:, 0]`` is the
better one. Their items are pairs, which they declare, so that windows are planned by them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from manualloop.batches import model_inputs
from manualloop.errors import ConfigError, DataError, ModelError
from manualloop.models import (
    evaluation_mode,
    forward_columns,
    is_sharded,
    model_name,
    unwrap_model,
)
from manualloop.tasks.frozen import adapters_off, frozen_pass, has_adapters
from manualloop.tasks.heads import row_logps
from manualloop.tasks.references import check_sums

KINDS = ("sigmoid", "ipo", "hinge")
REFERENCE = "reference"
"""Column of the reference's log-probabilities; see ``reference_logps``."""


@dataclass(frozen=True)
class DPO:
    """The loss that ``dpo`` returns.

    Attributes:
        beta: Weight of the reference.
        reference: The model that the trained one is compared with; None for the column, or for the
            model without its adapters.
        kind: How margins become losses.
        reads: Kept columns that it reads, by which a resumed run is compared.
        compares_rows: Whether the loss of a row depends on the rows beside it.
    """

    beta: float
    reference: nn.Module | None
    kind: str
    reads: ClassVar[tuple[str, ...]] = (REFERENCE,)
    compares_rows: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """Return the mean over the pairs of a batch, and their number."""
        rows = rows_of_pairs(batch)
        against = self._reference(model, batch, rows)  # first: the outputs are those of the model
        logps, counts, outputs = row_logps(model, rows)
        ratios = logps.view(-1, 2) - against.to(logps).view(-1, 2)
        if self.kind == "ipo":
            ratios = ratios / counts.view(-1, 2).clamp(min=1)
        apart = (ratios[:, 0] - ratios[:, 1]) * (1 if self.kind == "ipo" else self.beta)
        _note_margins(outputs, apart)
        return self._of_margins(apart).mean(), len(apart)

    def _of_margins(self, apart: Tensor) -> Tensor:
        if self.kind == "ipo":
            return (apart - 1 / (2 * self.beta)) ** 2
        return torch.relu(1 - apart) if self.kind == "hinge" else -logsigmoid(apart)

    def _reference(self, model: nn.Module, batch: Any, rows: Mapping[str, Any]) -> Tensor:
        column = batch.get(REFERENCE)
        if self.reference is not None:
            if column is not None:
                raise ConfigError(
                    f"The batch has a column {REFERENCE!r}, and dpo() was given a model as "
                    f"reference=. Leave one out: dataset.remove_columns({REFERENCE!r})."
                )
            with frozen_pass(self.reference, model, batch, REFERENCE) as frozen:
                return row_logps(frozen, rows).sums
        if column is not None:
            return _reference_logps_of(column)
        if not has_adapters(model):
            raise ConfigError(
                f"dpo() has no reference, {model_name(model)} has no adapters to switch off, and "
                f"the batch has no column {REFERENCE!r} (it has {', '.join(map(str, batch))}). "
                "Pass the model from before as dpo(reference=...), or compute the column once: "
                f'rows.add_column("{REFERENCE}", reference_logps(model, rows)), with '
                f'prepare_dataloaders(..., keep=("{REFERENCE}",)).'
            )
        with adapters_off(model) as base:
            return row_logps(base, rows).sums

    def check_start(self, model: nn.Module, batch: Any) -> None:
        """Refuse adapters that change the model already, where a run begins.

        The model without them is then not the one that the training begins with.

        Raises:
            ModelError: The message has the lines for each of the two.
        """
        is_given = self.reference is not None or batch.get(REFERENCE) is not None
        if is_given or not has_adapters(model) or is_sharded(model):
            return
        rows = rows_of_pairs(batch)
        with adapters_off(model) as base:
            without = row_logps(base, rows).sums
        inner = unwrap_model(model, adapters=False)
        with evaluation_mode(inner, rows["input_ids"].device):
            found = row_logps(inner, rows)
        apart, dtype = (found.sums - without).abs(), next(inner.parameters()).dtype
        if torch.is_autocast_enabled(rows["input_ids"].device.type):
            dtype = torch.bfloat16
        rounding = 1e-4 if torch.finfo(dtype).eps < 1e-6 else 3e-2
        if bool(apart.max() <= rounding * without.abs().max().clamp(min=1)):
            return
        row = int(apart.argmax())
        raise ModelError(
            f"The adapters of {model_name(model)} change the model before the first update: an "
            f"answer of the first batch has the log-probability {float(found.sums[row]):.3f} with "
            f"them and {float(without[row]):.3f} without. dpo() would compare with the model "
            "without adapters, and not with the one that the training begins with. To compare with "
            "that one: import copy; dpo(reference=copy.deepcopy(model)); or keep the column of "
            "reference_logps(model, rows), which takes no second model. To compare with the model "
            "without adapters, compute that column without them: with model.disable_adapter(): "
            "column = reference_logps(model, rows)."
        )

    def items(self, batch: Any) -> int:
        """Count the pairs of a batch as the loader gave it.

        Raises:
            DataError: The column ``reference`` was computed of other tokens.
        """
        number = len(rows_of_pairs(batch)["input_ids"]) // 2
        if self.reference is None and (column := batch.get(REFERENCE)) is not None:
            check_sums(column, batch)
        return number


def dpo(beta: float = 0.1, *, reference: nn.Module | None = None, kind: str = "sigmoid") -> DPO:
    """Return the loss of direct preference optimization (Rafailov et al. 2023).

    With the log-probabilities of both answers, each the sum over its labelled tokens, under the
    model and under a reference, the margin of a pair is ``beta * ((better - its reference) - (worse
    - its reference))``. The loss is the mean over the pairs of ``-log sigmoid(margin)``, or by
    ``kind``: ``"hinge"``, ``max(0, 1 - margin)`` (Zhao et al. 2023); ``"ipo"`` (Azar et al. 2023),
    the square of the margin of means over tokens, without beta, less ``1 / (2 * beta)``.

    The outputs of the model have ``margins``, one for each pair: ``evaluate_loop(model, loader,
    preferred, loss_fn=dpo(...), decode=margins)`` scores them.

    Args:
        beta: Weight of the reference.
        reference: The model from before the training. It runs in evaluation mode, without
            gradients, and is not trained and not saved. None takes the column ``reference`` of the
            batch, as ``reference_logps`` computes it once; without one, the model itself with its
            adapters of PEFT switched off. A run that begins with adapters that were trained before
            is refused then: without them, the model is another one than it begins with.
        kind: ``"sigmoid"``, ``"hinge"`` or ``"ipo"``.

    Raises:
        ConfigError: An argument cannot be meant.

    ::

        train_loop(model, loaders["train"], loss_fn=dpo(beta=0.1, reference=reference))
    """
    if not isinstance(beta, int | float) or not beta > 0:
        raise ConfigError(f"beta must be a number above 0, got {beta!r}.")
    if kind not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    if reference is not None and not isinstance(reference, nn.Module):
        raise ConfigError(
            f"reference is a {type(reference).__name__}, not a model. For log-probabilities that "
            f'were computed before, leave it out and keep them in a column "{REFERENCE}".'
        )
    return DPO(float(beta), reference, kind)


def reward(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Return the loss of a reward model, ``-log sigmoid(better - worse)``, and the number of pairs.

    The outputs of the model have ``margins``, as with ``dpo``.

    Args:
        model: A sequence classifier with one output: ``num_labels=1``.
        batch: A batch of pairs, ``(pairs, 2, tokens)``; its labels are not used.

    Raises:
        DataError: The batch is not one of pairs.
        ModelError: The model has other outputs.

    ::

        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
        train_loop(model, loaders["train"], loss_fn=reward)
    """
    rows = rows_of_pairs(batch)
    inputs = {name: column for name, column in rows.items() if name != "labels"}
    options = {"use_cache": False} if "use_cache" in forward_columns(model) else {}
    outputs = model(**inputs, **options)
    scores = getattr(outputs, "logits", outputs)
    pairs = len(inputs["input_ids"]) // 2
    if not isinstance(scores, Tensor) or scores.numel() != 2 * pairs:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ModelError(
            f"reward needs one score a row, and {model_name(model)} returned {shape} for "
            f"{2 * pairs} rows. Load it with one output: AutoModelForSequenceClassification."
            "from_pretrained(name, num_labels=1)."
        )
    scores = scores.view(pairs, 2)
    apart = (scores[:, 0] - scores[:, 1]).to(torch.promote_types(scores.dtype, torch.float32))
    _note_margins(outputs, apart)
    return -logsigmoid(apart).mean(), pairs


def _pairs(batch: Any) -> int:
    return len(rows_of_pairs(batch)["input_ids"]) // 2


reward.items = _pairs  # type: ignore[attr-defined]
reward.compares_rows = False  # type: ignore[attr-defined]


def margins(outputs: Any, batch: Any) -> list[float]:
    """Return by how much the better answer of each pair is ahead: a ``decode`` for pairs.

    Args:
        outputs: Outputs of a model under ``dpo`` or ``reward``.
        batch: The batch.

    Raises:
        ModelError: The loss was another one.
    """
    found = outputs.get("margins") if isinstance(outputs, Mapping) else None
    if found is None:
        raise ModelError(
            "margins are those of a loss of pairs, and the outputs have none. Evaluate with it: "
            "evaluate_loop(model, loader, preferred, decode=margins, loss_fn=reward)."
        )
    listed: list[float] = found.tolist()
    return listed


def preferred(predictions: Sequence[float], references: Any = None) -> dict[str, float]:
    """Return the share of pairs whose better answer is ahead, and the mean margin: a metric.

    Args:
        predictions: The margins of the pairs.
        references: Not used.

    >>> preferred([2.0, -1.0, 0.5, 0.0])
    {'accuracy': 0.5, 'margin': 0.375}
    """
    number = max(len(predictions), 1)
    return {
        "accuracy": sum(margin > 0 for margin in predictions) / number,
        "margin": sum(predictions) / number,
    }


def rows_of_pairs(batch: Any) -> dict[str, Any]:
    """Return the columns of a batch of pairs that a model takes, as ``(2 * pairs, tokens)``.

    Raises:
        DataError: The batch is not one of pairs.
    """
    columns = model_inputs(batch) if isinstance(batch, Mapping) else {}
    ids = columns.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 3 or ids.shape[1] != 2:
        found = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else "missing"
        raise DataError(
            f"A loss of pairs takes input_ids of shape (pairs, 2, tokens), and they are {found}. "
            "Make pairs of prompt, chosen and rejected: prepare_dataloaders(..., preprocess="
            "manualloop.tasks.preference_pairs(tokenizer))."
        )
    return {
        name: column.flatten(0, 1)
        for name, column in columns.items()
        if isinstance(column, Tensor) and column.shape[:2] == ids.shape[:2] and column.ndim > 2
    }


def _reference_logps_of(column: Any) -> Tensor:
    """Return the log-probabilities of a column, ``(pairs, 2)``, without their check sums."""
    values = column if isinstance(column, Tensor) else torch.tensor(column, dtype=torch.float64)
    if values.ndim != 2 or values.shape[1] not in (2, 3):
        raise DataError(
            f"The column {REFERENCE!r} has the shape {tuple(values.shape)}, not (pairs, 2): the "
            "log-probabilities of the better and of the worse answer. reference_logps(model, rows) "
            "computes it."
        )
    return values[:, :2]


def _note_margins(outputs: Any, apart: Tensor) -> None:
    if isinstance(outputs, MutableMapping):
        outputs["margins"] = apart.detach()
