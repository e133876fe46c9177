"""Connections between the ranks of a run by which they learn at once that one of them is gone.

A collective operation tells no more than that it has failed, and with NCCL not even that. So every
rank keeps a connection to rank 0. The kernel closes it when a process ends, however that ends, and
rank 0 passes on who is gone. A rank that dies of an exception sends its traceback first.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import secrets
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
from weakref import WeakMethod

import torch

from manualloop.errors import DistributedError
from manualloop.internals import release_default_groups
from manualloop.notices import say

GRACE = 10.0
"""Seconds that a process has to end by itself once another rank is gone."""

_NEWS = 1.0  # seconds to wait for news that are on their way
_ANSWER = 2.0  # seconds that a rank has to answer
_CONNECT = 60.0  # seconds to wait for the other ranks at the start
_LET_GO = 0.2  # seconds for gloo's threads to let go of tensors at the end
_NUM_CHARACTERS = 20_000  # of a traceback, its end


class News(NamedTuple):
    """What became of a rank.

    Attributes:
        rank: Which one.
        state: "failed" with an exception, "gone" without a word, "silent": it does not answer;
            "ended": it has reached the end of its program.
        text: Its traceback.
    """

    rank: int
    state: str
    text: str = ""


class Lifeline:
    """This rank's end of the connections.

    Args:
        rank: Of this process.
        world_size: Number of ranks.
        share: Called with a value on every rank, returns those of all ranks, in order.
    """

    def __init__(self, rank: int, world_size: int, share: Callable[[Any], list[Any]]) -> None:
        self.rank = rank
        self._news: dict[int, News] = {}
        self._changed = threading.Condition()
        self._links: dict[int, socket.socket] = {}
        self._sending, self._calling = threading.Lock(), threading.Lock()
        self._answered: set[int] = set()
        self._is_ending = False
        self._listeners: list[threading.Thread] = []
        if rank == 0:
            self._accept(world_size, share)
        else:
            self._call(*share(None)[0])
        if not all(share(len(self._links) == (world_size - 1 if rank == 0 else 1))) and rank == 0:
            say("ranks cannot connect to rank 0: should one fail, the others say less about it.")
        os.register_at_fork(after_in_child=self._let_go)

    def _call(self, host: str, port: int, token: str) -> None:
        with suppress(OSError):
            link = socket.create_connection((host, port), timeout=_CONNECT)
            link.settimeout(None)
            self._links[0] = link
            self._send(0, {"rank": self.rank, "token": token})
            self._listen(0, link.makefile("rb"))

    def _accept(self, world_size: int, share: Callable[[Any], list[Any]]) -> None:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        is_local = host in ("localhost", "127.0.0.1")
        with (
            suppress(TimeoutError),
            socket.create_server(("127.0.0.1" if is_local else "", 0)) as server,
        ):
            server.settimeout(_CONNECT)
            token = secrets.token_hex(16)
            share((host, server.getsockname()[1], token))
            while len(self._links) < world_size - 1:
                link, _ = server.accept()
                link.settimeout(_ANSWER)
                lines = link.makefile("rb")
                peer = _read_hello(lines, token)
                if peer is None:
                    link.close()
                    continue
                link.settimeout(None)
                self._links[peer] = link
                self._listen(peer, lines)

    def _listen(self, peer: int, lines: IO[bytes]) -> None:
        thread = threading.Thread(target=self._hear, args=(peer, lines), daemon=True)
        self._listeners.append(thread)
        thread.start()

    def _hear(self, peer: int, lines: IO[bytes]) -> None:
        """Read what another rank says until its connection is closed."""
        with suppress(OSError, ValueError):
            for line in lines:
                message = json.loads(line)
                if "news" in message:
                    self._learn(News(*message["news"]))
                elif message["say"] == "who is there?":
                    self._send(peer, {"say": "here"})
                elif message["say"] == "call the roll":
                    threading.Thread(target=self._call_roll, daemon=True).start()
                else:
                    self._hear_answer(peer)
        if not self._is_ending:
            self._learn(News(peer, "gone"))

    def _hear_answer(self, peer: int) -> None:
        with self._changed:
            self._answered.add(peer)
            self._changed.notify_all()

    def _learn(self, news: News) -> None:
        with self._changed:
            if news.rank in self._news or news.rank == self.rank:
                return
            is_first = not self.failures()
            self._news[news.rank] = news
            self._changed.notify_all()
        if self.rank == 0:
            for peer in self._links.keys() - {news.rank}:
                self._send(peer, {"news": news})
        if news.state in ("failed", "gone") and is_first and not self._is_ending:
            _print(f"manualloop: {_describe(news)}; rank {self.rank} ends too.")
            threading.Thread(target=self._end_late, args=(news,), daemon=True).start()

    def _end_late(self, news: News) -> None:
        """End a process that waits for ever for a rank that is gone."""
        time.sleep(GRACE)
        _print(f"manualloop: rank {self.rank} still waits for rank {news.rank}, and is ended.")
        if news.text:
            _print(f"The traceback of rank {news.rank}:\n{news.text}")
        os._exit(1)

    def is_connected(self) -> bool:
        """Tell whether this process can tell the others: one that a rank has forked cannot."""
        return bool(self._links)

    def failures(self) -> list[News]:
        """Return what is known of ranks that have not reached their end."""
        return [news for news in list(self._news.values()) if news.state != "ended"]

    def explain(self) -> DistributedError | None:
        """Say which rank is gone, after a collective operation has failed; None: nobody knows."""
        if not self._wait(self.failures, _NEWS):
            if self.rank == 0:
                self._call_roll()
            else:
                self._answered.clear()
                self._send(0, {"say": "call the roll"})
                if not self._wait(lambda: self.failures() or self._answered, _ANSWER + 0.5):
                    self._learn(News(0, "silent"))
        known = self.failures() or list(self._news.values())
        if not known:
            return None
        news = known[0]
        more = f" The traceback of rank {news.rank}:\n\n{news.text}" if news.text else ""
        return DistributedError(
            f"{_describe(news)}, and rank {self.rank} cannot go on without it. A run with a "
            f"checkpoint_dir resumes from its last checkpoint when it is started again.{more}"
        )

    def _wait(self, condition: Callable[[], Any], seconds: float) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(condition, timeout=seconds))

    def _call_roll(self) -> None:
        """Ask every rank whether it is there; for rank 0."""
        with self._calling:
            self._answered.clear()
            for peer in self._links:
                self._send(peer, {"say": "who is there?"})
            self._wait(lambda: len(self._answered) == len(self._links), _ANSWER)
            for peer in self._links.keys() - self._answered:
                self._learn(News(peer, "silent"))
            for peer in self._links:
                self._send(peer, {"say": "all that are have answered"})

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        with self._sending, suppress(OSError, KeyError):  # its reader will notice
            self._links[peer].sendall(json.dumps(message).encode() + b"\n")

    def report(self, state: str, text: str = "") -> None:
        """Tell the others that this rank fails, or that it has reached its end."""
        self._is_ending = True
        for peer in self._links:
            self._send(peer, {"news": News(self.rank, state, text[-_NUM_CHARACTERS:])})

    def close(self) -> None:
        """Tell the others that this rank has reached its end, and hang up.

        A thread that still waits when Python ends is unwound by force, which may abort the process.
        """
        self.report("ended")
        for link in self._links.values():
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        for thread in self._listeners:
            thread.join(timeout=1)

    def _let_go(self) -> None:
        """Close the connections in a process that was forked: it is not this rank."""
        for link in self._links.values():
            os.close(link.detach())  # close() would wait for the file that is made of it
        self._links = {}


_lifeline: Lifeline | None = None
_before_end: list[WeakMethod[Callable[[], None]]] = []


def connect(
    rank: int,
    world_size: int,
    share: Callable[[Any], list[Any]],
    before_end: Callable[[], None],
) -> Lifeline:
    """Return this process's lifeline; it is connected at the first call, on every rank.

    Args:
        rank: Of this process.
        world_size: Number of ranks.
        share: Called with a value on every rank, returns those of all ranks, in order.
        before_end: A method that lets go of what holds a process group, called when the program
            ends without an error. It is held weakly.
    """
    global _lifeline
    _before_end.append(WeakMethod(before_end))
    if _lifeline is None:
        _lifeline = Lifeline(rank, world_size, share)
        previous = sys.excepthook

        def report_and_print(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            _report(error)
            previous(kind, error, trace)

        sys.excepthook = report_and_print
        atexit.register(_say_goodbye)
        Finalize(None, _say_goodbye, exitpriority=0)  # processes of multiprocessing know no atexit
    return _lifeline


def _report(error: BaseException) -> None:
    """Tell the others of an exception that ends this process; briefly, if one of them is why."""
    if _lifeline is None or not _lifeline.is_connected():
        return
    if _lifeline.failures():
        _lifeline.report("failed", f"{type(error).__name__}: {error}".partition("\n")[0])
        return
    _print(f"manualloop: rank {_lifeline.rank} failed:")
    _lifeline.report("failed", "".join(traceback.format_exception(error)))
    _leave_to_torchrun(error)


def _leave_to_torchrun(error: BaseException) -> None:
    """Write the exception where torchrun looks for it: it prints the first one's traceback last."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _say_goodbye() -> None:
    error = sys.exc_info()[1]
    if isinstance(error, SystemExit) and error.code and error.__context__ is not None:
        _report(error.__context__)  # torch's multiprocessing has caught it, and exits
    elif _lifeline is not None and _lifeline.is_connected() and not hasattr(sys, "last_value"):
        try:
            _end_group()
        finally:
            _lifeline.close()


