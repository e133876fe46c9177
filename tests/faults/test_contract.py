"""Resuming with other arguments or data than those of the checkpoint."""

import contextlib

import pytest
import torch
from resume_cases import Rows
from torch.utils.data import DataLoader, TensorDataset

from manualloop import CheckpointError, SingleDevice, TrainState, train_loop, train_steps
from manualloop.checkpoint import contract as contract
from manualloop.data.sampler import ordered_loader

NUM_ROWS = 14


def train(
    folder,
    *,
    stop_after=None,
    rows=None,
    batch_size=2,
    seed=1,
    num_workers=0,
    optimizer=torch.optim.AdamW,
    lr=0.05,
    width=8,
    **options,
):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 1)
    )
    loader = ordered_loader(
        rows or Rows(),
        "train",
        batch_size,
        shuffle=True,
        seed=seed,
        drop_last=False,
        num_workers=num_workers,
    )
    ids = []

    def loss_fn(model, batch):
        ids.extend(batch["id"].tolist() if isinstance(batch, dict) else [])
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return model(x).square().mean()

    def on_step(step):
        if step.index == stop_after:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        train_loop(
            model,
            loader,
            optimizer(model.parameters(), lr=lr),
            loss_fn=loss_fn,
            strategy=SingleDevice("cpu"),
            checkpoint_dir=folder,
            checkpoint_every=1,
            on_step=on_step,
            progress_bar=False,
            **{"num_epochs": 2, "gradient_accumulation_steps": 2, **options},
        )
    return ids


def notes(caplog):
    found = [r.getMessage() for r in caplog.records if "not bit-exact" in r.getMessage()]
    return [note.removesuffix("; the new value counts from now on.") for note in found]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"batch_size": 3}, ["batch_size: 2 -> 3", "num_steps: 8 -> 6"]),
        ({"batch_size": 1}, ["batch_size: 2 -> 1", "num_steps: 8 -> 14"]),
        (
            {"gradient_accumulation_steps": 3},
            ["gradient_accumulation_steps: 2 -> 3", "num_steps: 8 -> 6"],
        ),
        ({"seed": 2}, ["seed: 1 -> 2"]),
        ({"num_epochs": 3}, ["num_steps: 8 -> 12"]),
        ({"num_epochs": 3, "lr_scheduler": None}, ["lr_scheduler: LambdaLR -> None"]),
        ({"max_grad_norm": 1.0}, ["max_grad_norm: None -> 1.0"]),
        ({"num_workers": 1}, []),
    ],
)
def test_f24_a_difference_is_logged_in_one_line_and_each_row_is_used_once(
    changes, lines, tmp_path, caplog
):
    first = train(tmp_path, stop_after=3)[:8]
    if changes.get("lr_scheduler", "") is None:
        with pytest.raises(CheckpointError, match="lr_scheduler is in the checkpoint only"):
            train(tmp_path, **changes)
        return
    caplog.clear()
    with caplog.at_level("INFO", logger="manualloop"):
        rest = train(tmp_path, **changes)
    assert [note.split("because ")[1].rstrip(".") for note in notes(caplog)] == lines
    if "num_workers" not in changes:
        epochs = changes.get("num_epochs", 2)
        used = first + rest
        assert len(used) == epochs * NUM_ROWS
        for epoch in range(epochs):
            rows = used[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS]
            assert sorted(rows) == list(range(NUM_ROWS)), f"epoch {epoch}"


def test_f24_a_changed_seed_counts_from_the_next_epoch(tmp_path):
    whole = train(tmp_path / "whole")
    other = train(tmp_path / "other", seed=2)
    first = train(tmp_path / "run", stop_after=3)[:8]
    rest = train(tmp_path / "run", seed=2)
    assert first + rest == whole[:NUM_ROWS] + other[NUM_ROWS:]


