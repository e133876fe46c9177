"""One pass makes a table: what each kind of metric gets of it, whatever shapes a batch has."""

from __future__ import annotations

import logging
import tracemalloc
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import tiny_bert, tiny_tokenizer
from sklearn.metrics import brier_score_loss
from torch import nn
from torch.utils.data import DataLoader

from manualloop import (
    ConfigError,
    DataError,
    MetricError,
    ModelError,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.batches import Kept
from manualloop.evaluation.losses import Losses
from manualloop.evaluation.table import Column
from manualloop.evaluation.trial import try_evaluation

WORDS = ["a", "cat", "dog", "and", "mouse", "sea", "one", "two"]


class Affine(nn.Module):
    """Logits are the input; the loss is theirs where there are labels of classes."""

    def __init__(self, **config):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        if config:
            self.config = SimpleNamespace(**config)
        self.num_calls = 0

    def forward(self, x, labels=None):
        self.num_calls += 1
        return {"logits": x + self.bias}


class Recorded:
    """A metric that keeps what it got."""

    __name__ = "recorded"

    def __call__(self, predictions, references):
        self.predictions, self.references = predictions, references
        return {"rows": len(predictions)}


def got(model, batches, **options):
    """What a function gets of some batches."""
    recorded = Recorded()
    evaluate_loop(model, batches, recorded, **options)
    return recorded.predictions, recorded.references


def one_hot(classes, num_classes=3):
    return nn.functional.one_hot(torch.as_tensor(classes), num_classes).float()


def plain(rows):
    return [np.asarray(row).tolist() for row in rows]


# What a metric gets -------------------------------------------------------------------------------


def test_a_function_gets_one_entry_a_row_without_the_ignored_tokens():
    classes = [torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([[1, 1]])]
    labels = [torch.tensor([[0, -100, 1], [2, -100, -100]]), torch.tensor([[-100, 0]])]
    batches = [{"x": one_hot(c, 4), "labels": t} for c, t in zip(classes, labels, strict=True)]
    predictions, references = got(Affine(), batches)
    assert plain(predictions) == [[0, 2], [2], [1]]
    assert plain(references) == [[0, 1], [2], [0]]
    assert evaluate_loop(Affine(), batches, "accuracy") == {"accuracy": 0.5}


def test_a_function_gets_arrays_for_one_label_a_row():
    batches = [
        {"x": one_hot([0, 1, 2]), "labels": torch.tensor([0, -100, 1])},
        {"x": one_hot([2]), "labels": torch.tensor([2])},
    ]
    predictions, references = got(Affine(), batches)
    assert isinstance(predictions, np.ndarray)
    assert (predictions.tolist(), references.tolist()) == ([0, 2, 2], [0, 1, 2])
    batches = [{**batch, "labels": batch["labels"][:, None]} for batch in batches]
    config = {"problem_type": "single_label_classification"}
    again, references = got(Affine(**config), batches)
    assert (again.tolist(), references.tolist()) == ([0, 2, 2], [0, 1, 2])


def test_several_labels_a_row_are_arrays():
    batch = {"x": torch.tensor([[1.0, -1], [2, 3]]), "labels": torch.tensor([[1.0, 0], [0, 1]])}
    predictions, references = got(Affine(), [batch])
    assert (predictions.tolist(), references.tolist()) == ([[1, 0], [1, 1]], [[1, 0], [0, 1]])
    assert references.dtype.kind == "i"


@pytest.mark.parametrize("width", [3, 4, 5])
def test_generated_texts_are_whole_whatever_their_length_is(width):
    labels = torch.tensor([[5, 6, -100, -100], [7, 8, 9, 1]])
    texts = torch.arange(2 * width).reshape(2, width)
    predictions, references = got(
        Affine(), [{"x": torch.zeros(2, 4, 3), "labels": labels}], postprocess=lambda o, b: texts
    )
    assert plain(predictions) == texts.tolist()
    assert plain(references) == [[5, 6], [7, 8, 9, 1]]


def test_texts_of_a_ctc_head_are_whole_even_if_there_are_as_many_frames_as_labels():
    class EarForCTC(Affine):
        pass

    labels = torch.tensor([[1, 2, -100], [1, -100, -100]])
    for frames in (3, 4):
        classes = torch.arange(2 * frames).reshape(2, frames) % 3
        batch = {"x": one_hot(classes), "labels": labels}
        predictions, references = got(EarForCTC(), [batch])
        assert plain(predictions) == classes.tolist()
        assert plain(references) == [[1, 2], [1]]
        with pytest.raises(MetricError, match="ctc have no place each"):
            evaluate_loop(EarForCTC(), [batch], "accuracy")


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        (torch.zeros(2, 3, 2).long(), torch.zeros(2, 6).long()),
        (torch.zeros(2, 3).long(), torch.tensor([[1, 1, 1, -100], [1, 1, 1, -100]])),
        (torch.zeros(2, 4).long(), torch.zeros(2).long()),
        (torch.zeros(2).long(), torch.zeros(2, 4).long()),
    ],
)
def test_numbers_that_happen_to_agree_are_no_alignment(predicted, labels):
    batches = [{"x": torch.zeros(2, 3), "labels": labels}]
    with pytest.raises(MetricError, match="batch 0 the shape of the predictions is") as caught:
        evaluate_loop(Affine(), batches, "accuracy", postprocess=lambda o, b: predicted)
    assert str(tuple(predicted.shape)) in str(caught.value)
    found, _ = got(Affine(), batches, postprocess=lambda o, b: predicted)
    assert plain(found) == predicted.tolist()


