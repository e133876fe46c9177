"""What differs between a model and another one of its class, as it is built anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from manualloop.checkpoint.facts import module_settings
from manualloop.internals import attention_of, compiled_in_place, hooks_of_gradient

_FIX = "Eject the call with the model as it is loaded, and make the change in the script."


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
    yield from _of_dtypes(model, built)


def _weights(model: nn.Module) -> dict[str, Any]:
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def _shared(weights: Mapping[str, Any]) -> set[frozenset[str]]:
    """Return the names of each weight that has several."""
    names: dict[int, set[str]] = {}
    for name, weight in weights.items():
        names.setdefault(id(weight), set()).add(name)
    return {frozenset(found) for found in names.values() if len(found) > 1}


def _of_dtypes(model: Any, built: Any) -> Iterator[str]:
    """Yield what has another dtype than ``from_pretrained(..., dtype=model.dtype)`` gives it.

    That converts what is stored; adapters, and tables that are computed, keep theirs.
    """
    is_adapted = hasattr(built, "peft_config")
    stored = built.state_dict(keep_vars=True)
    main, before = model.dtype, _weights(built)
    for name, weight in _weights(model).items():
        other = before[name]
        is_adapter = is_adapted and other.requires_grad and ".modules_to_save." not in name
        is_converted = name in stored and other.is_floating_point() and not is_adapter
        wanted = main if is_converted else other.dtype
        if weight.dtype != wanted:
            yield (
                f"{name} is of {weight.dtype}, and of {wanted} in the model that a script would "
                f"load. Convert nothing after loading: from_pretrained(..., dtype={main})."
            )
            return
