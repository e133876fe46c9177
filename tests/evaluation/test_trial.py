"""``evaluate`` is tried on one batch before the first update, and nothing of it remains."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from helpers import rows, tiny_bert, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader

from manualloop import (
    ConfigError,
    DataError,
    ManualLoopError,
    evaluate_loop,
    load_metric,
    prepare_dataloaders,
    train_loop,
)
from manualloop.evaluation.trial import try_evaluation

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """Draws, counts and keeps in every forward pass, in evaluation too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.seen = 0, []

    def forward(self, x, labels=None):
        self.calls += 1
        self.count += 1
        self.seen.append(len(x))
        logits = self.linear(x) / (1 + self.count) + torch.rand(()) * self.calls
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 8

    def __getitem__(self, number):
        self.reads += 1
        return {"x": X[number] + torch.rand(()), "labels": number % 2}


def train(evaluate, model=None, **options):
    steps = []
    model = model or Classifier()
    result = train_loop(
        model,
        [{"x": X, "labels": torch.arange(8) % 2}] * 3,
        torch.optim.SGD(model.parameters(), lr=0.1),
        None,
        **{"num_epochs": 2, "evaluate": evaluate, "progress_bar": False, **options},
        on_step=lambda step: steps.append(step.index),
    )
    return result, steps


def loader(**options):
    return DataLoader(Rows(), 4, **{"shuffle": True, **options})


@pytest.mark.parametrize(
    ("metric", "best_metric"),
    [
        ("accuracy", "F1"),
        ("glue/mrpc", "+acc"),
        (["accuracy", "f1"], "-Loss"),
        (None, "accuracy"),
        ("f1/macro", "f1"),
        (["perplexity", "confusion_matrix", "roc_auc"], "auc"),
        (load_metric("classification_report", names=["no", "yes"]), "yes_f1"),
    ],
)
def test_a_misspelt_name_is_refused_before_the_first_update(metric, best_metric):
    model, steps = Classifier(), []
    with pytest.raises(ConfigError, match=r"returned no '.*': loss"):
        _, steps = train(
            partial(evaluate_loop, model, loader(), metric), model, best_metric=best_metric
        )
    assert steps == []
    assert model.calls == 0


def test_names_that_depend_on_the_rows_are_not_refused():
    """One batch need not hold every class."""
    model = Classifier()
    evaluate = partial(evaluate_loop, model, loader(), ["f1/none", "accuracy"])
    assert not try_evaluation(evaluate).are_all
    result, _ = train(evaluate, model, best_metric="f1_1")
    assert "f1_1" in result.best_metrics


def test_what_is_no_metric_is_refused_before_the_first_update():
    for metric in (lambda labels, x: 0.0, len, "seqeval"):
        model = Classifier()
        with pytest.raises(ManualLoopError, match=r"Rename them|two arguments|seqeval scores"):
            train(partial(evaluate_loop, model, loader(), ["accuracy", metric]), model)
        assert model.calls == 0


def test_names_of_several_loaders_are_known():
    model = Classifier()
    evaluate = partial(evaluate_loop, model, {"a": loader(), "b": loader()}, "accuracy")
    result, _ = train(evaluate, model, best_metric="b_accuracy")
    assert set(result.best_metrics) == {"a_loss", "a_accuracy", "b_loss", "b_accuracy"}
    with pytest.raises(ConfigError, match="returned no 'accuracy': a_loss, a_accuracy, b_loss"):
        train(evaluate, model, best_metric="accuracy")


