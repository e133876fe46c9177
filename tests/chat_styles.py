# ruff: noqa: RUF001  (the tokens of DeepSeek have bars of full width)
"""Chat templates of many models, with marks around what the model writes, and tokenizers for them.

The marks, ``{% generation %}``, are what the tests compare with; ``without_marks`` is the template
as models have it.
"""

import functools
import random
import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    + OPEN
    + "{{ m['content'] + '<|im_end|>' }}"
    + CLOSE
    + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}"
    + OPEN
    + "{{ m['content'] | trim + '<|eot_id|>' }}"
    + CLOSE
    + "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}"
    + OPEN
    + "{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    + CLOSE
    + "{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}" + OPEN + "{{ ' ' + m['content'] + eos_token }}" + CLOSE + "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{% if role == 'model' %}"
    + OPEN
    + "{{ m['content'] | trim + '<end_of_turn>' }}"
    + CLOSE
    + "{% else %}{{ m['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' %}"
    + OPEN
    + "{{ m['content'] + eos_token }}"
    + CLOSE
    + "{% else %}{{ m['content'] + eos_token }}{% endif %}{{ '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' }}"
    + OPEN
    + "{{ m['content'] + eos_token }}"
    + CLOSE
    + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# Thoughts are there in the last answer only, and empty ones stand there for none.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}" + OPEN + "{% set thought = m['reasoning_content'] or '' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' }}"
    + CLOSE
    + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)

# Template, tokens that stand alone, end of an answer, whether there may be a system message.
STYLES = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", True),
    "llama3": (
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        True,
    ),
    "llama2": (LLAMA2, ("<s>", "</s>"), "</s>", False),
    "mistral": (MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", False),
    "gemma": (
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        False,
    ),
    "zephyr": (ZEPHYR, ("<s>", "</s>"), "</s>", True),
    "deepseek": (
        DEEPSEEK,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        True,
    ),
    "qwen3": (QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", True),
}

TEXT = "the sun 2+2 is, four. Café naïve don't 日本 ok! (see) a b\n\nc x_y f(x)=3 - * 🙂 end? no"
WORDS = TEXT.split(" ")


def without_marks(template):
    return re.sub(r"\{% (end)?generation %\}", "", template)


def tokenizer_for(style, kind="bytes"):
    """A small tokenizer with the tokens and the template of a style."""
    template, special, stop, _ = STYLES[style]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind, special)),
        bos_token=special[0] if special[0] != "<|im_start|>" else None,
        eos_token="<eos>" if style == "gemma" else stop,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _trained(kind, special):
    special = ["<pad>", *special]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:  # words that begin with a mark in place of the space, as in Llama 2
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        marks = pre_tokenizers.Metaspace(prepend_scheme="first")
        lines = pre_tokenizers.Split("\n", "isolated")  # no word holds a line break, as there
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, marks])
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", *special], show_progress=False
        )
    generator = random.Random(0)
    texts = [
        words(generator, 30) + "\nuser\nassistant\nsystem\nmodel\n<|user|>\n" for _ in range(50)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def words(generator, most):
    return " ".join(generator.choices(WORDS, k=generator.randint(1, most))).strip()


def random_chat(generator, style):
    """A chat of one to four turns, with thoughts for the template that knows them."""
    messages = []
    if STYLES[style][3] and generator.random() < 0.3:
        messages.append({"role": "system", "content": words(generator, 5)})
    for _ in range(generator.randint(1, 4)):
        messages.append({"role": "user", "content": words(generator, 8)})
        answer = {"role": "assistant", "content": words(generator, 8)}
        if style == "qwen3" and generator.random() < 0.5:
            answer["reasoning_content"] = words(generator, 4)
        messages.append(answer)
    if generator.random() < 0.2:
        messages.append({"role": "user", "content": words(generator, 3)})
    return messages
