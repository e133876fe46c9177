"""Chats about months, and a tokenizer with a chat template, for examples/tasks/chat.py."""

import random
from calendar import month_name

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MONTHS = list(month_name)[1:]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def question(generator: random.Random) -> list[dict[str, str]]:
    month, step = generator.randrange(12), generator.choice([-1, 1])
    word = "after" if step > 0 else "before"
    answer = f"{MONTHS[(month + step) % 12]} comes {word} {MONTHS[month]} ."
    ask = {"role": "user", "content": f"Which month comes {word} {MONTHS[month]} ?"}
    return [ask, {"role": "assistant", "content": answer}]


def month_chats(num_rows: int) -> DatasetDict:
    generator = random.Random(0)
    chats = [question(generator) + question(generator) for _ in range(num_rows)]
    parts = {"train": chats[num_rows // 10 :], "validation": chats[: num_rows // 10]}
    return DatasetDict({name: Dataset.from_dict({"messages": c}) for name, c in parts.items()})


def chat_tokenizer(data: DatasetDict) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<end>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [message["content"] for row in data["train"] for message in row["messages"]]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made
