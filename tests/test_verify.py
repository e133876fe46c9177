"""check_accumulation: a user's own proof, in words, and it can say no."""

import copy
import random

import pytest
import torch
from heads import HEADS, build, head_id, make_batch

from manualloop import DataError, check_accumulation

HEAD = {head_id(head): head for head in HEADS}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_says_yes_and_what_the_usual_way_would_give(dtype):
    head = HEAD["BertForTokenClassification"]
    report = check_accumulation(build(head, dtype), make_batch(head, 6, dtype=dtype))
    assert report.is_exact
    assert report.unweighted_difference > 0.01
    assert "6 rows at once against 6 of one row" in str(report)
    assert "Any split is the same update." in str(report)


def test_says_no_to_a_loss_that_is_no_mean_over_the_items_counted():
    head = HEAD["BertForTokenClassification"]
    model, batch = build(head), make_batch(head, 6)
    report = check_accumulation(model, batch, loss_fn=lambda m, b: m(**b).loss * len(b["labels"]))
    assert not report.is_exact
    assert "The split changes the update" in str(report)


def test_leaves_modes_gradients_and_random_states_alone():
    head = HEAD["BertForSequenceClassification"]
    model, batch = build(head), make_batch(head, 4)
    model.bert.embeddings.eval()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate()
    check_accumulation(model, batch)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert model.classifier.bias.grad is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_one_row_cannot_be_split():
    head = HEAD["BertForSequenceClassification"]
    with pytest.raises(DataError, match="A batch of one row cannot be split"):
        check_accumulation(build(head), make_batch(head, 1))
