"""Object detection: boxes in and out, the terms of its loss, and scores as COCO counts them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value
from helpers import fixes_in, messages, run_fix
from tiny_scenes import (
    FEATURES,
    NAMES,
    flipped_with_boxes,
    processor,
    scenes,
    tiny_detr,
    tiny_yolos,
)
from torch import nn

from manualloop import (
    ConfigError,
    DataError,
    ModelError,
    TrainState,
    accumulate_gradients,
    check_accumulation,
    evaluate_loop,
    load_metric,
    predict_loop,
    prepare_dataloaders,
    train_steps,
)
from manualloop.tasks import boxes, detected, detection_terms

YOLOS = processor("Yolos", size={"height": 32, "width": 32})
DETR = processor("Detr", size={"shortest_edge": 32, "longest_edge": 64})
MIXED = [(32, 32), (24, 40), (64, 40)]


def objects(num_rows=6, **options):
    return scenes(num_rows, **options).select_columns(["image", "image_id", "objects"])


def loader_of(data, model=None, own=YOLOS, transform=None, split="validation", **options):
    return prepare_dataloaders(
        {split: data}, own, model=model or tiny_yolos(), transform=transform or boxes(),
        **{"batch_size": 6, **options},
    )[split]  # fmt: skip


def coco(row):
    found = row["objects"]
    columns = (found[name] for name in ("bbox", "category", "area", "iscrowd"))
    names = ("bbox", "category_id", "area", "iscrowd")
    return {
        "image_id": row["image_id"],
        "annotations": [dict(zip(names, one, strict=True)) for one in zip(*columns, strict=True)],
    }


@pytest.mark.parametrize(
    "own", [YOLOS, processor("Yolos", size={"height": 32, "width": 32},
                             pad_size={"height": 48, "width": 48})],
    ids=["resized", "padded"],
)  # fmt: skip
def test_without_augmentation_batches_are_the_processor_s_own(own):
    data = objects(sizes=MIXED)
    (batch,) = loader_of(data, own=own)
    expected = own(data["image"][:], annotations=[coco(row) for row in data], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    for ours, theirs in zip(batch["labels"], expected["labels"], strict=True):
        assert type(ours) is dict
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [len(row["boxes"]) for row in batch["labels"]] == [1, 2, 0, 0, 2, 3]


def test_images_of_several_sizes_are_padded_with_a_mask():
    data = objects(sizes=MIXED)
    model = tiny_detr()
    (batch,) = loader_of(data, model, DETR)
    expected = DETR(data["image"][:], annotations=[coco(r) for r in data], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["pixel_mask"], expected["pixel_mask"])
    for ours, row in zip(batch["labels"], data, strict=True):
        alone = DETR(row["image"], annotations=coco(row), return_tensors="pt")["labels"][0]
        assert torch.equal(ours["boxes"], alone["boxes"])  # of the image, not of the padding
    with pytest.raises(DataError, match=r"pad_size"):
        list(loader_of(data, tiny_yolos(), processor("Yolos", size=DETR.size)))


@pytest.mark.parametrize(("build", "eos"), [(tiny_yolos, 0.1), (tiny_yolos, 0.4), (tiny_detr, 0.4)])
def test_any_split_is_the_same_update(build, eos):
    torch.set_default_dtype(torch.float64)
    try:
        model = build(eos_coefficient=eos).double().eval()
        own = YOLOS if build is tiny_yolos else DETR
        (batch,) = loader_of(objects(sizes=[(32, 32)]), model, own)
        labels = [
            {k: v.double() if v.is_floating_point() else v for k, v in row.items()}
            for row in batch["labels"]
        ]
        batch = {"pixel_values": batch["pixel_values"].double(), "labels": labels}
        assert [len(row["boxes"]) for row in labels].count(0) == 2
        model(**batch).loss.backward()
        expected = gradient(model)
        for sizes in ((6,), (1, 1, 1, 1, 1, 1), (2, 1, 3)):
            model.zero_grad()
            update = accumulate_gradients(model, split(batch, sizes), terms=detection_terms)
            assert update.loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-12)
            assert (gradient(model) - expected).abs().max() < 1e-12 * expected.abs().max().clamp(1)
        assert check_accumulation(model, batch, terms=detection_terms).is_exact
        loader = split(batch, (2, 3, 1))
        whole = evaluate_loop(model, [batch], terms=detection_terms)["loss"]
        assert evaluate_loop(model, loader, terms=detection_terms)["loss"] == pytest.approx(
            whole, rel=1e-12
        )
    finally:
        torch.set_default_dtype(torch.float32)


def gradient(model):
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return nn.utils.parameters_to_vector(found)


def split(batch, sizes):
    parts, start = [], 0
    for size in sizes:
        parts.append({name: column[start : start + size] for name, column in batch.items()})
        start += size
    return parts


def test_one_micro_batch_has_the_bits_of_the_model_s_loss():
    model = tiny_yolos().eval()
    (batch,) = loader_of(objects(), model)
    inputs = {name: batch[name] for name in ("pixel_values", "labels")}
    model(**inputs).loss.backward()
    expected = gradient(model)
    model.zero_grad()
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in train_steps(state, [batch], num_epochs=1, terms=detection_terms):
        assert torch.equal(gradient(model), expected)


def test_the_terms_of_other_losses_are_refused():
    with pytest.raises(ModelError, match="is not that of YOLOS"):
        detection_terms.of_model(nn.Linear(1, 1))


@pytest.mark.parametrize("own", [YOLOS, DETR], ids=["YOLOS", "DETR"])
def test_what_is_found_is_what_the_processor_finds(own):
    build = tiny_yolos if own is YOLOS else tiny_detr
    model = build().eval()
    data = objects(sizes=MIXED)
    sizes = [(image.height, image.width) for image in data["image"]]
    loader = loader_of(data, model, own, batch_size=1)
    for threshold in (0.0, 0.4):
        found = predict_loop(model, loader, decode=detected(own, threshold=threshold))
        for row, batch in enumerate(loader):
            outputs = model(**{k: batch[k] for k in batch if k.startswith("pixel_")})
            (expected,) = own.post_process_object_detection(
                outputs, threshold=threshold, target_sizes=[sizes[row]]
            )
            assert all(torch.equal(found.predictions[row][k], expected[k]) for k in expected)


def test_boxes_come_back_in_pixels_of_the_image():
    """A detector that returns what it is trained on finds the boxes of the dataset."""
    for own, build in (
        (YOLOS, tiny_yolos),
        (processor("Yolos", size={"shortest_edge": 32, "longest_edge": 64},
                   pad_size={"height": 64, "width": 64}), tiny_yolos),
        (DETR, tiny_detr),
    ):  # fmt: skip
        loader = loader_of(objects(sizes=MIXED), build(), own)
        (batch,) = loader
        logits, found = torch.full((6, 6, 3), -9.0), torch.zeros(6, 6, 4)
        logits[..., 2] = 9
        for row, label in enumerate(batch["labels"]):
            for place, number in enumerate(label["class_labels"].tolist()):
                logits[row, place, number], found[row, place] = 30, label["boxes"][place]
        outputs = SimpleNamespace(logits=logits, pred_boxes=found)
        predictions, references = detected(own, threshold=0.5)(outputs, batch)
        for predicted, right in zip(predictions, references, strict=True):
            kept = [not crowd for crowd in right["iscrowd"]]
            expected = torch.tensor(right["boxes"]).reshape(-1, 4)[kept]
            torch.testing.assert_close(predicted["boxes"], expected, atol=1e-4, rtol=1e-5)
        metric = load_metric("map")
        scores = metric.compute(predictions=predictions, references=references)
        assert scores["map"] == pytest.approx(1)


def test_a_loader_of_ones_own_is_scored_by_its_labels():
    data = objects(4)
    made = YOLOS(data["image"][:], annotations=[coco(row) for row in data], return_tensors="pt")
    labels = [dict(label) for label in made["labels"]]
    model = tiny_yolos().eval()
    batch = {"pixel_values": made["pixel_values"], "labels": labels}
    outputs = model(pixel_values=batch["pixel_values"])
    _, references = detected(YOLOS)(outputs, batch)
    expected = np.array(data[1]["objects"]["bbox"])
    expected[:, 2:] += expected[:, :2]
    np.testing.assert_allclose(references[1]["boxes"], expected, atol=1e-4)
    scores = evaluate_loop(model, [batch], "map", decode=detected(YOLOS), terms=detection_terms)
    assert {"map", "loss"} <= scores.keys()
    with pytest.raises(DataError, match="size of its images"):
        detected(YOLOS)(outputs, {"pixel_values": batch["pixel_values"]})


def test_crowds_are_left_out_of_training_and_forgiven_in_the_score():
    (batch,) = loader_of(objects())
    assert batch["objects"][3]["iscrowd"] == [1]
    assert len(batch["labels"][3]["class_labels"]) == 0
    crowd = batch["objects"][3]
    found = {"boxes": crowd["boxes"], "labels": crowd["labels"], "scores": [0.9]}
    other = {"boxes": [[0, 0, 9, 9]], "labels": [0], "scores": [0.5]}
    references = [crowd, {"boxes": [[0, 0, 9, 9]], "labels": [0]}]
    scores = load_metric("map").compute(predictions=[found, other], references=references)
    assert scores["map"] == pytest.approx(1)


def test_boxes_move_with_their_image_and_end_at_its_border():
    def shifted(image, corners):
        corners[:, 0] += 12
        return image, corners

    features = {**FEATURES["objects"]}
    features = Features({name: features[name] for name in ("bbox", "category")})
    data = Dataset.from_dict(
        {
            "image": scenes(1)["image"][:],
            "objects": [{"bbox": [[1, 2, 5, 6], [16, 1, 8, 4], [25, 0, 4, 4]],
                         "category": [0, 1, 1]}],
        },
        features=Features({"image": Image(), "objects": dict(features)}),
    )  # fmt: skip
    loader = loader_of(data, transform=boxes(YOLOS, shifted))
    (batch,) = loader
    assert batch["objects"][0]["boxes"] == [[13, 2, 18, 8], [28, 1, 32, 5]]
    assert batch["objects"][0]["labels"] == [0, 1]
    assert batch["labels"][0]["class_labels"].tolist() == [0, 1]
    with pytest.raises(DataError, match="as many boxes"):
        loader_of(data, transform=boxes(YOLOS, lambda image, corners: (image, corners[:1])))


def test_a_flip_is_undone_by_a_second_one():
    row = objects(6)[5]
    generator = torch.Generator()
    for seed in range(4):
        image, corners = flipped_with_boxes(
            row["image"], np.array(row["objects"]["bbox"]), generator.manual_seed(seed)
        )
        again = flipped_with_boxes(image, corners, generator.manual_seed(seed))
        assert np.array_equal(again[1], row["objects"]["bbox"])
        assert np.array_equal(np.array(again[0]), np.array(row["image"]))


LISTED = Features(
    {
        "image": Image(),
        "image_id": Value("int64"),
        "objects": [{"bbox": Sequence(Value("float32"), length=4), "category": Value("string")}],
    }
)


def test_boxes_may_be_a_list_of_dicts_and_classes_strings():
    data = objects()
    (expected,) = loader_of(data)
    listed = [
        [
            {"bbox": box, "category": NAMES[number]}
            for box, number in zip(row["bbox"], row["category"], strict=True)
        ]
        for row in data["objects"]
    ]
    columns = {"image": data["image"][:], "image_id": data["image_id"][:], "objects": listed}
    rows = Dataset.from_dict(columns, features=LISTED)
    model = tiny_yolos()
    loaders = prepare_dataloaders(
        {"train": rows, "validation": rows}, YOLOS, model=model, transform=boxes(), batch_size=6
    )
    assert model.config.id2label == {0: "disc", 1: "square"}
    (batch,) = loaders["validation"]
    swapped = [[1 - n for n in row["labels"]] for row in expected["objects"]]
    assert [row["labels"] for row in batch["objects"]] == swapped
    for ours, theirs in zip(batch["objects"], expected["objects"], strict=True):
        assert ours["boxes"] == theirs["boxes"]


def with_names(data, names):
    features = data.features.copy()
    features["objects"] = {
        **FEATURES["objects"], "category": Sequence(ClassLabel(names=names))
    }  # fmt: skip
    return data.cast(features)


def test_a_number_means_the_same_class_in_all_splits_and_in_the_model(caplog):
    data = objects()
    model = tiny_yolos()
    loaders = prepare_dataloaders(
        {"train": data, "validation": with_names(data, NAMES[::-1])}, YOLOS, model=model,
        transform=boxes(), batch_size=6,
    )  # fmt: skip
    assert model.config.id2label == dict(enumerate(NAMES))
    (batch,) = loaders["validation"]
    expected = [[1 - n for n in row["category"]] for row in data["objects"]]
    assert [row["labels"] for row in batch["objects"]] == expected
    assert "numbered so in validation" in "\n".join(messages(caplog))
    with pytest.raises(DataError, match="has the class 'star'"):
        prepare_dataloaders(
            {"train": data, "validation": with_names(data, ["square", "star"])}, YOLOS,
            model=tiny_yolos(), transform=boxes(),
        )  # fmt: skip
    with pytest.raises(DataError, match="num_labels=1"):
        loader_of(data, tiny_yolos(num_labels=1), split="train")


def test_mistakes_in_boxes_are_refused_in_words():
    data = objects()
    with pytest.raises(DataError, match=r"no 'boxes', only bbox"):
        loader_of(data, transform=boxes(box="boxes"))
    numbers = Features(
        {**FEATURES, "objects": {**FEATURES["objects"], "category": Sequence(Value("int64"))}}
    )
    del numbers["label"], numbers["mask"]
    high = data.cast(numbers).map(
        lambda row: {"objects": {**row["objects"], "category": [9] * len(row["objects"]["bbox"])}}
    )
    with pytest.raises(DataError, match=r"The class 9 is not one of the model's"):
        loader_of(high)
    with pytest.raises(ConfigError, match="needs the image processor"):
        loader_of(data, own=None)
    with pytest.raises(ConfigError, match="has no post_process_object_detection"):
        detected(processor("ViT"))
    negative = data.map(
        lambda row: {
            "objects": {
                **row["objects"], "bbox": [[3, 3, -2, 1]] * len(row["objects"]["bbox"])
            }
        }
    )  # fmt: skip
    with pytest.raises(DataError, match="negative size"):
        loader_of(negative)


def test_a_line_tells_how_many_boxes_there_are(caplog):
    loader_of(objects(), split="train")
    line = (
        "train: 9 boxes in 6 images, 1 of them without a box; left out of the training: 1 of crowds"
    )
    assert line in messages(caplog)


def test_unlabelled_images_are_predicted():
    model = tiny_yolos()
    data = objects(4, sizes=MIXED).remove_columns("objects")
    found = predict_loop(model, loader_of(data, model, split="test"), decode=detected(YOLOS))
    assert len(found) == 4
    assert found.predictions[1]["boxes"].shape == (6, 4)


def looped_map(predictions, references, ious):
    """Average precision at 101 recalls, the mean over thresholds and classes, by plain loops."""
    labels = sorted({label for right in references for label in right["labels"]})
    found = []
    for overlap in ious:
        for label in labels:
            total = sum(right["labels"].count(label) for right in references)
            hits = []
            for image, (predicted, right) in enumerate(zip(predictions, references, strict=True)):
                free = [n for n, one in enumerate(right["labels"]) if one == label]
                order = sorted(
                    (n for n, one in enumerate(predicted["labels"]) if one == label),
                    key=lambda n: -predicted["scores"][n],
                )
                for n in order:
                    best, at = overlap, None
                    for g in free:
                        value = iou(predicted["boxes"][n], right["boxes"][g])
                        if value >= best:
                            best, at = value, g
                    if at is not None:
                        free.remove(at)
                    hits.append((predicted["scores"][n], image, at is not None))
            hits.sort(key=lambda hit: -hit[0])
            found.append(average_precision([hit for *_, hit in hits], total))
    return sum(found) / len(found)


def iou(one, other):
    sides = [min(one[2 + a], other[2 + a]) - max(one[a], other[a]) for a in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both)


def average_precision(hits, total):
    right, curve = 0, []
    for number, hit in enumerate(hits, start=1):
        right += hit
        curve.append((right / total, right / number))
    reached = [
        max((precision for recall, precision in curve if recall >= least - 1e-12), default=0)
        for least in np.linspace(0, 1, 101)
    ]
    return sum(reached) / 101


def test_map_is_that_of_plain_loops():
    random = np.random.default_rng(0)
    predictions, references = [], []
    for _ in range(12):
        starts = random.integers(0, 40, (random.integers(0, 5), 2))
        right = np.concatenate([starts, starts + random.integers(8, 40, starts.shape)], 1)
        number = len(right)
        shifts = random.integers(-4, 5, right.shape)
        predicted = np.concatenate([right + shifts, right[: number // 2]])
        predictions.append(
            {
                "boxes": predicted.astype(float).tolist(),
                "labels": random.integers(0, 2, len(predicted)).tolist(),
                "scores": random.random(len(predicted)).tolist(),
            }
        )
        references.append(
            {
                "boxes": right.astype(float).tolist(),
                "labels": random.integers(0, 2, number).tolist(),
            }
        )
    scores = load_metric("map").compute(predictions=predictions, references=references)
    expected = looped_map(predictions, references, np.arange(0.5, 1, 0.05))
    assert scores["map"] == pytest.approx(expected, abs=1e-6)
    assert 0 < scores["map"] < 1


def test_boxes_are_scored_as_far_as_they_are_in_the_image():
    made = scenes(2)
    objects = [{"bbox": [box], "category": [1]} for box in ([20, 20, 40, 40], [-5, 2, 15, 9])]
    kinds = {"bbox": Sequence(Sequence(Value("float32"))), "category": Sequence(Value("int64"))}
    features = Features({"image": Image(), "objects": kinds})
    data = Dataset.from_dict({"image": made["image"][:], "objects": objects}, features=features)
    options = {"model": tiny_yolos(), "transform": boxes(YOLOS), "batch_size": 2}
    (batch,) = prepare_dataloaders({"test": data}, YOLOS, **options)["test"]
    logits, corners = torch.full((2, 1, 3), -9.0), torch.zeros(2, 1, 4)
    for row, labels in enumerate(batch["labels"]):  # a detector that finds what it is trained on
        logits[row, 0, labels["class_labels"]] = 30.0
        corners[row, 0] = labels["boxes"][0]
    outputs = SimpleNamespace(logits=logits, pred_boxes=corners)
    found, right = detected(YOLOS, threshold=0.5)(outputs, batch)
    assert load_metric("map").compute(predictions=found, references=right)["map"] == 1


def test_a_stream_has_the_classes_of_the_others():
    data = scenes(4).select_columns(["image", "objects"])
    names = data.features["objects"]["category"].feature.names
    kinds = data.features.copy()
    kinds["objects"] = {**kinds["objects"], "category": Sequence(ClassLabel(names=names[::-1]))}
    turned = data.map(
        lambda row: {
            "objects": {
                **row["objects"],
                "category": [len(names) - 1 - n for n in row["objects"]["category"]],
            }
        },
        features=kinds,
    )
    found = []
    for test in (data, turned, turned.to_iterable_dataset()):
        splits, transform = {"train": data, "test": test}, boxes(YOLOS)
        loaders = prepare_dataloaders(splits, YOLOS, model=tiny_yolos(), transform=transform)
        rows = [row for batch in loaders["test"] for row in batch["labels"]]
        found.append([row["class_labels"].tolist() for row in rows])
    assert found[0] == found[1] == found[2]


PLAIN = Features(
    {
        "image": Image(),
        "objects": {
            "bbox": Sequence(Sequence(Value("float32"))),
            "category": Sequence(Value("float32")),
            "area": Sequence(Value("float32")),
            "iscrowd": Sequence(Value("float32")),
        },
    }
)


def changed(change, num_rows=6):
    """Rows of scenes after a change of the dicts of their boxes."""
    rows = [dict(row) for row in objects(num_rows).select_columns(["image", "objects"])]
    for number, row in enumerate(rows):
        row["objects"] = change(number, dict(row["objects"]))
    return Dataset.from_list(rows, features=PLAIN)


@pytest.mark.parametrize(
    ("name", "cell", "words"),
    [
        ("bbox", None, "bbox=None"),
        ("bbox", [None], r"bbox=\[None\]"),
        ("bbox", [[1, 2, None, 4]], "bbox="),
        ("bbox", [[1, 2, 3, 4, 5]], "list of four numbers"),
        ("bbox", [[1, 2, 3, 4, 5]] * 4, "list of four numbers"),
        ("bbox", [[1, 2, 3]], "list of four numbers"),
        ("bbox", [[1, 2, -3, 4]], "negative size"),
        ("category", None, "category=None"),
        ("category", [None], "no whole number"),
        ("category", [0.7], "no whole number"),
        ("category", [float("nan")], "no whole number"),
    ],
)
def test_parts_of_boxes_that_are_missing_or_something_else_are_refused(name, cell, words):
    data = changed(lambda row, boxes: {**boxes, name: cell} if row == 0 else boxes)
    for stored in (data, data.to_iterable_dataset()):
        with pytest.raises(DataError, match=f"Row 0 of train.*{words}"):
            loader_of(stored, tiny_yolos(), split="train", batch_size=1)


def test_an_area_or_a_mark_that_is_missing_is_that_of_the_box():
    def without(row, boxes):
        missing = [None] * len(boxes["bbox"])
        return {**boxes, "area": missing, "iscrowd": missing}

    def given(row, boxes):
        return {**boxes, "area": [w * h for *_, w, h in boxes["bbox"]],
                "iscrowd": [0] * len(boxes["bbox"])}  # fmt: skip

    batches = [next(iter(loader_of(changed(change), tiny_yolos()))) for change in (without, given)]
    for one, other in zip(*(batch["labels"] for batch in batches), strict=True):
        assert torch.equal(one["area"], other["area"])
        assert torch.equal(one["class_labels"], other["class_labels"])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_without_boxes_among_others_are_refused_at_once(split):
    data = changed(lambda row, boxes: None if row == 1 else boxes)
    with pytest.raises(DataError, match=f"Row 1 of {split} has objects=None") as error:
        loader_of(data, tiny_yolos(), split=split, batch_size=1)
    line = next(line for line in fixes_in(error.value) if ".filter(" in line)
    assert len(run_fix(line, {split: data})[split]) == 5


def test_boxes_that_are_corners_are_refused_with_the_line_that_changes_them():
    def corners(row, boxes):
        return {**boxes, "bbox": [[x, y, x + w, y + h] for x, y, w, h in boxes["bbox"]]}

    data, right = changed(corners), changed(lambda row, boxes: boxes)
    for stored in (data, data.to_iterable_dataset()):
        with pytest.raises(DataError, match="are left, top, right and bottom") as error:
            loader_of(stored, tiny_yolos())
    (line,) = fixes_in(error.value)
    found = run_fix(line, {"validation": data})["validation"]
    assert found["objects"][:] == right["objects"][:]
    loader_of(found, tiny_yolos())


def test_boxes_that_are_fractions_are_refused_with_the_line_that_changes_them():
    def fractions(row, boxes):
        return {**boxes, "bbox": [[(x + w / 2) / 32, (y + h / 2) / 32, w / 32, h / 32]
                                  for x, y, w, h in boxes["bbox"]]}  # fmt: skip

    data, right = changed(fractions), changed(lambda row, boxes: boxes)
    with pytest.raises(DataError, match="are fractions of their images") as error:
        loader_of(data, tiny_yolos())
    (line,) = fixes_in(error.value)
    found = run_fix(line, {"validation": data})["validation"]
    for one, other in zip(found["objects"], right["objects"], strict=True):
        np.testing.assert_allclose(
            np.reshape(one["bbox"], (-1, 4)), np.reshape(other["bbox"], (-1, 4)), atol=1e-4
        )


def test_boxes_near_the_corner_or_at_the_border_are_no_corners():
    def near(row, boxes):
        return {**boxes, "bbox": [[1, 1, 5, 6]] * len(boxes["bbox"])}

    def out(row, boxes):
        return {**boxes, "bbox": [[20, 20, 40, 40]] * len(boxes["bbox"])}

    for change in (near, out, lambda row, boxes: {**boxes, "bbox": [], "category": [],
                                                  "area": [], "iscrowd": []}):  # fmt: skip
        loader_of(changed(change), tiny_yolos())
