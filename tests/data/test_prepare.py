"""``prepare_dataloaders`` as a whole: its batches equal the course's pipeline bit for bit."""

from __future__ import annotations

import gc
import logging
import os
import runpy
import sys
from collections.abc import Mapping
from typing import Any

import datasets
import processes
import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDatasetDict,
    Value,
    load_dataset,
)
from helpers import (
    VOCAB_SIZE,
    WORDS,
    assert_same_batches,
    course_loader,
    first_batch,
    messages,
    rows,
    sizes,
    table_of,
    tiny_bert,
    tiny_tokenizer,
)
from transformers import (
    AutoTokenizer,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from manualloop import ConfigError, DataError, prepare_dataloaders, train_loop
from manualloop.data.sampler import order, set_epoch

SCHEMES = {
    "cola, sst2": ("sentence",),
    "mrpc, stsb, rte, wnli": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli, ax": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "imdb": ("text",),
    "of one's own": ("utterance",),
}


@pytest.mark.parametrize("texts", SCHEMES.values(), ids=SCHEMES)
def test_batches_equal_the_course_pipeline(texts, caplog):
    dataset, tokenizer = table_of(texts), tiny_tokenizer()
    splits = DatasetDict(train=dataset, validation=dataset.select(range(10)))
    loaders = prepare_dataloaders(splits, tokenizer)
    assert list(loaders) == ["train", "validation"]
    for epoch in (0, 1):
        set_epoch(loaders["train"], epoch)
        expected = course_loader(dataset, tokenizer, texts, sampler=order(21, 42, epoch))
        assert_same_batches(loaders["train"], expected)
    assert_same_batches(
        loaders["validation"], course_loader(splits["validation"], tokenizer, texts)
    )
    assert messages(caplog) == [
        f"train, validation: using {', '.join(texts)} -> labels; dropped: idx"
    ]
    batch = next(iter(loaders["train"]))
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "token_type_ids", "attention_mask", "labels"], torch.int64
    )


@pytest.mark.shared
def test_mrpc(shared, tmp_path):
    raw = load_dataset(str(shared / "glue/mrpc"), cache_dir=str(tmp_path))
    raw["train"] = raw["train"].select(range(500))
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/bert-base-uncased")
    loaders = prepare_dataloaders(raw, tokenizer)
    assert {name: len(loader) for name, loader in loaders.items()} == {
        "train": 63,
        "validation": 51,
    }
    batch = next(iter(loaders["train"]))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    texts = ("sentence1", "sentence2")
    expected = course_loader(raw["train"], tokenizer, texts, sampler=order(500, 42, 0))
    assert_same_batches(loaders["train"], expected)
    expected = course_loader(raw["validation"], tokenizer, texts)
    assert_same_batches(loaders["validation"], expected)


def test_several_processes_tokenize_the_same_rows():
    dataset, tokenizer = rows(10), tiny_tokenizer()
    expected = course_loader(dataset, tokenizer, ["sentence"])
    loaders = prepare_dataloaders({"dev": dataset}, tokenizer, num_proc=2)
    assert_same_batches(loaders["dev"], expected)
    preprocess = lambda batch: {**tokenizer(batch["sentence"])}  # noqa: E731
    loaders = prepare_dataloaders({"dev": dataset}, tokenizer, preprocess=preprocess, num_proc=2)
    assert_same_batches(loaders["dev"], expected)
    stream = {"dev": dataset.to_iterable_dataset()}
    assert_same_batches(prepare_dataloaders(stream, tokenizer, num_proc=2)["dev"], expected)
    with pytest.raises(ConfigError, match="num_proc must be a whole number of at least 1, got 0"):
        prepare_dataloaders({"dev": dataset}, tokenizer, num_proc=0)


