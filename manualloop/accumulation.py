"""A proof on the user's own model and batch: any split of it into micro-batches is one update."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.batches import rebuild
from manualloop.errors import DataError
from manualloop.models import (
    batch_statistics,
    evaluation_mode,
    is_sharded,
    model_name,
    unwrap_model,
)
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.select import strategy_for
from manualloop.strategy.single import SingleDevice
from manualloop.tasks.isolation import rows_or_documents
from manualloop.tasks.loss import check_loss
from manualloop.types import LossFn, Terms, Update
from manualloop.update import accumulate_gradients


@dataclass(frozen=True, slots=True)
class AccumulationReport:
    """The difference between the update of a whole batch and that of its rows one by one.

    Printing it gives the result in words.

    Attributes:
        model: Name of the model's class.
        num_rows: Number of rows of the batch, and so of pieces.
        num_items: Number of items that the loss is a mean over.
        loss_difference: Difference of the losses, relative to the largest loss of a row.
        gradient_difference: Largest difference of a gradient, relative to the largest gradient of
            a row alone.
        unweighted_difference: The same for the usual mean of the pieces' means.
        tolerance: Largest difference that counts as rounding, given the gradients' dtype.
        statistics: Name of the first layer that is training with statistics over the batch; None if
            there is none.
    """

    model: str
    num_rows: int
    num_items: float
    loss_difference: float
    gradient_difference: float
    unweighted_difference: float
    tolerance: float
    statistics: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether both differences are rounding, and no layer has statistics over the batch."""
        difference = max(self.loss_difference, self.gradient_difference)
        return difference <= self.tolerance and self.statistics is None

    def __str__(self) -> str:
        if self.is_exact:
            verdict = "Any split is the same update."
        elif max(self.loss_difference, self.gradient_difference) <= self.tolerance:
            verdict = (
                f"That is with {self.statistics} in evaluation mode: in training it computes "
                "statistics over each micro-batch, and the split changes the update."
            )
        else:
            verdict = (
                "The split changes the update: the loss is not a mean over the items counted. "
                "Return (mean_loss, num_items) from loss_fn; losses that compare rows with each "
                "other (batch normalisation, contrastive losses) cannot be split."
            )
        return (
            f"{self.model}, {self.num_rows} rows at once against {self.num_rows} of one row, "
            f"{self.num_items:g} items: loss differs by {self.loss_difference:.1e}, gradient by "
            f"{self.gradient_difference:.1e} (relative; rounding is {self.tolerance:.0e}). "
            f"{verdict} Without the weighting by items the gradient would differ by "
            f"{self.unweighted_difference:.1e}."
        )

    __repr__ = __str__


def check_accumulation(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    strategy: Strategy | None = None,
) -> AccumulationReport:
    """Compare the gradient of a whole batch with that of its rows one by one.

    Dropout is off for both. A difference above rounding is measured again in float64, on a copy of
    the model, before it is reported. Modes, gradients and random states are restored afterwards.

    Args:
        model: The model to check.
        batch: A batch of at least two rows; rows of different lengths show most. Every column that
            has one entry for each row is split: tensors and lists, also in nested dicts and
            objects; a pack into its documents.
        loss_fn: As in ``train_steps``.
        terms: As in ``train_steps``.
        strategy: Device, precision and ranks; None takes the strategy that prepared the model, or
            ``prepare_strategy("auto")``.

    Raises:
        DataError: The batch cannot be split into rows, or has only one.

    >>> model = nn.Linear(2, 1, dtype=torch.float64)
    >>> batch = {"x": torch.ones(4, 2, dtype=torch.float64), "labels": torch.arange(4.0)[:, None]}
    >>> check_accumulation(
    ...     model, batch, loss_fn=lambda m, b: nn.functional.mse_loss(m(b["x"]), b["labels"])
    ... ).is_exact
    True
    """
    check_arguments(model=model, batch=batch, loss_fn=loss_fn, terms=terms)
    own: dict[str, Any] = {"loss_fn": loss_fn, "terms": terms}
    strategy = begin_call(strategy_for(model, strategy), "check_accumulation", **own)
    check_loss(**own)
    model = prepare_model(strategy, model)
    rows = rows_or_documents(batch)
    if len(rows) < 2:
        raise DataError("A batch of one row cannot be split. Pass a batch of several rows.")
    statistics = batch_statistics(model)
    kept = [parameter.grad for parameter in model.parameters()]
    try:
        with evaluation_mode(model, strategy.device, inference=False, **own):
            found = _measure(model, batch, rows, strategy, **own)
            if found.difference > found.tolerance and found.dtype != torch.float64:
                # Before a model is accused, rounding is made small.
                found = _measure_in_float64(model, batch, strategy, **own) or found
    finally:
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
    return AccumulationReport(
        model=model_name(model),
        num_rows=len(rows),
        num_items=found.num_items,
        loss_difference=found.loss_difference,
        gradient_difference=found.gradient_difference,
        unweighted_difference=found.unweighted_difference,
        tolerance=found.tolerance * (1 if found.dtype == torch.float64 else _LOOSER),
        statistics=statistics,
    )


