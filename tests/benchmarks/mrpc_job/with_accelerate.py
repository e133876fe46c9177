import json
import shutil
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_scheduler,
)

FOLDER, NUM_EPOCHS = Path("runs/mrpc"), 3

set_seed(42)
accelerator = Accelerator(
    log_with="tensorboard",
    project_config=ProjectConfiguration(
        str(FOLDER), automatic_checkpoint_naming=True, total_limit=2
    ),
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
)
accelerator.init_trackers("mrpc")
tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
with accelerator.main_process_first():
    rows = load_dataset("glue", "mrpc").map(
        lambda batch: tokenizer(batch["sentence1"], batch["sentence2"], truncation=True),
        batched=True,
        remove_columns=["sentence1", "sentence2", "idx"],
    )
rows = rows.rename_column("label", "labels")
collate = DataCollatorWithPadding(tokenizer)
train_loader = DataLoader(rows["train"], batch_size=8, shuffle=True, collate_fn=collate)
eval_loader = DataLoader(rows["validation"], batch_size=8, collate_fn=collate)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0)
model, optimizer, train_loader, eval_loader = accelerator.prepare(
    model, optimizer, train_loader, eval_loader
)
num_steps = NUM_EPOCHS * len(train_loader)
scheduler = get_scheduler("linear", optimizer, 0, num_steps * accelerator.num_processes)
scheduler = accelerator.prepare(scheduler)
metric = evaluate.load("glue", "mrpc")

step, first_epoch, num_done, best_f1 = 0, 0, 0, -1.0
progress = FOLDER / "progress.json"
if progress.exists():
    accelerator.load_state()
    state = json.loads(progress.read_text())
    step, first_epoch, num_done = state["step"], state["epoch"], state["num_done"]
    best_f1 = state["best_f1"]
    accelerator.project_configuration.iteration = state["iteration"]

for epoch in range(first_epoch, NUM_EPOCHS):
    model.train()
    train_loader.set_epoch(epoch)
    loader = accelerator.skip_first_batches(train_loader, num_done) if num_done else train_loader
    num_done = 0
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            accelerator.log({"loss": loss.item(), "lr": scheduler.get_last_lr()[0]}, step=step)
    model.eval()
    for batch in eval_loader:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(dim=-1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        metric.add_batch(predictions=predictions, references=references)
    scores = metric.compute()
    accelerator.log(scores, step=step)
    is_best = scores["f1"] > best_f1
    best_f1 = max(best_f1, scores["f1"])
    accelerator.save_state()
    if accelerator.is_main_process:
        if is_best:
            shutil.rmtree(FOLDER / "best", ignore_errors=True)
            accelerator.unwrap_model(model).save_pretrained(FOLDER / "best")
            tokenizer.save_pretrained(FOLDER / "best")
        iteration = accelerator.project_configuration.iteration
        state = {"step": step, "epoch": epoch + 1, "num_done": 0, "best_f1": best_f1}
        progress.write_text(json.dumps({**state, "iteration": iteration}))
    accelerator.wait_for_everyone()
    accelerator.print(epoch, scores)
accelerator.end_training()
