"""Time limits of the package, as tests need them that must not depend on the machine's speed.

Some must be too long to matter: then what they are there for has to come about without them. Others
always run out, and are short; nothing that needs a processor's time happens meanwhile.
"""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from processes import wait_until
from torch.distributed import distributed_c10d

from manualloop.strategy import hosts, liveness

FOREVER = 3600.0
CAN_FAIL_SOON = not torch.__version__.startswith("2.6.")
needs_to_fail_soon = pytest.mark.skipif(
    not CAN_FAIL_SOON, reason="a group of torch 2.6 keeps the timeout with which it was made"
)


def wait_patiently(**others):
    """Let a process end by itself however long it takes, and wait for the other ranks' news.

    Args:
        others: Other seconds, by the name in ``manualloop.strategy.liveness``.
    """
    for name, seconds in {
        "GRACE": FOREVER,
        "_REPORT": FOREVER,
        "_ANSWER": FOREVER,
        **others,
    }.items():
        assert hasattr(liveness, name), f"liveness has no {name} any more"
        setattr(liveness, name, seconds)


def explain_after_a_report():
    """Let this rank explain a failure when it knows how another one has ended, however late."""
    explain = liveness.Connections.explain

    def explain_then(connections, **options):
        wait_until(lambda: connections._reports)
        return explain(connections, **options)

    liveness.Connections.explain = explain_then


def wait_until_stopped(pid):
    """Wait for a SIGSTOP of another process; from then on collective operations fail soon."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    fail_soon()


def fail_soon():
    """Let operations that wait for another rank fail at once, or nearly so."""
    for group in (None, hosts._hosts._group):
        distributed_c10d._set_pg_timeout(timedelta(seconds=0.3), group)
