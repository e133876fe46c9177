"""Whether padding on the right changes what a model of transformers makes of a row."""

from __future__ import annotations

import inspect

from torch import nn

from manualloop.models import own_config, unwrap_model, varying_positions


def is_blind_to_padding(model: nn.Module) -> bool:
    """Tell whether a model's outputs for a row do not depend on the length it is padded to.

    True only for models of transformers that take an attention mask and treat each row alone. Not
    for question answering, whose softmax runs over the padding, nor for some families.
    """
    inner = unwrap_model(model)
    if own_config(inner) is None or type(inner).__name__.endswith("ForQuestionAnswering"):
        return False
    takes_mask = "attention_mask" in inspect.signature(inner.forward).parameters
    has_own_places = varying_positions(inner) is None
    return takes_mask and has_own_places and not mixes_padding(inner)


def mixes_padding(model: nn.Module) -> bool:
    """Tell whether a family of transformers mixes padding on the right into the other tokens.

    Of 93 heads for sequence classification that were tried with transformers 5.23, those of these
    families depend on the padding, whatever their attention mask says.
    """
    inner = unwrap_model(model)
    is_family = type(inner).__name__.startswith(_MIXING_PADDING)
    return is_family and own_config(inner) is not None


# XLNet classifies by the last place of a row; CPM-Ant reads its own padding, on the left.
_MIXING_PADDING = (
    *("Canine", "ConvBert", "CpmAnt", "FNet", "Nystromformer", "Yoso"),
    *("XLNetForSequenceClassification", "XLNetForMultipleChoice"),
)
