"""Connections between the ranks, which tell all of them at once that one is gone.

A collective operation only reports that it failed, and with NCCL not even that. So every rank keeps
a connection to rank 0. The kernel closes it when a process ends, however it ends, and rank 0 tells
the other ranks. A rank that ends by an exception sends its traceback first.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.util import Finalize
from types import TracebackType
from typing import IO, Any, NamedTuple

import torch

from manualloop.errors import DistributedError
from manualloop.internals import release_default_groups
from manualloop.notices import say
from manualloop.strategy.calls import OUTSIDE, must_be_called
from manualloop.strategy.meeting import connect_ranks

GRACE = 10.0
"""Seconds that a process has to end by itself once another rank is gone."""

_REPORT = 1.0  # seconds to wait for a report that is on its way
_ANSWER = 2.0  # seconds that a rank has to answer
_CONNECT = 10.0  # seconds at most to connect to rank 0 at the start
_LINE = 300_000  # bytes of a message: those of a report are a fraction of it
_RELEASE = 0.2  # seconds for gloo's threads to release tensors at the end
_NUM_CHARACTERS = 20_000  # characters of a traceback that are sent: its end


class Report(NamedTuple):
    """A report that a rank has ended or does not answer.

    Attributes:
        rank: Number of the rank.
        state: "failed" for an exception, "gone" for an end without a report, "silent" for no
            answer, "ended" for the end of its program, "waited" for one that waits no longer.
        text: Traceback of the exception, or what was waited for.
    """

    rank: int
    state: str
    text: str = ""


class Connections:
    """The connections of this rank: to rank 0, or on rank 0 to all others.

    Args:
        rank: Number of this rank.
        links: The connections, by the number of the other rank.

    Attributes:
        call: Name of the function in which this rank waits for the others; empty for none.
    """

    def __init__(self, rank: int, links: dict[int, socket.socket]) -> None:
        self.rank, self.call = rank, ""
        self._reports: dict[int, Report] = {}
        self._changed = threading.Condition()
        self._links = links
        self._sending, self._checking = threading.Lock(), threading.Lock()
        self._answers: dict[int, str] = {}  # the calls of the ranks that have answered
        self._is_ending = False
        self._listeners: list[threading.Thread] = []
        for peer, link in links.items():
            self._listen(peer, link.makefile("rb"))
        os.register_at_fork(after_in_child=self._detach)

    def _listen(self, peer: int, lines: IO[bytes]) -> None:
        thread = threading.Thread(target=self._receive, args=(peer, lines), daemon=True)
        self._listeners.append(thread)
        thread.start()

    def _receive(self, peer: int, lines: IO[bytes]) -> None:
        """Read the messages of another rank until its connection is closed."""
        with suppress(LookupError, OSError, RecursionError, TypeError, ValueError):
            while line := lines.readline(_LINE):
                message = json.loads(line)
                if "report" in message:
                    self._learn(Report(*message["report"]))
                elif message["type"] == "ping":
                    self._send(peer, {"type": "answer", "calls": {self.rank: self.call}})
                elif message["type"] == "ping all":
                    threading.Thread(target=self._ping_all, daemon=True).start()
                else:
                    self._note_answers(message["calls"])
        if not self._is_ending:
            self._learn(Report(peer, "gone"))

    def _note_answers(self, calls: dict[str, str]) -> None:
        with self._changed:
            self._answers |= {int(rank): call for rank, call in calls.items()}
            self._changed.notify_all()

    def _learn(self, report: Report) -> None:
        with self._changed:
            before = self._reports.get(report.rank)
            if report.rank == self.rank or (before is not None and before.state != "waited"):
                return
            is_first = not self.failures()
            self._reports[report.rank] = report
            self._changed.notify_all()
        if self.rank == 0:
            for peer in self._links.keys() - {report.rank}:
                self._send(peer, {"report": report})
        if report.state in ("failed", "gone") and is_first and not self._is_ending:
            _print(f"manualloop: {_describe(report)}; rank {self.rank} ends too.")
            threading.Thread(target=self._end_late, args=(report,), daemon=True).start()

    def _end_late(self, report: Report) -> None:
        """End a process that would wait forever for a rank that is gone."""
        time.sleep(GRACE)
        _print(f"manualloop: rank {self.rank} still waits for rank {report.rank}, and is ended.")
        if report.text:
            _print(f"The traceback of rank {report.rank}:\n{report.text}")
        os._exit(1)

    def is_connected(self) -> bool:
        """Tell whether this process can reach the others. One that a rank has forked cannot."""
        return bool(self._links)

    def failures(self) -> list[Report]:
        """Return the reports of ranks that will not reach the end of their program."""
        reports = list(self._reports.values())
        return [report for report in reports if report.state not in ("ended", "waited")]

    def _has_news(self) -> bool:
        return any(report.state != "ended" for report in list(self._reports.values()))

    def explain(self, *, waited: bool = False) -> DistributedError | None:
        """Return an error that says why a collective operation has failed; None if nobody knows.

        Args:
            waited: Whether it has failed because the others did not come in time.
        """
        call = self.call
        if not self._wait(self._has_news, _REPORT) and self._links:
            self._ask_all()
        known = self.failures() or sorted(self._reports.values(), key=lambda r: r.state == "ended")
        if not known:
            return self._explain_wait(call) if waited and call else None
        report = known[0]
        more = f" The traceback of rank {report.rank}:\n\n{report.text}" if report.text else ""
        if report.state == "waited":
            return DistributedError(f"Rank {report.rank} waits no longer. {report.text}")
        missed = ""
        if report.state == "ended" and call not in ("", "train_loop", "train_steps"):
            missed = f" {must_be_called(call)}, and rank {self.rank} is in it. {OUTSIDE}"
        return DistributedError(
            f"{_describe(report)}, and rank {self.rank} cannot continue without it.{missed} A run "
            "with a checkpoint_dir resumes from its last checkpoint when it is started again."
            f"{more}"
        )

    def _explain_wait(self, call: str) -> DistributedError:
        """Return an error that names the ranks that have not come to a function, and tell them."""
        calls = {rank: there for rank, there in sorted(self._answers.items()) if there != call}
        where = [
            f"rank {rank} is {f'in {there}' if there else 'not in a function that takes all ranks'}"
            for rank, there in calls.items()
        ]
        text = (
            f"{must_be_called(call)}. Rank {self.rank} has waited in it for the others"
            f"{': ' if where else ''}{', '.join(where)}. {OUTSIDE} If the others only take longer, "
            'wait longer: prepare_strategy(timeout="2 h").'
        )
        for peer in self._links:
            self._send(peer, {"report": Report(self.rank, "waited", text)})
        return DistributedError(text)

    def _wait(self, condition: Callable[[], Any], seconds: float) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(condition, timeout=seconds))

    def _ask_all(self) -> None:
        """Ask every rank where it is, and note which ones do not answer."""
        if self.rank == 0:
            self._ping_all()
            return
        self._answers.clear()
        self._send(0, {"type": "ping all"})
        if not self._wait(lambda: self.failures() or self._answers, _ANSWER + 0.5):
            self._learn(Report(0, "silent"))

    def _ping_all(self) -> None:
        """Ask every rank for an answer, and tell all of them the answers. Only rank 0 can."""
        with self._checking:
            self._answers.clear()
            for peer in self._links:
                self._send(peer, {"type": "ping"})
            self._wait(lambda: len(self._answers) == len(self._links), _ANSWER)
            for peer in self._links.keys() - self._answers:
                self._learn(Report(peer, "silent"))
            calls = {0: self.call, **self._answers}
            for peer in self._links:
                self._send(peer, {"type": "all pinged", "calls": calls})

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        with self._sending, suppress(OSError, KeyError):  # the thread that reads will notice
            self._links[peer].sendall(json.dumps(message).encode() + b"\n")

    def report(self, state: str, text: str = "") -> None:
        """Tell the other ranks that this one fails, or that it has reached its end."""
        self._is_ending = True
        for peer in self._links:
            self._send(peer, {"report": Report(self.rank, state, text[-_NUM_CHARACTERS:])})

    def close(self) -> None:
        """Tell the other ranks that this one has reached its end, and close the connections.

        A thread that still waits when Python ends is unwound by force, which may abort the process.
        """
        self.report("ended")
        for link in self._links.values():
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        for thread in self._listeners:
            thread.join(timeout=1)

    def _detach(self) -> None:
        """Close the connections in a forked process, which is not this rank."""
        for link in self._links.values():
            os.close(link.detach())  # close() would wait for the file that is made of it
        self._links = {}


_connections: Connections | None = None
_before_end: list[Callable[[], None]] = []


def connect(
    rank: int,
    world_size: int,
    share: Callable[[Any], list[Any]],
    timeout: float | None,
) -> Connections:
    """Return the connections of this process, which the first call makes. Call on every rank.

    Args:
        rank: Number of this rank.
        world_size: Number of ranks.
        share: Function that is called with a value on every rank, and returns the values of all
            ranks in their order.
        timeout: Seconds that ranks wait for each other; None for torch's default.
    """
    global _connections
    if _connections is None:
        seconds = _CONNECT if timeout is None else min(_CONNECT, timeout / 4)
        links, problem = connect_ranks(rank, world_size, share, seconds)
        if problem is not None and rank == 0:
            say(problem)
        _connections = Connections(rank, links)
        previous = sys.excepthook

        def report_and_print(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            _report(error)
            previous(kind, error, trace)

        sys.excepthook = report_and_print
        atexit.register(_close_at_end)
        Finalize(None, _close_at_end, exitpriority=0)  # processes of multiprocessing know no atexit
    return _connections


def release_at_end(method: Callable[[], None]) -> None:
    """Call a method when the program ends without an error, and keep its object until then.

    An object that a rank's garbage collection could take would be missed on that rank alone: it
    would prepare a model again, which takes all ranks, and wait for ever.

    Args:
        method: Method that releases what holds a process group.
    """
    _before_end.append(method)


def _report(error: BaseException) -> None:
    """Report an exception that ends this process; in one line if another rank is the cause."""
    if _connections is None or not _connections.is_connected():
        return
    if _connections.failures():
        _connections.report("failed", f"{type(error).__name__}: {error}".partition("\n")[0])
        return
    _print(f"manualloop: rank {_connections.rank} failed:")
    _connections.report("failed", "".join(traceback.format_exception(error)))
    _leave_to_torchrun(error)


def _leave_to_torchrun(error: BaseException) -> None:
    """Write the exception where torchrun looks for it, so that its traceback is printed last."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _close_at_end() -> None:
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit) and error.code and error.__context__ is not None:
        _report(error.__context__)  # torch's multiprocessing has caught it, and exits
    elif (
        _connections is not None and _connections.is_connected() and not hasattr(sys, "last_value")
    ):
        try:
            _end_group()
        finally:
            _connections.close()


