"""Masks: in distribution those of transformers' collator, by the row's own generator."""

from __future__ import annotations

import pickle

import pytest
import torch
from datasets import Dataset
from helpers import messages, rows, tiny_bert, tiny_tokenizer, whole_and_resumed
from scipy.stats import chi2_contingency
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

from manualloop import (
    ConfigError,
    DataError,
    check_accumulation,
    evaluate_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.data.sampler import set_epoch
from manualloop.tasks import cut, mask_tokens

IDS = [2, *[4, 5, 6, 7, 8, 9, 10, 11, 12, 13] * 4, 3]
MASK = 16


def tokenizer():
    made = tiny_tokenizer()
    made.add_special_tokens({"mask_token": "[MASK]"})
    assert made.mask_token_id == MASK
    return made


def kinds(ids, labels):
    """How many tokens stayed unchosen, were hidden, replaced by others, and kept."""
    found = [0, 0, 0, 0]
    for before, after, label in zip(IDS, ids, labels, strict=True):
        assert label in (-100, before)
        if label == -100:
            assert after == before
            found[0] += before not in (2, 3)
        else:
            assert before not in (2, 3)
            found[1 if after == MASK else 2 if after != before else 3] += 1
    return found


def test_the_distribution_is_that_of_the_collator():
    tok, generator = tokenizer(), torch.Generator().manual_seed(0)
    transform, ours, theirs = mask_tokens(tok), [0] * 4, [0] * 4
    collate = DataCollatorForLanguageModeling(tok, seed=1)
    batch = collate([{"input_ids": IDS}] * 1500)
    numbers, counts = [], []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        theirs = [a + b for a, b in zip(theirs, kinds(ids, labels), strict=True)]
        row = transform({"input_ids": IDS}, generator)
        ours = [a + b for a, b in zip(ours, kinds(row["input_ids"], row["labels"]), strict=True)]
        numbers.append(sum(label != -100 for label in row["labels"]))
        counts.append(sum(label != -100 for label in labels))
    assert chi2_contingency([ours, theirs]).pvalue > 1e-3
    assert ours[1] / sum(ours[1:]) == pytest.approx(0.8, abs=0.02)
    assert sum(ours[1:]) / sum(ours) == pytest.approx(0.15, abs=0.01)
    # The number of a row, too: each token is chosen by itself.
    of_ours, of_theirs = (torch.tensor(n).clamp(1, 12).bincount()[1:] for n in (numbers, counts))
    assert chi2_contingency([of_ours.tolist(), of_theirs.tolist()]).pvalue > 1e-3


def test_other_tokens_come_from_the_whole_vocabulary():
    tok, generator = tokenizer(), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        row = mask_tokens(tok, 1.0)({"input_ids": IDS}, generator)
        seen |= {*row["input_ids"]}
    assert seen == set(range(len(tok)))


def test_every_row_has_a_label_if_it_has_a_token():
    tok, generator = tokenizer(), torch.Generator().manual_seed(0)
    transform, places = mask_tokens(tok), [0, 0, 0]
    for _ in range(600):
        row = transform({"input_ids": [2, 4, 5, 6, 3]}, generator)
        chosen = [n for n, label in enumerate(row["labels"]) if label != -100]
        assert chosen
        for place in chosen:
            places[place - 1] += 1
    # 0.15 + 0.85 ** 3 / 3: that which is chosen where chance chooses none is any of the three.
    assert all(abs(number / 600 - 0.355) < 0.06 for number in places)
    assert transform({"input_ids": [2, 1, 3]}, generator)["labels"] == [-100] * 3


def test_an_evaluation_has_the_same_masks_each_time_and_training_others():
    tok = tokenizer()
    model = tiny_bert(kind=BertForMaskedLM, vocab_size=len(tok))
    data = {"train": rows(12, text=sentences()), "validation": rows(12, text=sentences())}
    options = {"model": model, "preprocess": cut(tok, 16), "transform": mask_tokens(tok)}
    scores = set()
    for batch_size in (3, 3, 5):
        loaders = prepare_dataloaders(data, tok, batch_size=batch_size, **options)
        torch.rand(3)
        found = evaluate_loop(model, loaders["validation"], ["perplexity", "accuracy"])
        scores.add(tuple(round(value, 5) for value in found.values()))
    assert len(scores) == 1
    labels = []
    for epoch in range(2):
        set_epoch(loaders["train"], epoch)
        numbers = loaders["train"].batch_sampler.batches()
        pairs = zip(loaders["train"], numbers, strict=True)
        found = {n: r for b, ns in pairs for n, r in zip(ns, b["labels"].tolist(), strict=True)}
        labels.append({n: [x for x in row if x != -100] for n, row in found.items()})
    assert labels[0] != labels[1]


def sentences():
    return [" ".join(["good", "bad", "movie", "plot", "very"][: 2 + n % 4]) for n in range(12)]


def test_training_and_the_names_of_the_columns(caplog):
    tok = tokenizer()
    model = tiny_bert(kind=BertForMaskedLM, vocab_size=len(tok))
    loaders = prepare_dataloaders(
        rows(12, text=sentences()),
        tok,
        model=model,
        preprocess=cut(tok, 16),
        transform=mask_tokens(tok),
    )
    train_loop(model, loaders["train"], num_epochs=1, progress_bar=False)
    assert any("using what transform returns: input_ids -> labels" in m for m in messages(caplog))


def test_any_split_is_the_same_update_and_a_resumed_run_the_same_run(tmp_path):
    tok = tokenizer()

    def run(folder, on_step):
        model = tiny_bert(kind=BertForMaskedLM, vocab_size=len(tok)).double()
        loader = prepare_dataloaders(
            rows(12, text=sentences()),
            tok,
            model=model,
            preprocess=cut(tok, 16),
            transform=mask_tokens(tok),
            batch_size=4,
        )["train"]
        assert check_accumulation(model, next(iter(loader))).gradient_difference < 1e-12
        torch.manual_seed(1)
        options = {"checkpoint_dir": folder, "checkpoint_every": 1, "progress_bar": False}
        return train_loop(model, loader, num_epochs=2, on_step=on_step, **options)

    whole_and_resumed(run, tmp_path, dies_after=4)


def test_what_cannot_be_masked_is_refused():
    with pytest.raises(ConfigError, match="no mask token"):
        mask_tokens(tiny_tokenizer())
    for wrong in (0, 1.5, "much"):
        with pytest.raises(ConfigError, match="probability must be"):
            mask_tokens(tokenizer(), wrong)
    with pytest.raises(DataError, match="Tokenize first"):
        mask_tokens(tokenizer())({"text": "good"}, torch.Generator())


def test_the_function_can_be_sent_to_workers():
    transform = mask_tokens(tokenizer())
    found = [
        one({"input_ids": IDS}, torch.Generator().manual_seed(4))
        for one in (transform, pickle.loads(pickle.dumps(transform)))
    ]
    assert found[0] == found[1]
    assert Dataset.from_list(found)