def test_predictions_of_another_number_of_rows_are_refused():
    batch = {"x": torch.zeros(2, 3), "labels": torch.zeros(2, 3).long()}
    with pytest.raises(DataError, match="6 predictions for a batch of 2 rows"):
        evaluate_loop(Affine(), [batch], "accuracy", postprocess=lambda o, b: torch.zeros(6).long())
    with pytest.raises(DataError, match=r"postprocess returned a list.*decode="):
        evaluate_loop(Affine(), [batch], "accuracy", postprocess=lambda o, b: [0, 1])


def test_a_causal_model_gives_a_function_the_tokens_that_come_next():
    class EchoForCausalLM(Affine):
        pass

    ids = torch.tensor([[1, 2, 0], [2, 2, 1]])
    labels = torch.tensor([[1, 2, 0], [-100, 2, -100]])
    predictions, references = got(EchoForCausalLM(), [{"x": one_hot(ids), "labels": labels}])
    assert plain(predictions) == [[1, 2], [2]]
    assert plain(references) == [[2, 0], [2]]


def test_pixels_that_the_model_ignores_are_left_out():
    class EyeForSemanticSegmentation(Affine):
        pass

    maps = torch.tensor([[[0, 1], [1, 0]]])
    labels = torch.tensor([[[0, 1], [255, 1]]])
    batch = {"x": one_hot(maps, 2).permute(0, 3, 1, 2), "labels": labels}
    model = EyeForSemanticSegmentation(semantic_loss_ignore_index=255, num_labels=2)
    assert evaluate_loop(model, [batch], "accuracy") == {"accuracy": 2 / 3}
    single = {"x": torch.tensor([[[[-1.0, 1], [1, -1]]]]), "labels": labels}
    model = EyeForSemanticSegmentation(num_labels=1)  # a binary cross-entropy: the sign decides
    assert evaluate_loop(model, [single], "accuracy") == {"accuracy": 2 / 3}


# The axis of the classes --------------------------------------------------------------------------


