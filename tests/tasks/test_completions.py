"""Prompts and completions to tokens and labels."""

import pytest
from chat_styles import tokenizer_for

from manualloop import ConfigError, DataError
from manualloop.tasks import complete, preference_pairs

ROWS = {"prompt": ["(see) 2+2 is", "the sun"], "completion": [" four.", " naïve 🙂"]}


def with_bos(tokenizer):
    """The tokenizer with a token at the beginning of each text, as Llama's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_the_completion_is_learned_and_ends(kind):
    tokenizer = with_bos(tokenizer_for("llama2", kind))
    made = complete(tokenizer)(ROWS)
    for n, (ids, labels) in enumerate(zip(made["input_ids"], made["labels"], strict=True)):
        prompt = tokenizer(ROWS["prompt"][n])["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert labels[: len(prompt)] == [-100] * len(prompt)
        assert labels[len(prompt) :] == ids[len(prompt) :]
        assert ids[-1] == tokenizer.eos_token_id
        # Written after the prompt, it is the text: no space was added at the border.
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == ROWS["prompt"][n] + ROWS["completion"][n]


def test_a_completion_that_ends_by_itself_gets_no_second_end():
    tokenizer = tokenizer_for("llama2")
    made = complete(tokenizer)({"prompt": ["a"], "completion": ["b</s>"]})
    assert made["labels"][0].count(tokenizer.eos_token_id) == 1


def test_an_end_that_the_tokenizer_adds_to_the_prompt_is_left_out():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_for("llama2")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    made = complete(tokenizer)(ROWS)
    assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in made["input_ids"])


@pytest.mark.parametrize("frame", ["$A", "<s> $A", "$A </s>", "</s> $A"])
def test_a_prompt_keeps_the_end_that_is_in_its_text(frame):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_for("llama2")
    plain = tokenizer("the sun</s>", add_special_tokens=False)["input_ids"]
    begin = tokenizer.convert_tokens_to_ids(frame.partition("$A")[0].split())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=frame, special_tokens=[("<s>", 1), ("</s>", tokenizer.eos_token_id)]
    )
    for prompt, ids in (("the sun</s>", plain), ("the sun", plain[:-1]), ("", [])):
        made = complete(tokenizer)({"prompt": [prompt], "completion": [" is"]})
        learned = [label for label in made["labels"][0] if label != -100]
        assert made["input_ids"][0] == [*begin, *ids, *learned]
        pairs = preference_pairs(tokenizer)(
            {"prompt": [prompt or None], "chosen": [" is"], "rejected": ["2+2"]}
        )
        assert pairs["input_ids"][0][0] == [*begin, *ids, *learned]


def test_the_beginning_of_a_long_prompt_is_cut_off_first():
    tokenizer = with_bos(tokenizer_for("llama2"))
    whole = complete(tokenizer)(ROWS)
    lengths = [len(ids) for ids in whole["input_ids"]]
    num_learned = [sum(label != -100 for label in labels) for labels in whole["labels"]]
    limit = max(num_learned) + 2
    preprocess = complete(tokenizer, max_length=limit)
    made = preprocess.make(ROWS, str)
    assert made.counts["cut"] == sum(length > limit for length in lengths) > 0
    for short, long in zip(made.columns["input_ids"], whole["input_ids"], strict=True):
        assert short[0] == tokenizer.bos_token_id
        assert len(short) <= limit
        assert short[1:] == long[len(long) - len(short) + 1 :]
    left = complete(tokenizer, max_length=min(num_learned)).make(ROWS, str)
    assert left.columns["input_ids"] == []
    assert left.counts["lost"] == 2


def test_empty_completions_are_counted_and_empty_prompts_are_not():
    tokenizer = tokenizer_for("llama2")
    rows = {"q": ["a", "", None, "b"], "a": ["", "c", "d", None]}
    made = complete(tokenizer, "q", "a").make(rows, str)
    assert made.sources == [1, 2]
    assert made.counts["empty"] == 2
    assert "left out, because nothing is to be learned: 2 completions" in "; ".join(
        complete(tokenizer, "q", "a").describe(made.counts)
    )


def test_arguments_are_checked():
    tokenizer = tokenizer_for("llama2")
    with pytest.raises(DataError, match=r"no column 'completion'\. The columns: prompt"):
        complete(tokenizer)({"prompt": ["a"]})
    with pytest.raises(DataError, match=r"no text.*chat"):
        complete(tokenizer)({"prompt": [[{"role": "user"}]], "completion": ["b"]})
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos_token"):
        complete(tokenizer)
