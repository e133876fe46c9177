"""From a CSV file of your own to a file of predictions with the names of the classes.

    python examples/own_csv.py train.csv

The file has a column of text, a column of labels and perhaps others, such as an id.
"""

import sys
from functools import partial

import pandas
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from manualloop import evaluate_loop, predict_loop, prepare_dataloaders, train_loop

path, name = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "bert-base-uncased"
rows = pandas.read_csv(path).drop_duplicates("text")
held_out = rows.sample(frac=0.1, random_state=42)
data = {"train": rows.drop(held_out.index), "test": held_out}

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=rows.label.nunique())
loaders = prepare_dataloaders(data, tokenizer, model=model, fill={"text": ""}, keep=("id", "text"))

score = partial(evaluate_loop, model, loaders["test"], "accuracy")
train_loop(model, loaders["train"], num_epochs=3, evaluate=score, best_metric="accuracy")
predict_loop(model, loaders["test"]).to_csv("predictions.csv")
