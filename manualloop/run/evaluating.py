"""An evaluation in the middle of a run: the weights that it scores, and what it leaves behind.

An average of the weights is evaluated in their place, a schedule-free optimizer has other weights
for evaluation, and some averages are copied into the model for the time of an evaluation. One that
is broken off leaves random states, and threads that draw.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manualloop.checkpoint.parts import saved_part
from manualloop.internals import compiled_in_place
from manualloop.models import is_sharded, sample_weights, unwrap_model
from manualloop.notices import say
from manualloop.objects import walk
from manualloop.optimizers.access import schedule_free
from manualloop.randomness import (
    generator_states,
    get_random_state,
    is_same_state,
    remember_random_states,
)
from manualloop.state import TrainState
from manualloop.types import Scores


class Scored:
    """What is known of the weights that an evaluation scores.

    Attributes:
        weights: Function that returns them by name; None if they are those that are trained, or
            if it is not known which they are.
        problem: Reason why they are not known; None if they are.
        unsaved: Path of an average that was scored and is not among the ``extras``.
        has_left_others: Whether the model has other weights than before, because a copy of the
            average was not taken out of it again.
        averages: Modules by their paths whose weights could be scored instead of the model's.
    """

    def __init__(self) -> None:
        self.weights: Callable[[], Mapping[str, Any]] | None = None
        self.problem: str | None = None
        self.unsaved: str | None = None
        self.has_left_others = False
        self.averages: dict[str, nn.Module] = {}

    def take(self, path: str) -> None:
        """Note that the scored weights are those of a module, by its path."""
        module = self.averages[path]
        self.weights, self.problem = (lambda: saved_part(module).state_dict()), None
        self.unsaved = None if path.startswith("extras") else path

    def read(self, returned: Any, model: nn.Module) -> None:
        """Take what ``evaluate_loop`` has returned for the model that it scored."""
        scored = returned.model() if isinstance(returned, Scores) and returned.model else None
        scored = None if scored is None else unwrap_model(scored, adapters=False)
        if scored is unwrap_model(model, adapters=False):
            self.problem = None
        for path, module in self.averages.items():
            if scored is module:
                self.take(path)


@contextmanager
def watching(state: TrainState, **holders: Any) -> Iterator[Scored]:
    """Find out which weights are scored in this block, and leave the trained ones as they were.

    The first forward pass of the model, or of a module like it that is found in the extras or in
    ``holders``, tells. A schedule-free optimizer is in evaluation mode meanwhile.
    """
    scored = Scored()
    if is_sharded(state.model):
        has_averages = any(isinstance(extra, nn.Module) for extra in state.extras.values())
        if has_averages or schedule_free(state.optimizer):
            scored.problem = "of a sharded model no other weights than the trained ones are saved"
        with _evaluating(state):
            yield scored
        return
    model = unwrap_model(state.model, adapters=False)
    before = sample_weights(model)
    seen: dict[str, nn.Module] = {}
    swapped: dict[str, Any] = {}

    def note(path: str, module: nn.Module) -> None:
        seen[path] = module
        if module is model and not torch.equal(sample_weights(model), before):
            swapped.update(_copy(saved_part(model).state_dict()))

    averages = scored.averages = _modules_like(model, {"extras": state.extras}, holders)
    try:
        with ExitStack() as stack:
            stack.enter_context(_evaluating(state))
            for path, module in {"model": model, **averages}.items():
                stack.callback(_at_first_forward(module, note, path))
            yield scored
    finally:
        scored.has_left_others = not torch.equal(sample_weights(model), before)
    if len(seen) == 1:
        ((path, module),) = seen.items()
        if module is not model:
            scored.take(path)
        elif swapped:
            scored.weights = lambda: swapped
    elif seen or any(path.startswith("extras") for path in averages):
        known = ", ".join(seen) or "none of them by a forward pass of its own"
        scored.problem = f"evaluate may score {', '.join(('model', *averages))}, and ran {known}"


def _copy(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Copy weights to the host; those that share memory share it in the copy, too."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    found: dict[str, Any] = {}
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            found[name] = weight
            continue
        place = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        if place not in copies:
            copies[place] = weight.detach().to("cpu", copy=True)
        found[name] = copies[place]
    return found


def _modules_like(model: nn.Module, *owners: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the modules with the weights' names and shapes of a model, by their paths.

    A module that several owners hold has its path in the first of them.
    """
    known = {id(module) for module in model.modules()}
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    found: dict[str, nn.Module] = {}
    for holders in owners:
        for path, part in walk({"": model, **holders}):
            module: Any = part.value
            if type(module) is not type(model) or id(module) in known:
                continue
            if {name: weight.shape for name, weight in module.named_parameters()} == shapes:
                known.add(id(module))
                found[re.sub(r"\._modules\['(\w+)'\]", r".\1", path)] = module
    return found


def _at_first_forward(
    module: nn.Module, note: Callable[[str, nn.Module], None], path: str
) -> Callable[[], None]:
    """Call ``note`` before the first forward pass; return a function that withdraws this.

    Only at the first, so that the others take no longer. A compiled module is left alone.
    """
    if compiled_in_place(module):
        return lambda: None

    def hook(module: nn.Module, args: Any) -> None:
        handle.remove()
        note(path, module)

    handle = module.register_forward_pre_hook(hook)
    return handle.remove


@contextmanager
def _evaluating(state: TrainState) -> Iterator[None]:
    """Put a schedule-free optimizer into evaluation mode; the trained weights come back exactly."""
    optimizers = schedule_free(state.optimizer)
    if not optimizers:
        yield
        return
    weights = [weight for weight in state.model.parameters() if weight.requires_grad]
    trained = [weight.detach().clone() for weight in weights]
    for optimizer in optimizers:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer.train()
        with torch.no_grad():
            for weight, before in zip(weights, trained, strict=True):
                weight.copy_(before)


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
