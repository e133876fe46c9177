"""Translate numbers from English to German: twenty one is ein und zwanzig."""

from functools import partial

import torch
from numerals import WORDS, load_numerals, word_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from manualloop import (
    evaluate_loop,
    load_metric,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
)
from manualloop.tasks import generated, source_target


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    data = load_numerals(100 if quick else None)
    tokenizer = word_tokenizer([*data["train"]["english"], *data["train"]["german"]])
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids))
    options = {"preprocess": source_target(tokenizer, "english", "german"), "batch_size": 16}
    loaders = prepare_dataloaders(data, tokenizer, model=model, **options)
    decode = generated(tokenizer, num_beams=2, max_new_tokens=8)
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=5e-3),
        num_epochs=1 if quick else 15,
        evaluate=partial(evaluate_loop, model, loaders["test"], "bleu", decode=decode),
        evaluate_every="epoch" if quick else "5 epoch",
        best_metric="bleu",
    )
    texts = [" ".join(map(WORDS.get, row.split())) for row in data["test"]["english"]]
    baseline = load_metric("bleu").compute(predictions=texts, references=data["test"]["german"][:])
    scores = {"bleu": result.metrics["bleu"], "baseline": baseline["bleu"]}
    print(f"BLEU {scores['bleu']:.1f}\nbaseline, word by word: {scores['baseline']:.1f}")
    return scores


if __name__ == "__main__":
    main()
