"""The promise "any split is the same update", over many heads, in float64 with SGD."""

import copy
import itertools

import pytest
import torch
from heads import HEADS, build, head_id, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualloop import TrainState, apply_update, prepare_strategy

NUM_ROWS = 32
LR = 0.1


def rows_of(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@st.composite
def cuts(draw):
    """Sizes of the micro-batches that 32 rows are cut into."""
    places = draw(st.sets(st.integers(1, NUM_ROWS - 1), min_size=1, max_size=10))
    edges = [0, *sorted(places), NUM_ROWS]
    return [last - first for first, last in itertools.pairwise(edges)]


def update_once(model, batches, loss_fn=None):
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=LR))
    return apply_update(state, batches, prepare_strategy("cpu"), loss_fn=loss_fn, max_grad_norm=1e9)


def big_batch(model, batch):
    """Plain torch: one batch, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model(**batch).loss.backward()
    optimizer.step()


def float64_loss(task):
    """The loss of heads that transformers computes in float32, written out in float64."""

    def loss_fn(model, batch):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits, labels = model(**inputs).logits, batch["labels"]
        if task == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return loss_fn


@pytest.mark.parametrize("head", HEADS, ids=head_id)
def test_any_split_makes_the_same_step_as_the_big_batch(head):
    task = head[2]
    model, batch = build(head), make_batch(head, NUM_ROWS)
    start = copy.deepcopy(model.state_dict())
    before = weights(model)
    loss_dtype = model(**rows_of(batch, slice(4))).loss.dtype
    big_batch(model, batch)
    step = weights(model) - before
    # float32 where transformers computes the loss in it, whatever the weights are
    tolerance = 1e-12 if loss_dtype == torch.float64 else 1e-6

    @settings(max_examples=8)
    @given(sizes=cuts())
    def check(sizes):
        model.load_state_dict(start)
        parts = torch.arange(NUM_ROWS).split(sizes)
        update = update_once(model, [rows_of(batch, rows) for rows in parts])
        assert update.applied
        difference = (weights(model) - before - step).abs().max() / step.abs().max()
        assert difference <= tolerance, f"{sizes}: {difference:.1e}"
        assert update.grad_norm > 0

    check()
    if loss_dtype != torch.float64:
        loss_fn = float64_loss(task)
        model.load_state_dict(start)
        model.zero_grad()
        loss_fn(model, batch).backward()
        step = -LR * torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        parts = torch.arange(NUM_ROWS).split([1, 20, 11])
        update_once(model, [rows_of(batch, rows) for rows in parts], loss_fn)
        difference = (weights(model) - before - step).abs().max() / step.abs().max()
        assert difference <= 1e-12


def test_the_test_can_fail():
    """The mean of the micro-batches' means, which is what is usually written, is no equal of it."""
    head = ("Bert", "TokenClassification", "token_classification")
    model, batch = build(head), make_batch(head, NUM_ROWS)
    model(**batch).loss.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    parts = torch.arange(NUM_ROWS).split([2, 10, 20])
    for rows in parts:
        (model(**rows_of(batch, rows)).loss / len(parts)).backward()
    usual = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (usual - exact).abs().max() / exact.abs().max() > 0.05
