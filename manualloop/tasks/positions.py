"""Positions that a model computes for the longest row of a batch, as some rotary embeddings do.

What such a model makes of a row depends on the rows beside it, if one of them is long. It was
trained so, and nothing but the lengths of the rows can be changed; a line reports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from manualloop.models import model_name, unwrap_model, varying_positions
from manualloop.notices import say

_TOLD: WeakSet[nn.Module] = WeakSet()


def report_positions(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Report rows of a batch, or documents of a pack, whose positions depend on the longest one.

    Args:
        model: The model.
        batch: A batch with ``input_ids``, and with a mask of padding or ``position_ids``.

    Returns:
        Whether no other batch has to be looked at.
    """
    found, inner = varying_positions(model), unwrap_model(model)
    if found is None or inner in _TOLD:
        return True
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if isinstance(positions, Tensor) and mask is None:
        longest, has_others = int(positions.max()) + 1, bool((positions[..., 1:] == 0).any())
    elif isinstance(mask, Tensor):
        lengths = (mask != 0).sum(-1)
        longest, shortest = int(lengths.max()), int(lengths.min())
        has_others = shortest < longest and (found.kind == "dynamic" or shortest <= found.length)
    else:
        return False
    if longest <= found.length or not has_others:
        return False
    _TOLD.add(inner)
    say(
        f"a batch has rows of up to {longest} tokens, and {model_name(model)} computes positions "
        f"for the longest row of a batch where that has more than {found.length} "
        f'(rope_type="{found.kind}"): what it makes of shorter rows, losses and scores depend on '
        f"the rows beside them. Cut rows at {found.length} tokens, or put longer ones into batches "
        "of their own."
    )
    return True