def test_f24_another_version_is_logged(tmp_path, caplog, monkeypatch):
    train(tmp_path, stop_after=3)
    versions = {"torch": "1.0"}
    own = contract.version_of
    monkeypatch.setattr(contract, "version_of", lambda name: versions.get(name) or own(name))
    with caplog.at_level("INFO", logger="manualloop"):
        train(tmp_path)
    (note,) = notes(caplog)
    assert f"because torch: {own('torch')} -> 1.0" in note


def test_f24_workers_matter_where_they_draw(tmp_path, caplog):
    train(tmp_path, stop_after=3, rows=Rows(draws=True), num_workers=2)
    with caplog.at_level("INFO", logger="manualloop"):
        train(tmp_path, rows=Rows(draws=True), num_workers=1)
    (note,) = notes(caplog)
    assert "because num_workers: 2 -> 1" in note


def test_f24_a_setting_that_the_checkpoint_overrides_is_logged(tmp_path, caplog):
    train(tmp_path, stop_after=3)
    with caplog.at_level("INFO", logger="manualloop"):
        train(tmp_path, lr=0.01)
    assert "lr: 0.05 -> 0.01; the checkpoint's 0.05 counts." in caplog.text


def test_f24_a_finished_run_trains_nothing_and_another_one_is_refused(tmp_path, caplog):
    train(tmp_path)
    with caplog.at_level("INFO", logger="manualloop"):
        assert train(tmp_path, num_workers=1) == []
    assert notes(caplog) == []
    with pytest.raises(CheckpointError, match="- batch_size: 2 -> 7"):
        train(tmp_path, batch_size=7)


def tensors(*numbers):
    return TensorDataset(torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 4).clone())


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ({}, {"rows": Rows(num_rows=13)}, "num_rows: 14 -> 13"),
        ({"rows": tensors(*range(14))}, {"rows": tensors(*range(13), 77)}, "rows: "),
        ({}, {"rows": tensors(*range(14))}, "data: Rows -> TensorDataset"),
        ({}, {"optimizer": torch.optim.NAdam}, "optimizer: AdamW -> NAdam"),
        ({}, {"width": 9}, "0.weight is float32 (8, 4) in the checkpoint, float32 (9, 4) here"),
        ({}, {"extras": {"ema": torch.nn.Linear(1, 1)}}, "extras.ema is in the run only"),
        ({"extras": {"a": torch.nn.Linear(1, 1)}}, {}, "extras.a is in the checkpoint only"),
    ],
)
def test_f24_other_data_or_another_model_is_refused_with_a_list(before, after, line, tmp_path):
    train(tmp_path, stop_after=3, **before)
    with pytest.raises(CheckpointError) as error:
        train(tmp_path, **{**before, **after} if "rows" in after else after)
    assert f"- {line}" in str(error.value) or f"- model: {line}" in str(error.value)
    assert "nothing was" in str(error.value)
    assert (tmp_path / "step-00000002").is_dir()


def test_f24_columns_and_rows_of_datasets_are_compared(tmp_path):
    from datasets import Dataset

    def loader(**columns):
        return DataLoader(Dataset.from_dict(columns).with_format("torch"), 2)

    def run(data, expects=None):
        model = torch.nn.Linear(1, 1)
        state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if expects is not None:
            from manualloop import load_checkpoint

            load_checkpoint(tmp_path, state)
        steps = train_steps(
            state, data, num_epochs=1, loss_fn=lambda m, b: m(b["x"].float()[:, None]).mean()
        )
        next(steps)
        return state

    from manualloop import save_checkpoint

    save_checkpoint(tmp_path, run(loader(x=list(range(40)))))
    run(loader(x=list(range(40))), expects="nothing")
    for columns, line in (
        ({"x": [0] * 40}, "rows: "),
        ({"x": list(range(40)), "y": [0] * 40}, "columns: x -> x, y"),
        ({"x": list(range(39))}, "num_rows: 40 -> 39"),
    ):
        with pytest.raises(CheckpointError, match=f"- {line}"):
            run(loader(**columns), expects=line)
