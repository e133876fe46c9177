"""The folder of a finished run is met by another run, in every way that one may be another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import Dataset as TorchDataset

from manualloop import (
    CheckpointError,
    SingleDevice,
    TrainState,
    load_checkpoint,
    prepare_dataloaders,
    prepare_optimizer,
    save_checkpoint,
    train_loop,
    train_steps,
)

X = torch.arange(40.0).reshape(10, 4) / 40


class Encodings(TorchDataset):
    """The dataset of the course: columns in a dict."""

    def __init__(self, x: Tensor) -> None:
        self.encodings, self.num_reads = {"x": x}, 0

    def __len__(self) -> int:
        return len(self.encodings["x"])

    def __getitem__(self, row: int) -> Tensor:
        self.num_reads += 1
        self.encodings.setdefault("cache", torch.zeros(3))  # filled while it is read
        return self.encodings["x"][row]


def changed(x: Tensor) -> Tensor:
    x = x.clone()
    x[7, 2] += 1e-4
    return x


def rows(x: Tensor) -> Dataset:
    return Dataset.from_dict({"x": x.tolist()}).with_format("torch")


def shuffling(seed: int) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(X), 2, shuffle=True, generator=torch.Generator().manual_seed(seed)
    )


def weighted(weights: list[float]) -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(X), 2, sampler=WeightedRandomSampler(weights, 10))


def x_of(batch: Any) -> Tensor:
    if isinstance(batch, dict):
        return batch["x"]
    return batch[0] if isinstance(batch, list | tuple) else batch


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return model(x_of(batch)).square().mean()


def train(folder: Path, loader: Any, **options: Any) -> int:
    torch.manual_seed(options.pop("seed", 0))
    model = options.pop("model", None) or nn.Linear(4, 1)
    made: list[int] = []
    stop = options.pop("stop", None)

    def on_step(step: Any) -> None:
        made.append(step.index)
        if step.index == stop:
            raise InterruptedError

    with suppress(InterruptedError):
        train_loop(
            model,
            loader,
            options.pop("optimizer", partial(torch.optim.SGD, lr=0.1))(model.parameters()),
            **{"num_epochs": 2, "loss_fn": loss_fn, "strategy": SingleDevice("cpu")} | options,
            checkpoint_dir=folder,
            on_step=on_step,
            progress_bar=False,
        )
    return len(made)


LOADERS: dict[str, list[Callable[[], Any]]] = {
    "a row of a TensorDataset": [
        lambda x=x: DataLoader(TensorDataset(x), 2) for x in (X, changed(X))
    ],
    "a row of a dataset": [lambda x=x: DataLoader(rows(x), 2) for x in (X, changed(X))],
    "a row of a selection": [
        lambda x=x: DataLoader(rows(x).select([9, 7, 1, 3]), 2) for x in (X, changed(X))
    ],
    "the rows of a selection": [
        lambda n=n: DataLoader(rows(X).select(n), 2) for n in ([1, 2, 3], [1, 2, 4])
    ],
    "a batch of a list": [lambda x=x: list(x.split(2)) for x in (X, changed(X))],
    "a column of a list of dicts": [
        lambda x=x: [{"x": part, "name": "a"} for part in x.split(2)] for x in (X, changed(X))
    ],
    "the order of a list": [
        lambda step=step: [X[n : n + 2] for n in range(0, 10, 2)][::step] for step in (1, -1)
    ],
    "a row of an own dataset": [lambda x=x: DataLoader(Encodings(x), 2) for x in (X, changed(X))],
    "the rows of a Subset": [
        lambda n=n: DataLoader(Subset(TensorDataset(X), n), 2) for n in ([1, 2, 3], [1, 2, 4])
    ],
    "the batch size": [lambda n=n: DataLoader(TensorDataset(X), n) for n in (2, 5)],
    "shuffling": [lambda n=n: DataLoader(TensorDataset(X), 2, shuffle=n) for n in (False, True)],
    "drop_last": [lambda n=n: DataLoader(TensorDataset(X), 3, drop_last=n) for n in (False, True)],
    "the seed of the order": [lambda n=n: shuffling(n) for n in (1, 2)],
    "the weights of a sampler": [lambda w=w: weighted([1.0] * 9 + [w]) for w in (1.0, 2.0)],
    "replacement": [
        lambda n=n: DataLoader(
            TensorDataset(X), 2, sampler=RandomSampler(X, replacement=n, num_samples=10)
        )
        for n in (False, True)
    ],
    "collate_fn": [
        lambda f=f: DataLoader(TensorDataset(X), 2, collate_fn=f)
        for f in (
            lambda batch: torch.stack([row for (row,) in batch]),
            lambda batch: torch.stack([row * 2 for (row,) in batch]),
        )
    ],
}


@pytest.mark.parametrize("name", LOADERS)
def test_other_data_are_refused(name: str, tmp_path: Path) -> None:
    first, other = LOADERS[name]
    assert train(tmp_path, first()) > 0
    with pytest.raises(CheckpointError, match="finished"):
        train(tmp_path, other())
    assert train(tmp_path, first()) == 0


def test_a_dataset_that_is_used_again_is_the_same_though_it_has_filled_a_cache(
    tmp_path: Path,
) -> None:
    loader = DataLoader(Encodings(X), 2)
    assert train(tmp_path, loader) > 0
    assert train(tmp_path, loader) == 0


def falling(total: int) -> Callable[[Any], Any]:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / total)
    )


def test_an_extended_run_may_have_a_schedule_of_its_own_for_its_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = list(X.split(2))

    def run(num_epochs: int, total: int) -> int:
        weights = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(weights.parameters(), lr=0.1)
        return train(
            tmp_path,
            batches,
            model=weights,
            optimizer=lambda parameters: optimizer,
            lr_scheduler=falling(total)(optimizer),
            num_epochs=num_epochs,
        )

    assert run(2, 10) == 10
    caplog.set_level("INFO", logger="manualloop")
    assert run(3, 15) == 5
    assert "lr_scheduler: falling" in caplog.text
    with pytest.raises(CheckpointError, match="lr_scheduler"):
        run(3, 16)
    assert run(3, 15) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed", [{"seed": 1}, {"seed": 2}]),
        ("seed of numpy size", [{"seed": 1}, {"seed": (1 << 32) - 1}]),
        (
            "momentum",
            [{"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=m)} for m in (0, 0.9)],
        ),
        ("gamma", [{"lr_scheduler": None}, {"lr_scheduler": "linear"}]),
        (
            "mixed precision",
            [{"strategy": SingleDevice("cpu", mixed_precision=p)} for p in ("no", "bf16")],
        ),
        ("fewer steps", [{"num_epochs": None, "max_steps": n} for n in (6, 4)]),
        ("another unit", [{"num_epochs": 2}, {"num_epochs": None, "max_steps": 10}]),
        ("longer, with another clipping", [{}, {"num_epochs": 3, "max_grad_norm": 1.0}]),
        ("warm-up", [{"num_warmup_steps": n} for n in (0, 0.3)]),
    ],
)
def test_other_settings_are_refused(
    name: str, options: list[dict[str, Any]], tmp_path: Path
) -> None:
    loader = DataLoader(TensorDataset(X), 2)
    assert train(tmp_path, loader, **options[0]) > 0
    with pytest.raises(CheckpointError):
        train(tmp_path, loader, **options[1])
    assert train(tmp_path, loader, **options[0]) == 0


def test_other_rows_for_evaluation_are_refused(tmp_path: Path) -> None:
    def evaluating(x: Tensor) -> Callable[[], dict[str, float]]:
        loaders = {"validation": DataLoader(TensorDataset(x), 2)}
        return lambda: {"f1": float(len(loaders["validation"]))}

    assert train(tmp_path, list(X.split(2)), evaluate=evaluating(X)) > 0
    with pytest.raises(CheckpointError, match="evaluated rows"):
        train(tmp_path, list(X.split(2)), evaluate=evaluating(changed(X)))
    assert train(tmp_path, list(X.split(2)), evaluate=evaluating(X)) == 0


def test_a_fixed_evaluation_is_made_where_the_last_one_failed(tmp_path: Path) -> None:
    def failing() -> dict[str, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, list(X.split(2)), evaluate=failing, evaluate_every=100)
    calls: list[int] = []

    def fixed() -> dict[str, float]:
        calls.append(1)
        return {"f1": 1.0}

    assert train(tmp_path, list(X.split(2)), evaluate=fixed, evaluate_every=100) == 0
    assert calls == [1]


def test_more_epochs_steps_or_patience_extend_a_run(tmp_path: Path) -> None:
    batches = list(X.split(2))
    assert train(tmp_path / "epochs", batches, lr_scheduler=None) == 10
    assert train(tmp_path / "epochs", batches, lr_scheduler=None, num_epochs=3) == 5
    steps = {"num_epochs": None, "lr_scheduler": None}
    assert train(tmp_path / "steps", batches, **steps, max_steps=3) == 3
    assert train(tmp_path / "steps", batches, **steps, max_steps=5) == 2
    patient = {"evaluate": lambda: {"f1": 1.0}, "best_metric": "f1", "num_epochs": 9}
    patient["lr_scheduler"] = None
    assert train(tmp_path / "patience", batches, **patient, patience=2) == 15
    assert train(tmp_path / "patience", batches, **patient, patience=4) == 10
    with pytest.raises(CheckpointError, match="patience: 4 -> 3"):
        train(tmp_path / "patience", batches, **patient, patience=3)
    assert train(tmp_path / "patience", batches, **patient, patience=4) == 0


def test_the_rate_that_a_run_was_made_with_is_no_difference_after_another_was_asked_for(
    tmp_path: Path,
) -> None:
    batches = list(X.split(2))

    def with_rate(lr: float, stop: int | None = None) -> int:
        sgd = partial(torch.optim.SGD, lr=lr)
        return train(tmp_path, batches, optimizer=sgd, stop=stop, checkpoint_every=1)

    assert with_rate(0.1, stop=4) == 4
    assert with_rate(0.01) > 0  # logged: the checkpoint's 0.1 counts
    assert with_rate(0.01) == with_rate(0.1) == 0
    with pytest.raises(CheckpointError, match=r"lr: 0\.01 -> 0\.2"):
        with_rate(0.2)


def test_surroundings_are_not_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tmp_path, DataLoader(TensorDataset(X), 2)) > 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr("manualloop.checkpoint.contract.version_of", lambda name: "0.1")
    assert train(tmp_path, DataLoader(TensorDataset(X), 2, num_workers=1)) == 0


def test_a_model_of_transformers_and_prepared_rows(tmp_path: Path) -> None:
    def run(labels: list[int], frozen: int = 0, **config: Any) -> int:
        torch.manual_seed(0)
        model = tiny_bert(2, **config)
        for parameter in list(model.parameters())[:frozen]:
            parameter.requires_grad_(False)
        ids = [[2, 5 + n, 3] for n in range(len(labels))]
        data = Dataset.from_dict({"input_ids": ids, "label": labels})
        loaders = prepare_dataloaders({"train": data}, model=model, batch_size=2)
        made: list[int] = []
        train_loop(
            model,
            loaders["train"],
            prepare_optimizer(model, lr=1e-3),
            num_epochs=1,
            checkpoint_dir=tmp_path,
            on_step=lambda step: made.append(step.index),
            progress_bar=False,
        )
        return len(made)

    assert run([0, 1, 0, 1]) == 2
    assert run([0, 1, 0, 1]) == 0
    with pytest.raises(CheckpointError, match="rows: "):
        run([0, 1, 1, 1])
    with pytest.raises(CheckpointError, match=r"config.hidden_dropout_prob: 0.1 -> 0.2"):
        run([0, 1, 0, 1], hidden_dropout_prob=0.2)
    with pytest.raises(CheckpointError, match=r"frozen parameters: 0 of \d+ -> 1 of \d+"):
        run([0, 1, 0, 1], frozen=1)
    assert run([0, 1, 0, 1]) == 0


def test_at_level_two_settings_that_the_checkpoint_overrides_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def state(lr: float) -> TrainState:
        model = nn.Linear(4, 1)
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=lr))

    def steps(one: TrainState, number: int) -> None:
        list(train_steps(one, list(X.split(2)), max_steps=number, loss_fn=loss_fn))

    first = state(0.1)
    steps(first, 2)
    save_checkpoint(tmp_path, first)
    caplog.set_level("INFO", logger="manualloop")
    second = state(0.2)
    load_checkpoint(tmp_path, second)
    assert "lr: 0.1 -> 0.2; the checkpoint's 0.1 counts" in caplog.text
    steps(second, 3)
    save_checkpoint(tmp_path, second)
    caplog.clear()
    third = state(0.2)  # it is told again, for 0.1 still counts
    load_checkpoint(tmp_path, third)
    assert "lr: 0.1 -> 0.2; the checkpoint's 0.1 counts" in caplog.text
    third.optimizer.param_groups[0]["lr"] = 0.2
    steps(third, 4)
    save_checkpoint(tmp_path, third)
    caplog.clear()
    fourth = state(0.2)  # now 0.2 counts, as the script says
    load_checkpoint(tmp_path, fourth)
    assert "lr" not in caplog.text
    assert fourth.optimizer.param_groups[0]["lr"] == 0.2


def test_a_rate_that_the_script_lowers_on_the_way_is_no_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="manualloop")

    def run(stop: int | None) -> list[float]:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rates: list[float] = []

        def on_step(step: Any) -> None:
            rates.append(step.lr)
            optimizer.param_groups[0]["lr"] *= 0.5
            if step.index == stop:
                raise InterruptedError

        with suppress(InterruptedError):
            train_loop(
                model,
                list(X.split(2)),
                optimizer,
                None,
                num_epochs=2,
                loss_fn=loss_fn,
                checkpoint_dir=tmp_path,
                checkpoint_every=1,
                on_step=on_step,
                progress_bar=False,
            )
        return rates

    run(4)
    assert run(None)[0] == pytest.approx(0.1 * 0.5**3)
    assert "->" not in caplog.text


def test_a_schedule_of_another_class_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    def state(schedule: Any) -> TrainState:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return TrainState(model, optimizer, schedule(optimizer))

    first = state(partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5))
    list(train_steps(first, list(X.split(2)), max_steps=2, loss_fn=loss_fn))
    save_checkpoint(tmp_path, first)
    for other in (
        partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
        partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0),
    ):
        second = state(other)
        before = [weight.clone() for weight in second.model.parameters()]
        with pytest.raises(CheckpointError, match="class of lr_scheduler: StepLR -> "):
            load_checkpoint(tmp_path, second)
        assert all(map(torch.equal, before, second.model.parameters()))
        assert second.progress.num_steps == 0


UNFINISHED = {
    "weight_decay of group 0: 0.1 -> 0.2; the checkpoint's 0.1 counts": [
        {"optimizer": lambda w, d=d: torch.optim.AdamW(groups(w, d), lr=0.1)} for d in (0.1, 0.2)
    ],
    "betas: [0.9, 0.999] -> [0.8, 0.999]; the checkpoint's [0.9, 0.999] counts": [
        {"optimizer": lambda w, b=b: torch.optim.AdamW(w, lr=0.1, betas=(b, 0.999))}
        for b in (0.9, 0.8)
    ],
    "lr_scheduler: linear -> cosine": [{"lr_scheduler": name} for name in ("linear", "cosine")],
    "on_nonfinite: raise -> skip; the new value counts": [
        {"on_nonfinite": name} for name in ("raise", "skip")
    ],
    "evaluate_every: epoch -> 3; the new value counts": [
        {"evaluate": lambda: {"f1": 1.0}, "evaluate_every": every} for every in ("epoch", 3)
    ],
    "mixed_precision: no -> bf16; the new value counts": [
        {"strategy": SingleDevice("cpu", mixed_precision=name)} for name in ("no", "bf16")
    ],
    "Dropout.p: 0.1 -> 0.3; the new value counts": [
        {"model": nn.Sequential(nn.Linear(4, 1), nn.Dropout(p))} for p in (0.1, 0.3)
    ],
    "seed of torch: 1 -> 2; the random states of the checkpoint count": [
        {"seed": seed} for seed in (1, 2)
    ],
}


def groups(weights: Any, decay: float) -> list[dict[str, Any]]:
    weight, bias = weights
    return [{"params": [weight], "weight_decay": decay}, {"params": [bias]}]


@pytest.mark.parametrize("line", UNFINISHED)
def test_what_differs_from_an_unfinished_run_is_one_line(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = UNFINISHED[line]

    train(tmp_path, list(X.split(2)), **first, checkpoint_every=1, stop=3)
    caplog.clear()
    caplog.set_level("INFO", logger="manualloop")
    train(tmp_path, list(X.split(2)), **second, checkpoint_every=1, stop=6)
    lines = [message for message in caplog.messages if "->" in message]
    assert len(lines) == 1
    assert line in lines[0]
