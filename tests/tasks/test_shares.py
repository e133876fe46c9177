"""Micro-batches weigh by their items, wherever these come from, or equally if nothing tells."""

import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from manualloop import (
    DataError,
    ModelError,
    SingleDevice,
    TrainState,
    accumulate_gradients,
    apply_update,
    evaluate_loop,
    train_loop,
    train_steps,
)


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def data(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(sizes), 4, dtype=torch.float64, generator=generator)
    return [(part[:, :3], part[:, 3:]) for part in rows.split(sizes)]


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1, dtype=torch.float64)


def gradient(model):
    return nn.utils.parameters_to_vector([parameter.grad for parameter in model.parameters()])


KINDS = {
    "tuple": (lambda x, y: (x, y), lambda batch: batch),
    "list": (lambda x, y: [x, y], lambda batch: batch),
    "dataclass": (Pair, lambda batch: (batch.x, batch.y)),
    "namespace": (lambda x, y: SimpleNamespace(x=x, y=y), lambda batch: (batch.x, batch.y)),
    "nested": (
        lambda x, y: {"in": {"x": x}, "out": [{"y": row} for row in y]},
        lambda batch: (batch["in"]["x"], torch.stack([row["y"] for row in batch["out"]])),
    ),
    "rows": (
        lambda x, y: [{"x": a, "y": b, "name": "row"} for a, b in zip(x, y, strict=True)],
        lambda batch: tuple(torch.stack([row[name] for row in batch]) for name in "xy"),
    ),
    "texts": (
        lambda x, y: [f"{[*a.tolist(), *b.tolist()]}" for a, b in zip(x, y, strict=True)],
        lambda batch: torch.tensor([eval(text) for text in batch], dtype=torch.float64).split(
            [3, 1], dim=1
        ),
    ),
}


