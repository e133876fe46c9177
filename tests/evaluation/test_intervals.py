"""``evaluate_loop(confidence=...)``: intervals around every score, of every kind of metric."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import messages, rows, tiny_bert, tiny_tokenizer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from manualloop import (
    ConfigError,
    MetricError,
    evaluate_loop,
    load_metric,
    prepare_dataloaders,
    train_loop,
)
from manualloop.evaluation import intervals
from manualloop.evaluation.resampling import interval_of, resamples


class Echo(nn.Module):
    """Returns logits that the batch holds, and no loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return {"logits": x + self.weight}


def loader_of(logits, labels, batch_size=7):
    rows = [{"x": x, "labels": y} for x, y in zip(logits, labels, strict=True)]
    return DataLoader(rows, batch_size=batch_size)


def classes(num_rows=60, num_classes=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    logits = torch.randn(num_rows, num_classes, generator=generator)
    return logits + 1.2 * functional.one_hot(labels, num_classes), labels


def tokens(num_rows=40, width=6, num_classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (num_rows, width), generator=generator)
    logits = torch.randn(num_rows, width, num_classes, generator=generator)
    logits = logits + 1.5 * functional.one_hot(labels, num_classes)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return logits, labels


def by_plain_loop(name, predictions, references, num_resamples, counts=None):
    """The interval that a loop over resamples of the rows gives."""
    scores = []
    parts = resamples(np.ones(len(references), int), num_resamples)
    for weights in np.concatenate(list(parts)).astype(int):
        chosen = np.repeat(np.arange(len(references)), weights)
        sides = [[side[row] for row in chosen] for side in (predictions, references)]
        sides = [np.concatenate([np.atleast_1d(row) for row in side]) for side in sides]
        found = load_metric(name).compute(predictions=sides[0], references=sides[1])
        scores.append(next(iter(found.values())))
    return interval_of(np.array(scores), 0.9)


def near(interval, found, key, share=0.35):
    """Tell whether two intervals are equal but for chance."""
    ends = found[f"{key}_low"], found[f"{key}_high"]
    return np.allclose(interval[:2], ends, atol=share * (interval.high - interval.low))


@pytest.mark.parametrize("name", ["accuracy", "f1/macro", "matthews_correlation"])
@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_classes_get_the_interval_of_resampled_rows(name, kind):
    logits, labels = classes(num_classes=3) if kind == "rows" else tokens()
    found = evaluate_loop(Echo(), loader_of(logits, labels), name, confidence=0.9)
    (key,) = [key for key in found if not key.endswith(("_low", "_high"))]
    kept = [row != -100 for row in labels.numpy()]
    predictions = [
        np.atleast_1d(row)[np.atleast_1d(k)]
        for row, k in zip(logits.argmax(-1).numpy(), kept, strict=True)
    ]
    references = [
        np.atleast_1d(row)[np.atleast_1d(k)] for row, k in zip(labels.numpy(), kept, strict=True)
    ]
    expected = by_plain_loop(name, predictions, references, 150)
    assert near(expected, found, key)
    assert found[f"{key}_low"] < found[key] < found[f"{key}_high"]
    plain = evaluate_loop(Echo(), loader_of(logits, labels), name)
    assert {k: found[k] for k in plain} == plain


def test_correlated_tokens_widen_the_interval():
    """Rows of equal tokens say no more than one token of each."""
    logits, labels = classes(50)
    one = evaluate_loop(Echo(), loader_of(logits, labels), "accuracy", confidence=0.95)
    logits, labels = (side.unsqueeze(1).repeat_interleave(8, 1) for side in (logits, labels))
    many = evaluate_loop(Echo(), loader_of(logits, labels), "accuracy", confidence=0.95)
    assert many["accuracy"] == one["accuracy"]
    for end in ("accuracy_low", "accuracy_high"):
        assert many[end] == pytest.approx(one[end], abs=0.03)


@pytest.mark.parametrize("metric", ["mse", "mae", "pearson", "spearman", "glue/stsb"])
def test_values_get_intervals(metric):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(50, generator=generator)
    logits = (labels + torch.randn(50, generator=generator)).unsqueeze(-1)
    found = evaluate_loop(Echo(), loader_of(logits, labels), metric, confidence=0.9)
    keys = [key for key in found if not key.endswith(("_low", "_high"))]
    assert list(found) == [k + end for k in keys for end in ("", "_low", "_high")]
    assert all(found[f"{k}_low"] < found[k] < found[f"{k}_high"] for k in keys)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_probabilities_get_the_intervals_that_calls_give(num_classes, monkeypatch, caplog):
    logits, labels = classes(num_classes=num_classes)
    names = ["roc_auc", "average_precision", "log_loss"]
    found = evaluate_loop(Echo(), loader_of(logits, labels), names, confidence=0.9)
    assert not any("resamples" in line for line in messages(caplog))
    monkeypatch.setattr(intervals, "BY_KEY", {})
    monkeypatch.setattr(intervals, "_CALLS", (150, 150))
    called = evaluate_loop(Echo(), loader_of(logits, labels), names, confidence=0.9)
    assert any("come from 150 resamples" in line for line in messages(caplog))
    for name in names:
        width = found[f"{name}_high"] - found[f"{name}_low"]
        for end in ("_low", "_high"):
            assert called[name + end] == pytest.approx(found[name + end], abs=0.35 * width)


def test_several_labels_get_intervals():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (50, 3), generator=generator).float()
    logits = torch.randn(50, 3, generator=generator) + 2 * labels - 1
    names = ["accuracy", "f1/macro", "f1/samples", "roc_auc"]
    model = tiny_bert()  # its head decides that this is multi-label
    model.forward = lambda x: {"logits": x}
    model.config.problem_type = "multi_label_classification"
    found = evaluate_loop(model, loader_of(logits, labels), names, confidence=0.9)
    for key in ("accuracy", "f1_macro", "f1_samples", "roc_auc"):
        assert found[f"{key}_low"] < found[key] < found[f"{key}_high"]


