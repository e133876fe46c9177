"""One update of transformers' Trainer, and of ours, on the ranks that there are.

trainer_line.py STEM
"""

import json
import os
import sys
from pathlib import Path

import torch
from same_update import make_model, make_rows
from transformers import Trainer, TrainingArguments, default_data_collator

from manualloop import TrainState, prepare_strategy, train_steps
from manualloop.data.sampler import ordered_loader

GLOBAL_BATCH, NUM_ROWS = 8, 16


def main():
    stem = sys.argv[1]
    strategy = prepare_strategy()
    world_size, rows = strategy.world_size, make_rows("sequence")[:NUM_ROWS]
    batch_size = GLOBAL_BATCH // world_size
    model = make_model("sequence")
    loader = ordered_loader(
        rows, "train", batch_size, shuffle=False, seed=0, drop_last=False,
        collate_fn=default_data_collator,
    )  # fmt: skip
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0))
    (step,) = train_steps(state, loader, max_steps=1, max_grad_norm=1e9, strategy=strategy)
    ours = {"loss": float(step.loss), "grad_norm": float(step.grad_norm)}

    arguments = TrainingArguments(
        output_dir=f"{stem}-trainer",
        per_device_train_batch_size=batch_size,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        max_grad_norm=1e9,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(make_model("sequence"), arguments, train_dataset=rows)
    trainer.train()
    theirs = {name: trainer.state.log_history[0][name] for name in ("loss", "grad_norm")}
    if strategy.is_main:
        Path(f"{stem}-{world_size}.json").write_text(json.dumps([ours, theirs]))
    sys.stdout.flush()
    strategy.gather(None)
    os._exit(0)  # Trainer leaves DDP's reducers behind, which abort when the group ends


if __name__ == "__main__":
    main()
