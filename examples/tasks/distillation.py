"""Distillation: a small model learns from a larger one, and from few rows."""

import random
from functools import partial

from datasets import Dataset
from replies import small_llama, word_tokenizer

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import distil, lm_loss

WORDS = [f"w{number}" for number in range(40)]


def chains(tokenizer, number: int, seed: int) -> Dataset:
    """Rows in which each word has four likely successors."""
    table = {w: random.Random(w).choices(WORDS, k=4) for w in WORDS}
    draw, rows = random.Random(seed), []
    for _ in range(number):
        row = [draw.choice(WORDS)]
        while len(row) < 12:
            row.append(draw.choice(table[row[-1]]))
        rows.append(tokenizer(" ".join(row))["input_ids"])
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def main(quick: bool = False) -> dict[str, float]:
    tokenizer, size = word_tokenizer(WORDS), (80 if quick else 2000)
    data = {"large": chains(tokenizer, size, 1), "few": chains(tokenizer, size // 20, 2)}
    data["validation"] = chains(tokenizer, 100, 3)
    loaders = prepare_dataloaders(data, tokenizer, model=small_llama(tokenizer), batch_size=16)

    def train(model, rows, loss_fn, epochs):
        optimizer = prepare_optimizer(model, lr=2e-3)
        options = {"num_epochs": 1 if quick else epochs, "progress_bar": False}
        train_loop(model, loaders[rows], optimizer, loss_fn=loss_fn, **options)
        evaluate = partial(evaluate_loop, model, loaders["validation"], "perplexity")
        return evaluate(loss_fn=lm_loss)["perplexity"]

    teacher = small_llama(tokenizer)
    large = train(teacher, "large", lm_loss, 5)
    alone = train(small_llama(tokenizer, width=32), "few", lm_loss, 15)
    taught = train(small_llama(tokenizer, width=32), "few", distil(teacher, alpha=1.0), 15)
    print(f"perplexity: {taught:.2f}, teacher {large:.2f} (baseline without it: {alone:.2f})")
    return {"perplexity": taught, "alone": alone, "teacher": large}


if __name__ == "__main__":
    main()
