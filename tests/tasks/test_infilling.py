"""Fill-in-the-middle: what is written is the document in another order, and nothing else."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset
from helpers import WORDS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from manualloop import ConfigError, DataError, prepare_dataloaders
from manualloop.tasks import cut, fill_in_middle, pack

SENTINELS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """Byte-level, so that it gives every text back; trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", *SENTINELS]
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def words_tokenizer():
    tokenizer = tiny_tokenizer(eos_token="[SEP]")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.add_tokens(list(SENTINELS), special_tokens=True)
    return tokenizer


def restored(ids, sentinels):
    """A changed document as it was, and its order; each sentinel occurs once."""
    before, after, between = sentinels
    if before not in ids:
        assert not {after, between} & {*ids}
        return [ids], "as it was"
    assert ids[0] == before
    assert [ids.count(token) for token in sentinels] == [1, 1, 1]
    middle = ids[ids.index(between) + 1 :]
    if ids[1] == after:
        return [middle, ids[2 : ids.index(between)]], "spm"
    prefix = ids[1 : ids.index(after)]
    return [prefix, middle, ids[ids.index(after) + 1 : ids.index(between)]], "psm"


def test_a_document_is_all_there_split_between_characters(bytes_tokenizer):
    tok, draw = bytes_tokenizer, random.Random(0)
    sentinels = tok.convert_tokens_to_ids(list(SENTINELS))
    transform = fill_in_middle(tok, 0.7, spm_rate=0.3)
    generator, orders, inside = torch.Generator().manual_seed(0), Counter(), 0
    num_rows = 400
    for _ in range(num_rows):
        text = " ".join(draw.choices([*WORDS, "naïve", "日本"], k=draw.randrange(3, 12)))
        ids = tok(text)["input_ids"]
        row = transform({"input_ids": ids, "labels": ids}, generator)
        assert row["labels"] == row["input_ids"]
        parts, order = restored(row["input_ids"], sentinels)
        orders[order] += 1
        whole = "".join(map(tok.decode, parts))
        if order != "spm":
            assert whole == text
        else:
            middle, suffix = map(tok.decode, parts)
            assert middle + suffix == text
        if order == "psm":
            prefix, middle, suffix = map(tok.decode, parts)
            assert text.startswith(prefix)
            assert text.endswith(suffix)
            assert text[len(prefix) :].startswith(middle)
            inside += (
                bool(prefix) and prefix[-1] != " " and text[len(prefix) :][:1] not in (" ", "")
            )
    assert orders["as it was"] / num_rows == pytest.approx(0.3, abs=0.07)
    assert orders["spm"] / (orders["spm"] + orders["psm"]) == pytest.approx(0.3, abs=0.08)
    assert inside > 50  # many places are inside of words


def test_finished_documents_keep_their_end_and_their_middle():
    tok = words_tokenizer()
    sentinels = tok.convert_tokens_to_ids(list(SENTINELS))
    generator, draw = torch.Generator().manual_seed(0), random.Random(1)
    for _ in range(200):
        ids = [*[draw.randrange(4, 16) for _ in range(draw.randrange(4, 12))], 3]
        row = fill_in_middle(tok, 1.0, max_length=8)({"input_ids": ids}, generator)["input_ids"]
        if sentinels[0] not in row:
            assert row == ids  # there was no room
            continue
        assert len(row) == max(len(ids), min(len(ids) + 3, 8))
        assert row[-1] == 3
        parts, order = restored(row[:-1], sentinels)
        left = len(ids) + 3 - len(row)  # tokens of its beginning that made room
        if order == "psm":
            assert [token for part in parts for token in part] == ids[left:-1]
        else:
            assert sorted(token for part in parts for token in part) == sorted(ids[left:-1])


def test_every_document_of_a_row_is_drawn_by_itself():
    tok = words_tokenizer()
    sentinels = tok.convert_tokens_to_ids(list(SENTINELS))
    row = pack(tok, 40)({"text": [" ".join(WORDS[n % 6 : n % 6 + 6]) for n in range(30)]})
    generator, numbers = torch.Generator().manual_seed(0), Counter()
    for ids in row["input_ids"]:
        for _ in range(40):
            made = fill_in_middle(tok, 0.5, max_length=40)({"input_ids": ids}, generator)
            made = made["input_ids"]
            assert len(made) == len(ids) == 40
            numbers[sum(token == sentinels[0] for token in made)] += 1
            start = 0
            for end in [n for n, token in enumerate(made) if token == 3]:
                restored(made[start:end], sentinels)  # no sentinel is outside of its document
                start = end + 1
    assert len(numbers) >= 4


