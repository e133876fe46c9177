"""check_accumulation: a user's own proof, in words, and it can say no."""

import copy
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from heads import HEADS, build, head_id, make_batch
from torch import nn

from manualloop import DataError, check_accumulation
from manualloop.models import batch_statistics

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


def least_squares(dtype=torch.float32, away=1e-5):
    """A model next to the weights where the gradients of the rows cancel out."""
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.randn(40, 1, generator=torch.Generator().manual_seed(1))
    model = nn.Linear(20, 1, bias=False)
    with torch.no_grad():
        best = torch.linalg.lstsq(x.double(), labels.double()).solution.T
        model.weight.copy_(best + away)
    return model.to(dtype), {"x": x.to(dtype), "labels": labels.to(dtype)}


def squares(model, batch):
    return F.mse_loss(model(batch["x"]), batch["labels"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_cancel_out_accuse_nobody(dtype):
    model, batch = least_squares(dtype)
    before = copy.deepcopy(model.state_dict())
    report = check_accumulation(model, batch, loss_fn=squares)
    assert report.is_exact, report
    assert model.weight.dtype == dtype
    assert torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_wrong_count_shows_also_where_rows_cancel_out(dtype):
    model, batch = least_squares(dtype)
    for wrong in (
        lambda m, b: squares(m, b) * len(b["x"]),
        lambda m, b: (squares(m, b), 1 + float(b["x"][0, 0] > 0)),
        lambda m, b: (m(b["x"]) - b["labels"]).square().mean().sqrt(),
    ):
        report = check_accumulation(model, batch, loss_fn=wrong)
        assert not report.is_exact, report


def test_losses_that_cancel_out_accuse_nobody():
    """The mean of the losses is next to 0, and its rounding is not."""
    x = torch.cat([torch.full((8, 1), 1e4), torch.full((8, 1), -1e4 - 1e-3)])
    model = nn.Linear(1, 1)
    report = check_accumulation(model, {"x": x}, loss_fn=lambda m, b: m(b["x"]).mean())
    assert report.is_exact, report


def test_a_loss_function_with_tensors_of_its_own_is_measured_as_it_is():
    """In float64 it could not be called; float32 is not exact enough to accuse it."""
    weight = torch.tensor([0.2, 3.0])
    model, labels = nn.Linear(20, 2), torch.arange(40) % 2
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))

    def weighted(model, batch):
        loss = F.cross_entropy(model(batch["x"]), batch["labels"], weight=weight)
        return loss, weight[batch["labels"]].sum()

    assert check_accumulation(model, {"x": x, "labels": labels}, loss_fn=weighted).is_exact


@dataclass
class Scene:
    x: torch.Tensor
    targets: list
    meta: dict


def test_columns_of_lists_nested_dicts_and_objects_are_split():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    points = [{"points": torch.randn(n, 2, dtype=torch.float64)} for n in (1, 3, 2, 5)]
    x = torch.randn(4, 3, dtype=torch.float64)
    scale = {"scale": torch.arange(1.0, 5.0, dtype=torch.float64), "names": ["a", "b", "c", "d"]}

    def loss_fn(model, batch):
        if isinstance(batch, Scene):
            batch = vars(batch)
        rows = zip(model(batch["x"]), batch["targets"], batch["meta"]["scale"], strict=True)
        parts = [(row - t["points"]).square().sum(1) * scale for row, t, scale in rows]
        assert len(batch["meta"]["names"]) == len(parts)
        return torch.cat(parts).mean(), sum(map(len, parts))

    for batch in ({"x": x, "targets": points, "meta": scale}, Scene(x, points, scale)):
        report = check_accumulation(model, batch, loss_fn=loss_fn)
        assert report.is_exact
        assert (report.num_rows, report.num_items) == (4, 11)
        assert report.unweighted_difference > 0.01


def test_layers_with_statistics_over_the_batch_are_named():
    """They are measured in evaluation mode, where they have none."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    batch = {"x": torch.randn(5, 3, dtype=torch.float64)}

    def loss_fn(model, batch):
        return model(batch["x"]).square().mean()

    report = check_accumulation(model, batch, loss_fn=loss_fn)
    assert not report.is_exact
    assert "1 (BatchNorm1d) in evaluation mode" in str(report)
    model[1].eval()
    assert check_accumulation(model, batch, loss_fn=loss_fn).is_exact


LAYERS = [
    (nn.BatchNorm2d(2), True),
    (nn.BatchNorm1d(2, track_running_stats=False), True),
    (nn.SyncBatchNorm(2), True),
    (nn.LazyBatchNorm1d(), True),
    (nn.InstanceNorm2d(2, track_running_stats=True), True),
    (nn.InstanceNorm2d(2), False),
    (nn.LayerNorm(2), False),
    (nn.GroupNorm(1, 2), False),
]


@pytest.mark.parametrize(("layer", "has_statistics"), LAYERS, ids=str)
def test_which_layers_have_statistics_over_the_batch(layer, has_statistics):
    model = nn.Sequential(nn.Linear(2, 2), layer)
    assert (batch_statistics(model) is not None) == has_statistics
    assert batch_statistics(model.eval()) is None
