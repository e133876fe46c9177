"""What the code of a function uses and changes, read from its bytecode without a call."""

from __future__ import annotations

import dis
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any


def is_installed(module: str | None) -> bool:
    """Tell whether a module, by its name, is one of Python or of an installed library."""
    name = module or "builtins"
    if name.partition(".")[0] == __name__.partition(".")[0]:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return not name.startswith("__m") and name in sys.builtin_module_names
    return "site-packages" in file or "dist-packages" in file or file.startswith(_STANDARD_LIBRARY)


_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


def methods_of(kind: type) -> list[tuple[str, FunctionType]]:
    """List the methods of a class by their names, with those that they override."""
    found = []
    for base in kind.__mro__:
        for name, member in vars(base).items():
            inner = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if isinstance(inner, FunctionType):
                found.append((name, inner))
    return found


def code_parts(code: CodeType) -> Iterator[str]:
    """Give some code and the functions in it as texts, the same in every process."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_parts(constant)
        elif isinstance(constant, frozenset):  # its order is another in each process
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def digest(parts: Iterable[str]) -> str:
    """Return a short digest of some texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def names_in(code: CodeType, *operations: str) -> set[str]:
    """Return the names that some code and the functions in it use in an operation."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in operations}
    for inner in _inner(code):
        found |= names_in(inner, *operations)
    return found


def all_names(code: CodeType) -> Iterator[str]:
    """Give the names of globals and attributes that some code and the functions in it use."""
    yield from code.co_names
    for inner in _inner(code):
        yield from all_names(inner)


def keys_read_by(code: CodeType) -> set[str]:
    """Return the keys that some code and its functions read: ``config["margin"]``."""
    found: set[str] = set()
    before: list[Any] = []
    for instruction in dis.get_instructions(code):
        operation, value = instruction.opname, instruction.argval
        key = before[-1].argval if before and before[-1].opname == "LOAD_CONST" else None
        is_read = operation in ("BINARY_SUBSCR", "CONTAINS_OP", "COPY", "DUP_TOP_TWO")
        if isinstance(key, str) and (is_read or instruction.argrepr == "[]"):
            found.add(key)
        called = before[-1].argval if before else None
        if operation == "LOAD_CONST" and isinstance(value, str) and called in ("get", "pop"):
            found.add(value)
        if operation != "PUSH_NULL":
            before = [instruction]
    for inner in _inner(code):
        found |= keys_read_by(inner)
    return found


def keys_set_by(code: CodeType) -> set[str]:
    """Return the keys that some code and the functions in it set: ``counts["n"] += 1``."""
    found: set[str] = set()
    names: list[str] = []
    key = None
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        if operation == "LOAD_CONST":
            key, names = instruction.argval, []
        else:
            names.append(operation)
        is_set = names[:1] in (["STORE_SUBSCR"], ["DELETE_SUBSCR"])
        if isinstance(key, str) and (is_set or names[:2] == ["COPY", "COPY"] or names == _TWICE):
            found.add(key)
    for inner in _inner(code):
        found |= keys_set_by(inner)
    return found


_TWICE = ["DUP_TOP_TWO"]  # what Python 3.10 has for two copies
_CHANGING = {
    *("append", "appendleft", "extend", "insert", "update", "add", "setdefault", "remove"),
    *("pop", "popleft", "popitem", "clear", "discard", "sort", "reverse"),
}


def changed_by(code: CodeType) -> set[str]:
    """Return the names of variables and attributes whose containers or tensors code may change.

    Those are the ones whose methods change them, and all in a line that sets an entry.
    """
    found: set[str] = set()
    of_lines: dict[Any, set[str]] = {}
    setting: set[Any] = set()
    line, last = None, None
    for instruction in dis.get_instructions(code):
        line = _line_of(instruction, line)
        if instruction.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            setting.add(line)
        if not instruction.opname.startswith("LOAD_"):
            continue
        name = instruction.argval
        if last is not None and isinstance(name, str):
            is_in_place = name.endswith("_") and not name.endswith("__")  # of a tensor: mul_
            if name in _CHANGING or is_in_place:
                found.add(last)
        last = name if isinstance(name, str) and instruction.opname != "LOAD_CONST" else None
        if last is not None:
            of_lines.setdefault(line, set()).add(last)
    found = found.union(*(of_lines.get(line, set()) for line in setting))
    for inner in _inner(code):
        found |= changed_by(inner)
    return found


def _line_of(instruction: Any, before: Any) -> Any:
    positions = getattr(instruction, "positions", None)  # before Python 3.11: of the first in it
    line = instruction.starts_line if positions is None else positions.lineno
    return before if line is None else line


def _inner(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))
