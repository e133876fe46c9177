"""Folders that are whole or not there: written aside and sealed, then renamed into place."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from manualloop.checkpoint.files import hold_lock, sha256
from manualloop.checkpoint.manifest import FORMAT, MANIFEST, NAME, find_folders, manifest_bytes
from manualloop.errors import CheckpointError, ConfigError, ManualLoopError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\]")  # a drive of Windows has a single letter
_LEFTOVER = re.compile(r"\.(step-[0-9]{8,}(-[0-9]+)?\.(tmp|trash)|probe)-[0-9a-f]+")


def local_folder(path: object, name: str = "checkpoint_dir") -> Path:
    """Return the absolute path of a folder on this machine.

    It is made absolute once, so that a script may change its working folder later.

    Args:
        path: What the user gave: a text or a path, in which ``~`` stands for the home folder.
        name: Name of the argument, for messages.

    Raises:
        ConfigError: It is neither, it is empty, or it is a URL.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(text := os.fspath(path), bytes):
        raise ConfigError(f'{name} is a {type(path).__name__}, not a path such as "runs/mrpc".')
    if not text.strip() or "\0" in text:
        raise ConfigError(f'{name}={text!r} is not a path. Write one, such as {name}="runs/mrpc".')
    if _URL.match(text):
        raise ConfigError(
            f"{name}={text!r} is a URL, and checkpoints are written to local folders only. Write "
            f'them to one, such as {name}="runs/mrpc", and copy or mount that.'
        )
    return Path(os.path.expanduser(text)).absolute()  # `..` stays: it may follow a link


@contextmanager
def locked(directory: Path, *, again: bool = False) -> Iterator[None]:
    """Keep other runs out of a directory, which is made if it does not exist, and sweep it.

    Args:
        directory: The directory.
        again: Whether a holder of the lock in this process may enter again.

    Raises:
        CheckpointError: Another run holds the lock, or nothing can be written there.
    """
    with ExitStack() as stack:
        with explain_disk(directory):
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(directory, again=again))
            sweep(directory)
        yield


def write_folder(
    directory: Path,
    step: int,
    write: Callable[[Path], Iterable[Path]],
    content: dict[str, Any],
    aside: Path | None = None,
) -> Path:
    """Write a folder, whole or not at all, and return it.

    Order: each file, the manifest, the folder (all forced to disk), the rename, the directory. A
    kill or a power cut at any moment leaves the folder whole or absent. While one file is hashed
    and forced to disk the next is being written.

    Args:
        directory: The existing directory of the checkpoints.
        step: Number of updates, which names the folder.
        write: Called with the folder's temporary path; writes files there, yields each one.
        content: Content of the manifest, beside format, step and files.
        aside: A folder from ``make_aside`` that holds files already; ``write`` yields them, too.

    Raises:
        OSError: From the disk. What was written is removed, older folders are untouched.
    """
    final = _free_name(directory, step)
    aside = aside or make_aside(directory, step)
    try:
        files = _seal_all(write(aside))
        manifest = {"format": FORMAT, "step": step, **content, "files": files}
        path = aside / MANIFEST
        path.write_bytes(manifest_bytes(manifest))
        _fsync(path)
        _fsync(aside)
        os.rename(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _fsync(directory)
    return final


def make_aside(directory: Path, step: int) -> Path:
    """Make the folder in which a checkpoint is written, before it has its name."""
    aside = directory / f".{_free_name(directory, step).name}.tmp-{secrets.token_hex(4)}"
    os.mkdir(aside)
    return aside


def remove_folder(folder: Path) -> None:
    """Delete a folder so that no moment shows half of it: renamed first, then removed."""
    trash = folder.with_name(f".{folder.name}.trash-{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        os.rename(folder, trash)
        _remove(trash)


def sweep(directory: Path) -> None:
    """Remove what killed runs left half written or half removed. The caller holds the lock."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:  # of a link: what it points to is not ours
            path.unlink()


def _free_name(directory: Path, step: int) -> Path:
    # A second folder of the same step has a number, so that the first stays until it is there.
    taken = {
        int(name[2] or 1)
        for path in directory.iterdir()
        if (name := NAME.fullmatch(path.name)) and int(name[1]) == step
    }
    return directory / (f"step-{step:08}-{max(taken) + 1}" if taken else f"step-{step:08}")


def _seal_all(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Seal files in a thread of its own, while the next one is being written.

    Where no thread can be had, or it ends for want of memory, this one does the work: nothing
    waits for a thread that has not begun.
    """
    waiting: deque[Path] = deque()
    sealed: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    errors: list[BaseException] = []
    is_busy = Lock()

    def seal_waiting() -> None:
        with is_busy:
            try:
                while waiting and not errors:
                    path = waiting.popleft()
                    sealed[path.name] = _seal(path)
            except BaseException as error:
                errors.append(error)

    try:
        for path in paths:
            names.append(path.name)
            waiting.append(path)
            with suppress(RuntimeError):  # no more threads
                start_new_thread(seal_waiting, ())
        seal_waiting()
    finally:
        waiting.clear()
        with is_busy:  # what is being sealed is still open
            pass
    if errors:
        raise errors[0]
    return {name: sealed[name] for name in names}


def _seal(path: Path) -> dict[str, Any]:
    digest = sha256(path)
    _fsync(path)
    return {"size": path.stat().st_size, "sha256": digest}


def _fsync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens a directory to force it to disk
    # Windows forces only what it may write to.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explain_disk(directory: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an error of the disk into one that tells what to do.

    Args:
        directory: The directory of the checkpoints.
        num_bytes: Size of a checkpoint, if known.
    """
    try:
        yield
    except ManualLoopError:
        raise
    except Exception as error:  # of the disk, or for want of memory
        needed = "" if num_bytes is None else f" It takes {num_bytes / 1e6:.1f} MB."
        free = free_bytes(directory)
        space = "" if free is None else f" Free there: {free / 1e6:.1f} MB."
        entry = None
        with suppress(OSError):  # this disk may give nothing any more
            entry = next((e for e in find_folders(directory) if e.manifest is not None), None)
        last = "There is none from before." if entry is None else f"The last is {entry.path}."
        raise CheckpointError(
            f"No checkpoint could be written in {directory}: {_shown(error)}.{needed}{space} "
            f"{last} "
            "Free some space or make the folder writable, and start the run again: it resumes from "
            "there."
        ) from error


def _shown(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "memory ran out"
    return str(error) if isinstance(error, OSError) else repr(error)


def explain_memory(error: Exception, directory: Path) -> None:
    """Raise, for want of memory, an error that tells that older checkpoints are whole.

    Raises:
        CheckpointError: Memory ran out.
    """
    if _is_for_want_of_memory(error):
        raise CheckpointError(
            f"No checkpoint could be written in {directory}: memory ran out. Those from before are "
            "as they were."
        ) from error


def _is_for_want_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError | SystemError | torch.OutOfMemoryError):
            return True
        # What Python makes of a path for which it has no memory: "os.PathLike, not PosixPath".
        text, name = str(error), type(Path()).__name__
        if isinstance(error, TypeError) and "os.PathLike" in text and text.endswith(f"not {name}"):
            return True
        error = error.__cause__ or error.__context__
    return False


def free_bytes(directory: Path) -> int | None:
    """Return the free space of the disk that a folder is or will be on; None if it is unknown."""
    for folder in (directory, *directory.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None
