"""Pretrain a small BERT on prose: which words are hidden?"""

from functools import partial

import torch
from prose import load_docstrings, train_tokenizer, usual_tokens
from transformers import BertConfig, BertForMaskedLM

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import cut, mask_tokens


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    data = load_docstrings(200 if quick else None)
    tokenizer = train_tokenizer(data["train"]["text"])
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 256, "max_position_embeddings": 32, "initializer_range": 0.05}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
    functions = {"preprocess": cut(tokenizer, 32), "transform": mask_tokens(tokenizer, 0.3)}
    loaders = prepare_dataloaders(
        data, tokenizer, model=model, **functions, batch_size=16, group_by_length=True
    )
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=2e-3),
        num_epochs=1 if quick else 5,
        num_warmup_steps=0.1,
        evaluate=partial(evaluate_loop, model, loaders["test"], ["accuracy", "perplexity"]),
        best_metric="loss",
    )
    _, baseline = usual_tokens(list(loaders["test"]))
    scores = {"accuracy": result.best_metrics["accuracy"], "baseline": baseline}
    print(f"hidden tokens found: {scores['accuracy']:.1%}")
    print(f"baseline, always the most frequent one: {baseline:.1%}")
    return scores


if __name__ == "__main__":
    main()
