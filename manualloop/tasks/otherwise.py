"""Models of transformers whose loss is otherwise than their names tell.

That of some is right for one batch and no mean over items that it shows, so that it cannot be added
up: it needs ``terms``. The names are those of transformers 5.23. Others do not shift their labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from manualloop.models import config_of, own_config, unwrap_model

_PAIR = (
    "from torch.nn.functional import cross_entropy; terms=lambda outputs, batch: "
    '[(cross_entropy(outputs.prediction_logits.flatten(0, 1), batch["labels"].flatten()), '
    '(batch["labels"] != -100).sum()), (cross_entropy(outputs.{logits}, batch["{label}"]), '
    'len(batch["{label}"]))]'
)
_BOXES = "from manualloop.tasks import detection_terms; terms=detection_terms"
_SUM = (
    'model.config.ctc_loss_reduction = "mean"; or, to weigh texts by their length, '
    'terms=lambda outputs, batch: [(outputs.loss / len(batch["labels"]), len(batch["labels"]))]'
)
_ANY = "terms=lambda outputs, batch: [(mean, num_items), ...]"

# Suffix of the class, what its loss is.
_SUMS = {
    "ForObjectDetection": "it adds up means over queries and over boxes",
    "DetrForSegmentation": "it adds up means over queries, boxes and masks",
    "ForInstanceSegmentation": "it adds up means over queries and over masks",
    "ForUniversalSegmentation": "it adds up means over queries and over masks",
    "ForMaskedImageModeling": "it is a mean over the masked patches",
    "ForPreTraining": "it adds up several losses, each with items of its own",
    "ForRNNT": "its items depend on its reduction",
    "ForTDT": "its items depend on its reduction",
}
# Means over rows, or over what the labels show.
_MEANS = ("MAEForPreTraining", "HieraForPreTraining", "BeitForMaskedImageModeling")
ATTENDED = ("ElectraForPreTraining", "FunnelForPreTraining")
"""Classes whose loss is a mean over the tokens that are attended to."""

_WITH_DETECTION_TERMS = ("Yolos", "Detr", "TableTransformer")


def balances_experts(model: nn.Module) -> bool:
    """Tell whether a model adds a loss over all tokens of a batch that balances its experts."""
    return bool(getattr(config_of(model), "output_router_logits", False))


def wants_shifted_labels(kind: type[nn.Module]) -> bool:
    """Tell whether a head of transformers takes each label in the place that predicts it.

    Decoders of encoder-decoders do, and models of masked tokens that are named after their head. A
    head that shifts labels calls ``loss_function``, which does it, or has names with "shift".
    """
    kinds = (c for c in kind.__mro__ if c.__module__.startswith("transformers."))
    owner: Any = next((c for c in kinds if "forward" in vars(c)), None)
    code = None if owner is None else getattr(inspect.unwrap(owner.forward), "__code__", None)
    if code is None or "labels" not in code.co_varnames:
        return False
    names = (*code.co_names, *code.co_varnames)
    return not any(name == "loss_function" or "shift" in name for name in names)


def objection_to(model: nn.Module, batch: Any) -> str | None:
    """Return why a model's loss cannot be added up over micro-batches; None if it can be.

    The message tells what to do.

    Args:
        model: The model, wrapped or not.
        batch: A batch; its columns decide whether a model adds up two losses.
    """
    columns = batch if isinstance(batch, Mapping) else {}
    inner = unwrap_model(model)
    kind, config = type(inner), own_config(inner)
    owner = next((cls for cls in kind.__mro__ if "forward" in vars(cls)), kind)
    if columns.get("return_loss") is True and owner.__module__.startswith("transformers."):
        return (
            f"The loss of {kind.__name__} compares each row with the others of its batch, so that "
            "no split is the same update. To compare within micro-batches: "
            "loss_fn=lambda model, batch: model(**batch).loss."
        )
    for name in dict.fromkeys((kind.__name__, owner.__name__)):
        if found := _sum_of(name, config, columns):
            what, fix = found
            return (
                f"The loss of {kind.__name__} is no mean over items that the batch shows: {what}. "
                "To add it up over several micro-batches or ranks, pass its means, each with its "
                f"items: {fix}."
            )
    return None


def _sum_of(name: str, config: Any, columns: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return what the loss of a class is and what to do; None if it is a mean that is counted."""
    if name.endswith("ForCTC"):
        is_sum = getattr(config, "ctc_loss_reduction", "mean") == "sum"
        return ('ctc_loss_reduction is "sum"', _SUM) if is_sum else None
    labels: Any = columns.get("labels")
    if (
        name.endswith(("ForConditionalGeneration", "ForCausalLM"))
        and getattr(labels, "ndim", 0) > 2
    ):
        return "it adds up means over the labels of each codebook", _ANY
    if name.endswith("DoubleHeadsModel"):
        return (_SUMS["ForPreTraining"], _ANY) if "mc_labels" in columns else None
    if name.endswith("ForPrediction") and "future_observed_mask" in columns:
        return "it is a mean over the values that were observed", _ANY
    if name.endswith(_MEANS) or name in ATTENDED:
        return None
    what = next((what for suffix, what in _SUMS.items() if name.endswith(suffix)), None)
    if what is None:
        return None
    if name.removesuffix("ForObjectDetection") in _WITH_DETECTION_TERMS:
        return what, _BOXES
    for label, logits in (
        ("next_sentence_label", "seq_relationship_logits"),
        ("sentence_order_label", "sop_logits"),
    ):
        if label in columns:
            return what, _PAIR.format(label=label, logits=logits)
    if name == "BigBirdForPreTraining":  # without that column it is masked language modelling
        return None
    return what, _ANY
