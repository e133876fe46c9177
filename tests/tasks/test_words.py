"""Words of a list, between which a text has spaces."""

from typing import Any

import pytest
import transformers
from datasets import Dataset
from helpers import fixes_in, piece_tokenizer, run_fix, tiny_bert
from tiny_language_models import needs_transformers_5
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertForTokenClassification,
    ByT5Tokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from manualloop import DataError, prepare_dataloaders
from manualloop.tasks import tag_words
from manualloop.tasks.words import require_spaces

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
VOCABULARY = {token: n for n, token in enumerate([*SPECIAL, *ALPHABET, "\u0120a"])}
ROWS = {"tokens": [["x"], ["ab", "ab", "!"]], "ner_tags": [[0], [0, 1, 0]]}


def own(**options: Any) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(VOCABULARY, [("\u0120", "a")], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", **options)


def of_files(kind: Any, **options: Any) -> Any:
    return kind(vocab=VOCABULARY, merges=[("\u0120", "a")], **options)


@needs_transformers_5
@pytest.mark.parametrize("kind", [RobertaTokenizer, GPT2Tokenizer])
def test_a_tokenizer_that_joins_words_is_refused_with_the_line_that_loads_it_otherwise(
    kind, tmp_path
):
    joining = of_files(kind)
    with pytest.raises(DataError, match="of a text with a space between them") as error:
        tag_words(joining)(ROWS)
    assert "AutoTokenizer.from_pretrained(name, add_prefix_space=True)" in str(error.value)
    joining.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)
    made = tag_words(loaded)(ROWS)
    text = loaded(" ".join(ROWS["tokens"][1]))["input_ids"]
    assert made["input_ids"][1] == text


def gemma() -> Any:
    return transformers.GemmaTokenizer(vocab={t: n for n, t in enumerate("\u2581ab!")}, merges=[])


@needs_transformers_5
def test_a_tokenizer_that_cannot_be_loaded_with_spaces_has_no_such_line():
    with pytest.raises(DataError, match="Put the spaces into the words") as error:
        tag_words(gemma())(ROWS)
    assert "add_prefix_space" not in str(error.value)
    assert gemma().tokenize("ab ab !") == gemma().tokenize(["ab", " ab", " !"], **SPLIT)


SPLIT = {"is_split_into_words": True}


@needs_transformers_5
@pytest.mark.parametrize("make", [own, lambda: of_files(RobertaTokenizer), ByT5Tokenizer])
def test_words_with_their_spaces_are_the_text(make):
    tokenizer = make()
    data = Dataset.from_dict(ROWS)
    with pytest.raises(DataError) as error:
        tag_words(tokenizer)(data[:])
    (line,) = fixes_in(error.value)
    changed = run_fix(line, data)
    made = tag_words(tokenizer)(changed[:])
    assert made["input_ids"][1] == tokenizer("ab ab !")["input_ids"]
    kept = [label for label in made["labels"][1] if label != -100]
    assert kept == ROWS["ner_tags"][1]


def test_words_that_are_classified_as_a_whole_are_looked_at_too():
    data = Dataset.from_dict({"words": ROWS["tokens"] * 4, "label": [0, 1] * 4})
    for rows in (data, data.to_iterable_dataset()):
        with pytest.raises(DataError, match="put the spaces into the words"):
            list(prepare_dataloaders({"dev": rows}, own(), text_columns="words")["dev"])


@pytest.mark.parametrize(
    "words", [["\u6211", "\u7231", "\u4f60"], ["1", "2"], ["ab"], ["!", "?"], [], ["ab", " ab"]]
)
def test_scripts_without_spaces_are_left_as_they_are(words):
    require_spaces(own(), [words], "tokens")


@needs_transformers_5
def test_tokenizers_of_words_are_not_refused():
    for tokenizer in (piece_tokenizer(), of_files(RobertaTokenizer, add_prefix_space=True)):
        require_spaces(tokenizer, [["ab", "cafe"], ["\u00e9t\u00e9", "bad"]], "tokens")


def test_the_row_is_told_by_prepare_dataloaders():
    tokenizer, model = piece_tokenizer(), tiny_bert(6, BertForTokenClassification, vocab_size=32)
    rows = {"tokens": [["ab"]] * 1500, "ner_tags": [[1]] * 1400 + [[1, 2]] + [[1]] * 99}
    data = Dataset.from_dict(rows)
    for stored, name in ((data, "Row 1400 of train"), (data.to_iterable_dataset(), "Row 400 of")):
        with pytest.raises(DataError, match=f"^{name}.* has 1 words in 'tokens'"):
            loaders = prepare_dataloaders(
                {"train": stored}, tokenizer, model=model, preprocess=tag_words(tokenizer)
            )
            list(loaders["train"])
