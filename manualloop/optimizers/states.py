"""The state of optimizers by the names of their parameters, without a change of bits.

torch keeps the state of a parameter under its number in the optimizer's list, and on loading casts
it to the parameter's dtype and leaves it in the order of memory in which it was read. A fused
kernel then pairs numbers that do not belong together, or reads beyond the end of a tensor. Here
the state is kept under the parameter's name, beside the parameter's shape, dtype and strides. It
comes back to that parameter with its own dtype and strides, or ``differences`` names what does not
fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from manualloop.notices import say
from manualloop.optimizers.fit import differences
from manualloop.optimizers.form import (
    KERNELS,
    Parameter,
    Saved,
    by_name,
    class_of,
    inner_of,
    names_of,
    read_state,
    take_state,
)


class OptimizerStates:
    """Optimizers as something with a state, by the names of their parameters.

    Args:
        label: Name for messages.
        optimizers: The optimizers.
        names: Parameters by name; one that is tied has several names.

    Attributes:
        optimizers: The optimizers.
    """

    def __init__(
        self, label: str, optimizers: Sequence[Optimizer], names: Mapping[str, Tensor]
    ) -> None:
        self._label, self.optimizers, self._names = label, tuple(optimizers), names

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each optimizer, with the tensors themselves as torch does."""
        return [take_state(optimizer, self._names) for optimizer in self.optimizers]

    def differences(self, saved: Any) -> list[str]:
        """Return what a saved state does not have in common with these optimizers, a line each."""
        if not isinstance(saved, Mapping | list | tuple):
            return [f"{self._label}: a {type(saved).__name__} was saved, which is no state"]
        states = _as_list(saved)
        if len(states) != len(self.optimizers):
            here = ", ".join(class_of(optimizer) for optimizer in self.optimizers)
            return [
                f"{self._label}: {len(states)} optimizers in the checkpoint, "
                f"{len(self.optimizers)} here ({here})"
            ]
        found = []
        for number, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True)):
            label = self._label if len(states) == 1 else f"{self._label}[{number}]"
            found += [f"{label}: {line}" for line in differences(optimizer, self._names, state)]
        return found

    def load_state_dict(self, saved: Any, *, copies: bool = True) -> None:
        """Load what ``state_dict`` returned, or the ``state_dict`` of a single torch optimizer.

        Args:
            saved: The state. What ``differences`` finds in it must be refused before.
            copies: Whether tensors are copied that could be used as they are.
        """
        for optimizer, state in zip(self.optimizers, _as_list(saved), strict=True):
            _load(optimizer, self._names, state, copies=copies)


def _as_list(saved: Any) -> list[Any]:
    # A dict is of release 0.1.0, or what torch's own optimizers return.
    return list(saved) if isinstance(saved, list | tuple) else [saved]


def _load(optimizer: Any, names: Mapping[str, Tensor], saved: Any, *, copies: bool) -> None:
    own = names_of(optimizer, names)
    read = read_state(saved, own, names)
    if read.in_own_form is not None:
        optimizer.load_state_dict(read.in_own_form)
        return
    inner, parameters = inner_of(optimizer), by_name(optimizer, own)
    number_of = {name: number for number, name in enumerate(parameters)}
    memo: dict[int, Tensor] = {}
    entries, groups = {}, []
    for group, named, saved_options in zip(inner.param_groups, own, read.options, strict=True):
        of_script = {name: group[name] for name in KERNELS if name in group}
        options = {**group, **saved_options, **of_script}
        counts_move = bool(options.get("fused") or options.get("capturable"))
        for name in [name for name in named if name in read.entries]:
            was, on_host = read.parameters.get(name), read.on_host.get(name, ())
            place = _Place(parameters[name], was, on_host, counts_move, copies, memo)
            entries[name] = _put(read.entries[name], place)
        options = {
            name: _put_option(value, group.get(name))
            for name, value in options.items()
            if name != "params"
        }
        groups.append({**options, "params": [number_of[name] for name in named]})
    first = next(iter(parameters.values()), None)
    others = {}
    for key, entry in read.others.items():
        beside = first if key in read.on_device else None
        others[key] = _put(entry, _Place(beside, None, (), True, copies, memo))
    numbered = {number_of[name]: _without_hidden(entry) for name, entry in entries.items()}
    state = {**numbered, **others}
    optimizer.load_state_dict({**read.more, "state": state, "param_groups": groups})
    is_torchs = type(inner).load_state_dict is Optimizer.load_state_dict
    if read.is_its_own and (read.kind is not None or is_torchs):
        for name, entry in entries.items():
            _undo_casts(entry, inner.state.get(parameters[name]))
    _report_strides(read, parameters)
    _report_kernels(read, inner)


