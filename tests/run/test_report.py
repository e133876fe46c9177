"""The record of a run: exact means over items, in order, read late; and its curves."""

from __future__ import annotations

import gc
import math
import signal
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Adafactor

from manualloop import ConfigError, Step, plot_history, train_loop
from manualloop.run import report as history
from manualloop.run.report import History
from manualloop.strategy.transfer import LateTensor


def step(
    index: int, loss: Tensor | float, num_items: int = 1, grad_norm: Tensor | None = None
) -> Step:
    loss = torch.tensor(loss, dtype=torch.float64) if isinstance(loss, float) else loss
    return Step(
        index=index,
        epoch=0,
        num_steps=10_000,
        loss=loss,
        lr=1.0 / index,
        grad_norm=grad_norm,
        num_items=num_items,
        ends_epoch=False,
        is_last=False,
    )


def record(losses: list[float], items: list[int], ends: list[int]) -> list[dict[str, Any]]:
    """The records of a run whose intervals end with the given steps."""
    kept = History()
    for index, (loss, num_items) in enumerate(zip(losses, items, strict=True), start=1):
        kept.add(step(index, loss, num_items))
        if index in ends:
            kept.close_interval(step(index, loss, num_items), epoch=index / 10)
    kept.collect(wait=True)
    return kept.records


# Means --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data(), num_steps=st.integers(1, 40))
def test_a_loss_is_the_mean_over_the_items_since_the_record_before(
    data: st.DataObject, num_steps: int
) -> None:
    finite = st.floats(-1e3, 1e3, width=32)
    losses = data.draw(st.lists(finite, min_size=num_steps, max_size=num_steps))
    items = data.draw(st.lists(st.integers(1, 5000), min_size=num_steps, max_size=num_steps))
    ends = sorted({*data.draw(st.sets(st.integers(1, num_steps))), num_steps})
    records = record(losses, items, ends)
    assert [one["step"] for one in records] == ends
    for (start, end), one in zip(pairwise([0, *ends]), records, strict=True):
        total = math.fsum(
            loss * n for loss, n in zip(losses[start:end], items[start:end], strict=True)
        )
        assert one["num_items"] == sum(items[start:end])
        assert one["loss"] == pytest.approx(total / sum(items[start:end]), rel=1e-12, abs=1e-10)
        assert one["lr"] == 1 / end
        assert one["epoch"] == end / 10


@pytest.mark.parametrize("num_steps", [255, 256, 257, 511, 512, 1000])
def test_long_intervals_keep_the_exact_mean(num_steps: int) -> None:
    losses = [math.sin(index) for index in range(num_steps)]
    items = [1 + index % 7 for index in range(num_steps)]
    expected = math.fsum(a * b for a, b in zip(losses, items, strict=True)) / sum(items)
    (one,) = record(losses, items, [num_steps])
    assert one["loss"] == pytest.approx(expected, rel=1e-12)
    assert one["num_items"] == sum(items)


def test_long_intervals_keep_few_tensors() -> None:
    def num_tensors() -> int:
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    kept, before = History(), num_tensors()
    for index in range(1, 601):
        kept.add(step(index, float(index)))
    assert num_tensors() - before < 256
    kept.close_interval(step(600, 0.0), epoch=1.0)
    assert kept.records[0]["loss"] == 300.5


def test_losses_of_different_dtypes_and_shapes() -> None:
    kept = History()
    kept.add(step(1, torch.tensor(1.0, dtype=torch.bfloat16), 1))
    kept.add(step(2, torch.tensor([4.0]), 2))
    kept.close_interval(step(2, 0.0), epoch=1.0)
    assert kept.records[0]["loss"] == 3.0


def test_a_graph_is_not_kept() -> None:
    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    saved = []

    def pack(tensor: Tensor) -> Saved:
        packed = Saved(tensor)
        saved.append(weakref.ref(packed))
        return packed

    weight = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        loss = (weight**2).sum()
    kept = History()
    kept.add(step(1, loss))
    assert saved
    assert saved[0]() is not None
    del loss
    assert saved[0]() is None


def test_no_items() -> None:
    """A step_fn that counts nothing has no mean, but does not end the run either."""
    (one,) = record([1.0, 2.0], [0, 0], [2])
    assert math.isnan(one["loss"])


# Records ------------------------------------------------------------------------------------------


