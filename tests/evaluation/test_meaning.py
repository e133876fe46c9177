"""Outputs and labels of modules of one's own, taken for what the loss says they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, log_loss, roc_auc_score
from torch import Tensor, nn

from manualloop import DataError, MetricError, evaluate_loop, predict_loop

NUM_CLASSES = 3
generator = torch.Generator().manual_seed(3)
X = torch.randn(24, 4, generator=generator)
CLASSES = torch.randint(0, NUM_CLASSES, (24,), generator=generator)
ONE_HOT = F.one_hot(CLASSES, NUM_CLASSES).float()
SEVERAL = torch.randint(0, 2, (24, NUM_CLASSES), generator=generator).float()


class Net(nn.Module):
    """A layer, what follows it, and a loss that it may return."""

    def __init__(self, last: nn.Module | None = None, loss: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last, self.loss = nn.Linear(4, NUM_CLASSES), last or nn.Identity(), loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        outputs = {"logits": self.last(self.layer(x))}
        if self.loss is not None and labels is not None:
            outputs["loss"] = self.loss(outputs["logits"], labels)
        return outputs


def batches(labels: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": X[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, 24, 8)]


def own(loss: Any) -> Any:
    return lambda model, batch: loss(model(batch["x"])["logits"], batch["labels"])


@pytest.mark.parametrize("is_own", [False, True])
@pytest.mark.parametrize("last", [None, nn.LogSoftmax(-1)])
def test_one_class_a_row_is_not_scored_as_several(is_own: bool, last: Any) -> None:
    model = Net(last, None if is_own else F.cross_entropy)
    options = {"loss_fn": own(F.cross_entropy)} if is_own else {}
    with pytest.raises(DataError, match=r'"labels": batch\["labels"\].argmax\(-1\)') as error:
        evaluate_loop(model, batches(ONE_HOT), "accuracy", **options)
    line = str(error.value).rpartition(": {")[2].removesuffix(".")
    fixed = [eval("{" + line, {"batch": batch}) for batch in batches(ONE_HOT)]
    found = evaluate_loop(model, fixed, "accuracy", **options)
    right = (model.layer(X).argmax(-1) == CLASSES).float().mean()
    assert found["accuracy"] == pytest.approx(float(right))


def test_several_classes_that_happen_to_be_one_a_row_are_several(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net(None, F.binary_cross_entropy_with_logits)
    found = evaluate_loop(model, batches(ONE_HOT), "f1/macro")
    right = f1_score(ONE_HOT, model.layer(X) > 0, average="macro")
    assert found["f1_macro"] == pytest.approx(right)
    assert "a single 1" not in caplog.text


def test_where_no_loss_tells_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    for _ in range(2):
        predict_loop(model, batches(ONE_HOT))
    assert caplog.text.count("each row of the labels has a single 1") == 1
    caplog.clear()
    model = Net(nn.Sigmoid())
    found = predict_loop(model, batches(SEVERAL))
    assert "the outputs are all between 0 and 1" in caplog.text
    line = caplog.text.partition("postprocess=")[2].partition(": (")[2].partition(".int()")[0]
    assert line == 'outputs["logits"] > 0.5)'
    assert isinstance(found.predictions, np.ndarray)
    assert found.predictions.all()


@pytest.mark.parametrize("is_own", [False, True])
def test_probabilities_of_several_classes_are_compared_with_a_half(
    is_own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net(nn.Sigmoid(), None if is_own else F.binary_cross_entropy)
    options = {"loss_fn": own(F.binary_cross_entropy)} if is_own else {}
    found = evaluate_loop(model, batches(SEVERAL), "f1/macro", **options)
    right = f1_score(SEVERAL, model.layer(X) > 0, average="macro")
    assert found["f1_macro"] == pytest.approx(right)
    assert not caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_probabilities_of_classes_stay_what_they_are(dtype: torch.dtype) -> None:
    model = Net(nn.Softmax(-1)).to(dtype)
    rows = [{**batch, "x": batch["x"].to(dtype)} for batch in batches(CLASSES)]
    found = predict_loop(model, rows)
    right = torch.cat([model(row["x"])["logits"] for row in rows]).detach().float().numpy()
    assert np.array_equal(found.scores, right)
    if dtype == torch.float32:
        score = evaluate_loop(model, rows, "log_loss")["log_loss"]
        assert score == pytest.approx(log_loss(CLASSES, right, labels=range(3)), rel=1e-4)


def test_logits_between_0_and_1_are_logits() -> None:
    model = Net()
    with torch.no_grad():
        model.layer.weight.mul_(0.01)
        model.layer.bias.copy_(torch.tensor([0.5, 0.4, 0.2]))  # which add up to 1.1
    right = model(X)["logits"].detach().softmax(-1).numpy()
    found = predict_loop(model, batches(CLASSES))
    np.testing.assert_allclose(found.scores, right, rtol=1e-6)


@pytest.mark.parametrize(("last", "bound"), [(nn.Sigmoid(), "0.5"), (nn.Identity(), "0")])
def test_the_line_for_one_output_knows_probabilities(last: Any, bound: str) -> None:
    model = nn.Sequential(nn.Linear(4, 1), last, nn.Flatten(0))
    model.forward = lambda x: nn.Sequential.forward(model, x)  # type: ignore[method-assign]
    rows = [{"x": X, "labels": (CLASSES > 1).float()}]
    loss_fn = lambda m, b: F.mse_loss(m(b["x"]), b["labels"])  # noqa: E731
    with pytest.raises(Exception, match=rf'outputs\["logits"\]\) > {bound}\)\.long'):
        evaluate_loop(model, rows, "accuracy", loss_fn=loss_fn)


@pytest.mark.parametrize("shape", [(24,), (8, 3)])
@pytest.mark.parametrize("ignored", [-1, NUM_CLASSES, 255])
def test_labels_that_only_the_loss_ignores_are_told(
    ignored: int, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    labels, inputs = CLASSES.clone().reshape(shape), X.reshape(*shape, 4)
    labels.view(-1)[::5] = ignored

    class Flat(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            logits = self.layer(x)
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignored)
            return {"logits": logits, "loss": loss}

    model, batch = Flat(), {"x": inputs, "labels": labels}
    for _ in range(2):
        found = evaluate_loop(model, [batch], ["accuracy", "f1/macro"])
    assert caplog.text.count(f"labels of {ignored} count as wrong predictions") == 1
    line = caplog.text.partition("no score counts them: ")[2].partition("-100)}")[0] + "-100)}"
    fixed = eval(line, {"batch": batch})
    caplog.clear()
    model = Net(None, None if len(shape) > 1 else F.cross_entropy)
    right = (model.layer(inputs).argmax(-1) == labels)[labels != ignored].float().mean()
    found = evaluate_loop(model, [fixed], "accuracy")
    assert found["accuracy"] == pytest.approx(float(right))
    assert "count as wrong" not in caplog.text


def test_no_labels_are_told_that_a_metric_or_a_prediction_leaves_to_the_user(
    caplog: pytest.LogCaptureFixture,
) -> None:
    labels = CLASSES.clone()
    labels[0] = 255
    model, loader = Net(), batches(labels)
    predict_loop(model, loader)
    evaluate_loop(model, loader, lambda predictions, references: {"n": len(references)})
    evaluate_loop(
        model,
        batches((CLASSES > 0).long()),
        "accuracy",
        postprocess=lambda outputs, batch: (outputs["logits"][:, 0] > 0).long(),
    )
    assert "count as wrong" not in caplog.text


@pytest.mark.parametrize("last", [None, nn.Sigmoid()])
def test_one_logit_for_two_classes_is_scored_by_the_line_that_is_printed(last: Any) -> None:
    class One(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            return {"logits": super().forward(x)["logits"][:, 0]}

    model, loader = One(last), batches((CLASSES > 0).float())
    with pytest.raises(MetricError, match="For one") as error:
        evaluate_loop(model, loader, "roc_auc")
    line = str(error.value).partition("postprocess=")[2].removesuffix(".")
    found = evaluate_loop(model, loader, "roc_auc", postprocess=eval(line))
    right = roc_auc_score(CLASSES > 0, model.layer(X)[:, 0].detach())
    assert found["roc_auc"] == pytest.approx(right)
