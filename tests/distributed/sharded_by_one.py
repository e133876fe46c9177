"""A model spread by fully_shard changes the number of its ranks.

sharded_by_one.py FOLDER UNTIL
"""

import json
import sys
from pathlib import Path

import torch
from sharded import make_loader, make_state

from manualloop import (
    evaluate_loop,
    load_checkpoint,
    predict_loop,
    prepare_strategy,
    save_checkpoint,
    train_steps,
)

ACCUMULATED = 4  # batches of an update, over all ranks


def count_passes(model):
    def count(model, args):
        if model.training:
            model.num_passes += 1

    model.register_buffer("num_passes", torch.zeros(()), persistent=False)
    model.register_forward_pre_hook(count)


def new_state(spread):
    torch.manual_seed(5)
    dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return make_state(spread, lr=1e-3, change=count_passes, num_steps=8, **dropout)


def train(state, strategy, until=8, folder=None):
    seen = []
    for step in train_steps(
        state,
        make_loader(shuffle=True),
        max_steps=8,
        gradient_accumulation_steps=ACCUMULATED // strategy.world_size,
        max_grad_norm=0.5,
        strategy=strategy,
    ):
        seen.append([step.index, float(step.loss), float(step.grad_norm), step.lr])
        if step.index == until:
            if folder is not None:
                save_checkpoint(folder, state, strategy=strategy)
            break
    return seen


def scores_of(model):
    scores = evaluate_loop(model, make_loader(shuffle=False), "accuracy")
    return scores, predict_loop(model, make_loader(shuffle=False)).predictions.tolist()


def main(folder, until):
    """Train from the newest checkpoint in the folder, if there is one, until a step, and save."""
    strategy = prepare_strategy()
    state = new_state(spread=True)
    if any(folder.glob("step-*")):
        load_checkpoint(folder, state, strategy=strategy)
    seen = train(state, strategy, until, folder)
    scores, predictions = scores_of(state.model)
    weights = {name: w.full_tensor().tolist() for name, w in state.model.state_dict().items()}
    if strategy.is_main:
        found = {"seen": seen, "scores": scores, "predictions": predictions, "weights": weights}
        found["num_passes"] = float(state.model.num_passes)
        (folder / f"until-{until}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
