"""Chats to tokens and labels."""

import copy
import json
import pickle
import random

import pytest
from chat_styles import CHATML, QWEN3, STYLES, random_chat, tokenizer_for, without_marks, words
from tokenizers import decoders, pre_tokenizers, processors
from transformers import ByT5Tokenizer

from manualloop import ConfigError, DataError
from manualloop.tasks import chat

ASK = {"role": "user", "content": "What is 2+2?"}
TELL = {"role": "assistant", "content": "four."}


def rows_by_marks(tokenizer, messages, template):
    """The rows that the marks in the template give: the chat, or one an answer if it takes back."""
    answers = [n + 1 for n, message in enumerate(messages) if message["role"] == "assistant"]
    rows = []
    for end in answers if template == QWEN3 else [len(messages)]:
        made = tokenizer.apply_chat_template(
            messages[:end],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = made["assistant_masks"]
        if template == QWEN3:  # of the earlier answers nothing is learned in this row
            begin = max(n for n in range(1, len(mask)) if mask[n] and not mask[n - 1])
            mask = [0] * begin + mask[begin:]
        ids = made["input_ids"]
        rows.append((ids, [token if now else -100 for token, now in zip(ids, mask, strict=True)]))
    return rows


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize("style", STYLES)
def test_labels_equal_those_of_marks_in_the_template(style, kind):
    tokenizer = tokenizer_for(style, kind)
    marked = tokenizer.chat_template
    tokenizer.chat_template = without_marks(marked)
    preprocess = chat(tokenizer, stop=STYLES[style][2])
    generator = random.Random(style)
    chats = [random_chat(generator, style) for _ in range(25)]
    wanted = [row for messages in chats for row in rows_by_marks(tokenizer, messages, marked)]
    made = preprocess({"messages": chats})
    assert list(zip(made["input_ids"], made["labels"], strict=True)) == wanted
    assert sum(label != -100 for labels in made["labels"] for label in labels) > 200


@pytest.mark.parametrize("style", STYLES)
def test_what_comes_before_an_answer_is_the_prompt_of_its_generation(style):
    tokenizer = tokenizer_for(style)
    preprocess = chat(tokenizer, stop=STYLES[style][2])
    generator = random.Random(style)
    for _ in range(5):
        messages = random_chat(generator, style)
        first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
        made = preprocess({"messages": [messages]})
        start = next(n for n, label in enumerate(made["labels"][0]) if label != -100)
        prompt = tokenizer.apply_chat_template(
            messages[:first], add_generation_prompt=True, return_dict=True
        )
        assert made["input_ids"][0][:start] == prompt["input_ids"]


def learned_text(tokenizer, labels):
    """What the model has to write, answer by answer."""
    parts, part = [], []
    for label in [*labels, -100]:
        if label != -100:
            part.append(label)
        elif part:
            parts.append(tokenizer.decode(part))
            part = []
    return parts


# Texts that a tokenizer joins with the end of the prompt, or with what comes after the answer.
EDGES = ["\nfour", " four", "\n\nfour ", "", "four\n", "  ", "four <|im_start|>"]


@pytest.mark.parametrize("style", ["zephyr", "llama2", "chatml"])
@pytest.mark.parametrize("answer", EDGES)
def test_a_token_across_a_border_is_cut_there(style, answer):
    tokenizer = tokenizer_for(style)
    if style == "llama2":  # a prompt that ends with a space, and no token that stands alone
        answer_of = "{{ m['content'] + eos_token }}"
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}"
            "{{ '\n\nASSISTANT: ' }}{% else %}" + answer_of + "{% endif %}{% endfor %}"
        )
    messages = [ASK, {"role": "assistant", "content": answer}, ASK, TELL]
    made = chat(tokenizer)({"messages": [messages]})
    ids, labels = made["input_ids"][0], made["labels"][0]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    stop = tokenizer.eos_token
    assert learned_text(tokenizer, labels) == [answer + stop, "four." + stop]
    start = next(n for n, label in enumerate(labels) if label != -100)
    prompt = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'user: ' + m['content'] + border }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "words", "always"])
