"""Passes through a model that is not trained: a reference, a teacher, a model without adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from manualloop.errors import ConfigError, ManualLoopError, ModelError
from manualloop.models import max_length, model_name, remember_modes, unwrap_model
from manualloop.tasks.tokens import check_tokens, is_of_tokens
from manualloop.types import Origin, Place


@contextmanager
def frozen_pass(frozen: nn.Module, model: nn.Module, batch: Any, name: str) -> Iterator[nn.Module]:
    """Yield a model in evaluation mode, on the device of the batch, and without gradients.

    Args:
        frozen: The model.
        model: The model that is trained.
        batch: The batch.
        name: Name of the argument, for messages.

    Raises:
        ConfigError: It is the model that is trained.
        DataError: It has no place or no number for a token of the batch.
    """
    if _APART.get(frozen) is not model:
        _require_apart(frozen, model, name)
        _APART[frozen] = model
        _ROOM[frozen] = max_length(frozen)
    room, ids = _ROOM.get(frozen), batch.get("input_ids")
    if room is not None and isinstance(ids, Tensor) and ids.shape[-1] > room:
        check_tokens(frozen, batch, _place_of(name))  # an accelerator does not survive such places
    weight = next(frozen.parameters(), None)
    device = next((c.device for c in batch.values() if isinstance(c, Tensor)), None)
    is_elsewhere = weight is not None and device is not None and weight.device != device
    if is_elsewhere and not hasattr(frozen, "hf_device_map"):
        frozen.to(device)
    if frozen.training:
        frozen.eval()
    try:
        with torch.no_grad():
            yield frozen
    except (IndexError, RuntimeError) as error:
        if not isinstance(error, ManualLoopError) and is_of_tokens(error):
            check_tokens(frozen, batch, _place_of(name))
        raise


_APART: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_ROOM: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def _place_of(name: str) -> Place:
    batch = f"a batch that {name}= gets"
    cut = "preference_pairs(tokenizer, max_length={room})" if name == "reference" else None
    return Place(lambda: batch, lambda row: f"row {row} of {batch}", Origin(cut=cut))


def _require_apart(frozen: nn.Module, model: nn.Module, name: str) -> None:
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if trained.isdisjoint(map(id, frozen.parameters())):
        return
    fix = f"Load another one: {name}=AutoModelForCausalLM.from_pretrained(name)."
    if has_adapters(model) and name == "reference":
        fix = "PEFT puts adapters into the model itself: leave reference= out, and dpo() switches "
        fix += "them off."
    raise ConfigError(
        f"{name} has weights of the model that is trained, and would change with it. {fix}"
    )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model of PEFT without its adapters, in evaluation mode and without gradients.

    Modes and ``requires_grad`` are as before afterwards: PEFT makes every weight of the active
    adapter trainable when it switches adapters on.

    Raises:
        ModelError: Weights of the base are trained too, so that the model without adapters is not
            the one that training began with.
    """
    inner: Any = unwrap_model(model, adapters=False)
    adapters: Mapping[str, Any] = inner.peft_config
    parameters = list(inner.named_parameters())
    if trained := [
        name
        for name, parameter in parameters
        if parameter.requires_grad and adapters.keys().isdisjoint(name.split("."))
    ]:
        raise ModelError(
            f"{model_name(model)} trains {len(trained)} weights beside its adapters, the first of "
            f"them {trained[0]}, so that without adapters it is not the model that it was. Pass "
            "the model from before as reference=, or the column of reference_logps."
        )
    grads = [(parameter, parameter.requires_grad) for _, parameter in parameters]
    put_back = remember_modes(inner)
    inner.eval()
    try:
        with torch.no_grad(), _disabled(inner):
            yield inner
    finally:
        for parameter, needed in grads:
            if parameter.requires_grad != needed:
                parameter.requires_grad_(needed)
        put_back()


def has_adapters(model: nn.Module) -> bool:
    """Tell whether a model has adapters of PEFT."""
    return bool(getattr(unwrap_model(model, adapters=False), "peft_config", None))


@contextmanager
def _disabled(model: Any) -> Iterator[None]:
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()  # of a model of transformers with adapters of its own
    try:
        yield
    finally:
        model.enable_adapters()
