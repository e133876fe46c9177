"""Folders that are whole or not there: written aside, guarded by a manifest, renamed into place.

A folder ``step-00000500`` holds files and ``manifest.json``, which lists each file with its size
and sha256 and is written last. It guards itself too: its bytes must be those that its content
gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from manualloop.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-([0-9]{8,})(?:-([0-9]+))?")
_LEFTOVER = re.compile(r"\.(step-[0-9]{8,}(-[0-9]+)?\.(tmp|trash)|probe)-[0-9a-f]+")
_MAX_MANIFEST_BYTES = 100_000_000


class Found(NamedTuple):
    """A folder in a directory of checkpoints.

    Attributes:
        path: Of the folder.
        manifest: Its content; None if it cannot be used.
        problem: Why it cannot.
    """

    path: Path
    manifest: dict[str, Any] | None
    problem: str = ""


def find_folders(directory: Path) -> list[Found]:
    """List the folders with our names, newest first: by the step in the manifest, and no clock."""
    found = []
    with suppress(FileNotFoundError):
        for path in directory.iterdir():
            if (name := _NAME.fullmatch(path.name)) is None or not path.is_dir():
                continue
            step, number = int(name[1]), int(name[2] or 0)
            try:
                manifest = read_manifest(path)
                found.append((int(manifest["step"]), number, Found(path, manifest)))
            except CheckpointError as error:
                found.append((step, number, Found(path, None, str(error))))
    return [entry for _, _, entry in sorted(found, key=lambda f: f[:2], reverse=True)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of a manifest.

    Raises:
        CheckpointError: It is missing or damaged, of a newer format, or names files elsewhere.
    """
    path = folder / MANIFEST
    try:
        data = _read_regular(path, _MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError("no manifest.json") from error
    except OSError as error:
        raise CheckpointError(f"manifest.json cannot be read: {error}") from error
    try:
        manifest = json.loads(data, parse_constant=refuse_constant)
        is_whole = isinstance(manifest, dict) and _manifest_bytes(manifest) == data
    except (ValueError, RecursionError, UnicodeError):
        is_whole = False
    if not is_whole:
        raise CheckpointError("manifest.json is damaged")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"format {manifest.get('format')!r} is not {FORMAT}: another version of manualloop "
            "wrote it"
        )
    if not _has_our_types(manifest):
        raise CheckpointError("manifest.json is not one of ours")
    for name in manifest["files"]:
        if not _is_name(name):
            raise CheckpointError(f"the manifest names {name!r}, which is not a file of the folder")
    return dict(manifest)


def verify_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with size and sha256 in the manifest.

    Raises:
        CheckpointError: A file is missing, or not the one that was written.
    """
    for name, expected in manifest["files"].items():
        try:
            _verify_file(folder / name, expected)
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(f"{name} is missing") from error
        except OSError as error:  # a bad sector, say: an older checkpoint may be whole
            raise CheckpointError(f"{name} cannot be read: {error}") from error


def _verify_file(path: Path, expected: dict[str, Any]) -> None:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise CheckpointError(f"{path.name} is {kind}")
    if found.st_size != expected["size"]:
        raise CheckpointError(f"{path.name} has {found.st_size} bytes, not {expected['size']}")
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path.name} is damaged: its sha256 is another")


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
        directory: That the folder goes into. It exists.
        step: Names the folder.
        write: Called with the folder's temporary path; writes files there, yields each one.
        content: Of the manifest, beside format, step and files.
        aside: From ``make_aside``, with files in it already, which ``write`` yields, too.

    Raises:
        OSError: From the disk. What was written is removed, older folders are untouched.
    """
    aside = aside or make_aside(directory, step)
    final = _free_name(directory, step)
    try:
        with ThreadPoolExecutor(1) as pool:
            sealing = {path.name: pool.submit(_seal, path) for path in write(aside)}
            files = {name: sealed.result() for name, sealed in sealing.items()}
        manifest = {"format": FORMAT, "step": step, **content, "files": files}
        path = aside / MANIFEST
        path.write_bytes(_manifest_bytes(manifest))
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
    """Remove what killed runs have left half written or half removed. For the lock's holder."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    if (
        path.is_symlink() or path.is_file()
    ):  # a link to a folder: what it points to is not ours, and rmtree leaves the link
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _free_name(directory: Path, step: int) -> Path:
    # A second folder of the same step has a number, so that the first stays until it is there.
    taken = {
        int(name[2] or 1)
        for path in directory.iterdir()
        if (name := _NAME.fullmatch(path.name)) and int(name[1]) == step
    }
    return directory / (f"step-{step:08}-{max(taken) + 1}" if taken else f"step-{step:08}")


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1, allow_nan=False) + "\n").encode()


def _is_name(name: str) -> bool:
    is_base = name == os.path.basename(name) and "\\" not in name
    return is_base and name.isprintable() and name not in ("", ".", "..", MANIFEST)


def _has_our_types(manifest: dict[str, Any]) -> bool:
    step, files = manifest.get("step"), manifest.get("files")
    return (
        type(step) is int
        and step >= 0
        and isinstance(manifest.get("metrics"), dict)
        and {"best_metric", "contract"} <= set(manifest)
        and isinstance(manifest["best_metric"], str | None)
        and isinstance(manifest["contract"], dict | None)
        and isinstance(files, dict)
        and all(isinstance(f, dict) and {"size", "sha256"} <= set(f) for f in files.values())
    )


def refuse_constant(name: str) -> None:
    """Refuse what Python's JSON takes and JSON is not: NaN and the infinities."""
    raise ValueError(f"{name} in JSON")


def _read_regular(path: Path, max_bytes: int) -> bytes:
    # Opening a pipe would wait for its writer.
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | more)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        return file.read(max_bytes)


def _seal(path: Path) -> dict[str, Any]:
    digest = _sha256(path)
    _fsync(path)
    return {"size": path.stat().st_size, "sha256": digest}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens a directory to force it to disk
    # Windows forces only what it may write to.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_names(entries: Iterable[Found]) -> Iterator[str]:
    """Say of each folder what it is good for: "step-00000007 (no manifest.json)"."""
    for entry in entries:
        yield f"{entry.path.name} ({entry.problem or 'whole'})"
