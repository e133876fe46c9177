"""Lists of words, of which a tokenizer is to make the tokens that it makes of a text of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from manualloop.errors import DataError

_NO_SPACES_FROM = "\u0e00"  # Thai; above it are the scripts that put no spaces between words


def require_spaces(tokenizer: Any, rows: Iterable[Sequence[str]], column: str) -> None:
    """Refuse a tokenizer that joins the words of a list, between which a text has spaces.

    A tokenizer of bytes has the space among the tokens of a word. Of a list it makes the tokens of
    words that follow each other without a space, as the model has never seen them.

    Args:
        tokenizer: The tokenizer.
        rows: The words of some rows.
        column: Name of their column.

    Raises:
        DataError: The message has the lines that put the spaces there.
    """
    pairs = (pair for row in rows for pair in pairwise(row))
    pair = next((pair for pair in pairs if all(map(_is_word, pair))), None)
    if pair is None:
        return
    options = {"add_special_tokens": False}
    of_list = tokenizer(list(pair), is_split_into_words=True, **options)["input_ids"]
    of_text = tokenizer(" ".join(pair), **options)["input_ids"]
    if list(of_list) == list(of_text):
        return
    shown = [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (of_list, of_text)]
    spaced = f'[" " * (n > 0) + word for n, word in enumerate(row["{column}"])]'
    fixes = [f'put the spaces into the words: dataset.map(lambda row: {{"{column}": {spaced}}})']
    splits = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", "ByteLevel")
    # Others have the attribute as well, and do nothing with it.
    if getattr(tokenizer, "add_prefix_space", None) is False and "ByteLevel" in str(splits):
        load = "AutoTokenizer.from_pretrained(name, add_prefix_space=True)"
        fixes.insert(0, f"load it with a space before each word: {load}")
    line = ", or ".join(fixes)
    raise DataError(
        f"{type(tokenizer).__name__} makes of the words {list(pair)} the tokens {shown[0]!r}, and "
        f"of a text with a space between them {shown[1]!r}. {line[0].upper()}{line[1:]}."
    )


def _is_word(text: str) -> bool:
    return text.isalpha() and max(text) < _NO_SPACES_FROM
