from functools import partial

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from manualloop import evaluate_loop, prepare_dataloaders, train_loop
from manualloop.tracking import tensorboard

tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
loaders = prepare_dataloaders(load_dataset("glue", "mrpc"), tokenizer, model=model, batch_size=8)
result = train_loop(
    model,
    loaders["train"],
    num_epochs=3,
    evaluate=partial(evaluate_loop, model, loaders["validation"], "glue/mrpc"),
    best_metric="f1",
    checkpoint_dir="runs/mrpc",
    trackers=[tensorboard("runs/mrpc/tensorboard")],
)
print(result.best_metrics)
