"""A finished run of two ranks, met by the same one and by others."""

import torch

from manualloop import CheckpointError, prepare_strategy, train_loop


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


def train(folder, strategy=None, *, lr=0.01, seed=0, num_batches=8, **options):
    """Train; return the steps that were made, or the error."""
    torch.manual_seed(seed)
    model, made = torch.nn.Linear(4, 1), []
    try:
        train_loop(
            model,
            [{"x": torch.full((2, 4), float(k))} for k in range(num_batches)],
            torch.optim.SGD(model.parameters(), lr=lr),
            **{"num_epochs": 1, **options},
            loss_fn=loss_fn,
            checkpoint_dir=folder,
            on_step=lambda step: made.append(step.index),
            strategy=strategy,
            progress_bar=False,
        )
    except CheckpointError as error:
        return str(error)
    return made


def main(folder):
    strategy = prepare_strategy()

    def on_all(**options):
        found = strategy.gather(train(folder, strategy, **options))
        texts = [f.removeprefix("rank 0: ") if isinstance(f, str) else f for f in found]
        assert texts[0] == texts[1], found
        return texts[0]

    assert on_all() == [1, 2, 3, 4]
    assert on_all() == []
    assert "- lr: 0.01 -> 0.02" in on_all(lr=0.02)
    assert "- seed of torch: 0 -> 1" in on_all(seed=1)
    assert "- gradient_accumulation_steps: 1 -> 2" in on_all(gradient_accumulation_steps=2)
    assert "- num_batches: 8 -> 6" in on_all(num_batches=6)
    assert on_all() == []
