"""Mistakes that ``prepare_dataloaders`` finds in the rows: refused, in words that help."""

from __future__ import annotations

from datasets import DatasetDict, IterableDataset
from helpers import rows, tiny_bert, tiny_tokenizer
from mistakes import (
    assert_fixed,
    assert_refused,
    collect,
    each,
    each_loop,
    keywords,
    value,
)
from transformers import (
    BertForTokenClassification,
)

from manualloop import (
    ConfigError,
    DataError,
    prepare_dataloaders,
)

MISTAKES, mistake = collect()


@mistake(
    "03 text only, prepared",
    *(DataError, "Column 'sentence' of train is still text"),
    line="prepare_dataloaders(dataset, tokenizer)",
)
def _(fit, model, line):
    fit(model, prepare_dataloaders(rows(), tiny_tokenizer() if line else None)["train"])


@mistake(
    "05 the first label is None, prepared",
    *(DataError, "Row 0 of train has labels=None", "value: 2 of 3"),
    line='dataset.filter(lambda row: row["labels"] is not None)',
)
def _(fit, model, line):
    dataset = rows(text=["good", "bad", "fine"], labels=[None, 0, None])
    fit(model, prepare_dataloaders(value(line, dataset=dataset), tiny_tokenizer())["train"])


NAN = 'dataset.filter(lambda row: row["labels"] is not None and row["labels"] == row["labels"])'


@mistake(
    "05 a value is NaN, prepared",
    *(DataError, "Row 1 of train has labels=nan", "value: 1 of 3"),
    line=NAN,
    model=lambda: tiny_bert(1),
)
def _(fit, model, line):
    dataset = rows(text=["good", "bad", "fine"], labels=[0.5, float("nan"), 0.1])
    fit(model, prepare_dataloaders(value(line, dataset=dataset), tiny_tokenizer())["train"])


@mistake(
    "09 class 3 of 3 in a list of classes",
    *(DataError, "Label 3 in row 1 of train", "num_labels=3 (0..2)"),
    line="num_labels=4",
    model=lambda: tiny_bert(3),
)
def _(fit, model, line):
    model = tiny_bert(**keywords(line)) if line else model
    dataset = rows(text=["good", "bad", "a"], labels=[[0, 1], [3], []])
    fit(model, prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["train"])


MISALIGNED = (DataError, "labels have length 2, input_ids 4")


@mistake(
    "19 fewer labels than tokens in the first row, prepared",
    *(*MISALIGNED, "row 0 of train"),
    line="-100",
    model=lambda: tiny_bert(kind=BertForTokenClassification),
)
def _(fit, model, line):
    labels = [[0, 1] + ([-100] * 2 if line else []), [0, 1, 1]]
    dataset = rows(input_ids=[[4, 5, 6, 7], [4, 5, 6]], labels=labels)
    fit(model, prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["train"])


@mistake(
    "22 empty split, prepared",
    *(DataError, "validation has 0 rows", "Check the filter"),
    line="print(dataset)",
)
def _(fit, model, line):
    keep = (lambda row: row["label"] > 1) if line is None else (lambda row: row["label"] > 0)
    splits = DatasetDict(train=rows(), validation=rows().filter(keep))
    fit(model, prepare_dataloaders(splits, tiny_tokenizer())["train"])


@mistake("22 empty stream, prepared", DataError, "train has 0 rows", line="print(dataset)")
def _(fit, model, line):
    stream = IterableDataset.from_generator(lambda: iter(rows() if line else ()))
    fit(model, prepare_dataloaders(stream, tiny_tokenizer())["train"], max_steps=1)


@mistake(
    "35 numbers of the loaders out of range, all at once",
    *(ConfigError, "batch_size must be a whole number of at least 1, got 0."),
    "eval_batch_size must be a whole number of at least 1, got -8.",
    "max_length must be a whole number of at least 1, got 0.5.",
    line="at least 1",
)
def _(fit, model, line):
    numbers = {"batch_size": 0, "eval_batch_size": -8, "max_length": 0.5}
    dataset = rows().to_iterable_dataset()
    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), **({} if line else numbers))
    fit(model, loaders["train"], max_steps=1)


@each(MISTAKES)
@each_loop
def test_a_mistake_is_refused_before_the_first_update(mistake, fit, updates):
    assert_refused(mistake, fit, updates)


@each(MISTAKES)
def test_the_line_in_the_message_fixes_it(mistake, updates):
    assert_fixed(mistake, updates)
