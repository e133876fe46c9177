"""How the other ranks find rank 0 and connect to it, whatever the network between them is like.

Rank 0 listens on the loopback address if all ranks share a machine, else on all addresses of both
families. The others try every address by which it may be reached, at the same time, and keep the
first on which it answers. Whatever else connects is closed when it has sent a few wrong bytes, or
none for a few seconds. All of this ends in time, connected or not.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from manualloop.errors import DistributedError, ManualLoopError
from manualloop.notices import say

_T = TypeVar("_T")

_HELLO = 5.0  # seconds that a connection has to send who it is
_NUM_PENDING = 64  # connections that may be about to do so
_SIZE = 32  # characters of a token
_HELLO_SIZE = _SIZE + 8
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # reserved for examples: nothing is ever sent there


class Host(NamedTuple):
    """The machine of a rank.

    Attributes:
        machine: What ranks on one machine have in common, and others have not.
        master: The addresses of MASTER_ADDR, as this machine finds them.
        addresses: Its own addresses, as far as it knows them.
    """

    machine: str
    master: tuple[str, ...]
    addresses: tuple[str, ...]


def describe_host(seconds: float) -> Host:
    """Describe the machine of this process, in so many seconds at most."""
    deadline = time.monotonic() + seconds
    master = _resolve(os.environ.get("MASTER_ADDR", ""), seconds / 2)
    own = [*_resolve(socket.gethostname(), deadline - time.monotonic())]
    own += [_facing(address) for address in (*master, *_ELSEWHERE)]
    return Host(_machine(), tuple(master), tuple(dict.fromkeys(filter(_is_far, own))))


def _machine() -> str:
    """Return what tells machines apart, and containers with networks of their own."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/net"))
    return " ".join(parts)


def _resolve(name: str, seconds: float) -> list[str]:
    """Return the addresses of a host, of both families; none if that takes too long."""
    found: list[str] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(address[0]) for *_, address in entries))

    if name:
        thread = threading.Thread(target=ask, daemon=True)  # a name server may not answer
        thread.start()
        thread.join(max(0.0, seconds))
    return list(found)


def _facing(address: str) -> str:
    """Return the own address from which another one is reached; nothing is sent there."""
    with suppress(OSError, ValueError):
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    return ""


def _is_far(address: str) -> bool:
    """Tell whether an address may lead from one machine to another."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return not (found.is_loopback or found.is_unspecified or found.is_link_local)


def explaining_network(make: Callable[[], _T]) -> _T:
    """Call a function that connects process groups, and explain why they cannot be connected.

    A rank whose own address is right waits for those whose address is wrong, for minutes, and
    nothing interrupts it. So after half a minute it logs what may be the reason.

    Raises:
        DistributedError: They cannot; it names the variables that choose another network.
    """
    timer = threading.Timer(_PATIENCE, _advise)
    timer.daemon = True
    timer.start()
    try:
        return make()
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ManualLoopError) or not _NETWORK.search(f"{error!r}"):
            raise
        raise DistributedError(_explain_network(str(error))) from error
    finally:
        timer.cancel()


_PATIENCE = 30.0


def _advise() -> None:
    say(
        f"still connecting to the other ranks after {_PATIENCE:.0f} s. If this does not end: "
        f"{_network_advice()}",
        from_every_rank=True,
    )


_NETWORK = re.compile(
    "gloo|connect|socket|address|Dist.*Error|resolve|rendezvous|timed? ?out", re.IGNORECASE
)


def _explain_network(problem: str) -> str:
    lines = [line for line in problem.splitlines() if line.strip()]
    return (
        f"The ranks cannot connect to each other. {_network_advice()} The error was: "
        f"{lines[0][:300] if lines else ''}"
    )


def _network_advice() -> str:
    name, master = socket.gethostname(), os.environ.get("MASTER_ADDR", "")
    own, of_master = _resolve(name, _HELLO), _resolve(master, _HELLO)
    hint = ""
    if own and not any(map(_is_far, own)) and any(map(_is_far, of_master)):
        hint = (
            f" Here the name {name} stands for {own[0]} (/etc/hosts), where no other machine can "
            "reach this one."
        )
    elif master and not of_master:
        hint = f" Nothing is known of {master}."
    facing = next(filter(_is_far, map(_facing, (*of_master, *_ELSEWHERE))), "")
    interface = _interface_of(facing) or "eth0"
    return (
        f"MASTER_ADDR is {master}, MASTER_PORT {os.environ.get('MASTER_PORT', '')}.{hint} Start "
        "all ranks, with the same MASTER_ADDR, and let the machines reach each other on all ports. "
        "Where a machine has several networks, name the one between them: "
        f"GLOO_SOCKET_IFNAME={interface} NCCL_SOCKET_IFNAME={interface}."
    )


def _interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address; None if nothing tells."""
    with suppress(ImportError, OSError, AttributeError):
        import fcntl  # Linux and macOS have it, Windows has not

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # it has no address
                    entry = struct.pack("256s", name[:15].encode())
                    found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, entry)
                    if socket.inet_ntoa(found[20:24]) == address:
                        return name
    return None


