"""A loss is taken apart in one way, wherever it comes from."""

import pytest
import torch
import torch.nn.functional as F
from heads import HEADS, build, head_id, make_batch
from torch import nn

from manualloop import (
    DataError,
    ModelError,
    SingleDevice,
    accumulate_gradients,
    check_accumulation,
    evaluate_loop,
)
from manualloop.tasks.loss import loss_terms, no_loss, own_terms, read_items
from manualloop.tasks.task import resolve_task

HEAD = {head_id(head): head for head in HEADS}


@pytest.mark.parametrize("head", HEADS, ids=head_id)
def test_the_sum_of_the_terms_is_the_models_loss(head):
    model, batch = build(head), make_batch(head, 8)
    terms = loss_terms(model, batch, resolve_task(model, batch).count(batch))
    assert len(terms) == (2 if "QuestionAnswering" in head_id(head) else 1)
    loss = sum(mean for mean, _ in terms)
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("returned", "num_items"),
    [
        (torch.tensor(2.0), None),
        ((torch.tensor(2.0), 3), 3),
        ((torch.tensor(2.0), torch.tensor(3)), 3),
        ((torch.tensor(2.0), torch.tensor([0.25])), 0.25),
    ],
    ids=["mean", "count", "tensor", "fraction"],
)
def test_what_a_loss_fn_may_return(returned, num_items):
    ((mean, found),) = own_terms(returned)
    assert mean == 2.0
    assert (found if found is None else read_items(found)) == num_items


def test_a_loss_fn_without_a_return_is_refused_in_training_and_evaluation():
    model, batch = nn.Linear(1, 1), {"x": torch.ones(2, 1), "labels": torch.ones(2, 1)}

    def forgetful(model, batch):
        F.mse_loss(model(batch["x"]), batch["labels"])

    with pytest.raises(ModelError, match="loss_fn returned None"):
        accumulate_gradients(model, [batch], loss_fn=forgetful)
    for metric in (None, "mse"):
        with pytest.raises(ModelError, match="loss_fn returned None"):
            evaluate_loop(model, [batch], metric, loss_fn=forgetful)


def test_a_loss_that_is_no_tensor_is_named():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, x):
            return {"loss": {"boxes": self.linear(x).mean()}}

    with pytest.raises(ModelError, match="The loss is a dict"):
        accumulate_gradients(Detector(), [{"x": torch.ones(2, 1)}])


def test_why_there_is_no_loss():
    model = nn.Linear(1, 1)
    errors = [
        no_loss(model, {"input": torch.ones(1)}, torch.tensor(1.0)),
        no_loss(model, {"x": torch.ones(1)}, {"loss": None}),
        no_loss(model, {"labels": torch.ones(1)}, {"loss": None}),
    ]
    assert [type(error) for error in errors] == [ModelError, DataError, ModelError]
    found = ["returned a 0-d Tensor", "Training needs labels", "output has loss=None"]
    assert all(part in str(error) for part, error in zip(found, errors, strict=True))


def smooth(model, batch):
    outputs = model(**batch)
    losses = [
        F.cross_entropy(logits, batch[name].clamp(0, logits.shape[1]), ignore_index=logits.shape[1])
        for logits, name in (
            (outputs.start_logits, "start_positions"),
            (outputs.end_logits, "end_positions"),
        )
    ]
    return 3 * sum(losses) / 2


def test_question_answering_is_scored_by_the_loss_fn_that_trains_it():
    """The model's own two means would be another loss."""
    head = HEAD["BertForQuestionAnswering"]
    model = build(head)
    batch = make_batch(head, 6)
    trained = accumulate_gradients(model, [batch], loss_fn=smooth).loss
    scored = evaluate_loop(model, [batch], loss_fn=smooth)["loss"]
    assert scored == pytest.approx(float(trained), rel=1e-12)
    assert scored == pytest.approx(3 * evaluate_loop(model, [batch])["loss"], rel=1e-12)


def test_question_answering_in_bf16_is_scored_as_it_is_trained():
    """Outside autocast the two means would be rounded to bfloat16."""
    head = HEAD["BertForQuestionAnswering"]
    model = build(head, torch.float32)
    batch, strategy = make_batch(head, 6, dtype=torch.float32), SingleDevice(mixed_precision="bf16")
    strategy.prepare_model(model)
    trained = accumulate_gradients(model, [batch], strategy=strategy).loss
    scored = evaluate_loop(model, [batch], strategy=strategy)["loss"]
    assert scored == pytest.approx(float(trained), rel=1e-6)


def test_positions_that_some_micro_batches_lack_are_refused():
    head = HEAD["BertForQuestionAnswering"]
    batch = make_batch(head, 2)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(DataError, match="micro-batches of a window differ"):
        accumulate_gradients(build(head), [batch, inputs])


def test_weights_below_one_are_items_to_the_proof_too():
    """The usual mean of means counts a row that weighs 0.2 as it counts the others."""
    weight = torch.tensor([0.2, 0.3], dtype=torch.float64)

    def weighted(model, batch):
        loss = F.cross_entropy(model(batch["x"]), batch["labels"], weight=weight)
        return loss, weight[batch["labels"]].sum()

    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    batch = {"x": torch.randn(5, 3, dtype=torch.float64), "labels": torch.tensor([0, 1, 1, 0, 1])}
    report = check_accumulation(model, batch, loss_fn=weighted)
    assert report.is_exact
    assert 0 < report.unweighted_difference < 0.5  # 1 if all rows were left out


def constant_of_no_row(model, batch):
    kept = batch["labels"] != -100
    if not kept.any():
        return torch.tensor(0.0), 0
    return F.cross_entropy(model(batch["x"])[kept], batch["labels"][kept]), kept.sum()


class Declared:
    def __call__(self, model, batch):
        return constant_of_no_row(model, batch)[0]

    def items(self, batch):
        return int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("loss_fn", [constant_of_no_row, Declared()], ids=["counts", "declares"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_mean_over_no_item_may_be_a_constant(loss_fn, size):
    model, labels = nn.Linear(3, 2), ([0, 1], [-100, -100], [1, -100])
    batches = [{"x": torch.rand(2, 3), "labels": torch.tensor(kept)} for kept in labels]
    found = [
        accumulate_gradients(model, batches[start : start + size], loss_fn=loss_fn)
        for start in range(0, 3, size)
    ]
    assert [update.applied for update in found] == ([True] if size == 3 else [True, False, True])
    got, model.weight.grad = model.weight.grad, None
    for batch in batches[::2]:
        loss, kept = constant_of_no_row(model, batch)
        (loss * (kept / 3 if size == 3 else 1)).backward()
    torch.testing.assert_close(got, model.weight.grad)


def test_a_head_whose_loss_of_no_row_is_a_constant_is_trained_in_micro_batches():
    model, batch = build(HEAD["DebertaForSequenceClassification"]), {}
    model.config.problem_type = None
    batch["input_ids"] = torch.randint(3, 50, (3, 8))
    batch["labels"] = torch.tensor([1, -100, 2])
    model(**batch).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    rows = [{name: column[n : n + 1] for name, column in batch.items()} for n in range(3)]
    assert accumulate_gradients(model, rows).num_items == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_constant_over_rows_is_refused_as_ever():
    batch = {"x": torch.ones(2, 1), "labels": torch.ones(2, 1)}
    with pytest.raises(ModelError, match="requires_grad=False"):
        accumulate_gradients(nn.Linear(1, 1), [batch], loss_fn=lambda *_: torch.tensor(0.0))
