"""The rows that each kind of loader gives to each of two ranks, also after a resume.

distributed_loaders.py FOLDER CUTS
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset as ArrowDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from manualloop import (
    DataError,
    SingleDevice,
    TrainState,
    evaluate_loop,
    load_checkpoint,
    prepare_dataloaders,
    prepare_scheduler,
    prepare_strategy,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.batches import is_spare
from manualloop.data.sampler import ordered_loader
from manualloop.reading.reader import Reader
from manualloop.reading.sources import source_of

NUM_ROWS, BATCH_SIZE = 23, 2  # 12 batches: 6 rounds, the last batch of one row


class Rows(Dataset):
    def __init__(self, num_rows=NUM_ROWS):
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, row):
        return {"x": torch.full((3,), row / 10), "id": torch.tensor(row)}


class Stream(IterableDataset):
    def __init__(self, num_rows=NUM_ROWS):
        self.num_rows, self.start = num_rows, 0

    def __iter__(self):
        rows = Rows(self.num_rows)
        while self.start < self.num_rows:
            self.start += 1
            yield rows[self.start - 1]
        self.start = 0

    def state_dict(self):
        return {"start": self.start}

    def load_state_dict(self, state):
        self.start = state["start"]


class Plain(IterableDataset):
    def __iter__(self):
        rows = Rows()
        return (rows[row] for row in range(NUM_ROWS))


def prepared(num_rows=NUM_ROWS, **options):
    return ordered_loader(
        Rows(num_rows), "train", BATCH_SIZE, shuffle=True, seed=1, drop_last=False, **options
    )


def batches_of_a_list():
    return list(DataLoader(Rows(), BATCH_SIZE))


TWO = {"num_workers": 2}
KEPT = {"num_workers": 2, "persistent_workers": True}
LOADERS = {
    "prepared": prepared,
    "prepared, 21 rows": lambda: prepared(21),  # the last round has one batch
    "prepared, grouped": lambda: prepared(21, lengths=np.arange(21) % 7 + 1),
    "prepared, by a budget": lambda: prepared(21, lengths=np.arange(21) % 7 + 1, max_tokens=9),
    "prepared, 2 workers": lambda: prepared(21, **TWO),
    "prepared, kept workers": lambda: prepared(21, **KEPT),
    "built": lambda: DataLoader(Rows(), BATCH_SIZE, shuffle=True),
    "built, 21 rows": lambda: DataLoader(Rows(21), BATCH_SIZE, shuffle=True),
    "built, kept workers": lambda: DataLoader(Rows(21), BATCH_SIZE, shuffle=True, **KEPT),
    "stream": lambda: DataLoader(Stream(), BATCH_SIZE),
    "stream, 21 rows": lambda: DataLoader(Stream(21), BATCH_SIZE),
    "plain stream": lambda: DataLoader(Plain(), BATCH_SIZE),
    "list": batches_of_a_list,
}


def make_state():
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    return TrainState(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(state, loader, strategy, max_steps=None, at=None, folder=None):
    """Train two epochs, save after step ``at``; return ids by step and rank, and losses."""
    own, steps = [], []

    def loss_fn(model, batch):
        own.append([] if is_spare(batch) else batch["id"].tolist())
        return model(batch["x"]).square().mean()

    for step in train_steps(
        state,
        loader,
        max_steps=max_steps or 8,
        gradient_accumulation_steps=2,
        loss_fn=loss_fn,
        strategy=strategy,
    ):
        steps.append((step.index, strategy.gather(list(own)), float(step.loss), step.num_items))
        own.clear()
        if step.index == at:
            save_checkpoint(folder, state, strategy=strategy)
    return steps


def order_of(loader):
    """The batches of a pass, as one process reads them."""
    return [batch["id"].tolist() for batch in loader]


# After which updates a run is resumed; there are three an epoch. Workers take long to start.
CUTS, CUTS_WITH_WORKERS = [1, 4], [4]


def check(name, folder, strategy):
    make = LOADERS[name]
    state = make_state_seeded(strategy)
    steps = train(state, make(), strategy)
    rows_seen = []
    for _, (zero, one), _, num_items in steps:
        assert len(zero) == len(one), "as many batches on every rank"
        batches = [batch for pair in zip(zero, one, strict=True) for batch in pair]
        assert sum(map(len, batches)) == num_items
        rows_seen += [row for batch in batches for row in batch]
    per_epoch = max(rows_seen) + 1
    for epoch in range(2):
        rows = rows_seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(rows) == list(range(per_epoch)), (name, epoch, rows)
        if name.startswith("prepared"):
            sampler = make().batch_sampler
            sampler.num_ranks = strategy.world_size
            expected = sampler.rows(epoch)
            assert rows == expected, (name, epoch)
        elif not name.startswith("built"):
            assert rows == list(range(per_epoch)), (name, epoch)
    expected_end = torch.cat([p.detach().flatten() for p in state.model.parameters()]).clone()
    drawn = torch.rand(())

    for at in CUTS_WITH_WORKERS if "workers" in name else CUTS:
        place = folder / f"{name}-{at}".replace(" ", "-")
        train(make_state_seeded(strategy), make(), strategy, max_steps=at, at=at, folder=place)
        torch.manual_seed(99)
        again, loader = make_state(), make()
        load_checkpoint(place, again, strategy=strategy)
        left = train(again, loader, strategy)
        assert left == steps[at:], (name, at, left[0], steps[at])
        end = torch.cat([p.detach().flatten() for p in again.model.parameters()])
        assert torch.equal(end, expected_end), (name, at)
        assert torch.equal(torch.rand(()), drawn), (name, at)
        if strategy.is_main and name.startswith(("prepared", "stream", "list", "plain")):
            check_alone(make, place, at, steps, per_epoch, strategy)


def make_state_seeded(strategy):
    state = make_state()
    torch.manual_seed(7 + strategy.rank)  # so that a rank's own draws would be other ones
    return state


def check_alone(make, place, at, steps, per_epoch, strategy):
    """One process resumes at the same row, and reads each row of the epoch once."""
    used = [row for _, of_ranks, _, _ in steps[:at] for row in interleave(of_ranks)]
    alone = make_state()
    load_checkpoint(place, alone, strategy=SingleDevice("cpu"))
    left = train(alone, make(), SingleDevice("cpu"), max_steps=at + 8)
    rows = [row for _, of_ranks, _, _ in left for row in interleave(of_ranks)]
    in_epoch = used[len(used) // per_epoch * per_epoch :]
    rest = rows[: per_epoch - len(in_epoch)]
    assert sorted(in_epoch + rest) == list(range(per_epoch)), (place, in_epoch, rest)


def interleave(of_ranks):
    return [row for batches in zip(*of_ranks, strict=True) for batch in batches for row in batch]


def check_more_ranks(folder, strategy):
    """Two ranks resume the run of one process at the same row."""
    alone = make_state()
    place = folder / "one-to-two"
    if strategy.is_main:
        steps = train(alone, prepared(), SingleDevice("cpu"), max_steps=3, at=3, folder=place)
        used = [row for _, of_ranks, _, _ in steps for row in interleave(of_ranks)]
    used = strategy.gather(used if strategy.is_main else None)[0]
    state = make_state()
    load_checkpoint(place, state, strategy=strategy)
    left = train(state, prepared(), strategy, max_steps=9)
    rows = [row for _, of_ranks, _, _ in left for row in interleave(of_ranks)]
    assert used + rows[: NUM_ROWS - len(used)] == prepared().batch_sampler.rows(0)


def check_distributed_by_others(folder, strategy):
    """A loader with a DistributedSampler is not distributed again."""
    sampler = DistributedSampler(Rows(24), strategy.world_size, strategy.rank, shuffle=True, seed=1)
    loader = DataLoader(Rows(24), BATCH_SIZE, sampler=sampler)
    state = make_state()
    steps = train(state, loader, strategy, max_steps=3)
    rows = [row for _, of_ranks, _, _ in steps for row in interleave(of_ranks)]
    assert sorted(rows) == list(range(24))
    assert state.progress.epoch == 1


def check_split_before(folder, strategy):
    """Rows that were split by rank are refused; a sampler's shards are evaluated once."""
    rank, every = strategy.rank, Rows(20)
    arrow = ArrowDataset.from_dict({"x": [[row / 10] * 3 for row in range(20)]})
    split = split_dataset_by_node(arrow.with_format("torch"), rank, 2)
    loaders = [
        DataLoader(split, BATCH_SIZE),
        ordered_loader(split, "train", 2, shuffle=True, seed=1, drop_last=False),
        DataLoader(Subset(every, range(rank * 10, rank * 10 + 10)), BATCH_SIZE),
        DataLoader([every[row] for row in range(rank, 20, 2)], BATCH_SIZE),
        list(DataLoader(Subset(every, range(rank, 20, 2)), BATCH_SIZE)),
        DataLoader(Rows(20 + rank), BATCH_SIZE),
    ]

    used = []

    def loss_fn(model, batch):
        used.extend(batch["id"].tolist() if "id" in batch else [])
        return model(batch["x"]).square().mean()

    for loader in loaders:
        state = make_state()
        before = [parameter.detach().clone() for parameter in state.model.parameters()]
        with pytest.raises(DataError, match="split by rank before"):
            next(train_steps(state, loader, max_steps=1, loss_fn=loss_fn, strategy=strategy))
        assert all(map(torch.equal, before, state.model.parameters()))
        with pytest.raises(DataError, match="split by rank before"):
            evaluate_loop(make_state().model, loader, strategy=strategy, loss_fn=loss_fn)
    for shuffle in (False, True):
        used.clear()
        sampler = DistributedSampler(Rows(), 2, rank, shuffle=shuffle)
        loader = DataLoader(Rows(), BATCH_SIZE, sampler=sampler)
        evaluate_loop(make_state().model, loader, strategy=strategy, loss_fn=loss_fn)
        rows = [row for of_rank in strategy.gather(list(used)) for row in of_rank]
        assert sorted(rows) == list(range(NUM_ROWS))


