"""The page of messages: each is in the code, and each line that a run logs is on the page."""

import ast
import re
from functools import cache
from pathlib import Path

import manualloop

PACKAGE = Path(manualloop.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
EXAMPLES = {"using sentence1, sentence2 -> labels; dropped: ..."}  # with names in it
NAMED = {"-100": "\0"}  # numbers that the code writes by name


def text_of(node):
    """Return the text of a literal, with a NUL where a value comes in; None for other code."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "\0" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or "\0") + (text_of(node.right) or "\0")
    return None


@cache
def nodes():
    trees = [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]
    return [node for tree in trees for node in ast.walk(tree)]


def notices():
    for node in nodes():
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if is_call and node.func.id == "say" and (text := text_of(node.args[0])):
            yield text


def messages():
    found = re.findall(r"^\| `(.*?)` \|", PAGE.read_text(), re.M)
    assert len(found) > 100
    return found


def fragments(message):
    for name, value in NAMED.items():
        message = message.replace(name, value)
    return [part for part in re.split(r"\.\.\.|\0", message) if len(part.strip()) > 3]


def test_the_messages_of_the_page_are_in_the_code():
    texts = "\1".join({text_of(node) or "" for node in nodes()})
    for message in {*messages()} - EXAMPLES:
        parts = [part.strip() for part in fragments(message)]
        assert parts, message
        assert all(part in texts for part in parts), message


def test_each_line_that_a_run_logs_is_on_the_page():
    parts = {part.strip() for message in messages() for part in fragments(message)}
    long = [part for part in parts if len(part) > 10]
    named = [text for text in notices() if re.search(r"[a-z]{3}", text)]
    missing = [text for text in named if not any(part in text for part in long)]
    assert missing == []