class _Measured(NamedTuple):
    """The differences that an ``AccumulationReport`` has, and the coarsest dtype of the numbers."""

    num_items: float
    loss_difference: float
    gradient_difference: float
    unweighted_difference: float
    dtype: torch.dtype

    @property
    def difference(self) -> float:
        return max(self.loss_difference, self.gradient_difference)

    @property
    def tolerance(self) -> float:
        return _TOLERANCES.get(self.dtype, 1e-2)


_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}  # parts of a float64 loss may be float32
_LOOSER = 10  # where float64 is not to be had


def _measure(
    model: nn.Module,
    batch: Any,
    rows: Sequence[Any],
    strategy: Strategy,
    *,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> _Measured:
    """Compare the whole batch with its rows, relative to the largest loss and gradient of a row.

    The rows' gradients may nearly cancel out; rounding is as large as they are, not as their sum.
    """
    gradient = partial(_gradient, model, strategy=strategy, loss_fn=loss_fn, terms=terms)
    whole, exact = gradient([batch])
    parts, split = gradient(rows)
    usual = [torch.zeros_like(g) for g in exact]
    num_used, loss_size, gradient_size = 0, 0.0, 0.0
    for row in rows:
        alone, own = gradient([row])
        if alone.applied:
            num_used += 1
            loss_size = max(loss_size, abs(float(alone.loss)))
            gradient_size = max(gradient_size, *(float(g.abs().max()) for g in own))
            for total, g in zip(usual, own, strict=True):
                total += g
    usual = [total / max(num_used, 1) for total in usual]
    dtypes = {whole.loss.dtype, *(g.dtype for g in exact)}
    if strategy.precision != "no":
        dtypes.add(torch.bfloat16)
    return _Measured(
        whole.num_items,
        _difference([parts.loss], [whole.loss], loss_size),
        _difference(split, exact, gradient_size),
        _difference(usual, exact, gradient_size),
        max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
    )


def _measure_in_float64(
    model: nn.Module,
    batch: Any,
    strategy: Strategy,
    *,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> _Measured | None:
    """Measure a copy of the model in float64; None if there is no such copy, or it has no loss."""
    if is_sharded(model):
        return None
    device = strategy.device if strategy.device.type != "mps" else torch.device("cpu")
    with suppress(Exception):  # a loss function may hold tensors of its own in float32
        copied = copy.deepcopy(unwrap_model(model, adapters=False)).to(device, torch.float64)
        copied.zero_grad()
        batch = _as_float64(batch)
        rows, alone = rows_or_documents(batch), SingleDevice(device)
        return _measure(copied, batch, rows, alone, loss_fn=loss_fn, terms=terms)
    return None


def _as_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return rebuild(value, _as_float64)


def _gradient(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    strategy: Strategy,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> tuple[Update, list[Tensor]]:
    model.zero_grad()
    update = accumulate_gradients(model, batches, loss_fn=loss_fn, terms=terms, strategy=strategy)
    return update, [
        torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for p in model.parameters()
        if p.requires_grad and p.numel()
    ]


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], size: float) -> float:
    pairs = zip(ours, theirs, strict=True)
    difference = max(float((our - their).abs().max()) for our, their in pairs)
    return difference / size if size else difference
