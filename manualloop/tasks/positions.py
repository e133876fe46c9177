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
    mask = batch.get("attention_mask")
    looked_at = batch.get("position_ids") if mask is None else mask
    if not isinstance(looked_at, Tensor) or looked_at.shape[-1] <= found.length:
        return False
    if looked_at.device.type != "cpu":  # a look waits
        return False
    if mask is None:
        longest, has_others = int(looked_at.max()) + 1, bool((looked_at[..., 1:] == 0).any())
    else:
        lengths = (looked_at != 0).sum(-1)
        longest, shortest = int(lengths.max()), int(lengths.min())
        has_others = shortest < longest and (found.kind == "dynamic" or shortest <= found.length)
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
