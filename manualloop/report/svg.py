"""Charts as inline SVG: drawn of plain numbers, coloured by the style of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from markupsafe import Markup, escape

from manualloop.report.text import clean

WIDTH, HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 20, 40
_MOST_POINTS = 300

Point = tuple[float, float]
Band = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of a chart.

    Attributes:
        name: Name in the legend.
        kind: Class in the style of the page: ``"quiet"`` or ``"accent"``.
        points: Places and values, in the order of the places. Values that are not finite are gaps.
        band: Places with the ends of an interval around the values.
        has_dots: Whether each point has a dot.
    """

    name: str
    kind: str
    points: Sequence[Point]
    band: Sequence[Band] = ()
    has_dots: bool = False


class Bin(NamedTuple):
    """Predictions of about the same confidence.

    Attributes:
        low: Least confidence.
        high: Greatest confidence.
        num_rows: Number of predictions.
        confidence: Mean confidence; NaN without predictions.
        accuracy: Share of them that is right; NaN without predictions.
    """

    low: float
    high: float
    num_rows: int
    confidence: float
    accuracy: float


class _Scale(NamedTuple):
    """From values to places in a picture.

    Attributes:
        low: The value at the first place.
        high: The value at the last place.
        first: The first place.
        last: The last place.
    """

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)


def line_chart(
    key: str,
    title: str,
    lines: Sequence[Line],
    *,
    mark: float | None = None,
    last: float | None = None,
    x_name: str = "update",
) -> Markup | None:
    """Draw curves over the updates of a run; None if no value can be drawn.

    Args:
        key: Beginning of the ids in the picture, which no other picture has.
        title: What it shows.
        lines: The curves.
        mark: Place of the best update.
        last: The last place, so that pictures of one run are equally long; None takes that of the
            curves. They then begin at 0.
        x_name: Name of the places.
    """
    places = [x for line in lines for x, y in line.points if math.isfinite(y)]
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    if not values:
        return None
    ends = [end for line in lines for _, *pair in line.band for end in pair if math.isfinite(end)]
    first = min(places) if last is None else 0
    end = max(places) if last is None else max(last, *places)
    x = _Scale(*_padded(first, end, 0), _LEFT, WIDTH - _RIGHT)
    low, high = _padded(min(values + ends), max(values + ends), 0.06)
    if low < 0 <= min(values + ends):
        low = 0.0
    y = _Scale(low, high, HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x, y, x_name)]
    parts += [_band(line, x, y) for line in lines if line.band]
    if mark is not None and x.low <= mark <= x.high:
        parts.append(_mark(x(mark)))
    parts += [_curve(line, x, y) for line in lines]
    described = "; ".join(text for line in lines if (text := _in_words(line, x_name)))
    best = "" if mark is None else f" The best evaluation is at {x_name} {mark:,.0f}."
    return _picture(key, title, f"{described}.{best}", parts)


def reliability_chart(key: str, title: str, bins: Sequence[Bin]) -> Markup:
    """Draw the accuracy of predictions over their confidence, above the number of predictions."""
    height, floor, base = 330, 236, 318
    x = _Scale(0, 1, _LEFT, WIDTH - _RIGHT)
    y = _Scale(0, 1, floor, _TOP)
    most = max(entry.num_rows for entry in bins)
    count = _Scale(0, most, base, 276)
    parts = [_grid(x, y, "confidence", floor)]
    for entry in bins:
        if not entry.num_rows:
            continue
        left, width = x(entry.low) + 2, x(entry.high) - x(entry.low) - 4
        parts.append(_box("bar accent", left, y(entry.accuracy), width, floor))
        parts.append(_box("bar quiet", left, count(entry.num_rows), width, base))
    parts.append(_path("diagonal", f"M{x(0):.1f} {y(0):.1f}L{x(1):.1f} {y(1):.1f}"))
    parts.append(f'<text x="{_LEFT - 8}" y="{base}" class="end">0</text>')
    parts.append(f'<text x="{_LEFT - 8}" y="284" class="end">{tick_labels([most])[0]}</text>')
    shown = [
        f"{entry.low:.0%} to {entry.high:.0%}: {entry.accuracy:.0%} right of {entry.num_rows:,}"
        for entry in bins
        if entry.num_rows
    ]
    text = f"Confidence, and the share that is right. {'; '.join(shown)}."
    return _picture(key, title, text, parts, height)


