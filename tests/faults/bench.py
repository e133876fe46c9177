"""The small run into which faults are injected: dropout, shuffled rows, windows across saves.

``start`` runs it in a new process, which injects its fault before it trains: it replaces calls of
the operating system that write a checkpoint. The package itself has no code for tests.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from manualloop import SingleDevice, train_loop
from manualloop.data.sampler import ordered_loader

NUM_ROWS, NUM_STEPS = 64, 12  # 16 batches of 4 an epoch, in windows of 3: six updates, two epochs
CONTEXT = multiprocessing.get_context("forkserver")
# What a training process imports, once for all of them: 0.2 s a process instead of 3 s.
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "transformers.optimization",
        "manualloop.loop",
        "safetensors.torch",
        "datasets",
    ]
)


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randn(NUM_ROWS, 8, generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return NUM_ROWS

    def __getitem__(self, row):
        return {"x": self.x[row], "id": torch.tensor(row)}


def train(folder, log=None, **changes):
    """Train in this process, as a script would; append each step's rows and loss to ``log``."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)
    )
    loader = ordered_loader(Rows(), "train", 4, shuffle=True, seed=1, drop_last=False)
    ids = []

    def loss_fn(model, batch):
        ids.append(batch["id"].tolist())
        return model(batch["x"]).square().mean()

    def on_step(step):
        if log is not None:
            line = {"step": step.index, "ids": list(ids), "loss": float(step.loss).hex()}
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
        ids.clear()

    def evaluate():
        return {"weight": model[0].weight.sum().item(), "drawn": torch.rand(()).item()}

    options = {
        "num_epochs": 2,
        "gradient_accumulation_steps": 3,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "evaluate": evaluate,
        "evaluate_every": 4,
        "log_every": 3,
        "on_step": on_step,
        "strategy": SingleDevice("cpu"),
    }
    return train_loop(
        model,
        loader,
        torch.optim.AdamW(model.parameters(), lr=0.05),
        loss_fn=loss_fn,
        checkpoint_dir=folder,
        progress_bar=False,
        **{**options, **changes},
    )


def digest(result):
    """One hash of everything that must be equal at the end of a run."""
    found = hashlib.sha256()
    state = result.state

    def add(name, value):
        found.update(name.encode())
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(
                value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                add(f"{name}.{number}", item)
        else:
            found.update(repr(value).encode())

    for name, part in state.state_dict().items():
        add(name, part)
    add("history", result.history)
    add("torch", torch.get_rng_state())
    add("random", random.getstate())
    add("numpy", np.random.get_state())
    return found.hexdigest()


def _child(pipe, folder, log, fault, changes):
    torch.set_num_threads(1)
    printed = os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(printed, number)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if fault is not None:
        fault()
    try:
        result = train(folder, log, **changes)
        pipe.send(("finished", result.stopped_by, digest(result)))
    except Exception as error:
        pipe.send(("failed", type(error).__name__, str(error)))


def start(folder, log=None, fault=None, **changes):
    """Start the run in a new process, which calls ``fault()`` before it trains."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    arguments = (sender, str(folder), log and str(log), fault, changes)
    process = CONTEXT.Process(target=_child, args=arguments)
    process.start()
    sender.close()
    return process, receiver


def run(folder, log=None, fault=None, **changes):
    """Run in a new process; return its outcome, or the number of the signal that killed it."""
    process, receiver = start(folder, log, fault, **changes)
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    process.join(600)
    assert not process.is_alive(), "the process hangs"
    if outcome is None:
        return ("killed", -process.exitcode, "")
    return outcome


def messages(folder):
    """What the processes of a folder have printed."""
    path = Path(f"{folder}.out")
    return path.read_text() if path.exists() else ""


def junk(folder):
    """Files that should not be there after a run has ended."""
    return [
        path.name
        for path in Path(folder).iterdir()
        if path.name != "history.jsonl" and not path.name.startswith(("step-", "damaged-"))
    ]


def merged(log):
    """The steps of a log that several processes have written; later entries count."""
    steps = {}
    for line in Path(log).read_text().splitlines():
        entry = json.loads(line)
        steps[entry["step"]] = entry
    return [steps[step] for step in sorted(steps)]


def saved_steps(folder):
    return sorted(int(path.name[5:13]) for path in Path(folder).glob("step-*"))


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)
