"""What the contestants of loops.py are given to do: rows, a model, loaders; and the proof they did.

Data are real (SST-2, MRPC), where a model is to be trained; weights are random.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from measure import DEVICE
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    get_scheduler,
)

from manualloop import prepare_dataloaders
from manualloop.data.sampler import ordered_loader

TEXTS = {"sst2": ("sentence",), "mrpc": ("sentence1", "sentence2")}
BATCH_SIZES = {"sst2": 32, "mrpc": 8}


@dataclass(frozen=True)
class Job:
    """What is to be done. ``seen`` counts on the model what reached it."""

    new_model: Callable[[], torch.nn.Module]  # always the same weights; counts in ``.seen``
    rows: Any  # as fast as they come
    torch_rows: Any  # as the course has them: of the format "torch"
    collate: Callable[[Any], Any]
    batch_size: int
    prepared: Callable[..., DataLoader]  # the rows as manualloop's own loader
    lr: float = 5e-5

    @property
    def num_steps(self):
        return -(-len(self.rows) // self.batch_size)

    def loader(self, rows, shuffle=True, **options):
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=self.collate,
            pin_memory=DEVICE.type == "cuda",
            **options,
        )

    def fused_adamw(self, model):
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0, fused=True)

    def schedule(self, optimizer):
        return get_scheduler(
            "linear",
            optimizer=optimizer,
            num_warmup_steps=0,
            num_training_steps=self.num_steps,
        )


class Linear(nn.Module):
    """One linear layer: all that a step costs is the loop."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 2)
        self.seen = {"rows": 0, "batches": 0}

    def forward(self, x, labels):
        self.seen["rows"] += len(labels)
        self.seen["batches"] += 1
        logits = self.linear(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    """Random rows, a batch of which costs next to nothing."""

    def __init__(self, num_rows):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_rows, 16, generator=generator)
        self.labels = torch.randint(0, 2, (num_rows,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"x": self.x[row], "labels": self.labels[row]}

    def __getitems__(self, rows):
        return {"x": self.x[rows], "labels": self.labels[rows]}


def as_it_is(batch):
    return batch


def linear_job(num_steps, batch_size=8):
    rows = Rows(num_steps * batch_size)

    def new_model():
        torch.manual_seed(0)
        return Linear()

    def prepared():
        options = {"shuffle": True, "seed": 42, "drop_last": False, "collate_fn": as_it_is}
        return ordered_loader(rows, "train", batch_size, **options)

    return Job(new_model, rows, rows, as_it_is, batch_size, prepared)


def shared():
    if "MANUALLOOP_SHARED" not in os.environ:
        sys.exit("Set MANUALLOOP_SHARED to the folder of the data sets, or use --only overhead.")
    return os.environ["MANUALLOOP_SHARED"]


def new_seen(model):
    """Let a model of transformers count its rows, batches and tokens."""
    model.seen = Counter()

    def count(module, args, batch):
        num_rows, num_tokens = batch["input_ids"].shape
        model.seen["rows"] += num_rows
        model.seen["batches"] += 1
        model.seen["tokens"] += num_rows * num_tokens

    model.register_forward_pre_hook(count, with_kwargs=True)
    return model


def bert_job(
    task,
    num_rows=None,
    batch_size=None,
    *,
    split="train",
    as_split="train",
    num_times=1,
    seed=0,
    lr=5e-5,
):
    """Make a job of a data set, tokenized, and a small BERT.

    manualloop is told that the split is called ``as_split``. Every row is there ``num_times``.
    """
    batch_size = batch_size or BATCH_SIZES[task]
    tokenizer = AutoTokenizer.from_pretrained(f"{shared()}/tokenizers/bert-base-uncased")
    raw = load_dataset(f"{shared()}/glue/{task}", split=split)
    if split == "train":
        raw = raw.shuffle(seed=0).select(range(min(num_rows or len(raw), len(raw))))
    rows = raw.map(
        lambda rows: tokenizer(*(rows[text] for text in TEXTS[task]), truncation=True),
        batched=True,
        remove_columns=[name for name in raw.column_names if name != "label"],
    ).rename_column("label", "labels")
    rows = concatenate_datasets([rows] * num_times)

    def new_model():
        return new_bert(
            seed,
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
        )

    return text_job(rows, tokenizer, new_model, batch_size, as_split, seed, lr)


def base_job(num_steps, batch_size=32, num_tokens=128):
    """Make a job of BERT base, and of rows that are as long as each other, of random tokens."""
    tokenizer = AutoTokenizer.from_pretrained(f"{shared()}/tokenizers/bert-base-uncased")
    generator = torch.Generator().manual_seed(0)
    size = (num_steps * batch_size, num_tokens)
    ids = torch.randint(1000, len(tokenizer), size, generator=generator).tolist()
    rows = Dataset.from_dict(
        {
            "input_ids": ids,
            "token_type_ids": [[0] * num_tokens] * len(ids),
            "attention_mask": [[1] * num_tokens] * len(ids),
            "labels": torch.randint(0, 2, (len(ids),), generator=generator).tolist(),
        }
    )
    return text_job(rows, tokenizer, new_bert, batch_size)


def new_bert(seed=0, **config):
    torch.manual_seed(seed)
    return new_seen(BertForSequenceClassification(BertConfig(**config)))


def text_job(rows, tokenizer, new_model, batch_size, as_split="train", seed=0, lr=5e-5):
    def prepared(**options):
        options = {"batch_size": batch_size, "seed": 42 + seed, **options}
        return prepare_dataloaders({as_split: rows}, tokenizer, **options)[as_split]

    return Job(
        new_model,
        rows,
        rows.with_format("torch"),
        DataCollatorWithPadding(tokenizer),
        batch_size,
        prepared,
        lr,
    )


def check_trained(job, model, optimizer, num_steps=None):
    """Refuse a contestant that did not train: all rows, all updates, a change of every weight."""
    num_steps = num_steps or job.num_steps
    assert model.seen["rows"] == len(job.rows), model.seen
    assert model.seen["batches"] == num_steps, model.seen
    assert {int(of["step"]) for of in optimizer.state.values()} == {num_steps}
    assert optimizer.param_groups[0]["lr"] == 0, "the schedule was not stepped every update"
    for before, after in zip(job.new_model().parameters(), model.parameters(), strict=True):
        assert not torch.equal(before, after.detach().cpu()), "a weight did not change"


def digest(model):
    """A short name for all the bits of the weights."""
    weights = (p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(b"".join(weights)).hexdigest()[:16]
