"""Write the checkpoints that every later release must resume: ``python write_release.py``.

Each case trains a tiny model twice with the installed release: once to its end, and once until it
is interrupted. ``releases/<version>/`` gets what the interrupted run left behind, one archive a
case, and in ``ends.json`` what the whole run ended with. Only public names are used, so that the
script runs with any release, and so that ``test_releases.py`` resumes with the same functions.

Data and initial weights are multiples of powers of two. In the cases of ``EXACT`` so is everything
computed from them, and float64 holds it without rounding: no machine and no version of torch may
end with other bits. The others round, and their last bits may depend on the processor.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

import manualloop
from manualloop import (
    SingleDevice,
    TrainState,
    load_checkpoint,
    prepare_dataloaders,
    prepare_scheduler,
    prepare_strategy,
    save_checkpoint,
    train_loop,
    train_steps,
)

RELEASES = Path(__file__).parent / "releases"
NUM_ROWS = 22
Run = dict[str, Any]


def fill(model: nn.Module) -> nn.Module:
    """Set every parameter to multiples of 1/16 between -1/2 and 1/2."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = (torch.arange(parameter.numel()) * 7 + number * 5) % 17 - 8
            parameter.copy_((values / 16).reshape(parameter.shape))
    return model


def rows() -> list[dict[str, Any]]:
    """Rows of four small whole numbers, a whole number to predict, and their own number."""
    return [
        {
            "x": torch.tensor([(row * (column + 3)) % 7 - 3.0 for column in range(4)]).double(),
            "labels": float(row % 5 - 2),
            "row": row,
        }
        for row in range(NUM_ROWS)
    ]


def prepared(batch_size: int = 4) -> Any:
    columns = {name: [row[name] for row in rows()] for name in ("labels", "row")}
    columns["x"] = [row["x"].tolist() for row in rows()]
    data = {"train": Dataset.from_dict(columns)}
    return prepare_dataloaders(data, batch_size=batch_size, seed=7)["train"]


def shuffled(batch_size: int = 2) -> Any:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(rows(), batch_size=batch_size, shuffle=True, generator=generator)


class Stream(IterableDataset):
    """Gives row after row, and knows how many it has given."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        start, self.position = self.position, 0
        for row in range(start, NUM_ROWS):
            self.position = row + 1
            yield rows()[row]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Recorder:
    """Losses that remember the rows of each batch; both draw from all global generators."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def noise(self, batch: Any) -> Tensor:
        self.seen.append(batch["row"].tolist())
        number = random.randrange(4) + np.random.randint(4) + int(torch.randint(4, ()))
        return torch.tensor(number / 4, dtype=torch.float64)

    def linear(self, model: nn.Module, batch: Any) -> Tensor:
        """A loss whose gradients do not depend on the weights: nothing is ever rounded."""
        shift = self.noise(batch)
        output = model(batch["x"].to(next(model.parameters()).dtype)).double().squeeze(1)
        return (output * (batch["labels"] + shift)).mean()

    def squared(self, model: nn.Module, batch: Any) -> Tensor:
        shift = self.noise(batch)
        return (
            (model(batch["x"].float()).squeeze(1) - batch["labels"] - shift).square().mean().float()
        )

    def bert(self, model: nn.Module, batch: Any) -> Tensor:
        self.noise(batch)
        ids = (batch["x"] + 4).long()
        return model(input_ids=ids, labels=(batch["row"] % 2).long()).loss