def check_ready_accelerator(folder, strategy):
    """Objects prepared by accelerate are used as they are; a schedule steps once an update."""
    accelerator = Accelerator(cpu=True)
    state = make_state()
    schedule = prepare_scheduler(state.optimizer, "linear", num_training_steps=6)
    loader, eval_loader = DataLoader(Rows(24), BATCH_SIZE, shuffle=True), DataLoader(Rows(9), 2)
    model, optimizer, loader, eval_loader, schedule = accelerator.prepare(
        state.model, state.optimizer, loader, eval_loader, schedule
    )
    own, rates = [], []

    def loss_fn(model, batch):
        own.append(batch["id"].tolist())
        return model(batch["x"]).square().mean()

    def evaluate():
        return evaluate_loop(model, eval_loader, strategy=accelerator, loss_fn=loss_fn)

    result = train_loop(
        model,
        loader,
        optimizer,
        schedule,
        num_epochs=1,
        loss_fn=loss_fn,
        strategy=accelerator,
        on_step=lambda step: rates.append(step.lr),
        progress_bar=False,
    )
    assert result.state.model is model
    assert result.state.optimizer is optimizer
    strategy = prepare_strategy(accelerator)
    rows = [row for of_rank in strategy.gather(list(own)) for batch in of_rank for row in batch]
    assert sorted(rows) == list(range(24))
    expected = [1e-2 * (1 - step / 6) for step in range(6)]
    assert torch.allclose(torch.tensor(rates), torch.tensor(expected)), rates
    own.clear()
    evaluate()
    rows = [row for of_rank in strategy.gather(list(own)) for batch in of_rank for row in batch]
    assert sorted(rows) == list(range(9))


