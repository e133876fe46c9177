"""Multi-label targets: -100 is left out of loss and items, others beyond 0 and 1 are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import rows, tiny_bert, tiny_tokenizer
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import ViTConfig, ViTForImageClassification

from manualloop import (
    DataError,
    accumulate_gradients,
    check_accumulation,
    count_items,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)

LABELS = [[1.0, -100.0, 0.0], [0.25, 1.0, -100.0], [-100.0] * 3, [1.0, 0.0, 1.0]]
IDS = torch.tensor([[4, 5], [6, 7], [8, 9], [4, 9]])


def batches(size: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    labels = torch.tensor(LABELS, dtype=dtype)
    return [
        {"input_ids": IDS[n : n + size], "labels": labels[n : n + size]} for n in range(0, 4, size)
    ]


def model_of(**config):
    return tiny_bert(3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)


def gradients_by_hand(model):
    """The mean over all targets that are not -100, in one batch."""
    model = copy.deepcopy(model).double()
    logits, labels = model(IDS).logits, torch.tensor(LABELS, dtype=torch.float64)
    kept = labels != -100
    loss = binary_cross_entropy_with_logits(logits[kept], labels[kept])
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("config", [{}, {"problem_type": "multi_label_classification"}])
def test_any_split_gives_the_gradient_of_the_targets_that_count(size, config):
    model = model_of(**config).double()
    loss, expected = gradients_by_hand(model)
    update = accumulate_gradients(model, batches(size, torch.float64))
    assert update.num_items == 7
    assert float(update.loss) == pytest.approx(loss, abs=1e-12)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_loss_of_an_evaluation_is_the_mean_of_the_same_targets(size):
    model = model_of()
    loss, _ = gradients_by_hand(model)
    dataset = {"dev": rows(input_ids=IDS.tolist(), labels=LABELS)}
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), model=model, batch_size=size)["dev"]
    assert evaluate_loop(model, loader)["loss"] == pytest.approx(loss, abs=1e-6)
    assert predict_loop(model, loader).references.tolist() == LABELS
    with pytest.raises(DataError, match="the metric compares whole rows"):
        evaluate_loop(model, loader, "accuracy")


def test_the_proof_of_accumulation_holds_for_such_targets():
    assert check_accumulation(model_of(), batches(4)[0]).is_exact


def test_targets_without_minus_100_keep_the_models_own_loss():
    model, batch = model_of(), {"input_ids": IDS, "labels": torch.eye(4)[:, :3]}
    update = accumulate_gradients(model, [batch])
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert torch.equal(update.loss, loss.detach())
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, ours, theirs))


def test_images_are_classified_by_the_same_rule():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = ViTConfig(image_size=4, patch_size=2, intermediate_size=8, num_labels=3, **sizes)
    model = ViTForImageClassification(config)
    batch = {"pixel_values": torch.zeros(4, 3, 4, 4), "labels": torch.tensor(LABELS)}
    assert count_items(model, batch) == 7


@pytest.mark.parametrize("wrong", [2.0, -1.0, 100.0])
def test_a_target_beyond_0_and_1_in_a_later_batch_is_refused(wrong):
    good = {"input_ids": IDS, "labels": torch.eye(4)[:, :3]}
    bad = {**good, "labels": torch.tensor([[0.0] * 3, [0.0, wrong, 1.0], *[[1.0] * 3] * 2])}
    model = model_of()
    with pytest.raises(DataError, match=rf"Target {wrong:g} in row 1 of"):
        train_loop(model, [good, bad], num_epochs=1, progress_bar=False)
    with pytest.raises(DataError, match=rf"Target {wrong:g} in row 1 of"):
        evaluate_loop(model, [good, bad])


def test_a_regression_of_several_values_may_have_any():
    model = model_of(problem_type="regression")
    batch = {"input_ids": IDS, "labels": torch.tensor(LABELS)}
    assert count_items(model, batch) == 12


def test_a_module_of_ones_own_keeps_its_own_meaning():
    class Own(torch.nn.Linear):
        def forward(self, x, labels):
            return {"loss": ((super().forward(x) - labels) ** 2).mean()}

    batch = {"x": torch.ones(2, 2), "labels": torch.tensor([[7.0, -100.0], [3.0, 2.0]])}
    assert count_items(Own(2, 2), batch) == 4
    train_loop(Own(2, 2), [batch], num_epochs=1, progress_bar=False)
