"""Which axis of logits holds the classes, where the class of the model does not tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from manualloop.errors import ModelError
from manualloop.evaluation.losses import Made
from manualloop.notices import say
from manualloop.tasks.loss import find_loss
from manualloop.tasks.task import IGNORE_INDEX, best_class, is_known_head


@dataclass(slots=True)
class Layout:
    """The axis of the classes in logits with an axis of positions: the last one, or axis 1.

    Heads of transformers have it last; torch's cross-entropy wants axis 1, as in ``(rows, classes,
    height, width)``. Of other modules the shape of the labels tells, where one of the two fits
    alone, and otherwise the value of the loss. What a batch has told holds for those after it, in
    which sizes may happen to be the same.

    Attributes:
        is_second: Whether it is axis 1; None until a batch has told it.
        num_classes: Number of classes that the logits of a module of one's own have; 0 if unknown.
        strangers: Labels that are none of these, and that the scores count.
    """

    is_second: bool | None = None
    num_classes: int = 0
    strangers: set[int] = field(default_factory=set)

    def classes_last(self, made: Made, logits: Tensor) -> Tensor:
        """Return logits of three axes or more with that of the classes moved to the end.

        Raises:
            ModelError: Nothing tells which axis that is.
        """
        if made.task.rules.predict is not best_class:
            return logits
        if self.is_second is None:
            self.is_second = _is_second(made, logits)
        return logits.movedim(1, -1) if self.is_second else logits

    def note_labels(self, made: Made, logits: Tensor, labels: NDArray[Any] | list[Any]) -> None:
        """Note the labels that no logit stands for. Heads of transformers refuse or ignore them."""
        if isinstance(labels, list) or labels.dtype.kind not in "iu" or not labels.size:
            return
        num_classes = logits.shape[-1]
        if (labels.max() < num_classes and labels.min() >= 0) or is_known_head(made.task.model):
            return
        strange = labels[(labels < 0) | (labels >= num_classes)]
        self.num_classes = num_classes
        self.strangers |= {*np.unique(strange).tolist()} - {IGNORE_INDEX, made.task.ignored}


def _is_second(made: Made, logits: Tensor) -> bool:
    if is_known_head(made.task.model):
        return False
    labels = made.inputs.get("labels") if isinstance(made.inputs, Mapping) else None
    if not isinstance(labels, Tensor):
        found = _by_columns(made.inputs, logits)
    else:
        fits = [labels.shape == shape for shape in _without_classes(logits)]
        if not all(fits):
            return fits == [False, True]  # if none fits, both shapes are told later
        found = _by_loss(made, logits, labels)
    if found is None and logits.ndim == 3:  # words of sentences, more often than signals
        say(
            f"{_doubt(logits, labels)}: the last axis is taken. If it is axis 1, pass "
            f"postprocess=lambda outputs, batch: {logits_name(made.outputs)}.argmax(1)."
        )
        return False
    if found is None:
        name = logits_name(made.outputs)
        raise ModelError(
            f"N{_doubt(logits, labels)[1:]}. For the last one pass postprocess=lambda outputs, "
            f"batch: {name}.argmax(-1); for axis 1 postprocess=lambda outputs, batch: "
            f"{name}.argmax(1)."
        )
    return found


def _doubt(logits: Tensor, labels: Tensor | None) -> str:
    beside = "" if labels is None else f", beside labels of shape {tuple(labels.shape)},"
    return (
        f"nothing tells whether the last axis of the logits of shape {tuple(logits.shape)}{beside} "
        "holds the classes, or axis 1, as torch's cross_entropy wants it"
    )


def _without_classes(values: Tensor) -> tuple[torch.Size, torch.Size]:
    """Return the shape of logits without the classes, if they are last and if they are second."""
    return values.shape[:-1], values.shape[:1] + values.shape[2:]


def _by_columns(inputs: Any, logits: Tensor) -> bool | None:
    """Tell by what a batch without labels has for each position; None if that is not clear."""
    columns = inputs.values() if isinstance(inputs, Mapping) else ()
    found = set[bool]()
    for column in columns:
        if isinstance(column, Tensor):
            for is_second, shape in enumerate(_without_classes(logits)):
                is_wide = column.ndim == logits.ndim  # an embedding or channels at each position
                own = _without_classes(column)[is_second] if is_wide else column.shape
                if own == shape:
                    found.add(bool(is_second))
    return found.pop() if len(found) == 1 else None


def _by_loss(made: Made, logits: Tensor, labels: Tensor) -> bool | None:
    """Tell by the value of the loss; None if it is another one, or the same for both."""
    loss = find_loss(made.outputs) if made.loss is None else made.loss
    loss = loss[0] if isinstance(loss, tuple) else loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    losses = []
    for side in (logits.movedim(-1, 1), logits):
        is_strange = (labels < 0) | (labels >= side.shape[1])  # the loss may ignore them
        kept = labels.long().masked_fill(is_strange, IGNORE_INDEX)
        losses.append(float(cross_entropy(side.float(), kept)))
    is_near = [abs(one - float(loss)) <= 1e-4 * abs(one) + 1e-6 for one in losses]
    return is_near[1] if is_near[0] != is_near[1] else None


def logits_name(outputs: Any) -> str:
    """Return how a function of outputs and batch reaches the logits."""
    if isinstance(outputs, Tensor):
        return "outputs"
    return 'outputs["logits"]' if type(outputs) is dict else "outputs.logits"