def check_neighbours(folder, strategy):
    """Batches that the ranks read at the same time are about as long."""
    lengths = np.arange(480) % 12 + 1
    loader = prepared(480, lengths=lengths)
    state = make_state()
    steps = train(state, loader, strategy, max_steps=1)
    assert len(steps) == 1
    assert loader.batch_sampler.num_ranks == strategy.world_size
    widths = [lengths[batch].max() for batch in loader.batch_sampler.batches(1)]
    pairs = np.array(widths).reshape(-1, 2)
    assert np.abs(pairs[:, 0] - pairs[:, 1]).max() <= 2, pairs


def check_wrong_length(folder, strategy):
    """A loader with fewer batches than its length is refused in its own numbers, not in rounds."""

    class TooShort(list):
        def __len__(self):
            return super().__len__() + 4

    batches = TooShort({"x": torch.ones(2, 3)} for _ in range(5))
    with pytest.raises(DataError, match=r"gave 5 batches, but its len\(\) is 9"):
        list(Reader(source_of(batches), strategy=strategy).windows(1))


class SplitsItself(IterableDataset):
    """A stream that asks for its rank: nothing tells so but its rows."""

    def __init__(self, splits):
        self.splits = splits

    def __iter__(self):
        start, step = (torch.distributed.get_rank(), 2) if self.splits else (0, 1)
        return (Rows()[row] for row in range(start, NUM_ROWS, step))


