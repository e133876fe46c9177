"""What of the data is lost: texts without a token or cut off, padding, labels that do not count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from manualloop.data.grouping import Ints, grouped_order, round_up
from manualloop.data.mapping import CUT, Encode
from manualloop.data.sampler import OrderedBatchSampler
from manualloop.data.splits import Split, reference_of
from manualloop.errors import DataError
from manualloop.mistakes import as_map, no_tokens_fix
from manualloop.models import accepts, model_name
from manualloop.notices import say
from manualloop.tasks.made import share_of
from manualloop.tasks.mixing import mixes_padding
from manualloop.tasks.task import IGNORE_INDEX


def require_tokens(raw: Split, split: Split, encode: Encode) -> None:
    """Refuse a text of which the tokenizer made no token.

    Raises:
        DataError: The message counts such rows.
    """
    from manualloop.data.values import lengths_of

    if split.is_stream or split.kinds.get("input_ids") != "list":
        return
    lengths = lengths_of(split, "input_ids")
    if lengths is None or lengths.all():
        return
    row = int((lengths == 0).argmax())
    cells = {name: raw.rows[row][name] for name in encode.texts}
    fix = no_tokens_fix(encode.texts, cells, encode.tokenizer, raw.fix(encode.filter_call()))
    raise DataError(
        f"The tokenizer makes no token of row {row} of {split.name}: {cells!r:.200}. Such rows: "
        f"{int((lengths == 0).sum())} of {len(lengths)}. {fix}"
    )


def refuse_doubled(raw: Split, split: Split, encode: Encode) -> None:
    """Refuse texts that hold the special tokens which the tokenizer puts around a text.

    A rendered chat begins with ``bos_token``: tokenized like any other text it would have two of
    them, as no text has in generation.

    Raises:
        DataError: The message has the line that leaves them out of the texts.
    """
    if split.is_stream or len(encode.texts) > 1 or split.kinds.get("input_ids") != "list":
        return
    column, tokenizer = encode.texts[0], encode.tokenizer
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for row, ids in enumerate(split.rows[:_NUM_LOOKED_AT]["input_ids"]):
        if len(ids) > 2 and ids[0] == ids[1] and ids[0] in special:
            token, change, where = tokenizer.convert_ids_to_tokens(ids[0]), "removeprefix", "begins"
        elif len(ids) > 2 and ids[-1] == ids[-2] and ids[-1] in special:
            token, change, where = tokenizer.convert_ids_to_tokens(ids[-1]), "removesuffix", "ends"
        else:
            continue
        text = raw.rows[row][column]
        if not isinstance(text, str) or getattr(text.strip(), change)(token) == text.strip():
            continue
        cell = f'row["{column}"].strip()' if text != text.strip() else f'row["{column}"]'
        line = raw.fix(f'map(lambda row: {{"{column}": {cell}.{change}("{token}")}})')
        raise DataError(
            f"Row {row} of {split.name} {where} with {token!r}, and the tokenizer adds another: "
            f"{text!r:.80}. If these are chats, train on their messages: preprocess=manualloop."
            f"tasks.chat(tokenizer). Else leave it out of the texts: {line}."
        )


_NUM_LOOKED_AT = 100


def tell_tokens(splits: Mapping[Any, Split], tokenizer: Any, model: nn.Module | None) -> None:
    """Log what is strange about rows that were tokenized elsewhere: two beginnings, padding."""
    _tell_doubled(reference_of(splits), tokenizer)
    has_mask = "attention_mask" in getattr(tokenizer, "model_input_names", ())
    if has_mask and (model is None or accepts(model, "attention_mask")):
        for split in splits.values():
            _tell_unmasked(split, tokenizer)


def _tell_doubled(split: Split, tokenizer: Any) -> None:
    """Log that rows which were tokenized elsewhere begin with two tokens that begin a text."""
    ids, bos = split.first.get("input_ids"), getattr(tokenizer, "bos_token_id", None)
    if bos is not None and isinstance(ids, list) and ids[:2] == [bos, bos]:
        say(
            f"the first row of {split.name} begins with {tokenizer.bos_token!r} twice, as no text "
            "does in generation: a rendered chat has one already. Tokenize it with "
            "add_special_tokens=False, or its messages with manualloop.tasks.chat(tokenizer)"
        )


def _tell_unmasked(split: Split, tokenizer: Any) -> None:
    """Log that rows which were tokenized elsewhere hold padding that no mask hides.

    A single token of padding may be the end of a text, where both are one token.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    kinds = split.kinds
    if pad is None or kinds.get("input_ids") != "list" or "attention_mask" in kinds:
        return
    looked_at = [split.first] if split.is_stream else split.rows.select_columns(["input_ids"])
    rows = [row["input_ids"] for row, _ in zip(looked_at, range(_NUM_LOOKED_AT), strict=False)]
    if number := sum(len(ids) > 2 and [pad] * 2 in (ids[:2], ids[-2:]) for ids in rows):
        mask = f'[int(token != {pad}) for token in row["input_ids"]]'
        say(
            f"{number} of the first {len(rows)} rows of {split.name} are padded with "
            f"{tokenizer.pad_token!r} and have no attention_mask, so that the model reads the "
            "padding as text. Tokenize without padding=, as batches are padded here, or keep the "
            f"mask. To make it again: {split.fix(as_map('attention_mask', mask))}"
        )


