"""The objects that an object is made of, found without running any of its code.

A path leads from a named object to one of its parts: ``loader.dataset.transforms[0].generator``.
``walk`` finds all parts, ``follow`` the one at the end of a path, and ``put`` replaces it.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import PurePath
from types import (
    BuiltinMethodType,
    CodeType,
    FrameType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

MOST_ENTRIES, MOST_OBJECTS = 1_000, 200_000


class Part(NamedTuple):
    """An object, and where it was found.

    Attributes:
        value: The object.
        holder: The object that it is a part of; None: it is where the path begins.
        step: The step of the path from the holder to it.
    """

    value: Any
    holder: Any
    step: str


def walk(owners: Mapping[str, Any], *, skips_empty: bool = False) -> Iterator[tuple[str, Part]]:
    """Yield the parts of some objects by their paths, each once: nearest first, code's last.

    Parts are the values of attributes and slots, the entries of containers, the object and the
    arguments of bound methods and partials, and what functions have in closures and defaults. Of
    functions and classes that are not part of an installed library they are also class attributes
    and the global variables that the code names. No property is read, no ``__getattr__`` called,
    no iterator advanced. The paths are the same in every process that builds its objects alike.

    Left out are tensors, arrays, tables, numbers and texts, modules and classes of libraries,
    the frames of running Python generators, what iterators and weak references refer to, entries
    of a set of several objects, entries of a container beyond the first 1,000, and whatever comes
    after 200,000 objects.

    Args:
        owners: The objects by their names.
        skips_empty: Whether empty containers are left out too. A module of torch has a dozen, and
            a model without them is searched in a third of the time.

    >>> [path for path, _ in walk({"run": {"rows": [[1], [2]], "name": "a"}})]
    ['run', "run['rows']", "run['rows'][0]", "run['rows'][1]"]
    """
    shapes: dict[type, _Shape] = {}
    seen: dict[int, Any] = {}  # with the objects: another must not get the id of one that is gone
    queue = deque((name, Part(value, None, "")) for name, value in owners.items())
    of_code: deque[tuple[str, Part]] = deque()
    while (queue or of_code) and len(seen) < MOST_OBJECTS:
        path, part = (queue or of_code).popleft()
        if id(part.value) in seen:
            continue
        seen[id(part.value)] = part.value
        yield path, part
        if _has_inert_entries_only(part.value, shapes):
            continue
        for step, child in _steps(part.value, shapes):
            kind = type(child)
            if kind in _PLAIN_CONTAINERS and skips_empty and not child:
                continue
            if id(child) not in seen and not _shape_of(kind, shapes).is_inert:
                is_of_code = step.startswith((".__class__", ".__globals__"))
                (of_code if is_of_code else queue).append(
                    (path + step, Part(child, part.value, step))
                )


def numbers_in(
    owners: Mapping[str, Any],
    *,
    beside: Mapping[str, Any],
    kinds: tuple[type, ...] = (int, float, torch.Tensor),
    places: tuple[type, ...] = (),
) -> dict[str, Any]:
    """Return the numbers and tensors that some objects hold, by their paths.

    Left out are entries of containers, which are records more often than a state, and what modules
    and objects of libraries hold, except a namespace.

    Args:
        owners: The objects by their names, such as functions.
        beside: Other objects by their names; what they hold is left out, too.
        kinds: Types of what is returned.
        places: Types of what is returned also where it is an entry of a list, a tuple or a dict.

    >>> def decayed(loss, *, rate=0.9): ...
    >>> numbers_in({"loss_fn": decayed}, beside={})
    {'loss_fn.__kwdefaults__.rate': 0.9}
    """
    shapes: dict[type, _Shape] = {}
    found: dict[str, Any] = {}
    for path, (value, _, _) in walk({**beside, **owners}, skips_empty=True):
        kind = type(value)
        if not any(_begins(path, name) for name in owners) or issubclass(kind, torch.nn.Module):
            continue
        if kind in _PLAIN_CONTAINERS and (not places or _has_inert_entries_only(value, shapes)):
            continue
        is_data = kind in (FunctionType, type, *NAMESPACES, *_PLAIN_CONTAINERS)
        if not is_data and _shape_of(kind, shapes).is_of_library:
            continue
        for step, child in _steps(value, shapes):
            if issubclass(type(child), places if step.startswith("[") else (*kinds, *places)):
                found[path + step] = child
    return found


def follow(path: str, owners: Mapping[str, Any]) -> Part:
    """Return what is at the end of a path; with the value None if only the last step is missing.

    Raises:
        LookupError: The path cannot be followed to its last holder.
    """
    name = next((name for name in owners if _begins(path, name)), None)
    if name is None:
        raise LookupError("nothing is known by this name")
    part, rest = Part(owners[name], None, ""), path[len(name) :]
    shapes: dict[type, _Shape] = {}
    while rest:
        steps = [found for found in _steps(part.value, shapes) if _begins(rest, found[0])]
        if not steps:
            if part.value is None:
                raise LookupError("its holder is missing")
            return Part(None, part.value, rest)
        step, value = max(steps, key=lambda found: len(found[0]))
        part, rest = Part(value, part.value, step), rest[len(step) :]
    return part


def put(holder: Any, step: str, value: Any) -> None:
    """Let a step from a holder lead to another object, past ``__setattr__`` and the like.

    Raises:
        LookupError: There is no such place, or it cannot be written to.
    """
    kind, _, name = step.rpartition(".")
    if step.startswith("[") and issubclass(type(holder), dict | list):
        try:
            key = ast.literal_eval(step[1:-1])
        except (SyntaxError, ValueError) as error:  # it is more than one step
            raise LookupError("its holder is missing") from error
        base: Any = dict if issubclass(type(holder), dict) else list
        base.__setitem__(holder, key, value)
    elif type(holder) is FunctionType and kind == ".__closure__":
        cells = dict(zip(holder.__code__.co_freevars, holder.__closure__ or (), strict=True))
        cells[name].cell_contents = value
    elif type(holder) is FunctionType and kind.startswith(".__globals__"):
        module = kind.removeprefix(".__globals__").removeprefix(".")
        names = vars(holder.__globals__[module]) if module else holder.__globals__
        names[name] = value
    elif kind == "" and name.isidentifier():
        shape = _shape_of(type(holder), {})
        if (slot := dict(shape.slots).get(name)) is not None:
            slot.__set__(holder, value)
        else:
            shape.vars_of(holder)[name] = value
    else:
        raise LookupError("its place cannot be written to")


def remember(owners: Mapping[str, Any]) -> Callable[[], None]:
    """Return a function that makes the parts of some objects refer to what they refer to now.

    It restores attributes, slots, variables, and containers of up to 1,000 entries. It cannot
    restore the numbers in tensors and arrays, nor iterators.
    """
    undo: list[Callable[[], None]] = []
    shapes: dict[type, _Shape] = {}
    for _, (value, _, _) in walk(owners):
        kind = type(value)
        if kind is FunctionType:
            steps = [step for step in _steps(value, shapes) if step[0].startswith(_VARIABLES)]
            undo += [partial(put, value, *step) for step in steps]
            undo.append(partial(_restore_names, vars(value), dict(vars(value))))
        elif issubclass(kind, type):
            undo.append(partial(_restore_class, value, dict(vars(value))))
        else:
            shape = _shape_of(kind, shapes)
            if shape.get_vars is not None:
                names = shape.vars_of(value)
                undo.append(partial(_restore_names, names, dict(names)))
            for name, child in _steps_of_slots(value, shape):
                undo.append(partial(put, value, name, child))
            base: Any = next((base for base in _CONTAINERS if issubclass(kind, base)), None)
            if base is not None and base.__len__(value) <= MOST_ENTRIES:
                undo.append(partial(_restore_entries, value, base, _entries_of(value, base)))

    def restore() -> None:
        for call in undo:
            with suppress(AttributeError, LookupError, TypeError):  # it is read-only
                call()

    return restore


_VARIABLES = (".__closure__", ".__globals__")
_CONTAINERS = (OrderedDict, dict, list, deque, set)


def _restore_names(names: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in names if name not in before]:
        del names[name]
    for name, value in before.items():
        if name not in names or names[name] is not value:
            names[name] = value


def _restore_class(kind: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(kind) if name not in before]:
        type.__delattr__(kind, name)
    for name, value in before.items():
        if vars(kind).get(name) is not value:
            type.__setattr__(kind, name, value)


def _entries_of(container: Any, base: Any) -> list[Any]:
    """List the entries of a container; of a dict, its pairs of key and value."""
    if issubclass(base, dict):
        return list(dict.items(container))
    return list(base.__iter__(container))


def _restore_entries(container: Any, base: Any, before: list[Any]) -> None:
    now = _entries_of(container, base)
    if issubclass(base, dict):
        is_same = [(id(k), id(v)) for k, v in now] == [(id(k), id(v)) for k, v in before]
    else:
        is_same = list(map(id, now)) == list(map(id, before))
    if is_same:
        return
    base.clear(container)
    for entry in before:
        if issubclass(base, dict):
            base.__setitem__(container, *entry)
        else:
            (base.add if base is set else base.append)(container, entry)


@cache
def is_of_library(module: object) -> bool:
    """Tell whether a module, by its name, belongs to Python or to an installed library."""
    name = module if isinstance(module, str) else ""
    if name.partition(".")[0] in (*sys.stdlib_module_names, "manualloop"):
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return isinstance(file, str) and not {"site-packages", "dist-packages"}.isdisjoint(
        PurePath(file).parts
    )


NAMESPACES = (SimpleNamespace, argparse.Namespace)
"""Classes of Python whose objects are what the script puts into them."""


def _begins(path: str, step: str) -> bool:
    return path.startswith(step) and path[len(step) : len(step) + 1] in ("", ".", "[")


_INERT = (
    *(str, bytes, bytearray, memoryview, int, float, complex, range, type(None), type(Ellipsis)),
    *(torch.Tensor, torch.dtype, torch.device, np.ndarray, np.generic, np.dtype),
    *(ModuleType, CodeType, FrameType, GetSetDescriptorType, MemberDescriptorType),
)
_INERT_LIBRARIES = {
    *("pyarrow", "pandas", "polars", "PIL", "h5py", "tokenizers", "re", "weakref", "logging"),
    *("threading", "_thread", "multiprocessing", "concurrent", "asyncio"),
}
_INERT_PACKAGES = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx")


class _Shape(NamedTuple):
    """Facts about a type that the search needs."""

    is_inert: bool
    get_vars: Any
    slots: tuple[tuple[str, Any], ...]
    is_of_library: bool

    def vars_of(self, value: Any) -> dict[str, Any]:
        found = None if self.get_vars is None else self.get_vars.__get__(value)
        return found if isinstance(found, dict) else {}


def _shape_of(kind: type, shapes: dict[type, _Shape]) -> _Shape:
    if (shape := shapes.get(kind)) is None:
        if (shape := _LASTING.get(kind)) is None:
            shape = _describe(kind)
            module = kind.__module__ if shape.is_of_library else None
            if getattr(sys.modules.get(module or ""), kind.__name__, None) is kind:
                _LASTING[kind] = shape
        shapes[kind] = shape
    return shape


_LASTING: dict[type, _Shape] = {}
"""The types that modules of libraries define, which most searches meet, and which stay anyway."""


def _describe(kind: type) -> _Shape:
    module = kind.__module__ if isinstance(kind.__module__, str) else ""
    is_inert = (
        issubclass(kind, _INERT)
        or module.partition(".")[0] in _INERT_LIBRARIES
        or module.startswith(_INERT_PACKAGES)
    )
    if is_inert:
        return _Shape(True, None, (), True)
    get_vars: Any = None
    slots: dict[str, Any] = {}
    for base in kind.__mro__:
        for name, value in vars(base).items():
            if name == "__dict__":
                get_vars = get_vars or value
            elif type(value) is MemberDescriptorType:
                slots.setdefault(value.__name__, value)
    if type(get_vars) not in (GetSetDescriptorType, MemberDescriptorType):
        get_vars = None  # a property of that name would be code
    return _Shape(False, get_vars, tuple(slots.items()), is_of_library(module))


_PLAIN_CONTAINERS = (dict, OrderedDict, list, tuple, deque, set, frozenset)


def _has_inert_entries_only(value: Any, shapes: dict[type, _Shape]) -> bool:
    # A list of losses grows with a run; one look at its types costs nothing of note.
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        value = value.values()
    elif kind not in _PLAIN_CONTAINERS:
        return False
    return all(_shape_of(kind, shapes).is_inert for kind in set(map(type, value)))


def _steps(value: Any, shapes: dict[type, _Shape]) -> Iterable[tuple[str, Any]]:
    """Yield the steps from an object to its parts, inert ones included."""
    kind = type(value)
    if kind is FunctionType:
        yield from _steps_of_function(value)
        return
    if issubclass(kind, type):
        yield from _steps_of_class(value)
        return
    shape = _shape_of(kind, shapes)
    if shape.is_inert:
        return
    for name, child in list(shape.vars_of(value).items()):
        if not (name == "_iterator" and issubclass(kind, DataLoader)):  # of the pass under way
            yield f".{name}", child
    yield from _steps_of_slots(value, shape)
    if issubclass(kind, dict | list | tuple | set | frozenset | deque):
        yield from _steps_of_container(value, shapes)
    elif kind is BuiltinMethodType:
        yield ".__self__", value.__self__
    if not shape.is_of_library:
        yield ".__class__", kind


def _steps_of_slots(value: Any, shape: _Shape) -> Iterable[tuple[str, Any]]:
    for name, slot in shape.slots:
        try:
            yield f".{name}", slot.__get__(value)
        except AttributeError:  # it has no value yet
            continue


def _steps_of_container(value: Any, shapes: dict[type, _Shape]) -> Iterable[tuple[str, Any]]:
    kind = type(value)
    if issubclass(kind, dict):
        for number, (key, child) in enumerate(list(islice(dict.items(value), MOST_ENTRIES))):
            is_plain = type(key) in (str, int, bool, type(None))
            yield f"[{key!r}]" if is_plain else f"[#{number}]", child
    elif issubclass(kind, set | frozenset):
        if len(entries := objects_of_set(value, shapes)) == 1:
            yield "[#0]", entries[0]  # of several, the order differs from process to process
    else:
        base: Any = next(base for base in (list, tuple, deque) if issubclass(kind, base))
        for number, child in enumerate(list(islice(base.__iter__(value), MOST_ENTRIES))):
            yield f"[{number}]", child


def objects_of_set(entries: Any, shapes: dict[type, _Shape] | None = None) -> list[Any]:
    """Return the entries of a set that are made of parts."""
    base: Any = set if issubclass(type(entries), set) else frozenset
    shapes = {} if shapes is None else shapes
    some = list(islice(base.__iter__(entries), MOST_ENTRIES))
    return [entry for entry in some if not _shape_of(type(entry), shapes).is_inert]


def _steps_of_function(function: FunctionType) -> Iterable[tuple[str, Any]]:
    code, names = function.__code__, function.__globals__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".__closure__.{name}", cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    for number, child in enumerate(function.__defaults__ or ()):
        yield f".__defaults__[{number}]", child
    for name, child in (function.__kwdefaults__ or {}).items():
        yield f".__kwdefaults__.{name}", child
    for name, child in vars(function).items():
        yield f".{name}", child
    if is_of_library(names.get("__name__")):
        return
    used = _names_in(code)
    for name in used:
        if name not in names:
            continue
        child = names[name]
        yield f".__globals__.{name}", child
        if type(child) is ModuleType and not is_of_library(child.__name__):
            for attribute in used:
                if attribute in vars(child):
                    yield f".__globals__.{name}.{attribute}", vars(child)[attribute]


def _names_in(code: CodeType) -> list[str]:
    """Return the names of globals and attributes that a function and its inner ones use."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= dict.fromkeys(_names_in(constant))
    return list(names)


def _steps_of_class(value: type) -> Iterable[tuple[str, Any]]:
    if is_of_library(value.__module__):
        return
    for name, child in list(vars(value).items()):
        yield f".{name}", child
    for number, base in enumerate(value.__bases__):
        yield f".__bases__[{number}]", base
