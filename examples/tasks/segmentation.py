"""What is each pixel? A small SegFormer on synthetic scenes, flipped at random."""

from functools import partial

import numpy as np
import torch
from PIL.ImageOps import mirror
from scenes import NAMES, load_scenes
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import images_and_masks, upsampled


def flip(image, mask, generator):
    is_flipped = torch.rand((), generator=generator) < 0.5
    return (mirror(image), mirror(mask)) if is_flipped else (image, mask)


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    data = load_scenes(train=32 if quick else 200, validation=16 if quick else 100)
    config = SegformerConfig(
        id2label=dict(enumerate(["ground", *NAMES])), num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[5, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32,
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    processor = SegformerImageProcessor(size={"height": 48, "width": 48})
    transform = {"train": images_and_masks(flip), "validation": images_and_masks()}
    loaders = prepare_dataloaders(data, processor, model=model, transform=transform, batch_size=16)
    evaluate = partial(evaluate_loop, model, loaders["validation"], "mean_iou", decode=upsampled)
    ground = sum((np.array(mask) == 0).mean() for mask in data["validation"]["mask"])
    ground = ground / len(data["validation"]) / 4  # the ground's; that of the others is 0
    run = {"num_epochs": 1 if quick else 12, "evaluate": evaluate, "best_metric": "mean_iou"}
    result = train_loop(model, loaders["train"], prepare_optimizer(model, lr=2e-3), **run)
    print(f"mean IoU {result.metrics['mean_iou']:.3f} (baseline, ground alone: {ground:.3f})")
    return result.metrics


if __name__ == "__main__":
    main()
