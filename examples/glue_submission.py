"""Write the file that the GLUE benchmark takes: a line for each row of its test split.

    python examples/glue_submission.py                        # generated rows, nothing downloaded
    python examples/glue_submission.py --model runs/rte/best --data glue/rte --output RTE.tsv

The benchmark wants names for RTE, QNLI and MNLI (``entailment``), and numbers for the other tasks.
The model's config has the names; ``index`` is the number of the row in the dataset.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from docstrings import train_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from manualloop import predict_loop, prepare_dataloaders

NAMES = ("entailment", "not_entailment")


def write_submission(model, loader, path, column="label"):
    predictions = predict_loop(model, loader)
    table = predictions.to_pandas()[["index", column]]
    table.to_csv(path, sep="\t", index=False, header=["index", "prediction"])
    return predictions


def generated(num_rows=50):
    """Pairs of sentences as RTE has them, a tokenizer, and a model with random weights."""
    pairs = [
        (f"The train from platform {row} left at {row % 12} o'clock.", f"It left at {row % 7}.")
        for row in range(num_rows)
    ]
    columns = {"sentence1": [pair[0] for pair in pairs], "sentence2": [pair[1] for pair in pairs]}
    tokenizer = train_tokenizer([text for pair in pairs for text in pair], vocab_size=200)
    torch.manual_seed(42)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )
    return Dataset.from_dict(columns), tokenizer, BertForSequenceClassification(config)


def main(arguments=None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="trained model with its tokenizer, a name or a folder")
    parser.add_argument("--data", help="folder or hub name of the task's splits, such as glue/rte")
    parser.add_argument("--output", type=Path, default=Path("RTE.tsv"))
    parser.add_argument("--numbers", action="store_true", help="write numbers instead of names")
    args = parser.parse_args(arguments)

    disable_progress_bars()
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForSequenceClassification.from_pretrained(args.model)
        names = [args.data] if Path(args.data).is_dir() else args.data.split("/")
        test = load_dataset(*names)["test"]
    else:
        test, tokenizer, model = generated()
    loader = prepare_dataloaders({"test": test}, tokenizer, model=model)["test"]
    column = "prediction" if args.numbers else "label"
    print(write_submission(model, loader, args.output, column))
    print(*args.output.read_text().splitlines()[:4], sep="\n")
    return args.output


if __name__ == "__main__":
    main()
