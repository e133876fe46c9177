"""The form in which the state of an optimizer is saved: by the names of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manualloop.errors import CheckpointError
from manualloop.internals import unwrap_optimizer

KERNELS = ("foreach", "fused", "capturable", "differentiable")
"""Options that choose a kernel: they belong to the device and the script, not to the state."""

Names = list[list[str]]
"""Names of the parameters of each group."""


class Parameter(NamedTuple):
    """A parameter as it was when its state was saved.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        stride: Its strides.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]


class Saved(NamedTuple):
    """A saved state, whatever its form.

    Attributes:
        kind: Name of the optimizer's class; None if unknown.
        names: Names of the parameters of each group.
        options: Options of each group.
        entries: State of parameters, by name.
        others: State that belongs to no parameter.
        more: Further entries of the optimizer's ``state_dict``.
        parameters: Parameters as they were, by name; empty if unknown.
        is_its_own: Whether the tensors are those that the optimizer computes with.
        on_host: Keys of tensors that are on the CPU although their parameter is not, by name.
        on_device: Keys of state of no parameter that is not on the CPU.
        in_own_form: State of an optimizer whose ``state_dict`` has a form of its own.
    """

    kind: str | None
    names: Names
    options: list[dict[str, Any]]
    entries: dict[str, Any]
    others: dict[Any, Any]
    more: dict[str, Any]
    parameters: dict[str, Parameter]
    is_its_own: bool
    on_host: dict[str, list[Any]]
    on_device: list[Any]
    in_own_form: Any = None


def take_state(optimizer: Any, names: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the state of an optimizer by the names of its parameters.

    Raises:
        CheckpointError: It keeps state of parameters that are in none of its groups.
    """
    parameters, held = list(_parameters(optimizer)), getattr(inner_of(optimizer), "state", {})
    known = set(map(id, parameters))
    stray = [key for key in held if isinstance(key, Tensor) and id(key) not in known]
    if stray:
        raise CheckpointError(
            f"The {class_of(optimizer)} keeps state of {len(stray)} parameters that are in none of "
            f"its groups, the first of shape {tuple(stray[0].shape)}. Remove it as well: "
            "optimizer.state.pop(parameter)."
        )
    state_dict = optimizer.state_dict()
    own = names_of(optimizer, names)
    flat = [name for group in own for name in group]
    taken: dict[str, Any] = {
        "class": class_of(optimizer),
        "names": own,
        "parameters": {
            name: (tuple(p.shape), p.dtype, tuple(p.stride()))
            for name, p in zip(flat, parameters, strict=True)
        },
    }
    if not is_numbered(state_dict, own):
        return taken | {"own form": state_dict}
    packed = state_dict["param_groups"]
    name_of = dict(zip((i for group in packed for i in group["params"]), flat, strict=True))
    entries, others = {}, {}
    for key, entry in state_dict["state"].items():
        if type(key) is int and key in name_of:
            entries[name_of[key]] = entry
        else:
            others[key] = entry
    of_name = dict(zip(flat, parameters, strict=True))
    return taken | {
        "options": [_options(group) for group in packed],
        "state": entries,
        "others": others,
        "more": {k: v for k, v in state_dict.items() if k not in ("state", "param_groups")},
        "is its own": all(held.get(of_name[name]) is entry for name, entry in entries.items()),
        "on host": _on_host(entries, of_name),
        "on device": [key for key, entry in others.items() if _is_on_device(entry)],
    }


_NO_OPTIONS = ("params", "param_names")


def _on_host(entries: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    on_host = {}
    for name, entry in entries.items():
        if parameters[name].device.type == "cpu" or not isinstance(entry, Mapping):
            continue
        keys = [k for k, v in entry.items() if isinstance(v, Tensor) and v.device.type == "cpu"]
        if keys:
            on_host[name] = keys
    return on_host


def _is_on_device(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_on_device, value.values()))
    return isinstance(value, Tensor) and value.device.type != "cpu"


def is_numbered(state_dict: Any, names: Names) -> bool:
    """Tell whether a ``state_dict`` has the form of torch: state and groups by numbers."""
    if not isinstance(state_dict, Mapping):
        return False
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        return False
    if not all(isinstance(group, Mapping) for group in groups):
        return False
    numbers = [group.get("params") for group in groups]
    return len(numbers) == len(names) and all(
        isinstance(own, list | tuple)
        and len(own) == len(named)
        and all(type(number) is int for number in own)
        for own, named in zip(numbers, names, strict=True)
    )


def read_state(saved: Any, own: Names, names: Mapping[str, Tensor]) -> Saved:
    """Read a saved state; its parameters get their present names.

    Args:
        saved: The state, in the form of ``take_state`` or of torch.
        own: Present names of the parameters of each group.
        names: All names of parameters: one that is tied may have been saved by another name.

    Raises:
        ValueError: It has no known form.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"a {type(saved).__name__}")
    if "class" not in saved:
        return _read_numbered(saved, own)
    first = _first_names(names)

    def rename(name: str) -> str:
        return first[id(names[name])] if name in names else name

    named = [[rename(name) for name in group] for group in saved["names"]]
    parameters = {rename(name): _parameter(*was) for name, was in saved["parameters"].items()}
    if {name for group in named for name in group} != parameters.keys():
        raise ValueError("names without a parameter")
    if "own form" in saved:
        form = saved["own form"]
        return Saved(saved["class"], named, [], {}, {}, {}, parameters, False, {}, [], form)
    entries = {rename(name): entry for name, entry in saved["state"].items()}
    kept = [saved[key] for key in ("others", "more", "on host")]
    if not all(isinstance(part, Mapping) for part in [*kept, *saved["options"]]):
        raise ValueError("no mapping")
    if len(saved["options"]) != len(named) or not parameters.keys() >= entries.keys():
        raise ValueError("state or options without a parameter")
    return Saved(
        saved["class"],
        named,
        saved["options"],
        entries,
        saved["others"],
        saved["more"],
        parameters,
        bool(saved["is its own"]),
        {rename(name): list(keys) for name, keys in saved["on host"].items()},
        list(saved["on device"]),
    )


