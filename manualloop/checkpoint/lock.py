"""A lock that admits one run to a folder, and ends with its process however that ends."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from manualloop.checkpoint.files import open_regular
from manualloop.errors import CheckpointError
from manualloop.notices import say

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: dict[str, int] = {}  # folder to process: a fork does not hold what its parent does


@contextmanager
def hold_lock(directory: Path, *, again: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder.

    The kernel releases the lock when the process ends, so that a kill never leaves it behind; the
    file then tells whose lock it was.

    Args:
        directory: An existing folder.
        again: Whether a holder of the lock in this process may enter again.

    Raises:
        CheckpointError: Another run holds the lock; the message names it.
    """
    key = os.path.realpath(directory)
    if _held.get(key) == os.getpid():
        if not again:
            raise CheckpointError(
                f"Another run of this process uses {directory}. Give each its own checkpoint_dir."
            )
        yield
        return
    if fcntl is None:
        say(f"this system has no file locks: start no second run in {directory}.")
        yield
        return
    descriptor = _acquire(directory / LOCK)
    try:
        _held[key] = os.getpid()
        _sign(descriptor, directory)
        yield
    finally:
        _held.pop(key, None)
        with suppress(OSError):  # the folder may be gone, or read-only by now
            os.unlink(directory / LOCK)
        with suppress(OSError):  # it is closed all the same
            os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = _open(path)
        try:
            # Of the process, not of the open file: workers that it forks must not keep it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read(descriptor)
            os.close(descriptor)
            raise CheckpointError(
                f"Another run uses {path.parent}: {owner or 'it has just begun'}. Wait for its "
                "end, or give this one its own checkpoint_dir."
            ) from error
        except OSError as error:
            say(f"{path} cannot be locked ({error}): start no second run in its folder.")
            return descriptor
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # its owner has removed it since it was opened
    return descriptor


def _sign(descriptor: int, directory: Path) -> None:
    """Write into the file of a lock whose it is."""
    if owner := _read(descriptor):
        say(f"taking over {directory} from a run that did not end by itself: {owner}.")
    text = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(text).encode(), 0)


def _open(path: Path) -> int:
    """Open the file of a lock, which must be no other file by another name.

    Raises:
        CheckpointError: It is a link, a pipe, ..., or has a name elsewhere, too.
    """
    try:
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        if os.fstat(descriptor).st_nlink > 1:
            os.close(descriptor)
            raise CheckpointError(f"{path.name} has another name elsewhere (a hard link)")
    except CheckpointError as error:
        raise CheckpointError(
            f"{path.parent} cannot be locked: {error}, and nothing outside the folder is written "
            f"to. If no run uses the folder, remove it: rm {path}"
        ) from error
    return descriptor


def _read(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        text = f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return text if text.isprintable() else ""  # it may command the terminal
