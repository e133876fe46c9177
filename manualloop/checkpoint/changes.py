"""What a run changes in a model, and what no ``state_dict`` has.

Buffers that are not persistent, attributes of modules, ``requires_grad`` and the modes of
submodules are noted when a run begins. A checkpoint holds those that differ from the notes, so that
a script which sets them up otherwise, on purpose, is not overruled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from copy import copy
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from manualloop.checkpoint.finite import names_infinite
from manualloop.checkpoint.functions import entries_read, forward_code
from manualloop.checkpoint.held import Held, changed_among, held_by
from manualloop.checkpoint.marks import MOST_BYTES, PLACES, marks_of
from manualloop.checkpoint.nested import take_apart
from manualloop.checkpoint.orders import ORDER
from manualloop.checkpoint.pretrained import find_tokenizer
from manualloop.checkpoint.tensors import num_bytes, require_places
from manualloop.errors import CheckpointError
from manualloop.models import is_sharded, unwrap_model
from manualloop.notices import say
from manualloop.objects import numbers_in
from manualloop.optimizers.inside import has_own_schedule, kept_beside
from manualloop.optimizers.together import each
from manualloop.state import TrainState
from manualloop.tasks.names import learn_names, splits_of

_OWN = {*vars(nn.Module()), "training"}
"""Attributes that every module has."""

_NOTES = {"_output_capturing_hooks_installed"}
"""Attributes of transformers 5 that note what was done to a model and would not be done again."""


class Baseline(NamedTuple):
    """How a run has found its model and its functions.

    Attributes:
        model: Weak reference to the model, unwrapped.
        marks: Mark of each thing by its kind and name, which differs once the thing is changed.
        functions: Functions of the run by name, such as the loss function, and forward methods of
            the script's own modules.
        numbers: Mark of each number, tensor and iterator that they hold.
        optimizers: Mark of what optimizers keep beside their ``state_dict``; None before a run.
        held: What modules of the functions, functions of schedules and the loader hold.
        infinite: Names of the weights that were infinite already.
        groups: Number of parameters in each group of each optimizer.
    """

    model: Any
    marks: dict[tuple[str, str], Any]
    functions: dict[str, Any]
    numbers: dict[str, Any]
    optimizers: dict[str, Any] | None
    infinite: frozenset[str]
    groups: tuple[list[int], ...]
    held: tuple[Held, ...] = ()


def note_run(state: TrainState, loader: Any, **functions: Any) -> None:
    """Note how a run finds its model and its functions, and what its loader was prepared with.

    Raises:
        DataError: A number means one class in the model and another one in the loader.
    """
    state.class_names = learn_names(state.model, loader) or state.class_names
    note_model(state)
    code = {**functions, **forward_code(state.model)}
    numbers, kept = _numbers_of(code, state), marks_of(dict(_kept_by_optimizers(state)))
    state.baseline = state.baseline._replace(
        functions=code,
        numbers=numbers,
        optimizers=kept,
        held=tuple(held_by(state, functions, loader)),
    )
    state.tokenizer = find_tokenizer(loader) or state.tokenizer
    state.splits = splits_of(loader) or state.splits


def _numbers_of(functions: Mapping[str, Any], state: TrainState) -> dict[str, Any]:
    """Return the marks of numbers, arrays and iterators that functions of a run read, by path."""
    kinds = (int, float, Tensor, np.ndarray, np.generic)
    beside = state.saved_holders()
    found = {
        f"the place in {path}" if isinstance(value, PLACES) else path: value
        for path, value in numbers_in(functions, beside=beside, kinds=kinds, places=PLACES).items()
    }
    for name, function in functions.items():
        found |= {f"{path} of {name}": value for path, value in entries_read(function)}
    return marks_of(found)


def forget_functions(state: TrainState) -> None:
    """Let go of the functions of a run that has ended; they may refer to its result."""
    if state.baseline is not None:
        state.baseline = state.baseline._replace(functions={}, numbers={}, held=())


def note_model(state: TrainState) -> None:
    """Note how a run finds its model, unless that was noted before."""
    model = unwrap_model(state.model, adapters=False)
    baseline: Baseline | None = state.baseline
    if baseline is None or baseline.model() is not model:
        marks = marks_of({(kind, name): value for kind, name, value in _parts(model)})
        infinite = frozenset(names_infinite(state))
        state.baseline = Baseline(ref(model), marks, {}, {}, None, infinite, _groups_of(state))


def _groups_of(state: TrainState) -> tuple[list[int], ...]:
    optimizers = each(state.optimizer)
    return tuple([len(group["params"]) for group in one.param_groups] for one in optimizers)


def _parts(
    model: nn.Module, saved: Collection[str] | None = None
) -> Iterator[tuple[str, str, Any]]:
    """Yield the kind, the name and the value of everything in a model that a run may change.

    Args:
        model: The model.
        saved: Names in its ``state_dict``, which are left out. None asks the model, except one that
            is sharded, which would take all ranks.
    """
    is_training, is_whole = unwrap_model(model).training, not is_sharded(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield "requires_grad", name, parameter.requires_grad
    for name, module in model.named_modules():
        # The loop puts a model that is in eval mode as a whole into training mode.
        yield "training", name, module.training or not is_training
    if saved is None:
        saved = model.state_dict().keys() if is_whole else ()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in saved:
            yield "buffers", name, buffer
    for name, module in model.named_modules() if is_whole else ():
        for attribute, value in list(vars(module).items()):
            if attribute not in _OWN and not callable(value) and attribute not in _NOTES:
                yield "attributes", f"{name}:{attribute}", value


def changes_of(
    state: TrainState, saved: Collection[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return what the run has changed in its model, by kind and name, and what cannot be saved.

    Args:
        state: State of the run.
        saved: Names in the model's ``state_dict``.
    """
    baseline: Baseline | None = state.baseline
    changes: dict[str, dict[str, Any]] = {}
    unsaved: list[str] = []
    model = unwrap_model(state.model, adapters=False)
    if baseline is None or baseline.model() is not model:
        return changes, unsaved
    parts = {(kind, name): value for kind, name, value in _parts(model, saved)}
    marks = marks_of(parts)
    for (kind, name), value in parts.items():
        if baseline.marks.get((kind, name)) == marks[kind, name] or _is_from_graph(value):
            continue
        if _can_be_saved(value):
            on_device = kind == "attributes" and _is_on_device(value)
            changes.setdefault("on device" if on_device else kind, {})[name] = value
        else:
            unsaved.append(f"{name.replace(':', '.')} of the model")
    if baseline.functions:
        numbers = _numbers_of(baseline.functions, state)
        unsaved += [path for path, mark in numbers.items() if baseline.numbers.get(path) != mark]
    unsaved += changed_among(baseline.held)
    noted = baseline.optimizers
    if noted is not None and not any(path.startswith("optimizer") for path in state.told):
        kept = marks_of(dict(_kept_by_optimizers(state)))
        unsaved += [path for path, mark in kept.items() if noted.get(path) != mark]
    return changes, unsaved


