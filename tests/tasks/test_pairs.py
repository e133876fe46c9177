"""Preferences to pairs of rows."""

import pickle

import pytest
import torch
from chat_styles import tokenizer_for
from datasets import Dataset
from helpers import messages
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from manualloop import (
    ConfigError,
    DataError,
    check_accumulation,
    evaluate_loop,
    prepare_dataloaders,
    train_loop,
)
from manualloop.tasks import chat, complete, dpo, preference_pairs, reward

ASK = [{"role": "user", "content": "What is 2+2?"}]
GOOD = [{"role": "assistant", "content": "four."}]
BAD = [{"role": "assistant", "content": "It is three, I think."}]
TEXTS = {"prompt": ["2+2=", "the sun"], "chosen": ["4", " is ok"], "rejected": ["5, a b c", " no"]}
CHATS = {"prompt": [ASK, ASK], "chosen": [GOOD, BAD], "rejected": [BAD, GOOD]}


def tiny_llama(tokenizer, head=LlamaForCausalLM):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=1, num_labels=1, pad_token_id=0, **sizes
    )
    return head(config)


def test_texts_are_those_of_prompt_and_completion():
    tokenizer = tokenizer_for("zephyr")
    made = preference_pairs(tokenizer)(TEXTS)
    for side, name in enumerate(("chosen", "rejected")):
        alone = complete(tokenizer)({"prompt": TEXTS["prompt"], "completion": TEXTS[name]})
        for column in ("input_ids", "labels"):
            assert [row[side] for row in made[column]] == alone[column]


@pytest.mark.parametrize("form", ["prompt", "implicit", "text", "both"])
def test_messages_are_those_of_the_chats(form):
    tokenizer = tokenizer_for("zephyr")
    rows = {
        "prompt": CHATS,
        "implicit": {"chosen": [ASK + GOOD, ASK + BAD], "rejected": [ASK + BAD, ASK + GOOD]},
        "text": {**CHATS, "prompt": [ASK[0]["content"]] * 2},
        "both": {
            "prompt": [ASK[0]["content"]] * 2,
            "chosen": [ASK + GOOD, ASK + BAD],
            "rejected": [ASK + BAD, ASK + GOOD],
        },
    }[form]
    made = preference_pairs(tokenizer)(rows)
    alone = chat(tokenizer)({"messages": [ASK + GOOD, ASK + BAD]})
    for column in ("input_ids", "labels"):
        good, bad = alone[column]
        assert made[column] == [[good, bad], [bad, good]]


def test_answers_of_several_messages_and_earlier_turns():
    tokenizer = tokenizer_for("zephyr")
    before = ASK + GOOD + ASK  # nothing of it is compared
    made = preference_pairs(tokenizer)(
        {"prompt": [before], "chosen": [GOOD + ASK + GOOD], "rejected": [BAD]}
    )
    stop = tokenizer.eos_token_id
    assert [labels.count(stop) for labels in made["labels"][0]] == [2, 1]


def test_long_prompts_are_cut_alike_and_the_rest_is_counted():
    tokenizer = tokenizer_for("zephyr")
    rows = {
        "prompt": ["the sun is a naïve emoji " * 3, "a", "b", None, "c"],
        "chosen": ["ok", "ok", "is " * 30, "yes", "same"],
        "rejected": ["no", "", "no", "no", "same"],
    }
    preprocess = preference_pairs(tokenizer, max_length=20)
    made = preprocess.make(rows, str)
    assert made.sources == [0, 3]
    counts = {name: made.counts[name] for name in ("cut", "long", "empty", "same")}
    assert counts == {"cut": 1, "long": 1, "empty": 1, "same": 1}
    better, worse = made.columns["input_ids"][0]
    heads = [
        ids[: sum(label == -100 for label in labels)]
        for ids, labels in zip((better, worse), made.columns["labels"][0], strict=True)
    ]
    assert heads[0] == heads[1]
    assert max(len(better), len(worse)) == 20
    long = preference_pairs(tokenizer, max_length=10).make(CHATS, str)
    assert long.sources == []
    assert long.counts["long"] == 2


def test_mistakes_are_refused():
    tokenizer = tokenizer_for("zephyr")
    preprocess = preference_pairs(tokenizer)
    with pytest.raises(DataError, match="have no prompt"):
        preprocess({"chosen": [GOOD], "rejected": [BAD]})
    with pytest.raises(DataError, match="no message of the assistant"):
        preprocess({"prompt": [ASK], "chosen": [GOOD], "rejected": [ASK]})
    with pytest.raises(DataError, match="no column 'question'"):
        preference_pairs(tokenizer, prompt="question")(CHATS)
    with pytest.raises(DataError, match="no text"):
        preprocess({"prompt": ["a"], "chosen": ["b"], "rejected": [BAD]})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", [TEXTS, CHATS], ids=["texts", "chats"])