def state_of(model, data):
    return [
        *(weight.clone() for weight in model.state_dict().values()),
        torch.tensor([model.calls, len(model.seen), data.dataset.reads]),
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("options", [{}, {"generator": torch.Generator()}, {"num_workers": 1}])
def test_a_trial_leaves_no_trace(options):
    model, data = Classifier(), loader(**options)
    before = state_of(model, data)
    found = try_evaluation(partial(evaluate_loop, model, data, ["accuracy", max]))
    assert found == (["loss", "accuracy"], False)
    for now, then in zip(state_of(model, data), before, strict=True):
        assert torch.equal(now, then)
    if generator := options.get("generator"):
        fresh = torch.Generator()
        assert torch.equal(generator.get_state(), fresh.get_state())


def test_a_run_is_the_same_with_a_trial():
    def run(**options):
        torch.manual_seed(0)
        model = Classifier()
        evaluate = partial(evaluate_loop, model, loader(), "accuracy")
        result, _ = train(evaluate, model, **options)
        return result

    tried, untried = run(), run(preflight=False)
    assert tried.history == untried.history
    for one, other in zip(
        tried.state.model.state_dict().values(), untried.state.model.state_dict().values(), strict=1
    ):
        assert torch.equal(one, other)


def test_functions_of_the_user_are_not_called_by_a_trial():
    calls = []

    def metric(predictions, references):
        calls.append(len(predictions))
        return {"own": 0.5}

    model = Classifier()
    found = try_evaluation(partial(evaluate_loop, model, loader(), metric))
    assert (found, calls) == ((["loss"], False), [])
    result, _ = train(partial(evaluate_loop, model, loader(), metric), model, best_metric="own")
    assert result.best_metrics["own"] == 0.5


def test_a_metric_that_a_trial_does_not_know_is_mentioned(caplog):
    caplog.set_level(logging.INFO, logger="manualloop")
    model = Classifier()
    with pytest.raises(ConfigError, match="returned no 'owm': loss, own"):
        train(
            partial(evaluate_loop, model, loader(), lambda p, r: {"own": 0.5}),
            model,
            best_metric="owm",
        )
    assert "best_metric='owm' is not among loss, which one batch gave" in caplog.text


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda model: partial(evaluate_loop, loader(), "accuracy"), "not a model"),
        (lambda model: partial(evaluate_loop, model), "cannot be called: missing"),
        (lambda model: partial(evaluate_loop, model, loader(), metrics="f1"), "unexpected keyword"),
        (lambda model: partial(evaluate_loop, model, loader(), "acuracy"), "Did you mean"),
        (lambda model: partial(evaluate_loop, model, [{"x": X}], "accuracy"), "needs labels"),
    ],
)
def test_mistakes_in_a_partial_come_before_the_first_update(evaluate, message):
    model = Classifier()
    steps = None
    with pytest.raises((ValueError, AttributeError, TypeError), match=message):
        _, steps = train(evaluate(model), model)
    assert steps is None


def test_labels_that_are_ignored_in_the_first_batch_are_no_mistake():
    model = Classifier()
    ignored, others = torch.full((8,), -100), torch.arange(8) % 2
    data = [{"x": X, "labels": ignored}, {"x": X, "labels": others}]
    evaluate = partial(evaluate_loop, model, data, "accuracy")
    result, _ = train(evaluate, model, best_metric="accuracy")
    assert "accuracy" in result.metrics


def test_a_loader_that_can_be_read_once_is_not_tried():
    model = Classifier()
    once = ({"x": X, "labels": torch.arange(8) % 2} for _ in range(2))
    evaluate = partial(evaluate_loop, model, once, "accuracy")
    result, _ = train(evaluate, model, evaluate_every=100)
    assert "accuracy" in result.metrics


def test_a_run_that_is_finished_tries_nothing(tmp_path):
    passes = []
    for _ in range(2):
        passes.clear()
        torch.manual_seed(0)
        model = Classifier()
        model.register_forward_hook(lambda *args: passes.append(1))
        data = [{"x": X, "labels": torch.arange(8) % 2}]
        train(partial(evaluate_loop, model, data), model, checkpoint_dir=tmp_path)
    assert passes == []


def test_prepared_loaders_are_tried():
    model = tiny_bert()
    loaders = prepare_dataloaders(
        {"train": rows(8), "validation": rows(8)}, tiny_tokenizer(), model=model, batch_size=4
    )
    config = model.config.to_dict()
    found = try_evaluation(partial(evaluate_loop, model, loaders["validation"], "glue/mrpc"))
    assert found == (["loss", "accuracy", "f1"], True)
    assert model.config.to_dict() == config