def count_cuts(split: Split) -> Split:
    """Count the texts of a tokenized split that were cut off, and drop the column of notes."""
    if CUT not in split.first:
        return split
    from manualloop.data.values import count_true

    number = None if split.is_stream else count_true(split, CUT)
    split = split.select([name for name in split.kinds if name != CUT])
    return split._replace(num_cut=number)


def tell_lost(splits: Iterable[Split], encode: Encode | None, task: str | None) -> None:
    """Log in a line each how many texts are cut off, and how many labels count in no loss."""
    splits = list(splits)
    _tell_cuts(splits, encode)
    _tell_ignored(splits, task)


def _tell_cuts(splits: Iterable[Split], encode: Encode | None) -> None:
    """Log in one line how many texts are cut off, if any is."""
    found = [(split, split.num_cut, len(split.rows)) for split in splits if split.num_cut]
    if encode is None or not found:
        return
    shares = [f"{share_of(n, total)} of {s.name} ({n} of {total})" for s, n, total in found]
    say(f"texts are cut off at {encode.limit} tokens: {', '.join(shares)}")


def tell_padding(loaders: Iterable[Any]) -> None:
    """Log how much of the batches of training is padding, where sorting by length saves most of it.

    Nothing is logged of a few batches, nor of those that somebody else's function makes.
    """
    for loader in loaders:
        sampler, find = loader.batch_sampler, getattr(loader.collate_fn, "padded_lengths", None)
        if find is None or not isinstance(sampler, OrderedBatchSampler) or not sampler.shuffle:
            continue
        if sampler.lengths is not None or len(sampler) < _FEW_BATCHES:
            continue
        if (lengths := find(loader.dataset)) is None:
            continue
        size, (tokens, places) = sampler.batch_size, loader.collate_fn.input_lengths(loader.dataset)
        share = padding_of(places, sampler.rows(0), size, tokens)
        if share < _MUCH_PADDING:
            continue
        grouped = padding_of(places, grouped_order(lengths, size, sampler.seed, 0), size, tokens)
        if grouped < share / 2:
            say(
                f"{share_of(share, 1)} of the tokens in the batches of {sampler.split} are "
                f"padding; with group_by_length=True it is {share_of(grouped, 1)}"
            )


def tell_mixed_padding(
    model: nn.Module | None, loaders: Iterable[Any], tokenizer: Any, multiple: int
) -> None:
    """Log that a model sees the padding of its batches, if it is of a family that does."""
    if model is None or not mixes_padding(model):
        return
    fix = 'pad on the left: tokenizer.padding_side = "left"'
    is_by_last = "XLNet" in model_name(model)
    if is_by_last and getattr(tokenizer, "padding_side", None) == "left":
        return
    longest = 0
    for loader in loaders:
        rows = loader.dataset
        if "input_ids" in getattr(rows, "column_names", ()) and hasattr(rows, "lengths"):
            lengths = rows.lengths(["input_ids"])
            if lengths is not None and len(np.unique(rounded := round_up(lengths, multiple))) > 1:
                longest = max(longest, int(rounded.max()))
    if not longest:
        return
    if not is_by_last:
        fix = f"give all rows one length: prepare_dataloaders(..., pad_to_multiple_of={longest})"
    say(
        f"{model_name(model)} sees padding, whatever its attention mask says: what it makes of a "
        "row, losses and scores depend on the longest row of its batch. For numbers that do not, "
        f"{fix}."
    )


_FEW_BATCHES = 20
_MUCH_PADDING = 0.2


def padding_of(
    lengths: Ints, rows: Sequence[int], batch_size: int, tokens: Ints | None = None
) -> float:
    """Return the share of padding in the batches of an order of rows.

    Args:
        lengths: Smallest padded length of each row.
        rows: The order.
        batch_size: Number of rows of a batch.
        tokens: Number of tokens of each row; None takes the lengths.

    >>> round(padding_of(np.array([2, 4, 3, 3]), [0, 1, 2, 3], batch_size=2), 4)
    0.1429
    """
    ordered = lengths[np.asarray(rows)]
    starts = np.arange(0, len(ordered), batch_size)
    sizes = np.diff(starts, append=len(ordered))
    num_tokens = (lengths if tokens is None else tokens)[np.asarray(rows)].sum()
    return 1 - float(num_tokens / (np.maximum.reduceat(ordered, starts) * sizes).sum())


def _tell_ignored(splits: Iterable[Split], task: str | None) -> None:
    """Log which labels count in no loss: rows without any other, and more than half of all."""
    if task not in _IGNORING:
        return
    rows, labels = [], []
    for split in splits:
        if split.is_stream or split.kinds.get("labels") not in ("int", "class", "list"):
            continue
        from manualloop.data.values import count_ignored

        number, total, num_empty = count_ignored(split, "labels")
        if num_empty:
            of_all = len(split.rows)
            shown = f"({num_empty} of {of_all})"
            rows.append(f"{share_of(num_empty, of_all)} of {split.name} {shown}")
        if split.kinds["labels"] == "list" and 2 * number > total:
            labels.append(f"{share_of(number, total)} of those of {split.name}")
    if rows:
        say(f"rows whose only label is {IGNORE_INDEX} count in no loss: {', '.join(rows)}")
    if labels:
        say(f"labels that are {IGNORE_INDEX} count in no loss: {', '.join(labels)}")


_IGNORING = (
    *("single_label_classification", "multi_label_classification", "token_classification"),
    *("multiple_choice", "masked_lm", "causal_lm", "seq2seq_lm"),
)
