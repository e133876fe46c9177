"""What a saved state and an optimizer do not have in common, found before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from manualloop.optimizers.form import (
    KERNELS,
    Names,
    Saved,
    by_name,
    class_of,
    inner_of,
    is_numbered,
    names_of,
    read_state,
)


def differences(optimizer: Any, names: Mapping[str, Tensor], saved: Any) -> list[str]:
    """Return what an optimizer does not have in common with a saved state, a line each.

    Args:
        optimizer: The optimizer that is to get the state.
        names: Parameters by all their names.
        saved: The state.
    """
    try:
        return list(_differences(optimizer, names, saved))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return [f"its saved state cannot be read: {error!r:.100}"]


def _differences(optimizer: Any, names: Mapping[str, Tensor], saved: Any) -> Iterator[str]:
    own, kind = names_of(optimizer, names), class_of(optimizer)
    if isinstance(saved, Mapping) and "param_groups" in saved and "class" not in saved:
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != list(map(len, own)):
            yield f"groups of {sizes} parameters in the checkpoint, of {list(map(len, own))} here"
            return
    read, parameters = read_state(saved, own, names), by_name(optimizer, own)
    is_in_own_form, inner = not is_numbered(optimizer.state_dict(), own), inner_of(optimizer)
    for part in ("others", "more"):
        if not isinstance(getattr(read, part), Mapping):
            raise TypeError(f"{part} is a {type(getattr(read, part)).__name__}")
    if read.kind not in (None, kind):
        yield f"{read.kind} in the checkpoint, {kind} here"
        return
    yield from _other_names(read, own)
    if (read.in_own_form is not None) != is_in_own_form:
        yield "its saved state has another form"
        return
    for name, was in read.parameters.items():
        here = parameters.get(name)
        if here is not None and (was.shape, was.dtype) != (tuple(here.shape), here.dtype):
            yield (
                f"{name} is {was.dtype} {was.shape} in the checkpoint, {here.dtype} "
                f"{tuple(here.shape)} here"
            )
    if read.in_own_form is None:
        yield from _misfits(read, inner, parameters)


def _other_names(read: Saved, own: Names) -> Iterator[str]:
    theirs = read.names
    in_checkpoint = {name: number for number, group in enumerate(theirs) for name in group}
    here = {name: number for number, group in enumerate(own) for name in group}
    for name in dict.fromkeys((*in_checkpoint, *here)):
        if name not in here:
            yield f"{name} is in the checkpoint only"
        elif name not in in_checkpoint:
            yield f"{name} is in the run only"
        elif in_checkpoint[name] != here[name]:
            yield (
                f"{name} is in group {in_checkpoint[name]} in the checkpoint, in group "
                f"{here[name]} here"
            )
    if len(theirs) != len(own):
        yield f"{len(theirs)} groups in the checkpoint, {len(own)} here"
    if read.in_own_form is not None and theirs != own:
        yield "its parameters are in another order than in the checkpoint"


# State of torch's own optimizers that has the shape of the parameter, in the versions 2.6 to 2.14.
# A step without one of them fails, or without one of those that come with an option.
_MOMENTS: dict[str, tuple[str, ...]] = {
    "ASGD": ("ax",),
    "Adadelta": ("square_avg", "acc_delta"),
    "Adagrad": ("sum",),
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adamax": ("exp_avg", "exp_inf"),
    "Muon": ("momentum_buffer",),
    "NAdam": ("exp_avg", "exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "RMSprop": ("square_avg",),
    "Rprop": ("prev", "step_size"),
    "SGD": (),
    "SparseAdam": ("exp_avg", "exp_avg_sq"),
}
# torch averages these with the gradient by ``lerp_``, which takes two tensors of one dtype.
_AVERAGES = {
    **dict.fromkeys(("Adam", "AdamW", "Adamax", "NAdam", "RAdam"), "exp_avg"),
    "Muon": "momentum_buffer",
}
_OF_OPTIONS = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
_MORE_MOMENTS = ("momentum_buffer", *_OF_OPTIONS.values())
_NUMBERS: dict[str, tuple[str, ...]] = {
    "ASGD": ("step", "eta", "mu"),
    "Muon": (),
    "NAdam": ("step", "mu_product"),
    "SGD": (),
}


def _misfits(read: Saved, inner: Any, parameters: Mapping[str, Tensor]) -> Iterator[str]:
    """Name the options and tensors that this optimizer cannot compute with.

    What kernels of torch take is known; what other optimizers keep is not.
    """
    kind = _torch_kind(inner)
    for number, (saved, group) in enumerate(zip(read.options, inner.param_groups, strict=False)):
        for name in [name for name in saved if name in group and name not in KERNELS]:
            if not _is_like(name, saved[name], group[name], is_strict=kind is not None):
                yield (
                    f"{name} of group {number} is {saved[name]!r:.60} in the checkpoint, "
                    f"{group[name]!r:.60} here"
                )
    if kind is None:
        return
    for names, saved, group in zip(read.names, read.options, inner.param_groups, strict=False):
        options = {**saved, **{name: group.get(name) for name in KERNELS}}
        for name in names:
            entry, parameter = read.entries.get(name, {}), parameters.get(name)
            if parameter is not None and (problem := _misfit(entry, parameter, kind, options)):
                yield f"the state of {name}: {problem}"


def _misfit(entry: Any, parameter: Tensor, kind: str, options: Mapping[str, Any]) -> str | None:
    if not isinstance(entry, Mapping):
        return f"a {type(entry).__name__}"
    if not entry:
        return None
    required = [
        *_MOMENTS[kind],
        *(name for option, name in _OF_OPTIONS.items() if options.get(option)),
        *(["momentum_buffer"] if kind == "RMSprop" and options.get("momentum") else []),
    ]
    for name in dict.fromkeys((*required, *_MORE_MOMENTS)):
        value = entry.get(name)
        if value is None and name not in required:
            continue
        if not isinstance(value, Tensor):
            return f"{name} is {value!r:.40}"
        if value.shape != parameter.shape:
            return f"{name} has the shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
        # Some keep float32 moments of weights of fewer bits; the kernels take nothing smaller.
        wider = () if parameter.is_complex() else (torch.float32, torch.float64)
        if value.dtype not in (parameter.dtype, *wider):
            return f"{name} is {value.dtype}, the parameter {parameter.dtype}"
        if value.dtype != parameter.dtype and options.get("fused"):
            return f"{name} is {value.dtype}, the parameter {parameter.dtype}, under a fused kernel"
        if value.dtype != parameter.dtype and _AVERAGES.get(kind) == name:
            return f"{name} is {value.dtype}, which {kind} cannot mix with {parameter.dtype}"
    for name in _NUMBERS.get(kind, ("step",)):
        if not _is_count(value := entry.get(name)):
            return f"{name} is {value!r:.40}"
    return None


def _is_count(value: Any) -> bool:
    """Tell whether a value is a step or another number that torch keeps of a parameter."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.dtype in _DTYPES_OF_COUNTS
    return type(value) in (int, float) and bool(0 <= value < _MOST)