# Several loaders, NaN, and names of functions -----------------------------------------------------


def test_several_loaders_are_scored_as_one_by_one():
    model = tiny_bert()
    loaders = prepare_dataloaders(
        {"train": rows(4), "a": rows(8), "b": rows(6)}, tiny_tokenizer(), model=model
    )
    both = evaluate_loop(model, {"a": loaders["a"], "b": loaders["b"]}, "accuracy")
    alone = {
        f"{name}_{key}": value
        for name in ("a", "b")
        for key, value in evaluate_loop(model, loaders[name], "accuracy").items()
    }
    assert both == alone
    assert list(both) == ["a_loss", "a_accuracy", "b_loss", "b_accuracy"]


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        ({}, "the mapping is empty"),
        ({"x": X, "labels": torch.arange(8) % 2}, "Got a batch with x, labels"),
        ({"a": [{"x": X}], "b": 3}, "Got a int"),
        ({"a": {"b": [{"x": X}]}}, "Got a dict"),
    ],
)
def test_a_mapping_of_something_else_is_refused(loaders, message):
    with pytest.raises(DataError, match=message):
        evaluate_loop(Classifier(), loaders)


@pytest.mark.parametrize(
    "metric", [lambda p, r: (p == r).mean(), partial(lambda p, r, *, k: 0.5, k=1)]
)
def test_a_lambda_has_a_key_that_can_be_read(metric):
    assert "metric" in evaluate_loop(Classifier(), loader(), metric)


@pytest.mark.parametrize("is_one_of_two", [False, True])
def test_a_loader_without_a_batch_is_refused_before_the_first_update(is_one_of_two):
    model = Classifier()
    empty = DataLoader(torch.utils.data.Subset(Rows(), []), 4)
    loaders = {"a": loader(), "b": empty} if is_one_of_two else empty
    with pytest.raises(DataError, match="No rows to evaluate: the loader gave 0 batches"):
        train(partial(evaluate_loop, model, loaders), model)
    assert model.calls == 0


class Given(nn.Module):
    def __init__(self, has_loss):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.has_loss = has_loss

    def forward(self, logits, labels=None):
        outputs = {"logits": logits + self.weight}
        if self.has_loss and labels is not None:
            outputs["loss"] = nn.functional.cross_entropy(outputs["logits"], labels)
        return outputs


NAN = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [2.0, float("nan")], [0.0, float("inf")]])
SOUND = torch.tensor([[0.0, 1.0], [0.0, float("inf")]])


@pytest.mark.parametrize("has_loss", [False, True])
@pytest.mark.parametrize("labels", [True, False])
def test_nan_logits_are_counted_in_one_line(has_loss, labels, caplog):
    from manualloop import predict_loop

    caplog.set_level(logging.INFO, logger="manualloop")
    data = [{"logits": logits} for logits in (NAN, SOUND, NAN)]
    if labels:
        data = [{**batch, "labels": torch.ones(len(batch["logits"])).long()} for batch in data]
        evaluate_loop(Given(has_loss), data, "accuracy")
    else:
        predict_loop(Given(has_loss), data)
    found = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert found == ["the logits of 4 rows are NaN: their predictions and scores mean nothing."]


def test_logits_that_are_numbers_or_infinite_are_not_mentioned(caplog):
    caplog.set_level(logging.INFO, logger="manualloop")
    labels = torch.ones(2).long()
    evaluate_loop(Given(False), [{"logits": SOUND, "labels": labels}], "accuracy")
    evaluate_loop(Given(False), [{"logits": -SOUND, "labels": labels}], "accuracy")
    assert "NaN" not in caplog.text


def test_a_regression_of_nan_is_mentioned(caplog):
    caplog.set_level(logging.INFO, logger="manualloop")
    logits = torch.tensor([[0.5], [float("nan")]])
    evaluate_loop(Given(False), [{"logits": logits, "labels": torch.ones(2)}], "mse")
    assert "the logits of 1 row are NaN" in caplog.text
