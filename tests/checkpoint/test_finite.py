"""A gradient of NaN with a finite loss: no exit of a run saves or returns what it leaves."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import messages
from torch import nn

from manualloop import NonFiniteError, TrainState, save_checkpoint, train_loop, train_steps
from manualloop.models import names_not_finite

NUM_STEPS = 6


def batches(bad: int | None) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(NUM_STEPS, 4, 3, generator=torch.Generator().manual_seed(0))
    is_bad = [torch.tensor(number + 1 == bad) for number in range(NUM_STEPS)]
    return [{"x": rows, "bad": flag} for rows, flag in zip(x, is_bad, strict=True)]


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    """A mean square; on a bad batch its value is 0 and its gradient NaN, as of sqrt at 0."""
    outputs = model(batch["x"])
    return (outputs * 0).sqrt().mean() if batch["bad"] else outputs.square().mean()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def train(bad: int | None, **options: Any) -> Any:
    model = build()
    options = {"num_epochs": 1, "loss_fn": loss_fn, "progress_bar": False} | options
    optimizer = options.pop("optimizer", torch.optim.AdamW)(model.parameters(), lr=0.01)
    return train_loop(model, batches(bad), optimizer, **options)


def send(number: int, at: int) -> Any:
    return lambda step: step.index == at and os.kill(os.getpid(), number)


def raise_late(at: int) -> Any:
    calls: Iterator[int] = iter(range(1, 100))

    def evaluate() -> dict[str, float]:
        if next(calls) == at:
            raise RuntimeError("in an evaluation")
        return {"score": 1.0}

    return evaluate


EXITS: dict[str, tuple[int, dict[str, Any]]] = {
    "the end": (NUM_STEPS, {}),
    "max_steps": (4, {"num_epochs": None, "max_steps": 4}),
    "max_steps of two epochs": (6, {"num_epochs": None, "max_steps": 12}),
    "max_time": (1, {"max_time": "10 min"}),
    "patience": (
        3,
        {
            "evaluate": lambda: {"score": 1.0},
            "evaluate_every": 1,
            "best_metric": "score",
            "patience": 2,
        },
    ),
    "a checkpoint on the way": (3, {"checkpoint_every": 3}),
    "an evaluation that raises": (2, {"evaluate": raise_late(2), "evaluate_every": 1}),
    "SIGTERM": (3, {"on_step": send(signal.SIGTERM, 3)}),
    "Ctrl-C": (3, {"on_step": send(signal.SIGINT, 3)}),
}


@pytest.mark.parametrize("name", EXITS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_no_exit_saves_or_returns_weights_of_nan(
    name: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, options = EXITS[name]
    if name == "max_time":
        clock = time.monotonic
        options = {**options, "on_step": lambda step: monkeypatch.setattr(time, "monotonic", late)}

        def late() -> float:
            return clock() + 1000

    with pytest.raises(NonFiniteError, match=r"not finite.*0\.weight.*max_grad_norm=1\.0"):
        train(bad, optimizer=kind, checkpoint_dir=tmp_path, **options)
    assert not list(tmp_path.rglob(f"step-*{bad}"))
    if name in ("SIGTERM", "Ctrl-C", "an evaluation that raises"):
        return  # without a folder they end the script, as always
    monkeypatch.undo()
    with pytest.raises(NonFiniteError, match="not finite"):
        train(bad, optimizer=kind, **options)


def test_the_folder_resumes_from_the_update_before(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        train(NUM_STEPS, checkpoint_dir=tmp_path, checkpoint_every=2)
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-00000002", "step-00000004"}
    with pytest.raises(NonFiniteError, match=r"gradient norm nan at step 6.*comes from row 0"):
        train(NUM_STEPS, checkpoint_dir=tmp_path, max_grad_norm=1.0)


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_loop_over_steps_ends_with_the_error_or_saves_nothing(
    is_fused: bool, tmp_path: Path
) -> None:
    def state_of() -> TrainState:
        model = build()
        return TrainState(model, torch.optim.AdamW(model.parameters(), fused=is_fused))

    with pytest.raises(NonFiniteError, match="after step 6"):
        for _ in train_steps(state_of(), batches(NUM_STEPS), num_epochs=1, loss_fn=loss_fn):
            pass
    state = state_of()
    for step in train_steps(state, batches(3), num_epochs=1, loss_fn=loss_fn):
        if step.index == 3:
            break
        save_checkpoint(tmp_path, state)
    with pytest.raises(NonFiniteError, match="after step 3"):
        save_checkpoint(tmp_path, state)
    assert max(path.name for path in tmp_path.glob("step-*")) == "step-00000002"


def test_who_ignores_it_gets_it_and_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, however often it is saved; and the same where nothing is."""
    for options in ({"checkpoint_dir": tmp_path, "checkpoint_every": 1}, {}):
        caplog.clear()
        result = train(NUM_STEPS - 2, on_nonfinite="ignore", **options)
        (line,) = [line for line in messages(caplog) if "on_nonfinite" in line]
        assert "not finite after step" in line
        assert "saved and returned all the same" in line
        assert torch.isnan(result.state.model[0].weight).any()
    assert max(path.name for path in tmp_path.glob("step-*")) == "step-00000006"
    state = result.state
    with pytest.raises(NonFiniteError, match="not finite"):  # another run, which does not ignore it
        for _ in train_steps(state, batches(None), num_epochs=2, loss_fn=loss_fn):
            save_checkpoint(tmp_path, state)


