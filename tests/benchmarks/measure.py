"""What every benchmark needs: a clock, a terminal for the bars, turns, tables, a place in the docs.

Figures are CPU time, of all threads, so that a busy machine disturbs them less; on a GPU they are
time on the wall. Ratios are taken within each turn, and their median and range are shown.
"""

import contextlib
import fcntl
import gc
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DOCS = Path(__file__).parents[2] / "docs/benchmarks.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def clock():
    """Seconds of CPU time; on a GPU seconds, when it has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@contextlib.contextmanager
def terminal():
    """Let all that is printed go to a terminal of 24 lines of 80, read by another process."""
    read_here, shown = pty.openpty()
    fcntl.ioctl(shown, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    reader = subprocess.Popen(["cat"], stdin=read_here, **quiet)
    os.close(read_here)
    sys.stdout.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    for number in kept:
        os.dup2(shown, number)
    os.close(shown)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)
        reader.wait()


def timed(prepare, seed=1):
    """Prepare, then run against the clock: return the seconds and what the run returned.

    ``prepare()`` returns the run, a function. What it builds (model, loader, trainer) is not timed.
    """
    with terminal():
        run = prepare()
        torch.manual_seed(seed)
        gc.collect()  # or one contestant cleans up after another
        start = clock()
        result = run()
        seconds = clock() - start
    return seconds, result


def take_turns(contestants, num_turns):
    """Call each contestant once a turn, back and forth; the first turn warms up.

    ``contestants``: functions that return a number, by name. Returns a list of numbers for each.
    """
    found = {name: [] for name in contestants}
    for turn in range(num_turns + 1):
        for name in contestants if turn % 2 else reversed(contestants):
            number = contestants[name]()
            if turn:
                found[name].append(number)
        print(f"turn {turn} of {num_turns}", file=sys.stderr, flush=True)
    return found


def spread(numbers, form):
    """Show a median, and the range beside it.

    >>> spread([1.0, 3.0, 2.0], ".1f")
    '2.0 (1.0 to 3.0)'
    """
    low, high = min(numbers), max(numbers)
    shown = f"{statistics.median(numbers):{form}}"
    return f"{shown} ({low:{form}} to {high:{form}})" if len(numbers) > 1 else shown


def table(found, unit, form, references, *, scale=lambda number: number, notes=None):
    """Make a table of Markdown: figures, ratios to the references, one more column of notes.

    >>> print(table({"ours": [1, 1], "theirs": [2, 4]}, "s", ".0f", ["theirs"]))
    | | s | / theirs |
    |---|---|---|
    | ours | 1 (1 to 1) | 0.38 (0.25 to 0.50) |
    | theirs | 3 (2 to 4) | |
    """
    references = [name for name in references if name in found]
    title, notes = notes or ("", {})
    head = ["", unit, *(f"/ {name}" for name in references), *([title] if title else [])]
    lines = [head]
    scaled = {name: [scale(number) for number in numbers] for name, numbers in found.items()}
    for name, numbers in scaled.items():
        cells = [name, spread(numbers, form)]
        for other in references:
            ratios = [a / b for a, b in zip(numbers, scaled[other], strict=True)]
            cells.append("" if other == name else spread(ratios, ".2f"))
        lines.append([*cells, *([notes.get(name, "")] if title else [])])
    shown = [re.sub(" +", " ", f"| {' | '.join(line)} |") for line in lines]
    return "\n".join([shown[0], "|" + "---|" * len(head), *shown[1:]])


def write(intro, title, body, path=DOCS):
    """Put a section between the markers of the document, where it replaces that of its title."""
    text = path.read_text()
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN)
    old, tail = rest.split(END)
    found = re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", old, flags=re.MULTILINE | re.DOTALL)
    sections = {title: body.strip() for title, body in found} | {title: body}
    shown = [f"### {title}\n\n{body}" for title, body in sections.items()]
    path.write_text("\n\n".join([f"{head}{BEGIN}\n{intro}", *shown]) + f"\n{END}{tail}")
