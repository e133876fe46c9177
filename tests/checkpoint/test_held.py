"""What functions, schedules and the loader of a run change, and no checkpoint has, is logged."""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import random
from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)

from manualloop import TrainState, load_checkpoint, save_checkpoint, train_loop, train_steps


class Rows(Dataset):
    def __init__(self):
        self.stage, self.epoch, self._cache, self.x = 1, 0, 0, torch.ones(8, 2)

    def __len__(self):
        return 8

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, row):
        self._cache += 1
        return {"x": self.x[row] * self.stage}


class Stateful(Rows):
    def state_dict(self):
        return {"stage": self.stage}

    def load_state_dict(self, state):
        self.stage = state["stage"]


class Collator:
    share = 0.0

    def __call__(self, rows):
        return default_collate(rows)


class Passes(Sampler):
    def __init__(self):
        self.num_passes = 0

    def __len__(self):
        return 8

    def __iter__(self):
        self.num_passes += 1
        return iter(range(8))


class Centred(nn.Module):
    """A loss with a running mean, a count, and a teacher."""

    def __init__(self, changed=None):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.count, self.changed = 0, changed
        self.teacher = nn.Linear(2, 1).requires_grad_(False)

    def forward(self, model, batch):
        loss = (model(batch["x"]) - self.teacher(batch["x"])).square().mean()
        if self.changed == "mean":
            self.mean += loss.detach()
        elif self.changed == "count":
            self.count += 1
        elif self.changed == "teacher":
            for own, weight in zip(self.teacher.parameters(), model.parameters(), strict=True):
                own.data.mul_(0.9).add_(weight.data, alpha=0.1)
        return loss


class Batches:
    """A loader that is its own iterator."""

    def __iter__(self):
        self.place = 0
        return self

    def __next__(self):
        self.place += 1
        if self.place > 3:
            raise StopIteration
        return {"x": torch.ones(2, 2)}


def square(model, batch):
    return model(batch["x"]).square().mean()


def train(
    folder,
    loader,
    change=lambda step: None,
    loss_fn=square,
    make=None,
    model=None,
    **extras,
):
    model = nn.Linear(2, 1) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = TrainState(model, optimizer, make and make(optimizer), extras=extras)
    for step in train_steps(state, loader, max_steps=6, loss_fn=loss_fn):
        change(step)
        save_checkpoint(folder, state)


def told(caplog):
    lines = [record.getMessage() for record in caplog.records]
    start = "not in the checkpoint, though it changes during the run: "
    return [line.removeprefix(start).partition(". A res")[0] for line in lines if start in line]