class Masked(nn.Module):
    """A weight of the optimizer is infinite on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.mask = nn.Parameter(torch.tensor([0.0, -math.inf]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) + self.mask).softmax(dim=-1)[:, :1]


def test_weights_that_are_infinite_from_the_start_are_let_be(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked()
    result = train_loop(
        model,
        batches(None),
        torch.optim.SGD(model.parameters(), lr=0.1),
        num_epochs=1,
        loss_fn=loss_fn,
        progress_bar=False,
        checkpoint_dir=tmp_path,
    )
    assert result.last_checkpoint is not None


@pytest.mark.parametrize("bad", [2, NUM_STEPS])
def test_skipping_ends_once_the_weights_are_nan(bad: int) -> None:
    """Every update to come would be skipped, without an end where the data has no length."""
    stream = (batch for _ in range(200) for batch in batches(bad))
    state = TrainState(model := build(), torch.optim.SGD(model.parameters(), lr=0.1))
    made = []
    with pytest.raises(NonFiniteError, match="weights were not finite before it") as caught:
        for step in train_steps(
            state, stream, max_steps=1000, loss_fn=loss_fn, on_nonfinite="skip"
        ):
            made.append(step.index)
    assert len(made) == bad
    assert "max_grad_norm=1.0" in str(caught.value)


def test_skipping_takes_both_ways_out_that_are_named() -> None:
    result = train(2, on_nonfinite="skip", max_grad_norm=1.0)
    assert result.state.progress.num_skipped == 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Rprop])
def test_an_average_that_is_not_finite_is_told_once(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The square of a large gradient overflows; the signs of a gradient of NaN move nothing."""

    def too_large(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["x"]).square().mean() * (1e30 if batch["bad"] else 1)

    own = loss_fn if kind is torch.optim.Rprop else too_large
    with caplog.at_level("INFO", logger="manualloop"):
        train(None, optimizer=kind, loss_fn=own, checkpoint_dir=tmp_path / "good")
        assert "not finite" not in caplog.text
        train(3, optimizer=kind, loss_fn=own, checkpoint_dir=tmp_path / "bad", checkpoint_every=1)
    assert caplog.text.count(f"the state of {kind.__name__} is not finite") == 1
    assert "of 0.weight" in caplog.text


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
def test_all_dtypes_are_looked_at(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensors = {
        "finite": torch.full((2, 3), largest, dtype=dtype),
        "nan": torch.tensor([0.0, math.nan], dtype=dtype),
        "inf": torch.tensor([[0.0], [-math.inf]], dtype=dtype).t(),
        "empty": torch.empty(0, dtype=dtype),
        "meta": torch.empty(3, dtype=dtype, device="meta"),
        "scalar": torch.tensor(math.nan, dtype=dtype),
        "whole": torch.tensor([1, 2]),
        "lazy": nn.LazyLinear(2).weight,
    }
    if dtype.is_complex:  # its magnitude would overflow
        tensors["finite"] = torch.ones(2, dtype=dtype)
    assert names_not_finite(tensors) == ["nan", "inf", "scalar"]
