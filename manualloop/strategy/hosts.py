"""The exchange of values between the hosts of the ranks, without waiting for a device."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from manualloop.errors import DistributedError
from manualloop.strategy.calls import Tagged, values_of
from manualloop.strategy.liveness import Connections, connect, release_at_end

_NUM_COUNTS = 14
_HEAD = struct.Struct(f"<40s16sq{_NUM_COUNTS}d")


class Hosts:
    """The ranks as processes on hosts, which exchange values in a gloo group of their own.

    Every exchange begins with heads of one size, which name the function that each rank is in. So
    if a rank is in another function than the others, all of them notice. Gradients are reduced in
    another group, where they cannot be taken for such a head. Unlike NCCL, gloo notices at once
    that a process is gone.

    Args:
        timeout: Seconds that the ranks wait for each other; None for torch's default.

    Attributes:
        connections: The connections that tell which rank is gone; None until they are made.
    """

    def __init__(self, timeout: float | None) -> None:
        limit = None if timeout is None else timedelta(seconds=timeout)
        self._world_size = torch.distributed.get_world_size()
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=limit)
        self.connections: Connections | None = None
        self.connections = connect(
            torch.distributed.get_rank(), self._world_size, self._share, timeout
        )

    def is_usable(self) -> bool:
        """Tell whether the process group still exists: a script may have ended all of them."""
        try:
            torch.distributed.get_process_group_ranks(self._group)
        except (KeyError, RuntimeError, ValueError):
            return False
        return self._group is not None

    def release(self) -> None:
        """End the process group."""
        if torch.distributed.is_initialized() and self.is_usable():
            torch.distributed.destroy_process_group(self._group)
        self._group = None

    def _share(self, value: Any) -> list[Any]:
        return values_of(self.gather(Tagged("prepare_strategy", "connect", value)))

    def gather(self, sent: Tagged) -> list[Tagged]:
        """Return what all ranks send, in the order of ranks. Collective.

        If they send it for different things, the values are left out.

        Raises:
            DistributedError: A rank is gone, or has not come in time.
        """
        if self.connections is not None:
            self.connections.call = sent.call
        try:
            return self._gather(sent)
        except RuntimeError as error:
            self.explain(error)
            raise
        finally:
            if self.connections is not None:
                self.connections.call = ""

    def _gather(self, sent: Tagged) -> list[Tagged]:
        counts: Sequence[float] = sent.value if sent.step == "counts" else ()
        num_counts = len(counts) if sent.step == "counts" and len(counts) <= _NUM_COUNTS else -1
        room = [*counts, *[0.0] * _NUM_COUNTS][:_NUM_COUNTS]
        head = _HEAD.pack(sent.call.encode(), sent.step.encode(), num_counts, *room)
        own = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        rows = torch.empty(self._world_size, len(head), dtype=torch.uint8)
        torch.distributed.all_gather(list(rows), own, group=self._group)
        found = [_HEAD.unpack(row.numpy().tobytes()) for row in rows]
        tags = [
            (call.rstrip(b"\0").decode(), step.rstrip(b"\0").decode()) for call, step, *_ in found
        ]
        if len(set(tags)) > 1:
            return [Tagged(*tag, None) for tag in tags]
        sizes = [size for _, _, size, *_ in found]
        if min(sizes) >= 0:
            return [
                Tagged(sent.call, sent.step, [_plain(count) for count in of_rank[:size]])
                for (_, _, size, *of_rank) in found
            ]
        values: list[Any] = [None] * self._world_size
        torch.distributed.all_gather_object(values, sent.value, group=self._group)
        return [Tagged(sent.call, sent.step, value) for value in values]

    def explain(self, error: BaseException) -> None:
        """Raise an error that names the rank that is gone, if that is why a call failed."""
        if self.connections is None or isinstance(error, DistributedError):
            return
        text = f"{type(error).__name__} {error}"
        if self.connections.failures() or _CONNECTION.search(text):
            reason = self.connections.explain(waited=bool(_TIMED_OUT.search(text)))
            if reason is not None:
                raise reason from error


_CONNECTION = re.compile(
    "gloo|nccl|Dist.*Error|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE
)
_TIMED_OUT = re.compile("timed? ?out", re.IGNORECASE)


def _plain(number: float) -> float:
    return int(number) if number.is_integer() else number


_hosts: Hosts | None = None


def connect_hosts(timeout: float | None) -> Hosts:
    """Return the hosts of this process's group, which the first call connects. Collective."""
    global _hosts
    if _hosts is None or not _hosts.is_usable():
        _hosts = Hosts(timeout)
        release_at_end(_hosts.release)
    return _hosts
