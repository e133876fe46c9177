"""Evaluation reads the longest rows first; what comes out is the dataset's, row by row."""

from itertools import groupby

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import WORDS, rows, tiny_bert, tiny_tokenizer
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import BertForQuestionAnswering, BertForTokenClassification

from manualloop import DataError, evaluate_loop, predict_loop, prepare_dataloaders
from manualloop.evaluation import passes

NUM_ROWS = 37


def texts(num_rows=NUM_ROWS):
    draws = np.random.default_rng(0)
    return [" ".join(draws.choice(WORDS, size=1 + draws.integers(12))) for _ in range(num_rows)]


def sentences(**columns):
    labels = columns or {"label": [number % 2 for number in range(NUM_ROWS)]}
    return {"validation": Dataset.from_dict({"sentence": texts(), **labels})}


def loader_of(data, tokenizer=None, **options):
    options = {"batch_size": 4, **options}
    return prepare_dataloaders(data, tokenizer or tiny_tokenizer(), **options)["validation"]


def as_it_is(loader):
    """The same batches from a loader that is not a prepared one."""
    return DataLoader(loader.dataset, 4, collate_fn=loader.collate_fn)


def telling(**config):
    """A model that predicts all classes: its weights are large."""
    return tiny_bert(initializer_range=0.5, **config)


class Counting(torch.nn.Module):
    """Counts the tokens that go through a model, and the rows of a batch."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.shapes = model, model.config, []

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None):
        self.shapes.append(tuple(input_ids.shape))
        return self.model(input_ids, attention_mask, token_type_ids, labels=labels)


def tried(model, loader):
    """A model that was evaluated: the first batch of the first time is run in parts as well."""
    evaluate_loop(model, loader, "accuracy")
    model.shapes = []
    return model


class Loose(Counting):
    """Takes a box as well."""

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None, box=None):
        return self.model(input_ids, attention_mask, token_type_ids, labels=labels)


class InBatch(torch.nn.Module):
    """A model whose own loss compares the rows of a batch."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 4)

    def forward(self, input_ids, attention_mask, token_type_ids=None, labels=None):
        mean = (self.embedding(input_ids) * attention_mask[..., None]).sum(1)
        return {"loss": torch.nn.functional.cross_entropy(mean @ mean.T, torch.arange(len(mean)))}


class Recording:
    """A metric that keeps what it got."""

    __name__ = "recording"

    def __call__(self, predictions, references):
        self.got = predictions, references
        return 0.5


def evaluated(model, loader, metric="accuracy", **options):
    recording = Recording()
    scores = evaluate_loop(model, loader, [metric, recording], **options)
    return scores, recording.got


@pytest.mark.parametrize("num_workers", [0, 2])
def test_scores_and_rows_are_those_of_the_datasets_order(num_workers):
    loader = loader_of(sentences(), num_workers=num_workers)
    model = telling()
    expected, (predictions, references) = evaluated(model, as_it_is(loader))
    found, got = evaluated(model, loader)
    assert found["loss"] == pytest.approx(expected.pop("loss"), abs=1e-7)
    assert {**found, "loss": 0} == {**expected, "loss": 0}
    assert 0 < found["accuracy"] < 1
    assert np.array_equal(got[0], predictions)
    assert np.array_equal(got[1], references)
    assert references.tolist() == [number % 2 for number in range(NUM_ROWS)]


def test_predictions_are_in_the_datasets_order():
    loader = loader_of(sentences())
    model = telling()
    expected, found = predict_loop(model, as_it_is(loader)), predict_loop(model, loader)
    assert found.index.tolist() == list(range(NUM_ROWS))
    assert np.array_equal(found.predictions, expected.predictions)
    assert np.array_equal(found.references, expected.references)
    assert np.abs(found.scores - expected.scores).max() < 1e-6
    assert len(set(found.predictions.tolist())) == 2


