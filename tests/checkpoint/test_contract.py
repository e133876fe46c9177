"""A run is described by all that its numbers depend on, and met by what differs."""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert
from torch import nn

from manualloop import (
    CheckpointError,
    SingleDevice,
    Update,
    apply_update,
    prepare_dataloaders,
    train_loop,
    train_steps,
)
from manualloop.checkpoint import contract
from manualloop.checkpoint.manifest import manifest_bytes

BATCHES = [torch.arange(8.0).reshape(2, 4) / 8 + number for number in range(5)]


def mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def mean_size(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).abs().mean()


def own_step(state: Any, batches: Any, strategy: Any) -> Update:
    return apply_update(state, batches, strategy, loss_fn=mean_square)


def own_terms(outputs: Any, batch: Any) -> list[tuple[torch.Tensor, int]]:
    return [(outputs.square().mean(), len(batch))]


def scores() -> dict[str, float]:
    return {"f1": 1.0, "loss": 1.0}


def other_scores() -> dict[str, float]:
    return {"f1": 0.5, "loss": 1.0}


def build(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(dropout), nn.Linear(3, 1))


def train(folder: Path, **options: Any) -> list[int]:
    """Train in a folder, with some options instead of others; return the steps made."""
    made: list[int] = []
    model = options.pop("model", None) or build()
    make_optimizer = options.pop("optimizer", partial(torch.optim.SGD, lr=0.1))
    optimizer = make_optimizer(model.parameters())
    schedule = options.pop("lr_scheduler", "linear")
    then = options.pop("on_step", lambda step: None)

    def on_step(step: Any) -> None:
        then(step)
        made.append(step.index)

    defaults: dict[str, Any] = {
        "train_dataloader": BATCHES,
        "num_epochs": 2,
        "loss_fn": mean_square,
        "evaluate": scores,
        "best_metric": "f1",
        "patience": 5,
        "strategy": SingleDevice("cpu"),
        "checkpoint_dir": folder,
        "progress_bar": False,
        "on_step": on_step,
    }
    if "max_steps" in options:
        defaults.pop("num_epochs")
    if {"step_fn", "terms"} & options.keys():
        defaults.pop("loss_fn")
    loop = partial(train_loop, model, **defaults | options)
    loop(optimizer=optimizer, lr_scheduler=schedule(optimizer) if callable(schedule) else schedule)
    return made


# For every argument of train_loop a run that differs from train() in this argument alone. A new
# argument needs a line here.
OTHER: dict[str, dict[str, Any]] = {
    "model": {"model": build(dropout=0.2)},
    "train_dataloader": {"train_dataloader": [*BATCHES[:4], BATCHES[4] + 1e-6]},
    "optimizer": {"optimizer": partial(torch.optim.SGD, lr=0.2)},
    "lr_scheduler": {"lr_scheduler": "cosine"},
    "num_epochs": {"num_epochs": 1},
    "max_steps": {"max_steps": 10},
    "max_time": {"max_time": "10 min"},
    "num_warmup_steps": {"num_warmup_steps": 2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "loss_fn": {"loss_fn": mean_size},
    "step_fn": {"step_fn": own_step},
    "terms": {"terms": own_terms},
    "on_nonfinite": {"on_nonfinite": "skip"},
    "strategy": {"strategy": SingleDevice("cpu", mixed_precision="bf16")},
    "extras": {"extras": {"ema": nn.Linear(1, 1)}},
    "evaluate": {"evaluate": other_scores},
    "evaluate_every": {"evaluate_every": 2},
    "best_metric": {"best_metric": "-loss"},
    "patience": {"patience": 1},
    "checkpoint_dir": {},
    "checkpoint_every": {"checkpoint_every": 3},
    "keep_checkpoints": {"keep_checkpoints": 1},
    "resume": {"resume": True},
    "on_step": {"on_step": print},
    "trackers": {"trackers": [print]},
    "log_every": {"log_every": 1},
    "progress_bar": {"progress_bar": True},
    "preflight": {"preflight": False},
}


@pytest.mark.parametrize("name", inspect.signature(train_loop).parameters)
def test_every_argument_is_described_or_is_known_to_have_no_effect(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tmp_path) == list(range(1, 11))
    caplog.set_level("INFO", logger="manualloop")
    if name in contract._WITHOUT_EFFECT:
        caplog.clear()
        assert train(tmp_path, **OTHER[name]) == []
        assert "is finished" in caplog.text
        assert "->" not in caplog.text
        return
    before = sorted(path.name for path in tmp_path.iterdir())
    torch.manual_seed(1)
    with pytest.raises(CheckpointError) as error:
        train(tmp_path, **OTHER[name])
    assert "nothing was" in str(error.value).lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert train(tmp_path) == []


def test_train_steps_has_no_argument_of_its_own() -> None:
    own = inspect.signature(train_steps).parameters.keys() - {"state"}
    assert own <= inspect.signature(train_loop).parameters.keys()


def test_the_refusal_lists_what_differs_and_names_the_way_out(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(CheckpointError) as error:
        train(
            tmp_path,
            optimizer=partial(torch.optim.SGD, lr=0.2, weight_decay=0.3),
            max_grad_norm=1.0,
            num_epochs=1,
        )
    lines = str(error.value).splitlines()
    assert lines[1:-1] == [
        "- max_grad_norm: None -> 1.0",
        "- num_epochs: 2 -> 1",
        "- lr: 0.1 -> 0.2",
        "- weight_decay: 0 -> 0.3",
    ]
    assert "another checkpoint_dir" in lines[-1]
    assert str(tmp_path) in lines[0]


GROUPS = ["same", "settings", "observed", "ends", "groups", "schedule", "seeds", "exact", "asked"]
FORGED = [
    None,
    [[1]],
    {"world_size": "2", "num_epochs": "3", "lr": {"x": 1}, "gradient_accumulation_steps": [2]},
    [{"lr": {"x": 1}}],
]


@pytest.mark.parametrize("group", GROUPS)
def test_a_forged_contract_ends_in_no_other_error(group: str, tmp_path: Path) -> None:
    train(tmp_path / "run")
    for number, forged in enumerate(FORGED):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        path = next(folder.glob("step-*10")) / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["contract"][group] = forged
        path.write_bytes(manifest_bytes(manifest))
        with contextlib.suppress(CheckpointError):
            train(folder)


def reading(value: Any) -> Any:
    return lambda model, batch: (model(batch) * value["scale"]).square().mean()


def test_a_value_that_a_function_reads_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="manualloop")
    train(tmp_path, loss_fn=reading({"scale": 1.0, "num_epochs": 2}))
    with pytest.raises(
        CheckpointError, match=r"- value\.scale of loss_fn: 1\.0 -> 2\.0\n"
    ) as error:
        train(tmp_path, loss_fn=reading({"scale": 2.0, "num_epochs": 2}))
    assert "code" not in str(error.value)
    caplog.clear()
    # Extended, though another entry of the dict, which the function does not read, has changed.
    assert train(tmp_path, loss_fn=reading({"scale": 1.0, "num_epochs": 3}), num_epochs=3)
    assert "of loss_fn" not in caplog.text


def test_an_unfinished_run_logs_the_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="manualloop")

    def end(step: Any) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss_fn=reading({"scale": 1.0}), on_step=end, checkpoint_every=1)
    train(tmp_path, loss_fn=reading({"scale": 0.5}))
    assert "because value.scale of loss_fn: 1.0 -> 0.5; the new value counts" in caplog.text


