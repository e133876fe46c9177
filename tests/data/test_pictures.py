"""Pictures of a batch: what the model gets is what is drawn."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from tiny_scenes import NAMES, processor, scenes, tiny_detr, tiny_segformer, tiny_vit, tiny_yolos

from manualloop import inspect_batch, prepare_dataloaders
from manualloop.data.pictures import colour_of, pictures_of
from manualloop.tasks import boxes, images, images_and_masks

SIZE = {"height": 64, "width": 96}


def drawn(picture):
    return np.array(Pil.open(io.BytesIO(picture.png)).convert("RGB")).astype(int)


def report_of(own, model, transform, data, **options):
    loaders = prepare_dataloaders(data, own, model=model, transform=transform, **options)
    return inspect_batch(loaders["train"])


def test_an_image_is_drawn_as_it_was_before_it_was_normalized():
    data = scenes(3, sizes=[(64, 96)])
    report = report_of(
        processor("ViT", size=SIZE), tiny_vit(), images(), data, label_column="label", seed=0
    )
    assert len(report.pictures) == 3
    originals = [np.array(i.resize((192, 128), Pil.Resampling.NEAREST)) for i in data["image"]]
    for picture in report.pictures:
        assert picture.size == (64, 96)
        assert min(np.abs(drawn(picture) - one).max() for one in originals) <= 1
        assert picture.parts[0].words in NAMES
    assert re.search(r"image 0 +64 x 96, 3 channels, -1\.00 to \S+  ->  (square|disc)", str(report))
    html = report._repr_html_()
    assert html.count("<img") == 3
    data = re.search(r'base64,([^"]+)"', html)[1]
    assert base64.b64decode(data) == report.pictures[0].png


def test_masks_are_laid_over_in_colours():
    names = dict(enumerate(["ground", *NAMES]))
    model = tiny_segformer(id2label=names, label2id={v: k for k, v in names.items()})
    own = processor("Segformer", size={"height": 64, "width": 64})
    report = report_of(own, model, images_and_masks(), scenes(2, sizes=[(64, 64)], seed=3))
    for picture in report.pictures:
        found = {part.words.rpartition(" ")[0]: part.number for part in picture.parts}
        assert found.keys() <= {"ground", "square", "disc", "ignored"}
        assert found["ground"] == 0
        image = drawn(picture)
        for name, number in found.items():
            if name in NAMES:  # a pixel of the class has more of its colour than of any other
                colour = np.array(colour_of(number))
                assert (np.abs(image - colour).sum(-1) < 260).any()
    batch = {"pixel_values": torch.zeros(1, 3, 8, 8), "labels": torch.full((1, 8, 8), 255)}
    (picture,) = pictures_of(batch, None, None)
    assert picture.parts[0].words == "ignored 100%"
    assert np.array_equal(np.unique(drawn(picture)), [44])


@pytest.mark.parametrize("kind", ["Yolos", "Detr"])
def test_boxes_are_drawn_where_they_are(kind):
    build = tiny_yolos if kind == "Yolos" else tiny_detr
    size = SIZE if kind == "Yolos" else {"shortest_edge": 64, "longest_edge": 128}
    data = scenes(2, sizes=[(64, 96), (96, 64)])
    report = report_of(processor(kind, size=size), build(), boxes(), data, seed=1)
    for picture in report.pictures:
        image = drawn(picture)
        scale = 192 / max(picture.size)
        assert image.shape == (*(round(side * scale) for side in picture.size), 3)
        for part in picture.parts:
            numbers = re.findall(r"\d+", part.words)
            left, _, _, bottom = (int(float(number) * scale) for number in numbers)
            colour = np.array(colour_of(part.number))
            near = image[max(bottom - 4, 0) : bottom + 5, max(left - 4, 0) : left + 5]
            assert (np.abs(near - colour).sum(-1) == 0).any()
    lines = str(report)
    assert "image 1" in lines
    assert any(name in lines for name in NAMES)


def test_a_batch_without_images_has_no_pictures():
    assert pictures_of({"pixel_values": torch.zeros(2, 5)}, None, None) == ()
    assert pictures_of({"input_ids": torch.zeros(2, 5)}, None, None) == ()
    batch = {"pixel_values": torch.randn(2, 1, 4, 4), "labels": torch.tensor([1.5, 2.5])}
    assert [p.parts[0].words for p in pictures_of(batch, None, None)] == ["1.5", "2.5"]


def test_colours_of_classes_differ():
    colours = {colour_of(number) for number in range(150)}
    assert len(colours) == 150
