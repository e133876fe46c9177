"""Forty mistakes people make, as scripts for manualloop and for transformers' Trainer.

A script ``(fit, model, line)`` is what a user writes; with ``line``, taken out of the message, it
is what the user writes after reading it. A script ``(train)`` is the same mistake for the Trainer:
``train(model, dataset, ...)`` builds one and calls it. ``test_forty.py`` runs the former,
``benchmarks/mistakes.py`` both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from helpers import rows, tiny_bert, tiny_tokenizer
from mistakes import keywords, own_loader, tokenized, value
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    BertForTokenClassification,
    BertModel,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

from manualloop import (
    CheckpointError,
    ConfigError,
    DataError,
    ManualLoopError,
    MetricError,
    ModelError,
    SingleDevice,
    evaluate_loop,
    preflight,
    prepare_dataloaders,
    prepare_optimizer,
    prepare_scheduler,
    train_loop,
)

Fit = Callable[..., Any]
Ours = Callable[[Fit, nn.Module, str | None], None]
Theirs = Callable[[Callable[..., Any]], None]


class Mistake(NamedTuple):
    """One of the forty.

    Attributes:
        number: Its number.
        title: What the user did, in a few words.
        error: Class of the error; None if the run is made, and a line tells.
        says: Parts of the message: what happened, and where.
        line: The code in the message that fixes it; empty if there is nothing to fix.
        ours: The script.
        theirs: The script for the Trainer.
        model: Function that makes the model.
        whole_runs: Whether it is about an argument that ``train_loop`` alone has.
    """

    number: int
    title: str
    error: type[ManualLoopError] | None
    says: tuple[str, ...]
    line: str
    ours: Ours
    theirs: Theirs
    model: Callable[[], nn.Module]
    whole_runs: bool


FORTY: list[Mistake] = []
_THEIRS: dict[int, Theirs] = {}


def for_trainer(script: Theirs) -> Theirs:
    """Keep a script for the Trainer, for the mistake that is defined next."""
    _THEIRS[len(FORTY) + 1] = script
    return script


def mistake(
    title: str,
    error: type[ManualLoopError] | None,
    *says: str,
    line: str = "",
    model: Callable[[], nn.Module] = tiny_bert,
    whole_runs: bool = False,
) -> Callable[[Ours], Ours]:
    """Add a script to the table, under the next number."""

    def add(script: Ours) -> Ours:
        number = len(FORTY) + 1
        theirs = _THEIRS[number]
        FORTY.append(Mistake(number, title, error, says, line, script, theirs, model, whole_runs))
        return script

    return add


PAD = DataCollatorWithPadding(tiny_tokenizer())


def prepared(model: nn.Module | None = None, dataset: Any = None, **options: Any) -> Any:
    """Loaders of some sentences, as ``prepare_dataloaders`` makes them."""
    return prepare_dataloaders(
        rows() if dataset is None else dataset, tiny_tokenizer(), model=model, **options
    )


def labelled(**columns: list[Any]) -> Dataset:
    """Tokenized rows with ``labels``, for the Trainer and for loaders of one's own."""
    dataset = rows(**columns) if columns else rows().rename_column("label", "labels")
    return tokenized(dataset)


# Labels. ----------------------------------------------------------------------------------------


@for_trainer
def _(train):
    train(tiny_bert(), tokenized(rows().rename_column("label", "target")), PAD)


@mistake(
    "the label column is called `target`",
    *(DataError, "No label column in train", "Its columns: sentence, target", "mean 'target'?"),
    line='label_column="target"',
)
def _(fit, model, line):
    fit(model, prepared(None, rows().rename_column("label", "target"), **keywords(line))["train"])


@for_trainer
def _(train):
    train(tiny_bert(), tokenized(rows().remove_columns("label")), PAD)


@mistake(
    "there are no labels at all",
    *(DataError, "Training needs labels", "has only input_ids, token_type_ids, attention_mask"),
    line="loss_fn=",
)
def _(fit, model, line):
    loaders = prepared(model, rows().remove_columns("label"))
    own = {"loss_fn": lambda model, batch: model(**batch).logits.mean()} if line else {}
    fit(model, loaders["train"], **own)