def logging_to(name: str) -> Any:
    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean() if name else torch.zeros(())

    return loss_fn


class Logger:
    def __init__(self, name: str) -> None:
        self.name = name

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean() if self.name else torch.zeros(())


NAMES = [
    ("runs/2026-11-29_21-01-47/log", "runs/2026-11-30_03-15-00/log"),
    ("run-20261129", "run-20261130"),
    ("20261129_210147", "20261130_031500"),
    ("2026-11-29T21:01:47.123456", "2026-11-30T03:15:00.000001"),
    ("Nov29_21-01-47_host", "Dec01_03-15-00_host"),
    ("run-1764450107", "run-1764500000"),
    ("1c9a5f0e-8f0b-4c1e-9d53-3c0f6f8e2a11", "7d0c1b2a-1111-4222-8333-944455566677"),
    ("/tmp/tmpab12cd34/log", "/tmp/tmpzz00_9xx/log"),
]


@pytest.mark.parametrize(("one", "other"), NAMES)
@pytest.mark.parametrize("kind", [logging_to, lambda name: Logger(name).loss])
def test_a_name_that_is_another_in_each_run_is_told_and_not_refused(
    one: str, other: str, kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="manualloop")
    train(tmp_path, loss_fn=kind(one))
    assert train(tmp_path, loss_fn=kind(other)) == []
    (line,) = [line for line in caplog.text.splitlines() if "->" in line]
    assert f"{one}" in line
    assert f"{other}" in line
    assert "it is taken for the same run" in line
    with pytest.raises(CheckpointError, match="focal"):
        train(tmp_path, loss_fn=kind("focal"))


@pytest.mark.parametrize(
    ("one", "other"), [("v1", "v2"), ("1e-4", "1e-5"), ("epoch 10", "epoch 12"), ("2024", "2025")]
)
def test_other_texts_are_refused(one: str, other: str, tmp_path: Path) -> None:
    train(tmp_path, loss_fn=logging_to(one))
    with pytest.raises(CheckpointError, match=f"name of loss_fn: '{one}' -> '{other}'"):
        train(tmp_path, loss_fn=logging_to(other))


