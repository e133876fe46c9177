"""What travels to the workers of a loader can be sent to spawned ones, and works there."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pickle import loads

import pytest
import torch
from bench import CONTEXT
from datasets import ClassLabel, Features, Sequence, Value
from helpers import assert_same_batches, rows, tiny_bert, tiny_tokenizer, token_model

from manualloop import DataError, prepare_dataloaders, train_loop


def own_tokens(batch):
    return {"input_ids": [[4] * (1 + len(text) % 5) for text in batch["text"]]}


def named(texts, labels):
    features = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["a", "b"]))})
    return rows(text=texts, labels=labels).cast(features)


TEXTS = ["good", "bad movie", "a plot", "fine"]
PREPARED = {
    "text": (lambda: rows(text=TEXTS, label=[0, 1, 0, 1]), {}),
    "pairs": (lambda: rows(text1=TEXTS, text2=TEXTS, label=[0, 1, 0, 1]), {}),
    "words": (lambda: rows(w=[["a"], ["b"]], label=[0, 1]), {"text_columns": "w"}),
    "preprocess": (lambda: rows(text=TEXTS, label=[0, 1, 0, 1]), {"preprocess": own_tokens}),
    "fill": (lambda: rows(text=["a", None], label=[0, 1]), {"fill": {"text": "bad"}}),
    "lists of classes": (lambda: named(TEXTS, [[0], [1], [0, 1], []]), {}),
    "several columns": (
        lambda: rows(text=TEXTS, a=[0, 1, 0, 1], b=[1, 1, 0, 0]),
        {"label_column": ["a", "b"]},
    ),
    "hidden labels": (lambda: rows(text=TEXTS, label=[-1] * 4), {}),
    "tokens with labels": (
        lambda: rows(input_ids=[[4, 5], [6]], labels=[[0, 1], [1]]),
        {"model": token_model()},
    ),
}


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("name", PREPARED)
def test_everything_that_travels_can_be_sent(name, is_stream):
    make, arguments = PREPARED[name]
    dataset = make().to_iterable_dataset() if is_stream else make()
    loader = prepare_dataloaders({"dev": dataset}, tiny_tokenizer(), **arguments)["dev"]
    sent = {}
    for part in ("dataset", "collate_fn", "worker_init_fn"):
        sent[part] = loads(bytes(ForkingPickler.dumps(getattr(loader, part))))
    again = torch.utils.data.DataLoader(
        sent["dataset"], batch_size=8, collate_fn=sent["collate_fn"]
    )
    assert_same_batches(again, loader)


@pytest.mark.exhaustive  # the process that the workers are forked from imports torch again: 7 s
def test_a_stream_is_read_by_workers_that_get_it_pickled():
    dataset = rows(8).to_iterable_dataset(num_shards=2)
    loader = prepare_dataloaders(dataset, tiny_tokenizer(), batch_size=4, num_workers=1)["train"]
    loader.multiprocessing_context = CONTEXT  # pickles as spawn does
    model = lambda: tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # noqa: E731
    result = train_loop(model(), loader, max_steps=2, progress_bar=False)
    alone = prepare_dataloaders(dataset, tiny_tokenizer(), batch_size=4)["train"]
    expected = train_loop(model(), alone, max_steps=2, progress_bar=False)
    for own, other in zip(
        result.state.model.parameters(), expected.state.model.parameters(), strict=True
    ):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["good", None], r"A row of dev has text=None: \{'text': None.*fill=\{\"text\": \"\"\}"),
        (["good", ""], r"A row of dev has no tokens: .*fill=\{\"text\": tokenizer.unk_token\}"),
    ],
)
def test_a_late_row_without_text_in_a_stream_is_named(texts, says):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None  # no special tokens
    stream = rows(text=["good"] * 2 + texts, label=[0, 1, 0, 1]).to_iterable_dataset()
    loader = prepare_dataloaders({"dev": stream}, tokenizer, batch_size=2)["dev"]
    with pytest.raises(DataError, match=says):
        list(loader)


def test_a_class_beyond_those_of_a_stream_of_lists_is_refused():
    stream = named(TEXTS, [[0], [1], [0], [1]]).to_iterable_dataset()
    loader = prepare_dataloaders({"dev": stream}, tiny_tokenizer(), model=tiny_bert(2))["dev"]
    assert next(iter(loader))["labels"].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    from manualloop.data.mapping import AsZerosAndOnes

    with pytest.raises(DataError, match=r"Label 2 in a row with labels \[0, 2\].*num_labels=3"):
        AsZerosAndOnes(2)({"labels": [[0, 2]]})
