"""Synthetic scenes: squares, discs and crosses on noise, with a mask and the box of each."""

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value

NAMES = ["square", "disc", "cross"]
OBJECT = {"bbox": Sequence(Value("float32"), length=4), "category": ClassLabel(names=NAMES)}
FEATURES = Features({"image": Image(), "mask": Image(), "objects": [OBJECT]})


def draw(random, side=48, most=2):
    """Draw 0 to ``most`` objects; a mask has 0 for the ground, then a number for each class."""
    image = random.integers(0, 90, (side, side, 3)).astype(np.uint8)
    mask, objects = np.zeros((side, side), np.uint8), []
    rows, columns = np.mgrid[:side, :side]
    for _ in range(random.integers(0, most + 1)):
        kind, half = int(random.integers(len(NAMES))), int(random.integers(6, 11))
        top, left = random.integers(half, side - half, 2).tolist()
        down, right = np.abs(rows - top), np.abs(columns - left)
        inside = np.maximum(down, right) < half
        shape = [
            inside,
            down**2 + right**2 < half**2,
            inside & (np.minimum(down, right) < half / 3),
        ]
        if (mask[inside] > 0).any():
            continue  # objects do not cover each other
        image[shape[kind]] = random.integers(120, 256, 3)
        mask[shape[kind]] = kind + 1
        box = [left - half + 1, top - half + 1, 2 * half - 1, 2 * half - 1]
        objects.append({"bbox": box, "category": kind})
    return {"image": image, "mask": mask, "objects": objects}


def load_scenes(**num_rows):
    """Return a split of scenes for each number of rows."""
    splits = {}
    for seed, (name, number) in enumerate(num_rows.items()):
        random = np.random.default_rng(seed)
        splits[name] = Dataset.from_list([draw(random) for _ in range(number)], features=FEATURES)
    return DatasetDict(splits)
