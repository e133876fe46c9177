"""Batches made from Arrow are those of transformers' collators, to the bit."""

import copy
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from helpers import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from manualloop import DataError, prepare_dataloaders
from manualloop.data.tables import TableCollate, TableRows, as_tables

SHARED = os.environ.get("MANUALLOOP_SHARED")


class Refuses:
    """Stands for rows as dicts: nothing may fall back on them."""

    def __call__(self, rows):
        raise AssertionError("the table was not padded")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def same(batch, expected):
    assert list(batch) == list(expected)
    for name, value in batch.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


COLLATORS = {
    None: DataCollatorWithPadding,
    "tokens": DataCollatorForTokenClassification,
    "longest": DataCollatorForSeq2Seq,
}


@pytest.mark.parametrize("number", [50, pytest.param(500, marks=pytest.mark.exhaustive)])
def test_a_table_is_padded_as_its_rows_are(tokenizer, number):
    @settings(max_examples=number)
    @given(data=st.data())
    def check(data):
        check_a_table(tokenizer, data)

    check()


def check_a_table(tokenizer, data):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = data.draw(st.sampled_from(["left", "right"]))
    tokenizer.model_input_names = data.draw(
        st.sampled_from([["input_ids", "token_type_ids", "attention_mask"], ["input_ids"]])
    )
    kind = data.draw(st.sampled_from(list(COLLATORS)))
    multiple = data.draw(st.sampled_from([None, 1, 4]))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    ints = st.integers(0, 99)
    rows = [{"input_ids": data.draw(st.lists(ints, min_size=n, max_size=n))} for n in lengths]
    dtypes = {"input_ids": Sequence(Value(data.draw(st.sampled_from(["int32", "int64"]))))}
    extras = ["token_type_ids", "special_tokens_mask", *tokenizer.model_input_names[2:]]
    for name in data.draw(st.lists(st.sampled_from(extras), unique=True)):
        dtypes[name] = Sequence(Value("int8"))
        for row, n in zip(rows, lengths, strict=True):
            row[name] = [n % 2] * n
    if data.draw(st.booleans()):
        dtypes["score"] = Value("float64")
        dtypes["box"] = Sequence(Value("float32"))
        for number, row in enumerate(rows):
            row.update(score=number / 7, box=[0.5, number / 3])
    if kind == "tokens":
        dtypes["labels"] = Sequence(Value("int64"))
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    elif kind == "longest":
        dtypes["labels"] = Sequence(Value("int32"))
        rows = [row | {"labels": [7] * (1 + n % 3)} for row, n in zip(rows, lengths, strict=True)]
    else:
        dtypes["labels"] = data.draw(st.sampled_from([Value("int64"), Value("float32")]))
        rows = [row | {"labels": n} for row, n in zip(rows, lengths, strict=True)]
    names = data.draw(st.permutations(list(dtypes)))
    features = Features({name: dtypes[name] for name in names})
    dataset = Dataset.from_list(rows, features=features)
    number = data.draw(st.integers(0, len(rows) - 1))
    dataset = concatenate_datasets([dataset, dataset]).select(range(number, len(rows) + number))
    if data.draw(st.booleans()):
        dataset = dataset.shuffle(seed=1)

    options = {"labels": kind, "pad_to_multiple_of": multiple, "float_labels": False}
    fetched = as_tables(dataset).__getitems__(list(range(len(dataset))))
    batch = TableCollate(tokenizer, Refuses(), **options)(fetched)
    expected = COLLATORS[kind](tokenizer, pad_to_multiple_of=multiple)(list(dataset))
    same(batch, dict(expected))


def rows_of(*texts, **columns):
    return Dataset.from_dict({"text": list(texts), **columns})


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "columns",
    [
        {"label": [0, 1, 1]},
        {"label": [0.5, 1.0, 0.0]},
        {"label": [True, False, True]},
        {"label": [[0, 1], [1, 1], [0, 0]]},
        {},
    ],
)
def test_loaders_give_the_same_batches_as_rows(tokenizer, columns, num_workers):
    raw = rows_of("the plot", "a fine movie was not dull", "one", **columns)
    (loader,) = prepare_dataloaders(raw, tokenizer, batch_size=2, num_workers=num_workers).values()
    seen = []
    rows = loader.batch_sampler.rows(0)
    for batch in loader:
        taken, rows = rows[: len(batch["input_ids"])], rows[len(batch["input_ids"]) :]
        same(batch, loader.collate_fn([loader.dataset[row] for row in taken]))
        seen += batch["input_ids"].tolist()
    assert len(seen) == 3


@pytest.mark.parametrize("task", ["token_classification", "seq2seq_lm"])
def test_padding_of_bools_is_no_label(tokenizer, task):
    rows = {"input_ids": [[5, 6, 7], [8]], "labels": [[True, False, True], [True]]}
    loader = prepare_dataloaders(Dataset.from_dict(rows), tokenizer, task=task)["train"]
    batch = loader.collate_fn(loader.dataset.__getitems__([0, 1]))
    assert batch["labels"].tolist() == [[1, 0, 1], [1, -100, -100]]
    same(batch, loader.collate_fn(list(loader.dataset)))


def test_its_dataset_serves_loaders_with_another_collator(tokenizer):
    loader = prepare_dataloaders(rows_of("a", "the plot", label=[0, 1]), tokenizer)["train"]
    (batch,) = DataLoader(loader.dataset, 2, collate_fn=DataCollatorWithPadding(tokenizer))
    same(dict(batch), loader.collate_fn(loader.dataset.__getitems__([0, 1])))
    (rows,) = DataLoader(loader.dataset, 2, collate_fn=lambda rows: rows)
    assert isinstance(rows, TableRows)
    expected = [loader.dataset[0], loader.dataset[1]]
    fetch = loader.dataset.__getitems__  # anew each time: a list that nobody has looked at
    assert fetch([0, 1]) == expected != fetch([1, 0])
    assert expected[1] in fetch([0, 1])
    assert repr(fetch([0, 1])) == repr(expected)
    assert len(rows) == 2
    assert [row["labels"] for row in rows] == [0, 1]
    assert rows[1] == loader.dataset[1]
    assert list(zip(*(row["input_ids"] for row in rows), strict=False))
    (batch,) = DataLoader(loader.dataset.with_format("torch").select_columns("labels"), 2)
    assert batch["labels"].tolist() == [0, 1]


def test_columns_that_do_not_fit_together_are_named_as_for_rows(tokenizer):
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "box": [[1.0], [1.0, 2.0]]})
    model_input_names = [*tokenizer.model_input_names, "box"]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_input_names = model_input_names
    loader = prepare_dataloaders(rows, tokenizer, batch_size=2)["train"]
    with pytest.raises(DataError, match=r"lengths 1\.\.2"):
        next(iter(loader))


@pytest.mark.skipif(not SHARED, reason="needs MANUALLOOP_SHARED")
def test_real_rows_are_the_same(tmp_path):
    from datasets import load_dataset

    path = Path(SHARED)
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizers/bert-base-uncased")
    raw = load_dataset(str(path / "glue/mrpc"))["validation"]
    loader = prepare_dataloaders({"validation": raw}, tokenizer)["validation"]
    plain = DataLoader(
        loader.dataset.with_format("torch"), 8, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    num_batches = 0
    for ours, theirs in zip(loader, plain, strict=True):
        same(ours, dict(theirs))
        num_batches += 1
    assert num_batches == 51
