"""Functions as text, by which an edited one is told from the one before.

A name is not enough: a loss function is edited, and keeps its name. What its user has written
counts: the code with its constants, what it reads from its closure, its defaults, its globals, and
the objects in there, and the functions and methods that it calls. What is installed counts by its
name, since the versions of the libraries are compared anyway.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from itertools import islice
from pathlib import PurePath
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from manualloop.checkpoint.code import facts_of
from manualloop.passing import is_clock, steady

_SCALARS = (bool, int, float, str, bytes, type(None))
_CONTAINERS = (list, tuple, set, frozenset, deque, Mapping)
_CHANGEABLE = (*_CONTAINERS, Tensor, np.ndarray)
_MAX_DEPTH = 6
_MAX_ENTRIES, _MAX_NUMBERS = 10_000, 1_000_000


class _Uses(NamedTuple):
    """What some code names: attributes and globals, and the texts that may be keys."""

    names: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()


class _Search(NamedTuple):
    """What a description has met so far, and where it notes values by name; None: in the text."""

    seen: set[int]
    values: dict[str, str] | None


def describe_function(function: Any) -> str:
    """Describe a function, or an object that is called, by its name and what its results depend on.

    >>> describe_function(len)
    'builtins.len'
    >>> describe_function(nn.CrossEntropyLoss(label_smoothing=0.1))
    "CrossEntropyLoss(ignore_index=-100, label_smoothing=0.1, reduction='mean')"
    """
    return _describe(function, _Search(set(), None), 0)


def function_facts(function: Any) -> tuple[str, dict[str, str]]:
    """Describe a function, and by name the values that it reads beside its arguments.

    Of a function with ``margin`` in its closure, the latter are ``{"margin": "0.1"}``.
    """
    search = _Search(set(), {})
    described = _describe(function, search, 0)
    return described, dict(sorted((search.values or {}).items()))


def _describe(value: Any, search: _Search, depth: int, path: str = "") -> str:
    value = _unwrapped(value)
    if isinstance(value, partial):
        uses = _uses_of(value.func)
        inside = [_text(part, search, depth, uses) for part in value.args]
        inside += [
            f"{key}={_text(part, search, depth, uses)}" for key, part in value.keywords.items()
        ]
        return f"{_describe(value.func, search, depth, path)}({', '.join(inside)})"
    if (
        is_dataclass(value)
        and not isinstance(value, type)
        and _is_installed(type(value).__module__)
    ):
        inside = [  # of a task, such as what images() returns
            f"{field.name}={_text(part, search, depth + 1, _Uses(), path)}"
            for field in fields(value)
            if (part := getattr(value, field.name)) is not None
        ]
        return f"{type(value).__qualname__}({', '.join(inside)})"
    if isinstance(value, MethodType):
        method = value.__func__.__name__
        of = _describe_object(value.__self__, search, depth, _Uses(frozenset({method})))
        return f"{_describe(value.__func__, search, depth, path)} of {of}"
    if isinstance(value, FunctionType):
        if _is_installed(value.__module__):
            return f"{value.__module__}.{value.__qualname__}"
        parts = _function_parts(value, search, depth, path)
        return f"{value.__qualname__} (code {_digest(parts)})"
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{getattr(value, '__module__', None) or 'builtins'}.{name}"
    return _describe_object(value, search, depth, _Uses() if _is_users(type(value)) else None)


def _unwrapped(value: Any) -> Any:
    """Return the function under a cache, which is an object of C."""
    return value.__wrapped__ if hasattr(type(value), "cache_info") else value


def _describe_object(value: Any, search: _Search, depth: int, uses: _Uses | None) -> str:
    """Describe an object by its class, its code if the user wrote it, and its plain attributes.

    Attributes that its methods assign to are left out: they count something. Of an object whose
    methods are called, only what these read counts: the object may be a whole experiment.
    """
    kind = type(value)
    name = kind.__qualname__
    if id(value) in search.seen or depth > _MAX_DEPTH:
        return name
    search.seen.add(id(value))
    methods = _methods_of(kind)
    code = [function for _, function in methods if not _is_installed(function.__module__)]
    read = None
    if uses is not None:
        called = {key for key, _ in methods} & (uses.names | {"__call__"})
        code, read = _reached(methods, called)
        read = None if read is None else read | uses.names
    is_model = isinstance(value, nn.Module) and next(value.parameters(), None) is not None
    inside = []
    if not is_model:  # the one that is trained is described as such
        attributes = _attributes_of(value, methods)
        changed = set[str]().union(*(facts_of(function.__code__).changed for function in code))
        inner = search._replace(values=None)
        inside = [
            f"{key}={text}"
            for key, part in sorted(attributes.items())
            if (read is None or key in read)
            and not (key in changed and isinstance(part, _CHANGEABLE))
            and (text := _attribute_text(part, inner, depth, code, uses)) not in (None, "None")
        ]
    if code and (uses is not None or not (is_model or _is_installed(kind.__module__))):
        # Values of globals count, and those of attributes have been noted.
        inner = search._replace(values=None)
        parts = [part for m in code for part in _function_parts(m, inner, depth + 1, "")]
        inside.append(f"code {_digest(parts)}")
    return f"{name}({', '.join(inside)})" if inside or not is_model else name


def _attributes_of(value: Any, methods: Iterable[tuple[str, FunctionType]]) -> dict[str, Any]:
    """Return the attributes of an object, without those that its methods assign to."""
    kind = type(value)
    attributes: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not _is_installed(base.__module__):
            data = (*_SCALARS, *_CONTAINERS)
            attributes |= {k: v for k, v in vars(base).items() if isinstance(v, data)}
        for name, member in vars(base).items():
            if type(member) is MemberDescriptorType and hasattr(value, name):
                attributes[name] = getattr(value, name)
    attributes |= getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        attributes |= dict.fromkeys(_OF_MODULES)
        attributes |= dict(value.named_buffers()) | dict(value.named_children())
        attributes = {k: v for k, v in attributes.items() if k.rpartition(".")[2] not in _RUNNING}
    moving = {
        name
        for key, function in methods
        if key not in ("__init__", "__post_init__", "__setstate__")
        for name in facts_of(function.__code__).moved
    }
    return {
        name: part
        for name, part in attributes.items()
        if name not in moving and not name.startswith("__")
    }


_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_OF_MODULES = (*vars(nn.Module()), "training")


def _attribute_text(
    value: Any, search: _Search, depth: int, code: list[FunctionType], uses: _Uses | None
) -> str | None:
    # The code that makes the attributes is compared only where no method is named.
    if uses is not None:
        text = _text(value, search, depth + 1, _uses_of(*code))
        return None if text == type(value).__qualname__ or is_clock(value) else text
    return None if is_clock(value) else _plain_text(value)


def _reached(
    methods: list[tuple[str, FunctionType]], called: Iterable[str]
) -> tuple[list[FunctionType], set[str] | None]:
    """Return the user's methods that some methods call, and the names they read; None: any."""
    names, todo, code = set(called), sorted(called), []
    while todo:
        name = todo.pop()
        for key, function in methods:
            if key != name:
                continue
            if not _is_installed(function.__module__):
                code.append(function)
            read = [function, *(v for v in values_read(function) if isinstance(v, FunctionType))]
            for new in {n for f in read for n in facts_of(f.__code__).names} - names:
                names.add(new)
                todo.append(new)
    code.sort(key=lambda function: function.__qualname__)
    return code, None if names & {"getattr", "vars", "__dict__"} else names


