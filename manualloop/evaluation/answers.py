"""The metric of answers that are to be equal to the right one: ``exact_match`` of evaluate."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = str.maketrans("", "", string.digits)


def exact_match(
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    regexes_to_ignore: Sequence[str] | None = None,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> dict[str, float]:
    """Return the share of rows whose prediction equals the reference.

    Args:
        predictions: A text, or anything else that can be compared, such as a row of tokens.
        references: The right one; for a text also a list of several right ones.
        regexes_to_ignore: Patterns that are cut out of texts, before anything else; also of those
            in a row of several texts, as the options below.
        ignore_case: Whether upper and lower case are equal.
        ignore_punctuation: Whether ASCII punctuation is cut out.
        ignore_numbers: Whether the digits 0 to 9 are cut out.

    >>> exact_match(["a cat", "dogs"], ["a cat", ["a dog", "dogs"]])
    {'exact_match': 1.0}
    """

    def clean(text: Any) -> Any:
        text = text.tolist() if hasattr(text, "tolist") else text
        if type(text) in (list, tuple):
            return type(text)(map(clean, text))
        if not isinstance(text, str):
            return text
        for pattern in regexes_to_ignore or ():
            text = re.sub(pattern, "", text)
        text = text.lower() if ignore_case else text
        text = text.translate(_PUNCTUATION) if ignore_punctuation else text
        return text.translate(_DIGITS) if ignore_numbers else text

    num_equal = 0
    for prediction, reference in zip(predictions, references, strict=True):
        has_several = isinstance(prediction, str) and isinstance(reference, list | tuple)
        right = map(clean, reference if has_several else [reference])
        num_equal += clean(prediction) in list(right)
    return {"exact_match": num_equal / len(predictions)}
