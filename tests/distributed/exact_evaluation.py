"""Evaluation and prediction on all ranks, compared with one process, bit by bit.

exact_evaluation.py: every case
"""

import itertools
import zlib

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from helpers import rows as sentences
from helpers import tiny_bert, tiny_tokenizer
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics.classification import BinaryAUROC
from transformers import GPT2Config, GPT2LMHeadModel

from manualloop import (
    SingleDevice,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    prepare_strategy,
)
from manualloop.data.sampler import ordered_loader
from manualloop.tasks import generated


class Rows(Dataset):
    def __init__(self, num_rows):
        draw = torch.Generator().manual_seed(num_rows)
        lengths = torch.randint(2, 9, (num_rows,), generator=draw).tolist()
        self.rows = [
            {
                "input_ids": torch.randint(4, 16, (length,), generator=draw),
                "labels": torch.randint(0, 2, (), generator=draw),
            }
            for length in lengths
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows.rows)


def pad(rows):
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.stack([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def product(predictions, references):
    # Depends on the order of the rows in its last bits.
    weights = np.sin(np.arange(len(predictions)) + 1.0)
    return {"product": float((weights * (predictions + 0.1) * (references - 0.3)).sum())}


def budget(rows, max_tokens):
    """Batches by a budget of tokens: they differ in their number of rows."""
    batches, batch = [], []
    for number, row in enumerate(rows.rows):
        widest = max(len(rows.rows[n]["input_ids"]) for n in (*batch, number))
        if batch and widest * (len(batch) + 1) > max_tokens:
            batches.append(batch)
            batch = []
        batch = [*batch, number]
        del row
    return [*batches, batch]


def loaders(num_rows, batch_size):
    rows = Rows(num_rows)
    options = {"collate_fn": pad}
    yield (
        "prepared",
        ordered_loader(
            rows, "validation", batch_size, shuffle=False, seed=0, drop_last=False, **options
        ),
    )
    yield (
        "shuffled",
        ordered_loader(rows, "train", batch_size, shuffle=True, seed=3, drop_last=False, **options),
    )
    texts = {"validation": sentences(num_rows)}
    yield (
        "sorted",
        prepare_dataloaders(texts, tiny_tokenizer(), batch_size=batch_size)["validation"],
    )
    yield "built", DataLoader(rows, batch_size, **options)
    yield "stream", DataLoader(Stream(rows), batch_size, **options)
    yield "budget", DataLoader(rows, batch_sampler=budget(rows, 8 * batch_size), **options)


def metrics():
    of_all = ["glue/mrpc", "f1/macro", "pearson", product, BinaryAUROC()]
    return [*of_all, "roc_auc", "log_loss", "perplexity", "exact_match"]


def counted():
    """Metrics of counts and of the loss, of which no rank keeps rows."""
    return ["classification_report", "confusion_matrix", "f1/none", "perplexity"]


def decode(outputs, batch):
    """A text for each row, of its tokens without the padding and of its class."""
    classes = outputs["logits"].argmax(-1).tolist()
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    texts = [" ".join(str(i) for i, m in zip(*row, strict=True) if m) for row in rows]
    return [f"{text} -> {number}" for text, number in zip(texts, classes, strict=True)]


def digest(predictions, references):
    """Every text and label, in their order."""
    return {"digest": zlib.crc32(repr((predictions, references)).encode())}


def on_main(together, function, *args, **options):
    """Call a function on rank 0 alone; return its result on all ranks."""
    return together.gather(function(*args, **options) if together.is_main else None)[0]


def shown(*args, **options):
    """All scores of an evaluation as text, in which NaN equals NaN."""
    scores = evaluate_loop(*args, **options)
    return str(scores), scores.report()


def check_texts(strategy, alone):
    """What a model writes on two ranks is what it writes in one process, row by row."""
    sizes = {"vocab_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=3))
    rows = [[4 + (3 * n + k) % 12 for k in range(2 + n % 4)] for n in range(7)]
    labels = [[-100, *row[1:]] for row in rows]
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})
    tokenizer = tiny_tokenizer(eos_token="[SEP]")
    loader = prepare_dataloaders({"dev": data}, tokenizer, model=model, batch_size=2)["dev"]
    decode = generated(tokenizer, max_new_tokens=4)
    expected = evaluate_loop(model, loader, digest, strategy=alone, decode=decode)
    together = strategy.prepare_model(model)
    found = evaluate_loop(together, loader, digest, strategy=strategy, decode=decode)
    assert str(found) == str(expected)
    texts = predict_loop(together, loader, strategy=strategy, decode=decode).predictions
    assert len({*texts}) > 1


# Batch sizes and numbers of rows: a row for one rank only, a whole and a short last batch, several.
SOME = [(3, 1), (1, 5), (5, 5), (3, 17)]


def main(folder=None, cases=SOME):
    """Six kinds of loaders and fourteen metrics."""
    strategy = prepare_strategy(Accelerator(cpu=True))
    alone = SingleDevice("cpu")
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # else all predictions are one class
    together = strategy.prepare_model(model)
    for batch_size, num_rows in cases:
        for name, loader in loaders(num_rows, batch_size):
            more = ["glue/mrpc", counted()] if name == "prepared" else []
            for metric in [metrics(), *more]:
                expected = on_main(strategy, shown, model, loader, metric, strategy=alone)
                found = shown(together, loader, metric, strategy=strategy)
                assert found == expected, (num_rows, batch_size, name)
            if batch_size == 3 and name == "sorted":
                options = {"metric": ["glue/mrpc", "pearson", product], "confidence": 0.9}
                expected = on_main(strategy, shown, model, loader, strategy=alone, **options)
                found = evaluate_loop(together, loader, strategy=strategy, **options)
                assert (str(found), found.report()) == expected, (num_rows, name)
                assert len(found) == 15, found
            options = {"metric": digest, "decode": decode}
            expected = on_main(strategy, shown, model, loader, strategy=alone, **options)
            found = shown(together, loader, strategy=strategy, **options)
            assert found == expected, (num_rows, batch_size, name)
            if name == "budget":
                continue  # a batch sampler of unknown order: predictions refuse it
            expected = on_main(strategy, predict_loop, model, loader, strategy=alone)
            found = predict_loop(together, loader, strategy=strategy)
            for column in ("index", "predictions", "scores", "references"):
                ours, theirs = getattr(found, column), getattr(expected, column)
                assert np.array_equal(ours, theirs), (num_rows, batch_size, name, column)
            assert found.index.tolist() == list(range(num_rows))
    check_texts(strategy, alone)


if __name__ == "__main__":
    main(cases=itertools.product(range(1, 6), range(1, 18)))
