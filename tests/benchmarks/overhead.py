"""What a step costs beside the model: ours, the course's loop, and one with nothing in it.

    python tests/benchmarks/overhead.py

A model of one linear layer, so that all that is measured is the loop. CPU time of whole sections,
one thread, the loops take turns; medians and ranges of the ratios within each turn. The bars draw
in a terminal of their own.
"""

import os
import pty
import statistics
import threading
import time

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from manualloop import SingleDevice, prepare_optimizer, train_loop
from manualloop.data.order import ordered_loader

NUM_STEPS, BATCH_SIZE, NUM_TURNS = 2000, 8, 7


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 2)

    def forward(self, x, labels):
        logits = self.linear(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.x = torch.randn(NUM_STEPS * BATCH_SIZE, 16)
        self.labels = torch.randint(0, 2, (len(self.x),))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"x": self.x[row], "labels": self.labels[row]}

    def __getitems__(self, rows):
        return {"x": self.x[rows], "labels": self.labels[rows]}


def collate(batch):
    return batch


def course(rows):
    """The loop of the course's chapter "A full training"."""
    model = Linear()
    loader = DataLoader(rows, shuffle=True, batch_size=BATCH_SIZE, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    lr_scheduler = get_scheduler(
        "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=NUM_STEPS
    )
    device = torch.device("cpu")
    model.to(device)
    progress_bar = tqdm(range(NUM_STEPS))
    model.train()
    for batch in loader:
        batch = {k: v.to(device) for k, v in batch.items()}
        outputs = model(**batch)
        loss = outputs["loss"]
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        progress_bar.update(1)
    progress_bar.close()


def bare(rows):
    """The same with a fused optimizer, without a bar."""
    model = Linear()
    loader = DataLoader(rows, shuffle=True, batch_size=BATCH_SIZE, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    lr_scheduler = get_scheduler(
        "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=NUM_STEPS
    )
    model.train()
    for batch in loader:
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()


def ours(rows):
    model = Linear()
    loader = ordered_loader(
        rows, "train", BATCH_SIZE, shuffle=True, seed=1, drop_last=False, collate_fn=collate
    )
    train_loop(
        model,
        loader,
        prepare_optimizer(model),
        num_epochs=1,
        strategy=SingleDevice("cpu"),
    )


def main():
    torch.set_num_threads(1)
    terminal, shown = pty.openpty()
    errors = os.dup(2)
    os.dup2(shown, 2)
    threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(terminal, 65536), b"")],
                     daemon=True).start()  # fmt: skip
    rows, loops = Rows(), (course, bare, ours)
    times = {loop: [] for loop in loops}
    for turn in range(NUM_TURNS + 1):
        for loop in loops if turn % 2 else reversed(loops):
            start = time.process_time()
            loop(rows)
            if turn:  # the first one warms up
                times[loop].append((time.process_time() - start) / NUM_STEPS * 1e6)
    os.dup2(errors, 2)
    for loop in loops:
        print(f"{loop.__name__:7} {statistics.median(times[loop]):6.1f} us a step")
    for other in (course, bare):
        ratios = [a / b for a, b in zip(times[ours], times[other], strict=True)]
        print(
            f"ours / {other.__name__}: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
