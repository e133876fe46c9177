"""Random transforms: what a row becomes is a function of seed, epoch and row, and of no more."""

from __future__ import annotations

import hashlib
import math
import random
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from bench import CONTEXT
from datasets import Array3D, ClassLabel, Dataset, Features, Image, Value
from helpers import messages, rows, tiny_bert, tiny_tokenizer
from torch import nn
from torch.utils.data import DataLoader

from manualloop import (
    ConfigError,
    DataError,
    evaluate_loop,
    inspect_batch,
    predict_loop,
    prepare_dataloaders,
    train_loop,
    windows,
)
from manualloop.batches import model_inputs
from manualloop.data.sampler import set_epoch
from manualloop.data.transform import mix, seeds_of_rows


def crop_and_flip(row, generator):
    """Cut a patch out of an image, flip it or not, and add noise."""
    image = torch.as_tensor(np.array(row["image"], dtype=np.float32))
    top, left = torch.randint(3, (2,), generator=generator).tolist()
    image = image[top : top + 4, left : left + 4]
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(1)
    return {"x": image + torch.randn(4, 4, generator=generator), "labels": row["label"]}


def images(num_rows=12):
    pixels = np.arange(num_rows * 36).reshape(num_rows, 6, 6) % 251
    return Dataset.from_dict(
        {
            "image": pixels.tolist(),
            "label": list(range(num_rows)),
            "id": [*map(str, range(num_rows))],
        }
    )


def digests(batches):
    """A digest of each row of some batches, by its label."""
    found = {}
    for batch in batches:
        for label, x in zip(batch["labels"].tolist(), batch["x"], strict=True):
            found[label] = hashlib.sha256(x.numpy().tobytes()).hexdigest()
    return found


def epochs_of(num_epochs=3, **options):
    """The digests of all rows, in each epoch, as training reads them."""
    loader = prepare_dataloaders(images(), transform=crop_and_flip, **options)["train"]
    found = []
    for epoch in range(num_epochs):
        set_epoch(loader, epoch)
        found.append(digests(loader))
    return found


@pytest.fixture(scope="module")
def expected():
    """Three epochs as a loop without a library makes them."""
    table, found = images(), []
    for epoch in range(3):
        of_epoch = {}
        for number, seed in enumerate(seeds_of_rows(42, epoch, range(12), "transform")):
            made = crop_and_flip(table[number], torch.Generator().manual_seed(seed))
            of_epoch[number] = hashlib.sha256(made["x"].numpy().tobytes()).hexdigest()
        found.append(of_epoch)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4},
        {"batch_size": 7},
        {"batch_size": 5, "num_workers": 2},
        {"batch_size": 5, "keep": ("id", "label")},
        {"batch_size": 3, "drop_last": False, "pin_memory": False},
    ],
    ids=str,
)
def test_rows_are_functions_of_seed_epoch_and_number(options, expected):
    torch.manual_seed(hash(str(options)) % 1000)
    random.seed(3)
    assert epochs_of(**options) == expected
    assert len({digest for epoch in expected for digest in epoch.values()}) == 36


def test_numbers_of_numpy_are_numbers(expected):
    assert epochs_of(1, seed=np.int64(42), batch_size=np.int64(4)) == expected[:1]
    assert len(epochs_of(1, seed=-5)[0]) == 12
    loader = prepare_dataloaders(images(), transform=crop_and_flip)["train"]
    numbers = np.arange(11, -1, -1)
    own = DataLoader(loader.dataset, 5, sampler=numbers, collate_fn=loader.collate_fn)
    assert digests(own) == expected[0]


def test_another_seed_is_another_transform(expected):
    assert not set(epochs_of(1, seed=43)[0].values()) & set(expected[0].values())


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, labels=None):
        logits = self.weight * x.mean((1, 2))
        return {"logits": logits, "loss": ((logits - labels) ** 2).mean()}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_is_cut_and_resumed(num_workers, expected, tmp_path):
    seen = []

    def terms(outputs, batch):
        seen.append(batch)
        return [(outputs["loss"], len(batch["labels"]))]

    def run(until):
        loader = prepare_dataloaders(
            images(), transform=crop_and_flip, batch_size=5, num_workers=num_workers
        )["train"]
        train_loop(
            Mean(),
            loader,
            lr_scheduler="constant",
            max_steps=until,
            terms=terms,
            checkpoint_dir=tmp_path,
            checkpoint_every=1,
            progress_bar=False,
        )

    for until in (2, 4, 5, 9):  # inside epochs, of 3 steps each
        run(until)
    assert [digests(seen[3 * epoch : 3 * epoch + 3]) for epoch in range(3)] == expected


