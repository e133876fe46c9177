"""A proof on the user's own script: a run that is interrupted and resumed ends as a whole one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from manualloop.arguments import check_arguments
from manualloop.errors import ConfigError, DistributedError
from manualloop.reading.reader import Reader
from manualloop.run.delivery import send_nothing
from manualloop.strategy.launch import num_launched
from manualloop.types import Step, Window


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """Whether an interrupted and resumed run ends as an uninterrupted one does.

    Printing it gives the result in words.

    Attributes:
        at: Step at which the run was interrupted.
        num_steps: Number of steps of the whole run.
        difference: The first difference in words; None if there is none.
    """

    at: int
    num_steps: int
    difference: str | None

    @property
    def is_exact(self) -> bool:
        """Whether batches, losses, history, weights and optimizer are equal to the last bit."""
        return self.difference is None

    def __str__(self) -> str:
        verdict = "equal to the last bit: batches, losses, history, weights, optimizer"
        if self.difference is not None:
            verdict = f"different. First: {self.difference}"
        return f"{self.num_steps} steps, interrupted after step {self.at} and resumed: {verdict}."

    __repr__ = __str__


def verify_resume(train_fn: Callable[..., Any], *, at: int) -> ResumeReport:
    """Interrupt a run, resume it, and compare it with an uninterrupted run.

    It uses three fresh processes. The first trains to the end, the second gets a SIGTERM after step
    ``at``, and the third resumes from its checkpoint. Any state that is not restored shows, such as
    that of a sampler with random numbers of its own, of a dataset that counts its reads, or of
    weights that are not in a ``state_dict``.

    Args:
        train_fn: ``train_fn(**options)`` builds everything, seeds included, calls
            ``train_loop(..., **options)`` once and returns its result. The options are
            ``checkpoint_dir`` and ``on_step``. A function of a module or script (a script then
            needs its ``if __name__ == "__main__":``); in a notebook, where the system can fork,
            any function.
        at: Number of steps after which to interrupt. A step inside an epoch, and inside an interval
            of the log, shows the most.

    Raises:
        ConfigError: ``at`` is not inside the run, or ``train_fn`` does not pass its options on, or
            cannot be sent to a process, as a function inside of another.
        DistributedError: A launcher has started several processes.
        RuntimeError: A process failed; its traceback is in the message.

    ::

        def train(**options):
            set_seed(0)
            ...
            return train_loop(model, loader, optimizer, num_epochs=2, **options)

        if __name__ == "__main__":
            print(verify_resume(train, at=7))
    """
    check_arguments(train_fn=train_fn, at=at)
    if num_launched() > 1:
        raise DistributedError(
            f"verify_resume was called in one of {num_launched()} processes that a launcher has "
            "started, and the processes that it starts itself could not form a group in there. "
            "Call it with plain `python`, in one process."
        )
    with TemporaryDirectory() as name:
        folder = Path(name)
        whole = _trace(train_fn, folder / "whole", None)
        num_steps = max(map(int, whole["steps"]), default=0)
        if at >= num_steps:
            raise ConfigError(f"at={at} is not inside the run: it has {num_steps} steps.")
        before = _trace(train_fn, folder / "resumed", at)
        after = _trace(train_fn, folder / "resumed", None)
    return ResumeReport(at, num_steps, _first_difference(whole, before, after, at))


def _first_difference(
    whole: dict[str, Any], before: dict[str, Any], after: dict[str, Any], at: int
) -> str | None:
    for number, expected in whole["steps"].items():
        part = before if int(number) <= at else after
        found = part["steps"].get(number)
        if found is None:
            return f"step {number} is missing, or has another number"
        for name, value in expected.items():
            if found[name] != value:
                again = ", before the interruption: the run differs every time. Set its seeds first"
                text = f"step {number}: {name} {value} -> {found[name]}"
                return text + (again if part is before else "")
    if extra := set(after["steps"]) - {n for n in whole["steps"] if int(n) > at}:
        return f"step {min(extra, key=int)} was made twice"
    for number, (expected, found) in enumerate(zip_longest(whole["rest"], after["rest"]), start=1):
        if expected != found:
            return f"batch {number} after the last step: {expected} -> {found}"
    for name, digest in whole["end"].items():
        if after["end"].get(name) != digest:
            return f"at the end: {name}"
    return None


def _trace(train_fn: Callable[..., Any], directory: Path, at: int | None) -> dict[str, Any]:
    """Train in a fresh process; return the trace that it wrote."""
    sent = _sent(train_fn)
    context: Any = multiprocessing.get_context("fork" if sent is None else "spawn")
    path = Path(f"{directory}-{at}.json")
    ours, theirs = context.Pipe()  # as an argument it would wait for a process that has ended
    given = train_fn if sent is None else theirs
    (process := context.Process(target=_write_trace, args=(given, directory, at, path))).start()
    theirs.close()
    if sent is not None:
        with suppress(BrokenPipeError, ConnectionResetError):
            ours.send_bytes(sent)
    process.join()
    trace: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    if "steps" not in trace:
        guard = 'A script must call verify_resume under if __name__ == "__main__":'
        error = trace.get("error", guard)
        raise RuntimeError(f"The process that trained ended with {process.exitcode}:\n{error}")
    return trace


def _sent(train_fn: Callable[..., Any]) -> bytes | None:
    """Return what a fresh process gets of a function; None: it lives in a notebook, to be forked.

    Raises:
        ConfigError: The function cannot be sent, and there is no notebook to fork.
    """
    is_script = hasattr(sys.modules["__main__"], "__file__")
    try:
        sent = bytes(ForkingPickler.dumps(train_fn))
    except Exception as error:  # of many classes: whatever an object of the user's raises
        if not is_script and "fork" in multiprocessing.get_all_start_methods():
            return None
        raise ConfigError(
            f"verify_resume sends train_fn to fresh processes, and it cannot be sent: {error}. "
            "Write it as a function of its own, outside of other functions, that builds everything "
            "it uses: def train(**options): ... return train_loop(..., **options)."
        ) from None
    if is_script or b"__main__" not in sent:
        return sent
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            "verify_resume starts fresh processes, which do not see functions of a notebook here. "
            "Write train_fn into a file beside the notebook, and import it: from training import "
            "train."
        )
    return None


def _write_trace(function: Any, directory: Path, at: int | None, path: Path) -> None:
    steps: dict[int, dict[str, Any]] = {}
    batches: list[str] = []
    given: Iterator[Window] = iter(())
    give = Reader.windows

    def give_and_note(reader: Reader, size: int, epoch: int | None = None) -> Iterator[Window]:
        nonlocal given
        windows, is_trained = give(reader, size, epoch), epoch is not None
        given = windows if is_trained else given
        return map(note, windows) if is_trained else windows

    def note(window: Window) -> Window:
        batches.append(_digest(window.batches))
        return window

    def on_step(step: Step) -> None:
        numbers: dict[str, Any] = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm}
        texts = {name: repr(None if n is None else float(n)) for name, n in numbers.items()}
        steps[step.index] = {"batches": list(batches), **texts}
        batches.clear()
        if step.index == at:
            os.kill(os.getpid(), signal.SIGTERM)

    Reader.windows = give_and_note  # type: ignore[assignment, method-assign]  # of this process
    send_nothing(directory)
    try:
        train_fn = function.recv() if hasattr(function, "recv") else function
        result = train_fn(checkpoint_dir=directory, on_step=on_step)
        if not steps or not list(directory.rglob("step-*")):
            raise ConfigError(
                "train_fn has not passed its options on: def train_fn(**options): ... return "
                "train_loop(..., **options)."
            )
        trace = {"steps": steps, "end": _describe_end(result), "rest": _digest_rest(given)}
    except (Exception, SystemExit) as error:
        trace = {"error": traceback.format_exc()}
        if at is not None and getattr(error, "code", None) == 128 + signal.SIGTERM:
            trace = {"steps": steps}  # the update was saved; what the signal stands for came after
    path.write_text(json.dumps(trace))


def _digest_rest(given: Iterator[Window]) -> list[str]:
    """Read the first batches after the last step."""
    found: list[str] = []
    with suppress(Exception):  # of the loader: that it comes at the same batch is compared as well
        rest = (batch for window in given for batch in window.batches)
        found.extend(map(_digest, islice(rest, 8)))
    return found


def _describe_end(result: Any) -> dict[str, str]:
    """Describe what a run leaves behind.

    The position is left out: it also holds random states that nothing draws from, and differ from
    process to process. It is right if the batches that follow are.
    """
    state = result.state.state_dict()
    state = {name: part for name, part in state.items() if name not in ("position", "generators")}
    for name, part in list(state.items()):
        if isinstance(part, list):  # a state of each optimizer
            state |= {f"{name} {number}": own for number, own in enumerate(part)}
    parts = {
        f"{name} {key}": value
        for name, part in state.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    parts |= {"history": result.history, "metrics": result.metrics}
    return {name: _digest(value) for name, value in parts.items()}


def _digest(value: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            # A copy, since a view of one number may have any stride.
            value = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(type(value).__name__.encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()[:16]