def test_little_is_padding_and_no_batch_is_larger_than_the_loaders_own():
    loader = loader_of(sentences(), batch_size=8)
    real = int(loader.dataset.lengths(["input_ids"]).sum())
    model = tried(Counting(telling()), loader)
    evaluate_loop(model, loader, "accuracy")
    shapes, widest = model.shapes, loader.dataset.lengths(["input_ids"]).max()
    assert sum(rows for rows, _ in shapes) == NUM_ROWS
    assert [width for _, width in shapes] == sorted((w for _, w in shapes), reverse=True)
    assert shapes[0][1] == widest
    assert max(rows * width for rows, width in shapes) <= 8 * widest
    assert sum(rows * width for rows, width in shapes) < 1.15 * real
    model.shapes = []
    evaluate_loop(model, as_it_is(loader), "accuracy")
    assert sum(rows * width for rows, width in model.shapes) > 1.3 * real


def test_the_loader_itself_keeps_the_datasets_order():
    loader = loader_of(sentences())
    evaluate_loop(telling(), loader, "accuracy")
    ids = [row for batch in loader for row in batch["input_ids"].tolist()]
    tokens = tiny_tokenizer()(texts())["input_ids"]
    assert [[i for i in row if i] for row in ids] == tokens


def test_a_shuffled_loader_is_scored_in_the_datasets_order():
    data = {"train": sentences()["validation"]}
    loader = prepare_dataloaders(data, tiny_tokenizer(), batch_size=4)["train"]
    _, (_, references) = evaluated(telling(), loader)
    assert references.tolist() == [number % 2 for number in range(NUM_ROWS)]


def test_rows_without_labels_are_left_out_in_order():
    labels = [-100 if number % 5 == 0 else number % 2 for number in range(NUM_ROWS)]
    loader = loader_of(sentences(labels=labels))
    _, (predictions, references) = evaluated(telling(), loader)
    _, expected = evaluated(telling(), as_it_is(loader))
    assert references.tolist() == [label for label in labels if label != -100]
    assert np.array_equal(predictions, expected[0])


def test_tokens_are_in_the_datasets_order():
    tokens = tiny_tokenizer()(texts())["input_ids"]
    labels = [[-100 if n % 3 == 0 else n % 2 for n in range(len(row))] for row in tokens]
    data = {"validation": Dataset.from_dict({"input_ids": tokens, "labels": labels})}
    loader = loader_of(data, task="token_classification")
    model = telling(kind=BertForTokenClassification)
    expected, got = evaluated(model, as_it_is(loader))
    found, ours = evaluated(model, loader)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-7)
    kept = [[label for label in row if label != -100] for row in labels]
    assert [row.tolist() for row in ours[1]] == kept
    assert [row.tolist() for row in ours[0]] == [row.tolist() for row in got[0]]
    table, plain = predict_loop(model, loader), predict_loop(model, as_it_is(loader))
    for row, length in enumerate(map(len, tokens)):
        for column in ("predictions", "references"):
            ours, theirs = getattr(table, column)[row], getattr(plain, column)[row]
            assert np.array_equal(ours[:length], theirs[:length])


