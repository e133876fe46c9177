"""The loss of each row, where the logits and the labels tell it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manualloop.tasks.task import IGNORE_INDEX, Task, best_class


class RowLosses:
    """The loss of each row as a sum over its items, and their number.

    A batch tells only the mean over its rows. The loss of each is computed by the usual formula of
    the task, and believed if the rows give the mean that the model, or the function, has returned.

    Attributes:
        sums: Sum over the items of each row.
        items: Number of items of each row.
        are_known: Whether this is true of every batch so far.
    """

    def __init__(self) -> None:
        self.sums, self.items, self.are_known = array("d"), array("d"), True

    def add(
        self, outputs: Any, inputs: Any, task: Task, terms: Sequence[tuple[float, float]]
    ) -> None:
        """Add the rows of a batch.

        Args:
            outputs: Outputs of the model.
            inputs: The batch, where the outputs are.
            task: The task.
            terms: The terms of its loss: means, and the items that each is over.
        """
        if not self.are_known or not terms:
            return
        found = _by_formula(outputs, inputs, task) if len(terms) == 1 else None
        if found is None or not _fits(found, *terms[0]):
            self.are_known = False
            return
        sums, items = found
        self.sums.extend(sums.double().tolist())
        self.items.extend(items.tolist())


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
    # Losses under autocast are those of float32 logits that were rounded before.
    return number == 0 or abs(float(sums.double().sum()) / number - mean) <= 1e-3 * abs(mean) + 1e-6
