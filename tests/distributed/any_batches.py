"""Batches of any kind and losses of several terms on two ranks, equal to one process."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import YolosConfig, YolosForObjectDetection

from manualloop import SingleDevice, TrainState, evaluate_loop, prepare_strategy, train_steps
from manualloop.tasks import detection_terms

draw = torch.Generator().manual_seed(1)


def rand(*shape):
    return torch.rand(shape, generator=draw, dtype=torch.float64)


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class Heads(nn.Module):
    """Two heads, one of which has no item in some batches."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 1), nn.Linear(3, 2)

    def forward(self, x, y):
        return {"one": self.one(x), "two": self.two(x)}


def heads_terms(outputs, batch):
    kept = batch["y"] != -100
    return [
        (outputs["one"].square().mean(), len(kept)),
        (F.cross_entropy(outputs["two"], batch["y"]), kept.sum()),
    ]


def detector():
    model = YolosForObjectDetection(
        YolosConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, image_size=[16, 16],
            patch_size=8, num_detection_tokens=6, num_labels=2,
        )
    )  # fmt: skip
    model(pixel_values=torch.zeros(1, 3, 16, 16)).logits.sum().backward()
    for name, parameter in model.named_parameters():  # DDP takes no weight that is not used
        parameter.requires_grad_(parameter.grad is not None or "bbox" in name)
    model.zero_grad()
    return model


def boxes(*numbers):
    labels = [
        {"class_labels": torch.zeros(n, dtype=torch.int64), "boxes": 0.2 + 0.5 * rand(n, 4)}
        for n in numbers
    ]
    return {"pixel_values": rand(len(numbers), 3, 16, 16), "labels": labels}


def squares(model, batch):
    return (model(batch.x) - batch.y).square().mean()


def weighted(model, batch):
    return F.cross_entropy(model(batch.x), batch.y, weight=batch.weight)


def weights_of(num_rows):
    return SimpleNamespace(
        x=rand(num_rows, 3),
        y=torch.arange(num_rows) % 3,
        weight=1 + torch.arange(3, dtype=torch.float64),
    )


class Encoder(nn.Module):
    """A model with a method and an attribute beside its forward pass."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 1), 2.0

    def encode(self, x):
        return self.layer(x)

    def forward(self, x):
        return self.encode(x)


# A loss_fn calls the model as it would in one process, where it is the model of the script.
CALLS = {
    "a method": lambda given, own, x: given.encode(x) * given.scale,
    "a name of the script": lambda given, own, x: own(x) * own.scale,
    "a method of that": lambda given, own, x: own.encode(x) * own.scale,
    "both": lambda given, own, x: (given(x) + own(x)) * given.scale / 2,
}


def calling(call):
    model = Encoder()

    def loss_fn(given, batch):
        assert given is model
        return (call(given, model, batch.x) - batch.y).square().mean()

    return model, {"loss_fn": loss_fn}


LABELS = ([0, 1, -100], [-100], [1], [-100, -100], [0, 1])
CASES = {  # five batches: the last one is a spare on rank 1
    "dataclass": (
        lambda: nn.Linear(3, 1),
        [Pair(rand(n, 3), rand(n, 1)) for n in (4, 2, 1, 3, 5)],
        {"loss_fn": squares},
    ),
    "texts": (
        lambda: nn.Linear(1, 1),
        [["1.5", "2"], ["3"], ["0.5", "1", "7"], ["2"], ["4", "5"]],
        {"loss_fn": lambda m, b: m(torch.tensor([[float(x)] for x in b])).square().mean()},
    ),
    "clear on one rank only": (
        lambda: nn.Linear(3, 3),
        [weights_of(n) for n in (3, 5, 2, 3, 4)],
        {"loss_fn": weighted},
    ),
    "two heads": (
        Heads,
        [{"x": rand(len(y), 3), "y": torch.tensor(y)} for y in LABELS],
        {"terms": heads_terms},
    ),
    "detection": (detector, [boxes(1, 3), boxes(2), boxes(0), boxes(4, 1), boxes(2, 2)], None),
    **{
        name: (call, [Pair(rand(n, 3), rand(n, 1)) for n in (4, 2, 1, 3, 5)], calling)
        for name, call in CALLS.items()
    },
}


def train(name, strategy, window):
    make, batches, options = CASES[name]
    torch.manual_seed(0)
    model, options = calling(make) if options is calling else (make(), options)
    options = {"terms": detection_terms} if options is None else options
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    steps = train_steps(
        state, batches, num_epochs=2, gradient_accumulation_steps=window, strategy=strategy,
        **options,
    )  # fmt: skip
    found = [(float(step.loss), step.num_items) for step in steps]
    scored = evaluate_loop(state.model, batches, strategy=strategy, **options)["loss"]
    return found, scored, state.weighs_equally, [p.detach() for p in model.parameters()]


def main(folder):
    strategy = prepare_strategy()
    torch.set_default_dtype(torch.float64)
    for name in CASES:
        for window in (1, 2):
            ours = train(name, strategy, window)
            alone = train(name, SingleDevice(), 2 * window)
            torch.testing.assert_close(ours, alone, rtol=1e-10, atol=1e-12)
            assert ours[2] is (name == "clear on one rank only")
    torch.set_default_dtype(torch.float32)
