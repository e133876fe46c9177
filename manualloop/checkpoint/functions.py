"""Functions as text, by which an edited one is told from the one before.

A name is not enough: a loss function is edited, and keeps its name. What its user has written
counts: the code with its constants, what it reads from its closure, its defaults, its globals, and
the objects in there, and the functions that it calls. What is installed counts by its name, since
the versions of the libraries are compared anyway.
"""

from __future__ import annotations

import dis
import hashlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from manualloop.objects import is_clock

_SCALARS = (bool, int, float, str, bytes, type(None))
_MAX_DEPTH = 6
_MAX_NUMBERS = 10_000


def describe_function(function: Any) -> str:
    """Describe a function, or an object that is called, by its name and what its results depend on.

    >>> describe_function(len)
    'builtins.len'
    >>> describe_function(nn.CrossEntropyLoss(label_smoothing=0.1))
    "CrossEntropyLoss(ignore_index=-100, label_smoothing=0.1, reduction='mean')"
    """
    return _describe(function, set(), 0)


def _describe(value: Any, seen: set[int], depth: int) -> str:
    if isinstance(value, partial):
        # A list is one of settings here; in a closure it may be one that something is collected in.
        given = [tuple(part) if isinstance(part, list) else part for part in value.args]
        named = {k: tuple(v) if isinstance(v, list) else v for k, v in value.keywords.items()}
        inside = [_text(part, seen, depth) for part in given]
        inside += [f"{key}={_text(part, seen, depth)}" for key, part in named.items()]
        return f"{_describe(value.func, seen, depth)}({', '.join(inside)})"
    if isinstance(value, MethodType):
        of = _describe_object(value.__self__, seen, depth, value.__func__.__name__)
        return f"{_describe(value.__func__, seen, depth)} of {of}"
    if isinstance(value, FunctionType):
        if _is_installed(value.__module__):
            return f"{value.__module__}.{value.__qualname__}"
        return f"{value.__qualname__} (code {_digest(_function_parts(value, seen, depth))})"
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{getattr(value, '__module__', None) or 'builtins'}.{name}"
    return _describe_object(value, seen, depth)


def _describe_object(value: Any, seen: set[int], depth: int, method: str | None = None) -> str:
    """Describe an object by its class, its code if the user wrote it, and its plain attributes.

    Attributes that its methods assign to are left out: they count something. Of an object with a
    method that is called, only what this method reads counts: the object may be a whole experiment.
    """
    kind = type(value)
    name = kind.__qualname__
    if id(value) in seen or depth > _MAX_DEPTH:
        return name
    seen.add(id(value))
    if isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
        return name  # a model; the one that is trained is described as such
    methods = _methods_of(kind)
    moving = {
        name
        for key, function in methods
        if key not in ("__init__", "__post_init__", "__setstate__")
        for name in _names(function.__code__, "STORE_ATTR")
    }
    attributes = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        attributes |= dict(value.named_buffers()) | {"training": None}
    code = [function for _, function in methods if not _is_installed(function.__module__)]
    read = None
    if method is not None:
        code, read = _reached(methods, method)
    if any(_GROWING & set(_all_names(function.__code__)) for function in code):
        attributes = {k: part for k, part in attributes.items() if not isinstance(part, list)}
    inside = [
        f"{key}={text}"
        for key, part in sorted(attributes.items())
        if key not in moving and (read is None or key in read)
        if (text := _attribute_text(part, seen, depth, method)) not in (None, "None")
    ]
    if not _is_installed(kind.__module__):
        parts = [part for m in code for part in _function_parts(m, seen, depth + 1)]
        inside.append(f"code {_digest(iter(parts))}")
    return f"{name}({', '.join(inside)})"


_GROWING = {"append", "extend", "insert"}


def _attribute_text(value: Any, seen: set[int], depth: int, method: str | None) -> str | None:
    # The code that makes the attributes is compared only where no method is named.
    if method is not None and isinstance(value, partial | FunctionType | nn.Module):
        return _text(value, seen, depth + 1)
    if method is not None and isinstance(value, list) and len(value) <= _MAX_NUMBERS:
        value = tuple(value)
    return None if is_clock(value) else _plain_text(value)


def _methods_of(kind: type) -> list[tuple[str, FunctionType]]:
    """List the methods of a class by their names, with those that they override."""
    found = []
    for base in kind.__mro__:
        for name, member in vars(base).items():
            inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(inner, FunctionType):
                found.append((name, inner))
    return found


