"""Models trained on top of a frozen base, with PEFT or quantized: what of them is to be saved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from manualloop.models import unwrap_model

BASE = "frozen weights"
"""Name, in the state of an ``AdaptedModel``, of what its base is known by."""

_NUM_SAMPLED = 16


def base_weights(model: nn.Module) -> set[str]:
    """Name the parameters that come with a model's base, and that training leaves alone.

    Those are the frozen ones of a model of PEFT, which keeps what is an adapter's under the
    adapter's name, and everywhere the frozen ones that are quantized.

    >>> model = nn.Linear(2, 2)
    >>> base_weights(model.requires_grad_(False))
    set()
    >>> model.peft_config = {"default": ...}
    >>> sorted(base_weights(model))
    ['bias', 'weight']
    """
    adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    return {
        name
        for name, weight in model.named_parameters(remove_duplicate=False)
        if not weight.requires_grad
        and (not weight.is_floating_point() or adapters)
        and adapters.keys().isdisjoint(name.split("."))
    }


def saved_part(model: nn.Module) -> nn.Module | AdaptedModel:
    """Return what has the state of a model that a checkpoint is to hold."""
    model = unwrap_model(model, adapters=False)
    base = base_weights(model)
    return AdaptedModel(model, base) if base else model


class AdaptedModel:
    """A model without the weights of its base, as something with a state.

    The base is loaded anew by the script, as it was. It may be a hundred times the adapters' size,
    and quantized weights have a state that they do not take back.
    """

    def __init__(self, model: nn.Module, base: set[str]) -> None:
        self._model, self._base = model, base

    def state_dict(self) -> dict[str, Any]:
        """Return all but the base's weights, and by what these are known again."""
        state = self._model.state_dict()
        rest = {
            name: value
            for name, value in state.items()
            if self._base.isdisjoint(accumulate(name.split("."), "{}.{}".format))
        }
        return rest | {BASE: self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` of a model with the same names returned."""
        rest = {name: value for name, value in state.items() if name != BASE}
        self._model.load_state_dict(rest, strict=False)

    def _fingerprint(self) -> str:
        sampled = [
            weight.detach().reshape(-1)[:: max(1, weight.numel() // _NUM_SAMPLED)].float()
            for name, weight in self._model.named_parameters(remove_duplicate=False)
            if name in self._base
        ]
        numbers = torch.cat([part.cpu() for part in sampled]).numpy()
        return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]
