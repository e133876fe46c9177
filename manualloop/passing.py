"""What differs from one process to the next and means nothing: paths, times, random names."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import PurePath
from typing import Any


def without_root(value: Any) -> Any:
    """Return the last two parts of an absolute path, and any other value as it is.

    The same files lie under another root on another machine. The first folder in one for temporary
    files has another name in each process.
    """
    if isinstance(value, str) and os.path.isabs(value) and len(value.split()) == 1:
        path = PurePath(value)
        for root in (tempfile.gettempdir(), *_TEMPORARY):
            if path.is_relative_to(root) and path != PurePath(root):
                return "/".join(("a temporary folder", *path.relative_to(root).parts[1:][-1:]))
        return "/".join(path.parts[-2:])
    return value


_TEMPORARY = ("/tmp", "/var/tmp", "/private/tmp", "/dev/shm")


def is_clock(value: Any) -> bool:
    """Tell whether a number is the time at which something began, which is another in each run."""
    if type(value) is int and value > 10**17:
        value = value / 1e9  # of time_ns()
    clocks = zip((time.time, time.perf_counter), _IMPORTED_AT, strict=True)
    is_number = isinstance(value, float) or (type(value) is int and value > 10**9)
    return is_number and any(begin < value <= now() for now, begin in clocks)


_IMPORTED_AT = (time.time() - 86_400, time.perf_counter())


def steady(text: str) -> str:
    """Return a text with stars for what is another in each run: dates, times, random names.

    >>> steady("runs/2026-11-29_21-01-47/model"), steady("run-1764450107"), steady("v2.1")
    ('runs/*/model', 'run-*', 'v2.1')
    """
    return _PASSING.sub("*", text)


_DATE = r"(?:19|20)\d\d([-_./]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])"
_TIME = r"(?:[01]\d|2[0-3])([-_:.h]?)[0-5]\d(?:\2[0-5]\d(?:[.,]\d+)?)?Z?"
_DAY = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*[-_ ]?\d{1,2}(?:[-_, ]*20\d\d)?"
_PASSING = re.compile(
    rf"(?<!\d){_DATE}(?:[T _-]*{_TIME})?(?!\d)"
    rf"|(?<![A-Za-z]){_DAY}(?:[T _-]*(?:[01]\d|2[0-3])[-:][0-5]\d(?:[-:][0-5]\d)?)?(?!\d)"
    r"|(?<!\d)(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d+)?(?!\d)"
    r"|(?<!\d)1[5-9]\d{8}(?:\d{3})?(?:\.\d+)?(?!\d)"  # seconds or milliseconds since 1970
    r"|[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}"
    r"|(?<=\btmp)[a-z0-9_]{8}(?![a-z0-9_])"
)