def test_streams_give_the_same_rows_in_their_own_order():
    dataset = rows(10)
    stream = IterableDatasetDict(
        train=dataset.to_iterable_dataset(), validation=dataset.to_iterable_dataset()
    )
    loaders = prepare_dataloaders(stream, tiny_tokenizer(), batch_size=4)
    expected = course_loader(dataset, tiny_tokenizer(), ["sentence"], batch_size=4)
    for loader in loaders.values():
        assert_same_batches(loader, expected)
        assert_same_batches(loader, expected)  # and again


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of datasets' streams
def test_files(kind, streaming, tmp_path):
    dataset = rows(10)
    path = tmp_path / f"rows.{kind}"
    {"csv": dataset.to_csv, "json": dataset.to_json, "parquet": dataset.to_parquet}[kind](path)
    loaded = load_dataset(
        kind, data_files=str(path), cache_dir=str(tmp_path / "cache"), streaming=streaming
    )
    loader = prepare_dataloaders(loaded, tiny_tokenizer(), model=tiny_bert())["train"]
    sampler = None if streaming else order(10, 42, 0)
    expected = course_loader(dataset, tiny_tokenizer(), ["sentence"], sampler=sampler)
    assert_same_batches(loader, expected)
    gc.collect()  # while that warning is ignored


def test_a_transform_is_refused_and_runs_as_preprocess():
    tokenizer = tiny_tokenizer()
    transform = lambda batch: {**tokenizer(batch["sentence"]), "labels": batch["label"]}  # noqa: E731
    dataset = {"dev": rows(10).with_transform(transform)}
    with pytest.raises(DataError, match=r"dev has a transform.*preprocess=transform\)"):
        prepare_dataloaders(dataset, tokenizer)
    dataset = {"dev": dataset["dev"].with_format(None)}
    loaders = prepare_dataloaders(dataset, tokenizer, preprocess=transform)
    assert_same_batches(loaders["dev"], course_loader(rows(10), tokenizer, ["sentence"]))


def test_rows_already_tokenized_are_padded_and_pruned(caplog):
    tokenizer = tiny_tokenizer()
    raw = table_of(["text"])
    dataset = raw.map(lambda batch: tokenizer(batch["text"]), batched=True)
    loaders = prepare_dataloaders(dataset, tokenizer)
    expected = course_loader(raw, tokenizer, ["text"], sampler=order(21, 42, 0))
    assert_same_batches(loaders["train"], expected)
    used = "input_ids, token_type_ids, attention_mask -> labels; dropped: text, idx"
    assert messages(caplog) == [f"train: using {used}"]


def longest(loader: Any) -> int:
    return max(batch["input_ids"].shape[1] for batch in loader)


def test_max_length_is_the_smaller_limit_of_model_and_tokenizer():
    dataset = rows(text=["good " * 100, "bad"], label=[1, 0])
    model = tiny_bert(max_position_embeddings=16)
    small = tiny_tokenizer(model_max_length=12)
    assert longest(prepare_dataloaders(dataset, tiny_tokenizer())["train"]) == 64
    assert longest(prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["train"]) == 16
    assert longest(prepare_dataloaders(dataset, small, model=model)["train"]) == 12
    cut = prepare_dataloaders(dataset, tiny_tokenizer(), model=model, max_length=7)
    assert longest(cut["train"]) == 7
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=20,  # of which RoBERTa does not use the first two
    )
    model = RobertaForSequenceClassification(config)
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), model=model)["train"]
    assert longest(loader) == 18
    train_loop(model, loader, num_epochs=1, progress_bar=False)


def test_sizes_of_batches():
    splits = {"train": rows(10), "validation": rows(10)}
    loaders = prepare_dataloaders(
        splits, tiny_tokenizer(), batch_size=4, eval_batch_size=6, drop_last=True
    )
    assert sizes(loaders["train"]) == [4, 4]
    assert sizes(loaders["validation"]) == [6, 4]  # evaluation drops nothing
    assert [len(loader) for loader in loaders.values()] == [2, 2]
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), batch_size=4)
    assert sizes(loaders["train"]) == sizes(loaders["validation"]) == [4, 4, 2]
    with pytest.raises(
        DataError,
        match=r"train has 10 rows: with batch_size=16 and drop_last it has 0 batches\. Use drop",
    ):
        prepare_dataloaders(splits, tiny_tokenizer(), batch_size=16, drop_last=True)


