"""Loaders of every kind, for tests that stop a run and resume it."""

import random

import numpy as np
import torch
from datasets import Dataset as ArrowDataset
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    get_worker_info,
)

from manualloop.data.sampler import ordered_loader

NUM_ROWS = 14
LENGTHS = [3, 9, 1, 4, 7, 2, 8, 5, 6, 3, 9, 2, 1, 4]


class Rows(Dataset):
    """Rows of four numbers and their id; ``draws``: with noise from three global generators."""

    def __init__(self, draws=False, num_rows=NUM_ROWS):
        self.draws = draws
        self.x = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(3))
        self.loaded = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        self.loaded.append(row)
        x = self.x[row]
        if self.draws:
            x = x * (1 + 0.1 * torch.rand(())) + 0.1 * random.random() + 0.1 * np.random.rand()
        return {"x": x.float(), "id": torch.tensor(row)}


class OwnGenerator(Rows):
    """Noise from a generator that the dataset owns."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(5)

    def __getitem__(self, row):
        item = super().__getitem__(row)
        return item | {"x": item["x"] + float(self.rng.normal())}


class ByWorker(Rows):
    """Rows that depend on the number and the seed of the worker that reads them."""

    def __getitem__(self, row):
        info, item = get_worker_info(), super().__getitem__(row)
        return item | {"x": item["x"] + info.id + info.seed % 7}


class StatefulLoader:
    """A loader that knows its place itself, as torchdata's does; with or without a length."""

    def __init__(self):
        self.rows, self.position = Rows(draws=True), 0

    def __iter__(self):
        start, self.position = self.position, 0
        torch.rand(1)  # as a DataLoader does
        return self._batches(start)

    def _batches(self, start):
        for begin in range(start, NUM_ROWS, 2):
            self.position = begin + 2
            yield torch.utils.data.default_collate([self.rows[begin], self.rows[begin + 1]])
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class SizedStatefulLoader(StatefulLoader):
    def __len__(self):
        return NUM_ROWS // 2


class Stream(IterableDataset):
    """Rows in order, sharded over the workers; it knows how many it has yielded."""

    def __init__(self, draws=False):
        self.rows = Rows(draws)
        self.position = 0

    def __iter__(self):
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        start, self.position = self.position, 0
        for row in range(start, len(self.rows)):
            self.position = row + 1
            if row % num_workers == worker:
                yield self.rows[row]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class StatelessStream(IterableDataset):
    def __init__(self, draws=False):
        self.rows = Rows(draws)

    def __iter__(self):
        return (self.rows[row] for row in range(len(self.rows)))


class OwnSampler(Sampler):
    """Shuffles with a generator of its own, which continues from epoch to epoch."""

    def __init__(self, rng):
        self.rng = rng

    def __len__(self):
        return NUM_ROWS

    def __iter__(self):
        order = list(range(NUM_ROWS))
        self.rng.shuffle(order)
        return iter(order)


class GroupedBatches(Sampler):
    """Batches of rows of similar length, in random order: grouped by length."""

    def __len__(self):
        return NUM_ROWS // 2

    def __iter__(self):
        noise = torch.rand(NUM_ROWS)
        order = sorted(range(NUM_ROWS), key=lambda row: LENGTHS[row] + 2 * float(noise[row]))
        batches = [order[i : i + 2] for i in range(0, NUM_ROWS, 2)]
        return iter([batches[i] for i in torch.randperm(len(batches)).tolist()])


def noisy_collate(rows):
    batch = torch.utils.data.default_collate(rows)
    return batch | {"x": batch["x"] * torch.bernoulli(torch.full_like(batch["x"], 0.8))}


def init_by_number(worker):
    random.seed(100 + worker)


def prepared(draws=False, **options):
    return ordered_loader(Rows(draws), "train", 2, shuffle=True, seed=1, drop_last=False, **options)


def grouped(**options):
    lengths = np.array([1 + (7 * row) % 5 for row in range(NUM_ROWS)])
    return prepared(draws=True, lengths=lengths, **options)


def budgeted(**options):
    return grouped(max_tokens=7, **options)


def arrow_stream(**options):
    rows = [{"x": x.tolist(), "id": i} for i, x in enumerate(Rows().x)]
    stream = ArrowDataset.from_list(rows).to_iterable_dataset(num_shards=4)
    stream = stream.map(lambda row: {"x": [value + 1 for value in row["x"]], "id": row["id"]})
    return DataLoader(stream.with_format("torch"), 2, **options)


def built(dataset=None, **options):
    return DataLoader(dataset or Rows(), **{"batch_size": 2, "shuffle": True, **options})


class Unsized:
    """An iterable of batches that has no length."""

    def __iter__(self):
        return iter(list(DataLoader(Rows(), 2)))


PLAIN = {
    "prepared": prepared,
    "prepared, draws": lambda: prepared(draws=True),
    "prepared, grouped by length": grouped,
    "prepared, by a budget of tokens": budgeted,
    "grouped": lambda: DataLoader(Rows(draws=True), batch_sampler=GroupedBatches()),
    "built": built,
    "built, draws": lambda: built(Rows(draws=True)),
    "built, own generator": lambda: built(generator=torch.Generator().manual_seed(9)),
    "built, random.Random sampler": lambda: built(
        sampler=OwnSampler(random.Random(2)), shuffle=None
    ),
    "built, NumPy sampler": lambda: built(
        sampler=OwnSampler(np.random.default_rng(2)), shuffle=None
    ),
    "built, with replacement": lambda: built(
        sampler=RandomSampler(range(NUM_ROWS), replacement=True), shuffle=None
    ),
    "built, dataset's generator": lambda: built(OwnGenerator()),
    "built, noisy collate_fn": lambda: built(collate_fn=noisy_collate),
    "stream": lambda: DataLoader(Stream(draws=True), 2),
    "arrow stream": arrow_stream,
    "stateful loader": StatefulLoader,
    "stateful loader, with a length": SizedStatefulLoader,
    "list": lambda: list(DataLoader(Rows(), 2)),
    "unsized": Unsized,
    "stream without a state": lambda: DataLoader(StatelessStream(), 2),
}

WORKERS = {
    f"{name}, {num_workers} workers{', persistent' if persistent else ''}": (
        lambda make=make, w=num_workers, p=persistent: make(num_workers=w, persistent_workers=p)
    )
    for name, make in {
        "prepared, draws": lambda **options: prepared(draws=True, **options),
        "prepared, grouped by length": grouped,
        "prepared, by a budget of tokens": budgeted,
        "grouped": lambda **options: DataLoader(
            Rows(draws=True), batch_sampler=GroupedBatches(), **options
        ),
        "built, draws": lambda **options: built(Rows(draws=True), **options),
        "built, by worker": lambda **options: built(ByWorker(), **options),
        "built, init_fn": lambda **options: built(
            Rows(draws=True), worker_init_fn=init_by_number, **options
        ),
        "built, dataset's generator": lambda **options: built(OwnGenerator(), **options),
        "built, noisy collate_fn": lambda **options: built(collate_fn=noisy_collate, **options),
        "stream": lambda **options: DataLoader(Stream(draws=True), 2, **options),
        "arrow stream": arrow_stream,
    }.items()
    for num_workers in (1, 2, 3)
    for persistent in (False, True)
}
