"""Faults, as callables with which a new process prepares its own failure before it trains."""

import errno
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from bench import kill_self


@dataclass
class KillAt:
    """SIGKILL at a point of the save path, the ``number``-th time it is reached (from 1)."""

    point: str
    number: int = 1

    def fail(self):
        kill_self()

    def __call__(self):
        owner, name, matches, half = POINTS[self.point]
        inner, seen = getattr(owner(), name), 0

        def failing(*args, **kwargs):
            nonlocal seen
            if not matches(*args):
                return inner(*args, **kwargs)
            seen += 1
            if seen == self.number:
                if half == "after":
                    inner(*args, **kwargs)
                elif half is not None:
                    half(inner, *args, **kwargs)
                self.fail()
            return inner(*args, **kwargs)

        setattr(owner(), name, failing)


def _tensors():
    from manualloop.checkpoint import tensors

    return tensors


def _shutil():
    import shutil

    return shutil


def _os():
    return os


def _half_written(inner, *args, **kwargs):
    inner(*args, **kwargs)
    path = Path(args[-1])
    os.truncate(path, path.stat().st_size // 2)


def _half_text(inner, path, content, *args, **kwargs):
    inner(path, content[: len(content) // 2], *args, **kwargs)


def _half_removed(inner, path, *args, **kwargs):
    files = sorted(Path(path).iterdir())
    for file in files[: len(files) // 2]:
        file.unlink()


def _is_checkpoint(path, *rest):
    return ".step-" in str(path)


def _path():
    return Path


def _names(name):
    return lambda path, *rest: path.name.startswith(name)


def _writes(stem):
    return lambda tensors, path: path.name == f"{stem}.safetensors"


POINTS = {
    "mkdir": (_os, "mkdir", _is_checkpoint, None),
    "mkdir:after": (_os, "mkdir", _is_checkpoint, "after"),
    **{
        f"{stem}:{moment}": (_tensors, "_save", _writes(stem), half)
        for stem in ("model", "optimizer", "extras", "rng")
        for moment, half in (("before", None), ("half", _half_written), ("after", "after"))
    },
    **{
        f"{stem}:{moment}": (_path, function, _names(name), half)
        for stem, function, name in (
            ("state", "write_text", "state.json"),
            ("manifest", "write_bytes", "manifest.json"),
            ("probe", "write_bytes", ".probe-"),
        )
        for moment, half in (("before", None), ("half", _half_text), ("after", "after"))
    },
    "fsync": (_os, "fsync", lambda *args: True, None),
    "fsync:after": (_os, "fsync", lambda *args: True, "after"),
    "rename": (_os, "rename", lambda a, b: ".tmp-" in str(a), None),
    "rename:after": (_os, "rename", lambda a, b: ".tmp-" in str(a), "after"),
    "rotate": (_os, "rename", lambda a, b: ".trash-" in str(b), None),
    "rotate:renamed": (_os, "rename", lambda a, b: ".trash-" in str(b), "after"),
    "rotate:half": (_shutil, "rmtree", lambda path, *a: ".trash-" in str(path), _half_removed),
}


@dataclass
class DiskFull:
    """No space is left from the ``number``-th file of a checkpoint on."""

    number: int

    def __call__(self):
        inner, seen = os.fsync, 0

        def fsync(descriptor):
            nonlocal seen
            seen += 1
            if seen >= self.number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return inner(descriptor)

        os.fsync = fsync


@dataclass
class FullAt(KillAt):
    """No space is left at a point of the save path, after what was written before it."""

    def fail(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass
class FileSizeLimit:
    """The kernel limits the size of files from the ``number``-th rename on."""

    num_bytes: int
    number: int = 0

    def limit(self):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.num_bytes))

    def __call__(self):
        if self.number == 0:
            self.limit()
            return
        inner, seen = os.rename, 0

        def rename(source, target):
            nonlocal seen
            inner(source, target)
            seen += 1
            if seen == self.number:
                self.limit()

        os.rename = rename


@dataclass
class Gate:
    """Holds the process before its ``number``-th rename until a file exists."""

    path: str
    number: int

    def __call__(self):
        inner, seen = os.rename, 0

        def rename(source, target):
            nonlocal seen
            seen += 1
            deadline = time.monotonic() + 600
            while seen == self.number and not os.path.exists(self.path):
                if time.monotonic() > deadline:
                    os._exit(1)  # the test has failed, and nobody waits any more
                time.sleep(0.001)
            inner(source, target)

        os.rename = rename
