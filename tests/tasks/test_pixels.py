"""What all tasks on images promise: the processor's tensors, and the same for every way to read."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import fixes_in, messages, run_fix, whole_and_resumed
from PIL import Image as Pil
from tiny_scenes import (
    flipped,
    flipped_with_boxes,
    flipped_with_mask,
    processor,
    scenes,
    tiny_segformer,
    tiny_vit,
    tiny_yolos,
)

from manualloop import (
    DataError,
    check_accumulation,
    evaluate_loop,
    find_checkpoint,
    predict_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.data.sampler import set_epoch
from manualloop.tasks import (
    boxes,
    detected,
    detection_terms,
    images,
    images_and_masks,
    upsampled,
)
from manualloop.tasks.pixels import augmented, image_processor, opened, processed

SIZE = {"height": 16, "width": 16}
YOLOS = processor("Yolos", size={"height": 32, "width": 32})


class Job:
    """A task: its processor, its model, its transforms, and how it is scored."""

    def __init__(self, processor, model, transform, plain, metric, **functions):
        self.processor, self.build = processor, model
        self.transform = {"train": transform, "validation": plain}
        self.metric, self.functions = metric, functions
        self.terms = {name: f for name, f in functions.items() if name == "terms"}

    def loaders(self, model=None, **options):
        data = {"train": scenes(6), "validation": scenes(5, sizes=[(32, 32), (24, 40)], seed=1)}
        options = {"batch_size": 2, "label_column": "label", **options}
        if self.metric != "accuracy":
            data = {name: rows.remove_columns("label") for name, rows in data.items()}
            del options["label_column"]
        model = self.build() if model is None else model
        transform = options.pop("transform", self.transform)
        return prepare_dataloaders(
            data, self.processor, model=model, transform=transform, **options
        )


JOBS = {
    "classification": Job(
        processor("ViT", size=SIZE), tiny_vit, images(flipped), images(), "accuracy"
    ),
    "segmentation": Job(
        processor("Segformer", size=SIZE),
        tiny_segformer,
        images_and_masks(flipped_with_mask),
        images_and_masks(),
        "mean_iou",
        decode=upsampled,
    ),
    "detection": Job(
        YOLOS, tiny_yolos, boxes(augment=flipped_with_boxes), boxes(), "map",
        decode=detected(YOLOS), terms=detection_terms,
    ),
}  # fmt: skip
each_job = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)


def flat(value, path=""):
    """The tensors and numbers in a batch by their place."""
    if isinstance(value, dict):
        return {k: v for name in value for k, v in flat(value[name], f"{path}.{name}").items()}
    if isinstance(value, list | tuple) and not isinstance(value, str):
        return {k: v for n, one in enumerate(value) for k, v in flat(one, f"{path}.{n}").items()}
    return {path: value}


def by_row(loader, epoch=0):
    """What each row becomes, by the digest of its image's place in the data."""
    set_epoch(loader, epoch)
    numbers = [n for batch in loader.batch_sampler for n in batch]
    set_epoch(loader, epoch)
    found = []
    for batch in loader:
        for place in range(len(batch["pixel_values"])):
            row = {name: column[place] for name, column in batch.items()}
            found.append({k: torch.as_tensor(v) for k, v in flat(row).items() if v is not None})
    return dict(zip(numbers, found, strict=True))


def is_same(one, other):
    return one.keys() == other.keys() and all(
        row.keys() == other[n].keys() and all(torch.equal(v, other[n][k]) for k, v in row.items())
        for n, row in one.items()
    )


@each_job
def test_a_row_is_the_same_for_any_batch_size_and_number_of_workers(job):
    first = by_row(job.loaders()["train"])
    assert len(first) == 6
    assert is_same(first, by_row(job.loaders(batch_size=3)["train"]))
    if job.metric == "map":  # with the columns of most kinds
        assert is_same(first, by_row(job.loaders(num_workers=2)["train"]))
    second = by_row(job.loaders()["train"], epoch=2)
    assert not is_same(first, second)
    assert is_same(second, by_row(job.loaders(batch_size=6)["train"], epoch=2))
    assert not is_same(first, by_row(job.loaders(seed=7)["train"]))


@each_job
def test_an_evaluation_reads_the_same_images_each_time(job):
    loaders = job.loaders(transform=dict.fromkeys(("train", "validation"), job.transform["train"]))
    first = by_row(loaders["validation"])
    assert is_same(first, by_row(loaders["validation"]))


