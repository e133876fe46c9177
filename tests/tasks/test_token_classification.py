"""Tags of words as labels of tokens: as the scripts of transformers make them, written out."""

from __future__ import annotations

import pickle
import random
import re
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from helpers import (
    TAGS,
    messages,
    piece_tokenizer,
    tagged_words,
    tiny_bert,
    whole_and_resumed,
)
from transformers import BertForTokenClassification, ByT5Tokenizer

from manualloop import (
    ConfigError,
    DataError,
    check_accumulation,
    evaluate_loop,
    inspect_batch,
    predict_loop,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
)
from manualloop.tasks import tag_words


def sentences(num_rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """As ``tagged_words``, with numbers for tags."""
    rows = tagged_words(num_rows, seed)
    return {**rows, "ner_tags": [[*map(TAGS.index, row)] for row in rows["ner_tags"]]}


def dataset(num_rows: int = 40, seed: int = 0, **columns: Any) -> Dataset:
    tags = Sequence(ClassLabel(names=TAGS))
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": tags, "pos_tags": tags})
    found = {**sentences(num_rows, seed), **columns}
    return Dataset.from_dict({**found, "pos_tags": found["ner_tags"]}, features=features)


def labels_of_run_ner(tokenized: Any, tags: list[list[int]], label_all: bool) -> list[list[int]]:
    """tokenize_and_align_labels of run_ner.py, and its labels of begin as labels inside."""
    begin_to_inside = []
    for idx, label in enumerate(TAGS):
        if label.startswith("B-") and label.replace("B-", "I-") in TAGS:
            begin_to_inside.append(TAGS.index(label.replace("B-", "I-")))
        else:
            begin_to_inside.append(idx)
    labels = []
    for i, label in enumerate(tags):
        previous_word_idx, label_ids = None, []
        for word_idx in tokenized.word_ids(batch_index=i):
            if word_idx is None:
                label_ids.append(-100)
            elif word_idx != previous_word_idx:
                label_ids.append(label[word_idx])
            else:
                label_ids.append(begin_to_inside[label[word_idx]] if label_all else -100)
            previous_word_idx = word_idx
        labels.append(label_ids)
    return labels


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("label_all", [False, True])
def test_labels_are_those_of_run_ner(side, label_all):
    tokenizer = piece_tokenizer(truncation_side=side)
    for seed in range(60):
        rows, limit = sentences(5, seed), 3 + seed % 20
        options = {"label_all": label_all, "max_length": limit, "names": TAGS}
        made, _, counts = tag_words(tokenizer, **options).make(rows, str)
        words, lost = rows["tokens"], Counter[str]()
        expected = tokenizer(words, truncation=True, max_length=limit, is_split_into_words=True)
        assert made["labels"] == labels_of_run_ner(expected, rows["ner_tags"], label_all)
        assert all(made[name] == expected[name] for name in expected)
        whole = tokenizer(words, is_split_into_words=True)
        for row, of_row in enumerate(words):
            is_left = set(expected.word_ids(row)) - {None}
            have_tokens = set(whole.word_ids(row)) - {None}
            lost["words"] += len(of_row)
            lost["cut"] += len(have_tokens - is_left)
            lost["dropped"] += len(of_row) - len(have_tokens)
        assert counts == lost


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokenizers_that_do_not_tell_words(side):
    tokenizer = ByT5Tokenizer(truncation_side=side)
    for seed in range(10):
        rows, limit = sentences(3, seed), 4 + 3 * seed
        spaced = [[" " * (n > 0) + w for n, w in enumerate(row)] for row in rows["tokens"]]
        rows["tokens"] = spaced  # as the message on joined words tells
        made = tag_words(tokenizer, max_length=limit)(rows)
        for row, words in enumerate(rows["tokens"]):
            text = words or [""]
            ids = tokenizer(text, is_split_into_words=True, truncation=True, max_length=limit)
            assert made["input_ids"][row] == ids["input_ids"]
            sizes = [len(word.encode()) for word in words]
            owners = [n for n, size in enumerate(sizes) for _ in range(size)]
            room = limit - 1  # beside </s>
            is_left = tokenizer.truncation_side == "left"
            owners = owners[max(len(owners) - room, 0) :] if is_left else owners[:room]
            before = [None, *owners[:-1]]
            tags = rows["ner_tags"][row]
            labels = [tags[n] if n != b else -100 for n, b in zip(owners, before, strict=False)]
            assert made["labels"][row] == [*labels, -100]


@pytest.mark.parametrize("side", ["right", "left"])
def test_fast_and_slow_agree(side, tmp_path):
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    fast = piece_tokenizer(truncation_side=side)
    vocabulary = sorted(fast.get_vocab(), key=fast.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    slow = legacy.BertTokenizerLegacy(str(tmp_path / "vocab.txt"), truncation_side=side)
    for seed in range(10):
        rows = sentences(5, seed)
        ours, theirs = (tag_words(t, max_length=5 + seed).make(rows, str) for t in (slow, fast))
        assert {**theirs.columns, **ours.columns} == theirs.columns  # the slow one has no types
        assert ours.counts == theirs.counts


def test_words_that_are_cut_off_are_reported_also_from_a_cache(caplog):
    data = {"train": dataset(30, 1), "validation": dataset(20, 2)}
    tokenizer = piece_tokenizer()
    lines = []
    for _ in range(2):
        caplog.clear()
        loaders = prepare_dataloaders(
            data,
            tokenizer,
            model=tiny_bert(6, BertForTokenClassification, vocab_size=32),
            preprocess=tag_words(tokenizer, max_length=8),
        )
        lines.append([line for line in messages(caplog) if "cut off" in line])
    assert lines[0] == lines[1]
    for line, (split, rows) in zip(lines[0], data.items(), strict=True):
        counts = tag_words(tokenizer, max_length=8).make(rows[:], str).counts
        total = counts["words"]
        for name, number in (("cut", counts["cut"]), ("dropped", counts["dropped"])):
            assert f": {round(100 * number / total)}% ({number} of {total})" in line, name
        assert line.startswith(f"{split}: words are cut off at 8 tokens: ")
        assert line.endswith("; they are neither trained nor scored")
    assert {*loaders["train"].dataset.column_names} == {
        *("input_ids", "token_type_ids", "attention_mask", "labels")
    }


def strings(rows: Dataset) -> Dataset:
    names = [[TAGS[tag] for tag in row] for row in rows["ner_tags"]]
    return Dataset.from_dict({"tokens": rows["tokens"][:], "ner_tags": names})


def other_order(rows: Dataset) -> Dataset:
    order = [*reversed(TAGS)]
    tags = [[order.index(TAGS[tag]) for tag in row] for row in rows["ner_tags"]]
    features = Features(
        {"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=order))}
    )
    return Dataset.from_dict({"tokens": rows["tokens"][:], "ner_tags": tags}, features=features)


def named_model(names: list[str]) -> Any:
    return tiny_bert(
        len(names),
        BertForTokenClassification,
        vocab_size=32,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )


@pytest.mark.parametrize("has_names", [False, True])
@pytest.mark.parametrize("label_all", [False, True])
@pytest.mark.parametrize("form", [dataset, strings, other_order], ids=lambda it: it.__name__)
def test_a_number_means_the_same_tag_in_all_splits_and_the_model(form, label_all, has_names):
    train, dev = dataset(20, 1), dataset(20, 2)
    tokenizer = piece_tokenizer()
    own = ["I-LOC", "B-MISC", "O", "I-PER", "B-LOC", "B-PER"]
    model = tiny_bert(6, BertForTokenClassification, vocab_size=32)
    if has_names:
        model = named_model(own)
    changed = dev if form is dataset else form(dev)
    loaders = prepare_dataloaders(
        {"train": strings(train) if form is strings else train, "dev": changed},
        tokenizer,
        model=model,
        preprocess=tag_words(tokenizer, label_all=label_all),
    )
    names = [model.config.id2label[n] for n in range(6)]
    assert names == (own if has_names else sorted(TAGS) if form is strings else TAGS)
    tokenized = tokenizer(dev["tokens"][:], truncation=True, is_split_into_words=True)
    expected = labels_of_run_ner(tokenized, dev["ner_tags"][:], label_all)
    found = [
        [names[label] for label in row.tolist() if label != -100]
        for batch in loaders["dev"]
        for row in batch["labels"]
    ]
    assert found == [[TAGS[label] for label in row if label != -100] for row in expected]


def test_the_metric_gets_tags_by_name_sentence_by_sentence():
    data = {"train": dataset(20, 1), "validation": dataset(30, 2)}
    tokenizer = piece_tokenizer()
    model = tiny_bert(6, BertForTokenClassification, vocab_size=32, initializer_range=1.0)
    loaders = prepare_dataloaders(
        data, tokenizer, model=model, preprocess=tag_words(tokenizer, max_length=12)
    )
    seen: list[Any] = []

    def keep(predictions, references):
        seen.append((predictions, references))
        return 0.0

    scores = evaluate_loop(model, loaders["validation"], ["seqeval", keep])
    rows = data["validation"]
    tokenized = tokenizer(
        rows["tokens"][:],
        truncation=True,
        max_length=12,
        is_split_into_words=True,
        padding=True,
        return_tensors="pt",
    )
    labels = labels_of_run_ner(tokenized, rows["ner_tags"][:], False)
    with torch.no_grad():
        predicted = model.eval()(**tokenized).logits.argmax(-1).tolist()
    right = [[TAGS[tag] for tag in row if tag != -100] for row in labels]
    found = [
        [TAGS[p] for p, tag in zip(*pair, strict=True) if tag != -100]
        for pair in zip(predicted, labels, strict=True)
    ]
    from seqeval.metrics import f1_score

    assert scores["overall_f1"] == pytest.approx(f1_score(right, found, zero_division=0))
    as_lists = [[[TAGS[tag] for tag in row] for row in side] for side in seen[0]]
    assert as_lists == [found, right]
    predictions = predict_loop(model, loaders["validation"])
    assert predictions.index.tolist() == list(range(30))


def test_names_reach_the_metric_though_several_columns_have_some():
    rows = dataset(12, 3)
    assert {"ner_tags", "pos_tags"} < set(rows.column_names)
    model = tiny_bert(6, BertForTokenClassification, vocab_size=32)
    tokenizer = piece_tokenizer()
    loader = prepare_dataloaders(
        {"validation": rows}, tokenizer, preprocess=tag_words(tokenizer, tags="pos_tags")
    )["validation"]
    assert evaluate_loop(model, loader, "seqeval").keys() >= {"overall_f1"}


def test_a_run_is_exact(tmp_path):
    data, tokenizer = {"train": dataset(22, 4), "validation": dataset(9, 5)}, piece_tokenizer()

    def run(folder, **options):
        torch.manual_seed(0)
        model = tiny_bert(
            6, BertForTokenClassification, vocab_size=32, hidden_dropout_prob=0.1
        ).double()
        loaders = prepare_dataloaders(
            data, tokenizer, model=model, preprocess=tag_words(tokenizer), batch_size=4
        )
        return train_loop(
            model,
            loaders["train"],
            prepare_optimizer(model, lr=1e-2),
            num_epochs=2,
            gradient_accumulation_steps=2,
            evaluate=partial(evaluate_loop, model, loaders["validation"], "seqeval"),
            best_metric="overall_f1",
            checkpoint_dir=folder,
            checkpoint_every=1,
            progress_bar=False,
            **options,
        )

    whole, _ = whole_and_resumed(run, tmp_path, dies_after=4)
    assert whole.history
    model = tiny_bert(6, BertForTokenClassification, vocab_size=32).double()
    loader = prepare_dataloaders(data, tokenizer, model=model, preprocess=tag_words(tokenizer))
    report = check_accumulation(model, next(iter(loader["train"])))
    assert report.is_exact
    assert report.unweighted_difference > 1e-3


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tokens": [["a"], ["b", "c"]], "ner_tags": [["O"], ["O"]]}, "2 words in 'tokens'"),
        (
            {"tokens": ["a b", "c"], "ner_tags": [["O", "O"], ["O"]]},
            "'tokens' in row 0 of the batch is 'a b'",
        ),
        ({"tokens": [["a", None]], "ner_tags": [["O", "O"]]}, "words that are None"),
        ({"tokens": [["a"]], "ner_tags": [["B-X"]]}, r"names=\['O', 'B-X'\]"),
    ],
)
def test_what_cannot_be_labelled_is_refused(columns, words):
    with pytest.raises(DataError, match=words):
        tag_words(piece_tokenizer(), names=["O"])(columns)


def test_streams_need_names_of_strings(caplog):
    tokenizer = piece_tokenizer()
    stream = strings(dataset(12, 3)).to_iterable_dataset()
    with pytest.raises(DataError, match=r"tag_words\(tokenizer, names="):
        prepare_dataloaders({"train": stream}, tokenizer, preprocess=tag_words(tokenizer))
    preprocess = tag_words(tokenizer, names=TAGS)
    loader = prepare_dataloaders({"train": stream}, tokenizer, preprocess=preprocess)["train"]
    found = [label for batch in loader for label in batch["labels"].flatten().tolist()]
    assert set(found) <= {-100, *range(6)}
    named = prepare_dataloaders(
        {"train": stream},
        tokenizer,
        model=named_model([*reversed(TAGS)]),
        preprocess=tag_words(tokenizer),
    )["train"]
    as_ours = [
        5 - n if n >= 0 else n for batch in named for n in batch["labels"].flatten().tolist()
    ]
    assert as_ours == found


def test_label_all_needs_the_names_of_numbers():
    rows = {"tokens": [["fed"]], "ner_tags": [[1]]}
    with pytest.raises(DataError, match="label_all=True needs the names"):
        tag_words(piece_tokenizer(), label_all=True)(rows)


def test_a_split_without_tags_is_predicted():
    tokenizer = piece_tokenizer()
    model = tiny_bert(6, BertForTokenClassification, vocab_size=32)
    data = {"train": dataset(8, 1), "test": dataset(8, 2).remove_columns("ner_tags")}
    loaders = prepare_dataloaders(data, tokenizer, model=model, preprocess=tag_words(tokenizer))
    assert "labels" not in next(iter(loaders["test"]))
    assert len(predict_loop(model, loaders["test"])) == 8
    assert np.isfinite(evaluate_loop(model, loaders["train"])["loss"])


def test_it_can_be_sent_to_other_processes():
    function = pickle.loads(pickle.dumps(tag_words(piece_tokenizer(), names=TAGS)))
    assert function(sentences(3)) == tag_words(piece_tokenizer(), names=TAGS)(sentences(3))
    assert repr(function).startswith("TagWords(words='tokens'")


def test_a_report_names_the_classes():
    tokenizer = piece_tokenizer()
    loaders = prepare_dataloaders(
        {"train": dataset(8, 1)}, tokenizer, preprocess=tag_words(tokenizer)
    )
    assert list(inspect_batch(loaders["train"], tokenizer).classes) == TAGS


def test_a_model_with_too_few_classes_is_refused():
    tokenizer = piece_tokenizer()
    model = tiny_bert(2, BertForTokenClassification, vocab_size=32)
    for rows in (dataset(8, 1), strings(dataset(8, 1))):
        with pytest.raises((DataError, ConfigError), match="num_labels=6"):
            prepare_dataloaders(
                {"train": rows}, tokenizer, model=model, preprocess=tag_words(tokenizer)
            )


def test_predictions_of_rows_without_tags_hold_no_padding():
    rows, tokenizer = dataset(8), piece_tokenizer()
    untagged = rows.remove_columns("ner_tags")
    lengths = [len(ids) for ids in tokenizer(rows["tokens"][:], is_split_into_words=True).input_ids]
    for size in (1, 8):
        model = tiny_bert(6, BertForTokenClassification, vocab_size=32)
        options = {"preprocess": tag_words(tokenizer), "eval_batch_size": size}
        data = {"train": rows, "test": untagged}
        loaders = prepare_dataloaders(data, tokenizer, model=model, **options)
        table = predict_loop(model, loaders["test"])
        assert [len(table[row]["prediction"]) for row in range(8)] == lengths


SCHEMES = {
    "IOB2": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "BIOES": ["O", "B-PER", "I-PER", "E-PER", "S-PER", "B-LOC", "I-LOC", "E-LOC", "S-LOC"],
    "BILOU": ["O", "B-PER", "I-PER", "L-PER", "U-PER", "B-LOC", "I-LOC", "L-LOC", "U-LOC"],
}


def spans_as(scheme, kinds):
    """The tags of words, of which a run of words of one kind is a span."""
    single, last = {"IOB2": "BI", "BIOES": "SE", "BILOU": "UL"}[scheme]
    tags = []
    for kind, length in kinds:
        letters = single if length == 1 else f"B{'I' * (length - 2)}{last}"
        tags += [f"{letter}-{kind}" if kind else "O" for letter in letters]
    return tags


@pytest.mark.parametrize("form", ["A-b", "b-A", "A_b"])
@pytest.mark.parametrize("scheme", [*SCHEMES])
def test_spans_stay_spans_with_labels_of_all_tokens(scheme, form):
    """Each span of words is one of tokens, with the same letters as if each token were a word."""

    def written(tag):
        letter, _, kind = tag.partition("-")
        return (
            {"A-b": tag, "A_b": f"{letter}_{kind}", "b-A": f"{kind}-{letter}"}[form]
            if kind
            else tag
        )

    names = [*map(written, SCHEMES[scheme])]
    tokenizer, rng = piece_tokenizer(), random.Random(0)
    for _ in range(40):
        kinds = [(rng.choice(["PER", "LOC", ""]), rng.randint(1, 3)) for _ in range(4)]
        kinds = [(kind, length if kind else 1) for kind, length in kinds]
        words = [rng.choice(["ab", "abcdef", "fed", "a"]) for _ in range(sum(n for _, n in kinds))]
        tags = [names.index(written(tag)) for tag in spans_as(scheme, kinds)]
        made = tag_words(tokenizer, label_all=True, names=names)(
            {"tokens": [words], "ner_tags": [tags]}
        )
        sizes = [len(tokenizer.tokenize(word)) for word in words]
        of_tokens, start = [], 0
        for kind, length in kinds:
            of_tokens.append((kind, sum(sizes[start : start + length])))
            start += length
        expected = [
            tag
            for kind, length in of_tokens
            for tag in (spans_as(scheme, [(kind, length)]) if kind else ["O"] * length)
        ]
        found = [names[label] for label in made["labels"][0] if label != -100]
        assert found == [*map(written, expected)]


def test_a_tag_that_a_span_of_tokens_needs_is_missed():
    rows = {"tokens": [["abcdef"]], "ner_tags": [[3]]}
    names = ["O", "B-A", "I-A", "S-A"]
    with pytest.raises(DataError, match="whose tag is 'S-A' becomes B-A, I-A, E-A") as error:
        tag_words(piece_tokenizer(), label_all=True, names=names)(rows)
    (more,) = re.findall(r"names=(\[.*\])\)\.$", str(error.value))
    made = tag_words(piece_tokenizer(), label_all=True, names=eval(more))(rows)
    assert made["labels"][0][1:-1] == [1, 2, 4]
    for other in (["O", "S-A"], ["E_mail", "S-curve", "x", "S-A"]):  # no scheme of spans
        made = tag_words(piece_tokenizer(), label_all=True, names=other)(
            {**rows, "ner_tags": [[len(other) - 1]]}
        )
        assert made["labels"][0][1:-1] == [len(other) - 1] * 3


@pytest.mark.parametrize("tag", [1.7, float("nan"), float("inf"), [1]])
def test_tags_that_are_no_whole_numbers_are_refused(tag):
    rows = {"tokens": [["ab"], ["ab"]], "ner_tags": [[1.0], [tag]]}
    with pytest.raises(DataError, match=r"in 'ner_tags' of row 1 of the batch is no whole"):
        tag_words(piece_tokenizer())(rows)
    rows["ner_tags"][1] = [2.0]
    assert tag_words(piece_tokenizer())(rows)["labels"] == [[-100, 1, -100], [-100, 2, -100]]


@pytest.mark.parametrize("tag", ["", None, -1])
def test_hidden_tags_are_left_out(tag):
    tokenizer, rows = piece_tokenizer(), strings(dataset(8))
    if tag == -1:
        rows = dataset(8)
    hidden = rows.remove_columns("ner_tags").add_column(
        "ner_tags", [[tag] * len(row) for row in rows["tokens"]]
    )
    model = tiny_bert(6, BertForTokenClassification, vocab_size=32)
    loaders = prepare_dataloaders(
        {"train": rows, "test": hidden}, tokenizer, model=model, preprocess=tag_words(tokenizer)
    )
    assert "labels" not in next(iter(loaders["test"]))


def test_names_that_were_given_are_those_of_the_numbers():
    tokenizer, rows = piece_tokenizer(), strings(dataset(8))
    given = [*reversed(TAGS)]
    model = tiny_bert(6, BertForTokenClassification, vocab_size=32)
    loader = prepare_dataloaders(
        {"train": rows}, tokenizer, model=model, preprocess=tag_words(tokenizer, names=given)
    )["train"]
    assert [*model.config.id2label.values()] == given
    first = next(iter(loader))["labels"]
    plain = prepare_dataloaders({"train": dataset(8)}, tokenizer, preprocess=tag_words(tokenizer))[
        "train"
    ]
    expected = next(iter(plain))["labels"]
    assert torch.equal(first, torch.where(expected < 0, expected, 5 - expected))
    model = named_model(TAGS)
    with pytest.raises(ConfigError, match="Leave names out of preprocess"):
        prepare_dataloaders(
            {"train": rows}, tokenizer, model=model, preprocess=tag_words(tokenizer, names=given)
        )


@pytest.mark.parametrize("is_stream", [False, True])
def test_kept_tags_are_those_of_the_dataset(is_stream):
    order = [*reversed(TAGS)]
    tags = Sequence(ClassLabel(names=order))
    features = Features({"tokens": Sequence(Value("string")), "ner_tags": tags})
    other = Dataset.from_dict(sentences(8, 1), features=features)
    rows = other.to_iterable_dataset() if is_stream else other
    tokenizer = piece_tokenizer()
    for data in (rows, strings(other)):
        loader = prepare_dataloaders(
            {"train": dataset(8), "dev": data}, tokenizer, preprocess=tag_words(tokenizer),
            keep="ner_tags", eval_batch_size=8,
        )["dev"]  # fmt: skip
        (batch,) = loader
        assert list(batch["ner_tags"]) == [row["ner_tags"] for row in data]
