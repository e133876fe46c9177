"""What an evaluation leaves behind that is broken off: random states, and threads that draw."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from manualloop.notices import say
from manualloop.randomness import (
    generator_states,
    get_random_state,
    is_same_state,
    remember_random_states,
)

_SECONDS = 5.0
"""Seconds that the threads of a broken-off evaluation have to end. Schedulers give thirty or so."""


class BeforeEvaluation:
    """The state before an evaluation, to which it is put back if the evaluation is broken off.

    A thread that the evaluation has started goes its own way when a signal ends the evaluation, and
    may draw random numbers after the random states were put back. So its end is awaited, and if the
    states have moved all the same, that is reported.

    Args:
        holders: Objects that may hold random generators, by name.
    """

    def __init__(self, holders: dict[str, Any]) -> None:
        self._holders = holders
        self._put_back = remember_random_states(**holders)
        self._threads = set(threading.enumerate())
        self._num_threads = torch.get_num_threads()
        self._states: Any = None

    def restore(self) -> None:
        """Wait for the threads of the evaluation, and put random states and settings back."""
        deadline = time.monotonic() + _SECONDS
        for thread in threading.enumerate():
            # The bar's monitor never ends, and draws nothing.
            if thread not in self._threads and not type(thread).__module__.startswith("tqdm"):
                thread.join(max(0.0, deadline - time.monotonic()))
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        self._put_back()
        self._states = self._look()

    def _look(self) -> Any:
        return get_random_state(devices=False), generator_states(**self._holders)

    def report_draws(self) -> None:
        """Report that something has drawn random numbers since the states were put back.

        Call it when they have been saved.
        """
        if not is_same_state(self._states, self._look()):
            say(
                "not bit-exact when it is resumed: threads of the evaluation that was broken off "
                "still draw random numbers. Let it end them when it is left: "
                "with ThreadPoolExecutor() as pool: ..."
            )
