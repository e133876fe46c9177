"""The loss of each row, where the logits and the labels tell it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manualloop.batches import shared_rows
from manualloop.models import unwrap_model
from manualloop.tasks.task import IGNORE_INDEX, Task, best_class


class RowLosses:
    """The loss of each row as a sum over its items, and their number.

    A batch of one row tells it. A larger one tells only the mean over its rows: for the heads of
    transformers the loss of each is computed by the formula of the task, and believed if the rows
    give that mean. Other losses are not guessed: with label smoothing, balanced classes may give
    the same mean as without.

    Attributes:
        sums: Sum over the items of each row.
        items: Number of items of each row.
        are_known: Whether this is true of every batch so far.
    """

    def __init__(self) -> None:
        self.sums, self.items, self.are_known = array("d"), array("d"), True

    def add(
        self,
        outputs: Any,
        inputs: Any,
        task: Task,
        terms: Sequence[tuple[float, float]],
        *,
        is_models: bool,
    ) -> None:
        """Add the rows of a batch.

        Args:
            outputs: Outputs of the model.
            inputs: The batch, where the outputs are.
            task: The task.
            terms: The terms of its loss: means, and the items that each is over.
            is_models: Whether the loss is the one that the model computes.
        """
        if not self.are_known or not terms:
            return
        if len(terms) == 1 and shared_rows(inputs) == 1 and not isnan(terms[0][1]):
            mean, num_items = terms[0]
            self.sums.append(mean * num_items if num_items else 0.0)
            self.items.append(num_items)
            return
        is_known = len(terms) == 1 and is_models and _is_of_transformers(task.model)
        found = _by_formula(outputs, inputs, task) if is_known else None
        if found is None or not _fits(found, *terms[0]):
            self.are_known = False
            return
        sums, items = found
        self.sums.extend(sums.double().tolist())
        self.items.extend(items.tolist())


def _is_of_transformers(model: nn.Module) -> bool:
    return type(unwrap_model(model)).__module__.startswith("transformers.")


def _by_formula(outputs: Any, inputs: Any, task: Task) -> tuple[Tensor, Tensor] | None:
    """Return the sum and the items of each row; None for other tasks and shapes."""
    is_mapping = isinstance(outputs, Mapping)
    logits = outputs.get("logits") if is_mapping else getattr(outputs, "logits", outputs)
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or not labels.ndim:
        return None
    logits, rows = logits.detach().float(), len(labels)
    if task.rules.predict is best_class and not labels.is_floating_point():
        if "shift_labels" in inputs:
            labels = inputs["shift_labels"]
        elif task.rules.shifts_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        if logits.shape[:-1] != labels.shape:
            return None
        flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
        losses = F.cross_entropy(*flat, reduction="none", ignore_index=IGNORE_INDEX)
        items = (labels != IGNORE_INDEX).reshape(rows, -1).sum(1)
    elif task.name in ("multi_label_classification", "regression"):
        if logits.numel() != labels.numel() or len(logits) != rows:
            return None
        pairs = logits.reshape(rows, -1), labels.reshape(rows, -1).float()
        function: Any = F.mse_loss
        if task.name != "regression":
            function = F.binary_cross_entropy_with_logits
        losses = function(*pairs, reduction="none")
        items = torch.full((rows,), losses.shape[1], device=losses.device)
    else:
        return None
    return losses.reshape(rows, -1).sum(1), items


def _fits(found: tuple[Tensor, Tensor], mean: float, num_items: float) -> bool:
    sums, items = found
    number = float(items.sum())
    if number != num_items:
        return False
    # Wide enough for the order of a sum in float32, and for no other formula.
    return number == 0 or abs(float(sums.double().sum()) / number - mean) <= 1e-5 * abs(mean) + 1e-7