def agreement(predictions, references):
    return {"agreement": float((predictions == references).mean()), "rows": len(references)}


def test_a_function_is_called_on_resampled_rows(caplog):
    logits, labels = classes()
    found = evaluate_loop(
        Echo(), loader_of(logits, labels), ["accuracy", agreement], confidence=0.9
    )
    for end in ("", "_low", "_high"):
        assert found[f"agreement{end}"] == pytest.approx(found[f"accuracy{end}"], abs=0.03)
    assert (found["rows_low"], found["rows_high"]) == (60, 60)
    lines = messages(caplog)
    assert (
        "the intervals of agreement, rows come from 1000 resamples, each scored by a call of "
        in (lines[-1])
    )


def test_a_function_that_fails_on_a_resample_is_left_out_there(caplog):
    def needs_both(predictions, references):
        if len(set(references.tolist())) < 2:
            raise ValueError("one class")
        return {"share": float(references.mean())}

    logits, labels = classes(3)
    labels = torch.tensor([0, 1, 0])
    found = evaluate_loop(Echo(), loader_of(logits, labels), needs_both, confidence=0.9)
    assert found["share_low"] == pytest.approx(1 / 3)
    assert found["share_high"] == pytest.approx(2 / 3)
    assert "share is not defined in some resamples, which its interval leaves out." in (
        messages(caplog)
    )


def test_decoded_texts_get_the_interval_of_means(caplog):
    logits, labels = classes()

    def decode(outputs, batch):
        names = ["no", "yes"]
        return (
            [names[number] for number in outputs["logits"].argmax(-1).tolist()],
            [names[number] for number in batch["labels"].tolist()],
        )

    plain = evaluate_loop(Echo(), loader_of(logits, labels), "accuracy", confidence=0.9)
    found = evaluate_loop(
        Echo(), loader_of(logits, labels), "exact_match", decode=decode, confidence=0.9
    )
    assert found["exact_match"] in (plain["accuracy"], 100 * plain["accuracy"])
    scale = found["exact_match"] / plain["accuracy"]
    for end in ("_low", "_high"):
        expected = scale * plain[f"accuracy{end}"]
        assert found[f"exact_match{end}"] == pytest.approx(expected, abs=0.02 * scale)
    assert not any("resamples" in line for line in messages(caplog))


def test_kept_columns_are_resampled_with_their_rows():

    data = rows(30).add_column("group", [number % 3 for number in range(30)])
    model = tiny_bert()
    loader = prepare_dataloaders(
        {"validation": data}, tiny_tokenizer(), model=model, keep=("group",)
    )
    seen = []

    def by_group(predictions, references, kept):
        seen.append(all(g % 2 == r for g, r in zip(kept["group"], references, strict=True)))
        assert len(kept["group"]) == len(references)
        groups = np.array(kept["group"])
        return {"first": float((groups == 0).mean())}

    found = evaluate_loop(model, loader["validation"], by_group, confidence=0.9)
    assert found["first"] == pytest.approx(1 / 3)
    assert found["first_low"] < 1 / 3 < found["first_high"]
    assert len(seen) > 1000


# The loss ----------------------------------------------------------------------------------------


def loss_interval(losses, items, confidence=0.9):
    parts = []
    order = np.lexsort((items, losses))
    losses, items = losses[order], items[order]
    for weights in resamples(np.ones(len(losses), int), 10_000):
        parts.append((weights * losses).sum(1) / (weights * items).sum(1))
    return interval_of(np.concatenate(parts), confidence)


