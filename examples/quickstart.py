"""Which area of Python's standard library does a docstring document? Trained in half a minute.

    python examples/quickstart.py

Nothing is downloaded: the data are about 4,200 docstrings that come with Python, the tokenizer is
trained on them in a second, and the model is a BERT of one layer with random weights.
"""

import torch
from datasets import disable_progress_bars
from docstrings import AREAS, load_docstrings, small_bert, train_tokenizer

from manualloop import (
    evaluate_loop,
    inspect_batch,
    predict_loop,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
)


def main() -> dict[str, float]:
    torch.manual_seed(42)
    torch.set_num_threads(1)  # a model this small gains nothing from more, and one gives one result
    disable_progress_bars()
    datasets = load_docstrings()
    tokenizer = train_tokenizer(datasets["train"]["text"])
    model = small_bert(len(tokenizer))
    loaders = prepare_dataloaders(datasets, tokenizer, model=model, batch_size=16)
    print(inspect_batch(loaders["train"], tokenizer), end="\n\n")

    result = train_loop(
        model,
        loaders["train"],
        prepare_optimizer(model, lr=1e-3),
        num_epochs=6,
        evaluate=lambda: evaluate_loop(model, loaders["validation"], ["accuracy", "f1/macro"]),
        best_metric="accuracy",
    )

    labels = datasets["validation"]["label"]
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    print(f"\naccuracy {result.metrics['accuracy']:.4f} (the largest area alone: {majority:.4f})")
    print(f"macro F1 {result.metrics['f1_macro']:.4f}\n")

    predictions = predict_loop(model, loaders["validation"])
    names = list(AREAS)
    for row in range(0, len(predictions), len(predictions) // 8):
        guess, truth = predictions.predictions[row], predictions.references[row]
        verdict = "right" if guess == truth else f"wrong: {names[truth]}"
        text = datasets["validation"][row]["text"]
        print(
            f"{names[guess]:<12} {predictions.scores[row].max():4.0%}  {text[:60]:<60}  {verdict}"
        )
    return result.metrics


if __name__ == "__main__":
    main()
