"""Semantic segmentation: masks of any size and kind, and class maps at the size of each."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from datasets import Array2D, Dataset, Features, Image
from helpers import fixes_in, run_fix
from PIL import Image as Pil
from tiny_scenes import processor, scenes, tiny, tiny_segformer

from manualloop import (
    DataError,
    accumulate_gradients,
    compare_predictions,
    evaluate_loop,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.tasks import images_and_masks, upsampled

SIZE = {"height": 16, "width": 16}
SEGFORMER = processor("Segformer", size=SIZE)
MIXED = [(32, 32), (20, 48), (17, 9)]


def loader_of(data, model=None, transform=None, split="validation", **options):
    options = {"processor": SEGFORMER, "batch_size": 6, **options}
    return prepare_dataloaders(
        {split: data}, options.pop("processor"), model=model or tiny_segformer(),
        transform=transform or images_and_masks(), **options,
    )[split]  # fmt: skip


def pictures(num_rows=6, **options):
    return scenes(num_rows, **options).select_columns(["image", "mask"])


@pytest.mark.parametrize("reduces", [False, True])
def test_without_augmentation_batches_are_the_processor_s_own(reduces):
    data = pictures(sizes=MIXED)
    own = processor("Segformer", size=SIZE, do_reduce_labels=reduces)
    (batch,) = loader_of(data, processor=own)
    expected = own(
        data["image"][:],
        segmentation_maps=[np.array(mask) for mask in data["mask"][:]],
        return_tensors="pt",
    )
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["labels"], expected["labels"])


@pytest.mark.parametrize("name", ["label", "labels", "annotation", "mask"])
def test_the_column_of_masks_may_have_any_of_the_usual_names(name):
    data = pictures()
    (expected,) = loader_of(data)
    (batch,) = loader_of(data.rename_column("mask", name) if name != "mask" else data)
    assert torch.equal(batch["labels"], expected["labels"])
    lists = Dataset.from_dict(
        {
            "image": data["image"][:],
            name: [np.array(mask).tolist() for mask in data["mask"][:]],
        }
    )
    lists = lists.cast_column("image", Image())
    for model in (None, tiny_segformer()):  # without it, lists would be several classes a row
        loaders = prepare_dataloaders(
            {"validation": lists}, SEGFORMER, model=model, transform=images_and_masks()
        )
        (batch,) = loaders["validation"]
        assert torch.equal(batch["labels"], expected["labels"])


def looped_iou(predictions, references, num_classes, ignored):
    """The mean over classes, pixel by pixel."""
    both, either = [0] * num_classes, [0] * num_classes
    for predicted, right in zip(predictions, references, strict=True):
        for p, r in zip(np.ravel(predicted).tolist(), np.ravel(right).tolist(), strict=True):
            if r == ignored:
                continue
            for number in range(num_classes):
                both[number] += p == r == number
                either[number] += number in (p, r)
    found = [b / e for b, e in zip(both, either, strict=True) if e]
    return sum(found) / len(found)


@pytest.mark.parametrize("reduces", [False, True])
def test_maps_are_scored_at_the_size_of_their_masks(reduces):
    data = pictures(sizes=MIXED)
    own = processor("Segformer", size=SIZE, do_reduce_labels=reduces)
    model = tiny_segformer().eval()
    loader = loader_of(data, model, processor=own, batch_size=2)
    scores = evaluate_loop(model, loader, "mean_iou", decode=upsampled)
    sizes = [(image.height, image.width) for image in data["image"]]
    maps = []
    for batch, start in zip(loader, (0, 2, 4), strict=True):
        outputs = model(pixel_values=batch["pixel_values"])
        maps += own.post_process_semantic_segmentation(
            outputs, target_sizes=sizes[start : start + 2]
        )
    masks = [np.array(mask).astype(int) for mask in data["mask"]]
    if reduces:
        masks = [np.where((m == 0) | (m == 255), 255, m - 1) for m in masks]
    expected = looped_iou([m.numpy() for m in maps], masks, 3, 255)
    assert scores["mean_iou"] == pytest.approx(expected, abs=1e-12)
    found = predict_loop(model, loader, decode=upsampled)
    assert all(map(torch.equal, found.predictions, maps))
    for reference, mask in zip(found.references, masks, strict=True):
        assert np.array_equal(reference, mask)


def test_another_ignored_index_is_that_of_the_config():
    model = tiny_segformer(semantic_loss_ignore_index=7).eval()
    data = pictures(sizes=MIXED).map(
        lambda row: {"mask": Pil.fromarray(np.where(np.array(row["mask"]) == 255, 7, row["mask"])
                                           .astype(np.uint8))}
    )  # fmt: skip
    loader = loader_of(data, model)
    scores = evaluate_loop(model, loader, "mean_iou", decode=upsampled)
    found = predict_loop(model, loader, decode=upsampled)
    expected = looped_iou([m.numpy() for m in found.predictions], found.references, 3, 7)
    assert scores["mean_iou"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(DataError, match="is 255, no class"):
        list(loader_of(pictures(), model))


def test_micro_batches_weigh_by_pixels_that_count():
    model = tiny_segformer().double().eval()
    own = processor("Segformer", size=SIZE, do_reduce_labels=True)
    (batch,) = loader_of(pictures(), model, processor=own)
    batch = {"pixel_values": batch["pixel_values"].double(), "labels": batch["labels"]}
    counts = (batch["labels"] != 255).flatten(1).sum(1).tolist()
    assert len(set(counts)) > 2
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for sizes in ((6,), (1, 1, 4), (3, 2, 1)):
        model.zero_grad()
        parts, start = [], 0
        for size in sizes:
            parts.append({name: column[start : start + size] for name, column in batch.items()})
            start += size
        accumulate_gradients(model, parts)
        found = [p.grad for p in model.parameters() if p.grad is not None]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_predictions_without_masks_have_the_size_of_their_images():
    model = tiny_segformer()
    data = pictures(sizes=MIXED)
    loader = loader_of(data.remove_columns("mask"), model, split="test", batch_size=4)
    found = predict_loop(model, loader, decode=upsampled)
    sizes = [(image.height, image.width) for image in data["image"]]
    assert [tuple(one.shape) for one in found.predictions] == sizes


def test_a_loader_of_ones_own_and_a_training_split_are_scored_by_their_labels():
    outputs = SimpleNamespace(logits=torch.randn(2, 3, 4, 4))
    expected = torch.nn.functional.interpolate(outputs.logits, (8, 8), mode="bilinear").argmax(1)
    found = upsampled(outputs, {"labels": torch.zeros(2, 8, 8)})
    assert torch.equal(torch.stack(found), expected)
    one = SimpleNamespace(logits=torch.tensor([[[[-1.0, 2.0]]]]))  # one output, for its sign
    assert upsampled(one, {"labels": torch.zeros(1, 1, 2)})[0].tolist() == [[0, 1]]
    model = tiny_segformer()
    loader = loader_of(pictures(sizes=MIXED), model, split="train")
    assert "mean_iou" in evaluate_loop(model, loader, "mean_iou", decode=upsampled)


def test_mistakes_in_masks_are_refused_in_words():
    colours = pictures(2).map(
        lambda row: {"mask": Pil.merge("RGB", [*[row["mask"]] * 2, row["mask"].point([9] * 256)])}
    )
    with pytest.raises(DataError, match="map of class numbers"):
        loader_of(colours)
    smaller = pictures(2).map(lambda row: {"mask": row["mask"].resize((8, 8), 0)})
    with pytest.raises(DataError, match="32 x 32 pixels, and its mask 8 x 8"):
        loader_of(smaller)
    with pytest.raises(DataError, match=r"num_labels=2.*from_pretrained\(name, num_labels=3\)"):
        loader_of(pictures(4), tiny_segformer(2))
    with pytest.raises(DataError, match="takes no masks"):
        loader_of(pictures(2), processor=processor("ViT", size=SIZE))
    with pytest.raises(DataError, match="return image, mask"):
        loader_of(pictures(2), transform=images_and_masks(lambda image, mask: image))


def test_names_of_the_classes_are_those_of_the_model():
    names = {0: "ground", 1: "square", 2: "disc"}
    model = tiny_segformer(id2label=names, label2id={name: n for n, name in names.items()})
    loader = loader_of(pictures(), model)
    scores = evaluate_loop(model, loader, "mean_iou", decode=upsampled)
    assert list(scores.matrices["mean_iou"].rows) == list(names.values())
    train_loop(model, loader, max_steps=1, progress_bar=False)


def with_masks(masks, form="pil"):
    random = np.random.default_rng(0)
    images = [random.integers(0, 255, (*mask.shape, 3)).astype(np.uint8) for mask in masks]
    rows = {"image": [*map(Pil.fromarray, images)], "mask": [mask.tolist() for mask in masks]}
    features = {"image": Image(), "mask": Array2D(masks[0].shape, "int32")}
    if form == "pil":
        rows["mask"], features["mask"] = [*map(Pil.fromarray, masks)], Image()
    return Dataset.from_dict(rows, features=Features(features))


def halves(background=0, foreground=255, num_rows=3):
    mask = np.full((16, 16), background, np.uint8)
    mask[:, :6] = foreground
    return [mask] * num_rows


@pytest.mark.parametrize("form", ["pil", "list"])
def test_masks_of_black_and_white_are_refused_with_the_line_that_numbers_them(form):
    data, model = with_masks(halves(), form), tiny_segformer(2)
    for rows in (data, data.to_iterable_dataset()):
        with pytest.raises(DataError, match="hold 0 and 255 alone") as error:
            loader_of(rows, model)
    (line,) = fixes_in(error.value)
    changed = run_fix(line, {"validation": data})["validation"]
    labels = next(iter(loader_of(changed, model)))["labels"]
    assert labels.unique().tolist() == [0, 1]
    assert "mean_iou" in evaluate_loop(
        model, loader_of(changed, model), "mean_iou", decode=upsampled
    )


CLASSES = np.arange(256).reshape(16, 16) % 5
KINDS_OF_MASKS = {
    "palette": lambda: Pil.fromarray(CLASSES.astype(np.uint8)).convert("P"),
    "16 bits": lambda: Pil.fromarray(CLASSES.astype(np.uint16)),
    "gray": lambda: Pil.fromarray(CLASSES.astype(np.uint8)),
    "colours": lambda: Pil.fromarray(np.stack([CLASSES] * 3, -1).astype(np.uint8)),
    "transparent": lambda: Pil.fromarray(CLASSES.astype(np.uint8)).convert("RGBA"),
    "gray and transparent": lambda: Pil.fromarray(CLASSES.astype(np.uint8)).convert("LA"),
}


@pytest.mark.parametrize("kind", KINDS_OF_MASKS)
def test_masks_of_any_kind_of_image_are_their_numbers(kind, tmp_path):
    mask = KINDS_OF_MASKS[kind]()
    if mask.mode == "P":  # whose colours mean nothing
        mask.putpalette([7 * number % 256 for number in range(768)])
    mask.save(tmp_path / "mask.png")
    picture = np.zeros((16, 16, 3), np.uint8)
    features = Features({"image": Image(), "mask": Image()})
    rows = {"image": [Pil.fromarray(picture)] * 2, "mask": [str(tmp_path / "mask.png")] * 2}
    data, model = Dataset.from_dict(rows, features=features), tiny_segformer(5)
    if len(mask.getbands()) > 1:
        with pytest.raises(DataError, match="the same number in each of their colours") as error:
            loader_of(data, model)
        (line,) = fixes_in(error.value)
        data = run_fix(line, {"validation": data})["validation"]
    (batch,) = loader_of(data, model)
    assert np.array_equal(batch["mask"][0], CLASSES)


def test_masks_of_16_bits_that_are_black_and_white_have_a_line_as_well():
    masks = [mask.astype(np.uint16) for mask in halves()]
    data, model = with_masks(masks), tiny_segformer(2)
    with pytest.raises(DataError, match="hold 0 and 255 alone") as error:
        loader_of(data, model)
    (line,) = fixes_in(error.value)
    changed = run_fix(line, {"validation": data}, PIL=PIL, numpy=np)["validation"]
    assert next(iter(loader_of(changed, model)))["labels"].unique().tolist() == [0, 1]


def test_masks_that_are_not_of_two_colours_alone_are_taken():
    mixed = [*halves(), np.ones((16, 16), np.uint8)]
    loader_of(with_masks(mixed), tiny_segformer(2))
    loader_of(with_masks(halves(0, 0)), tiny_segformer(2))
    other = tiny_segformer(2, semantic_loss_ignore_index=1)
    with pytest.raises(DataError, match="is 255, no class"):
        loader_of(with_masks(halves()), other)


def test_masks_of_black_and_white_are_told_where_other_classes_may_be_elsewhere(caplog):
    loader_of(with_masks(halves()), tiny_segformer(5))
    assert "hold 0 and 255 alone" in caplog.text


@pytest.mark.parametrize("ignored", [-100, 7, 255, 300])
def test_any_number_may_be_ignored_and_any_may_be_a_class(ignored):
    num_labels = 301 if ignored == 255 else 260
    model = tiny_segformer(num_labels, semantic_loss_ignore_index=ignored).eval()
    random = np.random.default_rng(3)
    classes = [0, 2, 255, 256] if ignored != 255 else [0, 2, 256, 300]
    masks = [random.choice([*classes, ignored], (16, 16)).astype(np.int32) for _ in range(4)]
    loader = loader_of(with_masks(masks, "list"), model)
    (batch,) = loader
    assert {*batch["labels"].unique().tolist()} == {*classes, ignored}
    scores = evaluate_loop(model, loader, "mean_iou", decode=upsampled, confidence=0.9)
    table = predict_loop(model, loader, decode=upsampled)
    expected = looped_iou(table.predictions, masks, num_labels, ignored)
    assert scores["mean_iou"] == pytest.approx(expected, abs=1e-12)
    compared = compare_predictions(table, table, "mean_iou")["mean_iou"]
    assert compared.a == compared.b == scores["mean_iou"]
    assert table.ignored == ignored


@pytest.mark.parametrize("column", ["image", "mask"])
def test_rows_without_an_image_or_a_mask_are_refused_at_once(column):
    rows = [dict(row) for row in pictures(4)]
    rows[2][column] = None
    data = Dataset.from_list(rows, features=pictures(4).features)
    model = tiny_segformer()
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=f"Row 2 of {split} has {column}=None") as error:
            loader_of(data, model, split=split, batch_size=1)
        line = next(line for line in fixes_in(error.value) if ".filter(" in line)
        assert len(loader_of(run_fix(line, {split: data})[split], model, split=split).dataset) == 3


def test_the_ignored_pixels_of_upernet_are_those_of_its_config():
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, num_labels=3, loss_ignore_index=9,
        use_auxiliary_head=False,
    )  # fmt: skip
    model = tiny(transformers.UperNetForSemanticSegmentation, config)
    own = processor("Segformer", size={"height": 64, "width": 64})
    loader = loader_of(with_masks(halves(1, 9)), model, processor=own)
    assert next(iter(loader))["labels"].unique().tolist() == [1, 9]
    assert predict_loop(model, loader, decode=upsampled).ignored == 9
