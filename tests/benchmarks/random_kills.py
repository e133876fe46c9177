"""Kill a training run at random moments: is there a checkpoint, and does it finish?

    python tests/benchmarks/random_kills.py [--kills 40] [--only manualloop]

The same small model (dropout on), 64 shuffled rows, 8 rows an update, 40 updates, a checkpoint
after each, one kept, under manualloop, transformers' Trainer and accelerate, each as its
documentation says. A process is sent SIGKILL at a random moment after a random one of its updates,
except the last; a kill that came too late, after the last save, is not counted but drawn again.
Then the same command is started again:

inside a save      the kill came while the library wrote a checkpoint or removed the old one
newest unusable    what the library picks by itself raises an error, or nothing is left to pick
none usable        and so does every other checkpoint that is left: all is lost
began anew         of these, nothing was left: the same command trained from the first update on
went on            the same command went on from a checkpoint and reached the last update
bit-equal          of these, those with the weights of the run that was never killed

Saving on every update spends most of the time in saves, so these are not rates to expect in the
field.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from manualloop import prepare_scheduler, train_loop
from manualloop.data.sampler import ordered_loader
from manualloop.run import folder as run_folder

NUM_ROWS, BATCH_SIZE, NUM_EPOCHS, LR = 64, 8, 5, 1e-3
NUM_UPDATES = NUM_EPOCHS * NUM_ROWS // BATCH_SIZE


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.Linear(64, 2)
        )

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, 16, generator=generator)
    return [{"x": row, "labels": torch.tensor(int(row.sum() > 0))} for row in x]


class Saving:
    """Tells the parent, by two shared numbers, of the saves: begun, and how many are done."""

    def __init__(self, is_saving, num_saved):
        self.is_saving, self.num_saved = is_saving, num_saved

    def around(self, save):
        def saved(*args, **kwargs):
            self.is_saving.value = 1
            result = save(*args, **kwargs)
            self.is_saving.value = 0
            self.num_saved.value += 1
            return result

        return saved


def train_manualloop(folder, saving, which):
    model = Model()
    loader = ordered_loader(rows(), "train", BATCH_SIZE, shuffle=True, seed=42, drop_last=False)
    run_folder.RunFolder.save = saving.around(run_folder.RunFolder.save)
    train_loop(
        model,
        loader,
        torch.optim.AdamW(model.parameters(), lr=LR),
        num_epochs=NUM_EPOCHS,
        checkpoint_dir=folder,
        checkpoint_every=1,
        keep_checkpoints=1,
        progress_bar=False,
    )
    return model


def train_trainer(folder, saving, which):
    class Watched(Trainer):
        def _save_checkpoint(self, *args, **kwargs):
            return saving.around(super()._save_checkpoint)(*args, **kwargs)

    model = Model()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LR,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        logging_strategy="no",
    )
    trainer = Watched(model=model, args=arguments, train_dataset=rows())
    is_begun = Path(folder).is_dir() and get_last_checkpoint(str(folder)) is not None
    trainer.train(resume_from_checkpoint=which or is_begun)
    return model


class Counter:
    def __init__(self):
        self.steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def train_accelerate(folder, saving, which):
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        project_config=ProjectConfiguration(
            project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=1
        ),
    )
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    steps_per_epoch = NUM_ROWS // BATCH_SIZE
    schedule = prepare_scheduler(optimizer, num_training_steps=NUM_EPOCHS * steps_per_epoch)
    loader = DataLoader(rows(), BATCH_SIZE, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    checkpoints = checkpoints_of("accelerate", folder)
    if which or checkpoints:
        accelerator.load_state(which)
        # As its guide says: the next save must not take the name of one that is there.
        newest = int(re.search(r"\d+$", which or str(checkpoints[-1]))[0])
        accelerator.project_configuration.iteration = newest + 1
    save_state = saving.around(accelerator.save_state)
    first, skip = divmod(counter.steps, steps_per_epoch)
    for epoch in range(first, NUM_EPOCHS):
        batches = skip_first_batches(loader, skip) if epoch == first and skip else loader
        batches.set_epoch(epoch)  # of the new loader: it would begin with the order of epoch 0
        for batch in batches:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            counter.steps += 1
            save_state()
    return accelerator.unwrap_model(model)


TRAIN = {
    "manualloop": train_manualloop,
    "Trainer": train_trainer,
    "accelerate": train_accelerate,
}


def checkpoints_of(library, folder):
    """The checkpoint folders there are, oldest first."""
    parent = Path(folder) / "checkpoints" if library == "accelerate" else Path(folder)
    named = [p for p in parent.glob("*") if re.fullmatch(r"(checkpoint[-_]|step-)\d+", p.name)]
    return sorted(named, key=lambda path: int(re.search(r"\d+$", path.name)[0]))


def child(library, folder, is_saving, num_saved, pipe, which):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        model = TRAIN[library](folder, Saving(is_saving, num_saved), which)
        digest = hashlib.sha256()
        for tensor in model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        pipe.send(("finished", digest.hexdigest()))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


def start(library, folder, which=None):
    context = multiprocessing.get_context("forkserver")
    is_saving, num_saved = context.Value("i", 0, lock=False), context.Value("i", 0, lock=False)
    receiver, sender = context.Pipe(duplex=False)
    arguments = (library, str(folder), is_saving, num_saved, sender, which)
    process = context.Process(target=child, args=arguments)
    process.start()
    sender.close()
    return process, receiver, is_saving, num_saved


def finish(library, folder, which=None):
    """Train to the end; return the outcome and how many saves that took."""
    process, receiver, _, num_saved = start(library, folder, which)
    try:
        outcome, value = receiver.recv()
    except EOFError:
        outcome, value = "failed", "the process died"
    process.join()
    return outcome, value, num_saved.value


def undisturbed(library, folder):
    """Train to the end; return the weights' digest and the seconds from save to save."""
    process, receiver, _, num_saved = start(library, folder)
    while num_saved.value == 0 and process.is_alive():
        time.sleep(0.001)
    started = time.monotonic()
    outcome, digest = receiver.recv()
    seconds = time.monotonic() - started
    process.join()
    assert outcome == "finished", digest
    assert num_saved.value == NUM_UPDATES, num_saved.value
    return digest, seconds / (NUM_UPDATES - 1)