class Scorer(nn.Module):
    """Logits are the input, the classes second or last; the loss is that of torch."""

    def __init__(self, is_second, with_loss=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.is_second, self.with_loss = is_second, with_loss

    def forward(self, x, labels=None):
        logits = x * self.scale
        if labels is None or not self.with_loss:
            return {"logits": logits}
        ordered = logits if self.is_second else logits.movedim(-1, 1)
        return {"logits": logits, "loss": nn.functional.cross_entropy(ordered, labels)}


def images_of(shape, num_classes, is_second, seed=0):
    """Logits, their classes, and labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, num_classes, generator=generator)
    labels = torch.randint(-1, num_classes, shape, generator=generator)
    labels[labels < 0] = -100
    batch = {"x": logits.movedim(-1, 1) if is_second else logits, "labels": labels}
    return batch, logits.argmax(-1)


@pytest.mark.parametrize("is_second", [True, False])
@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (3, 5, 5), (5, 5, 5), (2, 4, 4, 4)])
@pytest.mark.parametrize("num_classes", [2, 4, 5])
def test_the_classes_are_where_torchs_loss_has_them(is_second, shape, num_classes):
    batch, classes = images_of(shape, num_classes, is_second)
    kept = batch["labels"] != -100
    model = Scorer(is_second)
    found = evaluate_loop(model, [batch], "accuracy") if kept.any() else {}
    if found:
        assert found["accuracy"] == float((classes == batch["labels"])[kept].double().mean())
    assert predict_loop(model, [batch]).predictions.tolist() == classes.tolist()


@pytest.mark.parametrize("is_second", [True, False])
def test_an_axis_that_nothing_tells_is_refused_with_both_fixes(is_second):
    batch, classes = images_of((2, 4, 4), 4, is_second)
    model = Scorer(is_second, with_loss=False)
    own = lambda model, batch: 0 * model(batch["x"])["logits"].mean()  # noqa: E731
    for options in ({}, {"loss_fn": own}):
        with pytest.raises(ModelError, match="last axis of the logits of shape") as caught:
            evaluate_loop(model, [batch], "accuracy", **options)
    fixes = str(caught.value).rstrip(".").split("postprocess=")[1:]
    postprocess = eval(fixes[is_second].split("; for")[0])
    predictions, _ = got(model, [batch], postprocess=postprocess)
    assert plain(predictions) == classes.tolist()
    with pytest.raises(ModelError, match="last axis of the logits"):
        predict_loop(model, [{"x": batch["x"]}])


def test_of_sentences_the_last_axis_is_taken_and_that_is_told(caplog):
    batch, classes = images_of((2, 4), 4, is_second=False)
    model = Scorer(is_second=False, with_loss=False)
    predictions, _ = got(model, [batch], decode=None)
    kept = batch["labels"] != -100
    assert plain(predictions) == [row[of].tolist() for row, of in zip(classes, kept, strict=True)]
    assert caplog.text.count("the last axis is taken") == 1
    assert "argmax(1)" in caplog.text


@pytest.mark.parametrize("is_second", [True, False])
def test_an_axis_that_a_batch_has_told_is_that_of_later_ones(is_second):
    batches, classes = zip(
        *(images_of((2, size), 4, is_second, size) for size in (3, 4, 4, 6)), strict=True
    )
    model = Scorer(is_second, with_loss=False)
    predictions, _ = got(model, list(batches), decode=None)
    kept = [batch["labels"] != -100 for batch in batches]
    expected = [
        row[of_row].tolist()
        for one, is_kept in zip(classes, kept, strict=True)
        for row, of_row in zip(one, is_kept, strict=True)
    ]
    assert plain(predictions) == expected


def test_the_axis_of_a_batch_without_labels_is_that_of_its_inputs():
    class Net(nn.Module):
        def __init__(self, is_second):
            super().__init__()
            self.table = nn.Embedding(9, 3)
            self.is_second = is_second

        def forward(self, ids):
            logits = self.table(ids)
            return logits.movedim(-1, 1) if self.is_second else logits

    ids = torch.tensor([[1, 2, 5, 4, 8], [3, 3, 7, 1, 2]])
    for is_second in (True, False):
        net = Net(is_second)
        expected = net.table(ids).argmax(-1).tolist()
        assert predict_loop(net, [{"ids": ids}]).predictions.tolist() == expected


def test_one_label_a_row_in_two_axes_has_probabilities():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    flat = evaluate_loop(Affine(), [{"x": x, "labels": labels}], ["log_loss", "accuracy"])
    batch = {"x": x, "labels": labels[:, None]}
    assert evaluate_loop(Affine(), [batch], ["log_loss", "accuracy"]) == flat
    decode = lambda outputs, batch: outputs["logits"].argmax(-1).tolist()  # noqa: E731
    assert evaluate_loop(Affine(), [batch], ["log_loss", "accuracy"], decode=decode) == flat
    tokens = {"x": x[:, None], "labels": labels[:, None]}  # a sentence of one token each
    assert evaluate_loop(Affine(), [tokens], "accuracy")["accuracy"] == flat["accuracy"]
    longer = {"x": x.reshape(2, 3, 3)[:, :2], "labels": labels.reshape(2, 3)[:, :2]}
    table = predict_loop(Affine(), [longer, tokens])
    assert table.scores is None
    assert len(table) == 8


# Arguments that would be ignored ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decode", "postprocess"])
@pytest.mark.parametrize("metric", [None, "perplexity"])
def test_predictions_that_no_metric_takes_are_refused(name, metric):
    batch = {"x": torch.zeros(2, 3), "labels": torch.zeros(2).long()}
    options = {name: lambda outputs, batch: [0, 1]}
    for call in (
        lambda: evaluate_loop(Affine(), [batch], metric, **options),
        lambda: try_evaluation(partial(evaluate_loop, Affine(), [batch], metric, **options)),
    ):
        with pytest.raises(ConfigError, match=f"{name} makes predictions, and no metric takes"):
            call()


def test_predictions_beside_a_metric_of_probabilities_alone_are_refused():
    batch = {"x": torch.randn(4, 2), "labels": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(ConfigError, match="decode returned predictions, and no metric takes them"):
        evaluate_loop(Affine(), [batch], "log_loss", decode=lambda o, b: [0, 1, 0, 1])
    with pytest.raises(ConfigError, match="postprocess returned predictions, and no metric"):
        evaluate_loop(
            Affine(), [batch], "log_loss", postprocess=lambda o, b: o["logits"].argmax(-1)
        )
    again = lambda o, b: ([0, 1, 0, 1], b["labels"].tolist())  # noqa: E731
    expected = evaluate_loop(Affine(), [batch], "log_loss")
    assert evaluate_loop(Affine(), [batch], "log_loss", decode=again) == expected


def test_probabilities_of_postprocess_come_before_those_of_the_logits():
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "labels": torch.arange(8) % 2}
    cooler = lambda outputs, batch: (outputs["logits"] / 3).softmax(-1)  # noqa: E731
    found = evaluate_loop(Affine(), [batch], "log_loss", postprocess=cooler)
    expected = nn.functional.cross_entropy(x / 3, batch["labels"])
    assert found["log_loss"] == pytest.approx(float(expected), rel=1e-6)
    for wrong, message in (
        (lambda o, b: o["logits"], "postprocess returned numbers from"),
        (lambda o, b: o["logits"].sigmoid() / 3, "not to 1"),
    ):
        with pytest.raises(MetricError, match=message):
            evaluate_loop(Affine(), [batch], "log_loss", postprocess=wrong)


def test_predictions_of_next_tokens_do_not_stand_beside_their_labels():
    class EchoForCausalLM(Affine):
        pass

    ids = torch.tensor([[1, 2, 0], [2, 2, 1]])
    batch = {"x": one_hot(ids), "labels": ids}
    plainly = lambda outputs, batch: outputs["logits"].argmax(-1)  # noqa: E731
    with pytest.raises(MetricError, match=r"next token.*Leave postprocess out"):
        evaluate_loop(EchoForCausalLM(), [batch], "accuracy", postprocess=plainly)
    assert got(EchoForCausalLM(), [batch], postprocess=plainly)[0] is not None  # may move them
    moved = lambda o, b: nn.functional.pad(plainly(o, b)[:, :-1], (1, 0), value=9)  # noqa: E731
    assert evaluate_loop(EchoForCausalLM(), [batch], "accuracy", postprocess=moved)
    constant = {"x": one_hot(0 * ids), "labels": ids}  # of which nobody can tell
    assert evaluate_loop(EchoForCausalLM(), [constant], "accuracy", postprocess=plainly)


def test_decoded_rows_of_other_lengths_are_counted():
    batch = {"x": torch.zeros(2, 3), "labels": torch.zeros(2).long()}
    decode = lambda o, b: ([["O"], ["B-A", "O"]], [["O"], ["B-A", "O"]])  # noqa: E731
    assert evaluate_loop(Affine(), [batch], "seqeval", decode=decode)["overall_f1"] == 1.0


def test_metrics_of_all_kinds_score_one_pass():
    pytest.importorskip("sklearn")
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=generator)
    labels = torch.randint(0, 2, (20,), generator=generator)
    batches = [{"x": x[i : i + 3], "labels": labels[i : i + 3]} for i in range(0, 20, 3)]
    model = Affine()
    right = lambda predictions, references: {"right": (predictions == references).sum()}  # noqa: E731
    found = evaluate_loop(model, batches, ["accuracy", "mse", "roc_auc", right])
    assert model.num_calls == 7
    number = int((x.argmax(-1) == labels).sum())
    assert found["accuracy"] == number / 20
    assert found["mse"] == pytest.approx(1 - number / 20)
    assert found["right"] == number
    assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, x.softmax(-1)[:, 1]))
    assert evaluate_loop(model, batches, "accuracy") == {"accuracy": found["accuracy"]}


# decode -------------------------------------------------------------------------------------------


def sentences(num_rows):
    draws = np.random.default_rng(num_rows)
    texts = [" ".join(draws.choice(WORDS, size=1 + draws.integers(9))) for _ in range(num_rows)]
    columns = {"text": texts, "label": [n % 2 for n in range(num_rows)]}
    return Dataset.from_dict({**columns, "id": [f"row {n}" for n in range(num_rows)]})


def lengths_of(outputs, batch):
    """A dict a row, which does not depend on the padding."""
    return [
        {"length": int(mask.sum()), "id": i}
        for mask, i in zip(batch["attention_mask"], batch["id"], strict=True)
    ]


@pytest.mark.parametrize("num_rows", [1, 2, 5, 17])
def test_decoded_objects_are_in_the_order_of_the_dataset(num_rows):
    data, tokenizer, model = sentences(num_rows), tiny_tokenizer(), tiny_bert()
    ids = tokenizer(data["text"][:])["input_ids"]
    expected = [{"length": len(row), "id": f"row {n}"} for n, row in enumerate(ids)]
    for batch_size in range(1, 6):
        splits = {"train": data, "validation": data}
        loaders = prepare_dataloaders(
            splits, tokenizer, model=model, batch_size=batch_size, keep="id"
        )
        for name, loader in loaders.items():
            predictions, references = got(model, loader, decode=lengths_of)
            assert predictions == expected, (batch_size, name)
            assert references == data["label"][:]
        table = predict_loop(model, loaders["train"], decode=lengths_of)
        assert table.predictions == expected
        assert table.kept["id"] == data["id"][:]
        assert table.references.tolist() == data["label"][:]
        assert table.scores.shape == (num_rows, 2)


def test_a_function_gets_kept_columns_of_the_same_rows():
    data, model = sentences(9), tiny_bert()
    loader = prepare_dataloaders(
        {"test": data}, tiny_tokenizer(), model=model, batch_size=2, keep=("id", "text")
    )["test"]

    def check(predictions, references, kept):
        assert list(kept["id"]) == data["id"][:]
        assert list(kept["text"]) == data["text"][:]
        return len(predictions)

    assert evaluate_loop(model, loader, check)["check"] == 9


def test_kept_columns_leave_out_rows_without_a_label():
    from manualloop.batches import Kept

    batch = {"x": one_hot([0, 1]), "labels": torch.tensor([-100, 1]), "id": Kept(["a", "b"])}

    def ids(predictions, references, kept):
        assert (predictions.tolist(), references.tolist(), kept) == ([1], [1], {"id": ["b"]})
        return 1

    evaluate_loop(Affine(), [batch], ids)


def test_kept_columns_can_be_all_that_there_is_to_compare_with():
    from manualloop.batches import Kept

    batch = {"x": one_hot([0, 1]), "id": Kept(["a", "b"])}

    def ids(predictions, references, kept):
        assert (references, kept) == ([None, None], {"id": ["a", "b"]})
        return {"right": float(predictions == ["A", "B"])}

    decode = lambda outputs, batch: [i.upper() for i in batch["id"]]  # noqa: E731
    assert evaluate_loop(Affine(), [batch], ids, decode=decode) == {"right": 1.0}
    with pytest.raises(DataError, match="needs labels"):
        evaluate_loop(Affine(), [batch], lambda p, r: 1, decode=decode)


def test_two_lists_are_predictions_and_references():
    batches = [{"x": torch.zeros(n, 2)} for n in (2, 1)]  # no labels
    pairs = iter([(["a", "b"], ["a", "c"]), (["d"], ["d"])])
    predictions, references = got(Affine(), batches, decode=lambda o, b: next(pairs))
    assert (predictions, references) == (["a", "b", "d"], ["a", "c", "d"])
    table = predict_loop(Affine(), batches[:1], decode=lambda o, b: (["a", "b"], [{"x": 1}, None]))
    assert (table.predictions, table.references) == (["a", "b"], [{"x": 1}, None])


def test_two_lists_come_for_every_batch_or_for_none():
    batch = {"x": torch.zeros(2, 2), "labels": torch.zeros(2).long()}
    for results in ([(["a", "b"], ["a", "b"]), ["a", "b"]], [["a", "b"], (["a", "b"], ["a", "b"])]):
        found = iter(results)
        with pytest.raises(DataError, match=r"references of batch 1 are .*for every batch"):
            got(Affine(), [batch, batch], decode=lambda outputs, batch, found=found: next(found))


def test_integer_targets_of_several_classes_are_named():
    batch = {"x": torch.zeros(2, 3), "labels": torch.ones(2, 3).long()}
    with pytest.raises(MetricError, match="0 or 1 for each class are floats"):
        evaluate_loop(Affine(), [batch], "f1/macro")
    batch["labels"] = batch["labels"].float()
    assert evaluate_loop(Affine(), [batch], "f1/macro") == {"f1_macro": 0.0}


def test_tags_are_scored_by_spans():
    seqeval = pytest.importorskip("seqeval.metrics")
    names = ["O", "B-PER", "I-PER"]
    gold = torch.tensor([[0, 1, -100], [1, 2, 0]])
    found = torch.tensor([[0, 1, 0], [1, 0, 0]])

    def tags(outputs, batch):
        of_rows = zip(outputs["logits"].argmax(-1).tolist(), batch["labels"].tolist(), strict=True)
        pairs = [[(p, t) for p, t in zip(*row, strict=True) if t != -100] for row in of_rows]
        sides = ([[names[pair[side]] for pair in row] for row in pairs] for side in (0, 1))
        return tuple(sides)

    batches = [{"x": one_hot(found[n : n + 1]), "labels": gold[n : n + 1]} for n in range(2)]
    span_f1 = lambda predictions, references: seqeval.f1_score(references, predictions)  # noqa: E731
    scores = evaluate_loop(Affine(), batches, [span_f1, "seqeval"], decode=tags)
    expected = seqeval.f1_score(
        [["O", "B-PER"], ["B-PER", "I-PER", "O"]], [["O", "B-PER"], ["B-PER", "O", "O"]]
    )
    assert scores["metric"] == expected
    assert expected in scores.values()


def test_labels_that_are_lists_of_objects_are_references():
    boxes = [{"boxes": torch.ones(1, 4)}, {"boxes": torch.zeros(0, 4)}]
    batch = {"x": torch.zeros(2, 2), "labels": boxes}
    predictions, references = got(Affine(), [batch], decode=lambda o, b: [{"n": 1}, {"n": 0}])
    assert [len(row["boxes"]) for row in references] == [1, 0]
    assert predictions == [{"n": 1}, {"n": 0}]


def test_a_metric_of_classes_takes_decoded_numbers_and_refuses_texts():
    batch = {"x": one_hot([0, 1], 2), "labels": torch.tensor([0, 0])}
    numbers = lambda outputs, batch: outputs["logits"].argmax(-1).tolist()  # noqa: E731
    assert evaluate_loop(Affine(), [batch], "accuracy", decode=numbers) == {"accuracy": 0.5}
    with pytest.raises(MetricError, match="accuracy scores one class a row, and decode made a str"):
        evaluate_loop(Affine(), [batch], "accuracy", decode=lambda o, b: ["a", "b"])
    with pytest.raises(MetricError, match=r"made a float of row 0 of the references: 0\.5"):
        evaluate_loop(Affine(), [batch], "f1", decode=lambda o, b: ([1, 0], [0.5, 1]))
    values = lambda outputs, batch: [0.5, 1]  # noqa: E731
    assert evaluate_loop(Affine(), [batch], "mse", decode=values) == {"mse": 0.625}
    auc = evaluate_loop(
        Affine(),
        [batch | {"labels": torch.tensor([0, 1])}],
        ["roc_auc", lambda predictions, references: {"texts": len(set(predictions))}],
        decode=lambda o, b: ["a", "b"],
    )
    assert auc == {"roc_auc": 1.0, "texts": 2.0}


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (["a"], "1 objects"),
        (["a"] * 3, "3 objects"),
        ("ab", "a str"),
        (None, "a NoneType"),
        (torch.zeros(2), r"a Tensor of shape \(2,\)"),
        (np.zeros(2), r"a ndarray of shape \(2,\)"),
        ({"a": 1, "b": 2}, "a dict"),
        (("a", "b"), "a str"),
        ((["a", "b"], ["a"]), "1 objects"),
        ((["a", "b"], ["a", "b"], ["a", "b"]), "a tuple"),
        (iter(["a", "b"]), "a list_iterator"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_one_object_a_row_is_refused(result, found):
    batch = {"x": torch.zeros(2, 2), "labels": torch.zeros(2).long()}
    for loop in (partial(evaluate_loop, metric=Recorded()), predict_loop):
        with pytest.raises(DataError, match=f"decode returned {found} for a batch of 2 rows"):
            loop(Affine(), [batch], decode=lambda outputs, batch: result)


def test_decode_and_postprocess_exclude_each_other():
    for loop in (evaluate_loop, predict_loop):
        with pytest.raises(ConfigError, match="not both"):
            loop(Affine(), [], decode=lambda o, b: [], postprocess=lambda o, b: torch.zeros(0))


def test_decoded_views_do_not_keep_the_outputs():
    batch = {"x": torch.zeros(3, 1000), "labels": torch.zeros(3).long()}

    def decode(outputs, batch):
        return [{"first": row[:2], "all": (row[0], 1)} for row in outputs["logits"]]

    predictions, _ = got(Affine(), [batch], decode=decode)
    assert [row["first"].untyped_storage().nbytes() for row in predictions] == [8, 8, 8]
    assert all(row["all"][0].untyped_storage().nbytes() == 4 for row in predictions)


def test_decode_is_tried_before_the_first_update():
    class Counted:
        def __init__(self):
            self.calls = []

        def __call__(self, outputs, batch):
            self.calls.append(len(batch["x"]))
            return ["text"] if len(batch["x"]) == 4 else ["text"] * len(batch["x"])

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, labels):
            logits = self.linear(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def train(rows, decode):
        model = Net()
        data = [{"x": torch.ones(rows, 3), "labels": torch.zeros(rows).long()}]
        own = lambda predictions, references: {"rows": len(predictions)}  # noqa: E731
        evaluate = partial(evaluate_loop, model, data, own, decode=decode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train_loop(
            model,
            data,
            optimizer,
            num_epochs=1,
            evaluate=evaluate,
            progress_bar=False,
            on_step=lambda s: steps.append(1),
        )

    steps, decode = [], Counted()
    with pytest.raises(DataError, match="1 objects for a batch of 4 rows"):
        train(4, decode)
    assert steps == []
    decode = Counted()
    train(2, decode)
    assert (steps, decode.calls) == ([1], [2])  # of the trial nothing remains


# Columns of logits and targets --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "labels"),
    [
        (torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 0])),
        (torch.tensor([[2.0], [-1.0]]), torch.tensor([[1], [0]])),
        (torch.tensor([2.0, -1.0]), torch.tensor([1, 0])),
        (torch.tensor([2.0]), torch.tensor([1])),
        (torch.zeros(2, 3, 1), torch.zeros(2, 3).long()),
    ],
)
def test_an_argmax_over_one_logit_is_refused(x, labels, monkeypatch):
    batch = {"x": x, "labels": labels}
    with pytest.raises(ModelError, match="always class 0") as caught:
        evaluate_loop(Affine(), [batch], "accuracy")
    fix = str(caught.value).partition("postprocess=")[2].partition(". For a")[0]
    scores = evaluate_loop(Affine(), [batch], "accuracy", postprocess=eval(fix))
    assert scores == {"accuracy": 1.0}
    with pytest.raises(ModelError, match="always class 0"):
        predict_loop(Affine(), [batch])
    labelled = {**batch, "labels": batch["labels"].float()}  # the other fix
    if x.ndim == 2:
        assert evaluate_loop(Affine(), [labelled], "mse")["mse"] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.long, torch.float])
def test_one_logit_is_predicted_by_its_sign_where_the_problem_type_tells(dtype):
    batch = {"x": torch.tensor([[2.0], [-1.0], [3.0]]), "labels": torch.tensor([1, 0, 0]).to(dtype)}
    model = Affine(problem_type="multi_label_classification")
    assert evaluate_loop(model, [batch], "accuracy") == {"accuracy": pytest.approx(2 / 3)}
    model = Affine(problem_type="regression")
    assert evaluate_loop(model, [batch], "mse")["mse"] == pytest.approx((1 + 1 + 9) / 3)


def targets(*values):
    labels = torch.tensor(values)
    return {"x": labels + 1, "labels": labels}


def test_values_decide_whether_targets_are_classes():
    two = targets([0.7, 1.0], [2.5, -1.0])
    assert evaluate_loop(Affine(), [two], ["mse", "mae"]) == pytest.approx({"mse": 1.0, "mae": 1.0})
    assert predict_loop(Affine(), [two]).predictions.tolist() == two["x"].tolist()
    soft = targets([0.25, 0.5])
    assert evaluate_loop(Affine(), [soft], "mse") == {"mse": 1.0}
    classes = targets([0.0, 1.0], [1.0, 1.0])
    assert evaluate_loop(Affine(), [classes], "f1/macro")["f1_macro"] == pytest.approx(5 / 6)
    assert predict_loop(Affine(), [classes]).predictions.tolist() == [[1, 1], [1, 1]]


def test_the_problem_type_of_a_model_comes_first():
    classes = targets([0.0, 1.0], [1.0, 1.0])
    model = Affine(problem_type="regression")
    assert evaluate_loop(model, [classes], "mse") == {"mse": 1.0}
    two = targets([0.7, 1.0])
    model = Affine(problem_type="multi_label_classification")
    with pytest.raises(MetricError, match="integers"):
        evaluate_loop(model, [two], "f1/macro")  # 0.7 is no class


def test_values_may_come_in_a_later_batch():
    classes, two = targets([0.0, 1.0]), targets([0.5, 3.0])
    assert evaluate_loop(Affine(), [two, classes], "mse") == {"mse": 1.0}
    for loop in (partial(evaluate_loop, metric="mse"), predict_loop):
        with pytest.raises(DataError, match="batch 1 are those of a regression") as caught:
            loop(Affine(), [classes, two])
    assert "postprocess=" in str(caught.value)
    values = lambda outputs, batch: outputs["logits"]  # noqa: E731
    assert evaluate_loop(Affine(), [classes, two], "mse", postprocess=values) == {"mse": 1.0}


# Memory and order ---------------------------------------------------------------------------------


def test_a_row_of_classes_takes_few_bytes():
    tracemalloc.start()
    try:
        column, losses = Column(), Losses()
        before, _ = tracemalloc.get_traced_memory()
        for number in range(4096):
            column.add(np.full(8, number))
            losses.means.append(0.5)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / (8 * 4096) < 16


def test_rows_of_different_widths_come_back_as_they_were():
    column = Column()
    parts = [np.arange(n * w).reshape(n, w) for n, w in [(2, 3), (1, 3), (2, 5), (1, 3)] * 200]
    rows = [row.tolist() for part in parts for row in part]
    for part in parts:
        column.add(part)
    assert plain(column.rows(None)) == rows
    assert len(column) == len(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    assert plain(column.rows(order)) == [rows[number] for number in order]
    padded = column.array(order, pads=True)
    assert padded.tolist() == [(rows[n] + [-100] * 5)[:5] for n in order]
    assert column.array(None) is None


def test_rows_of_a_shuffled_loader_are_in_order_for_values_and_functions():
    x = torch.arange(10.0)
    data = [{"x": value[None], "labels": value} for value in x]
    loader = prepare_dataloaders(
        {"train": Dataset.from_dict({"x": x[:, None].tolist(), "label": x.tolist()})}, batch_size=3
    )["train"]
    assert len(data) == 10
    predictions, references = got(Affine(), loader)
    assert predictions.tolist() == references.tolist() == x.tolist()


def test_an_order_that_nobody_knows_is_left_as_it_is():
    data = [{"x": one_hot(n % 3), "labels": torch.tensor(n % 3)} for n in range(9)]
    loader = DataLoader(data, batch_size=2, sampler=[3, 1, 2])
    predictions, references = got(Affine(), loader)
    assert predictions.tolist() == references.tolist() == [0, 1, 2]


def test_nan_of_probabilities_is_told_with_decode(caplog):
    caplog.set_level(logging.INFO, logger="manualloop")
    batch = {"x": torch.tensor([[float("nan"), 0.0], [1.0, 0.0]]), "labels": torch.tensor([0, 1])}
    predict_loop(Affine(), [batch], decode=lambda o, b: ["a", "b"])
    assert "the logits of 1 row are NaN" in caplog.text


# Metrics that would be given something else than they ask for -------------------------------------


def test_a_threshold_of_torchmetrics_is_one_of_probabilities():
    classification = pytest.importorskip("torchmetrics").classification
    draw = torch.Generator().manual_seed(3)
    logits, two = torch.randn(20, 3, generator=draw), torch.randn(20, 2, generator=draw)
    labels, classes = (logits.roll(1, 0) > 0).float(), (two.roll(1, 0)[:, 1] > 0).long()
    several = [{"x": logits[i : i + 7], "labels": labels[i : i + 7]} for i in (0, 7, 14)]
    of_two = [{"x": two[i : i + 7], "labels": classes[i : i + 7]} for i in (0, 7, 14)]
    for threshold in (0.2, 0.5, 0.7):
        metric = classification.MultilabelF1Score(3, threshold=threshold)
        expected = metric(logits.sigmoid(), labels.long()).item()
        assert evaluate_loop(Affine(), several, metric)["multilabel_f1_score"] == expected
        metric = classification.BinaryF1Score(threshold=threshold)
        expected = metric(two.softmax(-1)[:, 1], classes).item()
        assert evaluate_loop(Affine(), of_two, metric)["binary_f1_score"] == expected
        function = partial(
            pytest.importorskip("torchmetrics").functional.f1_score,
            task="binary",
            threshold=threshold,
        )
        assert evaluate_loop(Affine(), of_two, function)["f1_score"] == expected


def test_an_exact_match_of_torchmetrics_is_one_of_rows():
    classification = pytest.importorskip("torchmetrics").classification
    labels = [[0, 1, 2, -100], [2, 2, -100, -100], [0, -100, -100, -100]]
    predicted = [[0, 1, 2, 1], [2, 1, 0, 0], [0, 0, 0, 0]]
    data = [
        {"x": one_hot(predicted[:2]), "labels": torch.tensor(labels[:2])},
        {"x": one_hot(predicted[2:])[:, :2], "labels": torch.tensor(labels[2:])[:, :2]},
    ]
    metric = classification.MulticlassExactMatch(3)
    scores = evaluate_loop(Affine(), data, metric)
    assert scores["multiclass_exact_match"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["logits", "probs", "pred_scores", "likely"])
def test_a_function_of_logits_is_refused_where_it_gets_classes(name):
    names = {}
    exec(f"def own({name}, labels): return len({name})", names)
    data = [{"x": one_hot([0, 1, 2]), "labels": torch.tensor([0, 1, 1])}]
    if name == "likely":  # a name that tells nothing
        assert evaluate_loop(Affine(), data, names["own"])["own"] == 3
        return
    with pytest.raises(ConfigError, match=f"own has a parameter {name!r}") as caught:
        evaluate_loop(Affine(), data, ["accuracy", names["own"]])
    fix = str(caught.value).partition("pass decode=")[2].rstrip(".")
    for model in (Affine(), Returns(lambda x: x)):
        assert evaluate_loop(model, data, names["own"], decode=eval(fix))["own"] == 3
    by_function = evaluate_loop(Affine(), data, names["own"], postprocess=lambda o, b: o["logits"])
    assert by_function["own"] == 3


def test_a_function_of_logits_is_refused_before_the_first_update():
    model, data = nn.Linear(3, 2), [{"input": torch.ones(4, 3), "labels": torch.zeros(4).long()}]
    before = model.weight.detach().clone()
    with pytest.raises(ConfigError, match="_of_logits has a parameter 'logits'"):
        train_loop(
            model,
            data,
            num_epochs=1,
            loss_fn=lambda model, batch: model(batch["input"]).mean(),
            evaluate=partial(evaluate_loop, model, data, _of_logits),
            progress_bar=False,
        )
    assert torch.equal(before, model.weight)


def _of_logits(logits, labels):
    raise AssertionError


def test_a_function_of_probabilities_gets_kept_columns():
    kept = Kept(["a", "b", "c"])
    data = [{"x": one_hot([0, 1, 1], 2), "labels": torch.tensor([0, -100, 1]), "id": kept}]
    got = {}

    def own(y_true, y_score, kept):
        got.update(y_true=y_true.tolist(), rows=len(y_score), kept=kept)
        return 0.0

    evaluate_loop(Affine(), data, own)
    assert got == {"y_true": [0, 1], "rows": 2, "kept": {"id": ["a", "c"]}}


def test_a_score_of_the_name_of_the_loss_is_refused():
    data = [{"x": torch.ones(2, 1), "labels": torch.ones(2, 1)}]
    loss_fn = lambda model, batch: model(batch["x"])["logits"].mean()  # noqa: E731
    own = lambda predictions, references: {"loss": 7.0}  # noqa: E731
    with pytest.raises(MetricError, match=r"the key of the model's loss \(1\)"):
        evaluate_loop(Affine(), data, own, loss_fn=loss_fn)
    assert evaluate_loop(Affine(), data, own) == {"loss": 7.0}  # there is no other


def test_loaders_whose_results_have_the_same_key_are_refused():
    data = [{"x": torch.ones(2, 1), "labels": torch.ones(2, 1)}]
    own = lambda predictions, references: {"b_rows": 2.0, "rows": 1.0}  # noqa: E731
    with pytest.raises(ConfigError, match="Two loaders have a result 'a_b_rows'"):
        evaluate_loop(Affine(), {"a": data, "a_b": data}, own)


# Fixes that run -----------------------------------------------------------------------------------


class Returns(nn.Module):
    """Makes any outputs of the logits."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    "make", [lambda x: (x, 1), lambda x: {"hidden": x}, lambda x: [None, x]], ids=["1", "2", "3"]
)
@pytest.mark.parametrize(
    ("labels", "metric", "expected"),
    [
        (torch.tensor([0, 1, 1]), "accuracy", 2 / 3),
        (one_hot([0, 1, 1]), "accuracy", 2 / 3),
        (one_hot([0, 1, 1]) * 2, "mse", 7 / 9),
    ],
)
def test_outputs_without_logits_have_a_fix_that_runs(make, labels, metric, expected):
    model, data = Returns(make), [{"x": one_hot([0, 1, 2]), "labels": labels}]
    with pytest.raises(ModelError, match="has no logits to predict from") as caught:
        evaluate_loop(model, data, metric)
    fix = str(caught.value).partition("postprocess=")[2].rstrip(".")
    scores = evaluate_loop(model, data, metric, postprocess=eval(fix))
    assert scores[metric] == pytest.approx(expected)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: {"logits": x}], ids=["tensor", "dict"])
