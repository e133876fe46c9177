"""Faults, as callables that a fresh process calls on itself before it trains."""

import errno
import os
import resource
from dataclasses import dataclass
from pathlib import Path

from bench import kill_self


def calls_of(point):
    """Name the calls that a point of the save path stands for."""
    return POINTS[point]


@dataclass
class KillAt:
    """SIGKILL at a point of the save path, the ``number``-th time it is reached (from 1)."""

    point: str
    number: int = 1

    def __call__(self):
        owner, name, matches, half = POINTS[self.point]
        inner, seen = getattr(owner(), name), 0
        strike = self

        def struck(*args, **kwargs):
            nonlocal seen
            if not matches(*args):
                return inner(*args, **kwargs)
            seen += 1
            if seen == strike.number:
                if half == "after":
                    inner(*args, **kwargs)
                elif half is not None:
                    half(inner, *args, **kwargs)
                kill_self()
            return inner(*args, **kwargs)

        setattr(owner(), name, struck)


def _tensors():
    import manualloop.tensors

    return manualloop.tensors


def _folder():
    import manualloop.folder

    return manualloop.folder


def _shutil():
    import shutil

    return shutil


def _os():
    return os


def _half_written(inner, *args, **kwargs):
    inner(*args, **kwargs)
    path = Path(args[-1])
    os.truncate(path, path.stat().st_size // 2)


def _half_removed(inner, path, *args, **kwargs):
    files = sorted(Path(path).iterdir())
    for file in files[: len(files) // 2]:
        file.unlink()


def _is_checkpoint(path, *rest):
    return ".step-" in str(path)


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
    """Every write of a checkpoint from the ``number``-th file on fails: no space left."""

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
class FileSizeLimit:
    """The kernel lets no file grow beyond so many bytes."""

    num_bytes: int

    def __call__(self):
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then write() fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.num_bytes))