HEADS = {
    "classes": lambda: (tiny_bert(), torch.arange(20) % 2),
    "values": lambda: (tiny_bert(num_labels=1), torch.arange(20) / 4),
    "several labels": lambda: (
        tiny_bert(num_labels=3, problem_type="multi_label_classification"),
        (torch.arange(60).reshape(20, 3) % 2).float(),
    ),
    "tokens": lambda: (tiny_bert(num_labels=3, kind=BertForTokenClassification), TOKENS % 3),
    "masked tokens": lambda: (tiny_bert(kind=BertForMaskedLM), TOKENS % 5),
    "next tokens": lambda: (gpt2(), TOKENS % 5),
}
TOKENS = torch.arange(20 * 6).reshape(20, 6) * 7 % 11


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=2))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_loss_of_each_row_is_known(head, batch_size):
    model, labels = HEADS[head]()
    labels = labels.clone()
    if labels.ndim == 2 and not labels.is_floating_point():
        labels[3, :] = -100  # a row without an item
        labels[5, 2:] = -100
    inputs = torch.arange(20 * 6).reshape(20, 6) * 5 % 13
    batches = [
        {
            "input_ids": inputs[start : start + batch_size],
            "labels": labels[start : start + batch_size],
        }
        for start in range(0, 20, batch_size)
    ]
    found = evaluate_loop(model, batches, confidence=0.9)
    model.eval()
    singles, items = [], []
    with torch.no_grad():
        for row in range(20):
            label = labels[row : row + 1]
            kept = label[:, 1:] if head == "next tokens" else label
            number = 1 if label.ndim == 1 else int((kept != -100).sum())
            loss = model(input_ids=inputs[row : row + 1], labels=label).loss if number else 0.0
            singles.append(float(loss) * number)
            items.append(number)
    expected = loss_interval(np.array(singles), np.array(items, float))
    assert (found["loss_low"], found["loss_high"]) == pytest.approx(expected[:2], rel=1e-4)
    assert found["loss"] == pytest.approx(sum(singles) / sum(items), rel=1e-5)


def test_a_perplexity_gets_an_interval():
    model, labels = HEADS["next tokens"]()
    batches = [{"input_ids": labels, "labels": labels}]
    found = evaluate_loop(model, batches, "perplexity", confidence=0.9)
    for end in ("", "_low", "_high"):
        assert found[f"perplexity{end}"] == pytest.approx(math.exp(found[f"loss{end}"]))


def plain(model, batch):
    return functional.cross_entropy(model(batch["x"])["logits"], batch["labels"])


def smoothed(model, batch):
    logits = model(batch["x"])["logits"]
    return functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)


def weighted(model, batch):
    logits = model(batch["x"])["logits"]
    weight = torch.tensor([1.0, 3.0])
    return functional.cross_entropy(logits, batch["labels"], weight), 1 + 2 * batch["labels"].sum()


@pytest.mark.parametrize("loss_fn", [plain, smoothed, weighted])
def test_a_loss_that_is_no_known_mean_gets_none_and_a_line(loss_fn, caplog):
    logits, labels = classes()
    model = Echo()
    for _ in range(2):
        found = evaluate_loop(
            model, loader_of(logits, labels), "accuracy", loss_fn=loss_fn, confidence=0.9
        )
        assert list(found) == ["loss", "accuracy", "accuracy_low", "accuracy_high"]
    lines = [line for line in messages(caplog) if "the loss has no interval" in line]
    assert lines == [
        "the loss has no interval: nothing tells the loss of each row. A loader of one row a batch "
        "does."
    ]


class Smoothed(BertForSequenceClassification):
    """A model of transformers that computes another loss: a head of its own."""

    def forward(self, input_ids, labels):
        logits = super().forward(input_ids).logits
        loss = functional.cross_entropy(logits, labels, label_smoothing=0.2)
        return {"loss": loss, "logits": logits}


def test_the_loss_of_a_head_of_your_own_is_not_guessed(caplog):
    """With balanced classes and one logit for all rows, the two losses have the same mean."""
    model = tiny_bert(kind=Smoothed)
    nn.init.zeros_(model.classifier.weight)
    nn.init.constant_(model.classifier.bias[:1], 1.0)
    inputs, labels = torch.full((8, 3), 5), torch.arange(8) % 2
    assert "loss_low" not in evaluate_loop(
        model, [{"input_ids": inputs, "labels": labels}], confidence=0.9
    )
    assert any("the loss has no interval" in line for line in messages(caplog))


