"""What a rank knows of the others by their connections."""

from __future__ import annotations

import socket

import pytest

from manualloop.strategy import liveness
from manualloop.strategy.liveness import Connections


def test_a_rank_without_a_connection_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_REPORT", 0.01)
    connections = Connections(1, {})
    connections.call = "evaluate_loop"
    assert connections.explain() is None
    error = connections.explain(waited=True)
    assert str(error).startswith("evaluate_loop must be called on every rank. Rank 1 has waited")


@pytest.mark.parametrize(
    "line",
    [
        "[" * 99_999,
        "1" * 400_000,
        "{}",
        "[]",
        '{"report": 1}',
        '{"type": "answer"}',
        '{"type": "answer", "calls": {"x": 1}}',
        "\ud800",
    ],
    ids=["deep", "long", "empty", "a list", "no report", "no calls", "no rank", "no text"],
)
def test_a_message_that_cannot_be_read_ends_its_connection_alone(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "GRACE", 3600.0)  # the reaction to a rank that is gone
    ours, theirs = socket.socketpair()
    connections = Connections(0, {1: ours})
    with theirs:
        theirs.sendall(line.encode(errors="surrogatepass") + b"\n")
        assert connections._wait(connections.failures, 600)
        (report,) = connections.failures()
        assert (report.rank, report.state) == (1, "gone")
    connections.close()


def test_an_answer_names_the_function_that_a_rank_waits_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_REPORT", 0.01)
    monkeypatch.setattr(liveness, "_ANSWER", 600.0)
    ours, theirs = socket.socketpair()
    there = Connections(1, {0: theirs})
    here = Connections(0, {1: ours})
    here.call, there.call = "save_checkpoint", "train_steps"
    error = here.explain(waited=True)
    assert "rank 1 is in train_steps" in str(error)
    assert there._wait(there._has_news, 600)  # and is told of it
    assert "Rank 0 waits no longer. save_checkpoint must be" in str(there.explain())
    here.close()
    there.close()
