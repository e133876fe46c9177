"""Numbers in English and German words, and a tokenizer of words."""

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ENGLISH = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"""
GERMAN = """ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn
sechzehn siebzehn achtzehn neunzehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig
neunzig"""
WORDS = dict(zip(ENGLISH.split(), GERMAN.split(), strict=True)) | {"hundred": "hundert"}
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def words(number: int, names: list[str], hundred: str, link: str) -> list[str]:
    if number >= 100:
        rest = words(number % 100, names, hundred, link) if number % 100 else []
        return [names[number // 100 - 1], hundred, *rest]
    if number < 20 or number % 10 == 0:
        return [names[number - 1] if number < 20 else names[number // 10 + 17]]
    ten, one = names[number // 10 + 17], names[number % 10 - 1]
    return [one, link, ten] if link else [ten, one]  # ein und zwanzig, twenty one


def load_numerals(num_rows: int | None = None) -> DatasetDict:
    english = [" ".join(words(n, ENGLISH.split(), "hundred", "")) for n in range(1, 1000)]
    german = [" ".join(words(n, GERMAN.split(), "hundert", "und")) for n in range(1, 1000)]
    rows = Dataset.from_dict({"english": english, "german": german}).shuffle(seed=0)
    return rows.select(range(num_rows or len(rows))).train_test_split(0.2, seed=0)


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIAL.values(), *sorted({word for text in texts for word in text.split()})]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)
