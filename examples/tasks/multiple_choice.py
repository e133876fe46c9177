"""Which of four answers fits a question? One is a person, the others a place, a time, a way."""

import random
from functools import partial

import torch
from datasets import Dataset
from journeys import REST, WHEN, WHERE, WHO
from stdlib import small_bert, train_tokenizer
from transformers import BertForMultipleChoice

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import flatten_choices

HOW = ["by train", "on foot", "by boat", "in a balloon", "by bicycle", "with friends"]
ASKED = {"Who travelled?": WHO, "Where to?": WHERE, "When was it?": WHEN, "How did they go?": HOW}


def example(draw: random.Random) -> dict:
    asked = draw.choice([*ASKED])
    answers = {question: draw.choice(words) for question, words in ASKED.items()}
    endings = draw.sample([*answers.values()], 4)
    start = f"{draw.choice(REST)}. {asked}"
    return {"start": start, "endings": endings, "label": endings.index(answers[asked])}


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    draw, sizes = random.Random(0), {"train": 200 if quick else 2000, "test": 200}
    data = {k: Dataset.from_list([example(draw) for _ in range(n)]) for k, n in sizes.items()}
    words = [*data["train"]["start"], *WHO, *WHERE, *WHEN, *HOW]
    tokenizer = train_tokenizer(words, 300)
    model = BertForMultipleChoice(small_bert(len(tokenizer)))
    preprocess = flatten_choices(tokenizer, first="start", second="endings")
    loaders = prepare_dataloaders(data, tokenizer, model=model, preprocess=preprocess)
    evaluate = partial(evaluate_loop, model, loaders["test"], "accuracy")
    optimizer, options = prepare_optimizer(model, lr=1e-3), {"best_metric": "accuracy"}
    options["num_epochs"] = 1 if quick else 3
    result = train_loop(model, loaders["train"], optimizer, evaluate=evaluate, **options)
    print(f"accuracy {result.metrics['accuracy']:.3f}\nbaseline, one of four at random: 0.250")
    return result.metrics


if __name__ == "__main__":
    main()
