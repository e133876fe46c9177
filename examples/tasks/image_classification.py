"""Which digit is it? A small ViT on the handwritten digits of scikit-learn, shifted at random."""

from functools import partial

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import ImageChops
from PIL.Image import fromarray
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import images


def shift(image, generator):
    right, down = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return ImageChops.offset(image, right, down)


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    pixels, digits = load_digits(return_X_y=True)
    pixels = [fromarray((row * 15).astype("uint8").reshape(8, 8)) for row in pixels]
    features = Features({"image": Image(), "label": ClassLabel(10)})
    data = Dataset.from_dict({"image": pixels, "label": digits}, features=features)
    data = data.select(range(200 if quick else len(data))).train_test_split(0.2, seed=0)
    sizes = {"image_size": 8, "patch_size": 2, "hidden_size": 64, "intermediate_size": 128}
    config = ViTConfig(**sizes, num_channels=1, num_hidden_layers=2, num_attention_heads=4)
    config.num_labels, num_epochs = 10, 1 if quick else 12
    model = ViTForImageClassification(config)
    processor = ViTImageProcessor(do_resize=False, image_mean=[0.5], image_std=[0.5])
    loaders = prepare_dataloaders(data, processor, model=model, batch_size=32,
                                  transform={"train": images(shift), "test": images()})  # fmt: skip
    evaluate = partial(evaluate_loop, model, loaders["test"], "accuracy")
    run = {"num_epochs": num_epochs, "evaluate": evaluate, "best_metric": "accuracy"}
    result = train_loop(model, loaders["train"], prepare_optimizer(model, lr=2e-3), **run)
    most = max(map(data["test"]["label"][:].count, range(10))) / len(data["test"])
    print(
        f"accuracy {result.metrics['accuracy']:.3f} (baseline, the most common digit: {most:.3f})"
    )
    return result.metrics


if __name__ == "__main__":
    main()
