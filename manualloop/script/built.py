"""The model that a script loads, built without weights, and what differs between it and another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from manualloop.checkpoint.facts import module_settings
from manualloop.internals import compiled_in_place, hooks_of_gradient
from manualloop.libraries import attention_of
from manualloop.randomness import random_states_kept

_FIX = "Eject the call with the model as it is loaded, and make the change in the script."


def build(model: Any, base: Any, config: Any, dtype: torch.dtype) -> Any:
    """Build what ``from_pretrained`` makes of a config, and PEFT of that, on the meta device.

    Which weights keep a dtype of their own, and which are trained, is decided by
    ``from_pretrained``, so it gets weights: those of a model that is built from the config.

    Args:
        model: The model with the wrappers of PEFT.
        base: The model without them.
        config: The config that is loaded.
        dtype: The dtype that it is loaded in.
    """
    kind, meta = type(base), torch.device("meta")
    with random_states_kept(devices=False), _without_bars():
        with meta:
            empty = kind(config)
            empty.tie_weights()
        weights: dict[int, tuple[str, Any]] = {}
        for name, weight in empty.state_dict(keep_vars=True).items():
            weights.setdefault(id(weight), (name, weight.detach()))  # as a file has tied weights
        built = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights.values()),
            device_map=meta,
            **{name_of_dtype(config): dtype},
        )
        if model is not base:
            adapter = deepcopy(model.peft_config[model.active_adapter])
            adapter.inference_mode, adapter.init_lora_weights = False, True  # no other has a shape
            with meta:
                built = type(model)(built, adapter)
    return built


@contextmanager
def _without_bars() -> Iterator[None]:
    bars: Any = logging
    is_seen = bars.is_progress_bar_enabled()
    if is_seen:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if is_seen:
            bars.enable_progress_bar()


def name_of_dtype(config: Any) -> str:
    """Return the argument of ``from_pretrained`` for the dtype (before 4.56 ``torch_dtype``)."""
    return "dtype" if hasattr(config, "dtype") else "torch_dtype"


def convert(model: nn.Module, built: nn.Module) -> list[tuple[str, torch.dtype]]:
    """Convert parts of the model built anew to the dtypes that they have in a model.

    Returns:
        The outermost parts that were converted, by their paths, with their dtypes.
    """
    ours, theirs = _weights(model), _weights(built)
    if ours.keys() != theirs.keys():
        return []
    changed = {name for name, weight in ours.items() if weight.dtype != theirs[name].dtype}
    found: list[tuple[str, torch.dtype]] = []
    for path, module in model.named_modules() if changed else ():
        prefix = f"{path}." if path else ""
        if any(not part or path.startswith(f"{part}.") for part, _ in found):
            continue
        inner = [prefix + name for name in _weights(module)]
        dtypes = {ours[name].dtype for name in inner if ours[name].is_floating_point()}
        if len(dtypes) == 1 and not changed.isdisjoint(inner):
            found.append((path, dtypes.pop()))
    for path, dtype in found:
        built.get_submodule(path).to(dtype)
    return found


def changed_settings(
    model: nn.Module, built: nn.Module
) -> dict[tuple[type[nn.Module], str, Any], list[str]]:
    """Return plain attributes of modules that have other values than in the model built anew.

    Returns:
        The paths of modules, by their class, the name of the attribute and its value.
    """
    before = {(path, name): value for path, _, name, value in module_settings(built)}
    modules = dict(model.named_modules())
    found: dict[tuple[type[nn.Module], str, Any], list[str]] = {}
    for path, _, name, value in module_settings(model):
        if before.get((path, name), value) != value:
            module = modules[path]
            found.setdefault((type(module), name, getattr(module, name)), []).append(path)
    return found


def differences(model: nn.Module, built: nn.Module) -> Iterator[str]:
    """Yield what of a model is neither in the one built anew nor in ``changed_settings``."""
    ours, theirs = dict(model.named_modules()), dict(built.named_modules())
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        kinds = [type(found[name]).__name__ if name in found else None for found in (ours, theirs)]
        one, other = (getattr(found.get(name), "__class__", None) for found in (ours, theirs))
        if _name_of(one) != _name_of(other):  # weight_norm makes a class of each module
            yield (
                f"{name or 'the model'} is {_a(kinds[0])}, and {_a(kinds[1])} in the model that a "
                f"script would load. {_FIX}"
            )
            return
    for name, module in ours.items():
        if found := [*_of_module(module, theirs[name])]:
            yield f"{name or 'the model'} {found[0]}, which is not written out. {_FIX}"
            return
    yield from _of_weights(model, built)


def _a(kind: str | None) -> str:
    return "missing" if kind is None else f"a {kind}"


def _of_module(ours: nn.Module, theirs: nn.Module) -> Iterator[str]:
    if _hooks(ours) - _hooks(theirs):
        yield "has hooks"
    if compiled_in_place(ours):
        yield "was compiled"
    before = vars(theirs)
    for name, value in vars(ours).items():
        if name not in before and isinstance(getattr(type(ours), name, None), FunctionType):
            yield f"has {name}() of its own"
        if isinstance(value, _FUNCTIONS) and _name_of(value) != _name_of(before.get(name, value)):
            yield f"has another {name}"
    config, other = vars(ours).get("config"), before.get("config")
    if attention_of(config) != attention_of(other):
        yield f"has the attention {attention_of(config)!r}"
    experts: list[Any] = [
        getattr(one, "get_experts_implementation", dict)() for one in (ours, theirs)
    ]
    if experts[0] != experts[1]:
        yield f"has experts_implementation={experts[0]}"


_FUNCTIONS = (FunctionType, BuiltinFunctionType)


def _name_of(function: Any) -> str:
    module, name = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
    return f"{module}.{name}"


def _hooks(module: nn.Module) -> set[str]:
    """Name the functions that see inputs, outputs or gradients, without those of libraries."""
    return {
        name
        for kind, hooks in vars(module).items()
        if kind.endswith("_hooks") and ("forward" in kind or "backward" in kind)
        for name in map(_name_of, hooks.values())
        if not name.startswith(("transformers.", "peft."))
    }


def _of_weights(model: nn.Module, built: nn.Module) -> Iterator[str]:
    ours, theirs = _weights(model), _weights(built)
    if ours.keys() != theirs.keys():
        names = sorted(ours.keys() ^ theirs.keys())
        yield f"{names[0]} is in one of the two, the model and what a script would load. {_FIX}"
        return
    for name, weight in ours.items():
        if weight.shape != theirs[name].shape:
            yield (
                f"{name} has the shape {tuple(weight.shape)}, and {tuple(theirs[name].shape)} in "
                f"the model that a script would load. {_FIX}"
            )
            return
    if _shared(ours) != _shared(theirs):
        yield f"other weights are tied than in the model that a script would load. {_FIX}"
    for name, parameter in model.named_parameters():
        if hooks_of_gradient(parameter):
            yield f"{name} has a hook that sees its gradient, which is not written out. {_FIX}"
            return
    for name, weight in ours.items():
        if weight.dtype != theirs[name].dtype:
            yield (
                f"{name} is of {weight.dtype}, and of {theirs[name].dtype} in the model that a "
                f"script would load, and not all of its module was converted. {_FIX}"
            )
            return


def _weights(model: nn.Module) -> dict[str, Any]:
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def _shared(weights: Mapping[str, Any]) -> set[frozenset[str]]:
    """Return the names of each weight that has several."""
    names: dict[int, set[str]] = {}
    for name, weight in weights.items():
        names.setdefault(id(weight), set()).add(name)
    return {frozenset(found) for found in names.values() if len(found) > 1}
