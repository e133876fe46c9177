"""Values as text for a page: numbers of one form, and texts that no browser chokes on."""

from __future__ import annotations

import math
import re
from numbers import Integral, Real
from typing import Any

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(value: Any, longest: int | None = None) -> str:
    r"""Return a value as text without characters that HTML cannot hold.

    Control characters become their pictures, and halves of characters the sign for such. HTML is
    not escaped here, which the template does.

    Args:
        value: The value.
        longest: Number of characters to keep; None keeps all.

    >>> clean("a\0b"), clean("x" * 5_000, longest=3)
    ('a␀b', 'xxx … (5,000 characters)')
    """
    text = str(value)
    if longest is not None and len(text) > longest:
        text = f"{text[:longest]} … ({len(text):,} characters)"
    return _UNSEEN.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "\ufffd"


def shorten(value: Any, longest: int) -> str:
    """Return a value as text of at most ``longest`` characters, and how many there were."""
    return clean(value, longest)


def number(value: Any, digits: int = 4) -> str:
    """Return a number as text: counts whole, others with ``digits`` digits after the point.

    >>> [number(value) for value in (1377, 0.5, 5e-5, 1.25e9, float("nan"), True, "cat")]
    ['1,377', '0.5000', '5.000e-05', '1.250e+09', 'NaN', 'yes', 'cat']
    """
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if not isinstance(value, Real):
        return shorten(value, 200)
    value = float(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    is_usual = value == 0 or 10**-digits * 10 <= abs(value) < 1e7
    return f"{value:,.{digits}f}" if is_usual else f"{value:.3e}"


def percent(share: float) -> str:
    """Return a share in percent, which is neither 0 nor 100 unless it is none or all.

    >>> percent(0.0521), percent(1.0), percent(0.0), percent(0.0002), percent(0.9999)
    ('5.2 %', '100.0 %', '0.0 %', 'under 0.1 %', 'over 99.9 %')
    """
    if 0 < share < 0.0005:
        return "under 0.1 %"
    if 0.9995 <= share < 1:
        return "over 99.9 %"
    return "NaN" if math.isnan(share) else f"{100 * share:.1f} %"


def short(value: float) -> str:
    """Return a number with what it has behind the point, if that is something.

    >>> short(3.0), short(12_000.0), short(0.41667)
    ('3', '12,000', '0.41667')
    """
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.5g}"


def duration(seconds: float) -> str:
    """Return a time in the units that one would speak of.

    >>> duration(0.25), duration(72), duration(7_500), duration(200_000)
    ('0.2 s', '1 min 12 s', '2 h 5 min', '2 d 7 h')
    >>> duration(2_100), duration(59.97)
    ('35 min', '1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, small, small_unit in _UNITS:
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s"


_UNITS = ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def amount(value: float) -> str:
    """Return a large count in short: "109.5 M".

    >>> amount(950), amount(22_713_216), amount(7.2e9), amount(12_340)
    ('950', '22.7 M', '7.2 B', '12.3 k')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{value:,.0f}"
