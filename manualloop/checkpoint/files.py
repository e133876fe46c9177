"""Files of a folder that somebody else may have prepared: opened safely, verified, and locked.

Only regular files of the folder itself are opened. A link would lead to a file elsewhere, opening a
pipe would wait for its other end, and a device may act when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from manualloop.errors import CheckpointError
from manualloop.notices import say

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

MAX_JSON_BYTES = 100_000_000
TOO_LARGE = 2**1000  # larger whole numbers are no float; comparing them with one would fail

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


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file, which must be a regular one.

    Raises:
        CheckpointError: It is not a regular file, or larger than ``max_bytes``.
        ValueError: It is not JSON.
    """
    return parse_json(read_regular(path, max_bytes)[0])


def parse_json(data: bytes) -> Any:
    """Parse JSON, without what Python's parser takes beyond it: NaN, and numbers beyond a float.

    Raises:
        ValueError: It is not JSON.
    """
    return json.loads(data, parse_constant=_refuse_number, parse_float=_finite, parse_int=_whole)


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name:.20} in JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        _refuse_number(text)
    return value


def _whole(text: str) -> int:
    if abs(value := int(text)) >= TOO_LARGE:
        _refuse_number(text)
    return value


def verify_folder(folder: Path, manifest: dict[str, Any], *, hashes: bool = True) -> None:
    """Compare every file with the size in the manifest, and with its sha256.

    Args:
        folder: The folder of a checkpoint.
        manifest: The content of its manifest.
        hashes: Whether the sha256 is compared, which reads every file.

    Raises:
        CheckpointError: A file is missing, or not the one that was written; or there is more than
            this machine has memory.
    """
    checks = [_verify_size, _verify_hash] if hashes else [_verify_size]
    for check in checks:
        for name, expected in manifest["files"].items():
            try:
                check(folder / name, expected)
            except CheckpointError:
                raise
            except FileNotFoundError as error:
                raise CheckpointError(f"{name} is missing") from error
            except OSError as error:  # a bad sector, say: an older checkpoint may be whole
                raise CheckpointError(f"{name} cannot be read: {error}") from error
        _require_memory(manifest["files"])


def _verify_size(path: Path, expected: dict[str, Any]) -> None:
    found = require_regular(path)
    if found.st_size != expected["size"]:
        raise CheckpointError(f"{path.name} has {found.st_size} bytes, not {expected['size']}")


def _verify_hash(path: Path, expected: dict[str, Any]) -> None:
    if sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path.name} is damaged: its sha256 is another")


def _require_memory(files: Mapping[str, Any]) -> None:
    """Refuse files that are larger than the memory of this machine, before they are read."""
    size = sum(file["size"] for name, file in files.items() if not name.startswith("shard-"))
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return  # unknown on this system
    if 0 < memory < size:
        raise CheckpointError(
            f"its files have {size / 1e9:.0f} GB, and this machine {memory / 1e9:.0f} GB of memory"
        )


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
        descriptor = _open_lock(path)
        try:
            # Of the process, not of the open file: workers that it forks must not keep it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner_in(descriptor)
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
    if owner := _owner_in(descriptor):
        say(f"taking over {directory} from a run that did not end by itself: {owner}.")
    text = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(text).encode(), 0)


def _open_lock(path: Path) -> int:
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
        ) from error.__cause__
    return descriptor


def _owner_in(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        text = f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return text if text.isprintable() else ""  # it may command the terminal
