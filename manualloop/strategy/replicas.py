"""The copies of a model on several ranks, and the wrapper that adds up their gradients.

DDP adds up the gradients of the parameters that were trainable when it was made, and expects one of
each in every backward pass. Of any others the ranks would train each its own, without an error.
"""

from __future__ import annotations

import re
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from manualloop.errors import ModelError
from manualloop.internals import (
    children_of,
    compiled_module,
    hooks_of_gradient,
)
from manualloop.libraries import require_reduced
from manualloop.models import model_name, unwrap_model


class Replica:
    """A model on this rank, and what it was prepared as.

    Args:
        model: The model, without wrappers.
        prepared: What its forward passes go through.
        is_given: Whether the script has wrapped it.
    """

    def __init__(self, model: nn.Module, prepared: nn.Module, *, is_given: bool) -> None:
        self.model, self.prepared, self.is_given = model, prepared, is_given
        self._parameters = list(model.parameters())
        self._trained = [parameter.requires_grad for parameter in self._parameters]

    def fits(self) -> bool:
        """Tell whether the parameters are trained that were when the model was prepared."""
        return [parameter.requires_grad for parameter in self._parameters] == self._trained

    def fits_whole(self) -> bool:
        """Tell the same, and whether the model still has these parameters and no others."""
        now = list(map(id, self.model.parameters()))
        return now == list(map(id, self._parameters)) and self.fits()


def adder_of(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper of DDP in or around a model, which adds up the gradients of the ranks.

    The wrapper of ``torch.compile`` may lie around it, and adds up nothing itself.
    """
    part: object = model
    while type(part).__name__.endswith("OptimizedModule") and isinstance(part, nn.Module):
        part = compiled_module(part, children_of(part))
    return part if isinstance(part, DistributedDataParallel) else None


def without_adder(model: nn.Module) -> nn.Module:
    """Return what a wrapper of DDP holds; a model that has none is returned as it is."""
    adder = adder_of(model)
    return model if adder is None else adder.module


def settle_order(adder: DistributedDataParallel) -> None:
    """Let DDP add up gradients from the first update on in the order in which it always will.

    It groups parameters anew after its first backward pass. Of more than two ranks each group is
    added up in an order of its own, and the first update after a resume would be rounded otherwise
    than in a run that was never stopped. So the first pass is one without effect: its gradients are
    0, and are put away. Not where functions see them, where some are sparse, or where DDP looks at
    what each pass uses. Collective.
    """
    is_sparse = any(getattr(module, "sparse", False) for module in adder.module.modules())
    if adder.find_unused_parameters or adder.static_graph or is_sparse:
        return
    parameters = [parameter for parameter in adder.module.parameters() if parameter.requires_grad]
    if any(map(hooks_of_gradient, parameters)):
        return
    gradients = [parameter.grad for parameter in parameters]
    inner = adder.module
    adder.module = _Zero(inner, parameters)
    try:
        with torch.enable_grad():
            adder().backward()
    finally:
        adder.module = inner
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


class _Zero(nn.Module):
    """Returns 0 in the place of a model, whose buffers DDP copies.

    It is computed of all parameters, of which the last get their gradients first.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        vars(self).update(named_buffers=model.named_buffers, weights=parameters)

    def forward(self) -> Tensor:
        zeros: list[Tensor] = [(weight * 0).sum().abs().float() for weight in vars(self)["weights"]]
        return reduce(torch.add, zeros)


def require_all_added_up(model: nn.Module) -> None:
    """Refuse a window after whose backward pass DDP still waits for gradients.

    It has then added up only some of the others, and would say so in the next forward pass: this
    update would differ from rank to rank, and the last update of a run in silence.

    Raises:
        ModelError: The message names the parameters.
    """
    adder = adder_of(model)
    if adder is None:
        return
    try:
        require_reduced(adder)
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        raise ModelError(
            f"The loss does not depend on all trainable parameters of {model_name(model)}, and "
            f"the ranks wait for a gradient of each{_named(adder, str(error))}. {_fix(adder)}"
        ) from error


def _named(adder: DistributedDataParallel, message: str) -> str:
    """Name the parameters whose places an error of DDP lists, if it does."""
    whole = unwrap_model(adder, adapters=False)
    names = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", message)
    places = [int(place) for place in found[1].split()] if found else []
    shown = [names[place] for place in places[:3] if place < len(names)]
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return f": {', '.join(shown)}{more}" if shown else ""


def _fix(adder: DistributedDataParallel) -> str:
    if adder.find_unused_parameters:
        return (
            "What the model returns depends on them, and the loss does not: leave that out of what "
            "it returns, or freeze them before the run: parameter.requires_grad_(False)."
        )
    return (
        "If no loss ever depends on them, freeze them before the run: "
        "parameter.requires_grad_(False). If some do, the ranks have to look: strategy="
        "prepare_strategy(Accelerator(kwargs_handlers=[DistributedDataParallelKwargs("
        "find_unused_parameters=True)])), both from accelerate; on a CPU add cpu=True."
    )