@for_trainer
def _(train):
    train(tiny_bert(), rows(text=["good", "bad"], label=[0, 1]), PAD)


@mistake(
    "the text is not tokenized",
    *(DataError, "Column 'text' is still text"),
    line="prepare_dataloaders(dataset, tokenizer)",
)
def _(fit, model, line):
    dataset = rows(text=["good", "bad"], label=[0, 1])
    if line is None:
        fit(model, DataLoader(dataset, batch_size=2))
    else:
        names = {"prepare_dataloaders": prepare_dataloaders, "tokenizer": tiny_tokenizer()}
        fit(model, value(line, dataset=dataset, **names)["train"])


@for_trainer
def _(train):
    dataset = tokenized(rows(sentence=["good", "bad", "fine"], labels=["pos", "neg", "pos"]))
    train(tiny_bert(), dataset, PAD)


@mistake(
    "labels are strings",
    *(DataError, "'labels' holds strings", "'pos'", "row 0"),
    line='dataset.class_encode_column("labels")',
)
def _(fit, model, line):
    dataset = tokenized(rows(sentence=["good", "bad", "fine"], labels=["pos", "neg", "pos"]))
    fit(model, own_loader(value(line, dataset=dataset)))


NONE = {"labels": [1, 0, 1, None, 1, 0]}


@for_trainer
def _(train):
    train(tiny_bert(), labelled(sentence=["good"] * 6, **NONE), PAD)


@mistake(
    "the label of row 3 is `None`",
    *(DataError, "Row 3 of train has labels=None", "value: 1 of 6"),
    line='dataset.filter(lambda row: row["labels"] is not None)',
)
def _(fit, model, line):
    dataset = rows(text=["good", "bad", "fine", "dull", "good", "bad"], **NONE)
    fit(model, prepared(None, value(line, dataset=dataset))["train"])


# Models. ----------------------------------------------------------------------------------------


def headless() -> Any:
    return tiny_bert(kind=BertModel)


@for_trainer
def _(train):
    train(headless(), labelled(), PAD)


@mistake(
    "the model has no head (`BertModel`)",
    *(ModelError, "BertModel has no task head", "no loss"),
    line="AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)",
    model=headless,
)
def _(fit, model, line):
    model = tiny_bert() if line else model
    fit(model, prepared(model)["train"])


