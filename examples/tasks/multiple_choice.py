"""How does a docstring continue? One of four endings has its words in their order."""

import ast
import random
from functools import partial

import torch
from datasets import Dataset
from stdlib import functions, small_bert, train_tokenizer
from transformers import BertForMultipleChoice

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import flatten_choices


def example(words: list[str], draw: random.Random) -> dict:
    half, label = min(len(words) // 2, 8), draw.randrange(4)
    right = words[half : half + 12]
    endings = [" ".join(draw.sample(right, len(right))) for _ in range(3)]
    endings.insert(label, " ".join(right))
    return {"start": " ".join(words[:half]), "endings": endings, "label": label}


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    texts = sorted({ast.get_docstring(node) or "" for node in functions()})
    draw, long = random.Random(0), [text.split() for text in texts if len(text.split()) >= 8]
    rows = [example(words, draw) for words in long[: 500 if quick else None]]
    data = Dataset.from_list(rows).train_test_split(200, seed=0)
    tokenizer = train_tokenizer([" ".join(words) for words in long], 2000)
    model = BertForMultipleChoice(small_bert(len(tokenizer)))
    preprocess = flatten_choices(tokenizer, first="start", second="endings")
    loaders = prepare_dataloaders(data, tokenizer, model=model, preprocess=preprocess)
    evaluate = partial(evaluate_loop, model, loaders["test"], "accuracy")
    optimizer = prepare_optimizer(model, lr=1e-3)
    options = {"num_epochs": 1 if quick else 3, "best_metric": "accuracy"}
    result = train_loop(model, loaders["train"], optimizer, evaluate=evaluate, **options)
    print(f"accuracy {result.metrics['accuracy']:.3f}\nbaseline, one of four at random: 0.250")
    return result.metrics


if __name__ == "__main__":
    main()
