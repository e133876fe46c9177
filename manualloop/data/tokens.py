"""What became of the texts: rows without a token are refused, texts that are cut off counted."""

from __future__ import annotations

from collections.abc import Iterable

from manualloop.data.mapping import CUT, Encode
from manualloop.data.splits import Split
from manualloop.errors import DataError
from manualloop.mistakes import no_tokens_fix
from manualloop.notices import say
from manualloop.types import SplitNotes


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


def count_cuts(split: Split) -> Split:
    """Count the texts of a tokenized split that were cut off, and drop the column of notes."""
    if CUT not in split.first:
        return split
    from manualloop.data.values import count_true

    number = None if split.is_stream else count_true(split, CUT)
    split = split.select([name for name in split.kinds if name != CUT])
    return split._replace(num_cut=number)


def notes_on(split: Split, encode: Encode | None, names: tuple[str, ...] | None) -> SplitNotes:
    """Return the notes on a prepared split."""
    if encode is None or split.num_cut is None:
        return SplitNotes(names)
    return SplitNotes(names, split.num_cut, len(split.rows), encode.limit)


def tell_cuts(splits: Iterable[Split], encode: Encode | None) -> None:
    """Log in one line how many texts are cut off, if any is."""
    found = [(split, split.num_cut, len(split.rows)) for split in splits if split.num_cut]
    if encode is None or not found:
        return
    shares = [f"{share_of(n, total)} of {s.name} ({n} of {total})" for s, n, total in found]
    say(f"texts are cut off at {encode.limit} tokens: {', '.join(shares)}")


def share_of(number: int, total: int) -> str:
    """Return a share in percent, which is neither 0% nor 100% unless it is none or all.

    >>> share_of(1, 2), share_of(1, 300), share_of(1, 67349), share_of(299, 300)
    ('50%', '0.3%', 'under 0.1%', '99.7%')
    """
    percent = 100 * number / total
    if 0 < percent < 0.1:
        return "under 0.1%"
    if 99.9 < percent < 100:
        return "over 99.9%"
    return f"{percent:.0f}%" if 10 <= percent <= 90 or percent in (0, 100) else f"{percent:.1f}%"