def moved_by(kind: type, method: str) -> set[str]:
    """Return the attributes that the user's code assigns to in a method: they count something."""
    code = _users_code(kind, method)
    return {name for function in code for name in facts_of(function.__code__).moved}


def method_code(kind: type, method: str) -> str | None:
    """Return a digest of the user's code that a method runs; None: it is all of a library.

    What the code reads does not count, nor does the code of methods that it does not call.
    """
    code = _users_code(kind, method)
    search = _Search(set(), {})
    parts = [part for one in code for part in _function_parts(one, search, 0, "")]
    return f"{kind.__qualname__.removeprefix('FSDP')} (code {_digest(parts)})" if code else None


def _users_code(kind: type, method: str) -> list[FunctionType]:
    """Return the user's methods that a method of a class runs."""
    methods = _methods_of(kind)
    if all(map(_is_installed, {function.__module__ for _, function in methods})):
        return []  # which most modules of a model are
    return _reached(methods, [method])[0]


def _text(value: Any, search: _Search, depth: int, uses: _Uses, path: str = "") -> str:
    """Describe a value that a function uses: plain data by itself, other objects by their class."""
    value = _unwrapped(value)
    if isinstance(value, int | float) and is_clock(value):
        return "a time"
    if (text := _plain_text(value)) is not None:
        return text
    if depth <= _MAX_DEPTH:
        if isinstance(value, _CONTAINERS):
            return _container_text(value, search._replace(values=None), depth + 1, uses)
        if isinstance(value, partial | MethodType | FunctionType):
            return _describe(value, search, depth + 1, path)
        if isinstance(value, nn.Module) and _is_installed(type(value).__module__):
            return _describe_object(value, search, depth + 1, None)
        if _is_users(type(value)):
            return _describe_object(value, search, depth + 1, uses)
        if members := _members(value, uses):
            inside = [f"{key}={_text(part, search, depth + 1, uses)}" for key, part in members]
            return f"{type(value).__qualname__}({', '.join(inside)})"
    if hasattr(value, "to_dict") and hasattr(value, "model_input_names"):  # an image processor
        return f"{type(value).__qualname__} (settings {_digest([repr(value.to_dict())])})"
    return type(value).__qualname__


