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
def test_it_is_refused_before_the_first_update(mistake, updates):
    message = assert_refused(mistake, by_train_loop, updates)
    others = [by_preflight] if mistake.number not in (23, 39, 40) else []  # takes all splits, ...
    if not mistake.whole_runs:
        others.append(by_train_steps)
    for fit in others:
        assert assert_refused(mistake, fit, updates) == message


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
    mistake.ours(by_train_loop, mistake.model(), mistake.line)
    assert updates
    if mistake.error is None:
        assert not any(mistake.says[0] in line for line in messages(caplog))