@each_job
def test_transforms_and_decoders_pickle(job):
    loader = job.loaders()["train"]
    copied = pickle.loads(pickle.dumps(loader.dataset.transform))
    row = loader.dataset.rows[1]
    row = {**row, "labels": row.get("label"), "class_map": row["mask"]}
    made = [t(row, torch.Generator().manual_seed(3)) for t in (loader.dataset.transform, copied)]
    one, other = map(flat, made)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value is None or torch.equal(*map(torch.as_tensor, (value, other[name])))
    pickle.loads(pickle.dumps(job.functions))


def test_a_run_resumes_in_the_middle(tmp_path):
    job = JOBS["detection"]

    def run(folder, on_step):
        model = job.build()
        loaders = job.loaders(model)
        evaluate = partial(evaluate_loop, model, loaders["validation"], job.metric, **job.functions)
        return train_loop(
            model, loaders["train"], num_epochs=1, evaluate=evaluate, checkpoint_dir=folder,
            checkpoint_every=2, on_step=on_step, progress_bar=False, **job.terms,
        )  # fmt: skip

    whole, _ = whole_and_resumed(run, tmp_path, dies_after=2)
    assert {"loss", job.metric} <= whole.metrics.keys() | {"mean_iou", "map", "accuracy"}
    folder = find_checkpoint(tmp_path / "whole")
    assert (folder / "preprocessor_config.json").exists()


@each_job
def test_scores_and_predictions_do_not_depend_on_the_batch_size(job):
    model = job.build()
    found = []
    for batch_size in (1, 5):
        loader = job.loaders(model, eval_batch_size=batch_size)["validation"]
        decode = {k: f for k, f in job.functions.items() if k == "decode"}
        scores = evaluate_loop(model, loader, job.metric, **job.functions)
        predictions = predict_loop(model, loader, **decode)
        assert predictions.index.tolist() == [0, 1, 2, 3, 4]
        found.append((scores, predictions))
    for scores, predictions in found[1:]:
        assert scores == pytest.approx(found[0][0], abs=1e-6)
        one, other = flat(list(predictions.predictions)), flat(list(found[0][1].predictions))
        for key, value in one.items():
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(other[key]))


@pytest.mark.parametrize("name", ["classification", "segmentation"])
def test_any_split_is_the_same_update(name):
    job = JOBS[name]
    torch.set_default_dtype(torch.float64)
    try:
        model = job.build().double()
        batch = next(iter(job.loaders(model, batch_size=6)["train"]))
        batch = as_double(batch)
        report = check_accumulation(model.eval(), batch, **job.terms)
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.is_exact, report
    assert max(report.gradient_difference, report.loss_difference) < 1e-12, report
    assert report.unweighted_difference > 1e-3 or job.metric == "accuracy"


def as_double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) is dict:
        return {name: as_double(entry) for name, entry in value.items()}
    return type(value)(map(as_double, value)) if type(value) is list else value


def test_a_processor_is_told_from_a_tokenizer():
    class Both:
        image_processor = YOLOS

        def __call__(self):
            """A processor of texts and images."""

    assert image_processor(YOLOS) is image_processor(Both()) is YOLOS
    assert image_processor(None) is None


