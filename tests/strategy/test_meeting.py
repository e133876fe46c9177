"""Ranks find rank 0 by whatever address leads there, and strangers cannot disturb them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from processes import run

from manualloop import DistributedError
from manualloop.strategy import meeting
from manualloop.strategy.meeting import (
    Host,
    Invitation,
    Listener,
    connect_ranks,
    describe_host,
    explaining_network,
)

FOREVER = 600.0


class Group:
    """Threads in the place of ranks."""

    def __init__(self, world_size: int) -> None:
        self.values: list[Any] = [None] * world_size
        self.barrier = threading.Barrier(world_size)

    def share(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait(FOREVER)
            found = list(self.values)
            self.barrier.wait(FOREVER)
            return found

        return gather


def meet(world_size: int = 3, seconds: float = FOREVER) -> list[Any]:
    """Connect so many ranks, and return what each of them got."""
    group = Group(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [
            pool.submit(connect_ranks, rank, world_size, group.share(rank), seconds)
            for rank in range(world_size)
        ]
        return [rank.result() for rank in ranks]


def close(found: list[Any]) -> None:
    for links, _ in found:
        for link in links.values():
            link.close()


def require_linked(found: list[Any]) -> None:
    """Check that rank 0 is connected to each of the others, and can tell them apart."""
    assert [problem for _, problem in found] == [None] * len(found)
    for rank, (links, _) in enumerate(found[1:], start=1):
        links[0].sendall(f"from {rank}".encode())
        assert found[0][0][rank].recv(100) == f"from {rank}".encode()
    close(found)


def test_ranks_on_one_machine_meet_on_its_loopback_address() -> None:
    found = meet()
    assert found[1][0][0].getpeername()[0] == "127.0.0.1"
    require_linked(found)


HELLO = f"{'0' * 32}{1:08d}".encode()


@pytest.mark.parametrize(
    "sent",
    [b"", b"[", b"[" * 9999 + b"\n", HELLO, HELLO[:39], b"\xff" * 40, b"GET / HTTP/1.1\r\n\r\n"],
    ids=["nothing", "a byte", "deep", "wrong", "too short", "no text", "http"],
)
def test_strangers_do_not_disturb(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    listen, strangers = socket.socket.listen, []

    def listen_and_meet_strangers(server: Any, *args: Any) -> None:
        listen(server, *args)
        for _ in range(20):  # before any rank can come; they stay until the end
            strangers.append(socket.create_connection(server.getsockname()))
            strangers[-1].sendall(sent)

    monkeypatch.setattr(socket.socket, "listen", listen_and_meet_strangers)
    found = meet()
    require_linked(found)
    for stranger in strangers:
        stranger.close()


def test_no_number_of_silent_strangers_keeps_the_ranks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_HELLO", FOREVER)
    monkeypatch.setattr(meeting, "_NUM_PENDING", 4)
    with Listener(2, is_local=True) as listener, ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.key[0])))
            for _ in range(12)
        ]
        closed = [stranger.recv(1) for stranger in strangers[:8]]  # the oldest; else this hangs
        assert closed == [b""] * 8
        link = meeting._connect(1, Invitation((("127.0.0.1",),) * 2, *listener.key), FOREVER)
    assert link is not None
    link.close()
    listener.links[1].close()


def test_a_stranger_that_sends_byte_by_byte_runs_out_of_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meeting, "_HELLO", 0.2)
    with (
        Listener(2, is_local=True) as listener,
        socket.create_connection(("127.0.0.1", listener.key[0])) as stranger,
    ):
        with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe
            while True:
                stranger.sendall(b"0")
                time.sleep(0.1)
        assert listener.links == {}


def test_a_rank_cannot_come_twice_or_as_another() -> None:
    with Listener(3, is_local=True) as listener:
        port, token, answer = listener.key
        links = []
        for number in (1, 1, 0, 3, 99999999):
            link = socket.create_connection(("127.0.0.1", port))
            link.sendall(f"{token}{number:08d}".encode())
            links.append(link)
            assert link.recv(32) == (answer.encode() if len(links) == 1 else b"")
    assert list(listener.links) == [1]
    for link in [*links, listener.links[1]]:
        link.close()


def test_a_rank_tries_all_addresses_and_believes_only_rank_0() -> None:
    with (
        Listener(2, is_local=True) as listener,
        socket.create_server(("127.0.0.2", listener.key[0])) as other,  # it never answers
    ):
        ways = ("::1", "127.0.0.3", "192.0.2.1", "127.0.0.2", "no address", "127.0.0.1")
        link = meeting._connect(1, Invitation((ways,) * 2, *listener.key), FOREVER)
        assert link is not None
        assert link.getpeername()[0] == "127.0.0.1"
        link.close()
        listener.links[1].close()
        impostor = (*listener.key[:2], "f" * 32)
        assert meeting._connect(1, Invitation((ways,) * 2, *impostor), 0.3) is None
        other.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ranks_of_several_machines_meet_by_either_family(monkeypatch: pytest.MonkeyPatch) -> None:
    with Listener(3, is_local=False) as listener:
        for rank, address in ((1, "127.0.0.1"), (2, "::1")):
            link = meeting._connect(rank, Invitation(((address,),) * 3, *listener.key), FOREVER)
            if link is None:
                pytest.skip("this machine has no IPv6 on its loopback interface")
            link.close()
    for link in listener.links.values():
        link.close()


def test_the_addresses_are_those_that_lead_from_machine_to_machine() -> None:
    hosts = [
        Host("a", ("127.0.0.1", "::1"), ("10.0.0.1", "fd00::1")),  # MASTER_ADDR=localhost
        Host("b", ("10.0.0.1",), ("10.0.0.2",)),
        Host("c", ("127.0.1.1",), ()),  # a hosts file as Debian writes it
    ]
    ways = meeting._ways(hosts, is_local=False)
    assert ways[1][0] == "10.0.0.1"
    assert set(ways[1]) >= {"10.0.0.1", "fd00::1"}
    assert not any(address.startswith(("127.", "::1")) for of_rank in ways for address in of_rank)
    assert "10.0.0.1" in ways[2]


def test_ranks_that_cannot_connect_are_named_and_the_run_continues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machines = iter("ab")
    monkeypatch.setattr(meeting, "_machine", lambda: next(machines))
    monkeypatch.setattr(meeting, "_ways", lambda hosts, is_local: ((), ()))
    found = meet(world_size=2, seconds=0.1)
    assert [links for links, _ in found] == [{}, {}]
    assert all("rank 1 first, cannot connect to rank 0" in problem for _, problem in found)


def test_a_host_is_described_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    host = describe_host(1.0)
    assert host.master == ()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert describe_host(FOREVER).master == ("127.0.0.1",)
    assert describe_host(FOREVER).machine == host.machine


def test_other_errors_stay_what_they_are() -> None:
    def fail() -> None:
        raise ValueError("Your assigned backend is not available")

    with pytest.raises(ValueError, match="assigned backend") as raised:
        explaining_network(fail)
    assert not isinstance(raised.value, DistributedError)


def test_a_rank_whose_group_cannot_be_connected_is_told_what_to_set(tmp_path: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "script.py"
    script.write_text("from manualloop import prepare_strategy; prepare_strategy(timeout=0.5)")
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    ran = run(script, env=os.environ | variables | {"MASTER_ADDR": "127.0.0.1"})
    assert ran.returncode == 1
    assert "DistributedError: The ranks cannot connect to each other" in ran.output
    assert "GLOO_SOCKET_IFNAME=" in ran.output


def test_a_rank_that_waits_for_the_others_logs_what_may_be_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can interrupt the constructor of a process group."""
    logged = threading.Event()
    monkeypatch.setattr(meeting, "_PATIENCE", 0.01)
    monkeypatch.setattr(meeting, "say", lambda text, **_: (texts.append(text), logged.set()))
    texts: list[str] = []
    assert explaining_network(lambda: logged.wait(FOREVER))
    assert "still connecting to the other ranks" in texts[0]
    assert "GLOO_SOCKET_IFNAME=" in texts[0]


def test_ranks_that_connect_in_time_log_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setattr(meeting, "say", lambda *_, **__: pytest.fail("it was not late"))
    assert explaining_network(lambda: 3) == 3
    while threading.active_count() > before:  # its timer was cancelled
        time.sleep(0.01)
