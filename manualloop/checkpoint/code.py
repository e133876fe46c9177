"""What the code of a function uses and changes, read from its bytecode without a call."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple


class Facts(NamedTuple):
    """What some code and the functions in it name and change.

    Attributes:
        texts: The code as texts, the same in every process.
        names: Names of globals and attributes.
        loaded: Names of the globals that are read.
        stored: Names of the globals and the variables of enclosing functions that are assigned to.
        moved: Names of the attributes that are assigned to.
        keys_read: Keys that are read: ``config["margin"]``.
        keys_set: Keys that are set: ``counts["n"] += 1``.
        changed: Names of variables and attributes whose containers or tensors may be changed: those
            whose methods change them, and all in a line that sets an entry.
    """

    texts: tuple[str, ...]
    names: frozenset[str]
    loaded: frozenset[str]
    stored: frozenset[str]
    moved: frozenset[str]
    keys_read: frozenset[str]
    keys_set: frozenset[str]
    changed: frozenset[str]


@lru_cache(maxsize=10_000)  # a function is asked about by each that calls it
def facts_of(code: CodeType) -> Facts:
    """Read some code and the functions in it.

    >>> facts = facts_of(compile("seen.append(config['margin'])", "", "exec"))
    >>> sorted(facts.names), set(facts.keys_read), set(facts.changed)
    (['append', 'config', 'seen'], {'margin'}, {'seen'})
    """
    inner = [facts_of(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    instructions = list(dis.get_instructions(code))
    named: dict[str, set[str]] = {}
    for one in instructions:
        named.setdefault(one.opname, set()).add(one.argval)
    own = (
        code.co_names,
        named.get("LOAD_GLOBAL", ()),
        {*named.get("STORE_GLOBAL", ()), *named.get("STORE_DEREF", ())},
        named.get("STORE_ATTR", ()),
        _keys_read(instructions),
        _keys_set(instructions),
        _changed(instructions),
    )
    others = zip(*(one[1:] for one in inner), strict=True) if inner else [()] * len(own)
    joined = (frozenset(part).union(*more) for part, more in zip(own, others, strict=True))
    return Facts(tuple(_texts(code)), *joined)


def _texts(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from facts_of(constant).texts
        elif isinstance(constant, frozenset):  # its order is another in each process
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _keys_read(instructions: Sequence[dis.Instruction]) -> set[str]:
    found: set[str] = set()
    before: dis.Instruction | None = None
    for instruction in instructions:
        operation, value = instruction.opname, instruction.argval
        key = before.argval if before is not None and before.opname == "LOAD_CONST" else None
        is_read = operation in ("BINARY_SUBSCR", "CONTAINS_OP", "COPY", "DUP_TOP_TWO")
        if isinstance(key, str) and (is_read or instruction.argrepr == "[]"):
            found.add(key)
        called = None if before is None else before.argval
        if operation == "LOAD_CONST" and isinstance(value, str) and called in ("get", "pop"):
            found.add(value)
        if operation != "PUSH_NULL":
            before = instruction
    return found


def _keys_set(instructions: Sequence[dis.Instruction]) -> set[str]:
    found: set[str] = set()
    names: list[str] = []
    key = None
    for instruction in instructions:
        operation = instruction.opname
        if operation == "LOAD_CONST":
            key, names = instruction.argval, []
        else:
            names.append(operation)
        is_set = names[:1] in (["STORE_SUBSCR"], ["DELETE_SUBSCR"])
        if isinstance(key, str) and (is_set or names[:2] == ["COPY", "COPY"] or names == _TWICE):
            found.add(key)
    return found


_TWICE = ["DUP_TOP_TWO"]  # what Python 3.10 has for two copies
_CHANGING = {
    *("append", "appendleft", "extend", "insert", "update", "add", "setdefault", "remove"),
    *("pop", "popleft", "popitem", "clear", "discard", "sort", "reverse"),
}


def _changed(instructions: Sequence[dis.Instruction]) -> set[str]:
    found: set[str] = set()
    of_lines: dict[Any, set[str]] = {}
    setting: set[Any] = set()
    line, last = None, None
    for instruction in instructions:
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
    return found.union(*(of_lines.get(line, set()) for line in setting))


def _line_of(instruction: Any, before: Any) -> Any:
    positions = getattr(instruction, "positions", None)  # before Python 3.11: of the first in it
    line = instruction.starts_line if positions is None else positions.lineno
    return before if line is None else line
