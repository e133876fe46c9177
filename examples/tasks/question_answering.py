"""Who travelled from where to where, and when? Answers are found in texts of several windows."""

from functools import partial

import torch
from journeys import load_journeys
from stdlib import small_bert, train_tokenizer
from transformers import BertForQuestionAnswering

from manualloop import evaluate_loop, prepare_dataloaders, prepare_optimizer, train_loop
from manualloop.tasks import answer_windows, span_logits, squad


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(42)
    data = {"train": load_journeys(200 if quick else 3000, 0), "test": load_journeys(100, 1)}
    tokenizer = train_tokenizer([*data["train"]["context"], *data["train"]["question"]], 300)
    model = BertForQuestionAnswering(small_bert(len(tokenizer)))
    loaders = prepare_dataloaders(
        data,
        tokenizer,
        model=model,
        preprocess=answer_windows(tokenizer, max_length=48, stride=16),
        keep=("id", "context", "offset_mapping"),
        batch_size=16,
    )
    metric = squad(data["test"])
    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=1e-3),
        num_epochs=1 if quick else 3,
        evaluate=partial(evaluate_loop, model, loaders["test"], metric, decode=span_logits),
        best_metric="f1",
    )
    print(f"exact {result.metrics['exact_match']:.1f}, F1 {result.metrics['f1']:.1f}")
    print("baseline, one of the four facts at random: exact 25.0")
    return result.metrics


if __name__ == "__main__":
    main()
