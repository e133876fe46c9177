"""What a run changes in a model comes back with a checkpoint, or is logged at the first save."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from helpers import tiny_bert, whole_and_resumed
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from manualloop import (
    CheckpointError,
    TrainState,
    load_checkpoint,
    save_checkpoint,
    train_loop,
    train_steps,
)
from manualloop.checkpoint.changes import restore_changes

BATCHES = [{"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(i))} for i in range(5)]


def bits(model):
    return [weight.detach().clone() for weight in model.state_dict().values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def train(folder, on_step, make, change=None, loss_fn=None, num_epochs=2, checkpoint_every=1):
    torch.manual_seed(0)
    model = make()

    def on_each(step):
        if change is not None:
            change(model, step)
        if on_step is not None:
            on_step(step)

    return train_loop(
        model,
        BATCHES,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        num_epochs=num_epochs,
        loss_fn=loss_fn or (lambda model, batch: model(batch["x"]).square().mean()),
        on_step=on_each,
        checkpoint_dir=folder,
        checkpoint_every=checkpoint_every,
        progress_bar=False,
    )


class Scaled(nn.Module):
    """Its output depends on something that each forward pass changes, kept where ``kind`` says."""

    of_class = 0

    def __init__(self, kind):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.kind, self.count = kind, 0
        if kind in ("in place", "replaced", "data"):
            self.register_buffer("passes", torch.zeros(()), persistent=False)
        self.tensor, self.items, self.table = torch.zeros(1), [], {}
        self.array, self.leaf = np.zeros(2), torch.zeros(1, requires_grad=True)
        self.made_later: float

    def forward(self, x):
        if self.kind == "in place":
            self.passes += 1
            seen = self.passes
        elif self.kind == "replaced":
            self.passes = self.passes + 1
            seen = self.passes
        elif self.kind == "data":
            self.passes.data.add_(1)
            seen = self.passes
        elif self.kind == "tensor":
            self.tensor += 1
            seen = self.tensor
        elif self.kind == "list of tensors":
            self.items = [*self.items, x.detach().abs().mean()][-3:]
            seen = sum(self.items)
        elif self.kind == "dict":
            self.table["n"] = self.table.get("n", 0) + 1
            seen = self.table["n"]
        elif self.kind == "array":
            self.array += 1
            seen = float(self.array[0])
        elif self.kind == "class":
            self.of_class += 1
            seen = self.of_class
        elif self.kind == "leaf":
            self.leaf.data.add_(1)
            seen = self.leaf.detach()
        elif self.kind == "later":
            self.made_later = getattr(self, "made_later", 0.0) + 0.1
            seen = self.made_later
        else:
            self.count += 1
            seen = self.count
        return self.linear(x) / (1 + seen)


KINDS = [
    *("in place", "replaced", "data", "tensor", "list of tensors", "dict", "later", "number"),
    *("array", "class", "leaf"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_inner", [False, True])
def test_what_forward_passes_change_comes_back(kind, is_inner, tmp_path):
    def make():
        scaled = Scaled(kind)
        return nn.Sequential(nn.Linear(3, 3), scaled) if is_inner else scaled

    def run(folder, on_step):
        return train(folder, on_step, make, checkpoint_every=6)

    whole, resumed = whole_and_resumed(run, tmp_path, dies_after=7)
    assert same(whole.state.model, resumed.state.model)


def layers():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    model[1].requires_grad_(False)
    return model


def thaw(model, step):
    if step.index == 4:
        model[1].requires_grad_(True)


def freeze_statistics(model, step):
    if step.index == 4:
        model[0].eval()


def raise_dropout(model, step):
    model[2].p = 0.05 * step.index


def freeze_again(model, step):
    model[1].requires_grad_(step.index < 3)


@pytest.mark.parametrize("change", [thaw, freeze_statistics, raise_dropout, freeze_again])
def test_what_the_script_changes_on_the_way_comes_back(change, tmp_path):
    def run(folder, on_step):
        return train(folder, on_step, layers, change)

    for dies_after in (2, 7):
        folder = tmp_path / str(dies_after)
        whole, resumed = whole_and_resumed(run, folder, dies_after=dies_after)
        assert same(whole.state.model, resumed.state.model)


def test_a_change_lasts_over_several_resumptions(tmp_path):
    def stop_after(last):
        def on_step(step):
            if step.index == last + 1:
                raise InterruptedError

        return on_step

    whole = train(tmp_path / "whole", lambda step: None, layers, thaw)
    for last in (4, 5, 8):
        with pytest.raises(InterruptedError):
            train(tmp_path / "parts", stop_after(last), layers, thaw)
    resumed = train(tmp_path / "parts", lambda step: None, layers, thaw)
    assert same(whole.state.model, resumed.state.model)


def test_a_script_that_was_changed_on_purpose_is_not_overruled(tmp_path):
    def other():
        model = layers()
        model[3].bias.requires_grad_(False)
        model[2].p = 0.25
        return model

    with pytest.raises(InterruptedError):
        train(tmp_path, lambda step: interrupt(step, 7), layers, thaw)
    before = {}
    result = train(tmp_path, lambda step: None, other, lambda model, step: before)
    model = result.state.model
    assert not model[3].bias.requires_grad  # changed in the script
    assert model[2].p == 0.25
    assert model[1].weight.requires_grad  # changed by the run


def interrupt(step, last):
    if step.index == last:
        raise InterruptedError


def test_an_evaluation_by_hand_that_leaves_eval_mode_thaws_nothing(tmp_path):
    torch.manual_seed(0)
    model = layers()

    def freeze(step):
        model[0].eval()

    def evaluate():
        model.eval()
        return {"score": 1.0}

    train_loop(
        model,
        BATCHES,
        torch.optim.SGD(model.parameters(), lr=0.1),
        num_epochs=2,
        loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
        evaluate=evaluate,
        evaluate_every=2,
        on_step=freeze,
        progress_bar=False,
    )
    assert model[0].num_batches_tracked == 1
    assert model.training


def test_a_forged_attribute_replaces_no_code():
    model = nn.Linear(1, 1)
    changes = {"attributes": {":forward": 1, ":_modules": {}, ":weight": 3, ":tau": 0.5}}
    changes |= {"training": {"nowhere": False}, "buffers": {"passes": 3, "elsewhere": 1}}
    model.register_buffer("passes", torch.zeros(()), persistent=False)
    model.register_parameter("counts", nn.Parameter(torch.ones(1, dtype=int), requires_grad=False))
    restore_changes(model, changes | {"requires_grad": {"counts": True, "nothing": False}})
    assert model.passes == 0
    assert model(torch.ones(1, 1)).shape == (1, 1)
    assert model.tau == 0.5


def test_a_loop_of_ones_own_saves_them_too(tmp_path):
    def state():
        torch.manual_seed(0)
        model = Scaled("in place")
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def steps(state):
        loss_fn = lambda model, batch: model(batch["x"]).square().mean()  # noqa: E731
        return train_steps(state, BATCHES, num_epochs=2, loss_fn=loss_fn)

    whole = state()
    for step in steps(whole):
        if step.index == 3:
            save_checkpoint(tmp_path, whole)
    resumed = state()
    load_checkpoint(tmp_path, resumed)
    for _ in steps(resumed):
        pass
    assert same(whole.model, resumed.model)
    assert resumed.model.passes == 10


def test_a_bare_model_gets_weights_only(tmp_path):
    train(tmp_path, lambda step: None, layers, thaw)
    model = layers().eval()
    load_checkpoint(tmp_path, model)
    assert not model[1].weight.requires_grad
    assert not model.training


# What is not saved is logged ----------------------------------------------------------------------


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="manualloop")
    return lambda: [r.getMessage() for r in caplog.records if "not in the checkpoint" in r.message]


class Queue:
    """A state that is no plain data."""

    def __init__(self):
        self.length = 0


class Queued(Scaled):
    def forward(self, x):
        self.queue = Queue()
        return super().forward(x)


def test_an_object_of_the_model_that_changes_is_named(tmp_path, lines):
    train(tmp_path, lambda step: None, lambda: nn.Sequential(Queued("number")))
    (line,) = lines()
    assert "0.queue of the model" in line


class Schedule:
    """A state of the script's own, which is changed from within."""

    def __init__(self):
        self.parts = {"temperature": [1.0]}

    def step(self):
        self.parts["temperature"][0] *= 0.9


