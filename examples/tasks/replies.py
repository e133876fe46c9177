"""Replies of kind and rude words, a word-level tokenizer, and a small Llama, for the examples."""

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KIND = ["please", "thanks", "gladly", "kindly", "friend", "happy", "welcome", "lovely"]
RUDE = ["no", "never", "stupid", "hurry", "lazy", "dull", "wrong", "silly"]
WORDS = [*KIND, *RUDE, "may", "i", "ask", "?", *"abcdefgh"]
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **SPECIAL)


def small_llama(tokenizer, kind=LlamaForCausalLM, width: int = 64, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    options |= {"num_attention_heads": 4, "vocab_size": len(tokenizer), **sizes, **ends}
    return kind(LlamaConfig(**options))


def preferences(number: int, seed: int) -> Dataset:
    """Pairs of replies to a question: the better one has more kind words."""
    draw, rows = random.Random(seed), []
    while len(rows) < number:
        replies = [draw.choices(KIND + RUDE, k=draw.randint(3, 7)) for _ in range(2)]
        replies.sort(key=lambda words: sum(word in KIND for word in words) / len(words))
        prompt, (worse, better) = f"may i ask {draw.choice('abcdefgh')} ? ", replies
        if sum(w in KIND for w in worse) / len(worse) < sum(w in KIND for w in better) / len(
            better
        ):
            texts = {"chosen": " ".join(better), "rejected": " ".join(worse)}
            rows.append({"prompt": prompt, **texts})
    return Dataset.from_list(rows)
