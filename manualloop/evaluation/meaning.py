"""What the outputs of a module of one's own mean, where neither class nor labels tell it.

Labels of 0 and 1 for each class may be several classes a row or a single one, and outputs may be
logits or already probabilities. The value of the loss tells, in the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manualloop.errors import DataError
from manualloop.evaluation.layout import Layout, logits_name
from manualloop.evaluation.losses import Made
from manualloop.models import unwrap_model
from manualloop.notices import say
from manualloop.tasks.loss import find_loss
from manualloop.tasks.otherwise import balances_experts
from manualloop.tasks.task import Task, is_known_head

_TOLD: WeakSet[nn.Module] = WeakSet()  # a run evaluates a model again and again
_TOLD_OF_LABELS: WeakSet[nn.Module] = WeakSet()


def task_of_outputs(made: Made) -> Task:
    """Return the task of a batch, with rules that fit what the model returns.

    Raises:
        DataError: The labels have a 1 for the only class of each row.
    """
    task, outputs, loss = made.task, made.outputs, made.loss
    logits = _logits_of(outputs)
    if logits is None or is_known_head(task.model):
        return task
    if task.rules.probabilities is not None and logits.ndim == 2 and _add_up_to_one(logits):
        return replace(task, rules=replace(task.rules, probabilities=_as_they_are))
    labels = made.inputs.get("labels") if isinstance(made.inputs, Mapping) else None
    if not task.by_values or not isinstance(labels, Tensor) or labels.shape != logits.shape:
        return task
    loss = find_loss(outputs) if loss is None else loss
    loss = loss[0] if isinstance(loss, tuple) else loss
    value = float(loss) if isinstance(loss, Tensor) and loss.numel() == 1 else None
    logits, labels = logits.float(), labels.float()
    is_of_several = _is_near(value, F.binary_cross_entropy_with_logits(logits, labels))
    lines = []
    if not is_of_several and bool(((labels == 1).sum(-1) == 1).all()):
        if _is_near(value, F.cross_entropy(logits, labels)):
            raise DataError(
                "Each row of the labels has a single 1, and the loss is the cross-entropy over the "
                "classes: a row has one class, and would be scored as if it had several. Let "
                "collate_fn return its number, for which cross_entropy is the same: "
                '{**batch, "labels": batch["labels"].argmax(-1)}.'
            )
        lines.append(
            "each row of the labels has a single 1, and each class is predicted for itself, where "
            "its logit is above 0. If a row has one class, let collate_fn return its number: "
            '{**batch, "labels": batch["labels"].argmax(-1)}.'
        )
    if not is_of_several and bool(((logits >= 0) & (logits <= 1)).all()):
        if _is_near(value, F.binary_cross_entropy(logits, labels)):
            rules = replace(task.rules, predict=_above_half, probabilities=_as_they_are)
            return replace(task, rules=rules)
        name = logits_name(outputs)
        lines.append(
            "the outputs are all between 0 and 1, as probabilities are, and are taken for logits: "
            "all above 0 are predicted. If they are probabilities, pass "
            f"postprocess=lambda outputs, batch: ({name} > 0.5).int()."
        )
    if lines and task.model not in _TOLD:
        _TOLD.add(task.model)
        for line in lines:
            say(line)
    return task


def report_balance(model: nn.Module) -> None:
    """Report a loss of experts that is a part of the loss of an evaluation."""
    inner = unwrap_model(model)
    if not balances_experts(model) or inner in _TOLD:
        return
    _TOLD.add(inner)
    say(
        "the loss that balances the experts (output_router_logits) is a part of the loss of this "
        "evaluation, also in its perplexity, and depends on which rows share a batch. Leave it out "
        "by model.config.output_router_logits = False, or pass a loss_fn that returns the loss of "
        "the tokens."
    )


def report_strangers(model: nn.Module, layout: Layout) -> None:
    """Report labels that the model cannot predict, which are often those that its loss ignores."""
    inner = unwrap_model(model)
    if not layout.strangers or inner in _TOLD_OF_LABELS:
        return
    _TOLD_OF_LABELS.add(inner)
    first, *others = sorted(layout.strangers)
    labels = f"{first} and {len(others)} more" if others else str(first)
    say(
        f"labels of {labels} count as wrong predictions: the model has {layout.num_classes} logits "
        f"for the classes 0 to {layout.num_classes - 1}. If its loss ignores them "
        f"(ignore_index={first}), ignore -100 instead, as cross_entropy does by default, and no "
        'score counts them: {**batch, "labels": '
        f'batch["labels"].masked_fill(batch["labels"] == {first}, -100)}}.',
        from_every_rank=True,
    )


def _logits_of(outputs: Any) -> Tensor | None:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    logits = getattr(outputs, "logits", outputs) if logits is None else logits
    is_one = isinstance(logits, Tensor) and logits.is_floating_point() and logits.numel() > 0
    return logits.detach() if is_one else None


def _add_up_to_one(logits: Tensor) -> bool:
    """Tell whether the numbers of each row are probabilities of classes, as softmax makes them."""
    if logits.shape[1] < 2 or bool((logits < 0).any()):
        return False
    rounding = max(1e-4, 4 * torch.finfo(logits.dtype).eps)
    return bool(((logits.sum(-1) - 1).abs() <= rounding).all())


def _is_near(value: float | None, other: Tensor) -> bool:
    return value is not None and abs(value - float(other)) <= 1e-4 * abs(float(other)) + 1e-6


def _as_they_are(probabilities: Tensor) -> Tensor:
    return probabilities


def _above_half(probabilities: Tensor) -> Tensor:
    return (probabilities > 0.5).int()