def _without_hidden(entry: Any) -> Any:
    # torch would take these apart, as it does with lists.
    if not isinstance(entry, Mapping):
        return entry
    return {name: v for name, v in entry.items() if not isinstance(v, str | bytes | np.ndarray)}


def _undo_casts(entry: Any, loaded: Any) -> None:
    """Put back what was only cast or copied on loading; what an optimizer has changed stays."""
    if not isinstance(entry, Mapping) or not isinstance(loaded, dict):
        return
    for name, value in entry.items():
        own = loaded.get(name)
        if isinstance(value, Tensor):
            if isinstance(own, Tensor) and own.shape == value.shape and not _is_alike(own, value):
                loaded[name] = value
        elif isinstance(value, str | bytes | np.ndarray | Mapping | list | tuple):
            loaded[name] = value


def _is_alike(one: Tensor, other: Tensor) -> bool:
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return one.dtype == other.dtype
    return (one.dtype, one.device, one.stride()) == (other.dtype, other.device, other.stride())


class _Place(NamedTuple):
    """Where the tensors of an entry belong.

    Attributes:
        parameter: The parameter whose state it is; None for state of no parameter.
        was: The parameter as it was when the state was saved; None if unknown.
        on_host: Keys of tensors that stay on the CPU.
        counts_move: Whether step counts are beside the parameter, as fused kernels read them.
        copies: Whether tensors that could be used as they are are copied.
        memo: Tensors that were placed, by the identity of the saved one: some are shared.
    """

    parameter: Tensor | None
    was: Parameter | None
    on_host: Sequence[Any]
    counts_move: bool
    copies: bool
    memo: dict[int, Tensor]


def _put(value: Any, place: _Place, key: Any = None) -> Any:
    """Return a saved value with its tensors where they belong."""
    if isinstance(value, Tensor):
        if id(value) not in place.memo:
            place.memo[id(value)] = _put_tensor(value.detach(), place, key)
        return place.memo[id(value)]
    if isinstance(value, Mapping):
        copied: Any = copy(value)
        for name, item in value.items():
            copied[name] = _put(item, place, name)
        return copied
    if type(value) in (list, tuple):
        return type(value)(_put(item, place, key) for item in value)
    return deepcopy(value)


def _put_tensor(tensor: Tensor, place: _Place, key: Any) -> Tensor:
    parameter, like, device = place.parameter, tensor, tensor.device
    if parameter is not None:
        if key in place.on_host:
            device = torch.device("cpu")
        elif key != "step" or place.counts_move:
            device = parameter.device
        if tensor.shape == parameter.shape and parameter.layout is torch.strided:
            # As the optimizer would have made it for this parameter.
            stride = tensor.stride() if place.was is None else place.was.stride
            if stride == tensor.stride() != parameter.stride():
                like = parameter
    if tensor.layout is not torch.strided:
        return tensor.to(device, copy=place.copies)
    stride = torch.empty_like(like, device="meta").stride()
    if not place.copies and device == tensor.device and stride == tensor.stride():
        return tensor
    placed = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=device)
    return placed.copy_(tensor)


def _put_option(value: Any, own: Any) -> Any:
    if not isinstance(value, Tensor):
        return deepcopy(value)
    device = own.device if isinstance(own, Tensor) else value.device
    return value.detach().to(device, copy=True)


def _report_kernels(read: Saved, inner: Any) -> None:
    for saved, group in zip(read.options, inner.param_groups, strict=True):
        for name in KERNELS:
            was = saved.get(name)
            if isinstance(was, bool) and name in group and was != bool(group[name]):
                say(
                    f"not bit-exact, because {name} of the {type(inner).__name__} was "
                    f"{was} and is {group[name]}."
                )
                return


def _report_strides(read: Saved, parameters: Mapping[str, Tensor]) -> None:
    other = [
        name
        for name, parameter in parameters.items()
        if name in read.parameters
        and name in read.entries
        and parameter.stride() != read.parameters[name].stride
    ]
    if other:
        say(
            f"not bit-exact, because the memory of {len(other)} weights is in another order than "
            f"in the checkpoint (the first is {other[0]}): their optimizer state follows them."
        )