def check_splits_itself(folder, strategy):
    """Rows are left out, and that is reported; the test of the output looks for the line."""
    for splits in (False, True):
        print(f"splits itself: {splits}", flush=True)
        train(make_state(), DataLoader(SplitsItself(splits), BATCH_SIZE), strategy, max_steps=2)
    print("splits itself: no more", flush=True)


def noisy(row, generator):
    return {"x": torch.tensor(row["x"]) + torch.rand(3, generator=generator), "id": row["id"]}


def check_transformed(folder, strategy):
    """Rows are transformed as in one process, also where a batch is a spare, and kept columns come.

    The last round of an epoch has one batch, and the run is resumed inside an epoch.
    """
    table = ArrowDataset.from_dict(
        {"x": [[row / 10] * 3 for row in range(21)], "id": list(range(21))}
    ).add_column("name", [f"row {row}" for row in range(21)])

    def loader(batch_size=BATCH_SIZE):
        options = {"transform": noisy, "keep": "name", "batch_size": batch_size}
        return prepare_dataloaders(table, seed=1, **options)["train"]

    def read(batches):
        return {
            name: (number, x)
            for batch in batches
            for name, number, x in zip(
                batch["name"], batch["id"].tolist(), batch["x"].tolist(), strict=True
            )
        }

    expected = []
    for epoch in range(2):
        alone = loader(batch_size=7)
        alone.batch_sampler.set_epoch(epoch)
        expected.append(read(alone))
    own = []

    def loss_fn(model, batch):
        own.append(batch)
        return model(batch["x"]).square().mean()

    def run(state, max_steps):
        options = {"max_steps": max_steps, "loss_fn": loss_fn, "strategy": strategy}
        for _ in train_steps(state, loader(), **options):
            pass

    state, place = make_state(), folder / "transformed"
    run(state, 4)
    save_checkpoint(place, state, strategy=strategy)
    again = make_state()
    load_checkpoint(place, again, strategy=strategy)
    run(again, 12)
    for epoch in range(2):  # of 6 rounds
        of_ranks = strategy.gather(read(own[6 * epoch : 6 * epoch + 6]))
        assert of_ranks[0] | of_ranks[1] == expected[epoch], epoch
        assert all(rows.items() <= expected[epoch].items() for rows in of_ranks)
    own.clear()
    evaluate_loop(make_state().model, loader(), strategy=strategy, loss_fn=loss_fn)
    of_ranks = strategy.gather(read(own))
    assert of_ranks[0] | of_ranks[1] == expected[0]


SCENARIOS = {
    **{name: partial(check, name) for name in LOADERS},
    "two ranks after one": check_more_ranks,
    "distributed by the user": check_distributed_by_others,
    "split by rank before": check_split_before,
    "splits itself": check_splits_itself,
    "prepared by accelerate": check_ready_accelerator,
    "neighbours of one length": check_neighbours,
    "wrong length": check_wrong_length,
    "transformed": check_transformed,
}


def main(folder):
    strategy = prepare_strategy()
    assert strategy.world_size == 2
    for name in SCENARIOS:
        SCENARIOS[name](folder, strategy)
        print(f"passed: {name}", flush=True)


if __name__ == "__main__":
    CUTS = CUTS_WITH_WORKERS = [int(at) for at in sys.argv[2].split(",")]
    main(Path(sys.argv[1]))
