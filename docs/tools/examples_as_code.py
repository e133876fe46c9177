"""Let the reference show the examples of docstrings as code.

In a docstring ``>>>`` begins a doctest, and a line ``::`` the code that is indented behind it. To
Markdown the first is a quotation.
"""

import re
from textwrap import dedent
from typing import Any

import griffe


class ExamplesAsCode(griffe.Extension):
    """Put fences around the examples in docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object when it is loaded."""
        if obj.docstring:
            obj.docstring.value = with_fences(obj.docstring.value)


def with_fences(docstring: str) -> str:
    """Return a docstring with its examples between fences."""
    literal = re.compile(r"^::\n\n((?:(?: {4}.*)?\n?)+)", re.M)
    text = literal.sub(lambda found: f"```python\n{dedent(found[1]).strip()}\n```\n\n", docstring)
    return re.sub(r"^>>> .+\n?(?:.+\n?)*", _fenced, text, flags=re.M)


def _fenced(found: re.Match[str]) -> str:
    return f"```pycon\n{found[0].rstrip()}\n```\n"
