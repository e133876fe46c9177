"""Proofs that a user can run on a model and data of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manualloop.errors import DataError
from manualloop.models import evaluation_mode, model_name
from manualloop.strategy import Strategy, strategy_for
from manualloop.tasks import count_items, model_loss, num_rows
from manualloop.types import LossFn, Update
from manualloop.update import accumulate_gradients, split_batch


@dataclass(frozen=True, slots=True)
class AccumulationReport:
    """How far the update of a batch in pieces is from that of the whole. Prints in words.

    Attributes:
        model: Class of the model.
        num_rows: Rows of the batch, and so of the pieces of one row.
        num_items: Items that the loss is a mean of.
        loss_difference: Of the losses, relative to the whole batch's.
        gradient_difference: Largest difference of a gradient, relative to the whole batch's
            largest.
        unweighted_difference: The same for the usual mean of the pieces' means.
        tolerance: Up to which the two are taken for equal: rounding in the gradients' dtype.
    """

    model: str
    num_rows: int
    num_items: float
    loss_difference: float
    gradient_difference: float
    unweighted_difference: float
    tolerance: float

    @property
    def is_exact(self) -> bool:
        """Whether both differences are rounding."""
        return max(self.loss_difference, self.gradient_difference) <= self.tolerance

    def __str__(self) -> str:
        verdict = (
            "Any split is the same update."
            if self.is_exact
            else "The split changes the update: the loss is no mean over the items counted. Return "
            "(mean_loss, num_items) from loss_fn; losses that compare rows with each other "
            "(batch normalisation, contrastive losses) cannot be split."
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
    strategy: Strategy | None = None,
) -> AccumulationReport:
    """Compare the gradient of a batch with that of its rows, one by one.

    Dropout is off for both; modes, gradients and random states are put back.

    Args:
        model: Yours.
        batch: A dict of tensors, at least two rows; ragged ones show most.
        loss_fn: As in ``train_steps``.
        strategy: None: the one that prepared the model, else ``prepare_strategy("auto")``.

    Raises:
        DataError: The batch cannot be split into rows, or has one only.

    >>> model = nn.Linear(2, 1, dtype=torch.float64)
    >>> batch = {"x": torch.ones(4, 2, dtype=torch.float64), "labels": torch.arange(4.0)[:, None]}
    >>> check_accumulation(
    ...     model, batch, loss_fn=lambda m, b: nn.functional.mse_loss(m(b["x"]), b["labels"])
    ... ).is_exact
    True
    """
    strategy = strategy_for(model, strategy)
    model = strategy.prepare_model(model)
    if num_rows(batch) < 2:
        raise DataError("A batch of one row cannot be split. Give one of several rows.")
    rows = split_batch(batch, 1)
    kept = [parameter.grad for parameter in model.parameters()]

    def mean_of_means(model: nn.Module, row: Any) -> tuple[Tensor, int]:
        loss = (loss_fn or model_loss)(model, row)
        if isinstance(loss, tuple):
            return loss[0], min(int(loss[1]), 1)
        return loss, min(count_items(model, row), 1)

    try:
        with evaluation_mode(model, strategy.device, inference=False):
            whole, exact = _gradient(model, [batch], loss_fn, strategy)
            parts, split = _gradient(model, rows, loss_fn, strategy)
            _, usual = _gradient(model, rows, mean_of_means, strategy)
    finally:
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
    return AccumulationReport(
        model=model_name(model),
        num_rows=len(rows),
        num_items=whole.num_items,
        loss_difference=_difference([parts.loss], [whole.loss]),
        gradient_difference=_difference(split, exact),
        unweighted_difference=_difference(usual, exact),
        tolerance=1e-10 if whole.loss.dtype == torch.float64 else 1e-4,
    )


def _gradient(
    model: nn.Module, batches: Sequence[Any], loss_fn: LossFn | None, strategy: Strategy
) -> tuple[Update, list[Tensor]]:
    model.zero_grad()
    update = accumulate_gradients(model, batches, loss_fn=loss_fn, strategy=strategy)
    return update, [p.grad for p in model.parameters() if p.grad is not None]


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    pairs = list(zip(ours, theirs, strict=True))
    largest = max(float(their.abs().max()) for _, their in pairs)
    difference = max(float((our - their).abs().max()) for our, their in pairs)
    return difference / largest if largest else difference
