"""Class maps through image processors: the nearest pixel's class, where the model sees it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Image
from PIL import Image as Pil
from tiny_language_models import needs_transformers_5
from tiny_scenes import processor, tiny_segformer

from manualloop import DataError, load_metric, predict_loop, prepare_dataloaders
from manualloop.tasks import images_and_masks, upsampled
from manualloop.tasks.maps import _edges, keeps_whole, map_options, view_of, with_map

pytestmark = needs_transformers_5  # of which the image processors take maps in the same way

KINDS = ["Segformer", "Beit", "DPT", "MobileViT", "MobileNetV2"]
SIZE = {"height": 24, "width": 20}


def blocks(height, width, classes, seed=0):
    """A map of 4 x 4 blocks of some classes."""
    random = np.random.default_rng(seed)
    small = random.choice(classes, (height // 4 + 1, width // 4 + 1))
    return small.repeat(4, 0).repeat(4, 1)[:height, :width].astype(np.int32)


def picture(height, width):
    return Pil.fromarray(np.zeros((height, width, 3), np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [[0, 2, 5], [0, 1, 255], [-100, 0, 3], [7, 255, 300]], ids=str)
def test_each_pixel_of_a_map_has_the_class_of_the_nearest(kind, classes):
    own = processor(kind, size=SIZE, do_center_crop=False, do_reduce_labels=False)
    mask = blocks(37, 31, classes)
    made = with_map(own, picture(37, 31), mask, 255, map_options(own))
    nearest = Pil.fromarray(mask, "I").resize((20, 24), Pil.Resampling.NEAREST)
    assert np.array_equal(made["labels"], np.asarray(nearest))
    alone = own(picture(37, 31), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(made["pixel_values"], alone)


def test_some_processors_of_transformers_make_classes_that_are_not_there():
    """Which is why maps are not left to them; if this fails, resampling need not be named."""
    mask = blocks(37, 31, [0, 5]).astype(np.uint8)
    found = set()
    for kind in KINDS:
        own = processor(kind, size=SIZE, do_center_crop=False)
        made = own(picture(37, 31), segmentation_maps=mask, return_tensors="pt")["labels"]
        if not {*made.unique().tolist()} <= {0, 5}:
            found.add(kind)
            assert "resample" in map_options(own)
    assert found == {"Beit", "DPT"}


def test_a_map_with_more_classes_than_a_processor_takes_is_refused():
    own, mask = processor("Segformer", size=SIZE), np.arange(300).reshape(15, 20)
    with pytest.raises(DataError, match="300 classes, and image processors of transformers take"):
        with_map(own, picture(15, 20), mask, 255, map_options(own))
    wide = np.where(np.arange(300).reshape(15, 20) % 2, 1_000_000, 0)
    made = with_map(own, picture(15, 20), wide, 255, map_options(own))
    assert {*made["labels"].unique().tolist()} == {0, 1_000_000}


@pytest.mark.parametrize("kind", ["ViT", "MaskFormer"])
def test_processors_that_take_no_maps_of_classes_are_refused(kind):
    with pytest.raises(DataError, match="SegformerImageProcessor"):
        map_options(processor(kind))


VIEWS = [  # processor, size of the image, the part that is seen, and where in what size
    (("MobileViT", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
     (32, 64), (0, 32, 16, 48), (0, 32, 0, 32), (32, 32)),
    (("MobileViT", {"size": {"shortest_edge": 32}, "crop_size": {"height": 48, "width": 48}}),
     (32, 32), (0, 32, 0, 32), (8, 40, 8, 40), (48, 48)),
    (("MobileViT", {"size": {"shortest_edge": 32}, "crop_size": {"height": 40, "width": 32}}),
     (64, 128), (0, 64, 32, 96), (4, 36, 0, 32), (40, 32)),
    (("MobileNetV2", {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}),
     (60, 40), (10, 50, 0, 40), (0, 16, 0, 16), (16, 16)),
    (("Beit", {"size": {"height": 32, "width": 64}, "do_center_crop": True,
               "crop_size": {"height": 32, "width": 32}}),
     (32, 64), (0, 32, 16, 48), (0, 32, 0, 32), (32, 32)),
    (("DPT", {"size": {"height": 32, "width": 64}, "do_pad": True, "size_divisor": 48}),
     (300, 700), (0, 300, 0, 700), (8, 40, 16, 80), (48, 96)),
]  # fmt: skip


@pytest.mark.parametrize(("made", "size", "part", "frame", "seen"), VIEWS)
def test_the_part_that_a_model_sees(made, size, part, frame, seen):
    own = processor(made[0], **made[1])
    assert not keeps_whole(own)
    found = view_of(own, size, map_options(own))
    assert found.frame == frame
    assert found.seen == seen
    # The middle of an image is a matter of half a pixel of the result.
    step = (part[1] - part[0]) / (frame[1] - frame[0])
    assert np.abs(np.subtract(found.part, part)).max() <= step / 2


def test_a_processor_that_pads_maps_otherwise_than_images_is_refused():
    own = type(processor("DPT"))

    class Beside(own):
        def __call__(self, images, segmentation_maps=None, **options):
            made = super().__call__(images, segmentation_maps=segmentation_maps, **options)
            made["labels"] = made["labels"].roll(3, -1)
            return made

    options = {"size": {"height": 32, "width": 64}, "do_pad": True, "size_divisor": 48}
    with pytest.raises(DataError, match=r"of transformers .* puts other margins around a mask"):
        map_options(Beside(**options))
    options["do_pad"] = False
    map_options(Beside(**options))


@pytest.mark.parametrize("length", [7, 8, 31, 64, 300, 1001])
def test_a_part_is_whole_exactly_if_it_is(length):
    for number in (3, 8, 30, 64, 299, 500):
        step = length / number
        for first in (0.0, 0.5):  # by the middle of each pixel, as PIL does it; by its beginning
            lines = np.floor((np.arange(number) + 0.5 - first) * step).astype(int)
            assert _edges(lines, length) == (0, length)
            start, end = _edges(lines + 5 * int(step + 1), length + 10 * int(step + 1))
            assert abs(start - 5 * int(step + 1)) <= step + 1
            assert abs(end - 5 * int(step + 1) - length) <= step + 1


def loaders_of(own, mask, size, **options):
    height, width = size
    features = {"image": Image(), "mask": Array2D(size, "int32")}
    rows = {"image": [picture(height, width)] * 2, "mask": [mask.tolist()] * 2}
    data = Dataset.from_dict(rows, features=Features(features))
    test = data.remove_columns("mask")
    return prepare_dataloaders(
        {"train": data, "validation": data, "test": test}, own, model=tiny_segformer(),
        transform=images_and_masks(), **options,
    )  # fmt: skip


@pytest.mark.parametrize(("made", "size", "part", "frame", "seen"), VIEWS)
def test_a_model_that_is_right_wherever_it_sees_scores_1(made, size, part, frame, seen):
    mask = np.zeros(size, int)
    mask[:, : size[1] // 2 - 8], mask[: size[0] // 2, size[1] // 2 + 4 :] = 1, 2
    loaders = loaders_of(processor(made[0], **made[1]), mask, size)
    for split in ("train", "validation"):
        (batch,) = loaders[split]
        labels = batch["labels"]
        outside = torch.ones_like(labels, dtype=torch.bool)
        outside[:, frame[0] : frame[1], frame[2] : frame[3]] = False
        assert (labels == 255).equal(outside)  # nothing is learned of what is not there
        classes = torch.nn.functional.one_hot(labels.masked_fill(outside, 2), 3)
        logits = classes.permute(0, 3, 1, 2).float()
        found = upsampled(SimpleNamespace(logits=logits), batch)
        maps, masks = found if isinstance(found, tuple) else (found, list(labels))
        scores = load_metric("mean_iou").compute(predictions=maps, references=masks)
        is_scaled = size[0] > frame[1] - frame[0]
        assert scores["mean_iou"] > 0.9 if is_scaled else scores["mean_iou"] == 1
    table = predict_loop(tiny_segformer(), loaders["test"], decode=upsampled)
    assert [one.shape for one in table.predictions] == [one.shape for one in maps]


def test_a_processor_that_crops_is_told(caplog):
    made, size, *_ = VIEWS[0]
    own = processor(made[0], **made[1])
    loaders_of(own, np.eye(*size, dtype=int), size)
    assert "crops images to their centre" in caplog.text
    own.do_center_crop, own.size = False, {"height": 512, "width": 512}  # as the line tells
    caplog.clear()
    (batch,) = loaders_of(own, np.eye(*size, dtype=int), size)["validation"]
    assert batch["labels"].shape == (2, 512, 512)
    assert "crops" not in caplog.text
