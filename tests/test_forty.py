"""All forty mistakes: refused before the first update with the line that fixes them, or told."""

from __future__ import annotations

import logging

import pytest
from forty import FORTY, by_preflight, folder_of_another_run
from helpers import messages
from mistakes import assert_same_bits, bits_of, by_train_loop
from mistakes import by_train_steps as train_steps_with_a_state

from manualloop import ManualLoopError, TrainState, prepare_optimizer, train_steps

REFUSED = [mistake for mistake in FORTY if mistake.error is not None]
TOLD = [mistake for mistake in FORTY if mistake.error is None]
BY_STEPS = [mistake for mistake in FORTY if not mistake.whole_runs]


def each(mistakes):
    ids = [f"{mistake.number:02}-{mistake.title.replace(' ', '-')}" for mistake in mistakes]
    return pytest.mark.parametrize("mistake", mistakes, ids=ids)


def by_train_steps(model, loader, **arguments):
    if "lr_scheduler" not in arguments:
        train_steps_with_a_state(model, loader, **arguments)
        return
    optimizer = arguments.pop("optimizer", None) or prepare_optimizer(model)
    state = TrainState(model, optimizer, arguments.pop("lr_scheduler"))
    for _ in train_steps(state, loader, **arguments):
        pass


def test_there_are_forty():
    assert [mistake.number for mistake in FORTY] == list(range(1, 41))
    assert [mistake.number for mistake in TOLD] == [13, 20, 21, 31]


def assert_refused(mistake, fit, updates):
    model = mistake.model()
    folder_of_another_run()  # whose updates do not count
    updates.clear()
    before, modes = bits_of(model), [module.training for module in model.modules()]
    with pytest.raises(ManualLoopError) as refused:
        mistake.ours(fit, model, None)
    message = str(refused.value)
    assert type(refused.value) is mistake.error
    for part in mistake.says:  # what happened, and where
        assert part in message
        assert message.index(part) <= message.rindex(mistake.line)
    assert mistake.line in message
    assert updates == []
    assert_same_bits(model, before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    return message


@each(REFUSED)
def test_train_loop_refuses_it_before_the_first_update(mistake, updates):
    assert_refused(mistake, by_train_loop, updates)


@each([mistake for mistake in REFUSED if not mistake.whole_runs and mistake.number != 23])
def test_train_steps_and_preflight_refuse_it_in_the_same_words(mistake, updates):
    found = [
        assert_refused(mistake, fit, updates)
        for fit in (by_train_loop, by_train_steps, by_preflight)
    ]
    assert found[0] == found[1] == found[2]


@each([mistake for mistake in REFUSED if mistake.whole_runs and mistake.number < 39])
def test_preflight_refuses_what_is_about_a_whole_run(mistake, updates):
    assert assert_refused(mistake, by_preflight, updates)


@each(TOLD)
def test_a_line_tells_it_before_the_first_update(mistake, updates, caplog):
    class First(logging.Handler):
        def __init__(self):
            super().__init__()
            self.lines = []

        def emit(self, record):
            if not updates:
                self.lines.append(record.getMessage())

    first = First()
    logging.getLogger("manualloop").addHandler(first)
    try:
        mistake.ours(by_train_loop, mistake.model(), None)
    finally:
        logging.getLogger("manualloop").removeHandler(first)
    assert updates
    told = "\n".join(first.lines)
    for part in (*mistake.says, mistake.line):
        assert part in told


@each([mistake for mistake in FORTY if mistake.line])
def test_the_line_in_the_message_fixes_it(mistake, updates, caplog):
    folder_of_another_run()
    updates.clear()
    model = mistake.model()
    mistake.ours(by_train_loop, model, mistake.line)
    assert updates
    if mistake.error is None:
        assert not any(mistake.says[0] in line for line in messages(caplog))


@each([mistake for mistake in BY_STEPS if mistake.line])
def test_preflight_reports_what_is_fixed(mistake):
    mistake.ours(by_preflight, mistake.model(), mistake.line)