def set_seed(folder: Path) -> None:
    """Seed all generators; otherwise where a checkpoint will have to put them back."""
    seed = (2 if folder.exists() else 1) + 10 * int(os.environ.get("RANK", 0))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def steps(
    folder: Path,
    state: TrainState,
    loader: Iterable[Any],
    loss: str,
    stop: int,
    *,
    on_step: Callable[[Any], object] = lambda step: None,
    strategy: Any = None,
    **settings: Any,
) -> Run:
    """Train from the folder's checkpoint or from the start; save and leave after step ``stop``."""
    strategy = strategy or SingleDevice("cpu")
    recorder, losses = Recorder(), []
    set_seed(folder)
    if folder.exists():
        load_checkpoint(folder, state, strategy=strategy)
    loss_fn = getattr(recorder, loss)
    for step in train_steps(state, loader, loss_fn=loss_fn, strategy=strategy, **settings):
        losses.append(float(step.loss).hex())
        on_step(step)
        if step.index == stop:
            save_checkpoint(folder, state, strategy=strategy, metrics={"loss": float(step.loss)})
            break
    return ended(state, recorder, losses)


def ended(state: TrainState, recorder: Recorder, losses: list[str], **more: Any) -> Run:
    tensors = dict(state.model.state_dict())
    for name, extra in state.extras.items():
        tensors |= {f"{name}.{key}": value for key, value in extra.state_dict().items()}
    weights = {
        name.removeprefix("module."): [float(number).hex() for number in tensor.reshape(-1)]
        for name, tensor in tensors.items()
    }
    progress = [state.progress.num_steps, state.progress.num_skipped, state.progress.epoch]
    seen = recorder.seen
    return {"weights": weights, "losses": losses, "rows": seen, "progress": progress, **more}


def network() -> nn.Module:
    return fill(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1 / 16, momentum=0.5)


def adamw_in_an_epoch(folder: Path, stops: bool) -> Run:
    """A prepared loader, AdamW, stopped in the middle of the second epoch."""
    model = network()
    state = TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    return steps(folder, state, prepared(), "squared", 9 * stops, num_epochs=3)


def own_dataloader(folder: Path, stops: bool) -> Run:
    """A DataLoader of the user that shuffles with a generator of its own."""
    model = fill(nn.Linear(4, 1).double())
    state = TrainState(model, sgd(model))
    return steps(folder, state, shuffled(), "linear", 14 * stops, num_epochs=2)


def accumulation(folder: Path, stops: bool) -> Run:
    """Windows of three batches, clipping, and a cosine schedule with warm-up."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    schedule = prepare_scheduler(optimizer, "cosine", num_training_steps=6, num_warmup_steps=2)
    settings = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "num_epochs": 3}
    state = TrainState(model, optimizer, schedule)
    return steps(folder, state, prepared(), "squared", 3 * stops, **settings)


def loss_scale(folder: Path, stops: bool) -> Run:
    """fp16 under a loss scale that falls by the first updates, which are skipped."""
    model = fill(nn.Linear(4, 1))
    strategy = SingleDevice("cpu", mixed_precision="fp16")
    state, settings = TrainState(model, sgd(model)), {"num_epochs": 2, "strategy": strategy}
    return steps(folder, state, shuffled(), "linear", 5 * stops, **settings)


def lora(folder: Path, stops: bool) -> Run:
    """Adapters of PEFT on a frozen BERT, which the checkpoint leaves out."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    adapters = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = fill(get_peft_model(BertForSequenceClassification(config), adapters))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    state = TrainState(model, torch.optim.AdamW(trained, lr=0.01))
    return steps(folder, state, prepared(), "bert", 4 * stops, num_epochs=2)


def moving_average(folder: Path, stops: bool) -> Run:
    """A moving average of the weights among the extras."""
    model = fill(nn.Linear(4, 1).double())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    state = TrainState(model, sgd(model), extras={"ema": ema})

    return steps(
        folder,
        state,
        shuffled(),
        "linear",
        7 * stops,
        num_epochs=2,
        on_step=lambda step: ema.update_parameters(model),
    )


def stream(folder: Path, stops: bool) -> Run:
    """A stream without a length whose state tells its position."""
    model = fill(nn.Linear(4, 1).double())
    loader = DataLoader(Stream(), batch_size=2)
    state = TrainState(model, sgd(model))
    return steps(folder, state, loader, "linear", 7 * stops, max_steps=17)


