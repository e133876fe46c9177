"""The worker processes of a DataLoader: their state, and new ones that continue with it.

A worker draws random numbers of its own, and an iterable dataset has its position there. So each
batch is sent together with what has changed in its worker, and a new worker is given the state that
came with the last batch of the old one.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Mapping
from copy import copy
from multiprocessing.queues import Queue
from typing import Any
from weakref import WeakSet, finalize

from torch.utils.data import IterableDataset, get_worker_info

from manualloop.internals import pin_batch, renumber_worker, shut_down_workers
from manualloop.randomness import get_random_state, is_same_random_state, set_random_state
from manualloop.reading.generators import RowGenerators
from manualloop.reading.position import WorkerState


class WorkerBatch:
    """A batch from a worker, and the state of the worker after it.

    Attributes:
        batch: What ``collate_fn`` returned.
        worker: Number of the worker.
        state: State of the worker after the batch; None if it has not changed.
    """

    __slots__ = ("batch", "state", "worker")

    def __init__(self, batch: Any, worker: int, state: WorkerState | None) -> None:
        self.batch, self.worker, self.state = batch, worker, state

    def pin_memory(self) -> WorkerBatch:
        """Pin the batch: the DataLoader calls this where it pins what it gives."""
        return WorkerBatch(pin_batch(self.batch), self.worker, self.state)


class ReportingCollate:
    """A ``collate_fn`` that adds the worker's state to what another one returns.

    Args:
        collate_fn: The loader's own.
        full: Rows of a batch of a stream: a shorter one is the worker's last. None: no stream.
    """

    def __init__(self, collate_fn: Callable[[Any], Any], full: int | None) -> None:
        self._collate_fn, self._full = collate_fn, full
        self._has_told_seed = False
        self._generators: RowGenerators | None = None

    def __call__(self, rows: Any) -> Any:  # noqa: D102
        is_last = self._full is not None and len(rows) < self._full
        batch = self._collate_fn(rows)
        if (info := get_worker_info()) is None:
            return WorkerBatch(batch, 0, {"is_at_end": True}) if is_last else batch
        # At its end a stream may already say that it is at its start again.
        state = WorkerState()
        if is_last:
            state["is_at_end"] = True
        else:
            if self._generators is None:
                self._generators = RowGenerators(info.dataset, self._collate_fn)
            if generators := self._generators.states():
                state["generators"] = generators
            dataset: Any = info.dataset
            if is_stateful(dataset):
                state["dataset"] = dataset.state_dict()
        if not self._has_told_seed:
            state["base_seed"], self._has_told_seed = info.seed - info.id, True
        now = get_random_state(devices=False)
        if not is_same_random_state(_known, now):
            state["random"] = now
            _known.update(now)
        return WorkerBatch(batch, info.id, state or None)


def states_between_passes(loader: Any, states: dict[str, WorkerState]) -> dict[str, WorkerState]:
    """Return what of the workers' states lasts from one pass to the next."""
    if not getattr(loader, "persistent_workers", False):
        return {}
    if not isinstance(loader.dataset, IterableDataset):
        return states
    # They are those of the last batch; reaching the end has moved the dataset to its start.
    kept = [copy(state) for state in states.values()]
    for state in kept:
        state.pop("dataset", None)
        state.pop("is_at_end", None)
    return dict(zip(states, kept, strict=True))


def is_stateful(part: Any) -> bool:
    """Tell whether a dataset or loader can save its position and load it."""
    return hasattr(part, "state_dict") and hasattr(part, "load_state_dict")


class WorkerStart:
    """A ``worker_init_fn`` that lets a worker continue where an earlier one was.

    Args:
        init_fn: The loader's own, called first.
        collate_fn: The loader's own.
        first: Number of the worker that is to give the next batch. Torch asks worker 0 first, so
            the workers are numbered from here.
        states: States of the earlier workers, by number.
    """

    def __init__(
        self,
        init_fn: Callable[[int], None] | None,
        collate_fn: Any,
        first: int,
        states: Mapping[int, WorkerState],
    ) -> None:
        self._init_fn, self._collate_fn = init_fn, collate_fn
        self._first, self._states = first, states

    def __call__(self, worker: int) -> None:  # noqa: D102
        _outlive_signals()
        info: Any = get_worker_info()
        number = (worker + self._first) % info.num_workers
        # Persistent workers keep the seed of their first pass, which this one's loader has not.
        seeds = [state["base_seed"] for state in self._states.values() if "base_seed" in state]
        base_seed = seeds[0] if seeds else info.seed - worker
        if (number, base_seed) != (worker, info.seed - worker):
            renumber_worker(info, number, base_seed)
        if self._init_fn is not None:
            self._init_fn(number)
        state: WorkerState = self._states.get(number, {})
        if "random" in state:
            set_random_state(state["random"])
        RowGenerators(info.dataset, self._collate_fn).restore(state.get("generators", {}))
        if "dataset" in state and is_stateful(info.dataset):
            info.dataset.load_state_dict(state["dataset"])
        if state.get("is_at_end"):
            _give_nothing_once(info.dataset)
        _known.update(get_random_state(devices=False))


_known: dict[str, Any] = {}
"""In a worker: the random state that the main process knows of."""


def _give_nothing_once(dataset: Any) -> None:
    """Let the next iteration over a dataset be an empty one."""
    own = type(dataset)

    def iterate(dataset: Any) -> Any:
        dataset.__class__ = own
        return iter(())

    dataset.__class__ = type(own.__name__, (own,), {"__iter__": iterate})


def look_after_workers(iterator: Any) -> None:
    """End the workers of an iterator with it or with Python, if nobody has before.

    When Python ends, it would send them a SIGTERM and wait for their end: see below. A garbage
    collection would take the queues away by which torch tells them to end, and torch would wait
    five seconds for each of them: so the queues are kept for as long as the iterator is there.
    """
    _ITERATORS.add(iterator)
    parts = [part for part in vars(iterator).values() if isinstance(part, list)]
    queues = [entry for part in parts for entry in part if isinstance(entry, Queue)]
    finalize(iterator, queues.clear).atexit = False


_ITERATORS: WeakSet[Any] = WeakSet()


@atexit.register
def _shut_down() -> None:
    for iterator in list(_ITERATORS):
        shut_down_workers(iterator)


def _outlive_signals() -> None:
    """Leave it to the main process what a signal to all processes of the run means.

    Schedulers and terminals signal the whole group. A worker that died of it would take the
    update with it that the main process wants to finish. A second SIGTERM is obeyed: torch sends
    one to a worker that hangs.
    """

    def survive_once(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, survive_once)
    if os.name == "posix":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