def test_preprocess_replaces_tokenization():
    tokenizer = tiny_tokenizer()
    dataset = table_of(["text", "reply", "name"])
    loaders = prepare_dataloaders(
        dataset,
        tokenizer,
        preprocess=lambda batch: tokenizer(batch["reply"], batch["name"], truncation=True),
    )
    expected = course_loader(dataset, tokenizer, ["reply", "name"], sampler=order(21, 42, 0))
    assert_same_batches(loaders["train"], expected)


def test_preprocess_sees_the_rows_as_they_are_and_may_make_the_labels():
    tokenizer = tiny_tokenizer()
    numbers = {"no": 0, "yes": 1}

    def preprocess(batch: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        labels = [numbers[answer] for answer in batch["label"]]
        return {**tokenizer(batch["text"]), "labels": labels}

    dataset = {"dev": rows(text=["good", "bad", "fine"], label=["yes", "no", "yes"])}
    (batch,) = prepare_dataloaders(dataset, tokenizer, preprocess=preprocess)["dev"]
    assert batch["labels"].tolist() == [1, 0, 1]


def test_preprocess_aligns_the_labels_of_words_to_tokens():
    """The course, chapter 7: rows of words with a class each."""
    tokenizer = tiny_tokenizer()
    features = Features(
        {
            "tokens": datasets.Sequence(Value("string")),
            "ner_tags": datasets.Sequence(ClassLabel(names=["O", "PER"])),
        }
    )
    words = {"tokens": [["good", "movie"], ["bad"]], "ner_tags": [[0, 1], [1]]}

    def preprocess(batch: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        encoded = tokenizer(batch["tokens"], is_split_into_words=True)
        labels = [[-100, *tags, -100] for tags in batch["ner_tags"]]
        return {**encoded, "labels": labels}

    model = tiny_bert(kind=BertForTokenClassification)
    dataset = {"dev": Dataset.from_dict(words, features=features)}
    loaders = prepare_dataloaders(dataset, tokenizer, model=model, preprocess=preprocess)
    (batch,) = loaders["dev"]
    assert batch["labels"].tolist() == [[-100, 0, 1, -100], [-100, 1, -100, -100]]


def test_preprocess_may_change_the_number_of_rows():
    dataset = rows(text=["good bad movie", "fine plot"])

    def preprocess(batch: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        ids = [[WORDS.index(w) + 4] for text in batch["text"] for w in text.split()]
        return {"input_ids": ids, "labels": ids}

    loaders = prepare_dataloaders(dataset, tiny_tokenizer(), preprocess=preprocess)
    assert sizes(loaders["train"]) == [5]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_give_the_same_batches(streaming):
    dataset = table_of(["text"])
    source = dataset.to_iterable_dataset(num_shards=1) if streaming else dataset
    alone = prepare_dataloaders(source, tiny_tokenizer(), batch_size=4)
    workers = prepare_dataloaders(
        source, tiny_tokenizer(), batch_size=4, num_workers=1 if streaming else 2
    )
    for epoch in (0, 1):
        for loaders in (alone, workers):
            set_epoch(loaders["train"], epoch)
        assert_same_batches(workers["train"], alone["train"])


def test_messages_go_where_the_program_sends_them(caplog):
    with caplog.at_level(logging.WARNING, logger="manualloop"):
        prepare_dataloaders(rows(), tiny_tokenizer())
    assert messages(caplog) == []


def test_a_processor_that_knows_no_length():
    class Processor:
        model_input_names = ("input_ids", "attention_mask")

        def __call__(self, *texts, **options):
            return tiny_tokenizer()(*texts, **options, padding="max_length")

    model = tiny_bert(max_position_embeddings=16)
    assert first_batch(rows(), Processor(), model=model)["input_ids"].shape == (6, 16)


def test_preprocess_may_make_no_row():
    own = lambda batch: {"input_ids": [], "labels": []}  # noqa: E731
    with pytest.raises(DataError, match=r"train has 0 rows\. Check the filter"):
        prepare_dataloaders(rows(), tiny_tokenizer(), preprocess=own)


@pytest.mark.parametrize("streaming", [False, True])
def test_preprocess_may_make_labels_for_another_number_of_rows(streaming):
    dataset = rows(text=["good bad", "bad movie"], label=[0, 1])
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    own = lambda batch: {"input_ids": [[4], [5], [6]], "labels": [0, 1, 0]}  # noqa: E731
    batch = first_batch(dataset, tiny_tokenizer(), preprocess=own)
    assert batch["labels"].tolist() == [0, 1, 0]


SCRIPT = """
from helpers import rows, tiny_tokenizer
from manualloop import prepare_dataloaders
dataset = rows(text=["a", "b"], label=[0, 1], x=[1, 2], y=[1, 2], z=[3, 4])
tokenizer = tiny_tokenizer()
own = lambda batch: tokenizer(batch["text"], truncation=True)
for arguments in ({}, {}, {"preprocess": own}):
    print(prepare_dataloaders(dataset, tokenizer, **arguments)["train"].dataset._fingerprint)
"""


def test_the_cache_of_tokenized_rows_is_found_by_the_next_process(tmp_path, capsys):
    """`map` names its files by a hash, which must not depend on the order of a set."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    runpy.run_path(str(script), run_name="__main__")
    # The other process hashes its strings in another way.
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    forked = processes.run(script, env=env, is_merged=False)
    lines = capsys.readouterr().out.splitlines(), forked.output.splitlines()
    # Beside what the script prints, notices stand there.
    prints = [[line for line in of_one if not line.startswith("manualloop:")] for of_one in lines]
    assert prints[0] == prints[1]
    assert prints[0][0] == prints[0][1] != prints[0][2]


@pytest.mark.parametrize("task", ["classes", "missing", "scalar floats", "targets"])
def test_labels_that_preprocess_returns_are_to_be_corrected_there(task: str) -> None:
    """No line that changes the dataset would: it has no such column."""
    made: dict[str, Any] = {
        "classes": [0, 1, 7, 0],
        "missing": [0.0, 1.0, None, 0.0],
        "scalar floats": [0.0, 1.0, 1.0, 0.0],
        "targets": [[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]],
    }
    table = Dataset.from_dict({"ids": [[5, 6], [7, 8], [5, 5], [6, 7]], "grade": [*"abca"]})
    with pytest.raises(DataError) as error:
        prepare_dataloaders(
            table,
            preprocess=lambda rows: {"input_ids": rows["ids"], "labels": made[task]},
            model=tiny_bert(num_labels=2),
        )
    assert "preprocess=" in str(error.value)
    assert "dataset" not in str(error.value)


def test_a_model_that_takes_no_mask_gets_none():
    class NoMask(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(20, 2)

        def forward(self, input_ids, labels=None):
            logits = self.embedding(input_ids).mean(dim=1)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class AnyColumn(NoMask):
        def forward(self, input_ids, labels=None, **columns):
            assert "attention_mask" in columns
            return super().forward(input_ids, labels)

    for model in (NoMask(), AnyColumn()):
        loaders = prepare_dataloaders(rows(), tiny_tokenizer(), model=model)
        batch = next(iter(loaders["train"]))
        assert ("attention_mask" in batch) == isinstance(model, AnyColumn)
        assert train_loop(model, loaders["train"], num_epochs=1, progress_bar=False).state