def scatter_chart(key: str, title: str, points: Sequence[Point]) -> Markup | None:
    """Draw predicted over true values, with the line on which both are equal."""
    points = [p for p in points if all(map(math.isfinite, p))]
    if not points:
        return None
    numbers = [value for point in points for value in point]
    low, high = _padded(min(numbers), max(numbers), 0.04)
    height = 360
    x = _Scale(low, high, _LEFT, WIDTH - _RIGHT)
    y = _Scale(low, high, height - _BOTTOM, _TOP)
    parts = [_grid(x, y, "true value", height - _BOTTOM)]
    parts.append(_path("diagonal", f"M{x.first:.1f} {y.first:.1f}L{x.last:.1f} {y.last:.1f}"))
    parts += [f'<circle class="point" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>' for a, b in points]
    ends = f"from {min(numbers):.4g} to {max(numbers):.4g}"
    text = f"Predicted over true values of {len(points):,} rows, {ends}."
    return _picture(key, title, text, parts, height)


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Return at most about ``most`` points of a curve, with its first and last, and all extremes.

    >>> [len(thin([(x, x % 7) for x in range(n)])) for n in (10, 300, 100_000)]
    [10, 300, 301]
    """
    if len(points) <= most:
        return list(points)
    size = len(points) / (most // 2)
    kept = {0, len(points) - 1}
    for number in range(most // 2):
        part = range(int(number * size), int((number + 1) * size))
        finite = [n for n in part if math.isfinite(points[n][1])]
        if finite:
            kept |= {choose(finite, key=lambda n: points[n][1]) for choose in (min, max)}
        if len(finite) < len(part):  # a gap
            kept.add(next(n for n in part if not math.isfinite(points[n][1])))
    return [points[n] for n in sorted(kept)]


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Return round numbers between two.

    >>> ticks(0, 1377), ticks(0.21, 0.74)
    ([0.0, 500.0, 1000.0], [0.3, 0.4, 0.5, 0.6, 0.7])
    """
    rough = (high - low) / about
    size: float = 10.0 ** math.floor(math.log10(rough))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * (1 - 1e-9))
    first = math.ceil(low / size - 1e-9)
    return [float(f"{n * size:.12g}") for n in range(first, math.floor(high / size + 1e-9) + 1)]


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = (high - low) * share
    return low - room, high + room


def tick_labels(marks: Sequence[float]) -> list[str]:
    """Return what stands at ticks: numbers that read as these, of one form.

    >>> tick_labels([0.998, 0.9985, 0.999]), tick_labels([0.0, 1.15e-05, 1.2e-05])
    (['0.9980', '0.9985', '0.9990'], ['0', '1.15e-5', '1.20e-5'])
    >>> tick_labels([0.0, 500.0, 1000.0]), tick_labels([0.0, 5e5, 1e6]), tick_labels([1e9, 2e9])
    (['0', '500', '1,000'], ['0', '500k', '1M'], ['1e9', '2e9'])
    """
    most = max(map(abs, marks), default=0.0)
    places = max((_places(value) for value in marks if value), default=0)
    if (places > 3 and most < 0.01) or most >= 1e9:
        return [_with_exponent(value, places) for value in marks]
    if places <= -4 or most >= 100_000:
        return [_with_unit(value) for value in marks]
    return [f"{value:,.{max(0, places)}f}" if value else "0" for value in marks]


def _places(value: float) -> int:
    """Return the place of the last digit that is not 0: 2 for 0.25, and -3 for 12,000."""
    exponent = Decimal(f"{value:.12g}").normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    return -exponent


def _with_exponent(value: float, places: int) -> str:
    if not value:
        return "0"
    place = int(f"{value:.11e}".split("e")[1])
    mantissa, exponent = f"{value:.{max(0, place + places)}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _with_unit(value: float) -> str:
    unit, sign = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
    return f"{value / unit:.12g}{sign}" if value else "0"