class Logits(nn.Module):
    """Returns what many models of one's own do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 2)

    def forward(self, input_ids, labels=None):
        return self.embedding(input_ids).mean(dim=1)


@for_trainer
def _(train):
    train(Logits(), labelled().select_columns(["input_ids", "labels"]))


@mistake(
    "the model returns a tensor",
    *(ModelError, "Logits.forward returned a Tensor of shape", "not an output with a loss"),
    line="loss_fn=lambda model, batch: torch.nn.functional.cross_entropy("
    'model(input_ids=batch["input_ids"]), batch["labels"])',
    model=Logits,
)
def _(fit, model, line):
    fit(model, prepared(model)["train"], **keywords(line))


class NeverALoss(Logits):
    def forward(self, input_ids, **columns):
        return {"loss": None, "logits": super().forward(input_ids)}


@for_trainer
def _(train):
    train(NeverALoss(), labelled(), PAD, remove_unused_columns=False)


@mistake(
    "the model returns `loss=None`",
    *(ModelError, "NeverALoss's output has loss=None", "it accepts: input_ids"),
    line="loss_fn=lambda model, batch: ...",
    model=NeverALoss,
)
def _(fit, model, line):
    own = {"loss_fn": lambda model, batch: model(**batch)["logits"].mean()} if line else {}
    fit(model, prepared(model)["train"], **own)


# Classes. ---------------------------------------------------------------------------------------


def classes(*numbers: Any) -> Dataset:
    texts = ["good", "bad", "fine", "dull", "a"][: len(numbers)]
    return rows(sentence=texts, labels=list(numbers))


@for_trainer
def _(train):
    train(tiny_bert(), tokenized(classes(0, 1, 0, 1, 2)), PAD)


@mistake(
    "label 2, and the model has `num_labels=2`",
    *(DataError, "Label 2 in row 4 of train", "num_labels=2 (0..1)"),
    line="num_labels=3",
)
def _(fit, model, line):
    model = tiny_bert(**keywords(line)) if line else model
    fit(model, prepared(model, classes(0, 1, 0, 1, 2))["train"])


@for_trainer
def _(train):
    train(tiny_bert(), tokenized(classes(0, -1, 1)), PAD)


@mistake(
    "a label is -1",
    *(DataError, "Label -1 in row 1 of train", "-100"),
    line='dataset.filter(lambda row: row["labels"] >= 0)',
)
def _(fit, model, line):
    fit(model, prepared(model, value(line, dataset=classes(0, -1, 1)))["train"])


@for_trainer
def _(train):
    train(tiny_bert(3), tokenized(classes(1, 2, 3, 1)), PAD)


@mistake(
    "labels are numbered from 1",
    *(DataError, "Label 3 in row 2 of train", "num_labels=3 (0..2)", "The smallest label is 1"),
    line='dataset.map(lambda row: {"labels": row["labels"] - 1})',
    model=lambda: tiny_bert(3),
)
def _(fit, model, line):
    fit(model, prepared(model, value(line, dataset=classes(1, 2, 3, 1)))["train"])


@for_trainer
def _(train):
    train(tiny_bert(), tokenized(classes(1.0, 0.0)), PAD)


@mistake(
    "labels of two classes are floats",
    *(DataError, "Float labels in train, e.g. 1.0 (row 0)", "multi-label", "2 of them a row"),
    line='dataset.cast_column("labels", datasets.Value("int64"))',
)
def _(fit, model, line):
    fit(model, prepared(model, value(line, dataset=classes(1.0, 0.0)))["train"])


@for_trainer
def _(train):
    train(tiny_bert(1), labelled(), PAD)


@mistake(
    "labels are classes, and the model has `num_labels=1`",
    *(None, "num_labels=1, which means regression (MSE loss)", "'label' of train look like"),
    line="num_labels=2",
    model=lambda: tiny_bert(1),
)
def _(fit, model, line):
    model = tiny_bert(**keywords(line)) if line else model
    fit(model, prepared(model)["train"])


@for_trainer
def _(train):
    train(tiny_bert(), tokenized(classes(-100, -100)), PAD)


@mistake(
    "all labels are -100",
    *(DataError, "No label to learn from in train batch 0", "all 2 are -100"),
    line='dataset.filter(lambda row: row["labels"] != -100)',
)
def _(fit, model, line):
    dataset = classes(-100, -100)
    if line is not None:  # would leave none: with one more row
        dataset = value(line, dataset=classes(-100, 1, -100))
    fit(model, prepared(None, dataset)["train"])


# Tokens. ----------------------------------------------------------------------------------------


def small_vocabulary() -> Any:
    return tiny_bert(vocab_size=5)


@for_trainer
def _(train):
    train(small_vocabulary(), labelled(), PAD)


@mistake(
    "a token is beyond the vocabulary of the model",
    *(DataError, "Token id", "in train batch 0", "vocab_size 5", "Tokenizer and model differ"),
    line="model.resize_token_embeddings(len(tokenizer))",
    model=small_vocabulary,
)
def _(fit, model, line):
    tokenizer = tiny_tokenizer()
    value(line, model=model, tokenizer=tokenizer)
    fit(model, prepare_dataloaders(rows(), tokenizer)["train"])


def short_model() -> Any:
    return tiny_bert(max_position_embeddings=16)


LONG = ["good movie " * 20, "bad movie"]


@for_trainer
def _(train):
    dataset = rows(sentence=LONG, labels=[0, 1])
    train(short_model(), tokenized(dataset, max_length=40), PAD)


@mistake(
    "a text is longer than the model takes",
    *(DataError, "A sequence of 42 tokens in train batch 0", "takes 16"),
    line="max_length=16",
    model=short_model,
)
def _(fit, model, line):
    dataset = rows(text=LONG, label=[0, 1])
    fit(model, prepare_dataloaders(dataset, tiny_tokenizer(), **keywords(line))["train"])


RAGGED = {"input_ids": [[4, 5, 6, 7], [4, 5]], "labels": [0, 1]}


@for_trainer
def _(train):
    train(tiny_bert(), rows(**RAGGED))


@mistake(
    "rows of different lengths are not padded",
    *(DataError, "have lengths 2..4 in 'input_ids'", "they are not padded"),
    line="prepare_dataloaders(dataset, tokenizer)",
)
def _(fit, model, line):
    fit(model, prepare_dataloaders(rows(**RAGGED), tiny_tokenizer() if line else None)["train"])


def without_pad_token() -> Any:
    return tiny_tokenizer(pad_token=None, eos_token="[SEP]")


@for_trainer
def _(train):
    ids = tokenized(rows().rename_column("label", "labels"), padding=False)
    train(tiny_bert(), ids, DataCollatorWithPadding(without_pad_token()))


@mistake(
    "the tokenizer has no pad token",
    *(DataError, "The tokenizer has no pad token"),
    line="tokenizer.pad_token = tokenizer.unk_token; "
    "model.config.pad_token_id = tokenizer.pad_token_id",
)
def _(fit, model, line):
    tokenizer = without_pad_token()
    exec(line or "", {"tokenizer": tokenizer, "model": model})
    fit(model, prepare_dataloaders(rows(), tokenizer, model=model)["train"])


def tagger() -> Any:
    return tiny_bert(kind=BertForTokenClassification)


UNALIGNED = {"input_ids": [[4, 5, 6], [4, 5, 6, 7]], "labels": [[0, 1, 1], [0, 1]]}


@for_trainer
def _(train):
    train(tagger(), rows(**UNALIGNED), PAD)


@mistake(
    "a row has fewer labels than tokens",
    *(DataError, "labels have length 2, input_ids 4", "row 1 of train"),
    line="-100",
    model=tagger,
)
def _(fit, model, line):
    labels = [[0, 1, 1], [0, 1] + ([int(line)] * 2 if line else [])]
    fit(model, prepared(model, rows(**{**UNALIGNED, "labels": labels}))["train"])


# Columns and splits. ----------------------------------------------------------------------------


def with_more_columns() -> Dataset:
    dataset = rows().add_column("id", [f"row-{number}" for number in range(6)])
    return dataset.add_column("year", [2020] * 6)


@for_trainer
def _(train):
    train(tiny_bert(), tokenized(with_more_columns().rename_column("label", "labels")), PAD)


@mistake(
    "columns that the model does not take: an id, a year",
    *(None, "using sentence -> labels; dropped: id, year (not in BertForSequence"),
)
def _(fit, model, line):
    fit(model, prepared(model, with_more_columns())["train"])


def distilbert() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
        config = DistilBertConfig(vocab_size=16, max_position_embeddings=64, **sizes)
        return DistilBertForSequenceClassification(config)


@for_trainer
def _(train):
    train(distilbert(), labelled(), PAD)


@mistake(
    "`token_type_ids` for a model without them (DistilBERT)",
    *(None, "dropped: token_type_ids (not in DistilBertForSequenceClassification.forward)"),
    model=distilbert,
)
def _(fit, model, line):
    fit(model, prepared(model)["train"])


@for_trainer
def _(train):
    train(tiny_bert(), labelled().filter(lambda row: row["labels"] > 1), PAD)


@mistake(
    "a filter has left no row",
    *(DataError, "train has 0 rows", "Check the filter"),
    line="print(dataset)",
)
def _(fit, model, line):
    least = 0 if line else 1
    fit(model, prepared(model, rows().filter(lambda row: row["label"] > least))["train"])


@for_trainer
def _(train):
    train(tiny_bert(), DatasetDict(train=labelled(), test=labelled()), PAD)


@mistake(
    "all splits where one is wanted",
    *(DataError, "Got a DatasetDict with splits train, test", "one loader is wanted"),
    line='loaders["train"]',
)
def _(fit, model, line):
    splits = DatasetDict(train=rows(), test=rows())
    loaders = prepared(None, splits)
    fit(model, splits if line is None else value(line, loaders=loaders))


@for_trainer
def _(train):
    dataset = labelled().select(range(5))
    train(tiny_bert(), dataset, PAD, dataloader_drop_last=True, per_device_train_batch_size=8)


@mistake(
    "fewer rows than a batch, with `drop_last`",
    *(DataError, "train has 5 rows: with batch_size=8 and drop_last it has 0 batches"),
    line="drop_last=False",
)
def _(fit, model, line):
    options = {"drop_last": True, **keywords(line)}
    fit(model, prepared(model, rows(5), **options)["train"])


# Metrics. ---------------------------------------------------------------------------------------


def scored(model: nn.Module, metric: Any = "accuracy", **options: Any) -> dict[str, Any]:
    """The argument ``evaluate`` of a run over some sentences."""
    validation = prepared(None, {"validation": rows(4)})["validation"]
    return {"evaluate": partial(evaluate_loop, model, validation, metric, **options)}


def accuracy(predictions: Any, references: Any) -> dict[str, float]:
    """What users of the Trainer write without a hub at hand."""
    from sklearn.metrics import accuracy_score

    return {"accuracy": accuracy_score(references, predictions)}


@for_trainer
def _(train):
    def compute_metrics(pred):
        return accuracy(pred.predictions, pred.label_ids)

    train(tiny_bert(), labelled(), PAD, compute_metrics)


@mistake(
    "a metric gets logits for classes",
    *(MetricError, "accuracy scores a prediction for each label, and in batch 0 the shape of the"),
    *("predictions is (4, 2)", "that of the labels (4,)"),
    line="Leave postprocess out",
    whole_runs=True,
)
def _(fit, model, line):
    predict = None if line else lambda outputs, batch: outputs.logits

    fit(model, prepared(model)["train"], **scored(model, postprocess=predict))


@for_trainer
def _(train):
    def compute_metrics(pred):
        return accuracy(pred.predictions[:, 1], pred.label_ids)

    train(tiny_bert(), labelled(), PAD, compute_metrics)


@mistake(
    "a metric gets floats for classes",
    *(MetricError, "accuracy expects integers, got float32 (", "in the predictions of batch 0"),
    line="(scores > 0.5).astype(int)",
    whole_runs=True,
)
def _(fit, model, line):
    def predict(outputs, batch):
        scores = outputs.logits[:, 1].numpy()
        return torch.as_tensor(value(line, scores=scores))

    fit(model, prepared(model)["train"], **scored(model, postprocess=predict))


@for_trainer
def _(train):
    def compute_metrics(pred):
        return accuracy(pred.predictions.argmax(-1)[:-1], pred.label_ids)

    train(tiny_bert(), labelled(), PAD, compute_metrics)


@mistake(
    "fewer predictions than rows",
    *(DataError, "3 predictions for a batch of 4 rows"),
    line="outputs.logits.argmax(-1)",
    whole_runs=True,
)
def _(fit, model, line):
    def predict(outputs, batch):
        if line is None:
            return outputs.logits[:-1].argmax(-1)
        return value(line, outputs=outputs)

    fit(model, prepared(model)["train"], **scored(model, postprocess=predict))


@for_trainer
def _(train):
    empty = labelled().select([])
    train(tiny_bert(), labelled(), PAD, eval_dataset=empty, eval_strategy="epoch")


@mistake(
    "nothing to evaluate",
    *(DataError, "No rows to evaluate", "the loader gave 0 batches"),
    line="Check the filter of the dataset",
    whole_runs=True,
)
def _(fit, model, line):
    dataset = labelled()
    loader = own_loader(dataset if line else dataset.select([]))
    fit(model, prepared(model)["train"], evaluate=partial(evaluate_loop, model, loader))


@for_trainer
def _(train):
    import evaluate

    metric = evaluate.load("acuracy")
    train(tiny_bert(), labelled(), PAD, lambda pred: metric.compute(predictions=pred.predictions))


@mistake(
    "a metric is misspelt: `acuracy`",
    *(MetricError, "Cannot fetch metric 'acuracy' (offline or unknown)", "Did you mean"),
    line="'accuracy'",
    whole_runs=True,
)
def _(fit, model, line):
    metric = value(line, metric="acuracy")
    fit(model, prepared(model)["train"], **scored(model, metric))


BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
}


@for_trainer
def _(train):
    def compute_metrics(pred):
        return accuracy(pred.predictions.argmax(-1), pred.label_ids)

    train(tiny_bert(), labelled(), PAD, compute_metrics, metric_for_best_model="f1", **BEST)


@mistake(
    "the metric for the best model is not computed",
    *(ConfigError, "best_metric='f1'", "evaluate returned no 'f1': loss, accuracy"),
    line="Name one of its results",
    whole_runs=True,
)
def _(fit, model, line):
    best = "accuracy" if line else "f1"
    fit(model, prepared(model)["train"], best_metric=best, **scored(model))


@for_trainer
def _(train):
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    train(tiny_bert(), labelled(), PAD, eval_dataset=labelled(), **best, **BEST)


@mistake(
    "the best model is the one with the highest loss",
    *(None, "best_metric='+loss' takes the highest loss for the best, which is the worst model"),
    line="best_metric='loss'",
    whole_runs=True,
)
def _(fit, model, line):
    best = keywords(line) or {"best_metric": "+loss"}
    fit(model, prepared(model)["train"], **best, **scored(model))


# Parameters, optimizers, numbers. ---------------------------------------------------------------


def frozen() -> Any:
    return tiny_bert().requires_grad_(False)


@for_trainer
def _(train):
    train(frozen(), labelled(), PAD)


@mistake(
    "all parameters are frozen",
    *(ModelError, "BertForSequenceClassification has 0 trainable parameters of 25"),
    line="for parameter in model.classifier.parameters(): parameter.requires_grad_(True)",
    model=frozen,
)
def _(fit, model, line):
    exec(line or "", {"model": model})
    fit(model, prepared(model)["train"])


@for_trainer
def _(train):
    optimizer = torch.optim.AdamW(tiny_bert().parameters())
    train(tiny_bert(), labelled(), PAD, optimizers=(optimizer, None))


@mistake(
    "the optimizer belongs to another model",
    *(ModelError, "None of the optimizer's 25 parameters", "this BertForSequenceClassification"),
    line="prepare_optimizer(model)",
)
def _(fit, model, line):
    optimizer = value(line, optimizer=torch.optim.AdamW(tiny_bert().parameters()), model=model)
    fit(model, prepared(model)["train"], optimizer=optimizer)


@for_trainer
def _(train):
    model = tiny_bert().eval()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = get_linear_schedule_with_warmup(optimizer, 0, num_training_steps=2)
    train(model, labelled(), PAD, optimizers=(optimizer, schedule), max_steps=6)


@mistake(
    "the schedule is over before the run (and the model is in eval mode)",
    *(ConfigError, "The schedule was built for num_training_steps=2 updates, and the run has 6"),
    line='prepare_scheduler(optimizer, "linear", num_training_steps=6)',
    model=lambda: tiny_bert().eval(),
)
def _(fit, model, line):
    optimizer = prepare_optimizer(model)
    names = {"optimizer": optimizer, "prepare_scheduler": prepare_scheduler}
    schedule = value(
        line, schedule=get_linear_schedule_with_warmup(optimizer, 0, num_training_steps=2), **names
    )
    assert isinstance(schedule, LambdaLR)
    fit(model, prepared(model)["train"], optimizer=optimizer, lr_scheduler=schedule, max_steps=6)
    assert model.training or fit is by_preflight


@for_trainer
def _(train):
    train(tiny_bert(), labelled(), PAD, gradient_accumulation_steps=0, num_train_epochs=0)


@mistake(
    "`gradient_accumulation_steps=0`, no epoch, a negative norm",
    *(ConfigError, "num_epochs must be a whole number of at least 1, got 0."),
    "gradient_accumulation_steps must be a whole number of at least 1, got 0.",
    "max_grad_norm must be above 0, got -1",
    line="None does not clip",
)
def _(fit, model, line):
    numbers = {"num_epochs": 0, "gradient_accumulation_steps": 0, "max_grad_norm": -1}
    fit(model, prepared(model)["train"], **({} if line else numbers))


@for_trainer
def _(train):
    train(tiny_bert(), labelled().to_iterable_dataset(), PAD)


@mistake(
    "a stream without a number of updates",
    *(ConfigError, "A streaming dataset has no length"),
    line="max_steps=",
)
def _(fit, model, line):
    stream = rows().to_iterable_dataset()
    fit(model, prepared(model, stream)["train"], **({"max_steps": 1} if line else {}))


# Devices and folders. ---------------------------------------------------------------------------


@for_trainer
def _(train):
    train(tiny_bert().half(), labelled(), PAD, fp16=True)


@mistake(
    "float16 weights under float16 mixed precision",
    *(ModelError, "The weights of BertForSequenceClassification are float16"),
    line="dtype=torch.float32",
    model=lambda: tiny_bert().half(),
)
def _(fit, model, line):
    model = model.to(**keywords(line)) if line else model
    fit(model, prepared(model)["train"], strategy=SingleDevice("cpu", mixed_precision="fp16"))


def elsewhere(device: str) -> list[dict[str, torch.Tensor]]:
    """A batch on another device; torch's "meta" stands for any accelerator."""
    ids = torch.ones(2, 3, dtype=torch.long, device=device)
    return [{"input_ids": ids, "labels": torch.zeros(2, dtype=torch.long, device=device)}]