def test_batches_are_pairs_by_two_by_tokens(rows, side, caplog):
    tokenizer = tokenizer_for("zephyr")
    tokenizer.padding_side = side
    model = tiny_llama(tokenizer)
    data = Dataset.from_dict(rows)
    preprocess = preference_pairs(tokenizer)
    loaders = prepare_dataloaders(
        {"validation": data}, tokenizer, model=model, preprocess=preprocess, pad_to_multiple_of=8
    )
    batch = next(iter(loaders["validation"]))
    made = preprocess(rows)
    assert {name: column.dtype for name, column in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    width = batch["input_ids"].shape[2]
    assert width % 8 == 0
    for row in range(2):
        for number in range(2):
            ids, labels = made["input_ids"][row][number], made["labels"][row][number]
            num_pads = width - len(ids)  # on the right, whatever the tokenizer says
            assert batch["attention_mask"][row, number].tolist() == [1] * len(ids) + [0] * num_pads
            assert batch["labels"][row, number].tolist() == labels + [-100] * num_pads
            pads = [tokenizer.pad_token_id] * num_pads
            assert batch["input_ids"][row, number].tolist() == ids + pads
    assert "2 pairs became 2 rows of two" in "".join(messages(caplog))


def margin(model, batch):
    """A loss of pairs, plainly: the scores of both rows, the better one first."""
    mask = batch["attention_mask"].flatten(0, 1)
    logits = model(input_ids=batch["input_ids"].flatten(0, 1), attention_mask=mask).logits
    scores = logits.reshape(len(batch["labels"]), 2, -1).mean(2)
    return torch.nn.functional.softplus(scores[:, 1] - scores[:, 0]).mean(), len(scores)


@pytest.mark.parametrize("loss", ["margin", "dpo", "reward"])
def test_a_loss_of_pairs_trains_and_is_evaluated(loss):
    tokenizer = tokenizer_for("zephyr")
    head = LlamaForSequenceClassification if loss == "reward" else LlamaForCausalLM
    model = tiny_llama(tokenizer, head)
    reference = tiny_llama(tokenizer)
    loss_fn = {"margin": margin, "reward": reward, "dpo": dpo(reference=reference)}[loss]
    data = Dataset.from_dict({name: cells * 3 for name, cells in TEXTS.items()})
    loaders = prepare_dataloaders(
        {"train": data, "validation": data},
        tokenizer,
        model=model,
        batch_size=2,
        preprocess=preference_pairs(tokenizer),
    )
    result = train_loop(model, loaders["train"], loss_fn=loss_fn, num_epochs=1, progress_bar=False)
    assert result.state.progress.num_steps == 3
    scores = evaluate_loop(model, loaders["validation"], loss_fn=loss_fn)
    assert 0 < scores["loss"] < 2
    wide = prepare_dataloaders(
        data, tokenizer, model=model, batch_size=4, preprocess=preference_pairs(tokenizer)
    )
    batch = next(iter(wide["train"]))
    assert check_accumulation(model.double(), batch, loss_fn=loss_fn).is_exact


def test_lists_that_do_not_fit_are_refused():
    tokenizer = tokenizer_for("zephyr")
    pair = {"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}
    for other, words in (
        ({"input_ids": [[1]], "labels": [[1]]}, "same number of lists"),
        ({"input_ids": [[1], [2]], "labels": [[1], [2, 3]]}, "Give each token a label"),
    ):
        data = Dataset.from_list([pair, other])
        loader = prepare_dataloaders({"test": data}, tokenizer)["test"]
        with pytest.raises(DataError, match=words):
            next(iter(loader))


def test_the_function_can_be_sent_to_another_process():
    preprocess = preference_pairs(tokenizer_for("zephyr"))
    assert pickle.loads(pickle.dumps(preprocess))(CHATS) == preprocess(CHATS)


def num_labels(row):
    return [sum(label != -100 for label in labels) for labels in row]


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_texts_without_a_prompt_are_compared_behind_what_both_begin_with(kind):
    tokenizer = tokenizer_for("zephyr")
    prompts, answers = ["the sun", "2+2 is four. Ok! a b"], (["4", " is ok"], ["5, a b c", " no"])
    whole = [[p + a for p, a in zip(prompts, side, strict=True)] for side in answers]
    made = preference_pairs(tokenizer)({"chosen": whole[0], "rejected": whole[1]})
    plain = complete(tokenizer)({"prompt": [""] * 4, "completion": whole[0] + whole[1]})
    ids = [list(pair) for pair in zip(plain["input_ids"][:2], plain["input_ids"][2:], strict=True)]
    assert made["input_ids"] == ids  # nothing of the tokens changes
    for (better, worse), labels in zip(ids, made["labels"], strict=True):
        same = next(n for n, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b)
        assert labels == [[-100] * same + one[same:] for one in (better, worse)]
    model, reference = tiny_llama(tokenizer).double(), tiny_llama(tokenizer).double()
    model.lm_head.weight.data *= 5
    unmasked = [[list(row) for row in pair] for pair in ids]
    losses = []
    for rows in (made, {"input_ids": ids, "labels": unmasked}):
        loader = prepare_dataloaders({"dev": Dataset.from_dict(rows)}, tokenizer, model=model)
        loss_fn = dpo(0.1, reference=reference, kind=kind)
        losses.append(evaluate_loop(model, loader["dev"], loss_fn=loss_fn)["loss"])
    # The common tokens are as likely in both; only in means of tokens do they count.
    assert (losses[0] == pytest.approx(losses[1], rel=1e-9)) == (kind != "ipo")


def test_a_common_beginning_is_cut_like_a_prompt_and_something_of_each_is_left():
    tokenizer = tokenizer_for("zephyr")
    begin = "the sun is a naïve emoji " * 5
    rows = {"chosen": [begin + "ok", "ok"], "rejected": [begin + "no", "ok no"]}
    found = preference_pairs(tokenizer, max_length=12).make(rows, str)
    assert found.counts["cut"] == 1
    assert [len(ids) <= 12 for pair in found.columns["input_ids"] for ids in pair] == [True] * 4
    assert all(min(num_labels(row)) >= 1 for row in found.columns["labels"])
    stop = tokenizer.eos_token_id
    assert all(labels[-1] == stop for pair in found.columns["labels"] for labels in pair)


def test_whole_texts_beside_their_prompts_are_told(caplog):
    tokenizer = tokenizer_for("zephyr")
    rows = {"prompt": ["2+2=", "the"], "chosen": ["2+2=4", "the a"], "rejected": ["2+2=5", "the b"]}
    data = Dataset.from_dict(rows)
    prepare_dataloaders(data, tokenizer, preprocess=preference_pairs(tokenizer))
    (line,) = [line for line in messages(caplog) if "stands there twice" in line]
    assert 'dataset.remove_columns("prompt")' in line
    caplog.clear()
    prepare_dataloaders(
        data.remove_columns("prompt"), tokenizer, preprocess=preference_pairs(tokenizer)
    )
    assert "twice" not in "".join(messages(caplog))


@pytest.mark.parametrize("options", [{"max_tokens": 64}, {"group_by_length": True}])
def test_pairs_are_grouped_by_length(options):
    tokenizer = tokenizer_for("zephyr")
    model = tiny_llama(tokenizer)
    rows = {
        "prompt": ["a"] * 40,
        "chosen": [" is four" * (1 + n % 4) for n in range(40)],
        "rejected": [" no" * (1 + n % 7) for n in range(40)],
    }
    data = {"train": Dataset.from_dict(rows), "dev": Dataset.from_dict(rows)}
    loaders = prepare_dataloaders(
        data,
        tokenizer,
        model=model,
        preprocess=preference_pairs(tokenizer),
        batch_size=4,
        pad_to_multiple_of=4,
        **options,
    )
    for loader in loaders.values():
        sizes = [batch["input_ids"].shape for batch in loader]
        assert sum(shape[0] for shape in sizes) == 40
        assert all(shape[2] % 4 == 0 for shape in sizes)
        assert all(shape.numel() <= 64 for shape in sizes) or "max_tokens" not in options
    result = train_loop(model, loaders["train"], loss_fn=dpo(reference=tiny_llama(tokenizer)),
                        num_epochs=1, progress_bar=False)  # fmt: skip
    assert result.state.progress.num_steps == len(loaders["train"])


def test_pairs_that_do_not_fit_into_a_batch_name_their_own_length():
    tokenizer = tokenizer_for("zephyr")
    data = Dataset.from_dict({"prompt": ["a"], "chosen": [" is" * 30], "rejected": [" no"]})
    with pytest.raises(ConfigError, match=r"preference_pairs\(tokenizer, max_length=16\)"):
        prepare_dataloaders(data, tokenizer, preprocess=preference_pairs(tokenizer), max_tokens=32)