def _reached(
    methods: list[tuple[str, FunctionType]], first: str
) -> tuple[list[FunctionType], set[str] | None]:
    """Return the user's methods that a method calls, and the names that they read; None: any."""
    names, todo, code = {first}, [first], []
    while todo:
        name = todo.pop()
        for key, function in methods:
            if key != name:
                continue
            if not _is_installed(function.__module__):
                code.append(function)
            read = [function, *(v for v in values_read(function) if isinstance(v, FunctionType))]
            for new in {n for f in read for n in _all_names(f.__code__)} - names:
                names.add(new)
                todo.append(new)
    code.sort(key=lambda function: function.__qualname__)
    return code, None if names & {"getattr", "vars", "__dict__"} else names


def moved_by(kind: type, method: str) -> set[str]:
    """Return the attributes that the user's code assigns to in a method: they count something."""
    code, _ = _reached(_methods_of(kind), method)
    return {name for function in code for name in _names(function.__code__, "STORE_ATTR")}


def _text(value: Any, seen: set[int], depth: int) -> str:
    """Describe a value that a function uses: plain data by itself, other objects by their class."""
    if is_clock(value):
        return "a time"
    if (text := _plain_text(value)) is not None:
        return text
    if depth <= _MAX_DEPTH and isinstance(value, partial | MethodType | FunctionType | nn.Module):
        return _describe(value, seen, depth + 1)
    if depth <= _MAX_DEPTH and callable(value) and _is_users(type(value)):
        return _describe_object(value, seen, depth + 1, "__call__")
    return type(value).__qualname__


def _is_users(kind: type) -> bool:
    """Tell whether a class is one of the user's, and its objects are no classes."""
    return not issubclass(kind, type) and not _is_installed(kind.__module__)


def _plain_text(value: Any) -> str | None:
    """Return plain data as text; None for everything else."""
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, Tensor | np.ndarray):
        is_small = value.size if isinstance(value, np.ndarray) else value.numel()
        if is_small > _MAX_NUMBERS or getattr(value, "requires_grad", False):
            return f"{type(value).__qualname__}{tuple(value.shape)}"
        return f"{tuple(value.shape)} {_digest(iter([repr(value.tolist())]))}"
    if isinstance(value, tuple | frozenset):
        texts = [_plain_text(part) for part in value]
        if None in texts:
            return None
        ordered = sorted(map(str, texts)) if isinstance(value, frozenset) else map(str, texts)
        return f"({', '.join(ordered)})"
    return None


def _function_parts(function: FunctionType, seen: set[int], depth: int) -> Iterator[str]:
    """Give what the results of a function depend on, piece by piece."""
    if id(function) in seen or depth > _MAX_DEPTH:
        yield function.__qualname__
        return
    seen.add(id(function))
    code = function.__code__
    yield from _code_parts(code)
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield _text(value, seen, depth)
    for name, value in _values_read(function):
        if isinstance(value, FunctionType | partial) or "." not in name or _is_setting(value):
            yield f"{name}={_text(value, seen, depth)}"


def _is_setting(value: Any) -> bool:
    return isinstance(value, (*_SCALARS, tuple))


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
        yield from (value for _, value in _values_read(function))


def _values_read(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    stored = _names(code, "STORE_GLOBAL", "STORE_DEREF")
    found = {name: function.__globals__.get(name) for name in _names(code, "LOAD_GLOBAL")}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # empty
            continue
    used = set(_all_names(code)) - _names(code, "STORE_ATTR")
    keys = {constant for constant in _constants(code) if isinstance(constant, str)}
    for name, value in sorted(found.items()):
        if name not in stored:  # else it counts something
            yield name, value
            yield from ((f"{name}.{key}", part) for key, part in _members(value, used, keys))


def _members(value: Any, used: set[str], keys: set[str]) -> list[tuple[str, Any]]:
    """List the members of an object, a module or a dict that some code names."""
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in sorted(keys) if key in value]
    if isinstance(value, FunctionType | type | nn.Module):
        return []
    if isinstance(value, ModuleType) and _is_installed(value.__name__):
        return []
    own = getattr(value, "__dict__", {})
    return [(key, own[key]) for key in sorted(used) if key in own]


def _is_installed(module: str | None) -> bool:
    name = module or "builtins"
    if name.partition(".")[0] == __name__.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return not name.startswith("__m") and name in sys.builtin_module_names
    return "site-packages" in file or "dist-packages" in file or file.startswith(_STANDARD_LIBRARY)


_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


def _code_parts(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_parts(constant)
        elif isinstance(constant, frozenset):  # its order is another in each process
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _names(code: CodeType, *operations: str) -> set[str]:
    """Return the names that some code and the functions in it use in an operation."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in operations}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant, *operations)
    return found


def _all_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_names(constant)


def _constants(code: CodeType) -> Iterator[Any]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        elif isinstance(constant, tuple):
            yield from constant
        else:
            yield constant


def _digest(parts: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
