"""Windows and answers: as run_qa.py and utils_qa.py of transformers make them, written out."""

from __future__ import annotations

import collections
import pickle
import random
from functools import partial
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import (
    fixes_in,
    messages,
    piece_tokenizer,
    questions,
    run_fix,
    tiny_bert,
    whole_and_resumed,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForQuestionAnswering, ByT5Tokenizer, PreTrainedTokenizerFast

from manualloop import (
    ConfigError,
    DataError,
    MetricError,
    ModelError,
    check_accumulation,
    evaluate_loop,
    load_metric,
    predict_loop,
    prepare_dataloaders,
    prepare_optimizer,
    train_loop,
)
from manualloop.tasks import answer_windows, best_spans, span_logits, squad
from manualloop.tasks.made import place_in_batch

KEEP = ("id", "context", "offset_mapping")


# run_qa.py ----------------------------------------------------------------------------------------


def windows_of_run_qa(
    tokenizer: Any, rows: Any, max_length: int, stride: int, pad: bool = False
) -> Any:
    """prepare_train_features, with an end to its search at the end of the context.

    As it stands, an answer that starts in the last token of the context is put at the end of the
    row, because the special tokens and the question after it have offsets that are as small.
    """
    pad_on_right = tokenizer.padding_side == "right"
    asked = [q.lstrip() for q in rows["question"]]
    made = tokenizer(
        asked if pad_on_right else rows["context"],
        rows["context"] if pad_on_right else asked,
        truncation="only_second" if pad_on_right else "only_first",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length" if pad else False,
    )
    context_index = 1 if pad_on_right else 0
    start_positions, end_positions = [], []
    for i, offsets in enumerate(made["offset_mapping"]):
        input_ids = made["input_ids"][i]
        cls_index = input_ids.index(tokenizer.cls_token_id)
        sequence_ids = made.sequence_ids(i)
        answers = rows["answers"][made["overflow_to_sample_mapping"][i]]
        if len(answers["answer_start"]) == 0:
            start_positions.append(cls_index)
            end_positions.append(cls_index)
            continue
        start_char = answers["answer_start"][0]
        end_char = start_char + len(answers["text"][0])
        token_start_index = 0
        while sequence_ids[token_start_index] != context_index:
            token_start_index += 1
        token_end_index = len(input_ids) - 1
        while sequence_ids[token_end_index] != context_index:
            token_end_index -= 1
        last = token_end_index
        if not (
            offsets[token_start_index][0] <= start_char and offsets[token_end_index][1] >= end_char
        ):
            start_positions.append(cls_index)
            end_positions.append(cls_index)
            continue
        while token_start_index <= last and offsets[token_start_index][0] <= start_char:
            token_start_index += 1
        start_positions.append(token_start_index - 1)
        while offsets[token_end_index][1] >= end_char and token_end_index >= 0:
            token_end_index -= 1
        end_positions.append(token_end_index + 1)
    return made, start_positions, end_positions


def answers_of_utils_qa(
    examples: Any,
    features: Any,
    predictions: Any,
    version_2: bool,
    n_best_size: int,
    max_answer_length: int,
    threshold: float,
) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """postprocess_qa_predictions, without what it writes to files."""
    all_start_logits, all_end_logits = predictions
    features_per_example = collections.defaultdict(list)
    for i, feature in enumerate(features):
        features_per_example[feature["example_id"]].append(i)
    all_predictions, all_nbest = {}, {}
    for example_id, context in zip(examples["id"], examples["context"], strict=True):
        min_null_prediction = None
        prelim_predictions = []
        for feature_index in features_per_example[example_id]:
            start_logits = all_start_logits[feature_index]
            end_logits = all_end_logits[feature_index]
            offset_mapping = features[feature_index]["offset_mapping"]
            null = features[feature_index]["cls_index"]  # 0 in the script
            feature_null_score = start_logits[null] + end_logits[null]
            if min_null_prediction is None or min_null_prediction["score"] > feature_null_score:
                min_null_prediction = {
                    "offsets": (0, 0),
                    "score": feature_null_score,
                    "start_logit": start_logits[null],
                    "end_logit": end_logits[null],
                }
            start_indexes = np.argsort(start_logits)[-1 : -n_best_size - 1 : -1].tolist()
            end_indexes = np.argsort(end_logits)[-1 : -n_best_size - 1 : -1].tolist()
            for start_index in start_indexes:
                for end_index in end_indexes:
                    if (
                        start_index >= len(offset_mapping)
                        or end_index >= len(offset_mapping)
                        or offset_mapping[start_index] is None
                        or len(offset_mapping[start_index]) < 2
                        or offset_mapping[end_index] is None
                        or len(offset_mapping[end_index]) < 2
                    ):
                        continue
                    if end_index < start_index or end_index - start_index + 1 > max_answer_length:
                        continue
                    prelim_predictions.append(
                        {
                            "offsets": (
                                offset_mapping[start_index][0],
                                offset_mapping[end_index][1],
                            ),
                            "score": start_logits[start_index] + end_logits[end_index],
                            "start_logit": start_logits[start_index],
                            "end_logit": end_logits[end_index],
                        }
                    )
        if version_2 and min_null_prediction is not None:
            prelim_predictions.append(min_null_prediction)
            null_score = min_null_prediction["score"]
        found = sorted(prelim_predictions, key=lambda x: x["score"], reverse=True)[:n_best_size]
        if version_2 and not any(p["offsets"] == (0, 0) for p in found):
            found.append(min_null_prediction)
        for pred in found:
            offsets = pred.pop("offsets")
            pred["text"] = context[offsets[0] : offsets[1]]
        if len(found) == 0 or (len(found) == 1 and found[0]["text"] == ""):
            found.insert(0, {"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "score": 0.0})
        all_nbest[example_id] = found
        if not version_2:
            all_predictions[example_id] = found[0]["text"]
            continue
        i = 0
        while found[i]["text"] == "":
            i += 1
        best = found[i]
        score_diff = null_score - best["start_logit"] - best["end_logit"]
        all_predictions[example_id] = "" if score_diff > threshold else best["text"]
    return all_predictions, all_nbest


# Windows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_windows_and_positions_are_those_of_run_qa(side):
    tokenizer = piece_tokenizer(padding_side=side)
    num_windows = 0
    for seed in range(60):
        rng = random.Random(seed)
        rows = questions(6, seed)
        stride = rng.randint(0, 6)
        max_length = rng.randint(24 + stride, 60)
        pad = seed % 2 == 0
        made = answer_windows(tokenizer, max_length, stride, pad=pad)(rows)
        expected, starts, ends = windows_of_run_qa(tokenizer, rows, max_length, stride, pad)
        assert all(made[name] == expected[name] for name in expected if name != "offset_mapping")
        assert (made["start_positions"], made["end_positions"]) == (starts, ends)
        context = 1 if side == "right" else 0
        for number, own in enumerate(made["offset_mapping"]):
            sides, theirs = expected.sequence_ids(number), expected["offset_mapping"][number]
            mask, ids = expected["attention_mask"][number], expected["input_ids"][number]
            inside = [
                found if s == context else None
                for s, found, is_token in zip(sides, theirs, mask, strict=True)
                if is_token
            ]
            null = [i for i, is_token in zip(ids, mask, strict=True) if is_token].index(
                tokenizer.cls_token_id
            )
            assert own[null] == []
            assert [tuple(o) if o else None for o in own] == inside
        num_windows += len(starts)
    assert num_windows > 600


def test_the_script_of_transformers_misplaces_an_answer_in_the_last_token():
    rows = {
        "question": ["ab"],
        "context": ["a b c"],
        "answers": [{"text": ["c"], "answer_start": [4]}],
    }
    made = answer_windows(piece_tokenizer(), 32, 4)(rows)
    assert made["input_ids"][0][made["start_positions"][0]] == piece_tokenizer().vocab["c"]
    assert made["start_positions"] == made["end_positions"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_tokens_of_an_answer_hold_its_characters(side):
    tokenizer = piece_tokenizer(padding_side=side)
    for seed in range(20):
        rows = questions(6, seed, none=0.1)
        function = answer_windows(tokenizer, 32, 5, pad=False)
        made, counts = function(rows), function.make(rows, str).counts
        found: dict[int, int] = {}
        for number, row in enumerate(made["overflow_to_sample_mapping"]):
            offsets = made["offset_mapping"][number]
            first = offsets[made["start_positions"][number]]
            last = offsets[made["end_positions"][number]]
            answer = rows["answers"][row]
            if not first:
                assert first == last == []
                continue
            found[row] = number
            text = rows["context"][row][first[0] : last[1]]
            assert text == answer["text"][0]
            assert first[0] == answer["answer_start"][0]
        has_answer = {n for n, answer in enumerate(rows["answers"]) if answer["text"]}
        assert counts["cut"] == len(has_answer - found.keys())


def test_what_became_of_rows_and_answers_is_reported(caplog):
    rows = questions(20, 3, none=0.0)
    rows["answers"][4]["answer_start"] = [1, 1]
    tokenizer = piece_tokenizer()
    data = {"train": Dataset.from_dict(rows), "validation": Dataset.from_dict(questions(5, 4))}
    loaders = prepare_dataloaders(
        data, tokenizer, preprocess=answer_windows(tokenizer, 24, 2), keep=KEEP
    )
    lines = [line for line in messages(caplog) if "windows of at most 24 tokens" in line]
    for line, number, (name, loader) in zip(lines, (20, 5), loaders.items(), strict=True):
        assert line.startswith(f"{name}: {number} rows became {len(loader.dataset)} windows")
    assert "answers that are not the text at their answer_start: 5.0% (1 of 20)" in lines[0]


def test_answers_in_no_window_are_reported(caplog):
    text = " ".join(["abcdef"] * 8)
    rows = {
        "question": ["ab", "ab"],
        "context": [text, text],
        "answers": [{"text": [text], "answer_start": [0]}, {"text": ["ab"], "answer_start": [0]}],
    }
    tokenizer = piece_tokenizer()
    prepare_dataloaders(
        Dataset.from_dict(rows), tokenizer, preprocess=answer_windows(tokenizer, 16, 4)
    )
    (line,) = [line for line in messages(caplog) if "windows of at most" in line]
    assert line.endswith("; answers that are in no window, and count as none: 50% (1 of 2)")


def test_kept_columns_follow_the_windows():
    rows = Dataset.from_dict(questions(12, 5))
    tokenizer = piece_tokenizer()
    for data in (rows, rows.to_iterable_dataset()):
        loader = prepare_dataloaders(
            {"validation": data}, tokenizer, preprocess=answer_windows(tokenizer, 30, 4), keep=KEEP
        )["validation"]
        contexts = dict(zip(rows["id"], rows["context"], strict=True))
        num_windows = 0
        for batch in loader:
            for name, context, offsets, ids in zip(
                *(batch[key] for key in KEEP), batch["input_ids"], strict=True
            ):
                assert contexts[name] == context
                assert len(offsets) == int((ids != 0).sum())
                num_windows += 1
        assert num_windows > len(rows)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_question_without_room_for_its_context_is_refused(side):
    rows = {
        "question": ["ab", "fed fed fed fed"],
        "context": ["abcdef " * 9] * 2,
        "answers": [{"text": [], "answer_start": []}] * 2,
    }
    tokenizer = piece_tokenizer(padding_side=side)
    for stride in (0, 2):
        with pytest.raises(DataError, match=r"question of 12 tokens.*'fed fed fed fed'"):
            answer_windows(tokenizer, 14 + stride, stride)(rows)
    made = answer_windows(tokenizer, 18, 2)(rows)
    assert len(made["input_ids"]) > 2


def test_slow_tokenizers_and_other_answers_are_refused():
    with pytest.raises(ConfigError, match="use_fast=True"):
        answer_windows(ByT5Tokenizer())
    rows = {"question": ["a"], "context": ["a b"], "answers": ["b"]}
    with pytest.raises(DataError, match="'answers' in row 0 of the batch is 'b'"):
        answer_windows(piece_tokenizer(), stride=4)(rows)
    with pytest.raises(DataError, match=r"Pass a larger max_length or a smaller stride\.$"):
        answer_windows(piece_tokenizer(), stride=128)(rows)


@pytest.mark.parametrize("is_table", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_of_a_batch_are_those_of_the_answers(side, is_table):
    """Padding on the left moves them; the collators of transformers leave them as they are."""
    tokenizer = piece_tokenizer(padding_side=side)
    if not is_table:
        tokenizer = type("OwnPad", (type(tokenizer),), {"pad": type(tokenizer).pad})(
            tokenizer_object=tokenizer.backend_tokenizer,
            padding_side=side,
            model_max_length=64,
            **tokenizer.special_tokens_map,
        )
    rows = questions(20, 6)
    preprocess = answer_windows(tokenizer, 40, 6, pad=False)
    made = preprocess(rows)
    loader = prepare_dataloaders(
        {"dev": Dataset.from_dict(rows)}, tokenizer, preprocess=preprocess, batch_size=5
    )["dev"]
    number = 0
    for batch in loader:
        for row, ids in enumerate(batch["input_ids"].tolist()):
            own = made["input_ids"][number]
            for name in ("start_positions", "end_positions"):
                place, start = int(batch[name][row]), made[name][number]
                assert ids[place:][: len(own) - start] == own[start:]
            number += 1
    assert number == len(made["input_ids"])


# Spans --------------------------------------------------------------------------------------------


def random_logits(made: Any, rng: np.random.Generator, kind: int) -> list[Any]:
    """Logits of each window: of any size, with ties, or with one clear answer."""
    found = []
    for ids in made["input_ids"]:
        pair = rng.normal(size=(2, len(ids))).astype(np.float32) * 3
        if kind == 1:
            pair = np.round(pair)
        if kind == 2:
            pair[:, rng.integers(len(ids))] += 20
        found.append((pair[0], pair[1]))
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("threshold", [None, 0.0, -1.5, 2.0])
def test_answers_are_those_of_utils_qa(threshold, side):
    tokenizer = piece_tokenizer(padding_side=side)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = questions(5, seed)
        stride = int(rng.integers(0, 6))
        length = int(rng.integers(26 + stride, 60))
        preprocess = answer_windows(tokenizer, length, stride, pad=False)
        made = preprocess(rows)
        origin = made["overflow_to_sample_mapping"]
        logits = random_logits(made, rng, seed % 3)
        options = {
            "n_best": int(rng.integers(2, 25)),
            "max_answer_length": int(rng.integers(1, 12)),
            "null_threshold": threshold,
        }
        features = [
            {
                "example_id": rows["id"][row],
                "offset_mapping": offsets,
                "cls_index": offsets.index([]),
            }
            for row, offsets in zip(origin, made["offset_mapping"], strict=True)
        ]
        expected, n_best = answers_of_utils_qa(
            rows,
            features,
            tuple(zip(*logits, strict=True)),
            threshold is not None,
            options["n_best"],
            options["max_answer_length"],
            threshold or 0.0,
        )
        kept = {
            "id": [rows["id"][row] for row in origin],
            "context": [rows["context"][row] for row in origin],
            "offset_mapping": made["offset_mapping"],
        }
        found = best_spans(logits, kept, **options)
        for name, answer in expected.items():
            # What the script calls "empty" has no span at all.
            assert found[name][0]["text"] == ("" if answer == "empty" else answer)
            theirs = [(e["text"], float(e["score"])) for e in n_best[name] if e["text"] != "empty"]
            ours = [(entry["text"], entry["score"]) for entry in found[name]]
            if threshold is not None:  # the one of no answer takes the place of another
                assert {*theirs} <= {*ours}
            elif theirs:
                assert ours == theirs
            for entry in found[name]:
                text = rows["context"][rows["id"].index(name)]
                if entry["start"] >= 0:
                    assert text[entry["start"] :].startswith(entry["text"])


def qa_model(**config: Any) -> Any:
    options = {"initializer_range": 0.5, "hidden_dropout_prob": 0.0, **config}
    return tiny_bert(kind=BertForQuestionAnswering, vocab_size=32, **options)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("threshold", [None, 0.0])
def test_the_call_site_scores_as_the_scripts_do(threshold, side):
    """Batches of several widths, whose padding neither side of the comparison may see."""
    tokenizer = piece_tokenizer(padding_side=side)
    rows = questions(14, 8, none=0.0 if threshold is None else 0.4)
    data = {"validation": Dataset.from_dict(rows)}
    model = qa_model().eval()
    scores, spans = [], []
    for batch_size in (1, 5):
        loaders = prepare_dataloaders(
            data,
            tokenizer,
            model=model,
            preprocess=answer_windows(tokenizer, max_length=32, stride=6),
            keep=KEEP,
            batch_size=batch_size,
        )
        metric = squad(data["validation"], null_threshold=threshold)
        evaluate = partial(evaluate_loop, model, loaders["validation"], metric, decode=span_logits)
        scores.append(evaluate())
        table = predict_loop(model, loaders["validation"], decode=span_logits)
        spans.append(best_spans(table.predictions, table.kept, null_threshold=threshold))
    losses = [found.pop("loss") for found in scores]
    assert scores[0] == scores[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # of padding that is always the same

    made, _, _ = windows_of_run_qa(tokenizer, rows, 32, 6, pad=True)
    starts, ends, features = [], [], []
    for number in range(len(made["input_ids"])):
        inputs = {
            name: torch.tensor([made[name][number]])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        with torch.no_grad():
            outputs = model(**inputs)
        kept = inputs["attention_mask"][0].bool()
        starts.append(outputs.start_logits[0][kept].numpy())
        ends.append(outputs.end_logits[0][kept].numpy())
        sides = made.sequence_ids(number)
        context = 1 if side == "right" else 0
        offsets = [
            found if own == context else None
            for own, found, is_token in zip(
                sides, made["offset_mapping"][number], kept.tolist(), strict=True
            )
            if is_token
        ]
        ids = inputs["input_ids"][0][kept].tolist()
        row = made["overflow_to_sample_mapping"][number]
        cls_index = ids.index(tokenizer.cls_token_id)
        features.append(
            {"example_id": rows["id"][row], "offset_mapping": offsets, "cls_index": cls_index}
        )
    expected, _ = answers_of_utils_qa(
        rows, features, (starts, ends), threshold is not None, 20, 30, threshold or 0.0
    )
    assert {name: found[0]["text"] for name, found in spans[0].items()} == expected
    name = "squad" if threshold is None else "squad_v2"
    metric = load_metric(name)
    metric.add_batch(
        predictions=[
            {"id": key, "prediction_text": text, "no_answer_probability": 0.0}
            for key, text in expected.items()
        ],
        references=[
            {"id": key, "answers": answers}
            for key, answers in zip(rows["id"], rows["answers"], strict=True)
        ],
    )
    assert scores[0] == dict(metric.compute())
    assert ("exact_match" if threshold is None else "HasAns_exact") in scores[0]


def test_a_run_is_exact(tmp_path):
    tokenizer = piece_tokenizer()
    data = {
        "train": Dataset.from_dict(questions(8, 9, none=0.0)),
        "validation": Dataset.from_dict(questions(5, 10, none=0.0)),
    }

    def run(folder, **options):
        torch.manual_seed(0)
        model = qa_model(hidden_dropout_prob=0.1).double()
        loaders = prepare_dataloaders(
            data,
            tokenizer,
            model=model,
            preprocess=answer_windows(tokenizer, 32, 6),
            keep=KEEP,
            batch_size=4,
        )
        metric = squad(data["validation"])
        return train_loop(
            model,
            loaders["train"],
            prepare_optimizer(model, lr=1e-2),
            num_epochs=2,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            evaluate=partial(
                evaluate_loop, model, loaders["validation"], metric, decode=span_logits
            ),
            best_metric="f1",
            checkpoint_dir=folder,
            checkpoint_every=1,
            progress_bar=False,
            **options,
        )

    whole, _ = whole_and_resumed(run, tmp_path, dies_after=3)
    assert {"exact_match", "f1"} <= whole.metrics.keys()
    model = qa_model().double()
    loader = prepare_dataloaders(
        data, tokenizer, model=model, preprocess=answer_windows(tokenizer, 32, 6), keep=KEEP
    )["train"]
    report = check_accumulation(model, next(iter(loader)))
    assert report.is_exact


def test_intervals_are_over_questions_and_not_over_windows():
    rows = questions(12, 12, none=0.0)
    data = {"dev": Dataset.from_dict(rows)}
    tokenizer, model = piece_tokenizer(), qa_model()
    preprocess = answer_windows(tokenizer, 32, 6)
    loader = prepare_dataloaders(
        data, tokenizer, model=model, preprocess=preprocess, keep=KEEP, batch_size=16
    )["dev"]
    metric = squad(data["dev"])
    scores = evaluate_loop(model, loader, metric, decode=span_logits, confidence=0.9)
    found = predict_loop(model, loader, decode=span_logits)
    assert len(found) > 24
    answers = best_spans(found.predictions, found.kept)
    values = []
    for name, right in zip(rows["id"], rows["answers"], strict=True):
        one = load_metric("squad").compute(
            predictions=[answers[name][0]["text"]], references=[right]
        )
        values.append(one["f1"])
    assert scores["f1"] == pytest.approx(np.mean(values))
    # The middle 90 % of the means of resampled questions, by draws of our own.
    draws = np.random.default_rng(0).choice(values, (20_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.05, 0.95])
    spread = np.std(values) / np.sqrt(len(values))
    assert scores["f1_low"] == pytest.approx(low, abs=0.1 * spread)
    assert scores["f1_high"] == pytest.approx(high, abs=0.1 * spread)


def test_mistakes_are_named():
    rows = questions(6, 11, none=0.0)
    data = Dataset.from_dict(rows)
    tokenizer, model = piece_tokenizer(), qa_model()
    preprocess = answer_windows(tokenizer, 32, 6)
    with pytest.raises(DataError, match=r"squad\(dataset, null_threshold=0.0\)"):
        squad(Dataset.from_dict(questions(6, 11, none=1.0)))
    with pytest.raises(DataError, match="needs the column 'id'"):
        squad(data.remove_columns("id"))
    with pytest.raises(DataError, match="Two rows of the dataset have the same 'id'"):
        squad(Dataset.from_dict({**rows, "id": ["a"] * 6}))
    options: dict[str, Any] = {"model": model, "preprocess": preprocess}
    loader = prepare_dataloaders({"dev": data}, tokenizer, keep=("id", "context"), **options)["dev"]
    with pytest.raises(MetricError, match=r"keep=\(\"id\", \"context\", \"offset_mapping\"\)"):
        evaluate_loop(model, loader, squad(data), decode=span_logits)
    loader = prepare_dataloaders({"dev": data}, tokenizer, keep=KEEP, **options)["dev"]
    for other in (data.select(range(3)), Dataset.from_dict(questions(9, 11, none=0.0))):
        with pytest.raises(MetricError, match="Pass the split that the loader was made of"):
            evaluate_loop(model, loader, squad(other), decode=span_logits)
    with pytest.raises(ModelError, match="AutoModelForQuestionAnswering"):
        span_logits({"logits": torch.zeros(1, 2)}, {})


def test_they_can_be_sent_to_other_processes():
    rows = questions(4, 1, none=0.0)
    preprocess = answer_windows(piece_tokenizer(), 32, 6, pad=False)
    assert pickle.loads(pickle.dumps(preprocess))(rows) == preprocess(rows)
    metric = squad(Dataset.from_dict(rows))
    made = preprocess(rows)
    origin = made["overflow_to_sample_mapping"]
    kept = {
        "id": [rows["id"][row] for row in origin],
        "context": [rows["context"][row] for row in origin],
        "offset_mapping": made["offset_mapping"],
    }
    logits = random_logits(made, np.random.default_rng(0), 0)
    scores = metric(logits, None, kept)
    assert pickle.loads(pickle.dumps(metric))(logits, None, kept) == scores


def test_a_character_of_several_tokens_is_covered_by_all_of_them():
    answered = {"question": ["x"], "answers": [{"text": ["年"], "answer_start": [2]}]}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = {name: number for number, name in enumerate(["<s>", "<pad>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(numbers, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made = answer_windows(tokenizer, 48, 4)(answered | {"context": ["a 年 b"]})
    start, end = made["start_positions"][0], made["end_positions"][0]
    offsets = made["offset_mapping"][0]
    assert end - start == 2  # three bytes
    assert (offsets[start][0], offsets[end][1]) == (2, 3)


ROW = {
    "id": "1",
    "question": "ab",
    "context": "cafe fed",
    "answers": {"text": ["fed"], "answer_start": [5]},
}


@pytest.mark.parametrize(
    "cell",
    [
        {"text": "fed", "answer_start": 5},
        [{"text": "fed", "answer_start": 5}],
        {"text": np.array(["fed"]), "answer_start": np.array([5])},
        {"text": ["fed"], "answer_start": [5.0]},
    ],
    ids=str,
)
def test_answers_in_other_forms(cell):
    tokenizer = piece_tokenizer()
    preprocess = answer_windows(tokenizer, 24, 4)
    expected = preprocess({name: [value] for name, value in ROW.items()})
    assert preprocess({**{n: [v] for n, v in ROW.items()}, "answers": [cell]}) == expected
    table = {"id": ["1"], "answers": [cell]}
    _, _, wanted = squad(table).by_unit(
        [(np.zeros(4), np.zeros(4))],
        {"id": ["1"], "context": ["fed"], "offset_mapping": [[[], None, [0, 3], None]]},
    )
    assert wanted == [{"id": "1", "answers": {"text": ["fed"]}}]


@pytest.mark.parametrize(
    "change",
    [
        {"question": None},
        {"context": None},
        {"question": 3},
        {"answers": {"text": ["fed"], "answer_start": [None]}},
        {"answers": {"text": ["fed"], "answer_start": [5.5]}},
        {"answers": {"text": ["fed"], "answer_start": [5, 6]}},
        {"answers": {"text": ["fed"]}},
        {"answers": {"text": [None], "answer_start": [5]}},
    ],
    ids=str,
)
def test_rows_that_are_no_questions_are_refused(change):
    rows = [ROW, {**ROW, **change}]
    columns = {name: [row[name] for row in rows] for name in ROW}
    with pytest.raises(DataError, match=r"(?i)row 1 of the batch"):
        answer_windows(piece_tokenizer(), 24, 4)(columns)


def test_a_line_that_makes_answers_of_texts_runs():
    data = Dataset.from_dict(
        {"question": ["ab"], "context": ["cafe fed"], "answers": ["x"], "answer": ["fed"]}
    )
    preprocess = answer_windows(piece_tokenizer(), 24, 4)
    with pytest.raises(DataError) as error:
        preprocess(data[:])
    (line,) = fixes_in(error.value)
    made = preprocess.make(run_fix(line, data)[:], place_in_batch).counts
    assert not made["cut"] + made["misplaced"]


@pytest.mark.parametrize(
    "options", [{"stride": -1}, {"stride": 24}, {"max_length": 0}, {"max_length": None}], ids=str
)
def test_impossible_windows_are_refused(options):
    with pytest.raises(ConfigError, match="windows share fewer than they have"):
        answer_windows(piece_tokenizer(), **{"max_length": 24, "stride": 4, **options})


def test_columns_that_are_not_there_are_named():
    rows = {"query": ["ab"], "context": ["cafe"]}
    with pytest.raises(ConfigError, match="no column 'question' among query, context"):
        answer_windows(piece_tokenizer(), 24, 4)(rows)


def test_a_training_split_without_answers_tells_which_column_is_missing(caplog):
    tokenizer = piece_tokenizer()
    data = Dataset.from_dict(questions(6, 1)).rename_column("answers", "solutions")
    options: dict[str, Any] = {"preprocess": answer_windows(tokenizer, 24, 4), "keep": KEEP}
    prepare_dataloaders({"train": data}, tokenizer, **options)
    assert "makes them of a column 'answers', which is not there" in caplog.text
    caplog.clear()
    loaders = prepare_dataloaders(
        {"train": data.rename_column("solutions", "answers")}, tokenizer, **options
    )
    assert "start_positions" in next(iter(loaders["train"]))
    assert "no labels" not in caplog.text


@pytest.mark.parametrize("form", [None, "torch", "numpy", "stream", "stream of torch"])
def test_squad_takes_a_split_in_any_form(form):
    data = Dataset.from_list([{**ROW, "id": number} for number in range(3)])
    tokenizer = piece_tokenizer()
    loader = prepare_dataloaders(
        {"dev": data}, tokenizer, model=qa_model(), preprocess=answer_windows(tokenizer, 24, 4),
        keep=KEEP,
    )["dev"]  # fmt: skip
    if form is not None and form.startswith("stream"):
        names = {"dataset": data.to_iterable_dataset(), "datasets": datasets, "squad": squad}
        with pytest.raises(DataError, match="the dataset is a stream") as error:
            squad(names["dataset"])
        metric = eval(str(error.value).partition("Read it: ")[2].rstrip("."), names)
    else:
        metric = squad(data.with_format(form))
    scores = evaluate_loop(qa_model(), loader, metric, decode=span_logits)
    assert scores == evaluate_loop(qa_model(), loader, squad(data), decode=span_logits)


def test_squad_of_several_splits_asks_for_one():
    data = datasets.DatasetDict({"dev": Dataset.from_list([ROW])})
    with pytest.raises(DataError, match=r'squad\(dataset\["dev"\]\)'):
        squad(data)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, "rows 1 and 2 have 'b', and are the same row"),
        ({"context": "fed bad"}, "parts of one document, leave it whole: answer_windows cuts it"),
        ({"context": "fed bad", "question": "who?"}, "rows 1 and 2 have 'b'. Number them anew"),
        ({"question": "who?"}, "rows 1 and 2 have 'b'. Number them anew"),
    ],
)
def test_what_rows_of_one_id_have_in_common_decides_what_is_advised(other, message):
    rows = [{**ROW, "id": name} for name in ("a", "b")]
    data = Dataset.from_list([*rows, {**rows[1], **other}])
    with pytest.raises(DataError, match=message) as error:
        squad(data)
    line = next(line for line in fixes_in(error.value) if line.startswith("dataset."))
    fixed = run_fix(line, data)
    squad(fixed)
    assert len(fixed) == (2 if not other else 3)


@pytest.mark.parametrize("contexts", [("ab cafe", "fed bad"), ("ab cafe", "ab cafe")])
def test_two_rows_of_one_id_are_no_question(contexts):
    logits = (np.zeros(4), np.zeros(4))
    kept = {
        "id": ["1", "1"],
        "context": contexts,
        "offset_mapping": [[[], None, [0, 2], [3, 7]]] * 2,
    }
    with pytest.raises(MetricError, match="Two rows have the id '1'") as error:
        best_spans([logits, logits], kept)
    (line,) = fixes_in(error.value)
    assert run_fix(line, Dataset.from_dict({"id": ["1", "1"]}))["id"][:] == ["0", "1"]
    kept["context"], kept["offset_mapping"] = (
        ("ab cafe", "ab cafe"),
        [
            [[], None, [0, 2], [3, 7]],
            [[], None, [3, 7], None],
        ],
    )
    best_spans([logits, logits], kept)


def with_run_qa(tokenizer, padding, max_length=40):
    """A preprocess as run_qa.py has it, with its own padding and its own offset_mapping."""

    def preprocess(rows):
        made, starts, ends = windows_of_run_qa(
            tokenizer, rows, max_length, 6, padding == "max_length"
        )
        if padding == "longest":
            side, pad = tokenizer.padding_side, {"input_ids": 0, "token_type_ids": 0}
            width = max(map(len, made["input_ids"]))
            for name in ("input_ids", "token_type_ids", "attention_mask", "offset_mapping"):
                for number, row in enumerate(made[name]):
                    more = [pad.get(name, 0) if name != "offset_mapping" else (0, 0)]
                    more = more * (width - len(row))
                    made[name][number] = [*row, *more] if side == "right" else [*more, *row]
                    if name == "input_ids" and side == "left":
                        starts[number] += len(more)
                        ends[number] += len(more)
        found = {name: list(made[name]) for name in made}
        context = 1 if tokenizer.padding_side == "right" else 0
        offsets = []
        for number, row in enumerate(made["offset_mapping"]):
            sides = made.sequence_ids(number)
            sides = sides + [None] * (len(row) - len(sides))
            if padding == "longest" and tokenizer.padding_side == "left":
                own = made.sequence_ids(number)
                sides = [None] * (len(row) - len(own)) + own
            offsets.append(
                [list(o) if s == context else None for o, s in zip(row, sides, strict=True)]
            )
        return {
            **found,
            "offset_mapping": offsets,
            "start_positions": starts,
            "end_positions": ends,
        }

    return preprocess


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", ["max_length", "longest", None])
def test_windows_of_ones_own_that_are_padded(side, padding):
    """Positions stay at the answers, and spans are those of windows without padding."""
    tokenizer, model = piece_tokenizer(padding_side=side), qa_model()
    data = Dataset.from_dict(questions(12, 6, none=0.0))
    loader = prepare_dataloaders(
        {"dev": data}, tokenizer, model=model, preprocess=with_run_qa(tokenizer, padding),
        keep=KEEP, batch_size=5, pad_to_multiple_of=7,
    )["dev"]  # fmt: skip
    assert any(0 in mask for batch in loader for mask in batch["attention_mask"])
    answers = dict(zip(data["id"], data["answers"], strict=True))
    num_found = 0
    for batch in loader:
        for row, ids in enumerate(batch["input_ids"]):
            start, end = (int(batch[name][row]) for name in ("start_positions", "end_positions"))
            if ids[start] == tokenizer.cls_token_id:
                continue
            wanted = answers[batch["id"][row]]["text"][0]
            expected = tokenizer(wanted, add_special_tokens=False)["input_ids"]
            assert ids[start : end + 1].tolist() == expected
            num_found += 1
    assert num_found > 5
    if side == "left" and padding is not None:
        return  # the positions of BERT, and so its logits, depend on the padding
    plain = prepare_dataloaders(
        {"dev": data}, tokenizer, model=model, keep=KEEP, batch_size=5, pad_to_multiple_of=7,
        preprocess=answer_windows(tokenizer, 40, 6, pad=False),
    )["dev"]  # fmt: skip
    spans = []
    for one in (loader, plain):
        table = predict_loop(model, one, decode=span_logits)
        found = best_spans(table.predictions, table.kept)
        spans.append({name: [best["text"] for best in list_] for name, list_ in found.items()})
    assert spans[0] == spans[1]


def test_offsets_of_the_question_are_refused():
    tokenizer = piece_tokenizer()

    def preprocess(rows):
        return tokenizer(rows["question"], rows["context"], return_offsets_mapping=True)

    data = Dataset.from_dict(questions(3, 1, none=0.0))
    loader = prepare_dataloaders({"dev": data}, tokenizer, preprocess=preprocess, keep=KEEP)["dev"]
    with pytest.raises(MetricError, match="also for those of the question"):
        evaluate_loop(qa_model(), loader, squad(data), decode=span_logits)


@pytest.mark.parametrize("is_table", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_beyond_a_row_stay_out_of_the_loss(side, is_table):
    """Beside padding they would be at a token of padding, which the model would learn."""
    tokenizer, model = piece_tokenizer(padding_side=side), qa_model().double().eval()
    rows = {
        "input_ids": [[2, 4, 5], [2, 4, 5, 6, 7, 8]],
        "attention_mask": [[1] * 3, [1] * 6],
        "start_positions": [3, 1],
        "end_positions": [4, 2],
    }
    if not is_table:
        rows["note"] = ["a", "b"]
    data = Dataset.from_dict(rows)
    (loader,) = prepare_dataloaders(
        {"dev": data}, tokenizer, model=model, keep=() if is_table else "note"
    ).values()
    (batch,) = loader
    assert batch["start_positions"].tolist() == [6, 1]
    assert batch["end_positions"].tolist() == [6, 2]
    inputs = {name: column for name, column in batch.items() if isinstance(column, torch.Tensor)}
    alone = {name: column[1:] for name, column in inputs.items()}
    with torch.no_grad():
        assert model(**inputs).loss == pytest.approx(float(model(**alone).loss), rel=1e-12)


def test_negative_positions_are_refused():
    model = qa_model()
    rows = {"input_ids": [[2, 4, 5]] * 3, "start_positions": [1, 1, -100], "end_positions": [1] * 3}
    data = Dataset.from_dict(rows)
    with pytest.raises(DataError, match="start_positions is -100 in row 2 of dev") as error:
        prepare_dataloaders({"dev": data}, piece_tokenizer(), model=model)
    (line,) = fixes_in(error.value)
    loader = prepare_dataloaders({"dev": run_fix(line, data)}, piece_tokenizer(), model=model)
    assert next(iter(loader["dev"]))["start_positions"].tolist() == [1, 1, 3]
    batch = {name: torch.tensor(column) for name, column in rows.items()}
    with pytest.raises(DataError, match="start_positions is -100 in"):
        train_loop(model, [batch], max_steps=1, progress_bar=False)


def test_answers_that_are_hidden_are_no_answers_of_none():
    rows, tokenizer = questions(9, 3, none=0.3), piece_tokenizer()
    known = Dataset.from_dict(rows)
    hidden = known.remove_columns("answers").add_column("answers", [None] * 9)
    some = [None if n % 4 == 1 else cell for n, cell in enumerate(rows["answers"])]
    mixed = Dataset.from_dict({**rows, "answers": some})
    options = {"model": qa_model(), "preprocess": answer_windows(tokenizer, 24, 4), "keep": KEEP}
    loader = prepare_dataloaders({"train": known, "test": hidden}, tokenizer, **options)["test"]
    assert "start_positions" not in next(iter(loader))
    assert len(predict_loop(qa_model(), loader, decode=span_logits)) == len(loader.dataset)
    with pytest.raises(DataError, match="has no answer that is known") as error:
        prepare_dataloaders({"dev": mixed}, tokenizer, **options)
    (line,) = fixes_in(error.value)
    loader = prepare_dataloaders(run_fix(line, {"dev": mixed}), tokenizer, **options)["dev"]
    assert "start_positions" in next(iter(loader))
