"""Where is what? A small YOLOS on synthetic scenes, flipped at random."""

from functools import partial

import torch
from PIL.ImageOps import mirror
from scenes import load_scenes
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import boxes, detected, detection_terms


def flip(image, corners, generator):
    if torch.rand((), generator=generator) < 0.5:
        image, corners[:, 0] = mirror(image), image.width - corners[:, 0] - corners[:, 2]
    return image, corners


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    data = load_scenes(train=32 if quick else 500, validation=16 if quick else 60)
    config = YolosConfig(
        image_size=[48, 48], patch_size=8, hidden_size=64, num_hidden_layers=3, num_labels=3,
        num_attention_heads=4, intermediate_size=128, num_detection_tokens=4,
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    for start in (model.vit.embeddings.position_embeddings, model.vit.embeddings.detection_tokens):
        torch.nn.init.normal_(start, std=0.5)  # they begin at 0, where positions look alike
    processor = YolosImageProcessor(size={"height": 48, "width": 48})
    transform = {"train": boxes(processor, flip), "validation": boxes(processor)}
    loaders = prepare_dataloaders(data, processor, model=model, transform=transform, batch_size=16)
    evaluate = partial(evaluate_loop, model, loaders["validation"], "map",
                       decode=detected(processor), terms=detection_terms)  # fmt: skip
    before = evaluate()
    result = train_loop(model, loaders["train"], prepare_optimizer(model, lr=1e-3),
                        num_epochs=1 if quick else 20, terms=detection_terms, max_grad_norm=0.1,
                        evaluate=evaluate, evaluate_every="5 epoch",
                        best_metric="map_50")  # fmt: skip
    for name in ("loss", "map_50"):
        print(f"{name} {result.metrics[name]:.4f} (baseline, before training: {before[name]:.4f})")
    return result.metrics


if __name__ == "__main__":
    main()
