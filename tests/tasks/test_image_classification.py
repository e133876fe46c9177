"""Image classification: the call sites, class names, and the images that datasets hold."""

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, Sequence, Value
from tiny_scenes import NAMES, processor, scenes, tiny_vit

from manualloop import ConfigError, evaluate_loop, predict_loop, prepare_dataloaders
from manualloop.tasks import images

VIT = processor("ViT", size={"height": 16, "width": 16})


def batches_of(data, model=None, transform=None, **options):
    model = tiny_vit() if model is None else model
    options = {"label_column": "label", "processor": VIT, **options}
    loaders = prepare_dataloaders(
        {"validation": data}, options.pop("processor"), model=model,
        transform=transform or images(), **options,
    )  # fmt: skip
    return list(loaders["validation"])


def test_without_augmentation_batches_are_the_processor_s_own():
    data = scenes(6, sizes=[(32, 32), (20, 48)])
    (batch,) = batches_of(data)
    assert torch.equal(
        batch["pixel_values"], VIT(data["image"][:], return_tensors="pt")["pixel_values"]
    )
    assert batch["labels"].tolist() == data["label"][:]


def test_the_processor_may_stand_in_the_transform():
    data = scenes(4)
    (expected,) = batches_of(data)
    for transform in (images(VIT), images(processor=VIT)):
        (batch,) = batches_of(data, transform=transform, processor=None)
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    with pytest.raises(ConfigError, match="function of an image"):
        images(3)


def test_names_of_classes_reach_the_model_and_its_predictions():
    model = tiny_vit()
    loaders = prepare_dataloaders(
        {"validation": scenes(4)}, VIT, model=model, label_column="label", transform=images()
    )
    assert model.config.id2label == dict(enumerate(NAMES))
    predictions = predict_loop(model, loaders["validation"])
    assert set(predictions.labels) <= set(NAMES)
    swapped = scenes(4).cast_column("label", ClassLabel(names=NAMES[::-1]))
    (batch,) = batches_of(swapped, model)
    assert batch["labels"].tolist() == [1 - number for number in scenes(4)["label"]]


def test_the_model_may_get_what_augment_returns():
    def finished(image):
        return torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1) / 100 - 1

    data = scenes(3, sizes=[(16, 16)])
    (batch,) = batches_of(data, transform=images(finished, processor=False))
    assert torch.equal(batch["pixel_values"], torch.stack([finished(i) for i in data["image"][:]]))


GRAY = np.random.default_rng(0).integers(0, 256, (3, 16, 16)).astype(np.uint8)


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
@pytest.mark.parametrize(
    "feature", [Array2D((16, 16), "uint8"), Sequence(Sequence(Value("uint8")))], ids=str
)
def test_images_that_are_stored_as_numbers_are_read(feature, form):
    features = Features({"image": feature, "label": Value("int64")})
    data = Dataset.from_dict({"image": GRAY.tolist(), "label": [0, 1, 0]}, features=features)
    one = processor("ViT", size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    model = tiny_vit(num_channels=1)
    (batch,) = batches_of(data.with_format(form), model, processor=one)
    expected = torch.tensor(GRAY)[:, None] / 127.5 - 1
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert evaluate_loop(model, [batch], "accuracy")["accuracy"] in (0, 1 / 3, 2 / 3, 1)


def test_several_classes_a_row_and_values_stay_what_they_are():
    data = scenes(4).remove_columns("label")
    targets = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    (batch,) = batches_of(data.add_column("label", targets))
    assert batch["labels"].tolist() == targets
    model = tiny_vit(num_labels=1)
    (batch,) = batches_of(data.add_column("label", [0.5, 1.5, 2.5, 3.5]), model)
    assert batch["labels"].dtype == torch.float32


def test_rows_without_labels_are_predicted():
    model = tiny_vit()
    loaders = prepare_dataloaders(
        {"test": scenes(3).remove_columns("label")}, VIT, model=model, transform=images()
    )
    assert len(predict_loop(model, loaders["test"])) == 3