def test_evaluation_is_that_of_epoch_0(expected):
    loaders = prepare_dataloaders(
        {"train": images(), "dev": images()}, transform=crop_and_flip, batch_size=5
    )
    model, seen = Mean(), []

    def terms(outputs, batch):
        seen.append(batch)
        return [(outputs["loss"], len(batch["labels"]))]

    for name in ("dev", "train"):
        scores = []
        for epoch in (0, 1):
            set_epoch(loaders[name], epoch)
            seen.clear()
            scores.append(evaluate_loop(model, loaders[name], terms=terms))
            assert digests(seen) == expected[0]
        assert scores[0] == pytest.approx(scores[1], rel=1e-6)
        values = [predict_loop(model, loaders[name], postprocess=lambda o, b: o["logits"])]
        set_epoch(loaders[name], 0)
        values.append(predict_loop(model, loaders[name], postprocess=lambda o, b: o["logits"]))
        assert np.allclose(values[0].predictions, values[1].predictions, rtol=1e-6)
    set_epoch(loaders["train"], 2)
    assert digests(loaders["train"]) == expected[2]  # nothing of it stays
    batches = [batch for window in windows(loaders["train"], 2) for batch in window.batches]
    assert digests(batches) == expected[2]


def test_epochs_reach_workers_that_are_kept(expected):
    prepared = prepare_dataloaders(images(), transform=crop_and_flip, batch_size=4)["train"]
    loader = DataLoader(
        prepared.dataset,
        batch_sampler=prepared.batch_sampler,
        collate_fn=prepared.collate_fn,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=CONTEXT,  # pickles as spawn does
    )
    for epoch in range(2):
        set_epoch(loader, epoch)
        assert digests(loader) == expected[epoch]


def test_groups_and_budgets_change_no_row():
    table = rows(20)

    def scramble(row, generator):
        ids = torch.tensor(row["input_ids"])
        noise = torch.randint(3, ids.shape, generator=generator)
        return {**row, "input_ids": ids + noise, "attention_mask": row["attention_mask"]}

    found = []
    for options in ({}, {"batch_size": 3}, {"group_by_length": True}, {"max_tokens": 30}):
        loader = prepare_dataloaders(table, tiny_tokenizer(), transform=scramble, **options)[
            "train"
        ]
        ids = {}
        for batch, numbers in zip(loader, loader.batch_sampler.batches(), strict=True):
            for number, row, mask in zip(
                numbers, batch["input_ids"], batch["attention_mask"], strict=True
            ):
                ids[number] = row[mask.bool()].tolist()
        found.append(ids)
    assert all(ids == found[0] for ids in found)
    assert len(found[0]) == 20


def test_a_transform_gets_all_columns_and_what_it_returns_is_used(caplog):
    seen = []

    def look(row, generator):
        seen.append(row)
        return {
            "input_ids": row["input_ids"],
            "labels": row["labels"],
            "note": "text",
            "more": np.float32(1),
        }

    table = rows(6).add_column("score", [0.5] * 6)
    loaders = prepare_dataloaders(
        {"train": table, "test": table.remove_columns("label").add_column("label", [-1] * 6)},
        tiny_tokenizer(),
        model=tiny_bert(),
        transform=look,
    )
    names = {"sentence", "score", "label", "labels", "input_ids", "attention_mask"}
    assert all(names <= row.keys() for row in seen)
    assert seen[0]["sentence"] == table[0]["sentence"]
    assert messages(caplog) == [
        "train: using what transform returns: input_ids -> labels; dropped: note, more "
        "(not in BertForSequenceClassification.forward)",
        "test: using what transform returns: input_ids; dropped: note, more (not in "
        "BertForSequenceClassification.forward); every label is -1, so there are no labels",
    ]
    assert next(iter(loaders["train"])).keys() == {"input_ids", "attention_mask", "labels"}
    assert "labels" not in next(iter(loaders["test"]))


