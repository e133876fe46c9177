"""Which words of a signature are its name, its arguments, and their defaults?"""

from functools import partial

import torch
from signatures import load_signatures, usual_tags
from stdlib import small_bert, train_tokenizer
from transformers import BertForTokenClassification

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import tag_words


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    data = load_signatures(600 if quick else None)
    tokenizer = train_tokenizer([" ".join(row) for row in data["train"]["words"]], 600)
    model = BertForTokenClassification(small_bert(len(tokenizer), num_labels=6))
    preprocess = tag_words(tokenizer, "words", "tags")
    loaders = prepare_dataloaders(data, tokenizer, model=model, preprocess=preprocess)
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=1e-3),
        num_epochs=1 if quick else 3,
        evaluate=partial(evaluate_loop, model, loaders["test"], "seqeval"),
        best_metric="overall_f1",
    )
    scores = {"overall_f1": result.metrics["overall_f1"], "baseline": usual_tags(data)}
    print(f"F1 of spans {scores['overall_f1']:.3f}")
    print(f"baseline, the most frequent tag of each word: {scores['baseline']:.3f}")
    return scores


if __name__ == "__main__":
    main()
