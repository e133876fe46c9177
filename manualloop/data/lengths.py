"""The number of tokens of each row, by which batches are grouped."""

from __future__ import annotations

from collections.abc import Sequence

from manualloop.data.functions import Functions
from manualloop.data.grouping import Ints, round_up
from manualloop.data.labels import BY_TOKEN
from manualloop.data.nested import holds_nested
from manualloop.data.splits import Split
from manualloop.errors import ConfigError, DataError
from manualloop.notices import say


def lengths_of_rows(
    split: Split,
    texts: Sequence[str],
    task: str | None,
    keep: Sequence[str],
    multiple: int,
    max_tokens: int | None,
    group_by_length: bool,
    functions: Functions,
) -> Ints | None:
    """Return the number of tokens of each row, int64 ``(rows,)``; None if the order ignores it.

    A row of several lists has the tokens of all of them, each padded to the longest.

    Raises:
        ConfigError: The split is a stream, or has no column of lists of numbers, or a row has more
            tokens than a batch.
        DataError: A row has no tokens.
    """
    if max_tokens is None and not (group_by_length and split.is_train):
        return None
    lengths, num_lists = None, 1
    if hasattr(split.rows, "__len__"):
        from manualloop.data.tables import as_tables
        from manualloop.data.values import longest_in

        kinds = split.kinds
        lists = [name for name in kinds if kinds[name] == "list" and name not in keep]
        names = ["input_ids"] if "input_ids" in lists else lists[:1]
        if holds_nested(split):
            num_lists = len(split.first["input_ids"])
            lengths = longest_in(split, "input_ids")
        else:
            if "labels" in lists and (task in BY_TOKEN or task == "seq2seq_lm"):
                names.append("labels")
            lengths = as_tables(split.rows).lengths(names)
    if lengths is None:
        asked = "group_by_length=True" if max_tokens is None else f"max_tokens={max_tokens}"
        raise ConfigError(
            f"{asked} needs the number of tokens of each row of {split.name}, which is a stream or "
            "has no column of lists of numbers. Remove the argument."
        )
    row = int(lengths.argmin())
    if lengths[row] == 0:
        column = (*texts, *names)[0]
        line = split.fix(f'filter(lambda row: len(row["{column}"]) > 0)')
        raise DataError(
            f"Row {row} of {split.name} has no tokens, so grouping by length would make a batch "
            f"without tokens. Filter such rows out: {line}."
        )
    lengths = num_lists * round_up(lengths, multiple)
    row = int(lengths.argmax())
    if max_tokens is not None and lengths[row] > max_tokens:
        shorter = f"Use max_length={max_tokens}"
        if functions.cut is not None:
            call = functions.cut.format(room=max_tokens // num_lists)
            shorter = f"Cut rows where they are made, {call},"
        raise ConfigError(
            f"Row {row} of {split.name} has {lengths[row]} tokens, but a batch holds at most "
            f"max_tokens={max_tokens}. {shorter} or use a larger max_tokens."
        )
    if max_tokens is not None and (words := getattr(functions.transform, "lengthens", None)):
        say(f"{split.name}: batches may have more than max_tokens={max_tokens} tokens: {words}")
    return lengths
