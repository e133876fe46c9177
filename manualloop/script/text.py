"""How a script is put together: parts of it, as nested lists of lines, become text.

A list inside a list is indented, as its lines are in the script. The text is that of
``ruff format`` with its defaults.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import dedent, wrap
from typing import Any, NamedTuple, TypeAlias

WIDTH = 88
_INDENT = "    "


@dataclass(frozen=True)
class Note:
    """A comment, wrapped where it stands.

    Attributes:
        text: The comment, without a "#".
    """

    text: str


class Call:
    """A call on one line, or with one argument a line where it is too long for that.

    Args:
        begin: What stands before the arguments, such as ``"model = load("``.
        arguments: The arguments.
        end: What closes the call.
        comment: A comment behind it.
    """

    def __init__(
        self, begin: str, arguments: Iterable[str], end: str = ")", comment: str = ""
    ) -> None:
        self.begin, self.arguments, self.end = begin, list(arguments), end
        self.comment = f"  # {comment}" if comment else ""


Line: TypeAlias = "str | Note | Call | list[Line]"
"""One or several lines of code, a comment, a call, or a list of these that is indented."""


class Part(NamedTuple):
    """A part of a script.

    Attributes:
        lines: Its lines; empty for a part that only imports.
        imports: The imports that it needs, a line for each name.
        title: What the part is about, for the comment above it; empty for none.
    """

    lines: Sequence[Line]
    imports: tuple[str, ...] = ()
    title: str = ""


def code(text: str) -> str:
    """Return code that is written between triple quotes as lines without their indent."""
    return dedent(text).strip("\n")


def when(condition: object, *lines: Line) -> list[Line]:
    """Return lines, if a condition holds: ``*when(clips, "clip()")``."""
    return list(lines) if condition else []


def script_of(docstring: str, parts: Iterable[Part]) -> str:
    """Return the text of a script.

    Args:
        docstring: What stands at its top.
        parts: Its parts, in their order.

    >>> script = script_of("Greet.", [Part(["hello()"], ("from greetings import hello",))])
    >>> script.splitlines()[2:]
    ['from greetings import hello', '', 'hello()']
    """
    parts = list(parts)
    imports = _imports(line for part in parts for line in part.imports)
    number, blocks = 0, []
    for part in parts:
        number += bool(part.title)
        title = [Note(f"{number}. {part.title}")] if part.title else []
        if part.lines:
            blocks.append("\n".join(_rendered([*title, *part.lines], 0)))
    text = f'"""{docstring}"""\n\n{imports}'
    was_function = False
    for block in blocks:
        is_function = re.search(r"^(@|def )", block, re.MULTILINE) is not None
        text += ("\n\n" if is_function or was_function else "\n") + block + "\n"
        was_function = is_function
    return text


def _rendered(lines: Iterable[Line], depth: int) -> list[str]:
    indent = depth * _INDENT
    made: list[str] = []
    for line in lines:
        if isinstance(line, list):
            made += _rendered(line, depth + 1)
        elif isinstance(line, Note):
            made += wrap(
                line.text,
                WIDTH,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}# ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        elif isinstance(line, Call):
            made += _called(line, indent)
        else:
            made += [f"{indent}{one}" if one else "" for one in line.split("\n")]
    return made


def _called(call: Call, indent: str) -> list[str]:
    whole = f"{indent}{call.begin}{', '.join(call.arguments)}{call.end}"
    if len(whole) <= WIDTH:
        return [whole + call.comment]
    inner = f"{indent}{_INDENT}{', '.join(call.arguments)}"
    lines = [inner]
    is_listed = call.begin.endswith(("[", "{")) and " for " not in inner
    if len(inner) > WIDTH or is_listed:
        lines = [f"{indent}{_INDENT}{argument}," for argument in call.arguments]
    return [f"{indent}{call.begin}", *lines, f"{indent}{call.end}{call.comment}"]


def _imports(lines: Iterable[str]) -> str:
    """Return imports in the order of isort: the standard library first, then the others."""
    modules, names = set(), defaultdict(set)
    for line in lines:
        if line.startswith("import "):
            modules.add(line.removeprefix("import "))
        else:
            module, name = line.removeprefix("from ").split(" import ")
            names[module].add(name)
    sections: dict[bool, list[list[str]]] = {True: [], False: []}
    for module in sorted(modules):
        sections[_is_standard(module)].append([f"import {module}"])
    for module in sorted(names):
        call = Call(f"from {module} import ", sorted(names[module], key=_isort_key), end="")
        if len(f"from {module} import {', '.join(call.arguments)}") > WIDTH:
            call = Call(f"from {module} import (", call.arguments)
            made = [call.begin, *(f"{_INDENT}{name}," for name in call.arguments), ")"]
        else:
            made = _called(call, "")
        sections[_is_standard(module)].append(made)
    texts = ["\n".join(line for one in found for line in one) for found in sections.values()]
    return "".join(f"{text}\n\n" for text in texts if text).removesuffix("\n")


def _is_standard(module: str) -> bool:
    import sys

    return module.split(".")[0] in sys.stdlib_module_names


def _isort_key(name: str) -> tuple[int, str]:
    kind = 0 if name.isupper() else 1 if name[:1].isupper() else 2
    return kind, name


def literal(value: Any) -> str:
    """Return a plain value as code, with the quotes of ruff.

    >>> print(literal([5e-5, "it's", {"rate": (1,)}]))
    [5e-5, "it's", {"rate": (1,)}]
    """
    if isinstance(value, str):
        text = repr(value)
        return text if '"' in value else f'"{text[1:-1]}"'
    if isinstance(value, tuple | list):
        inner = ", ".join(map(literal, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(key)}: {literal(part)}' for key, part in value.items())}}}"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return re.sub(r"e([-+])0", r"e\1", repr(value))