def test_a_model_from_a_temporary_folder_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each process downloads it into another."""
    caplog.set_level("INFO", logger="manualloop")

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(8).reshape(2, 4) % 5
        return model(input_ids=ids).logits.square().mean()

    def build_from(name: str) -> nn.Module:
        model: nn.Module = tiny_bert()
        model.config._name_or_path = name
        return model

    run = partial(train, tmp_path, loss_fn=loss_fn)
    run(model=build_from("/tmp/tmpab12cd34/model"))
    assert run(model=build_from("/tmp/model-9f8e7d/model")) == []
    assert "->" not in caplog.text
    assert run(model=build_from("/tmp/tmpab12cd35/model")) == []
    with pytest.raises(CheckpointError, match="_name_or_path"):
        run(model=build_from("bert-base-cased"))


def test_names_of_classes_are_compared_only_where_both_runs_have_some() -> None:
    def described(*names: str) -> dict[str, Any]:
        config = {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "hidden_size": 8,
        }
        return {"same": {}, "groups": [], "settings": {"config": config}, "exact": {"torch": "1"}}

    plain, numbers = described("LABEL_0", "LABEL_1"), described("0", "1")
    named, other = described("neg", "pos"), described("pos", "neg")
    assert (
        contract.contract_differences(plain, named)
        == contract.contract_differences(named, numbers)
        == []
    )
    assert contract.contract_differences(named, other) == [
        "config.id2label.0: neg -> pos",
        "config.id2label.1: pos -> neg",
    ]


def test_a_folder_of_a_run_without_names_is_the_same_run_with_names(tmp_path: Path) -> None:
    table = Dataset.from_dict({"input_ids": [[4, 5], [6, 7]] * 2, "label": [0, 1] * 2})

    def run(num_epochs: int, model: nn.Module) -> Any:
        loader = prepare_dataloaders(table, model=model, batch_size=2)["train"]
        return train_loop(
            model, loader, num_epochs=num_epochs, checkpoint_dir=tmp_path, progress_bar=False
        )

    run(1, tiny_bert())
    named = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    result = run(1, tiny_bert(**named))  # finished, and this run
    assert result.state.progress.num_steps == 2


@pytest.mark.parametrize(
    ("schedule", "is_told"),
    [
        ("linear", True),
        ("cosine", True),
        ("constant", False),
        ("constant_with_warmup", False),
        (None, False),
        (partial(torch.optim.lr_scheduler.StepLR, step_size=3), False),
        (partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step), False),
    ],
)
def test_a_longer_run_is_bit_exact_where_no_rate_depends_on_its_length(
    schedule: Any, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="manualloop")
    models = [build() for _ in range(2)]
    first = build()
    torch.manual_seed(1)
    train(tmp_path / "parts", lr_scheduler=schedule, model=first)
    caplog.clear()
    assert train(tmp_path / "parts", lr_scheduler=schedule, num_epochs=3, model=models[0])
    assert ("num_steps" in caplog.text) == is_told
    torch.manual_seed(1)
    train(tmp_path / "whole", lr_scheduler=schedule, num_epochs=3, model=models[1])
    same = map(torch.equal, models[0].parameters(), models[1].parameters())
    assert all(same) != is_told


def test_accumulation_that_other_ranks_make_up_for_is_no_difference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="manualloop")

    def of(world_size: int, accumulation: int) -> dict[str, Any]:
        settings = {"gradient_accumulation_steps": accumulation, "lr_scheduler": None}
        groups: dict[str, Any] = {"same": {}, "ends": {}, "groups": [], "schedule": {}, "seeds": {}}
        return {**groups, "settings": settings, "exact": {"world_size": world_size}}

    contract.log_differences(of(1, 4), of(2, 2), workers_matter=False)
    assert "gradient_accumulation_steps" not in caplog.text
    assert "not bit-exact, because world_size: 1 -> 2." in caplog.text
    contract.log_differences(of(1, 4), of(2, 4), workers_matter=False)
    assert "gradient_accumulation_steps: 4 -> 4" not in caplog.text
    contract.log_differences(of(2, 2), of(2, 4), workers_matter=False)
    assert "gradient_accumulation_steps: 2 -> 4" in caplog.text


def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(self.layer(halved(x)))

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def edited(**members: Any) -> nn.Module:
    names = {"__module__": __name__, "__qualname__": "Net"}
    net: nn.Module = type("Net", (Net,), {**names, **members})()
    return net


def test_an_edited_forward_pass_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="manualloop")
    train(tmp_path, model=edited())
    assert train(tmp_path, model=edited()) == []
    assert train(tmp_path, model=edited(report=lambda self: "not called")) == []
    assert "->" not in caplog.text
    others: list[dict[str, Any]] = [
        {"forward": lambda self, x: self.scaled(self.layer(x))},
        {"scaled": lambda self, x: x * 3},
    ]
    for members in others:
        with pytest.raises(CheckpointError, match=r"- code of Net: Net \(code "):
            train(tmp_path, model=edited(**members))
    monkeypatch.setitem(globals(), "halved", lambda x: x / 3)
    with pytest.raises(CheckpointError, match=r"- code of Net: Net \(code "):
        train(tmp_path, model=edited())