_DTYPES_OF_COUNTS = (torch.float32, torch.float64, torch.int32, torch.int64)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_like(name: str, saved: Any, own: Any, *, is_strict: bool) -> bool:
    """Tell whether an option has a value of the kind that the optimizer has now."""
    if own is None:
        return True
    if saved is None:
        return not is_strict or not (_is_number(own) or isinstance(own, bool | list | tuple))
    if isinstance(own, list | tuple):
        return (
            isinstance(saved, list | tuple)
            and len(saved) == len(own)
            and all(
                _is_like(name, a, b, is_strict=is_strict) for a, b in zip(saved, own, strict=True)
            )
        )
    if _is_number(own):
        return _is_number(saved) and (not is_strict or _is_in_range(name, saved))
    return isinstance(saved, type(own))


def _is_in_range(name: str, saved: Any) -> bool:
    if isinstance(saved, Tensor):
        return True  # looking at it would wait for the device
    if name == "betas":
        return bool(0 <= saved < 1)
    least = 0 if name in ("lr", "eps", "weight_decay", "momentum") else -_MOST
    return bool(least <= saved < _MOST)


_MOST = 1e30


def _torch_kind(inner: Any) -> str | None:
    """Return the class of torch whose ``step`` an optimizer has; None for one of another."""
    kind = next((k for k in type(inner).__mro__ if k.__module__.startswith("torch.optim.")), None)
    if kind is None or kind.__name__ not in _MOMENTS:
        return None
    own_step, step = type(inner).step, kind.step  # type: ignore[attr-defined]
    return kind.__name__ if inspect.unwrap(own_step) is inspect.unwrap(step) else None
