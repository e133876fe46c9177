"""Corners of the data: unusual columns, streams, labels in lists, caches, ready rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import (
    Array2D,
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    LargeList,
    Sequence,
    Value,
    concatenate_datasets,
)
from helpers import VOCAB_SIZE, rows, tiny_bert, tiny_tokenizer
from transformers import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from manualloop import DataError, prepare_dataloaders, train_loop


def first_batch(dataset: Any, tokenizer: Any = None, **arguments: Any) -> dict[str, Any]:
    (loader,) = prepare_dataloaders({"dev": dataset}, tokenizer, **arguments).values()
    return next(iter(loader))


def token_model() -> Any:
    return tiny_bert(kind=BertForTokenClassification)


WORDS_LABELLED = {"text": ["good movie bad", "bad plot was"], "labels": [[0, 1, 0], [0, 1, 1]]}


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_words_are_not_taken_for_labels_of_the_tokens_made_of_them(streaming):
    dataset = rows(**WORDS_LABELLED)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(DataError, match=r"labels have length 3, input_ids 5 \(row 0 of dev\)"):
        first_batch(dataset, tiny_tokenizer(), model=token_model())


def test_a_later_row_of_a_stream_with_too_few_labels_is_not_padded():
    dataset = rows(input_ids=[[4, 5, 6]] * 2, labels=[[0, 1, 0], [0, 1]]).to_iterable_dataset()
    with pytest.raises(DataError, match=r"labels have length 2, input_ids 3 \(row 1 of the 2"):
        first_batch(dataset, tiny_tokenizer(), model=token_model())


def test_one_label_a_row_under_a_head_for_tokens_is_refused():
    with pytest.raises(DataError, match=r"labels have length 1, input_ids 3 \(row 0 of train\)"):
        prepare_dataloaders(rows(), tiny_tokenizer(), model=token_model())


def mend(error: pytest.ExceptionInfo[Any], dataset: Dataset, start: str) -> Dataset:
    line = str(error.value)[str(error.value).index(start) :].removesuffix(".")
    return eval(line, {"dataset": dataset, "datasets": datasets})


def test_lists_of_strings_are_no_labels():
    dataset = rows(text=["good", "bad"], labels=[["a", "b"], ["b"]])
    with pytest.raises(DataError, match=r"'labels' of dev holds strings") as error:
        first_batch(dataset, tiny_tokenizer())
    mended = mend(error, dataset, "dataset.cast_column")
    assert first_batch(mended, tiny_tokenizer())["labels"].tolist() == [[1, 1], [0, 1]]


def test_lists_of_strings_go_into_no_batch():
    dataset = rows(input_ids=[[4, 5], [6, 7]], words=[["a", "b"], ["c", "d"]], labels=[1, 0])
    assert sorted(first_batch(dataset)) == ["input_ids", "labels"]


def test_lists_of_words_are_a_text_and_not_pairs_of_texts():
    dataset = rows(words=[["good", "bad"], ["good"]], labels=[1, 0])
    batch = first_batch(dataset, tiny_tokenizer(), text_columns="words")
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3], [2, 4, 3, 0]]
    assert batch["token_type_ids"].sum() == 0


@pytest.mark.parametrize(
    "labels",
    [[[0, None], [2]], [[0, None], [1, 0]], [[0.0, float("nan")], [1.0, 0.0]]],
    ids=["classes", "0-and-1", "nan"],
)
def test_values_missing_inside_lists_are_named(labels):
    dataset = rows(text=["good", "bad"], labels=labels)
    message = r"Row 0 of dev has labels=None or NaN in it; so have 1 of 2 rows"
    with pytest.raises(DataError, match=message) as error:
        first_batch(dataset, tiny_tokenizer(), model=tiny_bert(3))
    assert len(mend(error, dataset, "dataset.filter")) == 1


def test_the_line_that_takes_minus_1_out_of_a_list_of_classes_runs():
    dataset = rows(text=["good", "bad"], labels=[[0, -1], [2]])
    with pytest.raises(DataError, match="Label -1 in row 0 of dev") as error:
        first_batch(dataset, tiny_tokenizer(), model=tiny_bert(3))
    batch = first_batch(mend(error, dataset, "dataset.map"), tiny_tokenizer(), model=tiny_bert(3))
    assert batch["labels"].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_lists_of_classes_that_start_at_1_get_no_line_that_does_not_run():
    dataset = rows(text=["good", "bad"], labels=[[1, 2], [3]])
    with pytest.raises(DataError, match=r"Label 3 in row 1 of dev.*num_labels=4"):
        first_batch(dataset, tiny_tokenizer(), model=tiny_bert(3))


def tiny_t5() -> Any:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB_SIZE, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


def test_sequences_are_padded_apart_from_the_sequences_they_become():
    dataset = rows(input_ids=[[4, 5], [6]], labels=[[4, 5, 6, 7], [4, 5]])
    batch = first_batch(dataset, tiny_tokenizer(), model=tiny_t5())
    assert batch["input_ids"].tolist() == [[4, 5], [6, 0]]
    assert batch["labels"].tolist() == [[4, 5, 6, 7], [4, 5, -100, -100]]
    train_loop(tiny_t5(), [batch], num_epochs=1, progress_bar=False)
    assert "labels" not in first_batch(
        dataset.remove_columns("labels"), tiny_tokenizer(), model=tiny_t5()
    )


def test_choices_are_padded():
    dataset = rows(input_ids=[[[4, 5], [6]], [[6, 7, 7], [5]]], labels=[0, 1])
    model = tiny_bert(kind=BertForMultipleChoice)
    batch = first_batch(dataset, tiny_tokenizer(), model=model)
    assert batch["input_ids"].shape == (2, 2, 3)
    train_loop(model, [batch], num_epochs=1, progress_bar=False)


def test_answers_that_truncation_cut_off_are_explained():
    model = tiny_bert(kind=BertForQuestionAnswering)
    positions = {"start_positions": [5, 5], "end_positions": [5, 5]}
    loader = prepare_dataloaders(rows(input_ids=[[4, 5]] * 2, **positions), tiny_tokenizer())
    with pytest.raises(DataError, match=r"No label to learn from in train batch 0: all start and"):
        train_loop(model, loader["train"], num_epochs=1, progress_bar=False)


def test_a_window_without_labels_counts_all_of_them():
    dataset = rows(input_ids=[[4], [5], [6]], labels=[-100] * 3)
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), batch_size=2)["train"]
    with pytest.raises(DataError, match=r"in train batch 0 and 1 more: all 3 are -100"):
        train_loop(
            tiny_bert(), loader, num_epochs=1, gradient_accumulation_steps=2, progress_bar=False
        )


@pytest.mark.parametrize("keys", [(datasets.Split.TRAIN, datasets.Split.TEST), (0, 1)])
def test_splits_keep_keys_that_are_no_strings(keys):
    loaders = prepare_dataloaders({key: rows() for key in keys}, tiny_tokenizer())
    assert tuple(loaders) == keys
    assert loaders[keys[0]].batch_sampler.shuffle is (keys[0] != 0)
    assert loaders[keys[1]].batch_sampler.shuffle is False


@pytest.mark.parametrize("is_preprocessed", [False, True])
def test_a_stream_of_unknown_columns_is_started_no_more_than_needed(is_preprocessed):
    starts = []

    def generate():
        starts.append(1)
        yield from rows(5)

    tokenizer = tiny_tokenizer()
    own = {"preprocess": lambda batch: tokenizer(batch["sentence"])} if is_preprocessed else {}
    prepare_dataloaders(IterableDataset.from_generator(generate), tokenizer, **own)
    assert len(starts) == 1 + is_preprocessed


def test_a_processor_that_knows_no_length():
    class Processor:
        model_input_names = ("input_ids", "attention_mask")

        def __call__(self, *texts, **options):
            return tiny_tokenizer()(*texts, **options, padding="max_length")

    model = tiny_bert(max_position_embeddings=16)
    assert first_batch(rows(), Processor(), model=model)["input_ids"].shape == (6, 16)


@pytest.mark.parametrize("columns", [{"pixel_values": [[0.0, 1.0]] * 2}, {"x": [0.5, 1.0]}])
def test_rows_that_are_ready_need_no_text(columns):
    assert sorted(first_batch(rows(**columns, label=[0, 1]))) == sorted([*columns, "labels"])


def test_arrays_are_stacked():
    features = Features({"input_ids": Array2D((2, 2), "int32"), "labels": Array2D((2, 2), "int32")})
    array = [[[1, 2], [3, 4]]] * 2
    batch = first_batch(Dataset.from_dict({"input_ids": array, "labels": array}, features=features))
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == array


@pytest.mark.parametrize("number_feature", [Sequence, LargeList, lambda item: [item]])
def test_lists_however_datasets_writes_them(number_feature):
    features = Features({"input_ids": number_feature(Value("int32")), "labels": Value("int8")})
    dataset = Dataset.from_dict({"input_ids": [[4, 5], [6]], "labels": [1, 0]}, features=features)
    assert first_batch(dataset, tiny_tokenizer())["input_ids"].tolist() == [[4, 5], [6, 0]]
    features = Features(
        {"text": Value("string"), "tags": number_feature(ClassLabel(names=["a", "b"]))}
    )
    dataset = Dataset.from_dict({"text": ["a", "b"], "tags": [[1], [0, 1]]}, features=features)
    batch = first_batch(dataset, tiny_tokenizer(), label_column="tags")
    assert batch["labels"].tolist() == [[0, 1], [1, 1]]


def test_rows_of_lists_are_named_across_chunks_and_selections():
    part = rows(text=["a", "b"], labels=[[0], [1, 2]])
    dataset = concatenate_datasets([part, rows(text=["a", "b"], labels=[[0], [1, 7]])])
    for chosen, row in ((dataset, 3), (dataset.select([3, 0, 1]), 0)):
        with pytest.raises(DataError, match=f"Label 7 in row {row} of dev"):
            first_batch(chosen, tiny_tokenizer(), model=tiny_bert(3))


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


def test_a_later_stream_without_rows_is_named():
    splits = {
        "train": rows().to_iterable_dataset(),
        "dev": IterableDataset.from_generator(lambda: iter(())),
    }
    with pytest.raises(DataError, match="dev has 0 rows"):
        prepare_dataloaders(splits, tiny_tokenizer())


@pytest.mark.parametrize("test", [{"stars": [-1, -1], "labels": [5, 6]}, {"labels": [5, 6]}])
def test_another_column_does_not_stand_in_for_labels_that_are_hidden(test):
    splits = {
        "train": rows(text=["a", "b"], stars=[0, 1], labels=[5, 6]),
        "test": rows(text=["a", "b"], **test),
    }
    loaders = prepare_dataloaders(splits, tiny_tokenizer(), label_column="stars")
    assert "labels" not in next(iter(loaders["test"]))
    assert sorted(next(iter(loaders["train"]))["labels"].tolist()) == [0, 1]


def test_classes_as_values_are_warned_of_once(caplog):
    splits = {"train": rows(), "dev": rows()}
    prepare_dataloaders(splits, tiny_tokenizer(), model=tiny_bert(1))
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from helpers import rows, tiny_tokenizer
from manualloop import prepare_dataloaders
dataset = rows(text=["a", "b"], label=[0, 1], x=[1, 2], y=[1, 2], z=[3, 4])
tokenizer = tiny_tokenizer()
own = lambda batch: tokenizer(batch["text"], truncation=True)
for arguments in ({}, {}, {"preprocess": own}):
    print(prepare_dataloaders(dataset, tokenizer, **arguments)["train"].dataset._fingerprint)
"""


def test_what_was_tokenized_is_found_again_by_the_next_process():
    """`map` names its files by a hash, which must not depend on the order of a set."""
    folder = str(Path(__file__).parent.parent)
    prints = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, folder],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert prints[0] == prints[1]
    assert prints[0][0] == prints[0][1] != prints[0][2]


def test_a_first_label_that_is_missing_in_a_stream_of_tokens():
    dataset = rows(input_ids=[[4, 5], [6]], labels=[None, [1]]).to_iterable_dataset()
    with pytest.raises(DataError, match="labels=None"):
        first_batch(dataset, tiny_tokenizer(), model=token_model())
