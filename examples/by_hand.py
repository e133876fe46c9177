"""The same training three times: three calls, a for loop, and the loop you would write by hand.

    python examples/by_hand.py

All three end with the same weights, to the last bit. Choose the level that shows what you want to
change and hides the rest.
"""

import torch
from datasets import disable_progress_bars
from docstrings import load_docstrings, small_bert, train_tokenizer
from torch.utils.data import DataLoader

from manualloop import (
    TrainState,
    accumulate_gradients,
    evaluate_loop,
    load_metric,
    prepare_dataloaders,
    prepare_optimizer,
    prepare_scheduler,
    prepare_strategy,
    train_loop,
    train_steps,
    windows,
)

MAX_STEPS = 100
ACCUMULATION = 2
MAX_GRAD_NORM = 1.0


def level_1_calls(model: torch.nn.Module, loaders: dict[str, DataLoader]) -> dict[str, float]:
    """Three calls. Every common option is an argument."""
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=1e-3),
        "linear",
        max_steps=MAX_STEPS,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=MAX_GRAD_NORM,
        evaluate=lambda: evaluate_loop(model, loaders["validation"], "accuracy"),
        evaluate_every=50,
    )
    return result.metrics


def level_2_a_for_loop(model: torch.nn.Module, loaders: dict[str, DataLoader]) -> dict[str, float]:
    """One step of the loop is one update. The order of events is plain Python: if, break, try."""
    optimizer = prepare_optimizer(model, lr=1e-3)
    lr_scheduler = prepare_scheduler(optimizer, "linear", num_training_steps=MAX_STEPS)
    state = TrainState(model, optimizer, lr_scheduler)
    scores = {}
    for step in train_steps(
        state,
        loaders["train"],
        max_steps=MAX_STEPS,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=MAX_GRAD_NORM,
    ):
        if step.every(50):
            scores = evaluate_loop(model, loaders["validation"], "accuracy")
            print(f"{step}: loss {float(step.loss):.4f}, accuracy {scores['accuracy']:.4f}")
            if scores["accuracy"] > 0.99:
                break
    return scores


def level_3_the_parts(model: torch.nn.Module, loaders: dict[str, DataLoader]) -> dict[str, float]:
    """Your own loop, with functions for what is easy to get wrong: weights, order, last window."""
    strategy = prepare_strategy("auto")
    model = strategy.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    lr_scheduler = prepare_scheduler(optimizer, "linear", num_training_steps=MAX_STEPS)
    num_steps = epoch = 0
    model.train()
    while num_steps < MAX_STEPS:
        loaders["train"].batch_sampler.set_epoch(epoch)
        for window in windows(loaders["train"], ACCUMULATION):
            optimizer.zero_grad()
            update = accumulate_gradients(model, window.batches, strategy=strategy)
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            lr_scheduler.step()
            num_steps += 1
            if num_steps % 50 == 0:
                print(f"step {num_steps}, {update.num_items} rows: loss {update.loss.item():.4f}")
            if num_steps == MAX_STEPS:
                break
        epoch += 1

    metric = load_metric("accuracy")
    model.eval()
    with torch.inference_mode():
        for batch in loaders["validation"]:
            logits = model(**strategy.to_device(batch)).logits
            metric.add_batch(predictions=logits.argmax(dim=-1), references=batch["labels"])
    return metric.compute()


def main() -> None:
    torch.set_num_threads(1)  # a model this small gains nothing from more
    disable_progress_bars()
    datasets = load_docstrings()
    tokenizer = train_tokenizer(datasets["train"]["text"])
    weights = []
    for level in (level_1_calls, level_2_a_for_loop, level_3_the_parts):
        torch.manual_seed(42)
        model = small_bert(len(tokenizer))
        loaders = prepare_dataloaders(datasets, tokenizer, model=model, batch_size=16)
        torch.manual_seed(0)
        scores = level(model, loaders)
        weights.append([parameter.detach().cpu() for parameter in model.parameters()])
        print(f"{level.__name__}: accuracy {scores['accuracy']:.4f}\n")
    for others in weights[1:]:
        assert all(map(torch.equal, weights[0], others))
    print("The three models are equal to the last bit.")


if __name__ == "__main__":
    main()