def test_one_logit_with_labels_that_are_floats_has_a_fix_that_runs(make):
    model, data = Returns(make), [{"x": torch.tensor([0.2, -1.0, 3.0]), "labels": torch.ones(3)}]
    with pytest.raises(MetricError, match="labels that are floats make this") as caught:
        evaluate_loop(model, data, ["accuracy", "f1"])
    fix = str(caught.value).partition("postprocess=")[2].rstrip(".")
    scores = evaluate_loop(model, data, ["accuracy", "f1"], postprocess=eval(fix))
    assert scores == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(0.8)}


def test_a_lone_row_may_have_lost_its_axis():
    x, labels = torch.arange(7.0)[:, None], torch.zeros(7)
    data = [{"x": x[i : i + 3], "labels": labels[i : i + 3]} for i in (0, 3, 6)]
    model = Returns(lambda x: x.squeeze())
    assert evaluate_loop(model, data, "mse")["mse"] == pytest.approx(13.0)
    assert predict_loop(model, data).predictions.tolist() == list(range(7))


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 1, 0]), torch.tensor([0.0, 1.0, 1.0, 0.0])])
@pytest.mark.parametrize("width", [(), (1,)])
def test_probabilities_of_one_logit_come_from_postprocess(labels, width):
    torchmetrics = pytest.importorskip("torchmetrics")
    logits = torch.tensor([-1.0, 0.5, -0.7, -3.0]).reshape(4, *width)
    data = [{"x": logits[i : i + 3], "labels": labels[i : i + 3]} for i in (0, 3)]
    metrics = [
        "roc_auc",
        torchmetrics.classification.BinaryF1Score(threshold=0.3),
        torchmetrics.classification.BinaryRecall(),
        brier_score_loss,
    ]
    scores = evaluate_loop(
        Affine(), data, metrics, postprocess=lambda outputs, batch: outputs["logits"].sigmoid()
    )
    probabilities = logits.reshape(-1).sigmoid()
    assert scores == {
        "roc_auc": 1.0,
        "binary_f1_score": 1.0,
        "binary_recall": 0.5,
        "brier_score_loss": pytest.approx(((probabilities - labels) ** 2).mean().item()),
    }
    with pytest.raises(MetricError, match="scores probabilities of classes"):
        evaluate_loop(Affine(), data, "roc_auc", postprocess=lambda o, batch: o["logits"])