@pytest.mark.parametrize("counts", [False, True], ids=["rows", "counted by loss_fn"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind_make_the_update_of_one_batch(kind, counts):
    make, read = KINDS[kind]

    def loss_fn(model, batch):
        x, y = read(batch)
        loss = F.mse_loss(model(x), y)
        return (loss, len(x)) if counts else loss

    parts = data(4, 2, 3, 1)
    whole = linear()
    x, y = (torch.cat(columns) for columns in zip(*parts, strict=True))
    F.mse_loss(whole(x), y).backward()
    split = linear()
    update = accumulate_gradients(split, [make(x, y) for x, y in parts], loss_fn=loss_fn)
    torch.testing.assert_close(gradient(split), gradient(whole), rtol=1e-12, atol=1e-14)
    assert update.num_items == 10
    batches = [make(x, y) for x, y in parts]
    scored = evaluate_loop(whole, batches, loss_fn=loss_fn)["loss"]
    assert scored == pytest.approx(F.mse_loss(whole(x), y).item(), rel=1e-12)


def graph(num_nodes, num_edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        x=torch.randn(num_nodes, 3, dtype=torch.float64, generator=generator),
        edges=torch.zeros(2, num_edges, dtype=torch.int64),
    )


def graph_loss(model, batch):
    return model(batch.x).square().mean()


def test_what_nothing_counts_weighs_the_same_and_is_reported_once_a_run(caplog):
    graphs = [graph(n, 5 * n, n) for n in (4, 7, 3, 5, 6, 2)]
    with caplog.at_level("INFO", logger="manualloop"):
        for number in range(2):  # a second run in the process, too
            model = linear()
            state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for _ in train_steps(
                state, graphs, num_epochs=1, gradient_accumulation_steps=2, loss_fn=graph_loss
            ):
                pass
            told = [line for line in caplog.messages if "weigh the same" in line]
            assert len(told) == number + 1
    twin = linear()
    for first, second in zip(graphs[::2], graphs[1::2], strict=True):
        twin.zero_grad()
        ((graph_loss(twin, first) + graph_loss(twin, second)) / 2).backward()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-14)


def test_nothing_is_reported_where_it_does_not_matter(caplog):
    def counted(model, batch):
        return graph_loss(model, batch), len(batch.x)

    graphs = [graph(n, 5 * n, n) for n in (4, 7, 3)]
    with caplog.at_level("INFO", logger="manualloop"):
        for options in (
            {"loss_fn": graph_loss},
            {"loss_fn": counted, "gradient_accumulation_steps": 3},
        ):
            model = linear()
            train_loop(model, graphs, None, None, num_epochs=1, progress_bar=False, **options)
        evaluate_loop(model, graphs, loss_fn=counted)
        accumulate_gradients(model, graphs, loss_fn=counted)
    assert not [line for line in caplog.messages if "same" in line or "mean of" in line]
    with caplog.at_level("INFO", logger="manualloop"):
        for _ in range(2):
            accumulate_gradients(model, graphs, loss_fn=graph_loss)
        loss = evaluate_loop(model, graphs, loss_fn=graph_loss)["loss"]
    assert sum("weigh the same" in line for line in caplog.messages) == 1
    assert sum("mean of the batches' means" in line for line in caplog.messages) == 1
    expected = sum(graph_loss(model, batch).item() for batch in graphs) / 3
    assert loss == pytest.approx(expected, rel=1e-12)


def weighted_batches(*sizes):
    return [
        {"x": x, "y": (y[:, 0] > 0).long(), "weight": torch.ones(3, dtype=torch.float64)}
        for x, y in data(*sizes)
    ]


def weighted(model, batch):
    logits = model(batch["x"]).expand(-1, 3)
    return F.cross_entropy(logits, batch["y"], weight=batch["weight"])


def test_class_weights_that_happen_to_have_as_many_rows_end_the_run_and_not_the_numbers():
    """The first window looks like batches of three rows; the next shows that it was none."""
    steps = []
    with pytest.raises(DataError, match="Nothing tells how many rows"):
        train_loop(
            linear(), weighted_batches(3, 3, 3, 2), None, None, num_epochs=1,
            gradient_accumulation_steps=2, loss_fn=weighted, on_step=steps.append,
            progress_bar=False,
        )  # fmt: skip
    assert len(steps) == 1  # of two batches of three rows: any weight would have been the same


def test_a_list_of_rows_that_looks_like_columns_ends_the_run_and_not_the_numbers():
    def loss_fn(model, rows):
        return model(torch.stack(rows)).square().mean()

    batches = [list(x) for x, _ in data(4, 4, 4, 3)]
    with pytest.raises(DataError, match="Nothing tells how many rows"):
        train_loop(
            linear(), batches, None, None, num_epochs=1, gradient_accumulation_steps=2,
            loss_fn=loss_fn, progress_bar=False,
        )  # fmt: skip


def test_the_decision_is_one_for_a_run_also_when_it_is_resumed():
    """A window whose batches happen to have one length does not change how the run weighs."""
    batches = weighted_batches(5, 2, 3, 3, 4, 1)

    def train(state, max_steps):
        for _ in train_steps(
            state, batches, max_steps=max_steps, gradient_accumulation_steps=2, loss_fn=weighted
        ):
            pass
        return state

    def fresh():
        model = linear()
        return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))

    whole = train(fresh(), 3)
    saved = copy.deepcopy(train(fresh(), 1).state_dict())
    resumed = fresh()
    resumed.load_state_dict(saved)
    train(resumed, 3)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.weighs_equally
    del saved["weighs_equally"]  # as in a checkpoint of 0.1.0
    fresh().load_state_dict(saved)


def logits_of(model, batch):
    return model(batch["x"])


SECONDS = {
    "another loss": (lambda logits: logits.square().mean(), "requires grad"),
    "None": (lambda logits: None, "something is None"),
    "logits": (lambda logits: logits.detach(), r"something is a Tensor of shape \(4, 1\)"),
    "a dict": (lambda logits: {"accuracy": 0.5}, "something is a dict with keys accuracy"),
    "a negative number": (lambda logits: -1, "something is -1"),
    "a negative tensor": (lambda logits: torch.tensor(-2.5), "something is -2.5"),
    "NaN": (lambda logits: float("nan"), "something is nan"),
    "infinity": (lambda logits: torch.tensor(float("inf")), "something is inf"),
    "a bool": (lambda logits: True, "something is True"),
    "a text": (lambda logits: "4", "something is a str"),
    "a list": (lambda logits: [4], "something is a list of 1"),
    "an array": (lambda logits: logits.detach().numpy(), "something is a ndarray"),
    "a complex number": (lambda logits: torch.tensor(1j), "something is a Tensor"),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", SECONDS)
def test_a_second_element_that_is_no_count_is_refused_at_the_first_batch(kind, size):
    second, found = SECONDS[kind]

    def loss_fn(model, batch):
        logits = logits_of(model, batch)
        return logits.square().mean(), second(logits)

    model, steps = linear(), []
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=found):
        train_loop(
            model, [{"x": x} for x, _ in data(4, 4)], None, None, num_epochs=1, loss_fn=loss_fn,
            gradient_accumulation_steps=size, on_step=steps.append, progress_bar=False,
        )  # fmt: skip
    assert not steps
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    if kind != "another loss":  # nothing requires grad in an evaluation
        with pytest.raises(ModelError, match=found):
            evaluate_loop(model, [{"x": x} for x, _ in data(4)], loss_fn=loss_fn)


