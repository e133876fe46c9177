"""A signal into an evaluation that draws random numbers in threads: exact, or reported."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from manualloop import train_loop
from manualloop.run import evaluating

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

BATCHES = [{"x": torch.full((4, 2), float(number))} for number in range(4)]
GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    num_threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (2, 15)}
    yield
    torch.set_num_threads(num_threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(folder: Path, evaluate: Callable[[], dict[str, float]]) -> Tensor:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    GENERATOR.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def loss_fn(model: Any, batch: Any) -> Tensor:
        noise = torch.randn((), generator=GENERATOR) + random.random() + np.random.rand()
        loss: Tensor = model(batch["x"]).square().mean() * noise
        return loss

    with suppress(SystemExit, KeyboardInterrupt):  # as which a stop may leave
        train_loop(
            model,
            BATCHES,
            torch.optim.SGD(model.parameters(), lr=0.01),
            loss_fn=loss_fn,
            num_epochs=2,
            evaluate=evaluate,
            checkpoint_dir=folder,
            progress_bar=False,
        )
    return torch.cat([weight.detach().reshape(-1) for weight in model.parameters()])


def draw() -> None:
    torch.rand(1)
    random.random()
    np.random.rand()
    torch.rand(1, generator=GENERATOR)


def score() -> dict[str, float]:
    return {"score": 1.0}


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    while True:  # until the handler raises
        threading.Event().wait(0.001)


def test_threads_that_end_are_awaited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = train(tmp_path / "whole", score)
    is_stopping, threads = threading.Event(), []

    def evaluate() -> dict[str, float]:
        def work() -> None:
            is_stopping.wait(600)
            for _ in range(50):
                draw()
                threading.Event().wait(0.001)

        threads.append(threading.Thread(target=work))
        threads[0].start()
        torch.set_num_threads(torch.get_num_threads() + 1)
        is_stopping.set()
        stop()
        return score()

    num_threads = torch.get_num_threads()
    assert not torch.equal(train(tmp_path / "run", evaluate), expected)
    assert not threads[0].is_alive()
    assert torch.get_num_threads() == num_threads
    assert torch.equal(train(tmp_path / "run", score), expected)
    assert "bit-exact" not in caplog.text


@pytest.mark.parametrize("is_new", [True, False], ids=["begun inside", "kept from before"])
def test_threads_that_still_draw_are_reported(
    is_new: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluating, "_SECONDS", 0.1)
    caplog.set_level("INFO", "manualloop")
    is_over, has_begun = threading.Event(), threading.Event()

    def work() -> None:
        while not is_over.is_set():
            draw()
            has_begun.set()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # its thread exists from now on

        def evaluate() -> dict[str, float]:
            if is_new:
                threading.Thread(target=work).start()
            else:
                pool.submit(work)
            has_begun.wait()
            stop()
            return score()

        train(tmp_path / "run", evaluate)
        is_over.set()
    assert "not bit-exact when it is resumed: threads of the evaluation" in caplog.text


def test_threads_that_draw_nothing_are_no_reason_to_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "_SECONDS", 0.01)
    expected = train(tmp_path / "whole", score)
    is_over = threading.Event()

    def evaluate() -> dict[str, float]:
        threading.Thread(target=is_over.wait).start()
        stop()
        return score()

    train(tmp_path / "run", evaluate)
    is_over.set()
    assert "bit-exact" not in caplog.text
    assert torch.equal(train(tmp_path / "run", score), expected)


def test_an_evaluation_that_raises_with_threads_is_undone_too(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", score)

    def evaluate() -> dict[str, float]:
        thread = threading.Thread(target=lambda: [draw() for _ in range(200)])
        thread.start()
        raise ValueError("no metric")

    with pytest.raises(ValueError, match="no metric"):
        train(tmp_path / "run", evaluate)
    assert torch.equal(train(tmp_path / "run", score), expected)
