"""Count what one job takes with each library: lines of code, and concepts a user has to know.

    python tests/benchmarks/count_jobs.py

The job is MRPC with evaluation, checkpoints, resumption, several processes, the best model kept
and TensorBoard: the scripts in `mrpc_job/`, all in one formatter's layout. A line is one that is
neither blank nor a comment nor part of a docstring. A concept is a name that is imported, or an
attribute or method that is used, without those that all four scripts share: the rows, the tokenizer
and the model.
"""

import ast
import io
import tokenize
from pathlib import Path

JOBS = Path(__file__).parent / "mrpc_job"
SHARED = {"AutoModelForSequenceClassification", "AutoTokenizer", "load_dataset", "from_pretrained"}


def count_lines(source: str) -> int:
    """Count the lines that hold code."""
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    held = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty and token.type != tokenize.ENDMARKER:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - _lines_of_docstrings(source))


def _lines_of_docstrings(source: str) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.update(range(node.lineno, node.end_lineno + 1))
    return found


def concepts_in(source: str) -> set[str]:
    """Return the names that are imported, and the attributes that are used."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found - SHARED


def main() -> None:
    print("| the MRPC job | lines | concepts |\n|---|---|---|")
    for path in sorted(JOBS.glob("with_*.py"), key=lambda path: count_lines(path.read_text())):
        source = path.read_text()
        name = path.stem.removeprefix("with_")
        print(f"| {name} | {count_lines(source)} | {len(concepts_in(source))} |")


if __name__ == "__main__":
    main()