def test_a_transform_gets_labels_as_they_are_and_as_numbers():
    seen = []

    def look(row, generator):
        seen.append((row["label"], row["labels"], len(row)))
        return {"x": row["x"], "labels": row["labels"]}

    table = Dataset.from_dict({"x": [1.0, 2.0, 3.0], "label": ["no", "yes", "no"]})
    loader = prepare_dataloaders({"dev": table}, transform=look, keep="label")["dev"]
    batch = next(iter(loader))
    assert set(seen) == {("no", 0, 3), ("yes", 1, 3)}
    assert (batch["labels"].tolist(), batch["label"]) == ([0, 1, 0], ["no", "yes", "no"])


def test_functions_by_split(caplog):
    double = lambda row, generator: {"x": 2 * row["x"]}  # noqa: E731
    table = Dataset.from_dict({"x": [1.0, 2.0], "y": [3.0, 4.0]})
    collate = lambda found: {"z": torch.tensor([row["x"] for row in found])}  # noqa: E731
    loaders = prepare_dataloaders(
        {"train": table, "dev": table, "test": table},
        transform={"train": double},
        collate_fn={"test": collate},
    )
    assert sorted(next(iter(loaders["train"]))["x"].tolist()) == [2.0, 4.0]
    assert next(iter(loaders["dev"])).keys() == {"x", "y"}
    assert next(iter(loaders["test"]))["z"].tolist() == [1.0, 2.0]
    made = prepare_dataloaders(
        {"train": table, "dev": table},
        preprocess={"train": lambda b: {"x": b["y"]}, "dev": lambda b: {"x": b["x"]}},
    )
    assert sorted(next(iter(made["train"]))["x"].tolist()) == [3.0, 4.0]
    with pytest.raises(ConfigError, match="transform names the split 'valid', which is not there"):
        prepare_dataloaders({"train": table}, transform={"valid": double})
    with pytest.raises(ConfigError, match="preprocess names no function for dev"):
        prepare_dataloaders({"train": table, "dev": table}, preprocess={"train": lambda rows: rows})
    with pytest.raises(ConfigError, match="transform must be a function, or a dict of functions"):
        prepare_dataloaders({"train": table}, transform="flip")


def test_kept_columns_are_those_of_the_dataset_or_of_the_transform():
    def halve(row, generator):
        return {"x": row["x"] / 2, "box": torch.ones(2) * row["x"], "id": row["id"]}

    table = Dataset.from_dict({"x": [1.0, 2.0], "id": ["a", "b"], "label": [3, 4]})
    loader = prepare_dataloaders(
        {"dev": table.with_format("torch")}, transform=halve, keep=("id", "label")
    )["dev"]
    batch = next(iter(loader))
    assert (batch["id"], batch["label"]) == (["a", "b"], [3, 4])
    assert model_inputs(batch).keys() == {"x", "box"}


def test_the_format_of_the_dataset_reaches_the_transform():
    shape = (2, 3, 3)
    pixels = np.random.default_rng(0).integers(0, 255, (4, *shape), dtype=np.uint8)
    features = Features({"image": Array3D(shape, "uint8"), "label": ClassLabel(names=["a", "b"])})
    table = Dataset.from_dict({"image": list(pixels), "label": [0, 1, 0, 1]}, features=features)
    kinds = set()

    def look(row, generator):
        kinds.add(type(row["image"]))
        return {"pixel_values": row["image"], "labels": int(row["label"])}

    for form, kind in (("numpy", np.ndarray), ("torch", torch.Tensor), (None, list)):
        kinds.clear()
        loader = prepare_dataloaders({"dev": table.with_format(form)}, transform=look)["dev"]
        batch = next(iter(loader))
        assert kinds == {kind}
        assert np.array_equal(batch["pixel_values"].numpy(), pixels)


