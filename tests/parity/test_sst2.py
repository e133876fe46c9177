"""SST-2 with a small model from scratch: it learns, and exactly as the hand-written loop does."""

import pytest
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    get_scheduler,
)

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop

LR = 1e-3


def new_model():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def accuracy_by_hand(model, loader):
    model.eval()
    num_right = num_rows = 0
    with torch.no_grad():
        for batch in loader:
            predictions = model(**batch).logits.argmax(dim=-1)
            num_right += int((predictions == batch["labels"]).sum())
            num_rows += len(predictions)
    return num_right / num_rows


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [960, pytest.param(6400, marks=pytest.mark.exhaustive)])
def test_same_accuracy_as_the_loop_written_out_and_far_above_the_majority(num_rows, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/bert-base-uncased")
    raw = load_dataset(str(shared / "glue/sst2"))
    raw["train"] = raw["train"].select(range(num_rows))
    majority = max(sum(raw["validation"]["label"]) / 872, 1 - sum(raw["validation"]["label"]) / 872)

    tokenized = raw.map(lambda row: tokenizer(row["sentence"], truncation=True), batched=True)
    tokenized = tokenized.remove_columns(["sentence", "idx"]).rename_column("label", "labels")
    collator = DataCollatorWithPadding(tokenizer)
    order = RandomSampler(tokenized["train"], generator=torch.Generator().manual_seed(42))
    train_loader = DataLoader(
        tokenized["train"], 32, sampler=order, collate_fn=collator, generator=torch.Generator()
    )
    theirs = new_model()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=0.0, fused=True)
    lr_scheduler = get_scheduler("linear", optimizer, 0, len(train_loader))
    torch.manual_seed(1)
    theirs.train()
    for batch in train_loader:
        theirs(**batch).loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    their_accuracy = accuracy_by_hand(
        theirs, DataLoader(tokenized["validation"], 32, collate_fn=collator)
    )

    ours = new_model()
    loaders = prepare_dataloaders(raw, tokenizer, batch_size=32)
    torch.manual_seed(1)
    result = train_loop(
        ours,
        loaders["train"],
        prepare_optimizer(ours, lr=LR),
        num_epochs=1,
        evaluate=lambda: evaluate_loop(ours, loaders["validation"], "glue/sst2"),
        progress_bar=False,
    )
    assert result.metrics["accuracy"] == their_accuracy
    assert num_rows < 6400 or their_accuracy > majority + 0.15
    print(f"accuracy {their_accuracy:.4f}, majority {majority:.4f}")