def kill_once(library, folder, num_saves, delay):
    """Kill a run some time after a save; return whether in a save, and the saves done by then."""
    process, _, is_saving, num_saved = start(library, folder)
    while num_saved.value < num_saves and process.is_alive():
        time.sleep(0.0002)
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL or num_saved.value == NUM_UPDATES, process.exitcode
    return bool(is_saving.value), num_saved.value  # as the kill has left them


def try_kills(library, num_kills, seed, shows_each):
    draws = random.Random(seed)
    counts = dict.fromkeys(
        (
            "kills",
            "inside a save",
            "newest unusable",
            "none usable",
            "began anew",
            "went on",
            "bit-equal",
        ),
        0,
    )
    with tempfile.TemporaryDirectory() as name:
        undisturbed(library, Path(name) / "warm")
        expected, seconds = undisturbed(library, Path(name) / "undisturbed")
        while counts["kills"] < num_kills:
            folder, copy = Path(name) / "run", Path(name) / "as-left"
            after, delay = draws.randrange(1, NUM_UPDATES), draws.uniform(0, 2 * seconds)
            in_save, num_saved = kill_once(library, folder, after, delay)
            if num_saved < NUM_UPDATES:
                counts["kills"] += 1
                counts["inside a save"] += in_save
                left = checkpoints_of(library, folder)
                shutil.copytree(folder, copy)
                outcome, value, more = finish(library, folder)
                if outcome == "failed" or not left:
                    counts["newest unusable"] += 1
                    others = [
                        finish(library, copy, str(copy / path.relative_to(folder)))[0]
                        for path in left[:-1]
                    ]
                    counts["none usable"] += "finished" not in others
                counts["began anew"] += outcome == "finished" and not left
                if outcome == "finished" and left:
                    done = int(re.search(r"\d+$", left[-1].name)[0]) + (library == "accelerate")
                    assert done + more == NUM_UPDATES, f"{left[-1].name}, then {more} updates"
                    counts["went on"] += 1
                    counts["bit-equal"] += value == expected
                    value = "equal" if value == expected else "other weights"
                if shows_each:
                    moment = f"killed after save {num_saved}{' in the next' * in_save}"
                    ending = " ".join(value.split())[:160] if left else "no checkpoint was left"
                    print(f"{library} {counts['kills']}, {moment}: {ending}", flush=True)
                shutil.rmtree(copy)
            shutil.rmtree(folder)
    return counts


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TRAIN)
    parser.add_argument("--each", action="store_true", help="also print what came of each kill")
    args = parser.parse_args()
    # The libraries, so that a process starts at once; "__main__" is ignored by Python 3.11.
    preload = ["torch._dynamo", "transformers.trainer", "safetensors.torch", "manualloop.loop"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    results = {
        library: try_kills(library, args.kills, args.seed, args.each)
        for library in TRAIN
        if args.only in (None, library)
    }
    print(f"| {args.kills} kills each | {' | '.join(results)} |")
    print("|---" * (len(results) + 1) + "|")
    for name in next(iter(results.values())):
        print(f"| {name} | {' | '.join(str(counts[name]) for counts in results.values())} |")


if __name__ == "__main__":
    main()
