"""The loss of object detection as means: over queries, and over boxes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manualloop.models import config_of
from manualloop.strategy.accelerated import mean_over_processes
from manualloop.types import Batch, Terms


def detection_terms(model: nn.Module) -> Terms:
    """Return the terms of the loss of YOLOS, DETR or Table Transformer.

    The classes are a mean over all queries, in which those without an object weigh
    ``config.eos_coefficient``; the boxes are a mean over the boxes of the batch. The auxiliary
    losses of the decoder's layers are included.

    Args:
        model: The model, whose config has the weights of the losses.

    Returns:
        A function for ``terms=``, which declares its items.
    """
    config: Any = config_of(model)
    weights = {
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }

    def items(batch: Batch) -> list[float]:
        num_boxes = sum(len(row["class_labels"]) for row in batch["labels"])
        per_row = getattr(config, "num_detection_tokens", None) or config.num_queries
        num_empty = per_row * len(batch["labels"]) - num_boxes
        return [num_boxes + config.eos_coefficient * num_empty, num_boxes]

    def terms(outputs: Any, batch: Batch) -> list[tuple[Tensor, float]]:
        of_queries, num_boxes = items(batch)
        # transformers divides the sums over boxes by the mean number of boxes of all processes.
        divisor = max(mean_over_processes(num_boxes, outputs.logits.device), 1)
        classes, boxes = outputs.logits.sum() * 0, outputs.logits.sum() * 0
        for name, loss in outputs.loss_dict.items():
            kind = name if name in weights else name.rpartition("_")[0]  # loss_bbox_3
            if name.startswith("loss_ce"):
                classes = classes + loss
            elif kind in weights:
                boxes = boxes + weights[kind] * loss
        return [(classes, of_queries), (boxes * (divisor / max(num_boxes, 1)), num_boxes)]

    terms.items = items  # type: ignore[attr-defined]
    return terms
