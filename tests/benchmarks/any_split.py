"""How far is one update in four pieces from the one big batch? Ours, the Trainer's, accelerate's.

    python tests/benchmarks/any_split.py

32 rows of unequal length, some labels ignored; float64 weights, SGD, no dropout. Printed is the
largest difference of a weight's change from that of the big batch, relative to the largest change:
0 is exact, 3 is four times too much. Above, 4 equal pieces; below, a last window that is short:
32 rows in batches of 8 with accumulation 3, whose second update should be that of the last 8 rows.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator
from heads import HEADS, build, head_id, make_batch
from transformers import Trainer, TrainingArguments

from manualloop import TrainState, train_steps

NUM_ROWS, LR = 32, 0.1


def rows_of(batch, start, stop):
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def plain_torch(model, windows):
    """The definition: each window as one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in windows:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def manualloop(model, batches, accumulation):
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=LR))
    for _ in train_steps(state, batches, num_epochs=1, gradient_accumulation_steps=accumulation):
        pass


def trainer(model, batches, accumulation):
    """transformers.Trainer, in the order of the rows."""

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [
        {name: tensor[number] for name, tensor in batch.items()}
        for batch in batches
        for number in range(len(batch["input_ids"]))
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=len(batches[0]["input_ids"]),
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        )
        InOrder(model, arguments, train_dataset=rows).train()


def accelerate_loop(model, batches, accumulation):
    """The loop of accelerate's guide to gradient accumulation."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def difference(head, loop, accumulation):
    batch = make_batch(head, NUM_ROWS)
    batches = [rows_of(batch, start, start + 8) for start in range(0, NUM_ROWS, 8)]
    exact, model = build(head), build(head)
    before = weights(exact)
    size = 8 * accumulation
    plain_torch(exact, [rows_of(batch, start, start + size) for start in range(0, NUM_ROWS, size)])
    loop(model, batches, accumulation)
    change = weights(exact) - before
    return float((weights(model) - before - change).abs().max() / change.abs().max())


def main():
    torch.set_num_threads(1)
    loops = {"manualloop": manualloop, "Trainer": trainer, "accelerate": accelerate_loop}
    for accumulation, title in ((4, "4 equal micro-batches"), (3, "3 micro-batches, then 1")):
        print(f"\n| {title} | {' | '.join(loops)} |\n|---|{'---|' * len(loops)}")
        for head in HEADS:
            cells = [f"{difference(head, loop, accumulation):.1e}" for loop in loops.values()]
            print(f"| {head_id(head)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