FIRSTS = {
    "a dict": (lambda logits: {"loss": logits.mean(), "logits": logits}, r'outputs\["loss"\]'),
    "losses": (lambda logits: {"a": logits.mean()}, "a dict with keys a"),
    "outputs": (lambda logits: SimpleNamespace(loss=logits.mean()), r"return outputs\.loss"),
    "three values": (lambda logits: (logits.mean(), 4, logits), "3 values"),
    "logits": (lambda logits: logits, r"a Tensor of shape \(4, 1\)"),
    "logits and a count": (lambda logits: (logits, 4), r"a Tensor of shape \(4, 1\)"),
    "a list": (lambda logits: [logits.mean(), 4], "a list of 2"),
}


@pytest.mark.parametrize("kind", FIRSTS)
def test_what_is_no_loss_is_named_by_what_it_is(kind):
    make, found = FIRSTS[kind]
    batch = {"x": data(4)[0][0]}
    for call in (
        partial(accumulate_gradients, linear(), [batch]),
        partial(evaluate_loop, linear(), [batch]),
    ):
        with pytest.raises(ModelError, match=found):
            call(loss_fn=lambda model, batch: make(logits_of(model, batch)))


def test_items_that_are_declared_plan_the_window_and_are_not_waited_for():
    """Pairs of rows: half as many items as rows, which only the loss can know."""

    def pairs(model, batch):
        better, worse = model(batch["x"]).reshape(-1, 2).unbind(1)
        return -F.logsigmoid(better - worse).mean()

    pairs.items = lambda batch: len(batch["x"]) // 2
    parts = [{"x": x} for x, _ in data(4, 6, 2)]
    whole = linear()
    pairs(whole, {"x": torch.cat([part["x"] for part in parts])}).backward()
    for loss_fn in (pairs, partial(pairs)):
        split = linear()
        update = accumulate_gradients(split, parts, loss_fn=loss_fn)
        assert update.num_items == 6
        torch.testing.assert_close(gradient(split), gradient(whole), rtol=1e-12, atol=1e-14)
    one = linear()
    assert accumulate_gradients(one, parts[:1], loss_fn=pairs).num_items == 2
    assert evaluate_loop(whole, parts, loss_fn=pairs)["loss"] == pytest.approx(float(update.loss))

    def otherwise(model, batch):
        return pairs(model, batch), len(batch["x"])

    otherwise.items = pairs.items
    with pytest.raises(ModelError, match="a mean over 4 items, and 2 were declared"):
        accumulate_gradients(linear(), parts, loss_fn=otherwise)


@dataclass(frozen=True)
class Ranking:
    """A loss of pairs with a setting, which declares its items."""

    margin: float

    def __call__(self, model, batch):
        better, worse = model(batch["x"]).reshape(-1, 2).unbind(1)
        return F.softplus(self.margin + worse - better).mean()

    def items(self, batch):
        return len(batch["x"]) // 2


class OfParts(nn.ModuleDict):
    """A loss that is a dict of modules: its ``items`` are its entries."""

    def forward(self, model, batch):
        return self["loss"](model(batch["x"]), torch.zeros_like(batch["x"][:, :1]))


class Noted(dict):
    """The same of a dict."""

    def __call__(self, model, batch):
        return model(batch["x"]).square().mean()


def test_objects_declare_items_and_dicts_do_not():
    parts = [{"x": x} for x, _ in data(4, 6, 2)]
    whole, split = linear(), linear()
    Ranking(0.2)(whole, {"x": torch.cat([part["x"] for part in parts])}).backward()
    update = accumulate_gradients(split, parts, loss_fn=Ranking(0.2))
    assert update.num_items == 6
    torch.testing.assert_close(gradient(split), gradient(whole), rtol=1e-12, atol=1e-14)
    for loss_fn in (OfParts({"loss": nn.MSELoss()}), Noted()):
        update = accumulate_gradients(linear(), parts, loss_fn=loss_fn)
        assert update.num_items == 12


def test_a_state_that_is_updated_by_hand_decides_for_each_update():
    model = linear()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for batches in (weighted_batches(3, 3), weighted_batches(5, 2)):
        apply_update(state, batches, SingleDevice(), loss_fn=weighted)
    assert state.weighs_equally is None