_SIOCGIFADDR = 0x8915  # of Linux


class Invitation(NamedTuple):
    """What rank 0 tells the others.

    Attributes:
        addresses: Addresses by which each rank may reach it.
        port: The port.
        token: What a rank shows to prove that it is one.
        answer: What rank 0 shows.
    """

    addresses: tuple[tuple[str, ...], ...]
    port: int
    token: str
    answer: str


def connect_ranks(
    rank: int, world_size: int, share: Callable[[Any], list[Any]], seconds: float
) -> tuple[dict[int, socket.socket], str | None]:
    """Connect every rank to rank 0. Call on every rank.

    Args:
        rank: Number of this rank.
        world_size: Number of ranks.
        share: Function that is called with a value on every rank, and returns the values of all
            ranks in their order.
        seconds: Time after which a rank gives up, and the run continues without its connection.

    Returns:
        The connections of this rank by the number of the other one, and which ranks could not
        connect in words; None if all could.
    """
    hosts: list[Host] = share(describe_host(seconds / 2))
    is_local = len({host.machine for host in hosts}) == 1
    links: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        if rank == 0:
            listener = stack.enter_context(Listener(world_size, is_local))
            links = listener.links
            share(Invitation(_ways(hosts, is_local), *listener.key))
        else:
            invitation: Invitation = share(None)[0]
            link = _connect(rank, invitation, seconds)
            if link is not None:
                links[0] = link
        connected = share(rank == 0 or bool(links))
    missing = [number for number, is_there in enumerate(connected) if not is_there]
    if not missing:
        return links, None
    return links, (
        f"{len(missing)} of the {world_size} ranks, rank {missing[0]} first, cannot connect to "
        f"rank 0 by any of {', '.join(_ways(hosts, is_local)[missing[0]]) or 'no address'}: if one "
        "fails, the others report less about it. Let the machines reach each other on all ports, "
        "and give all of them one MASTER_ADDR that is not a loopback address."
    )


def _ways(hosts: Sequence[Host], is_local: bool) -> tuple[tuple[str, ...], ...]:
    """Return the addresses by which each rank may reach rank 0, the likeliest first."""
    if is_local:
        return (("127.0.0.1", "::1"),) * len(hosts)
    own = hosts[0]
    found = []
    for host in hosts:
        ways = (*host.master, *own.master, *map(_facing, host.addresses), *own.addresses)
        found.append(tuple(dict.fromkeys(filter(_is_far, ways))))
    return tuple(found)


