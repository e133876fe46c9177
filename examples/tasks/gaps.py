"""Rows of numbers, and what is left of them around a gap."""

from random import Random

from datasets import Dataset, DatasetDict

SENTINELS = BEFORE, AFTER, BETWEEN = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


def with_gaps(tokenizer, rows):
    made = {"input_ids": [], "labels": []}
    for words in map(str.split, rows["text"]):
        start, end = len(words) // 4, len(words) * 3 // 4
        prompt = [BEFORE, AFTER, *words[end:], BETWEEN, *words[:start]]
        ids = tokenizer.convert_tokens_to_ids([*prompt, *words[start:end], "</s>"])
        made["input_ids"].append(ids)
        made["labels"].append([-100] * len(prompt) + ids[len(prompt) :])
    return made


def load_sequences(num_rows: int) -> DatasetDict:
    draw, texts = Random(0), []
    for _ in range(num_rows):
        start, size = draw.randrange(40), draw.randrange(8, 24)
        texts.append(" ".join(map(str, range(start, start + size))))
    return Dataset.from_dict({"text": texts}).train_test_split(0.1, seed=0)


def usual_share(data: DatasetDict) -> float:
    """Return the share of gaps that are as long as most gaps."""
    sizes = [
        len(words) * 3 // 4 - len(words) // 4 for words in map(str.split, data["test"]["text"])
    ]
    return max(map(sizes.count, sizes)) / len(sizes)