def test_records_come_in_the_order_of_the_run() -> None:
    kept = History()
    assert not kept.has_open_interval()
    kept.add(step(1, 2.0))
    assert kept.has_open_interval()
    kept.close_interval(step(1, 2.0), epoch=0.1)
    assert not kept.has_open_interval()
    kept.add(step(2, 3.0))
    kept.add_evaluation(2, 0.2, {"loss": 0.5, "f1": 0.9})
    kept.add(step(3, 5.0))
    kept.close_interval(step(3, 5.0), epoch=0.3)
    assert kept.records == [
        {"step": 1, "epoch": 0.1, "loss": 2.0, "lr": 1.0, "num_items": 1},
        {"step": 2, "epoch": 0.2, "eval_loss": 0.5, "eval_f1": 0.9},
        {"step": 3, "epoch": 0.3, "loss": 4.0, "lr": 1 / 3, "num_items": 2},
    ]
    assert kept.last_loss == 4.0


def test_the_gradient_norm_is_that_of_the_step() -> None:
    kept = History()
    for index, norm in enumerate([7.0, 9.0], start=1):
        kept.add(step(index, float(index), grad_norm=torch.tensor(norm, dtype=torch.float64)))
    norm = torch.tensor(9.0, dtype=torch.float32)
    kept.close_interval(step(2, 0.0, grad_norm=norm), epoch=1.0)
    assert kept.records[0]["loss"] == 1.5
    assert kept.records[0]["grad_norm"] == 9.0