@pytest.mark.parametrize("border", ["\n\n", "\nassistant: ", "\nassistant:", " "])
def test_borders_in_plain_text_are_those_of_generation(kind, border):
    tokenizer = tokenizer_for("llama2", "bytes" if kind in ("bytes", "trimmed") else "words")
    if kind == "trimmed":  # offsets that leave out the space of a word
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "always":  # a space before each part of a text, and words with line breaks
        space = {"prepend_scheme": "always"}
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**space)
        tokenizer.backend_tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.chat_template = PLAIN
    preprocess, options = chat(tokenizer, border=border), {"border": border, "tokenize": False}
    generator = random.Random(0)
    for _ in range(6):
        roles = ("user", "assistant") * generator.randint(1, 3)
        pads = [generator.choice(["", " ", "\n", "  ", "\n\n"]) for _ in range(2 * len(roles))]
        messages = [
            {"role": role, "content": pads.pop() + words(generator, 5) + pads.pop()}
            for role in roles
        ]
        made = preprocess({"messages": [messages]})
        ids, labels = made["input_ids"][0], made["labels"][0]
        prompt = tokenizer.apply_chat_template(messages[:1], **options)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids[: len(head)] == head
        assert labels[: len(head)] == [-100] * len(head)
        assert labels[len(head)] != -100
        assert labels.count(tokenizer.eos_token_id) == len(roles) // 2
        whole = tokenizer.apply_chat_template(messages, **options)
        as_whole = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == tokenizer.decode(as_whole)


def test_a_tokenizer_without_offsets_gives_the_same_labels():
    fast = ByT5Tokenizer()  # a byte is a token, so that the parts are those of the whole
    assert not fast.is_fast
    fast.chat_template = without_marks(STYLES["zephyr"][0])
    generator = random.Random(0)
    messages = random_chat(generator, "zephyr")
    made = chat(fast)({"messages": [messages]})
    whole = fast.apply_chat_template(messages, tokenize=False)
    assert made["input_ids"][0] == fast(whole, add_special_tokens=False)["input_ids"]
    answers = [m["content"] + "</s>" for m in messages if m["role"] == "assistant"]
    assert learned_text(fast, made["labels"][0]) == answers


def test_a_template_whose_prompt_is_another_is_refused():
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = CHATML.replace(
        "assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}"
    )
    with pytest.raises(DataError) as caught:
        chat(tokenizer)({"messages": [[ASK, TELL]]})
    assert "Message 1 (assistant) of row 0 of the batch" in str(caught.value)
    assert "ends with '<think>', and in the rendered chat 'four.<|im_end|>\\n'" in str(caught.value)


def test_a_template_option_reaches_prompt_and_answer():
    tokenizer = tokenizer_for("qwen3")
    made = chat(tokenizer, enable_thinking=False)({"messages": [[ASK, TELL]]})
    assert learned_text(tokenizer, made["labels"][0]) == ["four.<|im_end|>"]
    made = chat(tokenizer)({"messages": [[ASK, TELL]]})
    assert learned_text(tokenizer, made["labels"][0]) == ["<think>\n\n</think>\n\nfour.<|im_end|>"]


def test_an_answer_without_a_stop_token_is_refused():
    tokenizer = tokenizer_for("gemma")
    with pytest.raises(DataError, match=r"has no stop token.*stop='<end_of_turn>'"):
        chat(tokenizer)({"messages": [[ASK, TELL]]})
    made = chat(tokenizer, stop="<end_of_turn>")({"messages": [[ASK, TELL]]})
    assert learned_text(tokenizer, made["labels"][0]) == ["four.<end_of_turn>"]
    with pytest.raises(ConfigError, match="no token of the tokenizer"):
        chat(tokenizer, stop="<end_of_nothing>")


@pytest.mark.parametrize("answer", ["one</s> two", "one"])
def test_text_behind_the_stop_token_is_told(answer):
    tokenizer = tokenizer_for("zephyr")
    ends = "" if "</s>" in answer else "</s>"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
        f"{{% if m['role'] == 'assistant' %}}{ends}{{% endif %}}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    function = chat(tokenizer)
    made = function.make({"messages": [messages] * 3}, str)
    lines = "; ".join(function.describe(made.counts))
    assert ("text behind the stop token, which is not learned: in 3 answers" in lines) is not bool(
        ends
    )
    learned = [label for label in made.columns["labels"][0] if label != -100]
    assert tokenizer.decode(learned) == "one</s>"


def test_what_is_not_to_be_learned_is_left_out():
    tokenizer = tokenizer_for("chatml")
    left = {**TELL, "content": "five.", "train": False}
    messages = [ASK, left, ASK, TELL, ASK]
    made = chat(tokenizer)({"messages": [messages]})
    assert learned_text(tokenizer, made["labels"][0]) == ["four.<|im_end|>"]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert made["input_ids"][0] == whole
    only = chat(tokenizer, trains=lambda message: message["content"] == "six.")
    assert only({"messages": [messages]}) == {"input_ids": [], "labels": []}