CALLS = {
    "image and generator": lambda image, generator: (image, generator),
    "by name": lambda image, size=3, generator=None: (image, generator),
    "image alone": lambda image: (image, None),
    "image and an option": lambda image, size=3: (image, None),
    "partial": partial(lambda size, image, generator: (image, generator), 3),
    "module": type("Flip", (torch.nn.Module,), {"forward": lambda self, image: (image, None)})(),
    "any inputs": lambda *inputs: (*inputs, None),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_gets_the_generator_if_it_takes_one(name):
    generator = torch.Generator()
    image, got = augmented(CALLS[name], generator, 5)
    assert image == 5
    assert got is (generator if name in ("image and generator", "by name", "partial") else None)


def test_numbers_of_an_image_are_read_as_they_are_meant():
    vit = processor("ViT", size=SIZE)
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    expected = vit(Pil.fromarray(array), return_tensors="pt")["pixel_values"][0]
    for image in (
        Pil.fromarray(array), array, array.astype(np.int64), array.transpose(2, 0, 1),
        torch.tensor(array).permute(2, 0, 1), torch.tensor(array),
    ):  # fmt: skip
        assert torch.equal(processed(vit, image)["pixel_values"], expected)
    scaled = processed(vit, torch.tensor(array).permute(2, 0, 1) / 255)["pixel_values"]
    torch.testing.assert_close(scaled, expected)
    for wrong in (array * 1.0, array / 127.5 - 1, array.astype(np.int64) * 100):
        with pytest.raises(DataError, match="processor=False"):
            processed(vit, wrong)
    with pytest.raises(DataError, match="not an image"):
        processed(vit, "image.png")


def test_images_get_the_channels_of_the_model():
    gray = Pil.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    assert opened(gray, 3).mode == "RGB"
    assert opened(gray.convert("RGBA"), 3).mode == "RGB"
    assert opened(gray.convert("P"), 1).mode == "L"
    assert opened(np.zeros((2, 2)), 3).shape == (3, 2, 2)
    assert opened(torch.zeros(2, 2), 1).shape == (2, 2)
    with pytest.raises(DataError, match="more than 8 bits"):
        opened(Pil.fromarray(np.full((2, 2), 1000, np.int32)), 3)
    with pytest.raises(DataError, match="cast_column"):
        opened("cat.jpg", 3)


def test_images_of_several_sizes_without_a_mask_are_refused():
    vit = processor("ViT", do_resize=False)
    data = scenes(2, sizes=[(16, 16), (16, 24)])
    loaders = prepare_dataloaders(data, vit, model=tiny_vit(), transform=images())
    with pytest.raises(DataError, match="takes no pixel_mask"):
        list(loaders["train"])


def test_what_is_wrong_with_a_row_is_reported_with_its_number():
    data = scenes(3)
    with pytest.raises(DataError, match=r"Row 0 of train: .*no column 'picture'"):
        prepare_dataloaders(
            data, processor("ViT"), model=tiny_vit(), transform=images(column="picture")
        )
    with pytest.raises(DataError, match="There is no processor"):
        prepare_dataloaders(data, model=tiny_vit(), transform=images())


def test_a_line_tells_which_columns_are_used(caplog):
    JOBS["detection"].loaders()
    lines = "\n".join(messages(caplog))
    assert "using what transform returns: pixel_values -> labels" in lines


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_black_and_white_is_0_and_255(kind):
    own = processor("ViT", size={"height": 16, "width": 16})
    pixels = np.random.default_rng(0).random((20, 24)) < 0.5
    expected = processed(own, Pil.fromarray(pixels).convert("RGB"))["pixel_values"]
    for image in (kind(np.stack([pixels] * 3, -1)), opened(kind(pixels), 3)):
        assert torch.equal(processed(own, image)["pixel_values"], expected)


@pytest.mark.parametrize("is_stream", [False, True])
def test_images_of_0_and_1_are_refused_with_the_line_that_scales_them(is_stream):
    random = np.random.default_rng(0)
    rows = {"image": [random.integers(0, 2, (16, 16)).tolist() for _ in range(4)],
            "label": [0, 1] * 2}  # fmt: skip
    data, own = Dataset.from_dict(rows), processor("ViT", size={"height": 16, "width": 16})
    options = {"model": tiny_vit(), "transform": images(), "batch_size": 4}
    stored = data.to_iterable_dataset() if is_stream else data
    with pytest.raises(DataError, match="whole numbers 0 and 1 alone") as error:
        prepare_dataloaders({"dev": stored}, own, **options)
    (line,) = fixes_in(error.value)
    scaled = run_fix(line, {"dev": data}, numpy=np)["dev"]
    (batch,) = prepare_dataloaders({"dev": scaled}, own, **options)["dev"]
    assert batch["pixel_values"].max() > 0.9
    rows["image"][3][0][0] = 2  # dark, and no black and white
    prepare_dataloaders({"dev": Dataset.from_dict(rows)}, own, **options)
    doubled = {**options, "transform": images(lambda image: np.asarray(image) * 255)}
    prepare_dataloaders({"dev": data}, own, **doubled)
    own.do_rescale = False  # then the model gets the numbers themselves
    (batch,) = prepare_dataloaders({"dev": data}, own, **options)["dev"]
    assert batch["pixel_values"].max() > 0.9