def _kept_by_optimizers(state: TrainState) -> Iterator[tuple[str, Any]]:
    """Yield what optimizers keep beside their ``state_dict``, which an extra may hold."""
    extras = {id(extra) for extra in state.extras.values()}
    optimizers = each(state.optimizer)
    for number, optimizer in enumerate(optimizers):
        path = "optimizer" if len(optimizers) == 1 else f"optimizer[{number}]"
        yield from kept_beside(path, optimizer, extras)
        if state.lr_scheduler is None and has_own_schedule(optimizer, state.extras.values()):
            yield f"{_SCHEDULE} {path}", [group["lr"] for group in optimizer.param_groups]


_SCHEDULE = "the schedule that moves the learning rate of the"


def _is_on_device(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device.type != "cpu"
    entries = value.values() if isinstance(value, dict) else value
    return isinstance(value, list | tuple | set | dict) and any(map(_is_on_device, entries))


def _is_from_graph(value: Any) -> bool:
    """Tell whether a value is an output of the last forward pass, which the next does not use."""
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    entries = value.values() if isinstance(value, dict) else value
    return isinstance(value, list | tuple | dict) and any(map(_is_from_graph, entries))


def _can_be_saved(value: Any) -> bool:
    tensors: dict[str, Tensor] = {}
    try:
        take_apart(value, "", tensors)
        require_places(tensors)
    except CheckpointError:
        return False
    return num_bytes(tensors) <= MOST_BYTES


def tell_unsaved(state: TrainState, unsaved: list[str]) -> None:
    """Log once what changes in the run and is in no checkpoint."""
    unsaved = [path for path in dict.fromkeys(unsaved) if path not in state.told]
    if unsaved:
        shown = ", ".join(unsaved[:_NUM_NAMED])
        more = f" and {len(unsaved) - _NUM_NAMED} more" if len(unsaved) > _NUM_NAMED else ""
        way = (
            "Keep it in a buffer of the model, or in extras as an object with state_dict() and "
            "load_state_dict()."
        )
        for path in unsaved:
            if path.startswith(ORDER):
                way = "Shuffle a copy in each pass: order = list(...); random.shuffle(order)."
            if path.startswith(_SCHEDULE):
                way = 'Keep it in the checkpoint: extras={"schedule": schedule}.'
            inner = path.removesuffix(".state")
            if path.startswith("optimizer") and inner != path and "." in inner:
                way = f'Keep it in the checkpoint: extras={{"inner": {inner}}}.'
        say(
            f"not in the checkpoint, though it changes during the run: {shown}{more}. A resumed "
            f"run begins with what the script sets. {way}"
        )
        state.told.update(unsaved)


_NUM_NAMED = 3


def tell_rebuilt(state: TrainState) -> None:
    """Log once that a run has added or removed weights, or groups of its optimizer.

    Its checkpoints fit that, and not what the script builds before a run.
    """
    baseline: Baseline | None = state.baseline
    model = unwrap_model(state.model, adapters=False)
    if baseline is None or baseline.model() is not model or _REBUILT in state.told:
        return
    before = {name for kind, name in baseline.marks if kind == "requires_grad"}
    now = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = [f"{name} is new" for name in sorted(now - before)[:_NUM_NAMED]]
    found += [f"{name} is gone" for name in sorted(before - now)[:_NUM_NAMED]]
    groups = _groups_of(state)
    if groups != baseline.groups:
        sizes = f"{_sizes(baseline.groups)} -> {_sizes(groups)} parameters"
        found += [f"groups of the optimizer: {sizes}"]
    if found:
        say(
            f"the run has changed what its checkpoints fit: {', '.join(found)}. The same command "
            "builds it as before, and cannot resume. Build it so before the run; an optimizer "
            "leaves parameters that are frozen as they are."
        )
        state.told.add(_REBUILT)


_REBUILT = "what the checkpoints fit"


def _sizes(groups: tuple[list[int], ...]) -> str:
    return " and ".join(" + ".join(map(str, one)) for one in groups)


def restore_changes(model: nn.Module, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Change a model as ``changes_of`` says. What the model does not have is left out."""
    model = unwrap_model(model, adapters=False)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, requires_grad in changes.get("requires_grad", {}).items():
        weight = parameters.get(name)
        if weight is not None and (weight.is_floating_point() or weight.is_complex()):
            weight.requires_grad_(requires_grad)
    for name, value in changes.get("buffers", {}).items():
        path, _, own = name.rpartition(".")
        if name in buffers and isinstance(value, Tensor):
            setattr(modules[path], own, _like(buffers[name], value))
    attributes = {**changes.get("attributes", {}), **changes.get("on device", {})}
    device = next((weight.device for weight in parameters.values()), None)
    for name, value in attributes.items():
        path, _, own = name.rpartition(":")
        is_weight = f"{path}.{own}".removeprefix(".") in {**parameters, **buffers, **modules}
        if path in modules and not is_weight and _is_data(type(modules[path]), own):
            if name in changes.get("on device", {}):
                value = _moved(value, device)
            modules[path].__dict__[own] = _like(vars(modules[path]).get(own), value)
    if modes := changes.get("training", {}):
        if not unwrap_model(model).training:
            model.train()  # else the loop would, and thaw them
        for name in modes.keys() & modules.keys():
            modules[name].training = modes[name]


def count_as_changed(state: TrainState, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Let later checkpoints hold what an earlier one has changed, whatever it is now.

    The model may have been so already, as in a notebook whose cell is run again. Another process
    builds it anew.
    """
    for kind, entries in changes.items():
        for name in entries:
            state.baseline.marks.pop(("attributes" if kind == "on device" else kind, name), None)


def _is_data(kind: type, name: str) -> bool:
    """Tell whether a class has neither code nor a descriptor by the name of an attribute."""
    value = getattr(kind, name, None)
    return name not in _OWN and not callable(value) and not hasattr(type(value), "__get__")


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        moved = copy(value)
        moved.update((key, _moved(entry, device)) for key, entry in value.items())
        return moved
    if isinstance(value, list | tuple | set):
        return type(value)(_moved(entry, device) for entry in value)
    return value


def _like(held: Any, value: Any) -> Any:
    """Return a value, in the place and on the device of the tensor that is held so far."""
    if not isinstance(held, Tensor) or not isinstance(value, Tensor):
        return value
    if held.shape == value.shape and held.dtype == value.dtype:
        with torch.no_grad():
            return held.copy_(value)
    return value.to(held.device)
