"""Fine-tuning on SST-2 rows: the course's loop, and ours with rows grouped by length.

    MANUALLOOP_SHARED=... python tests/benchmarks/grouping.py [--task mrpc] [--num-rows 2048]

CPU time of one epoch, one thread, the loops take turns; medians and ranges of the ratios within
each turn. Beside them the tokens that go through the model, for each that is not padding.
"""

import argparse
import os
import statistics
import time

import torch
from datasets import disable_progress_bars, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    get_scheduler,
)

from manualloop import SingleDevice, prepare_dataloaders, prepare_optimizer, train_loop

TEXTS = {"sst2": ("sentence",), "mrpc": ("sentence1", "sentence2")}


def new_model(vocab_size):
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
        )
    )


def course(raw, tokenizer, batch_size, texts):
    """The loop of the course's chapter "A full training", with its data preparation."""
    columns = [c for c in raw.column_names if c != "label"]
    data = raw.map(
        lambda rows: tokenizer(*(rows[text] for text in texts), truncation=True),
        batched=True,
        remove_columns=columns,
    )
    data = data.rename_column("label", "labels").with_format("torch")
    loader = DataLoader(
        data, shuffle=True, batch_size=batch_size, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    model = new_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    lr_scheduler = get_scheduler(
        "linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=len(loader)
    )
    start, tokens, real = time.process_time(), 0, 0
    model.train()
    for batch in loader:
        tokens += batch["attention_mask"].numel()
        real += int(batch["attention_mask"].sum())
        model(**batch).loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    return time.process_time() - start, tokens / real


def ours(raw, tokenizer, batch_size, texts):
    model = new_model(len(tokenizer))
    loaders = prepare_dataloaders(
        raw, tokenizer, model=model, batch_size=batch_size, group_by_length=True
    )
    tokens = [
        (b["attention_mask"].numel(), int(b["attention_mask"].sum())) for b in loaders["train"]
    ]
    start = time.process_time()
    train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model),
        num_epochs=1,
        strategy=SingleDevice("cpu"),
        progress_bar=False,
    )
    seconds = time.process_time() - start
    return seconds, sum(t for t, _ in tokens) / sum(r for _, r in tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TEXTS, default="sst2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-rows", type=int, default=2048)
    parser.add_argument("--num-turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    shared = os.environ["MANUALLOOP_SHARED"]
    tokenizer = AutoTokenizer.from_pretrained(f"{shared}/tokenizers/bert-base-uncased")
    raw = load_dataset(f"{shared}/glue/{args.task}", split="train").shuffle(seed=0)
    raw = raw.select(range(min(args.num_rows, len(raw))))
    ratios, shares = [], {}
    for turn in range(args.num_turns):
        seconds = {}
        for loop in (course, ours) if turn % 2 else (ours, course):
            seconds[loop], shares[loop] = loop(raw, tokenizer, args.batch_size, TEXTS[args.task])
        ratios.append(seconds[ours] / seconds[course])
    print(
        f"{args.task}, {len(raw)} rows, batches of {args.batch_size}: ours / course "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); tokens for "
        f"each that is no padding: {shares[course]:.2f} and {shares[ours]:.2f}"
    )


if __name__ == "__main__":
    main()