class Listener:
    """The socket by which rank 0 accepts the other ranks, for the time of a ``with`` block.

    A connection has a few seconds and bytes to prove that it is a rank. Others are closed.

    Args:
        world_size: Number of ranks.
        is_local: Whether all of them are on this machine.

    Attributes:
        key: The port, the token that a rank sends, and the answer that it gets.
        links: Connections to the other ranks, by their number.
    """

    def __init__(self, world_size: int, is_local: bool) -> None:
        self._world_size = world_size
        self._server = _listen(is_local)
        self.key = (self._server.getsockname()[1], *(secrets.token_hex(_SIZE // 2) for _ in "12"))
        self.links: dict[int, socket.socket] = {}
        self._pending: dict[socket.socket, tuple[bytearray, float]] = {}
        self._end, self._ending = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()
        self._thread.join()

    def _serve(self) -> None:
        with self._server, self._ending, selectors.DefaultSelector() as selector:
            for readable in (self._server, self._ending):
                selector.register(readable, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(timeout=1.0):
                    link: Any = key.fileobj
                    if link is self._ending:
                        for stranger in self._pending:
                            stranger.close()
                        return
                    with suppress(OSError):
                        if link is self._server:
                            self._accept(selector)
                        elif link in self._pending:
                            self._read(link, selector)
                self._close_late(selector)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        link, _ = self._server.accept()
        link.setblocking(False)
        self._pending[link] = bytearray(), time.monotonic() + _HELLO
        selector.register(link, selectors.EVENT_READ)

    def _read(self, link: socket.socket, selector: selectors.BaseSelector) -> None:
        """Read what a connection has sent; keep it if it is of a rank, and close it if it is not.

        A rank may come by several addresses: the first one is kept.
        """
        hello, _ = self._pending[link]
        try:
            received = link.recv(_HELLO_SIZE - len(hello))
        except BlockingIOError:
            return
        except OSError:
            received = b""
        hello += received
        if received and len(hello) < _HELLO_SIZE:
            return
        selector.unregister(link)
        del self._pending[link]
        peer = self._rank_of(bytes(hello))
        if peer is None:
            link.close()
        else:
            link.setblocking(True)
            self.links[peer] = link
            link.sendall(self.key[2].encode())

    def _rank_of(self, hello: bytes) -> int | None:
        token, number = hello[:_SIZE], hello[_SIZE:]
        if not hmac.compare_digest(token, self.key[1].encode()) or not number.isdigit():
            return None
        peer = int(number)
        return peer if 0 < peer < self._world_size and peer not in self.links else None

    def _close_late(self, selector: selectors.BaseSelector) -> None:
        """Close connections that have not proved anything in time, and the oldest of too many."""
        now, num_too_many = time.monotonic(), max(0, len(self._pending) - _NUM_PENDING)
        late = [link for link, (_, deadline) in self._pending.items() if deadline < now]
        for link in {*late, *list(self._pending)[:num_too_many]}:
            del self._pending[link]
            selector.unregister(link)
            link.close()


def _listen(is_local: bool) -> socket.socket:
    """Return a socket that listens: on this machine alone, or on all addresses of it."""
    if is_local:
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", 0))
        return socket.create_server(("::1", 0), family=socket.AF_INET6)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _connect(rank: int, invitation: Invitation, seconds: float) -> socket.socket | None:
    """Connect to rank 0 by the first address on which it answers; None if it does on none."""
    deadline = time.monotonic() + seconds
    hello = f"{invitation.token}{rank:0{_HELLO_SIZE - _SIZE}d}".encode()
    answers: dict[socket.socket, bytearray] = {}
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        for address in invitation.addresses[rank]:
            if (begun := _start_to_connect(address, invitation.port)) is not None:
                answers[begun] = bytearray()
                stack.callback(lambda other: other.close() if other in answers else None, begun)
                selector.register(begun, selectors.EVENT_WRITE)
        while answers and (left := deadline - time.monotonic()) > 0:
            for key, event in selector.select(timeout=left):
                link: Any = key.fileobj
                try:
                    if event & selectors.EVENT_WRITE:
                        link.sendall(hello)  # which raises what became of the connection
                        selector.modify(link, selectors.EVENT_READ)
                        continue
                    received = link.recv(_SIZE - len(answers[link]))
                except BlockingIOError:
                    continue
                except OSError:
                    received = b""
                answers[link] += received
                if hmac.compare_digest(bytes(answers[link]), invitation.answer.encode()):
                    del answers[link]
                    link.setblocking(True)
                    return link  # type: ignore[no-any-return]
                if not received or len(answers[link]) == _SIZE:
                    selector.unregister(link)
                    del answers[link]
                    link.close()
    return None


def _start_to_connect(address: str, port: int) -> socket.socket | None:
    with suppress(OSError, ValueError):
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
        link = socket.socket(family, socket.SOCK_STREAM)
        link.setblocking(False)
        try:
            link.connect((address, port))
        except BlockingIOError:
            return link
        except OSError:
            link.close()
            return None
        return link
    return None
