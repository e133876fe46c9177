"""Pretrain a small GPT-2 on prose: which word comes next?"""

from functools import partial

import torch
from prose import load_docstrings, train_tokenizer, usual_tokens
from transformers import GPT2Config, GPT2LMHeadModel

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import pack


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    data = load_docstrings(200 if quick else None)
    tokenizer = train_tokenizer(data["train"]["text"])
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids))
    loaders = prepare_dataloaders(
        data, tokenizer, model=model, preprocess=pack(tokenizer, 64), batch_size=16
    )
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=2e-3),
        num_epochs=1 if quick else 3,
        num_warmup_steps=0.1,
        evaluate=partial(evaluate_loop, model, loaders["test"], "perplexity"),
        best_metric="perplexity",
    )
    baseline, _ = usual_tokens(list(loaders["test"]))
    scores = {"perplexity": result.best_metrics["perplexity"], "baseline": baseline}
    print(f"perplexity {scores['perplexity']:.1f}")
    print(f"baseline, how frequent each token is: {baseline:.1f}")
    return scores


if __name__ == "__main__":
    main()