def test_images_reach_the_transform_decoded():
    pixels = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": Value("int64")})
    table = Dataset.from_dict({"image": list(pixels), "label": [0, 1, 2]}, features=features)

    def to_tensor(row, generator):
        return {"pixel_values": torch.from_numpy(np.array(row["image"])), "labels": row["label"]}

    loader = prepare_dataloaders({"dev": table}, transform=to_tensor, keep="image")["dev"]
    batch = next(iter(loader))
    assert np.array_equal(batch["pixel_values"].numpy(), pixels)
    assert [np.array(image).tolist() for image in batch["image"]] == pixels.tolist()


GLOBAL = {
    "torch": lambda: float(torch.rand(())),
    "Python": random.random,
    "numpy": lambda: float(np.random.rand()),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_global_generators_are_seeded_by_row_and_left_alone(name, caplog):
    draw = GLOBAL[name]
    table = Dataset.from_dict({"x": [1.0] * 9})

    def noisy(row, generator):
        return {"x": row["x"] + draw()}

    found = []
    for batch_size in (2, 5):
        torch.manual_seed(batch_size)
        random.seed(batch_size)
        np.random.seed(batch_size)
        untouched = [draw() for draw in GLOBAL.values()]
        torch.manual_seed(batch_size)
        random.seed(batch_size)
        np.random.seed(batch_size)
        loader = prepare_dataloaders({"dev": table}, transform=noisy, batch_size=batch_size)["dev"]
        found.append(torch.cat([batch["x"] for batch in loader]))
        assert [draw() for draw in GLOBAL.values()] == untouched
    assert torch.equal(*found)
    assert len(set(found[0].tolist())) == 9
    (line,) = {line for line in messages(caplog) if "draws" in line}
    assert f"draws from the global generator of {name}, which is seeded for each row" in line
    assert line.endswith("Draw from the second argument: torch.rand(2, generator=generator).")


def test_generators_that_are_used_together_do_not_repeat_each_other():
    def noisy(row, generator):
        drawn = [torch.rand((), generator=generator), *(draw() for draw in GLOBAL.values())]
        return {"x": torch.tensor([float(number) for number in drawn])}

    table = Dataset.from_dict({"x": [1.0] * 200})
    loader = prepare_dataloaders({"dev": table}, transform=noisy, batch_size=200)["dev"]
    drawn = next(iter(loader))["x"].T
    off_diagonal = torch.corrcoef(drawn) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.35  # 5 standard deviations


def test_numbers_for_classes_that_their_names_do_not_have_are_told(caplog):
    ready = rows(4).remove_columns("label").add_column("label", ["b", "a", "b", "a"])
    numbers = {"b": 0, "a": 1}

    def renumber(row, generator):
        return {"input_ids": row["input_ids"], "labels": numbers[row["label"]]}

    prepare_dataloaders(ready, tiny_tokenizer(), transform=renumber)
    (line,) = [line for line in messages(caplog) if "other numbers" in line]
    assert "0 for 'b', which is 1, 1 for 'a', which is 0" in line
    caplog.clear()
    numbers = {"b": 1, "a": 0}
    prepare_dataloaders(ready, tiny_tokenizer(), transform=renumber)
    assert not [line for line in messages(caplog) if "other numbers" in line]


def test_a_transform_that_changes_its_row_changes_no_kept_column():
    def shift(row, generator):
        row["box"].append(9)
        return {"x": row["x"], "labels": row["label"]}

    table = Dataset.from_dict({"x": [1.0, 2.0], "box": [[1], [2]], "label": [0, 1]})
    loader = prepare_dataloaders({"dev": table}, transform=shift, keep="box")["dev"]
    assert next(iter(loader))["box"] == [[1], [2]]


def test_draws_that_nobody_can_seed_are_told(caplog):
    own = np.random.default_rng(0)
    table = Dataset.from_dict({"x": [1.0] * 40})
    prepare_dataloaders(table, transform=lambda row, generator: {"x": row["x"] + own.random()})
    (line,) = [line for line in messages(caplog) if "two things of one row" in line]
    caplog.clear()

    def sometimes(row, generator):
        late = row["number"] > 20
        return {"x": row["x"] + (random.random() if late else 0)}

    numbered = table.add_column("number", list(range(40)))
    loader = prepare_dataloaders({"dev": numbered}, transform=sometimes, batch_size=4)["dev"]
    assert not [line for line in messages(caplog) if "draws" in line]
    list(loader)
    (line,) = [line for line in messages(caplog) if "draws" in line]
    assert "at some rows alone" in line


def test_what_cannot_be_transformed_is_refused():
    table = Dataset.from_dict({"x": [1.0, 2.0]})
    with pytest.raises(DataError, match=r"returned a Tensor for row 0. Let it return a dict"):
        prepare_dataloaders(table, transform=lambda row, generator: torch.ones(1))
    with pytest.raises(DataError, match="returns no column that the model takes, only name"):
        prepare_dataloaders(table, transform=lambda row, generator: {"name": "x"})


def returning(value, when=lambda row: True):
    """A transform that returns another label for some rows."""
    return lambda row, generator: {
        "input_ids": [5, 6],
        "labels": value if when(row) else row["label"],
    }


class Scorer(nn.Module):
    """A model without a config."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, input_ids, labels=None):
        logits = self.layer(input_ids.float())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def numbers(num_rows=8):
    return Dataset.from_dict(
        {"x": [float(n) for n in range(num_rows)], "label": [n % 2 for n in range(num_rows)]}
    )


@pytest.mark.parametrize("by_model", [True, False], ids=["model given", "seen in the first rows"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (7, r"Label 7 in train batch \d \(row id [0-7]\) is not a class of the model"),
        (-3, r"Label -3 in train batch \d \(row id [0-7]\) is neither a class"),
        (math.nan, r"Label NaN in train batch \d \(row id [0-7]\)"),
    ],
)
def test_a_wrong_label_of_a_transform_is_to_be_fixed_there(value, found, by_model):
    """The dataset's labels are right: a line that changes them would change nothing."""
    model = tiny_bert(num_labels=1 if value != value else 2)
    given = {"model": model} if by_model else {}
    late = lambda row: row["x"] == 6 or not by_model  # noqa: E731
    transform = returning(value, late)
    loader = prepare_dataloaders({"train": numbers()}, transform=transform, **given)["train"]
    runs = [partial(train_loop, num_epochs=1, progress_bar=False), evaluate_loop]
    for run in runs[:1] if value != value else runs:  # the loss of an evaluation may be NaN
        with pytest.raises(DataError, match=found) as error:
            run(model, loader)
        assert "transform= returns the labels" in str(error.value)
        assert "dataset" not in str(error.value)


def test_a_wrong_label_that_a_transform_passes_on_is_to_be_fixed_in_the_dataset():
    table = numbers().map(lambda row: {"label": row["label"] + 1}, remove_columns="x")
    loader = prepare_dataloaders(
        {"train": table}, transform=lambda row, generator: {**row, "input_ids": [5, 6]}
    )["train"]
    with pytest.raises(DataError, match=r'dataset\["train"\] = dataset\["train"\].map'):
        train_loop(tiny_bert(), loader, num_epochs=1, progress_bar=False)


def test_a_wrong_label_of_a_transform_under_a_model_without_a_config():
    loader = prepare_dataloaders(numbers(), transform=returning(7))["train"]
    with pytest.raises(DataError, match=r"Label 7 in train batch 0 \(row id \d\), column 'labels'"):
        train_loop(Scorer(), loader, num_epochs=1, progress_bar=False)


@pytest.mark.parametrize("name", ["x", "labels"])
def test_none_for_some_rows_is_refused_with_the_row(name):
    def transform(row, generator, is_wrong):
        made = {"x": torch.ones(2), "labels": row["label"]}
        return {**made, name: None} if is_wrong(row) else made

    for is_wrong in (lambda row: row["x"] == 2, lambda row: row["x"] != 2):
        with pytest.raises(DataError, match=rf"transform of train returned {name}=None for row"):
            prepare_dataloaders(numbers(), transform=partial(transform, is_wrong=is_wrong))
    late = partial(transform, is_wrong=lambda row: row["x"] == 6)
    with pytest.raises(DataError, match=rf"returned {name}=None for row 6, and values for other"):
        list(prepare_dataloaders(numbers(), transform=late)["train"])
    early = partial(transform, is_wrong=lambda row: row["x"] < 6)
    if name == "labels":
        with pytest.raises(DataError, match=r"returned labels=[01] for row [67], and None for"):
            list(prepare_dataloaders(numbers(), transform=early)["train"])


def test_none_for_all_rows_is_left_out_and_told(caplog):
    def transform(row, generator):
        return {"x": torch.ones(2), "y": None, "labels": None}

    loaders = prepare_dataloaders({"train": numbers(), "test": numbers()}, transform=transform)
    assert next(iter(loaders["test"])).keys() == {"x"}
    (line,) = messages(caplog)
    assert line == (
        "train, test: using what transform returns: x; left out, since they are None: y; it "
        "returns no labels"
    )
    collate = lambda found: {"n": torch.tensor([r["y"] is None for r in found])}  # noqa: E731
    own = prepare_dataloaders(numbers(), transform=transform, collate_fn=collate)["train"]
    assert all(bool(batch["n"].all()) for batch in own)  # a collate_fn of one's own gets them


def test_a_look_changes_nothing(expected):
    loader = prepare_dataloaders(images(), transform=crop_and_flip, batch_size=4)["train"]
    inspect_batch(loader)
    assert digests(loader) == expected[0]
    assert loader.dataset[3]["x"].shape == (4, 4)
    assert loader.dataset[-1]["labels"] == 11


def test_another_transform_is_told_when_a_run_is_resumed(tmp_path, caplog):
    def stop(step):
        if step.index == 2:
            raise KeyboardInterrupt

    def run(transform, on_step=None):
        loader = prepare_dataloaders(images(), transform=transform, batch_size=4)["train"]
        with suppress(KeyboardInterrupt):
            train_loop(
                Mean(),
                loader,
                num_epochs=1,
                terms=lambda outputs, batch: [(outputs["loss"], len(batch["labels"]))],
                checkpoint_dir=tmp_path,
                checkpoint_every=1,
                on_step=on_step,
                progress_bar=False,
            )
        return [line for line in messages(caplog) if "transform:" in line]

    def plain(row, generator):
        return {"x": torch.tensor(row["image"]) + 0.0, "labels": row["label"]}

    assert run(crop_and_flip, stop) == []
    assert run(crop_and_flip, stop) == []
    (line,) = run(plain)
    assert "transform: crop_and_flip (code " in line
    assert ".plain (code " in line


def test_seeds_look_independent():
    """Neighbours in seed, epoch and row share no bit more often than chance would have it."""
    assert mix(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from 0
    base = np.array(seeds_of_rows(42, 0, range(4096), "transform"), dtype=np.uint64)
    others = {
        "rows": base[1:],
        "epoch": np.array(seeds_of_rows(42, 1, range(4096), "transform"), dtype=np.uint64),
        "seed": np.array(seeds_of_rows(43, 0, range(4096), "transform"), dtype=np.uint64),
        "use": np.array(seeds_of_rows(42, 0, range(4096), "mask"), dtype=np.uint64),
    }
    for other in others.values():
        differ = (base[: len(other)] ^ other)[:, None] >> np.arange(64, dtype=np.uint64) & 1
        assert abs(differ.mean() - 0.5) < 0.005  # of 262,144 bits: 5 standard deviations
        assert np.abs(differ.mean(0) - 0.5).max() < 0.04
    assert len(set(base.tolist())) == 4096
    draws = torch.stack(
        [torch.rand(64, generator=torch.Generator().manual_seed(int(s))) for s in base[:512]]
    )
    correlation = torch.corrcoef(draws) - torch.eye(512)
    assert correlation.abs().max() < 0.75
    assert abs(float(draws.mean()) - 0.5) < 0.01


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_level_2_and_a_second_run_get_the_same_rows(expected):
    loader = prepare_dataloaders(images(), transform=crop_and_flip, batch_size=4)["train"]
    for _ in range(2):
        seen = []

        def terms(outputs, batch, seen=seen):
            seen.append(batch)
            return [(outputs["loss"], len(batch["labels"]))]

        run = partial(train_loop, Mean(), loader, num_epochs=2, progress_bar=False)
        run(terms=terms, evaluate=partial(evaluate_loop, Mean(), loader))
        assert [digests(seen[:3]), digests(seen[3:])] == expected[:2]


def one_shard(num_rows=24):
    return images(num_rows).to_iterable_dataset(num_shards=3)


@pytest.fixture(scope="module")
def streamed():
    """What each row becomes in two epochs, as the class of rows with numbers makes it."""
    loader = prepare_dataloaders({"dev": images(24)}, transform=crop_and_flip)["dev"]
    found = []
    for epoch in range(2):
        set_epoch(loader, epoch)
        found.append(digests(loader))
    return found


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_rows_of_a_stream_are_functions_of_their_place(batch_size, streamed):
    loader = prepare_dataloaders(one_shard(), transform=crop_and_flip, batch_size=batch_size)
    for epoch in (0, 1, 0):
        set_epoch(loader["train"], epoch)
        assert digests(loader["train"]) == streamed[epoch]


@pytest.mark.parametrize("at", [2, 5, 6])
def test_a_stream_is_cut_and_resumed(at, streamed, tmp_path):
    """At each step, also at the end of an epoch; in a new process nothing is left of the loader."""

    def run(stop_after=None, folder=tmp_path):
        seen = []

        def loss_fn(model, batch):
            seen.append(digests([batch]))
            return model(batch["x"].flatten(1)).square().mean()

        def stop(step):
            if step.index == stop_after:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        loader = prepare_dataloaders(one_shard(), transform=crop_and_flip, batch_size=5)["train"]
        with suppress(KeyboardInterrupt):
            train_loop(
                nn.Linear(16, 1),
                loader,
                max_steps=10,
                loss_fn=loss_fn,
                on_step=stop,
                checkpoint_dir=folder,
                checkpoint_every=1,
                progress_bar=False,
            )
        return seen

    seen = run(at)[:-1] + run()  # the last step was stopped before it was saved
    assert len(seen) == 10
    for epoch in (0, 1):
        found = {}
        for batch in seen[5 * epoch : 5 * epoch + 5]:
            found |= batch
        assert found == streamed[epoch]


def test_an_evaluation_of_a_stream_is_that_of_epoch_0(streamed):
    loader = prepare_dataloaders(one_shard(), transform=crop_and_flip)["train"]
    set_epoch(loader, 1)
    seen = {}

    def loss_fn(model, batch):
        seen.update(digests([batch]))
        return model(batch["x"].flatten(1)).mean()

    evaluate_loop(nn.Linear(16, 1), loader, loss_fn=loss_fn, progress_bar=False)
    assert seen == streamed[0]
    assert digests(loader) == streamed[1]


def test_a_stream_keeps_columns_and_names_the_rows_of_mistakes():
    def halve(row, generator):
        return {"x": torch.tensor([row["x"] / 2]), "labels": row["label"]}

    table = numbers().add_column("id", [*"abcdefgh"])
    loader = prepare_dataloaders(table.to_iterable_dataset(), transform=halve, keep="id")["train"]
    batch = next(iter(loader))
    assert (batch["id"], batch["x"].flatten().tolist()) == (
        [*"abcdefgh"],
        [n / 2 for n in range(8)],
    )
    late = returning(None, lambda row: row["x"] == 6)
    with pytest.raises(DataError, match="transform of train returned labels=None for row 6"):
        list(prepare_dataloaders(numbers().to_iterable_dataset(), transform=late)["train"])


def test_a_stream_that_workers_read_has_no_numbers():
    with pytest.raises(ConfigError, match=r"nobody knows the numbers.*num_workers=0"):
        prepare_dataloaders(one_shard(), transform=crop_and_flip, num_workers=2)


@pytest.mark.exhaustive  # torch waits five seconds for a worker whose stream has failed
def test_a_stream_that_workers_of_another_loader_read_has_no_numbers():
    loader = prepare_dataloaders(one_shard(), transform=crop_and_flip)["train"]
    again = DataLoader(loader.dataset, batch_size=4, num_workers=1)
    with pytest.raises(ConfigError, match="nobody knows the numbers"):
        list(again)