def run_folder(folder: Path, stops: bool) -> Run:
    """``train_loop`` with evaluations, one of them NaN, a best one, and a history."""
    model, recorder = fill(nn.Linear(4, 1).double()), Recorder()
    set_seed(folder)
    losses: list[str] = []

    def on_step(step: Any) -> None:
        losses.append(float(step.loss).hex())
        if step.index == 10 * stops:
            raise KeyboardInterrupt

    def evaluate() -> dict[str, float]:
        score = sum(float(weight.detach().sum()) for weight in model.parameters())
        return {"distance": abs(score), "ratio": float("nan") if score < 0 else float("inf")}

    try:
        result = train_loop(
            model,
            shuffled(),
            sgd(model),
            None,
            num_epochs=2,
            loss_fn=recorder.linear,
            evaluate=evaluate,
            evaluate_every=3,
            best_metric="-distance",
            checkpoint_dir=folder,
            checkpoint_every=4,
            keep_checkpoints=1,
            log_every=3,
            on_step=on_step,
            strategy=SingleDevice("cpu"),
            progress_bar=False,
        )
    except KeyboardInterrupt:
        return {}
    history = [
        {key: float(value).hex() for key, value in record.items()} for record in result.history
    ]
    best = {name: float(value).hex() for name, value in result.best_metrics.items()}
    last = load_checkpoint(folder, result.state).step
    best_step = load_checkpoint(folder, result.state, which="best").step
    load_checkpoint(folder, result.state)
    more = {"history": history, "best_metrics": best, "last": last, "best_step": best_step}
    return ended(result.state, recorder, losses, **more)


def two_ranks(folder: Path, stops: bool) -> Run:
    """Two processes that share the batches of a DataLoader."""
    model = fill(nn.Linear(4, 1).double())
    strategy = prepare_strategy("auto")
    state, settings = TrainState(model, sgd(model)), {"num_epochs": 2, "strategy": strategy}
    return steps(folder, state, shuffled(), "linear", 4 * stops, **settings)


CASES = {
    case.__name__: case
    for case in (
        adamw_in_an_epoch,
        own_dataloader,
        accumulation,
        loss_scale,
        lora,
        moving_average,
        stream,
        run_folder,
        two_ranks,
    )
}
EXACT = {"own_dataloader", "moving_average", "stream", "run_folder", "two_ranks"}
ON_TWO_RANKS = {"two_ranks"}


def run(name: str, *folders: Path, stops: bool = False) -> list[Run]:
    """Run a case from what each folder holds; return what rank 0 ended with."""
    if name not in ON_TWO_RANKS:
        return [CASES[name](folder, stops) for folder in folders]
    with tempfile.TemporaryDirectory() as directory:
        ends = Path(directory) / "ends.json"
        on_two_ranks(name, ends, int(stops), *folders)
        return list(json.loads(ends.read_text()))


def on_two_ranks(*arguments: Any) -> None:
    """Run this script on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, __file__, *map(str, arguments)], check=True)


def write(directory: Path, scratch: Path) -> None:
    """Write the archive of every case and the ends of their whole runs."""
    directory.mkdir(parents=True)
    ends = {}
    for name in CASES:
        (ends[name],) = run(name, scratch / "whole" / name)
        run(name, folder := scratch / "parts" / name, stops=True)
        with tarfile.open(directory / f"{name}.tar.xz", "w:xz") as archive:
            archive.add(folder, name)
    text = json.dumps(ends, indent=0, sort_keys=True)
    (directory / "ends.json").write_text(text + "\n")


def main() -> None:
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as scratch:
            write(RELEASES / manualloop.__version__, Path(scratch))
        return
    name, path, stops, *folders = sys.argv[1:]
    ends = [CASES[name](Path(folder), bool(int(stops))) for folder in folders]
    if os.environ["RANK"] == "0":
        Path(path).write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