def _is_users(kind: type) -> bool:
    """Tell whether a class is one of the user's, and its objects are no classes."""
    return not issubclass(kind, type | ModuleType) and not _is_installed(kind.__module__)


def _container_text(value: Any, search: _Search, depth: int, uses: _Uses) -> str:
    """Describe a container by its entries; of a dict whose keys some code names, by those."""
    kind = type(value).__qualname__
    if id(value) in search.seen or len(value) > _MAX_ENTRIES:
        return f"{kind} of {len(value)}"
    search.seen.add(id(value))
    if isinstance(value, Mapping):
        named = sorted(uses.keys & _texts(value))
        texts = [
            f"{_text(key, search, depth, uses)}: {_text(value[key], search, depth, uses)}"
            for key in named or value
        ]
    else:
        entries = [_text(part, search, depth, uses) for part in islice(value, _MAX_ENTRIES)]
        texts = sorted(entries) if isinstance(value, set | frozenset) else entries
    search.seen.discard(id(value))  # it may be listed twice
    inside = ", ".join(texts)
    brackets = "[]" if isinstance(value, list) else "{}" if isinstance(value, Mapping) else "()"
    return f"{brackets[0]}{inside}{brackets[1]}"


def _plain_text(value: Any) -> str | None:
    """Return plain data as text; None for everything else."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, str | PurePath):
        return repr(str(value))
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Tensor | np.ndarray):
        return f"{tuple(value.shape)} {found}" if (found := _numbers(value)) else _shape(value)
    if isinstance(value, tuple | frozenset):
        texts = [_plain_text(part) for part in value]
        if None in texts:
            return None
        ordered = sorted(map(str, texts)) if isinstance(value, frozenset) else map(str, texts)
        return f"({', '.join(ordered)})"
    return None


def _numbers(value: Any) -> str | None:
    """Return a digest of the numbers of a tensor or an array that is neither large nor learned."""
    size = value.size if isinstance(value, np.ndarray) else value.numel()
    if size > _MAX_NUMBERS or getattr(value, "requires_grad", False):
        return None
    try:
        return _digest([repr(value.tolist())])
    except (RuntimeError, TypeError, ValueError):  # sparse, on "meta", ...
        return None


def _shape(value: Any) -> str:
    return f"{type(value).__qualname__}{tuple(value.shape)}"


def _function_parts(
    function: FunctionType, search: _Search, depth: int, path: str
) -> Iterator[str]:
    """Give what the results of a function depend on, piece by piece; note the values it reads."""
    if id(function) in search.seen or depth > _MAX_DEPTH:
        yield function.__qualname__
        return
    search.seen.add(id(function))
    yield from facts_of(function.__code__).texts
    uses = _uses_of(function)
    for name, value in (*_defaults_of(function), *_values_read(function, uses)):
        text = _text(value, search, depth, uses, f"{path}{name}.")
        if search.values is None or isinstance(_unwrapped(value), FunctionType):
            yield f"{name}={steady(text)}"
        elif text != type(value).__qualname__:
            search.values.setdefault(f"{path}{name}", text)


def _defaults_of(function: FunctionType) -> list[tuple[str, Any]]:
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return [*zip(names, defaults, strict=True), *(function.__kwdefaults__ or {}).items()]


def _uses_of(*functions: Any) -> _Uses:
    """Return what functions and those that they call name."""
    names: set[str] = set()
    keys: set[str] = set()
    todo, seen = list(functions), set()
    while todo:
        function = _unwrapped(todo.pop())
        if isinstance(function, partial):
            todo.append(function.func)
        elif isinstance(function, MethodType):
            todo.append(function.__func__)
        elif isinstance(function, FunctionType) and id(function) not in seen:
            seen.add(id(function))
            if not _is_installed(function.__module__):
                facts = facts_of(function.__code__)
                names |= facts.names - facts.moved
                keys |= facts.keys_read - facts.keys_set
                todo += [value for _, value in _own_values(function)]
    return _Uses(frozenset(names), frozenset(keys))


def values_read(function: Any) -> Iterator[Any]:
    """Give what a function reads besides its arguments: what it is given, its closure, its globals.

    Of objects and dicts there, it gives the members that its code names, too.
    """
    if isinstance(function, partial):
        yield from (*function.args, *function.keywords.values())
        yield from values_read(function.func)
    elif isinstance(function, MethodType):
        yield from values_read(function.__func__)
    elif isinstance(function, FunctionType) and not _is_installed(function.__module__):
        for _, value in _own_values(function):
            yield value
            yield from (part for _, part in _members(value, _uses_of(function)))


def entries_read(function: Any) -> Iterator[tuple[str, Any]]:
    """Give the numbers, texts and tensors of dicts that a function reads by their keys.

    Those that it sets itself are left out: they are records more often than a state.
    """
    todo, seen = [function], set[int]()
    while todo:
        one = _unwrapped(todo.pop())
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, partial):
            found = [*enumerate(one.args), *one.keywords.items()]
            todo.append(one.func)
        elif isinstance(one, MethodType):
            found = []
            todo.append(one.__func__)
        elif isinstance(one, FunctionType) and not _is_installed(one.__module__):
            found = [*_defaults_of(one), *_own_values(one)]
            todo += [value for _, value in found if isinstance(value, partial | FunctionType)]
        else:
            continue
        for name, table in found:
            if isinstance(table, Mapping):
                for key, part in _members(table, _uses_of(one)):
                    if isinstance(part, (*_SCALARS, Tensor, np.ndarray)):
                        yield f"{name}[{key!r}]", part


def forward_code(model: nn.Module) -> dict[str, FunctionType]:
    """Return the script's own functions that a forward pass of a model runs, by their names."""
    kinds = dict.fromkeys(map(type, model.modules()))
    code = [function for kind in kinds for function in _users_code(kind, "forward")]
    return {".".join(one.__qualname__.split(".")[-2:]): one for one in code}


