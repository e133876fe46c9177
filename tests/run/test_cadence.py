"""How often: what a cadence means, and that it depends on nothing but the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manualloop import ConfigError, Step
from manualloop.run.cadence import parse_cadence
from manualloop.state import Pace


def step(index: int, per_epoch: int = 10) -> Step:
    return Step(
        index=index,
        epoch=(index - 1) // per_epoch,
        num_steps=1000,
        loss=torch.zeros(()),
        lr=0.1,
        grad_norm=None,
        num_items=1,
        ends_epoch=index % per_epoch == 0,
        is_last=False,
    )


def pace(index: int, per_epoch: int | None = 10, begins: int = 10) -> Pace:
    """The place behind an update; without a length, epochs are over after ``begins`` updates."""
    epoch, number = divmod(index - 1, per_epoch or begins)
    return Pace(epoch, per_epoch, number + 1, number + 1 == (per_epoch or begins))


def due(cadence: Any, num_steps: int, per_epoch: int = 10, known: bool = True) -> list[int]:
    is_due = parse_cadence("log_every", cadence, per_epoch if known else None)
    return [
        index
        for index in range(1, num_steps + 1)
        if is_due(step(index, per_epoch), pace(index, per_epoch if known else None, per_epoch))
    ]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "monotonic", fake)
    return fake


@pytest.mark.parametrize("known", [True, False])
def test_updates(known: bool) -> None:
    assert due(1, 4, known=known) == [1, 2, 3, 4]
    assert due(7, 30, known=known) == [7, 14, 21, 28]
    assert due(50, 49, known=known) == []


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("cadence", ["epoch", "1 epoch", "1.0 epoch", "epochs"])
def test_an_epoch(cadence: str, known: bool) -> None:
    assert due(cadence, 35, known=known) == [10, 20, 30]


def test_several_epochs() -> None:
    assert due("2 epochs", 65) == [20, 40, 60]
    assert due("1.5 epochs", 65) == [15, 30, 45, 60]


@settings(deadline=None)
@given(per_epoch=st.integers(4, 500), num_epochs=st.integers(1, 4))
def test_a_quarter_of_an_epoch(per_epoch: int, num_epochs: int) -> None:
    steps = due("0.25 epoch", num_epochs * per_epoch, per_epoch)
    by_epoch = [[i for i in steps if (i - 1) // per_epoch == epoch] for epoch in range(num_epochs)]
    for epoch, own in enumerate(by_epoch):
        assert len(own) == 4
        assert own[-1] == (epoch + 1) * per_epoch  # the last one at its end
        gaps = [after - before for before, after in pairwise(own)]
        assert max(gaps) - min(gaps) <= 1


@settings(deadline=None)
@given(per_epoch=st.integers(1, 60), tenths=st.integers(1, 30))
def test_parts_of_an_epoch_do_not_drift(per_epoch: int, tenths: int) -> None:
    """In decimal fractions: 3 * 0.1 is no more than 0.3."""
    num_epochs = 7
    steps = due(f"{tenths / 10} epoch", num_epochs * per_epoch, per_epoch)
    expected = {
        -(-k * tenths * per_epoch // 10)  # rounded up: the first step not before it
        for k in range(1, 10 * num_epochs // tenths + 1)
    }
    assert set(steps) == {index for index in expected if index <= num_epochs * per_epoch}


@settings(deadline=None)
@given(
    cadence=st.sampled_from([1, 3, 50, "0.25 epoch", "0.3 epoch", "2 epochs"]),
    per_epoch=st.integers(1, 40),
    order=st.permutations(range(1, 81)),
)
def test_a_step_is_due_whatever_came_before_it(
    cadence: Any, per_epoch: int, order: list[int]
) -> None:
    is_due = parse_cadence("evaluate_every", cadence, per_epoch)
    found = {i for i in order if is_due(step(i, per_epoch), pace(i, per_epoch))}
    assert found == set(due(cadence, 80, per_epoch))


@pytest.mark.parametrize(
    ("cadence", "seconds"),
    [("30 s", 30), ("30s", 30), ("5 sec", 5), ("10 min", 600), ("1.5 min", 90), ("2 h", 7200)],
)
def test_time(cadence: str, seconds: float, clock: Clock) -> None:
    is_due = parse_cadence("log_every", cadence, None)
    first = clock.now
    clock.now = first + seconds - 0.5
    assert not is_due(step(1), pace(1))
    clock.now = first + seconds
    assert is_due(step(2), pace(2))
    assert not is_due(step(3), pace(3))  # counted anew
    clock.now += seconds - 0.5
    assert not is_due(step(4), pace(4))
    clock.now += 100 * seconds  # a long evaluation: due once, not a hundred times
    assert is_due(step(5), pace(5))
    assert not is_due(step(6), pace(6))


def test_two_cadences_do_not_share_a_clock(clock: Clock) -> None:
    asked: list[Callable[[Step | None, Pace], bool]] = [
        parse_cadence("log_every", "10 s", None) for _ in range(2)
    ]
    clock.now += 10
    assert asked[0](step(1), pace(1))
    assert asked[1](step(1), pace(1))


@pytest.mark.parametrize(
    "cadence",
    [
        0,
        -5,
        True,
        2.5,
        None,
        "",
        "0 epoch",
        "0 s",
        "-1 epoch",
        "epoch 2",
        "half an epoch",
        "10",
        "10 fortnights",
        "1e3 s",
        "nan epoch",
    ],
)
def test_what_is_no_cadence(cadence: Any) -> None:
    with pytest.raises(ConfigError, match=r"evaluate_every=.* is not a cadence") as caught:
        parse_cadence("evaluate_every", cadence, 10)
    assert repr(cadence) in str(caught.value)
    assert '"0.25 epoch"' in str(caught.value)


@pytest.mark.parametrize("cadence", ["0.25 epoch", "2 epochs"])
def test_parts_of_an_epoch_of_unknown_length(cadence: str) -> None:
    with pytest.raises(ConfigError, match="evaluate_every=500"):
        parse_cadence("evaluate_every", cadence, None)


@pytest.mark.parametrize("cadence", ["epoch", "0.5 epoch", "2 epochs"])
def test_what_is_due_at_an_update_that_was_skipped_is_due_there(cadence: str) -> None:
    """A skipped update moves the place in the epoch, and no count of updates."""
    is_due = parse_cadence("evaluate_every", cadence, 4)
    steps = [step(index, 4) for index in range(1, 17)]
    whole = [is_due(one, pace(place, 4)) for place, one in enumerate(steps, start=1)]
    without = [is_due(None, pace(place, 4)) for place in range(1, 17)]
    assert whole == without
    by_updates = parse_cadence("evaluate_every", 3, 4)
    assert not any(by_updates(None, pace(place, 4)) for place in range(1, 17))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    amount=st.sampled_from(["0.25", "0.3", "0.5", "1", "1.5", "2"]),
)
def test_parts_of_epochs_of_different_lengths(lengths: list[int], amount: str) -> None:
    """Due at the first update that is not before a multiple, in the epoch in which that is."""
    is_due = parse_cadence("evaluate_every", f"{amount} epoch", lengths[0])
    found = [
        (epoch, number)
        for epoch, length in enumerate(lengths)
        for number in range(1, length + 1)
        if is_due(None, Pace(epoch, length, number, number == length))
    ]
    period, multiple, expected = Fraction(amount), Fraction(amount), []
    while multiple <= len(lengths):
        epoch = math.ceil(multiple) - 1
        number = math.ceil((multiple - epoch) * lengths[epoch])
        expected.append((epoch, number))
        multiple += period
    assert found == sorted(set(expected))
