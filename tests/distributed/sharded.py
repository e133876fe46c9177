"""Weights spread over two ranks by fully_shard, beside DDP: trained, scored, saved, resumed."""

import pytest
import torch
from helpers import tiny_bert
from same_update import make_rows
from torch.distributed.fsdp import fully_shard
from transformers import default_data_collator

from manualloop import (
    CheckpointError,
    TrainState,
    evaluate_loop,
    load_checkpoint,
    predict_loop,
    prepare_scheduler,
    prepare_strategy,
    save_checkpoint,
    train_steps,
)
from manualloop.data.sampler import ordered_loader

NUM_STEPS = 5  # of two an epoch


def make_loader(shuffle):
    return ordered_loader(
        make_rows("sequence"),
        "train" if shuffle else "validation",
        2,
        shuffle=shuffle,
        seed=1,
        drop_last=False,
        collate_fn=default_data_collator,
    )


def make_state(spread, lr=1e-2, change=lambda model: None, num_steps=NUM_STEPS, **dropout):
    model = tiny_bert(num_hidden_layers=2, **{"hidden_dropout_prob": 0.1, **dropout})
    change(model)
    if spread:
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return TrainState(
        model, optimizer, prepare_scheduler(optimizer, "linear", num_training_steps=num_steps)
    )


def train(state, strategy, folder=None, at=None):
    losses = []
    for step in train_steps(
        state,
        make_loader(shuffle=True),
        max_steps=NUM_STEPS,
        gradient_accumulation_steps=3,
        max_grad_norm=0.5,
        strategy=strategy,
    ):
        losses.append((step.index, float(step.loss), float(step.grad_norm), step.lr))
        if step.index == at:
            save_checkpoint(folder, state, strategy=strategy, metrics={"loss": losses[-1][1]})
    return losses


class Momentum(torch.optim.Optimizer):
    """SGD whose momentum is float32, whatever the dtype of the weights is."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    mean = state.get("mean", torch.zeros_like(weight, dtype=torch.float32))
                    state["mean"] = mean * 0.9 + weight.grad.float()
                    weight -= (group["lr"] * state["mean"]).to(weight.dtype)


def two_optimizers(folder, strategy):
    """Two of them resume to the bits of a run that was not stopped; state keeps its dtype."""

    def build():
        torch.manual_seed(5)
        model = tiny_bert(num_hidden_layers=1, hidden_dropout_prob=0.1).bfloat16()
        fully_shard(model)
        matrices = [weight for weight in model.parameters() if weight.ndim == 2]
        others = [weight for weight in model.parameters() if weight.ndim < 2]
        optimizers = [Momentum(matrices), torch.optim.AdamW(others, lr=1e-2)]
        schedule = prepare_scheduler(optimizers[0], "linear", num_training_steps=NUM_STEPS)
        return TrainState(model, optimizers, [schedule, None])

    whole = build()
    expected = train(whole, strategy, folder, at=3)
    again = build()
    load_checkpoint(folder, again, strategy=strategy)
    means = [entry["mean"] for entry in again.optimizer[0].state.values()]
    assert {mean.dtype for mean in means} == {torch.float32}
    assert train(again, strategy) == expected[3:]
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], value), name


def weights(model):
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for name, value in model.state_dict().items()
    }


def main(folder):
    strategy = prepare_strategy()
    ends = {}
    for spread in (False, True):
        torch.manual_seed(5 + strategy.rank)
        state = make_state(spread)
        ends[spread] = train(state, strategy, folder, at=3 if spread else None), state
    ddp, fsdp = torch.tensor(ends[False][0]), torch.tensor(ends[True][0])
    torch.testing.assert_close(fsdp, ddp, rtol=1e-5, atol=1e-5)
    print(f"losses and norms differ from those of DDP by {float((fsdp - ddp).abs().max()):.1e}")

    scores = [
        evaluate_loop(
            ends[spread][1].model, make_loader(shuffle=False), "accuracy", strategy=strategy
        )
        for spread in (False, True)
    ]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert abs(scores[0]["loss"] - scores[1]["loss"]) < 1e-5
    tables = [
        predict_loop(ends[spread][1].model, make_loader(shuffle=False), strategy=strategy)
        for spread in (False, True)
    ]
    assert (tables[0].predictions == tables[1].predictions).all()

    (saved,) = folder.iterdir()
    files = sorted(path.name for path in saved.iterdir())
    assert sum(name.startswith("shard-") for name in files) == 2, files
    assert "manifest.json" in files

    torch.manual_seed(99)
    again = make_state(spread=True)
    info = load_checkpoint(folder, again, strategy=strategy)
    assert info.step == 3
    assert train(again, strategy) == ends[True][0][3:]
    for name, value in weights(ends[True][1].model).items():
        assert torch.equal(weights(again.model)[name], value), name

    two_optimizers(folder.with_name("two"), strategy)

    plain = make_state(spread=False)
    before = weights(plain.model)
    with pytest.raises(CheckpointError, match="spread over ranks"):
        load_checkpoint(folder, plain, strategy=strategy)
    inner = getattr(plain.model, "module", plain.model)
    assert all(torch.equal(weights(inner)[name], value) for name, value in before.items())

    shard = next(path for path in saved.iterdir() if path.name.startswith("shard-00002"))
    strategy.gather(None)
    if strategy.is_main:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    strategy.gather(None)
    with pytest.raises(CheckpointError, match=r"shard-00002.* is damaged"):
        load_checkpoint(folder, make_state(spread=True), strategy=strategy)