def test_a_run_that_changes_nothing_else_logs_nothing(caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    model = nn.Linear(2, 1)
    train(tmp_path / "plain", DataLoader(Rows(), 4, shuffle=True), loss_fn=Centred())
    train(tmp_path / "saved", DataLoader(Rows(), 4), loss_fn=(loss := Centred("mean")), loss=loss)
    batches = Batches()
    batches.place = 0
    train(tmp_path / "iterator", batches)
    train(tmp_path / "own", DataLoader(Rows(), 4, collate_fn=Collator()), average=model)
    assert told(caplog) == []


def test_an_average_that_an_extra_holds_is_in_the_checkpoint(caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    loss_fn = Centred("teacher")

    class Average:
        shadow = None

        def __init__(self):
            self.shadow = loss_fn.teacher

        def state_dict(self):
            return self.shadow.state_dict()

        def load_state_dict(self, state):
            self.shadow.load_state_dict(state)

    teacher = loss_fn.teacher

    def distil(model, batch):
        loss = (model(batch["x"]) - teacher(batch["x"])).square().mean()
        teacher.weight.data.mul_(0.9)
        return loss

    train(tmp_path, DataLoader(Rows(), 4), loss_fn=distil, average=Average())
    assert told(caplog) == []


def harder(loader):
    loader.dataset.stage += 1


def other_rows(loader):
    loader.dataset.x.mul_(2)


def masked(loader):
    loader.collate_fn.share = 0.5


def weighted(loader):
    loader.sampler.weights[0] += 1


CHANGES = {
    "train_dataloader.dataset.stage": (harder, {}),
    "train_dataloader.dataset.x": (other_rows, {}),
    "train_dataloader.collate_fn.share": (masked, {"collate_fn": Collator()}),
    "train_dataloader.sampler.weights": (
        weighted,
        {"sampler": WeightedRandomSampler(torch.ones(8), 8)},
    ),
}


@pytest.mark.parametrize("path", CHANGES)
def test_what_the_loop_changes_in_its_loader(path, caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    change, options = CHANGES[path]
    options = copy.deepcopy(options)
    if "collate_fn" in options:
        options["collate_fn"].share = 0.0
    loader = DataLoader(Rows(), 4, **options)
    train(tmp_path, loader, lambda step: change(loader) if step.ends_epoch else None)
    assert told(caplog) == [path]


def test_a_sampler_that_counts_its_passes(caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    train(tmp_path, DataLoader(Rows(), 4, sampler=Passes()))
    assert told(caplog) == ["train_dataloader.sampler.num_passes"]


def test_a_dataset_with_a_state_of_its_own_is_left_to_it(caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    loader = DataLoader(Stateful(), 4)
    train(tmp_path, loader, lambda step: harder(loader), dataset=loader.dataset)
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("changed", "path"),
    {"mean": "loss_fn.mean", "count": "loss_fn.count", "teacher": "the weights of loss_fn"}.items(),
)
def test_a_loss_that_is_a_module(changed, path, caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    train(tmp_path, DataLoader(Rows(), 4), loss_fn=Centred(changed))
    assert told(caplog) == [path]


class Ordered(Sampler):
    """Has its rows in a list, from which ``change`` makes the order of a pass."""

    def __init__(self, change, rows):
        self._change, self._rows = change, rows

    def __len__(self):
        return 8

    def __iter__(self):
        self._rows = self._change(self._rows)
        rows = self._rows
        return chain.from_iterable(rows) if isinstance(rows[0], list) else iter(rows)


def in_place(rows):
    random.shuffle(rows)
    return rows


def each_in_place(rows):
    list(map(random.shuffle, rows))
    return rows


def array_in_place(rows):
    np.random.shuffle(rows)
    return rows


def anew(rows):
    return random.sample(range(8), 8)


def counting(rows):
    rows[0] = (rows[0] + 1) % 8
    return rows


@pytest.mark.parametrize(
    ("change", "rows", "names"),
    [
        (in_place, [*range(8)], [""]),
        (array_in_place, np.arange(8), [""]),
        (each_in_place, [[0, 1, 2, 3], [4, 5, 6, 7]], ["[0]", "[1]"]),
        (anew, [*range(8)], []),
        (counting, [*range(8)], []),
    ],
)
def test_a_list_that_is_shuffled_in_place(change, rows, names, caplog, tmp_path):
    """The order of a pass is that of the passes before, which a resumed run has not made."""
    caplog.set_level(logging.INFO, "manualloop")
    random.seed(3)
    np.random.seed(3)
    train(tmp_path, DataLoader(Rows(), 4, sampler=Ordered(change, rows)))
    path = "the order of train_dataloader.sampler._rows"
    assert told(caplog) == ([", ".join(path + name for name in names)] if names else [])
    assert ("Shuffle a copy in each pass" in caplog.text) == bool(names)


class Critic(nn.Linear):
    """Has a stage that the loop raises, and counts in a buffer that its ``state_dict`` lacks."""

    def __init__(self):
        super().__init__(2, 1)
        self.stage = 0.0
        self.register_buffer("seen", torch.zeros(()), persistent=False)


class SavesStage(Critic):
    """Saves the stage."""

    def get_extra_state(self):
        return {"stage": self.stage}

    def set_extra_state(self, state):
        self.stage = state["stage"]


@pytest.mark.parametrize(
    ("kind", "changed", "expected"),
    [
        (Critic, "stage", ["extras.critic.0.stage"]),
        (Critic, "seen", ["extras.critic.0.seen"]),
        (Critic, "bias", []),
        (SavesStage, "stage", []),
    ],
)
def test_a_module_among_the_extras(kind, changed, expected, caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    critic = nn.Sequential(kind())

    def change(step):
        with torch.no_grad():
            value = getattr(critic[0], changed)
            value += 1.0  # a tensor in place
        setattr(critic[0], changed, value)

    train(tmp_path, DataLoader(Rows(), 4), change, critic=critic)
    assert told(caplog) == expected


SCALE = {"factor": 1.0}


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("kind", [schedules.LambdaLR, schedules.MultiplicativeLR])
def test_a_variable_that_a_schedule_reads(kind, is_global, caplog, tmp_path, monkeypatch):
    caplog.set_level(logging.INFO, "manualloop")
    monkeypatch.setitem(SCALE, "factor", 1.0)
    scale = {"factor": 1.0}
    function = (lambda _: SCALE["factor"]) if is_global else (lambda _: scale["factor"])

    def change(step):
        SCALE["factor"] = scale["factor"] = 0.5 if step.index > 2 else 1.0

    train(tmp_path, DataLoader(Rows(), 4), change, make=lambda optimizer: kind(optimizer, function))
    name = "SCALE" if is_global else "scale"
    assert told(caplog) == [f"{name} of a function of the {kind.__name__}"]


def test_what_changes_later_is_logged_when_it_does(caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    loader = DataLoader(Rows(), 4)

    def change(step):
        if step.index == 4:
            harder(loader)

    train(tmp_path, loader, change, loss_fn=Centred("count"))
    assert told(caplog) == ["loss_fn.count", "train_dataloader.dataset.stage"]


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("of_model", [True, False])
def test_hooks_that_count_and_hooks_that_collect(of_model, counts, caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    number, seen = 0, {}

    def count(*call):
        nonlocal number
        number += 1

    def collect(*call):
        seen[len(seen)] = call

    hook = count if counts else collect
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _ = model.register_forward_hook(hook) if of_model else optimizer.register_step_pre_hook(hook)
    state = TrainState(model, optimizer)
    for _ in train_steps(state, DataLoader(Rows(), 4), max_steps=2, loss_fn=square):
        save_checkpoint(tmp_path, state)
    wanted = f"number of a hook of the {'Linear' if of_model else 'SGD'}"
    assert told(caplog) == ([wanted] if counts else [])


def test_a_generator_of_a_hook_that_has_another_number_is_told(caplog, tmp_path):
    """Handles are counted over the whole process."""
    caplog.set_level(logging.INFO, "manualloop")

    def build():
        model, generator = nn.Sequential(nn.Linear(2, 1)), torch.Generator().manual_seed(3)
        model[0].register_forward_hook(
            lambda module, given, out: out + torch.randn(out.shape, generator=generator)
        )
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.01))

    first, second = build(), build()
    loader = DataLoader(Rows(), 4)
    for _ in train_steps(first, loader, max_steps=1, loss_fn=square):
        save_checkpoint(tmp_path, first)
    load_checkpoint(tmp_path, second)
    list(train_steps(second, loader, max_steps=2, loss_fn=square))
    lines = [record.getMessage() for record in caplog.records]
    assert any(".generator was not restored: " in line for line in lines)


def batches(number=30):
    return DataLoader(torch.arange(4.0 * number), 4)


def generator():
    while True:
        yield from batches()


ITERATORS = {
    "of a loader": lambda: iter(batches()),
    "that begins again": lambda: itertools.cycle(batches()),
    "of a generator": generator,
    "that counts": itertools.count,
    "of a list": lambda: iter(list(batches())),
}


@pytest.mark.parametrize("make", ITERATORS.values(), ids=ITERATORS)
def test_an_iterator_that_a_loss_reads(make, caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    more = make()

    def loss_fn(model, batch):
        next(more)
        return square(model, batch)

    train(tmp_path, DataLoader(Rows(), 4), loss_fn=loss_fn)
    assert told(caplog) == ["the place in loss_fn.__closure__.more"]


def test_iterators_in_a_list_and_one_that_a_loss_makes_anew(caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")

    class Unlabelled:
        def __init__(self):
            self.loader, self.rows, self.several = batches(2), None, [iter(batches()), 0]

        def __call__(self, model, batch):
            next(self.several[0])
            self.rows = self.rows or iter(self.loader)
            if next(self.rows, None) is None:
                self.rows = None
            return square(model, batch)

    train(tmp_path, DataLoader(Rows(), 4), loss_fn=Unlabelled())
    assert set(told(caplog)[0].split(", ")) == {
        "the place in loss_fn.several[0]",
        "the place in loss_fn.rows",
    }


@pytest.mark.parametrize("make", ITERATORS.values(), ids=ITERATORS)
def test_an_iterator_that_nobody_reads_is_not_told_where_that_can_be_known(make, caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    more = make()

    def loss_fn(model, batch):
        assert more is not None
        return square(model, batch)

    train(tmp_path, DataLoader(Rows(), 4), loss_fn=loss_fn)
    nothing_tells = make is ITERATORS["that begins again"]
    assert told(caplog) == (["the place in loss_fn.__closure__.more"] if nothing_tells else [])


class Plain:
    scale = 1.0


HOLDERS = {
    "an object": (lambda: Plain(), "loss_fn.__closure__.config.scale"),
    "a class": (
        lambda: type("Config", (Plain,), {"scale": 1.0}),
        "loss_fn.__closure__.config.scale",
    ),
    "a namespace": (lambda: SimpleNamespace(scale=1.0), "loss_fn.__closure__.config.scale"),
    "arguments": (lambda: argparse.Namespace(scale=1.0), "loss_fn.__closure__.config.scale"),
    "a dict": (lambda: {"scale": 1.0}, "config['scale'] of loss_fn"),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_setting_that_on_step_changes_and_a_loss_reads(name, caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    make, path = HOLDERS[name]
    config, loader = make(), DataLoader(Subset(Rows(), range(8)), 4)
    if name == "an object":
        config.scale = 1.0
    rows = loader.dataset.dataset

    def scale():
        return config["scale"] if isinstance(config, dict) else config.scale

    def loss_fn(model, batch):
        used = config["scale"] if name == "a dict" else config.scale
        return square(model, batch) * used

    def on_step(step):
        rows.stage += 1
        if isinstance(config, dict):
            config["scale"] = 0.5 * scale()
        else:
            config.scale = 0.5 * scale()

    model = nn.Linear(2, 1)
    train_loop(
        model, loader, loss_fn=loss_fn, on_step=on_step, num_epochs=1, checkpoint_dir=tmp_path
    )
    assert told(caplog) == [f"{path}, train_dataloader.dataset.dataset.stage"]


def test_a_setting_that_functions_read_which_call_each_other(caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    config = {"scale": 1.0}

    def loss_fn(model, batch, depth=0):
        return again(model, batch) if depth == 0 else square(model, batch) * config["scale"]

    def again(model, batch):
        return loss_fn(model, batch, depth=1)

    def on_step(step):
        config.update(scale=0.5)

    model, loader = nn.Linear(2, 1), DataLoader(Subset(Rows(), range(8)), 4)
    train_loop(
        model, loader, loss_fn=loss_fn, on_step=on_step, num_epochs=1, checkpoint_dir=tmp_path
    )
    assert told(caplog) == ["config['scale'] of loss_fn"]


def test_what_a_loss_writes_into_a_dict_is_a_record(caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    record, weights, more = {"calls": 0, "loss": 0.0}, {"loss": 1.0}, {"margin": 0.0}

    def loss_fn(model, batch, *, options):
        loss = square(model, batch) * weights["loss"] + options["margin"]
        record["calls"] += 1
        record["last"] = loss.item()
        return loss

    train(tmp_path, DataLoader(Rows(), 4), loss_fn=partial(loss_fn, options=more))
    assert told(caplog) == []
    train(
        tmp_path / "changed",
        DataLoader(Rows(), 4),
        lambda step: more.update(margin=step.loss.item()),
        loss_fn=partial(loss_fn, options=more),
    )
    assert told(caplog) == ["options['margin'] of loss_fn"]


SETTINGS = SimpleNamespace(scale=1.0)


class Scaled(nn.Linear):
    calls = 0

    def forward(self, x):
        Scaled.calls += 1
        return super().forward(x) * SETTINGS.scale


def test_what_the_forward_pass_of_a_module_reads(caplog, tmp_path, monkeypatch):
    caplog.set_level(logging.INFO, "manualloop")
    monkeypatch.setattr(SETTINGS, "scale", 1.0)
    monkeypatch.setattr(Scaled, "calls", 0)

    def change(step):
        SETTINGS.scale *= 0.9

    train(tmp_path, DataLoader(Rows(), 4), change, model=Scaled(2, 1))
    assert set(told(caplog)[0].split(", ")) == {
        "Scaled.forward.__globals__.SETTINGS.scale",
        "Scaled.forward.__closure__.__class__.calls",
    }


@pytest.mark.parametrize("fills", [False, True])
def test_an_array_that_a_loss_fills(fills, caplog, tmp_path):
    caplog.set_level(logging.INFO, "manualloop")
    bank = np.zeros(8)

    def loss_fn(model, batch):
        bank[0] += fills
        return square(model, batch)

    train(tmp_path, DataLoader(Rows(), 4), loss_fn=loss_fn)
    assert told(caplog) == (["loss_fn.__closure__.bank"] if fills else [])