def test_losses_are_filled_in_when_they_land(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        landed: set[int] = set()  # noqa: RUF012
        waited: list[int] = []  # noqa: RUF012

        def __init__(self, tensor: Tensor) -> None:
            self.values = tensor.tolist()

        def has_landed(self) -> bool:
            return int(self.values[0]) in self.landed

        def read(self) -> list[float]:
            if not self.has_landed():
                self.waited.append(int(self.values[0]))
            return list(self.values)

    monkeypatch.setattr(history, "LateTensor", Slow)
    kept = History()

    def losses() -> list[float | None]:
        return [one["loss"] for one in kept.records]

    for index in (1, 2, 3):
        kept.add(step(index, float(index)))
        kept.close_interval(step(index, float(index)), epoch=0.0)
    assert losses() == [None, None, None]
    assert kept.last_loss is None
    Slow.landed = {1, 3}
    kept.collect(wait=False)
    assert losses() == [1.0, None, None]  # in order
    assert kept.last_loss == 1.0
    assert Slow.waited == []
    kept.collect(wait=True)
    assert losses() == [1.0, 2.0, 3.0]
    assert kept.last_loss == 3.0
    assert Slow.waited == [2]


def test_a_late_tensor_on_the_cpu_has_always_landed() -> None:
    late = LateTensor(torch.tensor([1.0, 2.5]))
    assert late.has_landed()
    assert late.read() == [1.0, 2.5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_late_tensor_from_cuda_does_not_wait() -> None:
    tensor = torch.zeros(2, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # clock cycles: some tenths of a second
    late = LateTensor(tensor + 1)
    assert not late.has_landed()
    assert late.read() == [1.0, 1.0]
    assert late.has_landed()


def test_the_history_of_a_run() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    sizes = [4, 1, 7, 2, 3]
    batches = [{"x": torch.randn(size, 2)} for size in sizes]
    losses: list[float] = []
    norms: list[float] = []

    def note(one: Step) -> None:
        losses.append(one.loss.item())
        norms.append(0.0 if one.grad_norm is None else one.grad_norm.item())

    result = train_loop(
        model,
        batches,
        num_epochs=2,
        max_grad_norm=1.0,
        loss_fn=lambda model, batch: (model(batch["x"]) ** 2).mean(),
        evaluate=lambda: {"score": 0.5},
        log_every=4,
        on_step=note,
        progress_bar=False,
    )
    training = [one for one in result.history if "loss" in one]
    assert [one["step"] for one in training] == [1, 4, 8, 10]  # the first and the last always
    assert [one["epoch"] for one in training] == [0.2, 0.8, 1.6, 2.0]
    for (start, end), one in zip(pairwise([0, 1, 4, 8, 10]), training, strict=True):
        items = (sizes * 2)[start:end]
        mean = sum(a * b for a, b in zip(losses[start:end], items, strict=True)) / sum(items)
        assert one["loss"] == pytest.approx(mean, rel=1e-12)
        assert one["num_items"] == sum(items)
        assert one["grad_norm"] == pytest.approx(norms[end - 1], rel=1e-6)
        assert one["lr"] == pytest.approx(5e-5 * (11 - end) / 10)
    evaluations = [one for one in result.history if "loss" not in one]
    assert evaluations == [
        {"step": 5, "epoch": 1.0, "eval_score": 0.5},
        {"step": 10, "epoch": 2.0, "eval_score": 0.5},
    ]
    assert [one["step"] for one in result.history] == sorted(one["step"] for one in result.history)


def test_the_table_has_the_loss_since_the_evaluation_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However the records of the log lie, and wherever the run was interrupted."""
    sizes = [4, 1, 7, 2, 3, 5, 6]
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(size, 2, generator=generator)} for size in sizes]
    losses: list[float] = []

    def train(folder: Path | None, **options: Any) -> None:
        torch.manual_seed(0)
        train_loop(
            nn.Linear(2, 1),
            batches,
            num_epochs=3,
            loss_fn=lambda model, batch: (model(batch["x"]) ** 2).mean(),
            evaluate=lambda: {"score": 0.5},
            evaluate_every=5,
            checkpoint_dir=folder,
            **options,
        )

    def rows() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]

    def without_time(row: str) -> str:
        return row.partition("  time")[0]

    for log_every in (3, 5, 8):
        losses.clear()
        train(None, log_every=log_every, on_step=lambda step: losses.append(step.loss.item()))
        whole = rows()
        for (begin, end), row in zip(pairwise([0, 5, 10, 15, 20, 21]), whole, strict=True):
            items = (sizes * 3)[begin:end]
            mean = sum(a * b for a, b in zip(losses[begin:end], items, strict=True)) / sum(items)
            assert f"step {end}  " in row
            assert f"  train loss {mean:.4f}  " in row
        for at in (7, 10, 20):
            folder = tmp_path / f"{log_every} {at}"

            def stop(step: Step, at: int = at) -> None:
                if step.index == at:
                    signal.raise_signal(signal.SIGINT)

            with pytest.raises(KeyboardInterrupt):
                train(folder, log_every=log_every, on_step=stop)
            before = rows()
            train(folder, log_every=log_every)
            after = rows()
            # Those of the process before are shown once, without their times.
            assert after[: len(before)] == list(map(without_time, before))
            assert list(map(without_time, after)) == list(map(without_time, whole))
            train(folder, log_every=log_every)  # it is finished, and shows its table
            assert rows() == list(map(without_time, whole))


# Curves -------------------------------------------------------------------------------------------

RECORDS = [
    {"step": 1, "epoch": 0.1, "loss": 2.0, "lr": 0.5, "num_items": 8},
    {"step": 5, "epoch": 0.5, "eval_loss": 1.5, "eval_f1": 0.6, "eval_accuracy": 0.7},
    {"step": 10, "epoch": 1.0, "loss": 1.0, "lr": 0.1, "num_items": 8},
    {"step": 10, "epoch": 1.0, "eval_loss": 1.2, "eval_f1": 0.8, "eval_accuracy": 0.9},
]


def curves(figure: Any) -> dict[str, dict[str, list[tuple[float, float]]]]:
    return {
        axis.get_ylabel(): {
            line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()]
            for line in axis.lines
        }
        for axis in figure.axes
    }


@pytest.mark.parametrize("progress_bar", [False, True])
@pytest.mark.parametrize(
    ("make", "lr"),
    [
        (lambda weights: torch.optim.AdamW(weights, lr=torch.tensor(0.5)), 0.5),
        (lambda weights: torch.optim.SGD(weights, lr=1), 1.0),
        (lambda weights: Adafactor(weights, lr=None), math.nan),
    ],
    ids=["tensor", "int", "none"],
)
def test_a_learning_rate_is_a_number(make: Any, lr: float, progress_bar: bool) -> None:
    model = nn.Linear(2, 1)
    result = train_loop(
        model,
        [{"x": torch.ones(1, 2)}] * 3,
        make(model.parameters()),
        lr_scheduler=None,
        num_epochs=1,
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
        progress_bar=progress_bar,
    )
    found = [record["lr"] for record in result.history]
    assert all(type(value) is float for value in found)
    assert found == pytest.approx([lr] * len(found), nan_ok=True)


def test_curves_of_a_run() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_history(RECORDS)
    assert curves(figure) == {
        "loss": {"training": [(1, 2.0), (10, 1.0)], "evaluation": [(5, 1.5), (10, 1.2)]},
        "scores": {"accuracy": [(5, 0.7), (10, 0.9)], "f1": [(5, 0.6), (10, 0.8)]},
        "learning rate": {"lr": [(1, 0.5), (10, 0.1)]},
    }
    assert figure.axes[-1].get_xlabel() == "step (optimizer update)"
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["training", "evaluation"]


def test_intervals_are_bands_around_the_curves() -> None:
    pytest.importorskip("matplotlib")
    ends = {"eval_f1_low": 0.5, "eval_f1_high": 0.9, "eval_loss_low": 1.0, "eval_loss_high": 2.0}
    records = [RECORDS[0], *({**record, **ends} for record in RECORDS if "eval_f1" in record)]
    figure = plot_history(records)
    assert curves(figure)["scores"] == curves(plot_history(RECORDS))["scores"]
    bands = [len(axis.collections) for axis in figure.axes]
    assert bands == [1, 1, 0]
    assert figure.axes[1].collections[0].get_datalim(figure.axes[1].transData).y1 == 0.9
    texts = {**ends, "eval_f1_low": "half"}
    plot_history([*RECORDS, {**RECORDS[1], **texts}])  # a text is no end of a band


def test_the_best_step_is_marked() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_history(SimpleNamespace(history=RECORDS, best_step=10, last_checkpoint=None))
    for axis in figure.axes:
        (line,) = [line for line in axis.lines if list(line.get_xdata()) == [10, 10]]
        assert line.get_linestyle() != "-"
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["training", "evaluation", "best: step 10"]
    result = train_loop(
        nn.Linear(1, 1),
        [{"x": torch.ones(1, 1)}] * 3,
        num_epochs=2,
        loss_fn=lambda model, batch: model(batch["x"]).mean(),
        evaluate=iter([{"f1": 0.9}, {"f1": 0.5}]).__next__,
        best_metric="f1",
        progress_bar=False,
    )
    assert [list(axis.lines[-1].get_xdata()) for axis in result.plot().axes] == [[3, 3]] * 3


def test_several_runs_are_compared_panel_by_panel() -> None:
    pytest.importorskip("matplotlib")
    longer = [*RECORDS, {"step": 20, "epoch": 2.0, "loss": 0.5, "lr": 0.0, "num_items": 8}]
    folder = Path("runs/second/step-00000010")
    second = SimpleNamespace(history=longer, best_step=10, last_checkpoint=folder)
    figure = plot_history(RECORDS, second)
    found = curves(figure)
    assert list(found) == ["training loss", "evaluation loss", "f1", "accuracy", "learning rate"]
    assert found["training loss"] == {
        "run 1": [(1, 2.0), (10, 1.0)],
        "second": [(1, 2.0), (10, 1.0), (20, 0.5)],
        "best step": [],
    }
    assert found["f1"]["run 1"] == [(5, 0.6), (10, 0.8)]
    stars = [[line for line in axis.lines if line.get_marker() == "*"] for axis in figure.axes]
    assert [[line.get_xydata().tolist() for line in found] for found in stars] == [
        *([[]], [[[10, 1.2]]], [[[10, 0.8]]], [[[10, 0.9]]], [])
    ]
    # No two curves look alike, in print neither.
    for axis in figure.axes:
        assert len({line.get_linestyle() for line in axis.lines[:2]}) == 2
        assert len({line.get_color() for line in axis.lines[:2]}) == 2
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["run 1", "second", "best step"]
    figure = plot_history(RECORDS, second, labels=["small", "large"])
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["small", "large", "best step"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_runs_without_evaluations_beside_others_and_more_than_there_are_colours() -> None:
    pytest.importorskip("matplotlib")
    assert list(curves(plot_history(RECORDS[:1], []))) == ["training loss", "learning rate"]
    figure = plot_history(*[RECORDS] * 16)
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[1].lines
    }
    assert len(looks) == 16


@pytest.mark.parametrize(
    ("arguments", "labels", "message"),
    [
        ((), None, "There is nothing to plot"),
        (([SimpleNamespace(history=[])],), None, "plot_history got a list as argument 1"),
        ((RECORDS, "history.jsonl"), None, "got a str as argument 2"),
        ((RECORDS, {"step": 1}), None, "got a dict as argument 2"),
        ((RECORDS, RECORDS), ["one"], "There are 2 results and 1 labels"),
    ],
)
def test_what_cannot_be_plotted_is_refused(arguments: Any, labels: Any, message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=message):
        plot_history(*arguments, labels=labels)


def test_curves_show_themselves_in_a_notebook() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_history(RECORDS)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_names_with_signs_of_dollar_are_no_formulae() -> None:
    pytest.importorskip("matplotlib")
    records = [*RECORDS, {"step": 20, "epoch": 2.0, "eval_from $5 to $x_": 0.5}]
    figure = plot_history(records, records, labels=[r"$\frac$", "b"])
    assert figure._repr_png_()  # formulae are read when it is drawn
    assert r"from \$5 to \$x_" in [axis.get_ylabel() for axis in figure.axes]


def test_curves_without_evaluations_and_without_anything() -> None:
    pytest.importorskip("matplotlib")
    assert list(curves(plot_history(RECORDS[:1]))) == ["loss", "learning rate"]
    assert curves(plot_history([])) == {"loss": {}, "learning rate": {}}


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install manualloop\[plot\]"):
        plot_history(RECORDS)