def test_a_rate_of_0_changes_nothing_and_the_same_generator_makes_the_same(bytes_tokenizer):
    ids = bytes_tokenizer(" ".join(WORDS))["input_ids"]
    none = fill_in_middle(bytes_tokenizer, 0.0)({"input_ids": ids}, torch.Generator())
    assert none == {"input_ids": ids, "labels": ids}
    transform = fill_in_middle(bytes_tokenizer, 1.0)
    made = [
        one({"input_ids": ids, "id": "a"}, torch.Generator().manual_seed(5))
        for one in (transform, pickle.loads(pickle.dumps(transform)))
    ]
    assert made[0] == made[1]
    assert made[0]["id"] == "a"
    assert made[0]["input_ids"] != ids


def test_the_order_of_the_paper():
    """PSM: <PRE> prefix <SUF> suffix <MID> middle. SPM: <PRE> <SUF> suffix <MID> prefix middle."""
    tok = words_tokenizer()
    before, after, between = tok.convert_tokens_to_ids(list(SENTINELS))
    for spm_rate in (0, 1):
        transform = fill_in_middle(tok, 1.0, spm_rate=spm_rate)
        parts = [
            transform._drawn(next(transform._parts_of([2, 4, 5, 6, 7, 8, 3])), generator)
            for generator in [torch.Generator().manual_seed(2)]
        ]
        part = parts[0]
        assert [*part.prefix, *part.middle, *part.suffix] == [2, 4, 5, 6, 7, 8]
        written = transform._written(part)
        if spm_rate:
            inner = [before, after, *part.suffix, between, *part.prefix, *part.middle]
        else:
            inner = [before, *part.prefix, after, *part.suffix, between, *part.middle]
        assert written == [*inner, 3]


def test_what_cannot_be_filled_is_refused():
    with pytest.raises(ConfigError, match=r"tokenizer\.add_tokens") as error:
        fill_in_middle(tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    line = str(error.value).split("Add them, and embeddings for them: ")[1].split(";")[0]
    exec(line, {"tokenizer": tokenizer})
    assert fill_in_middle(tokenizer).sentinels == (16, 17, 18)
    named = fill_in_middle(tiny_tokenizer(), tokens=("good", "bad", "movie"))
    assert named.sentinels == (4, 5, 6)
    with pytest.raises(ConfigError, match="tokens="):
        fill_in_middle(tiny_tokenizer(), tokens=("good", "bad"))
    with pytest.raises(ConfigError, match="rate must be between 0 and 1"):
        fill_in_middle(tokenizer, 2)
    with pytest.raises(DataError, match="nothing tells which of the new ones"):
        fill_in_middle(tokenizer)({"input_ids": [4, 5], "labels": [-100, 5]}, torch.Generator())
    with pytest.raises(DataError, match="Tokenize first"):
        fill_in_middle(tokenizer)({"text": "good"}, torch.Generator())


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_tokenizers_that_put_a_space_before_a_text_put_none_into_a_word(scheme):
    text = "def foobar(number): return number plus foobar of nothing else at all"
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "</s>", "<PRE>", "<SUF>", "<MID>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    backend.train_from_iterator([text] * 5, trainer)
    ends = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    fill = fill_in_middle(tokenizer, rate=1.0, spm_rate=1.0, max_length=500)
    middle = tokenizer.convert_tokens_to_ids("<MID>")
    for seed in range(20):
        row = {"input_ids": ids, "labels": ids}
        made = list(fill(row, torch.Generator().manual_seed(seed))["input_ids"])
        written = tokenizer.decode(made[made.index(middle) + 1 :], skip_special_tokens=True)
        assert text.startswith(written)


def test_special_tokens_are_not_split_and_documents_with_gaps_stay(bytes_tokenizer):
    tokenizer = copy.deepcopy(bytes_tokenizer)
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    function = fill_in_middle(tokenizer, rate=1.0, max_length=500)
    ids = tokenizer("good <|user|> bad <|user|> movie")["input_ids"]
    for seed in range(20):
        made = function({"input_ids": ids}, torch.Generator().manual_seed(seed))["input_ids"]
        assert made.count(user) == 2
        assert sorted(made) == sorted([*ids, *function.sentinels])
    filled = tokenizer("good")["input_ids"] + [function.sentinels[2]] + ids[:3]
    made = function({"input_ids": filled}, torch.Generator().manual_seed(0))["input_ids"]
    assert made == filled


def test_a_budget_that_longer_rows_exceed_is_told(bytes_tokenizer, caplog):
    data = {"train": Dataset.from_dict({"text": ["good bad movie"] * 9})}
    options = {"preprocess": cut(bytes_tokenizer, 40), "max_tokens": 64}
    prepare_dataloaders(
        data,
        bytes_tokenizer,
        transform=fill_in_middle(bytes_tokenizer),
        task="causal_lm",
        **options,
    )
    assert "train: batches may have more than max_tokens=64 tokens: fill_in" in caplog.text
