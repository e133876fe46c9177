"""Kept columns: in every batch as the dataset has them, and never in a call of the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import pytest
import torch
from datasets import ClassLabel, Dataset
from helpers import messages, rows, tiny_bert, tiny_tokenizer
from torch import nn
from transformers import BatchEncoding, DataCollatorWithPadding

from manualloop import (
    ConfigError,
    DataError,
    TrainState,
    check_accumulation,
    evaluate_loop,
    inspect_batch,
    predict_loop,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
    train_steps,
)
from manualloop.batches import Kept, as_spare, model_inputs, split_batch
from manualloop.data.kept import KeepingCollate
from manualloop.strategy.transfer import move

IDS = [f"row {number}" for number in range(6)]
ANSWERS = [{"text": ["a"] * n, "start": [n]} if n % 2 else None for n in range(6)]
OFFSETS = [[[n, n + 1]] * n for n in range(6)]


def table(num_rows=6, **more):
    columns = {"id": IDS, "answers": ANSWERS, "offsets": OFFSETS, **more}
    ready = rows(num_rows)
    for name, values in columns.items():
        ready = ready.remove_columns([name]) if name in ready.column_names else ready
        ready = ready.add_column(name, values[:num_rows])
    return ready


def kept_rows(loader, name):
    """Every value of a kept column, in the order of the dataset."""
    values = {}
    for batch, numbers in zip(loader, loader.batch_sampler.batches(), strict=True):
        assert type(batch[name]) is Kept
        values |= dict(zip(numbers, batch[name], strict=True))
    return [values[number] for number in sorted(values)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_values_are_those_of_the_dataset(num_workers, caplog):
    dataset, keep = table(), ["id", "answers", "offsets", "sentence", "label"]
    loaders = prepare_dataloaders(
        {"train": dataset, "dev": dataset},
        tiny_tokenizer(),
        keep=keep,
        batch_size=4,
        num_workers=num_workers,
    )
    note = "using sentence -> labels; keeping id, answers, offsets, sentence, label"
    assert messages(caplog) == [f"train, dev: {note}"]
    expected = prepare_dataloaders(dataset, tiny_tokenizer(), batch_size=4)["train"]
    for name in keep:
        assert kept_rows(loaders["train"], name) == kept_rows(loaders["dev"], name)
        assert kept_rows(loaders["dev"], name) == list(dataset[name])
    for ours, theirs in zip(loaders["train"], expected, strict=True):
        assert model_inputs(ours).keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_values_of_streams():
    dataset = table()
    stream = dataset.to_iterable_dataset()
    loader = prepare_dataloaders(
        stream, tiny_tokenizer(), keep=("id", "sentence", "label", "answers"), batch_size=4
    )["train"]
    for name in ("id", "sentence", "label", "answers"):
        assert [value for batch in loader for value in batch[name]] == list(dataset[name])


def test_labels_that_are_made_of_others_are_kept_as_they_are():
    dataset = table(4, label=[[0], [1, 2], [], [2]])
    loader = prepare_dataloaders(
        {"dev": dataset}, tiny_tokenizer(), model=tiny_bert(num_labels=3), keep="label"
    )["dev"]
    batch = next(iter(loader))
    assert batch["label"] == [[0], [1, 2], [], [2]]
    assert batch["labels"].tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]]


def test_labels_that_are_numbered_are_kept_as_strings():
    table = rows(4).remove_columns("label").add_column("label", ["b", "a", "b", "a"])
    loader = prepare_dataloaders({"dev": table}, tiny_tokenizer(), keep="label")["dev"]
    batch = next(iter(loader))
    assert (batch["labels"].tolist(), batch["label"]) == ([1, 0, 1, 0], ["b", "a", "b", "a"])
    assert len(batch) == 5


def test_lists_of_names_are_kept_as_they_are():
    ready = rows(4).remove_columns("label")
    names = [["b"], ["c", "a"], [], ["c"]]
    model = tiny_bert(num_labels=3)
    loader = prepare_dataloaders(
        {"train": ready.add_column("label", names), "dev": ready.add_column("label", names)},
        tiny_tokenizer(),
        model=model,
        keep="label",
    )["dev"]
    batch = next(iter(loader))
    assert batch["label"] == names
    assert batch["labels"].tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 1]]


def test_hidden_labels_are_kept():
    dataset = {"train": rows(4), "test": table(4, label=[-1] * 4)}
    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), keep="label")
    batch = next(iter(loaders["test"]))
    assert batch["label"] == [-1] * 4
    assert "labels" not in batch
    stream = {name: split.to_iterable_dataset() for name, split in dataset.items()}
    batch = next(iter(prepare_dataloaders(stream, tiny_tokenizer(), keep="label")["test"]))
    assert batch["label"] == [-1] * 4
    assert "labels" not in batch


def test_columns_that_preprocess_makes():
    def windows_of(batch):
        """Each text twice, as a long one that is split."""
        found = {"input_ids": [], "example": [], "labels": []}
        for number, label in zip(batch["id"], batch["label"], strict=True):
            for part in range(2):
                found["input_ids"].append([5, 6 + part])
                found["example"].append({"id": number, "part": part})
                found["labels"].append(label)
        return found

    dataset = {"dev": table()}
    loader = prepare_dataloaders(
        dataset, tiny_tokenizer(), preprocess=windows_of, keep="example", batch_size=5
    )["dev"]
    found = [example for batch in loader for example in batch["example"]]
    assert found == [{"id": name, "part": part} for name in IDS for part in range(2)]
    with pytest.raises(DataError, match=r"preprocess returned 12 rows for 6.*'id'"):
        prepare_dataloaders(dataset, tiny_tokenizer(), preprocess=windows_of, keep="id")
    one_each = lambda batch: {"input_ids": [[5, 6] for _ in batch["id"]]}  # noqa: E731
    loader = prepare_dataloaders(
        dataset, tiny_tokenizer(), preprocess=one_each, keep=("id", "label")
    )["dev"]
    batch = next(iter(loader))
    assert batch["id"] == IDS
    assert batch["label"] == batch["labels"].tolist()


def test_rows_of_numbers_without_a_tokenizer(caplog):
    dataset = Dataset.from_dict({"x": [1.0, 2.0], "number": [7, 8], "name": ["a", "b"]})
    loader = prepare_dataloaders({"dev": dataset}, keep=("number", "name"))["dev"]
    batch = next(iter(loader))
    assert batch["x"].tolist() == [1.0, 2.0]
    assert (batch["number"], batch["name"]) == (
        [7, 8],
        ["a", "b"],
    )
    assert messages(caplog) == ["dev: using x; keeping number, name"]


def test_columns_that_are_joined_to_labels_are_kept():
    names = ("toxic", "spam", "rude")
    columns = {name: [n >> bit & 1 for n in range(6)] for bit, name in enumerate(names)}
    dataset = table(label=[0] * 6, **columns).remove_columns("label")
    for ready in (dataset, dataset.to_iterable_dataset()):
        loader = prepare_dataloaders(
            {"dev": ready}, tiny_tokenizer(), label_column=names, keep=("spam", "id"), batch_size=6
        )["dev"]
        batch = next(iter(loader))
        assert batch["labels"].tolist() == [
            list(row) for row in zip(*columns.values(), strict=True)
        ]
        assert (batch["spam"], batch["id"]) == (columns["spam"], IDS)
        assert not {"toxic", "rude"} & batch.keys()


def test_a_kept_column_may_be_what_was_meant_as_labels(caplog):
    dataset = rows(sentence=["good movie", "bad"], ner_tags=[[1, 0], [2]])
    prepare_dataloaders(dataset, tiny_tokenizer(), keep=("ner_tags",))
    assert messages(caplog) == [
        "train: using sentence; keeping ner_tags; there are no labels: label_column= names them"
    ]


def test_names_that_cannot_be_kept():
    with pytest.raises(
        ConfigError, match=r"train has no column 'idx'. Its columns: sentence.*keep="
    ):
        prepare_dataloaders(table(), tiny_tokenizer(), keep="idx")
    with pytest.raises(ConfigError, match="keep must be a name or a list of names, got 3"):
        prepare_dataloaders(table(), tiny_tokenizer(), keep=3)
    ready = table(input_ids=[[5, 6]] * 6).rename_column("label", "labels")
    for model in (None, tiny_bert()):
        with pytest.raises(ConfigError, match=r"names 'input_ids', which.*map\(lambda row: "):
            prepare_dataloaders(ready, tiny_tokenizer(), model=model, keep=("id", "input_ids"))
    fix = r'rename_column\("labels", "label"\), keep="label"'
    with pytest.raises(ConfigError, match=fix):
        prepare_dataloaders(ready, tiny_tokenizer(), keep="labels")
    loader = prepare_dataloaders(
        ready.rename_column("labels", "label"), tiny_tokenizer(), keep="label"
    )
    assert {"labels", "label"} <= next(iter(loader["train"])).keys()


def test_a_collate_fn_gets_rows_without_them():
    tokenizer, seen = tiny_tokenizer(), []

    def collate(rows):
        seen.append(set(rows[0]))
        return tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")

    ready = table(input_ids=[[5, 6, 7][: 1 + n % 3] for n in range(6)])
    loader = prepare_dataloaders({"dev": ready}, collate_fn=collate, keep=("id", "offsets"))["dev"]
    batch = next(iter(loader))
    assert seen == [{"sentence", "labels", "answers", "input_ids"}]
    assert type(batch) is BatchEncoding
    assert batch["id"] == IDS
    assert batch["offsets"] == OFFSETS
    assert type(batch.to("cpu")["id"]) is Kept
    loader = prepare_dataloaders({"dev": ready}, collate_fn=lambda rows: list(rows), keep="id")[
        "dev"
    ]
    with pytest.raises(ConfigError, match=r"collate_fn returned a list\. Let it return a dict"):
        next(iter(loader))
    ready = ready.select_columns(["id", "input_ids"])
    loader = prepare_dataloaders(
        {"dev": ready}, collate_fn=DataCollatorWithPadding(tokenizer), keep="id"
    )["dev"]
    assert next(iter(loader))["id"] == IDS


def kept_loader(**options):
    loaders = prepare_dataloaders(
        table(),
        tiny_tokenizer(),
        **{"keep": ("id", "sentence", "label"), "batch_size": 4, **options},
    )
    return loaders["train"]


def losses_of(loader, **options):
    torch.manual_seed(0)
    model = tiny_bert()
    found = []
    train_loop(
        model,
        loader,
        num_epochs=2,
        on_step=lambda s: found.append(float(s.loss)),
        progress_bar=False,
        **options,
    )
    return found, torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("size", [1, 2])
def test_training_is_as_without_them(size):
    kept = losses_of(kept_loader(), gradient_accumulation_steps=size)
    plain = losses_of(kept_loader(keep=()), gradient_accumulation_steps=size)
    assert kept[0] == plain[0]
    assert torch.equal(kept[1], plain[1])
    for options in ({"max_tokens": 40}, {"group_by_length": True}):
        kept = losses_of(kept_loader(**options))
        plain = losses_of(kept_loader(keep=(), **options))
        assert kept[0] == plain[0]
        assert torch.equal(kept[1], plain[1])


def test_every_call_of_a_model_is_without_them():
    model, loader = tiny_bert(), kept_loader()
    assert evaluate_loop(model, loader, "accuracy").keys() == {"loss", "accuracy"}
    plain = kept_loader(keep=())
    assert evaluate_loop(model, loader, "accuracy") == evaluate_loop(model, plain, "accuracy")
    assert (predict_loop(model, loader).predictions == predict_loop(model, plain).predictions).all()
    batch = next(iter(loader))
    assert check_accumulation(model, batch).is_exact
    report = inspect_batch(loader)
    assert report.columns["id"] == ((4,), "list of str, kept")
    train_loop(
        model,
        loader,
        num_epochs=1,
        evaluate=partial(evaluate_loop, model, loader, "accuracy"),
        best_metric="accuracy",
        progress_bar=False,
    )


def test_losses_and_terms_see_them():
    seen = []

    def loss_fn(model, batch):
        seen.append(batch["id"])
        return model(**model_inputs(batch)).loss

    def terms(outputs, batch):
        seen.append(batch["id"])
        return [(outputs.loss, len(batch["labels"]))]

    model, loader = tiny_bert(), kept_loader()
    for options in ({"loss_fn": loss_fn}, {"terms": terms}):
        seen.clear()
        train_loop(model, loader, num_epochs=1, progress_bar=False, **options)
        assert sorted({name for names in seen for name in names}) == IDS
        seen.clear()
        evaluate_loop(model, loader, **options)
        assert sorted({name for names in seen for name in names}) == IDS


@pytest.mark.parametrize("call", ["train", "evaluate"])
def test_a_loss_that_gives_them_to_the_model_is_explained(call):
    class Length(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, input_ids, attention_mask, token_type_ids, labels):
            return self.weight * input_ids.sum()

    model, loader = Length(), kept_loader(keep="id")
    loss_fn = lambda model, batch: model(**batch)  # noqa: E731
    with pytest.raises(DataError, match=r"the column 'id', which keep= put.*not in \('id',\)"):
        if call == "train":
            train_loop(model, loader, loss_fn=loss_fn, num_epochs=1, progress_bar=False)
        else:
            evaluate_loop(model, loader, loss_fn=loss_fn)


def test_they_are_split_by_row_and_not_moved():
    batch = {"x": torch.arange(5), "id": Kept("abcde"), "scale": 2}
    parts = split_batch(as_spare(batch), 2)
    assert [part["id"] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(type(part["id"]) is Kept for part in parts)
    moved = move({"x": torch.arange(2), "id": Kept([torch.ones(1), None])}, torch.device("meta"))
    assert moved["x"].is_meta
    assert not moved["id"][0].is_meta
    assert type(moved["id"]) is Kept


def test_out_of_memory_splits_them():
    found = []
    model = tiny_bert()
    forward = model.forward

    def limited(*args, **columns):
        if len(columns["labels"]) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return forward(*args, **columns)

    model.forward = limited
    optimizer = prepare_optimizer(model)
    for step in train_steps(TrainState(model, optimizer), kept_loader(), num_epochs=1):
        found.append(step.index)
    assert found == [1, 2]


def test_a_stream_is_resumed_inside_an_epoch(tmp_path):
    stream = table().to_iterable_dataset()

    def run(folder, stops=None):
        loader = prepare_dataloaders(
            stream, tiny_tokenizer(), keep=("id", "answers"), batch_size=2
        )["train"]
        torch.manual_seed(0)
        seen = []

        def terms(outputs, batch):
            seen.append(list(batch["id"]))
            return [(outputs.loss, len(batch["labels"]))]

        def stop(step):
            if step.index == stops:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            train_loop(
                tiny_bert(),
                loader,
                max_steps=3,
                terms=terms,
                checkpoint_dir=folder,
                checkpoint_every=1,
                on_step=stop,
                progress_bar=False,
            )
        return seen

    whole = run(tmp_path / "whole")
    cut = run(tmp_path / "cut", stops=1) + run(tmp_path / "cut")
    assert cut[:1] + cut[-2:] == whole[:1] + whole[-2:]


def test_a_run_is_resumed_when_columns_are_kept_since(tmp_path, caplog):
    model = tiny_bert()
    run = partial(train_loop, model, checkpoint_dir=tmp_path, progress_bar=False)
    run(kept_loader(keep=()), num_epochs=1)
    caplog.clear()
    run(kept_loader(), num_epochs=2)
    assert not [line for line in messages(caplog) if "collate" in line or "columns" in line]


def test_a_collate_fn_is_looked_through():
    inner = lambda rows: {"x": len(rows)}  # noqa: E731
    collate = KeepingCollate(inner, {"id": "id"})
    assert collate([{"id": 3, "x": 1}]) == {"x": 1, "id": [3]}
    assert isinstance(collate([{"id": 3}]), Mapping)
    assert collate.padded_lengths(None) is None


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("has_transform", [False, True])
def test_kept_labels_are_those_of_the_dataset_though_others_are_trained(is_stream, has_transform):
    def named(names, labels):
        plain = rows(4).remove_columns("label").add_column("label", labels)
        return plain.cast_column("label", ClassLabel(names=names))

    seen = []

    def transform(row, generator):
        seen.append((row["label"], row["labels"]))
        assert set(row) == {"sentence", "label", "labels", *INPUTS}
        return {**{name: row[name] for name in INPUTS}, "labels": row["labels"]}

    data = {"train": named(["no", "yes"], [0, 1, 0, 1]), "dev": named(["yes", "no"], [0, 1, 1, 1])}
    if is_stream:
        data["dev"] = data["dev"].to_iterable_dataset()
    loader = prepare_dataloaders(
        data, tiny_tokenizer(), model=tiny_bert(), keep="label", eval_batch_size=4,
        transform=transform if has_transform else None,
    )["dev"]  # fmt: skip
    seen.clear()
    (batch,) = loader
    assert batch["labels"].tolist() == [1, 0, 0, 0]
    assert list(batch["label"]) == [0, 1, 1, 1]
    assert not has_transform or seen == [(1, 1), (0, 0), (0, 0), (0, 0)]


INPUTS = ("input_ids", "token_type_ids", "attention_mask")