def _grid(x: _Scale, y: _Scale, x_name: str, floor: float = HEIGHT - _BOTTOM) -> str:
    parts = []
    marks = ticks(y.low, y.high)
    for value, label in zip(marks, tick_labels(marks), strict=True):
        at = y(value)
        parts.append(f'<path class="grid" d="M{x.first} {at:.1f}H{x.last}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 8}" y="{at + 4:.1f}">{label}</text>')
    marks = ticks(x.low, x.high)
    for value, label in zip(marks, tick_labels(marks), strict=True):
        parts.append(f'<text class="middle" x="{x(value):.1f}" y="{floor + 16}">{label}</text>')
    parts.append(f'<path class="axis" d="M{x.first} {floor}H{x.last}"/>')
    parts.append(
        f'<text class="end name" x="{x.last}" y="{floor + 32}">{escape(clean(x_name))}</text>'
    )
    return "".join(parts)


def _mark(at: float) -> str:
    is_right = at > WIDTH - 60
    anchor, shift = ("end", -5) if is_right else ("start", 5)
    return (
        f'<path class="mark" d="M{at:.1f} {_TOP - 8}V{HEIGHT - _BOTTOM}"/>'
        f'<text class="{anchor} best" x="{at + shift:.1f}" y="{_TOP - 2}">best</text>'
    )


def _curve(line: Line, x: _Scale, y: _Scale) -> str:
    points = thin(line.points)
    d, is_open = [], False
    for at, value in points:
        if math.isfinite(value):
            d.append(f"{'L' if is_open else 'M'}{x(at):.1f} {y(value):.1f}")
        is_open = math.isfinite(value)
    parts = [_path(f"line {line.kind}", "".join(d))]
    if line.has_dots or len(points) == 1:
        parts += [
            f'<circle class="dot {line.kind}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>'
            for a, b in points
            if math.isfinite(b)
        ]
    return "".join(parts)


def _band(line: Line, x: _Scale, y: _Scale) -> str:
    ends = [entry for entry in line.band if all(map(math.isfinite, entry))]
    if len(ends) == 1:  # a line has no width
        at, low, high = ends[0]
        return _path(f"whisker {line.kind}", f"M{x(at):.1f} {y(low):.1f}V{y(high):.1f}")
    if not ends:
        return ""
    there = [f"{x(at):.1f} {y(high):.1f}" for at, _, high in ends]
    back = [f"{x(at):.1f} {y(low):.1f}" for at, low, _ in reversed(ends)]
    return _path(f"band {line.kind}", f"M{'L'.join([*there, *back])}Z")


def _box(kind: str, left: float, top: float, width: float, floor: float) -> str:
    height = max(floor - top, 0.5)
    return (
        f'<rect class="{kind}" x="{left:.1f}" y="{floor - height:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}"/>'
    )


def _path(kind: str, d: str) -> str:
    return f'<path class="{kind}" d="{d}"/>'


def _in_words(line: Line, x_name: str) -> str:
    points = [point for point in line.points if math.isfinite(point[1])]
    if not points:
        return ""
    at = f"{line.name}: {points[0][1]:.4g} at {x_name} {points[0][0]:,.0f}"
    if len(points) == 1:
        return at
    least, most = (choose(points, key=lambda point: point[1]) for choose in (min, max))
    return (
        f"{at}, {points[-1][1]:.4g} at {x_name} {points[-1][0]:,.0f}; "
        f"between {least[1]:.4g} and {most[1]:.4g}"
    )


def _picture(
    key: str, title: str, text: str, parts: Sequence[str], height: float = HEIGHT
) -> Markup:
    head = (
        f'<svg role="img" viewBox="0 0 {WIDTH} {height}" '
        f'aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(clean(title))}</title>'
        f'<desc id="{key}-desc">{escape(clean(text))}</desc>'
    )
    return Markup(f'{head}<g aria-hidden="true">{"".join(parts)}</g></svg>')