@pytest.mark.parametrize("loss_fn", [plain, smoothed, weighted])
def test_a_loss_of_one_row_a_batch_gets_an_interval(loss_fn):
    logits, labels = classes()
    found = evaluate_loop(Echo(), loader_of(logits, labels, 1), loss_fn=loss_fn, confidence=0.9)
    single = [
        loss_fn(Echo(), {"x": x[None], "labels": y[None]})
        for x, y in zip(logits, labels, strict=True)
    ]
    pairs = [pair if isinstance(pair, tuple) else (pair, 1) for pair in single]
    items = np.array([float(number) for _, number in pairs])
    sums = np.array([float(mean.detach()) for mean, _ in pairs]) * items
    expected = loss_interval(sums, items)
    assert (found["loss_low"], found["loss_high"]) == pytest.approx(expected[:2], rel=1e-5)


# The call ----------------------------------------------------------------------------------------


def test_the_same_interval_for_any_batches_and_at_every_call():
    logits, labels = classes()
    found = [
        evaluate_loop(
            Echo(), loader_of(logits, labels, size), ["accuracy", agreement], confidence=0.9
        )
        for size in (1, 7, 7, 60)
    ]
    assert found[0] == found[1] == found[2] == found[3]


def test_global_generators_stay_as_they_are():
    logits, labels = classes()
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluate_loop(Echo(), loader_of(logits, labels), ["accuracy", agreement], confidence=0.9)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_several_loaders_have_intervals_of_their_own():
    loaders = {name: loader_of(*classes(seed=seed)) for seed, name in enumerate(("a", "b"))}
    found = evaluate_loop(Echo(), loaders, "accuracy", confidence=0.9)
    assert list(found) == [f"{n}_accuracy{end}" for n in "ab" for end in ("", "_low", "_high")]
    alone = evaluate_loop(Echo(), loaders["b"], "accuracy", confidence=0.9)
    assert {f"b_{key}": value for key, value in alone.items()}.items() <= found.items()


def test_an_interval_without_width_is_told(caplog):
    logits = torch.eye(2)[torch.zeros(20, dtype=torch.long)]
    loader = loader_of(logits, torch.zeros(20, dtype=torch.long))
    found = evaluate_loop(Echo(), loader, "accuracy", confidence=0.95)
    assert (found["accuracy_low"], found["accuracy_high"]) == (1, 1)
    assert messages(caplog)[-1] == (
        "the interval of accuracy has no width: it is the same in every resample of the 20 rows, "
        "which tells nothing of others."
    )


def test_a_name_that_is_taken_is_refused():
    def taken(predictions, references):
        return {"f1": 0.5, "f1_low": 0.4}

    with pytest.raises(MetricError, match="'f1_low' is the end of an interval"):
        evaluate_loop(Echo(), loader_of(*classes()), taken, confidence=0.9)


@pytest.mark.parametrize("confidence", [0, 1, 95, True, "0.95", math.nan])
def test_a_confidence_is_a_share(confidence):
    with pytest.raises(ConfigError, match="confidence must be a number between 0 and 1"):
        evaluate_loop(Echo(), loader_of(*classes()), "accuracy", confidence=confidence)


@pytest.mark.parametrize("best_metric", ["accuracy_low", "loss_high"])
def test_an_end_of_an_interval_may_decide(best_metric, caplog):

    model = tiny_bert()
    splits = {"train": rows(16), "validation": rows(12)}
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), model=model)
    evaluate = partial(evaluate_loop, model, loaders["validation"], "accuracy", confidence=0.9)
    result = train_loop(
        model,
        loaders["train"],
        num_epochs=2,
        evaluate=evaluate,
        best_metric=best_metric,
        progress_bar=False,
    )
    values = [r[f"eval_{best_metric}"] for r in result.history if "lr" not in r]
    best = max(values) if best_metric == "accuracy_low" else min(values)
    assert result.best_metrics[best_metric] == best
    which = "highest" if best_metric == "accuracy_low" else "lowest"
    assert any(f"the one with the {which} {best_metric}" in line for line in messages(caplog))
    assert "accuracy_low" not in repr(result)


def test_a_wrong_name_is_refused_before_the_first_update():

    model = tiny_bert()
    loaders = prepare_dataloaders(
        {"train": rows(16), "validation": rows(12)}, tiny_tokenizer(), model=model
    )
    evaluate = partial(evaluate_loop, model, loaders["validation"], "accuracy")
    for options in (
        {"evaluate": evaluate, "best_metric": "accuracy_low"},
        {"evaluate": partial(evaluate, confidence=95)},
    ):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ConfigError):
            train_loop(model, loaders["train"], num_epochs=1, progress_bar=False, **options)
        assert all(map(torch.equal, before, model.parameters()))