class Scheduled(Scaled):
    def __init__(self):
        super().__init__("number")
        self.schedule = Schedule()

    def forward(self, x):
        self.schedule.step()
        return super().forward(x) * self.schedule.parts["temperature"][0]


def test_an_object_of_the_model_that_changes_inside_is_named(tmp_path, lines):
    train(tmp_path, lambda step: None, Scheduled)
    (line,) = lines()
    assert "schedule of the model" in line


def counting_loss():
    count = 0

    def loss_fn(model, batch):
        nonlocal count
        count += 1
        return model(batch["x"]).square().mean() / count

    return loss_fn


class Bank:
    def __init__(self):
        self.queue = torch.zeros(3)

    def __call__(self, model, batch):
        self.queue.mul_(0.9).add_(batch["x"].mean(0))
        return (model(batch["x"]) - self.queue.sum()).square().mean()


@pytest.mark.parametrize(
    ("loss_fn", "name"), [(counting_loss(), "loss_fn.__closure__.count"), (Bank(), "loss_fn.queue")]
)
def test_what_a_loss_function_counts_is_named(loss_fn, name, tmp_path, lines):
    train(tmp_path, lambda step: None, lambda: nn.Linear(3, 1), loss_fn=loss_fn)
    (line,) = lines()
    assert name in line