@for_trainer
def _(train):
    def collate(rows):
        return elsewhere("meta")[0]

    train(tiny_bert(), labelled(), collate)


@mistake(
    "batches are on another device than the model",
    *(DataError, "Column 'input_ids' of a batch is on meta", "BertForSequenceClassification is on"),
    line='device="cpu"',
)
def _(fit, model, line):
    fit(model, elsewhere(**(keywords(line) or {"device": "meta"})))


@cache
def folder_of_another_run() -> str:
    """A folder with a finished run of another model and other rows."""
    folder = tempfile.mkdtemp()
    model = tiny_bert(hidden_size=16)
    train_loop(
        model, prepared(model, rows(9))["train"], num_epochs=1, checkpoint_dir=folder,
        progress_bar=False,
    )  # fmt: skip
    return folder


@for_trainer
def _(train):
    folder = tempfile.mkdtemp()
    options = {"output_dir": folder, "save_strategy": "epoch"}
    train(tiny_bert(hidden_size=16), labelled(), PAD, counts=False, **options)
    train(tiny_bert(), labelled(sentence=["good", "bad"], labels=[0, 1]), PAD, **options)


@mistake(
    "the folder holds a finished run of another model",
    *(CheckpointError, "holds a run that is finished, and this is another run"),
    line="another checkpoint_dir",
    whole_runs=True,
)
def _(fit, model, line):
    folder = tempfile.mkdtemp() if line else folder_of_another_run()
    fit(model, prepared(model)["train"], checkpoint_dir=folder)


@for_trainer
def _(train):
    train(tiny_bert(), labelled(), PAD, resume_from_checkpoint=True)


@mistake(
    "resume, and there is no checkpoint",
    *(CheckpointError, "There is no checkpoint in", "to resume from"),
    line='resume="auto"',
    whole_runs=True,
)
def _(fit, model, line):
    options = keywords(line) or {"resume": True}
    folder = tempfile.mkdtemp()
    fit(model, prepared(model)["train"], checkpoint_dir=folder, **options)


def by_preflight(model: nn.Module, loader: Any, **arguments: Any) -> None:
    """``preflight`` with the arguments of a run."""
    length = {} if "max_steps" in arguments else {"num_epochs": 1}
    preflight(model, loader, **{**length, **arguments})
