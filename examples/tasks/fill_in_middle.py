"""Fill gaps in rows of numbers: where they end is known from what comes after them alone."""

from functools import partial

import torch
from gaps import SENTINELS, load_sequences, usual_share, with_gaps
from numerals import word_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import cut, fill_in_middle, generated


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    data = load_sequences(100 if quick else 2000)
    tokenizer = word_tokenizer(data["train"]["text"])
    tokenizer.add_tokens(SENTINELS, special_tokens=True)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids))
    loaders = prepare_dataloaders(
        data,
        tokenizer,
        model=model,
        preprocess={"train": cut(tokenizer, 64), "test": partial(with_gaps, tokenizer)},
        transform={"train": fill_in_middle(tokenizer, 0.9, spm_rate=1.0)},
    )
    evaluate = partial(evaluate_loop, model, loaders["test"], "exact_match")
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=2e-3),
        num_epochs=1 if quick else 4,
        evaluate=partial(evaluate, decode=generated(tokenizer, max_new_tokens=14)),
    )
    scores = {"exact_match": result.metrics["exact_match"], "baseline": usual_share(data)}
    print(f"gaps filled without a mistake: {scores['exact_match']:.1%}")
    print(f"baseline, to go on as far as most gaps do: {scores['baseline']:.1%}")
    return scores


if __name__ == "__main__":
    main()
