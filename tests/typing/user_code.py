"""What users write, for type checkers alone: `nox -s types` checks it with mypy and pyright.

``assert_type`` fails where a checker sees another type than the one that is written here.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import assert_type

from manualloop import (
    CheckpointInfo,
    ConfigError,
    ManualLoopError,
    Predictions,
    PreflightReport,
    ResumeReport,
    SingleDevice,
    Step,
    Strategy,
    TrainResult,
    TrainState,
    Update,
    Window,
    accumulate_gradients,
    apply_update,
    check_accumulation,
    compare_predictions,
    eject,
    evaluate_loop,
    find_checkpoint,
    load_checkpoint,
    load_metric,
    plot_history,
    predict_loop,
    preflight,
    prepare_dataloaders,
    prepare_optimizer,
    prepare_scheduler,
    prepare_strategy,
    save_checkpoint,
    train_loop,
    train_steps,
    verify_resume,
    windows,
    write_model_card,
    write_report,
)
from manualloop.tracking import csv_file, mlflow, tensorboard, wandb

model = nn.Linear(2, 2)
loaders = prepare_dataloaders({"train": [], "validation": []}, None, batch_size=8)
assert_type(loaders, dict[str, DataLoader[Any]])


# Level 1
def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(batch["x"]).mean()
    return loss


def counted_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    loss: Tensor = model(batch["x"]).sum()
    return loss, len(batch["x"])


def terms(outputs: Any, batch: Any) -> list[tuple[Tensor, float]]:
    return [(outputs.loss, len(batch["labels"])), (outputs.aux, 1.0)]


def evaluate() -> dict[str, float]:
    return {"f1": 0.5}


def evaluate_in_detail() -> dict[str, object]:
    return {"matched": {"f1": 0.5}, "report": "good", "counts": [1, 2]}


def on_step(step: Step) -> None:
    assert_type(step.index, int)
    assert_type(step.loss, Tensor)
    assert_type(step.grad_norm, Tensor | None)
    assert_type(step.every(200), bool)


def show(record: dict[str, Any]) -> None:
    print(record["step"])


class Lines:
    """A tracker of the user's own."""

    is_live = True

    def open_run(self, run: Any) -> int:
        return len(run.records)

    def __call__(self, record: dict[str, Any]) -> None:
        print(record)


result = train_loop(
    model,
    loaders["train"],
    num_epochs=3,
    evaluate=partial(evaluate_loop, model, loaders["validation"], "glue/mrpc"),
    evaluate_every="0.5 epoch",
    best_metric="f1",
    patience=3,
    checkpoint_dir=Path("runs") / "mrpc",
    checkpoint_every="10 min",
    max_time="3 h",
    on_step=on_step,
    trackers=[
        tensorboard("runs/mrpc"),
        csv_file(Path("history.csv")),
        wandb("mrpc", name="first", config={"data": "mrpc"}, mode="offline"),
        mlflow("mrpc", tags={"team": "nlp"}),
        show,
        print,
        Lines(),
        lambda record: print(record["step"]),
    ],
)
assert_type(result, TrainResult)
assert_type(result.metrics, dict[str, float])
assert_type(result.history, list[dict[str, Any]])
assert_type(result.best_step, int | None)
assert_type(result.best_checkpoint, Path | None)
assert_type(result.stopped_by, str)

train_loop(model, [torch.ones(2)], torch.optim.SGD(model.parameters()), None, max_steps=3)
train_loop(model, loaders["train"], loss_fn=loss_fn, evaluate=evaluate, trackers=(show,))
train_loop(model, loaders["train"], loss_fn=counted_loss, evaluate=evaluate_in_detail)
train_loop(model, loaders["train"], terms=terms, evaluate=lambda: {"f1": 1})
train_loop(model, loaders["train"], loss_fn=lambda model, batch: model(batch["x"]).mean())

# Before, beside and after a run
report = preflight(model, loaders["train"], num_epochs=3)
assert_type(report, PreflightReport)
assert_type(eject(model, loaders["train"], num_epochs=3), str)
assert_type(write_report(result, Path("report.html")), Path)
assert_type(result.report("report.html"), Path)
assert_type(write_model_card(result, "card", license="mit"), Path)
plot_history(result, result, labels=["first", "second"])

# Evaluation
scores = evaluate_loop(model, loaders["validation"], "accuracy", confidence=0.95)
assert_type(scores["accuracy"], float)
assert_type(scores.report(), str)
evaluate_loop(model, {"matched": loaders["validation"]}, ["accuracy", "f1"], loss_fn=loss_fn)
predictions = predict_loop(model, loaders["validation"])
assert_type(predictions, Predictions)
assert_type(predictions[3], dict[str, Any])
assert_type(predictions[:3], Predictions)
print(compare_predictions(predictions, predictions, "accuracy"))
load_metric("f1", average="macro")


# Level 2
def step_fn(state: TrainState, batches: Sequence[Any], strategy: Strategy) -> Update:
    return apply_update(state, list(batches), strategy, max_grad_norm=1.0)


strategy = prepare_strategy("cpu", mixed_precision="bf16")
assert_type(strategy, Strategy)
optimizer = prepare_optimizer(model, lr=3e-5)
assert_type(optimizer, Optimizer)
pair = prepare_optimizer(model, "muon+adamw")
assert_type(pair, list[Optimizer])
schedule = prepare_scheduler(optimizer, "cosine", num_training_steps=100, num_warmup_steps=0.1)
state = TrainState(model, optimizer, schedule, extras={"seen": torch.Generator()})
TrainState(model, pair, [schedule, None])
for step in train_steps(state, loaders["train"], num_epochs=3, step_fn=step_fn, strategy=strategy):
    assert_type(step, Step)
    if step.every(200):
        assert_type(save_checkpoint("runs", state, metrics={"f1": 0.5}, best_metric="f1"), Path)
assert_type(load_checkpoint("runs", state, which="best"), CheckpointInfo)
load_checkpoint("runs", model)
assert_type(find_checkpoint("runs", "best"), Path)

# Level 3
alone: Strategy = SingleDevice("cpu")
for window in windows(loaders["train"], 4):
    assert_type(window, Window)
    update = accumulate_gradients(model, window.batches, loss_fn=loss_fn, strategy=alone)
    assert_type(update, Update)
    assert_type(update.loss, Tensor)

# Proofs and errors
assert_type(check_accumulation(model, {"x": torch.ones(2)}).is_exact, bool)


def train(**options: Any) -> TrainResult:
    return train_loop(model, loaders["train"], **options)


assert_type(verify_resume(train, at=7), ResumeReport)
try:
    train()
except ConfigError as error:
    caught: ManualLoopError = error