class Noting:
    """Keeps what no update depends on: records, and outputs with their graph."""

    def __init__(self):
        self.losses = []

    def __call__(self, model, batch):
        model.last = model(batch["x"])
        self.losses.append(1.0)
        return model.last.square().mean()


def test_records_and_outputs_are_not_named(tmp_path, lines):
    train(tmp_path, lambda step: None, lambda: nn.Linear(3, 1), loss_fn=Noting())
    assert lines() == []
    (last,) = sorted(tmp_path.glob("step-*"))[-1:]
    assert json.loads((last / "state.json").read_text())["changes"] == {}


def test_a_recurrent_layer_and_a_batch_norm_change_nothing(tmp_path, lines):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.rnn = nn.BatchNorm1d(3), nn.GRU(3, 1, batch_first=True)

        def forward(self, x):
            return self.rnn(self.norm(x)[:, None])[0]

    train(tmp_path, lambda step: None, Recurrent)
    assert lines() == []
    (last,) = sorted(tmp_path.glob("step-*"))[-1:]
    assert json.loads((last / "state.json").read_text())["changes"] == {}


class Lookahead(torch.optim.SGD):
    """Keeps slow weights and a counter as attributes, which its ``state_dict`` leaves out."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.num_calls, self.every = 0, 3
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        super().step(closure)
        self.num_calls += 1


class Whole(Lookahead):
    """The same, saved."""

    def state_dict(self):
        return super().state_dict() | {"num_calls": self.num_calls}


@pytest.mark.parametrize(("kind", "is_told"), [(Lookahead, True), (Whole, False)])
def test_what_an_optimizer_keeps_beside_its_state_is_told(kind, is_told, tmp_path, caplog):
    model = torch.nn.Linear(2, 1)
    state = TrainState(model, kind(model.parameters(), 0.1))
    rows = [{"x": torch.ones(2, 2)}] * 4
    with caplog.at_level("INFO", logger="manualloop"):
        for step in train_steps(state, rows, loss_fn=lambda model, batch: model(batch["x"]).mean()):
            if step.index == 2:
                save_checkpoint(tmp_path, state)
                break
    told = "not in the checkpoint, though it changes during the run: optimizer.num_calls."
    assert (told in caplog.text) == is_told
    assert ("not in the checkpoint" in caplog.text) == is_told


@pytest.mark.parametrize("place", ["nowhere", "extras", "an object", "the state", "no schedule"])
def test_a_schedule_that_the_loop_steps_and_no_checkpoint_holds_is_told(place, tmp_path, caplog):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = None
    if place != "no schedule":
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)

    class Stages:
        def __init__(self):
            self.schedule = schedule

        def state_dict(self):
            return self.schedule.state_dict()

        def load_state_dict(self, state):
            self.schedule.load_state_dict(state)

    extras = {"extras": {"schedule": schedule}, "an object": {"stages": Stages()}}.get(place, {})
    state = TrainState(model, optimizer, schedule if place == "the state" else None, extras=extras)
    rows = [{"x": torch.ones(2, 2)}] * 4
    for step in train_steps(state, rows, loss_fn=lambda model, batch: model(batch["x"]).mean()):
        if schedule is None:
            optimizer.param_groups[0]["lr"] = 0.1 / step.index  # a function of the step
        elif place != "the state":
            schedule.step()
        save_checkpoint(tmp_path, state)
        if step.index == 3:
            break
    told = "the schedule that moves the learning rate of the optimizer. A resumed run begins with"
    assert caplog.text.count(told) == (place == "nowhere")
    assert ('extras={"schedule": schedule}.' in caplog.text) == (place == "nowhere")


def test_hooks_of_transformers_are_put_on_a_resumed_model_again(tmp_path):
    """A note that they are there, restored without them, would leave out the hidden states."""

    def loss_fn(model, batch):
        return model(**batch, output_hidden_states=True).hidden_states[-1].square().mean()

    def make():
        model = tiny_bert()
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))

    batches = [{"input_ids": torch.full((2, 3), number)} for number in (4, 5)]
    state = make()
    for _ in train_steps(state, batches, max_steps=1, loss_fn=loss_fn):
        save_checkpoint(tmp_path, state)
    resumed = make()
    load_checkpoint(tmp_path, resumed)
    assert len([*train_steps(resumed, batches, max_steps=2, loss_fn=loss_fn)]) == 1


def test_a_change_stays_in_later_checkpoints_of_a_model_that_has_it_already(tmp_path):
    """As in a notebook whose cell is run again, before its kernel is started anew."""

    def resume(model, up_to):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = TrainState(model, optimizer)
        if up_to > 3:
            load_checkpoint(tmp_path, state)
        for step in train_steps(
            state, BATCHES, max_steps=9, loss_fn=lambda model, batch: model(batch["x"]).mean()
        ):
            if step.index == 2:
                model.stage = 2.0
                model.passes.fill_(5)
                model.linear.eval()
            save_checkpoint(tmp_path, state)
            if step.index == up_to:
                break

    def build():
        model = Scaled("in place")
        model.stage = 1.0
        model.forward = lambda x: model.linear(x)
        return model

    first = build()
    resume(first, 3)
    resume(first, 4)
    last = build()
    resume(last, 5)
    assert (last.stage, last.passes.item(), last.linear.training) == (2.0, 5.0, False)


REBUILT = {
    "another group": (
        lambda model, optimizer: optimizer.add_param_group({"params": model[0].parameters()}),
        "groups of the optimizer: 2 -> 2 + 2 parameters",
    ),
    "another layer": (
        lambda model, optimizer: model.append(nn.Linear(1, 1)),
        "2.bias is new, 2.weight is new",
    ),
    "pruned": (
        lambda model, optimizer: l1_unstructured(model[1], "weight", 1),
        "1.weight_orig is new, 1.weight is gone",
    ),
    "nothing": (lambda model, optimizer: model[0].requires_grad_(True), None),
}


@pytest.mark.parametrize("name", REBUILT)
def test_a_run_that_changes_what_its_checkpoints_fit_tells_it_once(name, tmp_path, caplog):
    caplog.set_level("INFO", logger="manualloop")
    change, what = REBUILT[name]

    def train_until(last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1))
        optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)

        def on_step(step):
            if step.index == 2:
                change(model, optimizer)
            if step.index == last:
                raise KeyboardInterrupt

        train_loop(
            model,
            BATCHES,
            optimizer,
            None,  # a schedule of torch's takes no group that comes later
            num_epochs=1,
            loss_fn=lambda model, batch: model(batch["x"]).square().mean(),
            on_step=on_step,
            checkpoint_dir=tmp_path,
            checkpoint_every=1,
            progress_bar=False,
        )

    with pytest.raises(KeyboardInterrupt):
        train_until(5)
    told = [text for text in caplog.messages if "has changed what its checkpoints fit" in text]
    if what is None:
        assert not told
        train_until(None)
        return
    (line,) = told
    assert f"fit: {what}." in line
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train_until(None)