def _parameter(shape: Any, dtype: Any, stride: Any) -> Parameter:
    whole = all(type(number) is int for number in (*shape, *stride))
    if not whole or not isinstance(dtype, torch.dtype):
        raise ValueError("no shape, dtype and strides")
    return Parameter(tuple(shape), dtype, tuple(stride))


def _read_numbered(saved: Mapping[str, Any], own: Names) -> Saved:
    """Read what torch's optimizers return, and what release 0.1.0 has saved."""
    if not is_numbered(saved, own):
        return Saved(None, own, [], {}, {}, {}, {}, False, {}, [], in_own_form=saved)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    name_of = dict(zip(numbers, (name for group in own for name in group), strict=True))
    return Saved(
        kind=None,
        names=own,
        options=[_options(group) for group in saved["param_groups"]],
        entries={name_of[key]: v for key, v in saved["state"].items() if key in name_of},
        others={key: v for key, v in saved["state"].items() if key not in name_of},
        more={key: v for key, v in saved.items() if key not in ("state", "param_groups")},
        parameters={},
        is_its_own=True,
        on_host={},
        on_device=[],
    )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _NO_OPTIONS}


def inner_of(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper, which has no state of its own."""
    is_wrapper = type(optimizer).__module__.startswith("accelerate.")
    return unwrap_optimizer(optimizer) if is_wrapper else optimizer


def class_of(optimizer: Any) -> str:
    """Return the name of an optimizer's class, without accelerate's wrapper."""
    return type(unwrap_optimizer(optimizer)).__name__


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _first_names(names: Mapping[str, Tensor]) -> dict[int, str]:
    first: dict[int, str] = {}
    for name, parameter in names.items():
        first.setdefault(id(parameter), name)
    return first


def names_of(optimizer: Any, names: Mapping[str, Tensor]) -> Names:
    """Name the parameters of each group; those that have no name are numbered."""
    first, number = _first_names(names), 0
    named: Names = []
    for group in optimizer.param_groups:
        named.append([first.get(id(p), f"#{number + i}") for i, p in enumerate(group["params"])])
        number += len(group["params"])
    return named


def by_name(optimizer: Any, own: Names) -> dict[str, Tensor]:
    """Return the parameters of an optimizer by the names that ``names_of`` gives them."""
    flat = (name for group in own for name in group)
    return dict(zip(flat, _parameters(optimizer), strict=True))
