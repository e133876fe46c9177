"""Files of a folder that somebody else may have prepared.

Only regular files of the folder itself are opened. A link would lead to a file elsewhere, opening a
pipe would wait for its other end, and a device may act when it is opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from manualloop.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000

# Where a file is replaced between the look and the opening: fail, and do not wait.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def require_regular(path: Path) -> os.stat_result:
    """Return the status of a file without opening it.

    Raises:
        CheckpointError: It is a link, a pipe, a device or anything else that is not a file.
        FileNotFoundError: It does not exist.
    """
    return _require_regular(path, os.lstat(path))


def _require_regular(path: Path, status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        kind = next((word for is_it, word in _KINDS if is_it(status.st_mode)), "not a regular file")
        raise CheckpointError(f"{path.name} is {kind}")
    return status


_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file; return its descriptor.

    Args:
        path: The file, whose parents may be links.
        flags: Flags of ``os.open``; with ``O_CREAT`` the file need not exist.

    Raises:
        CheckpointError: It is not a regular file.
        OSError: It cannot be opened.
    """
    try:
        require_regular(path)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    descriptor = os.open(path, flags | _FLAGS, 0o644)
    try:
        _require_regular(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """Return the content of a regular file, and its status when it was opened.

    Raises:
        CheckpointError: It is not a regular file, or larger than ``max_bytes``.
    """
    with open(open_regular(path), "rb") as file:
        status = os.fstat(file.fileno())
        data = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
        if max(status.st_size, len(data)) > max_bytes:
            raise CheckpointError(f"{path.name} is larger than {max_bytes // 1_000_000} MB")
    return data, status


def sha256(path: Path) -> str:
    """Return the sha256 of a regular file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(open_regular(path), "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
