"""Where a run shows itself: lines on stdout, bars in a terminal, an output in a notebook.

All lines of the package, notices and tables alike, go to stdout at once, so that they stand in the
order in which they were written, and between the lines that the program prints itself.
"""

from __future__ import annotations

import os
import sys
import uuid
import warnings
from typing import Any, TextIO

if "ipykernel" in sys.modules:
    with warnings.catch_warnings():
        # Whichever library imports it first warns in red, in a notebook without ipywidgets.
        warnings.simplefilter("ignore")
        import tqdm.autonotebook  # noqa: F401

_SMALLEST = 5  # columns of the bar itself
_MARGIN = 3  # columns at the right of a bar, for the "^C" that a terminal adds
_num_written = 0


def num_written() -> int:
    """Return how often the package has written something to stdout in this process."""
    return _num_written


def write(text: str) -> None:
    """Write lines to stdout, above the bars of a terminal.

    A run is worth more than its log: what cannot be written, because the terminal was closed or the
    reader of a pipe has ended, is left out.
    """
    global _num_written
    stream, _num_written = sys.stdout, _num_written + 1
    if stream is None:  # of a program without a console
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
        if "tqdm" in sys.modules and is_terminal(stream):  # there may be bars, also of the user
            sys.modules["tqdm"].tqdm.write(text, file=stream)
        else:
            stream.write(f"{text}\n")
        stream.flush()
    except (OSError, ValueError):
        pass


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a stream is a terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it was closed
        return False


def num_columns(stream: Any) -> int:
    """Return the width of a terminal."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (AttributeError, OSError, ValueError):
        return 80


def has_colours(stream: TextIO | None) -> bool:
    """Tell whether a stream is a terminal that is meant to have colours."""
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return is_terminal(stream) and not is_plain


class TerminalBar:
    """A line at the bottom of a terminal, below those of other bars, which is drawn over and over.

    Args:
        stream: The terminal.
        name: Name at its left end.
        leaves: Whether the line stays when it is closed.
    """

    def __init__(self, stream: TextIO, name: str, *, leaves: bool) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=Warning, module="tqdm")
            from tqdm import tqdm
        self.stream, self._name = stream, name
        self._bar: Any = tqdm(
            desc=name,
            file=stream,
            leave=leaves,
            ncols=num_columns(stream) - _MARGIN,
            mininterval=0,
            miniters=0,
            bar_format=" ",
        )

    def draw(self, position: int, total: int | None, facts: list[str]) -> None:
        """Draw it: ``facts`` as far as they have room, which is from the first to the last."""
        head = f"{self._name}: {100 * position // total:3}%|" if total else f"{self._name}: "
        count = f"{position}/{total}" if total else str(position)
        self._bar.ncols = num_columns(self.stream) - _MARGIN
        room = self._bar.ncols - len(head) - len(count) - (_SMALLEST + 2 if total else 0)
        tail = f"{'| ' if total else ''}{count}"
        opening, closing = " [", ""
        for fact in facts:
            room -= len(opening) + len(fact)
            if room < 1:
                break
            tail, opening, closing = f"{tail}{opening}{fact}", ", ", "]"
        tail += closing
        self._bar.n, self._bar.total = position, total
        self._bar.bar_format = _literal(head) + ("{bar}" if total else "") + _literal(tail)
        self._bar.refresh()

    def close(self) -> None:
        """End it, with a newline if it stays: over a bar above that is as wide as the terminal."""
        self._bar.ncols += _MARGIN
        self._bar.bar_format += " " * _MARGIN
        self._bar.close()


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def notebook() -> Any:
    """Return IPython's shell if a notebook shows what this process displays, else None.

    A process that was forked from a notebook's can only print. Spyder cannot update an output.
    """
    if "spyder_kernels" in sys.modules:
        return None
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    session = getattr(getattr(shell, "kernel", None), "session", None)
    return shell if getattr(session, "pid", None) == os.getpid() else None


class NotebookOutput:
    """An output of a cell whose content is replaced in place, and saved with the notebook.

    It is HTML and not a widget, because the state of widgets is not saved by default.
    """

    def __init__(self, shell: Any) -> None:
        self._shell, self._id = shell, uuid.uuid4().hex
        self._is_shown = False

    def draw(self, html: str, text: str) -> None:
        """Show HTML, and text where a front end has none."""
        self._shell.display_pub.publish(
            data={"text/html": html, "text/plain": text},
            transient={"display_id": self._id},
            update=self._is_shown,
        )
        self._is_shown = True
