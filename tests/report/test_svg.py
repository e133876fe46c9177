"""Pictures of numbers: nothing is drawn outside, and gaps stay gaps."""

import math
import re

import numpy as np
import pytest

from manualloop.report.calibration import calibration_bins
from manualloop.report.svg import (
    HEIGHT,
    WIDTH,
    Line,
    line_chart,
    reliability_chart,
    scatter_chart,
    thin,
    tick_labels,
    ticks,
)

NAN, INF = math.nan, math.inf


def places_of(picture):
    found = re.findall(r"[ML]?(-?[\d.]+) (-?[\d.]+)", " ".join(re.findall(r'd="([^"]+)"', picture)))
    return [(float(x), float(y)) for x, y in found]


def test_curves_of_any_numbers_stay_inside():
    draw = np.random.default_rng(0)
    for number in range(200):
        size = int(draw.integers(1, 40))
        values = draw.normal(size=size) * 10.0 ** draw.integers(-12, 12) + draw.normal() * 10
        values[draw.random(size) < 0.2] = [NAN, INF, -INF][number % 3]
        points = [(float(x), float(y)) for x, y in enumerate(values, start=number)]
        band = [(x, y - 1, y + 1) for x, y in points]
        picture = line_chart("a", "b", [Line("c", "accent", points, band, True)], mark=number)
        if not np.isfinite(values).any():
            assert picture is None
            continue
        assert (
            "nan" not in picture.lower().replace("nan", "nan", 0).split("<desc")[1].split("<g")[1]
        )
        assert "inf" not in picture.split("</desc>")[1]
        for x, y in places_of(picture):
            assert -1 <= x <= WIDTH + 1
            assert -1 <= y <= HEIGHT + 1


def test_a_value_that_is_not_finite_is_a_gap():
    points = [(0, 1.0), (1, 2.0), (2, NAN), (3, 1.0), (4, 3.0)]
    picture = line_chart("a", "b", [Line("c", "quiet", points)])
    (d,) = re.findall(r'class="line quiet" d="([^"]+)"', picture)
    assert d.count("M") == 2
    long = [(n, NAN if n == 5_000 else 1.0) for n in range(10_000)]
    assert any(math.isnan(value) for _, value in thin(long))


def test_thinning_keeps_ends_and_extremes():
    draw = np.random.default_rng(1)
    for _ in range(50):
        size = int(draw.integers(1, 3_000))
        points = list(enumerate(draw.normal(size=size).tolist()))
        kept = thin(points)
        assert len(kept) <= 302
        assert kept[0] == points[0]
        assert kept[-1] == points[-1]
        assert min(v for _, v in kept) == min(v for _, v in points)
        assert max(v for _, v in kept) == max(v for _, v in points)
        assert kept == sorted(kept)


def test_ticks_are_round_and_inside():
    draw = np.random.default_rng(2)
    for _ in range(500):
        low = float(draw.normal() * 10.0 ** draw.integers(-9, 9))
        high = low + abs(float(draw.normal())) * 10.0 ** draw.integers(-3, 6) * max(abs(low), 1e-9)
        found = ticks(low, high)
        assert 1 <= len(found) <= 8, (low, high)
        room = (high - low) * 1e-6
        assert all(low - room <= tick <= high + room for tick in found)


def test_labels_of_ticks_read_as_the_ticks():
    draw = np.random.default_rng(2)
    units = {"k": 1e3, "M": 1e6}
    ranges = [(0.9979, 0.9996), (4.75e-5, 5.25e-5), (0, 1e30), (1_000_000, 1_000_040)]
    for _ in range(500):
        low = float(draw.normal() * 10.0 ** draw.integers(-9, 12))
        ranges.append((low, low + float(draw.random()) * 10.0 ** draw.integers(-3, 3) * abs(low)))
    for low, high in ranges:
        marks = ticks(low, high)
        for mark, label in zip(marks, tick_labels(marks), strict=True):
            digits = label.replace(",", "").rstrip("kM")
            assert float(digits) * units.get(label[-1], 1) == pytest.approx(mark, rel=1e-9), marks


def test_other_pictures_stay_inside():
    draw = np.random.default_rng(3)
    bins = calibration_bins(draw.random(50), draw.random(50) > 0.5)
    assert len(re.findall("bar accent", reliability_chart("a", "b", bins))) <= 10
    points = [(1e300, -1e300), (0.0, NAN), (5.0, 5.0)]
    assert scatter_chart("a", "b", points).count("<circle") == 2
    assert "of 2 rows, from 1 to 5." in scatter_chart("a", "b", [(1.0, 2.0), (5.0, 4.0)])
    assert scatter_chart("a", "b", [(NAN, 1.0)]) is None
    assert scatter_chart("a", "b", [(2.0, 2.0)]).count("<circle") == 1


def test_what_comes_from_data_is_escaped():
    picture = line_chart("a", "<b>&", [Line("<script>", "quiet", [(0, 1.0)])], x_name="<i>")
    assert "<script>" not in picture
    assert "<b>" not in picture
    assert "<i>" not in picture