def _own_values(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Give the globals and the variables of enclosing functions that a function only reads."""
    facts = facts_of(function.__code__)
    found = {name: function.__globals__.get(name) for name in facts.loaded}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # empty
            continue
    yield from ((name, found[name]) for name in sorted(found) if name not in facts.stored)


def _values_read(function: FunctionType, uses: _Uses) -> Iterator[tuple[str, Any]]:
    """Give the values that count: of objects and dicts the members that are named."""
    changed = facts_of(function.__code__).changed
    for name, value in _own_values(function):
        members = _members(value, uses)
        yield from ((f"{name}.{key}", part) for key, part in members)
        if not members and not (name in changed and isinstance(value, _CHANGEABLE)):
            yield name, value


def _members(value: Any, uses: _Uses) -> list[tuple[str, Any]]:
    """List the members of an object, a class, a module or a dict that some code names."""
    kind = type(value)
    if isinstance(value, Mapping):
        named = uses.keys if kind is dict else uses.keys | uses.names
        return [(key, value[key]) for key in sorted(_texts(value) & named)]
    if isinstance(value, FunctionType | nn.Module) or _is_users(kind):
        return []  # described as a whole
    own: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    if isinstance(value, type | ModuleType):
        if _is_installed(value.__module__ if isinstance(value, type) else value.__name__):
            return []
        bases = value.__mro__ if isinstance(value, type) else (value,)
        own = {name: part for base in reversed(bases) for name, part in vars(base).items()}
    found = [(key, own[key]) for key in sorted(uses.names & own.keys())]
    return [(key, getattr(part, "__func__", part)) for key, part in found]


def _methods_of(kind: type) -> list[tuple[str, FunctionType]]:
    """List the methods of a class by their names, with those that they override."""
    found = []
    for base in kind.__mro__:
        for name, member in vars(base).items():
            if not isinstance(member, FunctionType):  # which most are
                member = getattr(member, "fget", None) or getattr(member, "__func__", None)
            if isinstance(member, FunctionType):
                found.append((name, member))
    return found


def _is_installed(module: str | None) -> bool:
    """Tell whether a module, by its name, is one of Python or of an installed library."""
    name = module or "builtins"
    if name.partition(".")[0] == __name__.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return not name.startswith("__m") and name in sys.builtin_module_names
    return "site-packages" in file or "dist-packages" in file or file.startswith(_STANDARD_LIBRARY)


_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


def _digest(parts: Iterable[str]) -> str:
    """Return a short digest of some texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _texts(keys: Iterable[Any]) -> set[str]:
    return {key for key in keys if isinstance(key, str)}