def _end_group() -> None:
    """End the process group of gloo, and leave its threads the time to let go of tensors.

    Such a thread may be the last to hold a tensor of Python's. If it lets go of it while Python
    ends, Python ends the thread by force, and C++ aborts the process ("terminate called without an
    active exception"): seen in one of a hundred launches on a busy machine. Ending the group joins
    its threads, unless something else holds it; then the time has to do.
    """
    for method in _before_end:
        release = method()
        if release is not None:
            release()
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        release_default_groups()
        torch.distributed.destroy_process_group()
        time.sleep(_LET_GO)  # without Python's lock, for which such a thread waits


def _read_hello(lines: IO[bytes], token: str) -> int | None:
    """Return which rank has called; None: a stranger."""
    with suppress(OSError, ValueError):
        hello = json.loads(lines.readline(1000))
        if isinstance(hello, dict) and hello.get("token") == token:
            return int(hello["rank"])
    return None


def _describe(news: News) -> str:
    rank = f"rank {news.rank}"
    if news.state == "failed":
        return f"{rank} failed ({_exception_of(news.text)})"
    if news.state == "gone":
        return f"{rank} is gone (its process ended without a word: killed, or out of memory)"
    if news.state == "silent":
        return f"{rank} does not answer (its process is stopped, or its machine is gone)"
    return f"{rank} has ended before the others"


def _exception_of(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    is_first = re.compile(r"[\w.]+(: |$)")  # of the exception's lines, which follow the traceback
    return next((line for line in reversed(lines) if is_first.match(line)), lines[-1])[:200]


def _print(text: str) -> None:
    # Not by way of sys.stderr: a thread that was forked or interrupted may hold its lock.
    os.write(2, f"{text}\n".encode())
