"""What a function counts while it makes rows: told once, also from a cache, with rows named."""

import random

import pytest
from chat_styles import random_chat, tokenizer_for
from datasets import Dataset, IterableDataset
from helpers import messages
from transformers import LlamaConfig, LlamaForCausalLM

from manualloop import DataError, prepare_dataloaders
from manualloop.tasks import chat, complete, preference_pairs

ASK = {"role": "user", "content": "2+2 is"}
TELL = {"role": "assistant", "content": "four."}


def tiny_llama(tokenizer):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **sizes)
    return LlamaForCausalLM(config)


def chats(number, style="qwen3"):
    generator = random.Random(0)
    return [random_chat(generator, style) for _ in range(number)]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_counts_are_added_up_over_all_batches_and_told_from_a_cache(num_proc, tmp_path, caplog):
    tokenizer = tokenizer_for("chatml")
    answers = ["ok", "", "is four. " * 9, "no"] * 400 + [""] * 700  # the third batch: no row left
    rows = {"prompt": ["2+2"] * len(answers), "completion": answers}
    Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")  # a file has a cache
    data = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    data = data.select(range(1500)) if num_proc else data
    preprocess = complete(tokenizer, max_length=20)
    told = []
    for _ in range(2):
        caplog.clear()
        prepare_dataloaders(data, tokenizer, preprocess=preprocess, num_proc=num_proc)
        told.append([line for line in messages(caplog) if "became" in line])
    assert told[0] == told[1]
    (line,) = told[0]
    num_rows = 1500 if num_proc else 2000
    whole = preprocess.make({name: cells[:num_rows] for name, cells in rows.items()}, str).counts
    assert line.startswith(
        f"train: {num_rows:,} prompts with a completion became {whole['rows']:,} rows, "
        f"with labels at {whole['labels']:,} of {whole['tokens']:,} tokens"
    )
    assert f"left out beyond 20 tokens: {whole['lost']:,} answers" in line
    assert f"is to be learned: {whole['empty']:,} completions" in line
    assert ("300 rows, in batches of which no row is left" in line) == (num_proc is None)


def test_kept_columns_follow_the_rows():
    tokenizer = tokenizer_for("qwen3")
    found = chats(20)
    data = Dataset.from_dict({"messages": found, "name": [str(n) for n in range(20)]})
    loader = prepare_dataloaders(
        {"test": data}, tokenizer, preprocess=chat(tokenizer), keep="name", batch_size=100
    )["test"]
    (batch,) = loader
    answers = [sum(message["role"] == "assistant" for message in one) for one in found]
    assert batch["name"] == [str(n) for n, number in enumerate(answers) for _ in range(number)]


def test_a_row_that_is_refused_is_named():
    tokenizer = tokenizer_for("gemma")
    data = Dataset.from_dict({"messages": [[ASK]] * 1200 + [[ASK, TELL]]})
    with pytest.raises(DataError, match="An answer of row 1200 of train"):
        prepare_dataloaders(data, tokenizer, preprocess=chat(tokenizer))


def test_a_stream_gives_the_same_rows():
    tokenizer = tokenizer_for("chatml")
    found = chats(30, "chatml")
    stream = IterableDataset.from_generator(lambda: ({"messages": one} for one in found))
    preprocess = chat(tokenizer)
    loader = prepare_dataloaders({"test": stream}, tokenizer, preprocess=preprocess)["test"]
    rows = [
        ids[mask.bool()].tolist()
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert rows == preprocess({"messages": found})["input_ids"]


def test_nothing_left_is_refused():
    tokenizer = tokenizer_for("chatml")
    data = Dataset.from_dict({"messages": [[ASK]] * 3})
    with pytest.raises(DataError, match="left out all 3 rows of train"):
        prepare_dataloaders(data, tokenizer, preprocess=chat(tokenizer))


@pytest.mark.parametrize("kind", ["chat", "complete", "pairs"])
def test_a_stop_token_that_generation_does_not_know_is_told(kind, caplog):
    tokenizer = tokenizer_for("chatml")
    model = tiny_llama(tokenizer)
    rows, preprocess = {
        "chat": ({"messages": [[ASK, TELL]]}, chat(tokenizer)),
        "complete": ({"prompt": ["a"], "completion": ["b"]}, complete(tokenizer)),
        "pairs": (
            {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
            preference_pairs(tokenizer),
        ),
    }[kind]
    line = None
    for stops, is_told in ((9, True), ([9, tokenizer.eos_token_id], False), (None, False)):
        caplog.clear()
        model.generation_config.eos_token_id = stops
        data = Dataset.from_dict(rows)
        prepare_dataloaders(data, tokenizer, model=model, preprocess=preprocess)
        found = [text for text in messages(caplog) if "generation would not stop" in text]
        assert bool(found) == is_told
        line = found[0] if found else line
    exec(line[line.index("model.generation_config.eos_token_id = ") :], {"model": model})
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_the_stop_tokens_of_the_model_end_answers():
    tokenizer = tokenizer_for("gemma")
    model = tiny_llama(tokenizer)
    data = Dataset.from_dict({"messages": [[ASK, TELL]]})
    stop = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, stop]
    loader = prepare_dataloaders(data, tokenizer, model=model, preprocess=chat(tokenizer))["train"]
    labels = next(iter(loader))["labels"][0].tolist()
    assert stop in labels