@pytest.mark.parametrize(
    ("labels", "config", "metric"),
    [
        ([number / 7 for number in range(NUM_ROWS)], {"num_labels": 1}, "pearson"),
        ([[n % 2, 1, n % 3 // 2] for n in range(NUM_ROWS)], {"num_labels": 3}, "f1/macro"),
    ],
)
def test_other_tasks_score_the_same(labels, config, metric):
    loader, model = loader_of(sentences(label=labels)), telling(**config)
    expected, (predictions, references) = evaluated(model, as_it_is(loader), metric)
    found, got = evaluated(model, loader, metric)
    assert found == pytest.approx(expected, abs=1e-5)
    assert np.allclose(got[0], predictions, atol=1e-5)
    assert np.array_equal(got[1], references)


def not_sorted(name):
    """What must be read as it comes: (loader, arguments of evaluate_loop)."""
    if name == "loss_fn":  # it may compare the rows of a batch
        return loader_of(sentences()), {"loss_fn": lambda model, batch: model(**batch).loss}
    if name == "no attention mask":  # the model sees the padding
        names = ["input_ids", "token_type_ids"]
        return loader_of(sentences(), tiny_tokenizer(model_input_names=names)), {}
    if name == "collate_fn":
        collate = loader_of(sentences()).collate_fn
        return loader_of(sentences(), collate_fn=lambda rows: collate(list(rows))), {}
    if name == "a row without tokens":  # such rows would be a batch without a width
        data = sentences()["validation"].to_dict()
        data["sentence"][3] = ""
        tokenizer = tiny_tokenizer()
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        encoded = tokenizer(data.pop("sentence"))
        return loader_of({"validation": Dataset.from_dict({**data, **encoded})}, tokenizer), {}
    if name == "what is no text":  # it may cost more than the text
        data = sentences()["validation"]
        data = data.add_column("box", [[0.5, 0.5]] * NUM_ROWS)
        tokenizer = tiny_tokenizer()
        tokenizer.model_input_names = [*tokenizer.model_input_names, "box"]
        return loader_of({"validation": data}, tokenizer), {}
    loader = loader_of(sentences())
    return as_it_is(loader), {}


@pytest.mark.parametrize(
    "name",
    ["loss_fn", "no attention mask",
     "collate_fn", "a loader of one's own", "a row without tokens", "what is no text"],
)  # fmt: skip
def test_what_might_change_the_numbers_is_read_as_it_comes(name):
    loader, options = not_sorted(name)
    model = tried(Loose(telling()), loader) if "no text" in name else telling()
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    evaluate_loop(model, loader, **{"metric": "accuracy", **options})
    assert shapes == [tuple(batch["input_ids"].shape) for batch in loader]
    assert [rows for rows, _ in shapes] == [4] * 9 + [1]


def test_a_bad_row_is_named_by_its_number_in_the_dataset():
    ids = [[5] * (1 + number % 6) for number in range(20)]
    ids[7][1] = 10_000
    data = {"validation": Dataset.from_dict({"input_ids": ids, "labels": [0, 1] * 10})}
    with pytest.raises(DataError, match=r"row id 7\b"):
        evaluate_loop(tiny_bert(), loader_of(data), "accuracy")


def test_a_budget_of_the_loader_holds_for_evaluation():
    loader = loader_of({"validation": rows(20)}, max_tokens=15)
    model = Counting(telling())
    scores = evaluate_loop(model, loader, "accuracy")
    assert max(rows * width for rows, width in model.shapes) <= 15
    assert scores["accuracy"] == evaluate_loop(telling(), as_it_is(loader), "accuracy")["accuracy"]


def test_models_that_see_padding_or_other_rows_are_read_as_they_come():
    loader = loader_of(sentences())
    model = InBatch()
    assert evaluate_loop(model, loader) == evaluate_loop(model, as_it_is(loader))
    tokens = tiny_tokenizer()(texts())["input_ids"]
    columns = {"input_ids": tokens, "start_positions": [0] * NUM_ROWS}
    data = {"validation": Dataset.from_dict(columns | {"end_positions": [1] * NUM_ROWS})}
    model = tiny_bert(kind=BertForQuestionAnswering)
    loader = loader_of(data)
    assert evaluate_loop(model, loader) == evaluate_loop(model, as_it_is(loader))


@pytest.mark.parametrize(("num_ahead", "num_tokens"), [(4, 1 << 16), (16, 100), (16, 1)])
def test_few_batches_are_read_ahead_and_few_tokens(num_ahead, num_tokens, monkeypatch):
    monkeypatch.setattr(passes, "_NUM_AHEAD", num_ahead)
    monkeypatch.setattr(passes, "_TOKENS_AHEAD", num_tokens)
    model, loader = telling(), loader_of(sentences(), batch_size=4)
    expected = evaluate_loop(model, as_it_is(loader), "accuracy")
    events, collate = [], type(loader.collate_fn).__call__

    def reading(self, rows):
        batch = collate(self, rows)
        events.append(batch["input_ids"].numel())
        return batch

    monkeypatch.setattr(type(loader.collate_fn), "__call__", reading)
    model.register_forward_pre_hook(lambda module, args: events.append(-1))
    assert evaluate_loop(model, loader, "accuracy")["accuracy"] == expected["accuracy"]
    read = [[*group] for is_read, group in groupby(events, lambda n: n > 0) if is_read]
    assert max(map(len, read)) == {1 << 16: num_ahead, 100: 2, 1: 1}[num_tokens]
    assert all(sum(group) <= num_tokens for group in read if len(group) > 1)