def _end_group() -> None:
    """End the process group of gloo, after its threads have had time to release tensors.

    Such a thread may be the last to hold a tensor of Python's, and needs Python's lock to release
    it. If Python ends first, it ends the thread by force, and C++ aborts the process ("terminate
    called without an active exception": seen in one of a hundred launches on a busy machine). And
    the group joins its threads when it is released, with torch 2.6 while it holds the lock: then
    both would wait for ever.
    """
    if torch.distributed.is_initialized():
        time.sleep(_RELEASE)  # without the lock
    for release in _before_end:
        release()
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        release_default_groups()
        torch.distributed.destroy_process_group()


def _describe(report: Report) -> str:
    rank = f"rank {report.rank}"
    if report.state == "failed":
        return f"{rank} failed ({_exception_of(report.text)})"
    if report.state == "gone":
        return f"{rank} is gone (its process ended without a report: killed, or out of memory)"
    if report.state == "waited":
        return f"{rank} waits no longer"
    if report.state == "silent":
        return f"{rank} does not answer (its process is stopped, or its machine is gone)"
    return f"{rank} has ended before the others"


def _exception_of(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    is_first = re.compile(r"[\w.]+(: |$)")  # of the exception's lines, which follow the traceback
    return next((line for line in reversed(lines) if is_first.match(line)), lines[-1])[:200]


def _print(text: str) -> None:
    # Not by way of sys.stderr: a thread that was forked or interrupted may hold its lock.
    os.write(2, f"{text}\n".encode())
