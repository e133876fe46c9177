"""Synthetic images with classes, masks and boxes, and tiny models and processors for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets import Sequence as Listed
from PIL import Image as Pil

NAMES = ["square", "disc"]
FEATURES = Features(
    {
        "image": Image(),
        "label": ClassLabel(names=NAMES),
        "mask": Image(),
        "image_id": Value("int64"),
        "objects": {
            "bbox": Listed(Listed(Value("float32"), length=4)),
            "category": Listed(ClassLabel(names=NAMES)),
            "area": Listed(Value("float32")),
            "iscrowd": Listed(Value("int64")),
        },
    }
)


def scenes(
    num_rows: int = 6,
    sizes: Sequence[tuple[int, int]] = ((32, 32),),
    seed: int = 0,
    features: Features = FEATURES,
) -> Dataset:
    """Images of 0 to 3 rectangles on noise; row 2 has none, the first box of row 3 is a crowd."""
    random = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for row in range(num_rows):
        height, width = sizes[row % len(sizes)]
        image = random.integers(0, 80, (height, width, 3)).astype(np.uint8)
        mask = np.zeros((height, width), np.uint8)
        objects: dict[str, list[Any]] = {name: [] for name in FEATURES["objects"]}
        for place in range(0 if row == 2 else 1 + row % 3):
            kind = int(random.integers(2))
            h, w = (int(random.integers(4, max(side // 2, 5))) for side in (height, width))
            top, left = int(random.integers(height - h)), int(random.integers(width - w))
            image[top : top + h, left : left + w, kind] += 120
            mask[top : top + h, left : left + w] = kind + 1
            objects["bbox"].append([left, top, w, h])
            objects["category"].append(kind)
            objects["area"].append(h * w)
            objects["iscrowd"].append(int(row == 3 and place == 0))
        mask[: 2 * (row % 3)] = 255
        pair = {"image": Pil.fromarray(image), "mask": Pil.fromarray(mask)}
        for name, cell in {**pair, "label": row % 2, "image_id": row, "objects": objects}.items():
            rows[name].append(cell)
    return Dataset.from_dict(rows, features=features)


def processor(name: str, **options: Any) -> Any:
    """An image processor that needs no torchvision, by the name of its model."""
    kind = f"{name}ImageProcessor"
    made = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    return made(**options)


def tiny(kind: type[Any], config: Any) -> Any:
    """A model with weights that are the same at each call; draws nothing from the caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def tiny_vit(**config: Any) -> Any:
    options = {**_SMALL, "image_size": 16, "patch_size": 8, "num_labels": 2, **config}
    return tiny(transformers.ViTForImageClassification, transformers.ViTConfig(**options))


def tiny_yolos(**config: Any) -> Any:
    options = {**_SMALL, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 6}
    options |= {"num_labels": 2, **config}
    return tiny(transformers.YolosForObjectDetection, transformers.YolosConfig(**options))


def tiny_segformer(num_labels: int = 3, **config: Any) -> Any:
    options = {
        "num_labels": num_labels,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8,
        "hidden_dropout_prob": 0.0,
        "classifier_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        **config,
    }
    config_class = transformers.SegformerConfig
    return tiny(transformers.SegformerForSemanticSegmentation, config_class(**options))


def tiny_detr(**config: Any) -> Any:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"],
        layer_type="basic",
    )  # fmt: skip
    options = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": backbone,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "dropout": 0.0,
        "num_queries": 6,
        "num_labels": 2,
        "auxiliary_loss": True,
        **config,
    }
    return tiny(transformers.DetrForObjectDetection, transformers.DetrConfig(**options))


def flipped(image: Any, generator: torch.Generator) -> Any:
    """Flip an image at random."""
    is_flipped = torch.rand((), generator=generator) < 0.5
    return image.transpose(Pil.Transpose.FLIP_LEFT_RIGHT) if is_flipped else image


def flipped_with_mask(image: Any, mask: Any, generator: torch.Generator) -> Any:
    """Flip an image and its mask at random."""
    if torch.rand((), generator=generator) < 0.5:
        way = Pil.Transpose.FLIP_LEFT_RIGHT
        return image.transpose(way), mask.transpose(way)
    return image, mask


def flipped_with_boxes(image: Any, boxes: Any, generator: torch.Generator) -> Any:
    """Flip an image and its boxes at random."""
    if torch.rand((), generator=generator) < 0.5:
        image = image.transpose(Pil.Transpose.FLIP_LEFT_RIGHT)
        boxes[:, 0] = image.width - boxes[:, 0] - boxes[:, 2]
    return image, boxes
