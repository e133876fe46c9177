from pathlib import Path

import evaluate
import torch
from datasets import load_dataset
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_scheduler,
)

FOLDER, NUM_EPOCHS = Path("runs/mrpc"), 3


class Resumable(RandomSampler):
    """Rows in an order of the epoch, of which the first ones can be left out."""

    def __init__(self, num_rows, seed=42):
        self.num_rows, self.seed, self.epoch, self.num_done = num_rows, seed, 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.num_rows - self.num_done

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        return iter(order[self.num_done :])


def score(fabric, model, loader, metric):
    model.eval()
    found = []
    for batch in loader:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(dim=-1)
        pair = torch.stack([predictions, batch["labels"]], dim=1)
        found.append(pair)
    # DistributedSampler repeats rows so that all ranks have as many: they are cut off here.
    gathered = fabric.all_gather(torch.cat(found))
    if fabric.world_size > 1:
        gathered = gathered.transpose(0, 1).reshape(-1, 2)
    gathered = gathered[: len(loader.dataset)].cpu()
    model.train()
    return metric.compute(predictions=gathered[:, 0], references=gathered[:, 1])


def main():
    fabric = Fabric(loggers=TensorBoardLogger(FOLDER))
    fabric.launch()
    seed_everything(42)
    tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
    model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
    with fabric.rank_zero_first():
        rows = load_dataset("glue", "mrpc").map(
            lambda batch: tokenizer(batch["sentence1"], batch["sentence2"], truncation=True),
            batched=True,
            remove_columns=["sentence1", "sentence2", "idx"],
        )
    rows = rows.rename_column("label", "labels")
    collate = DataCollatorWithPadding(tokenizer)
    train, validation = rows["train"], rows["validation"]
    sampler = Resumable(len(train))
    if fabric.world_size > 1:
        sampler = DistributedSampler(train, shuffle=True, seed=42)
    train_loader = DataLoader(train, batch_size=8, sampler=sampler, collate_fn=collate)
    eval_sampler = None
    if fabric.world_size > 1:
        eval_sampler = DistributedSampler(validation, shuffle=False)
    eval_loader = DataLoader(validation, batch_size=8, sampler=eval_sampler, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
    num_steps = NUM_EPOCHS * len(train_loader)
    scheduler = get_scheduler("linear", optimizer, 0, num_steps)
    model, optimizer = fabric.setup(model, optimizer)
    train_loader, eval_loader = fabric.setup_dataloaders(
        train_loader, eval_loader, use_distributed_sampler=False
    )
    metric = evaluate.load("glue", "mrpc")
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "step": 0,
        "epoch": 0,
        "best_f1": -1.0,
    }
    if (FOLDER / "last.ckpt").exists():
        fabric.load(FOLDER / "last.ckpt", state)
    for epoch in range(state["epoch"], NUM_EPOCHS):
        model.train()
        sampler.set_epoch(epoch)
        for batch in train_loader:
            loss = model(**batch).loss
            fabric.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            state["step"] += 1
            if state["step"] % 50 == 0:
                lr = scheduler.get_last_lr()[0]
                fabric.log_dict({"loss": loss.item(), "lr": lr}, step=state["step"])
        scores = score(fabric, model, eval_loader, metric)
        fabric.log_dict(scores, step=state["step"])
        is_best = scores["f1"] > state["best_f1"]
        state["epoch"] = epoch + 1
        state["best_f1"] = max(state["best_f1"], scores["f1"])
        fabric.save(FOLDER / "last.ckpt", state)
        if is_best and fabric.global_rank == 0:
            model.module.save_pretrained(FOLDER / "best")
            tokenizer.save_pretrained(FOLDER / "best")
        fabric.barrier()
        fabric.print(epoch, scores)


if __name__ == "__main__":
    main()