@pytest.mark.parametrize("keeps", [0, 1, 2, 3])
def test_whole_answers_are_kept_of_a_long_chat(keeps):
    tokenizer = tokenizer_for("chatml")
    preprocess = chat(tokenizer)
    row = preprocess({"messages": [[ASK, TELL] * 3]})
    stop = tokenizer.eos_token_id
    ends = [n + 1 for n, label in enumerate(row["labels"][0]) if label == stop]
    limit = ends[keeps - 1] if keeps else ends[0] - 1
    cut = chat(tokenizer, max_length=limit + (0 < keeps < 3))
    made = cut.make({"messages": [[ASK, TELL] * 3]}, str)
    assert made.counts["lost"] == 3 - keeps
    assert [labels.count(stop) for labels in made.columns["labels"]] == [keeps] * (keeps > 0)
    for ids in made.columns["input_ids"]:
        assert ids == row["input_ids"][0][: len(ids)]
        assert ids[-1] == stop


def test_chats_without_an_answer_are_counted():
    tokenizer = tokenizer_for("chatml")
    made = chat(tokenizer).make({"messages": [[ASK], None, [], [ASK, TELL], [TELL]]}, str)
    assert made.sources == [3]
    assert (made.counts["empty"], made.counts["first"], made.counts["chats"]) == (4, 1, 5)


def test_keys_that_arrow_fills_with_none_do_not_reach_the_template():
    tokenizer = tokenizer_for("chatml")
    tokenizer.chat_template = CHATML.replace("{% for m", "{{ (tools or []) | tojson }}{% for m", 1)
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "(m | tojson)")
    called = {"function": {"name": "add", "arguments": {"x": 2, "unit": None}}, "id": None}
    answer = {**TELL, "tool_calls": [called], "train": None, "name": None}
    tools = [{"name": "add", "parameters": {"x": {"type": "int"}, "unit": None}}]
    plain = {**TELL, "tool_calls": [{"function": {"name": "add", "arguments": {"x": 2}}}]}
    given = [{"name": "add", "parameters": {"x": {"type": "int"}}}]
    wanted = chat(tokenizer, tools=given)({"messages": [[ASK, plain]]})
    rows = {"messages": [[ASK, answer]] * 2, "tools": [tools, json.dumps(given)]}
    made = chat(tokenizer)(rows)
    assert made["input_ids"] == wanted["input_ids"] * 2


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "complete"),
        ([{"content": "hello"}], "without a role"),
        ([{"from": "human", "value": "hello"}], 'message\\["from"\\]'),
        (["hello"], "without a role"),
    ],
)
def test_what_is_no_chat_is_refused(messages, words):
    with pytest.raises(DataError, match=words):
        chat(tokenizer_for("chatml"))({"messages": [messages]})


def test_a_template_that_refuses_the_roles_is_named():
    with pytest.raises(DataError, match=r"\(user, user\).*must alternate"):
        chat(tokenizer_for("mistral"))({"messages": [[ASK, ASK, TELL]]})


def test_arguments_are_checked():
    tokenizer = tokenizer_for("chatml")
    with pytest.raises(ConfigError, match="no option of a chat template"):
        chat(tokenizer, tokenize=True)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        chat(bare)
    assert chat(bare, chat_template=CHATML)({"messages": [[ASK, TELL]]})["input_ids"]
    bare.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        chat(bare, chat_template=CHATML)
    with pytest.raises(DataError, match='column="text"'):
        chat(tokenizer)({"text": [[ASK, TELL]]})


def test_a_template_with_todays_date_is_told():
    tokenizer = tokenizer_for("chatml")
    dated = "{% set d = date_string or strftime_now('%d %b %Y') %}{{ d }}" + CHATML
    tokenizer.chat_template = dated
    rows = {"messages": [[ASK, TELL]]}
    for options, is_told in (({}, True), ({"date_string": "26 Jul 2024"}, False)):
        preprocess = chat(tokenizer, **options)
        lines = preprocess.describe(preprocess.make(rows, str).counts)
        assert any("date" in line for line in lines) == is_told


def test_the_function_can_be_sent_to_another_process():
    preprocess = chat(tokenizer_for("chatml"), max_length=50)
    rows = {"messages": [[ASK, TELL]]}
    assert pickle.loads(pickle.dumps(preprocess))(rows) == preprocess(rows)
