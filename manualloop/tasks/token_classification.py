"""Token classification: words and a tag for each, as tokens and labels.

A word may be several tokens, of which the first has the word's label and the others -100, which
neither the loss nor a metric counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar

from manualloop.errors import DataError
from manualloop.tasks.made import Made, Place, Rows, place_in_batch, share_of_all
from manualloop.tasks.numbers import whole_number
from manualloop.tasks.task import IGNORE_INDEX
from manualloop.tasks.texts import limit_of, require_columns
from manualloop.tasks.words import require_spaces

_PROBE = -1  # no token has this number


def tag_words(
    tokenizer: Any,
    words: str = "tokens",
    tags: str = "ner_tags",
    *,
    label_all: bool = False,
    max_length: int | None = None,
    names: Sequence[str] | None = None,
) -> Callable[[Rows], dict[str, list[Any]]]:
    """Return a ``preprocess`` that tokenizes words and gives their tags to the tokens.

    ::

        loaders = prepare_dataloaders(
            data, tokenizer, model=model, preprocess=tag_words(tokenizer, tags="ner_tags")
        )
        evaluate = partial(evaluate_loop, model, loaders["validation"], "seqeval")

    The first token of a word has its label, the others have -100, as special tokens do. Words that
    are cut off, and those of which the tokenizer makes no token, are neither trained nor scored;
    ``prepare_dataloaders`` reports their share. It also numbers tags that are strings, and those
    whose numbers differ from split to split or from the model's.

    Args:
        tokenizer: Tokenizer, fast or not.
        words: Column of lists of words.
        tags: Column of lists of tags, one for each word: numbers or strings. Rows of a split
            without it get no labels.
        label_all: Whether every token of a word has its label. A tag B-PER continues as I-PER
            where there is such a tag; the tags of other schemes, such as S-PER and E-PER, become
            those of a span of as many tokens.
        max_length: Number of tokens at which rows are cut off; None uses the tokenizer's limit.
        names: Names of the tags by number. ``prepare_dataloaders`` finds those of the data and the
            model; they are needed for strings in a stream, and for calls of your own.

    Returns:
        A function from a batch of rows to what the tokenizer makes of them and ``labels``.
    """
    return TagWords(
        tokenizer, words, tags, label_all, max_length, None if names is None else tuple(names)
    )


@dataclass(frozen=True, eq=False)
class TagWords:
    """The function that ``tag_words`` returns; its arguments are the attributes.

    Attributes:
        labels_of: Column that the labels are made of.
    """

    tokenizer: Any = field(repr=False)
    words: str
    labels_of: str
    label_all: bool
    max_length: int | None
    names: tuple[str, ...] | None
    cut_call: ClassVar[str] = "tag_words(tokenizer, max_length={room})"

    @property
    def label_column(self) -> str:
        """The column that labels are made of."""
        return self.labels_of

    def named(self, names: Sequence[str]) -> TagWords:
        """Return the same function with other names of the tags."""
        return replace(self, names=tuple(names))

    def __call__(self, rows: Rows) -> dict[str, list[Any]]:
        """Return tokens and labels."""
        return self.make(rows, place_in_batch).columns

    def make(self, rows: Rows, place: Place) -> Made:
        """Return tokens and labels, and how many words are cut off or have no token.

        Raises:
            DataError: A row has no words, or not as many tags; or its tags have no numbers.
        """
        require_columns(rows, (self.words,), "tag_words(tokenizer, words=)")
        words = [_words_of(row, self.words, place(n)) for n, row in enumerate(rows[self.words])]
        require_spaces(self.tokenizer, words, self.words)
        tokenized, places, cut = self._tokenize(words)
        made = {name: list(column) for name, column in tokenized.items()}
        if self.labels_of in rows:
            pairs = enumerate(zip(rows[self.labels_of], words, strict=True))
            tags = [_tags_of(*pair, self, place(number)) for number, pair in pairs]
            numbered = [
                None if row is None else [self._number(tag, place(number)) for tag in row]
                for number, row in enumerate(tags)
            ]
            made["labels"] = [*map(self._labels, numbered, places)]
        num_words, num_left = sum(map(len, words)), sum(len({*row} - {None}) for row in places)
        counts = Counter(words=num_words, cut=sum(cut), dropped=num_words - num_left - sum(cut))
        return Made(made, list(range(len(words))), counts)

    def describe(self, counts: Mapping[str, int]) -> list[str]:
        """Return which words are neither trained nor scored."""
        limit = limit_of(self.tokenizer, self.max_length)
        found = (
            ("cut", f"words are cut off at {limit} tokens"),
            ("dropped", "words of which the tokenizer makes no token"),
        )
        lines = [
            f"{words}: {share_of_all(counts[name], counts['words'])}"
            for name, words in found
            if counts.get(name)
        ]
        return [*lines, "they are neither trained nor scored"] if lines else []

    def _tokenize(
        self, words: list[list[str]]
    ) -> tuple[Mapping[str, list[Any]], list[list[int | None]], list[int]]:
        """Return what the tokenizer makes; the word of each token; the number of words cut off."""
        limit = limit_of(self.tokenizer, self.max_length)
        options = {"truncation": limit is not None, "max_length": limit}
        if getattr(self.tokenizer, "is_fast", False):
            encoded = self.tokenizer(words, is_split_into_words=True, **options)
            places = [encoded.word_ids(row) for row in range(len(words))]
            beyond = [
                {word for part in encoding.overflowing for word in part.word_ids}
                for encoding in encoded.encodings
            ]
            cut = [len(lost - {*kept}) for lost, kept in zip(beyond, places, strict=True)]
            return encoded, places, cut
        made: dict[str, list[Any]] = {}
        found = [_tokenize_slowly(self.tokenizer, row, options) for row in words]
        for row, _, _ in found:
            for name, column in row.items():
                made.setdefault(name, []).append(column)
        return made, [of_row for _, of_row, _ in found], [number for _, _, number in found]

    def _number(self, tag: Any, where: str) -> int | None:
        """Return the number of a tag; None for None and an empty string, which stand for no tag."""
        if tag is None or tag == "":
            return None
        if not isinstance(tag, str):
            if (number := whole_number(tag)) is None:
                raise DataError(
                    f"The tag {tag!r} in {self.labels_of!r} of {where} is no whole number. Correct "
                    "it, or make strings of the tags."
                )
            return number
        if self.names is None or tag not in self.names:
            known = "none are known" if self.names is None else f"they are {', '.join(self.names)}"
            raise DataError(
                f"The tag {tag!r} in {self.labels_of!r} of {where} has no number: names give tags "
                f"their numbers, and {known}. Name all of them in this order: "
                f"tag_words(tokenizer, names={[*(self.names or ()), tag]})."
            )
        return self.names.index(tag)

    def _labels(
        self, tags: Sequence[int | None] | None, places: Sequence[int | None]
    ) -> list[int | None] | None:
        """Return the label of each token of a row."""
        if tags is None:
            return None
        labels: list[int | None] = []
        for place, group in groupby(places):
            number = len([*group])
            if place is None:
                labels += [IGNORE_INDEX] * number
            elif self.label_all:
                labels += self._all(tags[place], number)
            else:
                labels += [tags[place], *[IGNORE_INDEX] * (number - 1)]
        return labels

    def _all(self, tag: int | None, number: int) -> list[int | None]:
        """Return the labels of all tokens of a word.

        Raises:
            DataError: The tags have no names, or one of a span of several tokens is not among them.
        """
        if tag is None or tag < 0 or number == 1:
            return [tag] * number
        if self.names is None:
            raise DataError(
                f"label_all=True needs the names of the tags in {self.labels_of!r}, because B-PER "
                "continues as I-PER, and they are numbers without names. Name them: "
                'tag_words(tokenizer, label_all=True, names=["O", "B-PER", "I-PER"]).'
            )
        name = self.names[tag] if tag < len(self.names) else ""
        wanted = spread(name, number, self.names)
        if missing := [one for one in wanted if one not in self.names and one != name]:
            raise DataError(
                f"With label_all=True a word of {number} tokens whose tag is {name!r} becomes "
                f"{', '.join(wanted)}, and there is no tag {missing[0]!r} in {self.labels_of!r}. "
                "Leave label_all out, or name it as well: tag_words(tokenizer, label_all=True, "
                f"names={[*self.names, missing[0]]})."
            )
        return [tag if one == name else self.names.index(one) for one in wanted]


def spread(tag: str, number: int, names: Sequence[str]) -> list[str]:
    """Return the tags of the tokens of a word.

    Args:
        tag: The tag of the word.
        number: Number of its tokens.
        names: All tags, of which those with S, E, L and U belong to other schemes than B and I.

    >>> names = ["O", "B-A", "I-A", "E-A", "S-A"]
    >>> [spread(tag, 3, names) for tag in ("O", "B-A", "E-A", "S-A")]
    [['O', 'O', 'O'], ['B-A', 'I-A', 'I-A'], ['I-A', 'I-A', 'E-A'], ['B-A', 'I-A', 'E-A']]
    >>> spread("B-A", 2, ["O", "B-A"])
    ['B-A', 'B-A']
    """
    letter, before, after = _parts(tag)
    inside = f"{before}I{after}"
    is_scheme = any(_parts(name)[0] == "B" for name in names)
    if letter not in _ENDS or not is_scheme or (letter == "B" and inside not in names):
        return [tag] * number
    first, last = _ENDS[letter]
    return [f"{before}{one}{after}" for one in (first, *"I" * (number - 2), last)]


_ENDS = {"B": ("B", "I"), "E": ("I", "E"), "L": ("I", "L"), "S": ("B", "E"), "U": ("B", "L")}
"""The first and the last tag of a word of several tokens, by the letter of its tag."""


def _parts(tag: str) -> tuple[str, str, str]:
    """Return the letter of a tag such as B-PER or PER-B, and what is before and after it."""
    if tag[1:2] in ("-", "_"):
        return tag[:1], "", tag[1:]
    return (tag[-1:], tag[:-1], "") if tag[-2:-1] in ("-", "_") else ("", tag, "")


def _words_of(row: Any, column: str, where: str) -> list[str]:
    """Return the words of a row.

    Raises:
        DataError: They are no list of strings.
    """
    if isinstance(row, list | tuple) and all(isinstance(word, str) for word in row):
        return list(row)
    raise DataError(
        f"tag_words takes a list of words a row, and {column!r} in {where} is {row!r:.80}. For "
        f'texts split them: dataset.map(lambda row: {{"{column}": row["{column}"].split()}}); for '
        f'words that are None: dataset.map(lambda row: {{"{column}": [word or "" for word in '
        f'row["{column}"]]}}).'
    )


def _tags_of(tags: Any, words: Sequence[str], function: TagWords, where: str) -> Any:
    """Return the tags of a row; None if it has none.

    Raises:
        DataError: They are not as many as the words.
    """
    if tags is None or (isinstance(tags, list | tuple) and len(tags) == len(words)):
        return tags
    found = f"{len(tags)} tags" if isinstance(tags, list | tuple) else f"{tags!r:.60}"
    raise DataError(
        f"{where.capitalize()} has {len(words)} words in {function.words!r} and {found} in "
        f"{function.labels_of!r}: {list(words)!r:.120}. Correct it, or leave such rows out: "
        f'dataset.filter(lambda row: len(row["{function.words}"]) == '
        f'len(row["{function.labels_of}"])).'
    )


def _tokenize_slowly(
    tokenizer: Any, words: Sequence[str], options: Mapping[str, Any]
) -> tuple[Mapping[str, list[Any]], list[int | None], int]:
    """Tokenize a row with a tokenizer that does not tell the word of each token.

    Returns:
        What the tokenizer makes of the row, the word of each token, and how many words are cut off.

    Raises:
        DataError: It makes other tokens of a word alone than among others.
    """
    # Without words there is nothing that is split.
    encoded = tokenizer(list(words) or "", is_split_into_words=bool(words), **options)
    of_words = [
        tokenizer([word], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        for word in words
    ]
    flat = [(token, number) for number, ids in enumerate(of_words) for token in ids]
    ids = encoded["input_ids"]
    kept = len(ids) - tokenizer.num_special_tokens_to_add()
    start = tokenizer.build_inputs_with_special_tokens([_PROBE]).index(_PROBE)
    is_left = getattr(tokenizer, "truncation_side", "right") == "left"
    part = flat[max(len(flat) - kept, 0) :] if is_left else flat[:kept]
    if ids[start : start + kept] != [token for token, _ in part]:
        raise DataError(
            f"{type(tokenizer).__name__} makes other tokens of a word alone than among others, and "
            f"does not tell the word of a token: {list(words)!r:.120}. Load a fast tokenizer: "
            "AutoTokenizer.from_pretrained(name, use_fast=True)."
        )
    places: list[int | None] = [None] * len(ids)
    places[start : start + kept] = [number for _, number in part]
    num_cut = len({number for _, number in flat} - {number for _, number in part})
    return encoded, places, num_cut
