"""Checks that users run on their own model and data: of gradient accumulation and of resuming."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manualloop.arguments import check_arguments
from manualloop.batches import rebuild
from manualloop.errors import ConfigError, DataError, DistributedError
from manualloop.models import (
    batch_statistics,
    evaluation_mode,
    is_sharded,
    model_name,
    unwrap_model,
)
from manualloop.reading.reader import Reader
from manualloop.run.delivery import send_nothing
from manualloop.strategy.base import Strategy, prepare_model
from manualloop.strategy.calls import begin_call
from manualloop.strategy.launch import num_launched
from manualloop.strategy.select import strategy_for
from manualloop.strategy.single import SingleDevice
from manualloop.tasks.isolation import rows_or_documents
from manualloop.tasks.loss import check_loss
from manualloop.types import LossFn, Step, Terms, Update, Window
from manualloop.update import accumulate_gradients


@dataclass(frozen=True, slots=True)
class AccumulationReport:
    """The difference between the update of a whole batch and that of its rows one by one.

    Printing it gives the result in words.

    Attributes:
        model: Name of the model's class.
        num_rows: Number of rows of the batch, and so of pieces.
        num_items: Number of items that the loss is a mean over.
        loss_difference: Difference of the losses, relative to the largest loss of a row.
        gradient_difference: Largest difference of a gradient, relative to the largest gradient of
            a row alone.
        unweighted_difference: The same for the usual mean of the pieces' means.
        tolerance: Largest difference that counts as rounding, given the gradients' dtype.
        statistics: Name of the first layer that is training with statistics over the batch; None if
            there is none.
    """

    model: str
    num_rows: int
    num_items: float
    loss_difference: float
    gradient_difference: float
    unweighted_difference: float
    tolerance: float
    statistics: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether both differences are rounding, and no layer has statistics over the batch."""
        difference = max(self.loss_difference, self.gradient_difference)
        return difference <= self.tolerance and self.statistics is None

    def __str__(self) -> str:
        if self.is_exact:
            verdict = "Any split is the same update."
        elif max(self.loss_difference, self.gradient_difference) <= self.tolerance:
            verdict = (
                f"That is with {self.statistics} in evaluation mode: in training it computes "
                "statistics over each micro-batch, and the split changes the update."
            )
        else:
            verdict = (
                "The split changes the update: the loss is not a mean over the items counted. "
                "Return (mean_loss, num_items) from loss_fn; losses that compare rows with each "
                "other (batch normalisation, contrastive losses) cannot be split."
            )
        return (
            f"{self.model}, {self.num_rows} rows at once against {self.num_rows} of one row, "
            f"{self.num_items:g} items: loss differs by {self.loss_difference:.1e}, gradient by "
            f"{self.gradient_difference:.1e} (relative; rounding is {self.tolerance:.0e}). "
            f"{verdict} Without the weighting by items the gradient would differ by "
            f"{self.unweighted_difference:.1e}."
        )

    __repr__ = __str__


def check_accumulation(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    terms: Terms | None = None,
    strategy: Strategy | None = None,
) -> AccumulationReport:
    """Compare the gradient of a whole batch with that of its rows one by one.

    Dropout is off for both. A difference above rounding is measured again in float64, on a copy of
    the model, before it is reported. Modes, gradients and random states are restored afterwards.

    Args:
        model: The model to check.
        batch: A batch of at least two rows; rows of different lengths show most. Every column that
            has one entry for each row is split: tensors and lists, also in nested dicts and
            objects; a pack into its documents.
        loss_fn: As in ``train_steps``.
        terms: As in ``train_steps``.
        strategy: Device, precision and ranks; None takes the strategy that prepared the model, or
            ``prepare_strategy("auto")``.

    Raises:
        DataError: The batch cannot be split into rows, or has only one.

    >>> model = nn.Linear(2, 1, dtype=torch.float64)
    >>> batch = {"x": torch.ones(4, 2, dtype=torch.float64), "labels": torch.arange(4.0)[:, None]}
    >>> check_accumulation(
    ...     model, batch, loss_fn=lambda m, b: nn.functional.mse_loss(m(b["x"]), b["labels"])
    ... ).is_exact
    True
    """
    check_arguments(model=model, batch=batch, loss_fn=loss_fn, terms=terms)
    own: dict[str, Any] = {"loss_fn": loss_fn, "terms": terms}
    strategy = begin_call(strategy_for(model, strategy), "check_accumulation", **own)
    check_loss(**own)
    model = prepare_model(strategy, model)
    rows = rows_or_documents(batch)
    if len(rows) < 2:
        raise DataError("A batch of one row cannot be split. Pass a batch of several rows.")
    statistics = batch_statistics(model)
    kept = [parameter.grad for parameter in model.parameters()]
    try:
        with evaluation_mode(model, strategy.device, inference=False, **own):
            found = _measure(model, batch, rows, strategy, **own)
            if found.difference > found.tolerance and found.dtype != torch.float64:
                # Before a model is accused, rounding is made small.
                found = _measure_in_float64(model, batch, strategy, **own) or found
    finally:
        for parameter, gradient in zip(model.parameters(), kept, strict=True):
            parameter.grad = gradient
    return AccumulationReport(
        model=model_name(model),
        num_rows=len(rows),
        num_items=found.num_items,
        loss_difference=found.loss_difference,
        gradient_difference=found.gradient_difference,
        unweighted_difference=found.unweighted_difference,
        tolerance=found.tolerance * (1 if found.dtype == torch.float64 else _LOOSER),
        statistics=statistics,
    )


class _Measured(NamedTuple):
    """The differences that an ``AccumulationReport`` has, and the coarsest dtype of the numbers."""

    num_items: float
    loss_difference: float
    gradient_difference: float
    unweighted_difference: float
    dtype: torch.dtype

    @property
    def difference(self) -> float:
        return max(self.loss_difference, self.gradient_difference)

    @property
    def tolerance(self) -> float:
        return _TOLERANCES.get(self.dtype, 1e-2)


_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}  # parts of a float64 loss may be float32
_LOOSER = 10  # where float64 is not to be had


def _measure(
    model: nn.Module,
    batch: Any,
    rows: Sequence[Any],
    strategy: Strategy,
    *,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> _Measured:
    """Compare the whole batch with its rows, relative to the largest loss and gradient of a row.

    The rows' gradients may nearly cancel out; rounding is as large as they are, not as their sum.
    """
    gradient = partial(_gradient, model, strategy=strategy, loss_fn=loss_fn, terms=terms)
    whole, exact = gradient([batch])
    parts, split = gradient(rows)
    usual = [torch.zeros_like(g) for g in exact]
    num_used, loss_size, gradient_size = 0, 0.0, 0.0
    for row in rows:
        alone, own = gradient([row])
        if alone.applied:
            num_used += 1
            loss_size = max(loss_size, abs(float(alone.loss)))
            gradient_size = max(gradient_size, *(float(g.abs().max()) for g in own))
            for total, g in zip(usual, own, strict=True):
                total += g
    usual = [total / max(num_used, 1) for total in usual]
    dtypes = {whole.loss.dtype, *(g.dtype for g in exact)}
    if strategy.precision != "no":
        dtypes.add(torch.bfloat16)
    return _Measured(
        whole.num_items,
        _difference([parts.loss], [whole.loss], loss_size),
        _difference(split, exact, gradient_size),
        _difference(usual, exact, gradient_size),
        max(dtypes, key=lambda dtype: torch.finfo(dtype).eps),
    )


def _measure_in_float64(
    model: nn.Module,
    batch: Any,
    strategy: Strategy,
    *,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> _Measured | None:
    """Measure a copy of the model in float64; None if there is no such copy, or it has no loss."""
    if is_sharded(model):
        return None
    device = strategy.device if strategy.device.type != "mps" else torch.device("cpu")
    with suppress(Exception):  # a loss function may hold tensors of its own in float32
        copied = copy.deepcopy(unwrap_model(model, adapters=False)).to(device, torch.float64)
        copied.zero_grad()
        batch = _as_float64(batch)
        rows, alone = rows_or_documents(batch), SingleDevice(device)
        return _measure(copied, batch, rows, alone, loss_fn=loss_fn, terms=terms)
    return None


def _as_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return rebuild(value, _as_float64)


def _gradient(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    strategy: Strategy,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> tuple[Update, list[Tensor]]:
    model.zero_grad()
    update = accumulate_gradients(model, batches, loss_fn=loss_fn, terms=terms, strategy=strategy)
    return update, [
        torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for p in model.parameters()
        if p.requires_grad and p.numel()
    ]


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], size: float) -> float:
    pairs = zip(ours, theirs, strict=True)
    difference = max(float((our - their).abs().max()) for our, their in pairs)
    return difference / size if size else difference


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """Whether an interrupted and resumed run ends as an uninterrupted one does.

    Printing it gives the result in words.

    Attributes:
        at: Step at which the run was interrupted.
        num_steps: Number of steps of the whole run.
        difference: The first difference in words; None if there is none.
    """

    at: int
    num_steps: int
    difference: str | None

    @property
    def is_exact(self) -> bool:
        """Whether batches, losses, history, weights and optimizer are equal to the last bit."""
        return self.difference is None

    def __str__(self) -> str:
        verdict = "equal to the last bit: batches, losses, history, weights, optimizer"
        if self.difference is not None:
            verdict = f"different. First: {self.difference}"
        return f"{self.num_steps} steps, interrupted after step {self.at} and resumed: {verdict}."

    __repr__ = __str__


def verify_resume(train_fn: Callable[..., Any], *, at: int) -> ResumeReport:
    """Interrupt a run, resume it, and compare it with an uninterrupted run.

    It uses three fresh processes. The first trains to the end, the second gets a SIGTERM after step
    ``at``, and the third resumes from its checkpoint. Any state that is not restored shows, such as
    that of a sampler with random numbers of its own, of a dataset that counts its reads, or of
    weights that are not in a ``state_dict``.

    Args:
        train_fn: ``train_fn(**options)`` builds everything, seeds included, calls
            ``train_loop(..., **options)`` once and returns its result. The options are
            ``checkpoint_dir`` and ``on_step``. A function of a module or script (a script then
            needs its ``if __name__ == "__main__":``); in a notebook, where the system can fork,
            any function.
        at: Number of steps after which to interrupt. A step inside an epoch, and inside an interval
            of the log, shows the most.

    Raises:
        ConfigError: ``at`` is not inside the run, or ``train_fn`` does not pass its options on, or
            cannot be sent to a process, as a function inside of another.
        DistributedError: A launcher has started several processes.
        RuntimeError: A process failed; its traceback is in the message.

    ::

        def train(**options):
            set_seed(0)
            ...
            return train_loop(model, loader, optimizer, num_epochs=2, **options)

        if __name__ == "__main__":
            print(verify_resume(train, at=7))
    """
    check_arguments(train_fn=train_fn, at=at)
    if num_launched() > 1:
        raise DistributedError(
            f"verify_resume was called in one of {num_launched()} processes that a launcher has "
            "started, and the processes that it starts itself could not form a group in there. "
            "Call it with plain `python`, in one process."
        )
    with TemporaryDirectory() as name:
        folder = Path(name)
        whole = _trace(train_fn, folder / "whole", None)
        num_steps = max(map(int, whole["steps"]), default=0)
        if at >= num_steps:
            raise ConfigError(f"at={at} is not inside the run: it has {num_steps} steps.")
        before = _trace(train_fn, folder / "resumed", at)
        after = _trace(train_fn, folder / "resumed", None)
    return ResumeReport(at, num_steps, _first_difference(whole, before, after, at))


def _first_difference(
    whole: dict[str, Any], before: dict[str, Any], after: dict[str, Any], at: int
) -> str | None:
    for number, expected in whole["steps"].items():
        part = before if int(number) <= at else after
        found = part["steps"].get(number)
        if found is None:
            return f"step {number} is missing, or has another number"
        for name, value in expected.items():
            if found[name] != value:
                again = ", before the interruption: the run differs every time. Set its seeds first"
                text = f"step {number}: {name} {value} -> {found[name]}"
                return text + (again if part is before else "")
    if extra := set(after["steps"]) - {n for n in whole["steps"] if int(n) > at}:
        return f"step {min(extra, key=int)} was made twice"
    for number, (expected, found) in enumerate(zip_longest(whole["rest"], after["rest"]), start=1):
        if expected != found:
            return f"batch {number} after the last step: {expected} -> {found}"
    for name, digest in whole["end"].items():
        if after["end"].get(name) != digest:
            return f"at the end: {name}"
    return None


def _trace(train_fn: Callable[..., Any], directory: Path, at: int | None) -> dict[str, Any]:
    """Train in a fresh process; return the trace that it wrote."""
    sent = _sent(train_fn)
    context: Any = multiprocessing.get_context("fork" if sent is None else "spawn")
    path = Path(f"{directory}-{at}.json")
    ours, theirs = context.Pipe()  # as an argument it would wait for a process that has ended
    given = train_fn if sent is None else theirs
    (process := context.Process(target=_write_trace, args=(given, directory, at, path))).start()
    theirs.close()
    if sent is not None:
        with suppress(BrokenPipeError, ConnectionResetError):
            ours.send_bytes(sent)
    process.join()
    trace: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    if "steps" not in trace:
        guard = 'A script must call verify_resume under if __name__ == "__main__":'
        error = trace.get("error", guard)
        raise RuntimeError(f"The process that trained ended with {process.exitcode}:\n{error}")
    return trace


def _sent(train_fn: Callable[..., Any]) -> bytes | None:
    """Return what a fresh process gets of a function; None: it lives in a notebook, to be forked.

    Raises:
        ConfigError: The function cannot be sent, and there is no notebook to fork.
    """
    is_script = hasattr(sys.modules["__main__"], "__file__")
    try:
        sent = bytes(ForkingPickler.dumps(train_fn))
    except Exception as error:  # of many classes: whatever an object of the user's raises
        if not is_script and "fork" in multiprocessing.get_all_start_methods():
            return None
        raise ConfigError(
            f"verify_resume sends train_fn to fresh processes, and it cannot be sent: {error}. "
            "Write it as a function of its own, outside of other functions, that builds everything "
            "it uses: def train(**options): ... return train_loop(..., **options)."
        ) from None
    if is_script or b"__main__" not in sent:
        return sent
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            "verify_resume starts fresh processes, which do not see functions of a notebook here. "
            "Write train_fn into a file beside the notebook, and import it: from training import "
            "train."
        )
    return None


def _write_trace(function: Any, directory: Path, at: int | None, path: Path) -> None:
    steps: dict[int, dict[str, Any]] = {}
    batches: list[str] = []
    given: Iterator[Window] = iter(())
    give = Reader.windows

    def give_and_note(reader: Reader, size: int, epoch: int | None = None) -> Iterator[Window]:
        nonlocal given
        windows, is_trained = give(reader, size, epoch), epoch is not None
        given = windows if is_trained else given
        return map(note, windows) if is_trained else windows

    def note(window: Window) -> Window:
        batches.append(_digest(window.batches))
        return window

    def on_step(step: Step) -> None:
        numbers: dict[str, Any] = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm}
        texts = {name: repr(None if n is None else float(n)) for name, n in numbers.items()}
        steps[step.index] = {"batches": list(batches), **texts}
        batches.clear()
        if step.index == at:
            os.kill(os.getpid(), signal.SIGTERM)

    Reader.windows = give_and_note  # type: ignore[assignment, method-assign]  # of this process
    send_nothing(directory)
    try:
        train_fn = function.recv() if hasattr(function, "recv") else function
        result = train_fn(checkpoint_dir=directory, on_step=on_step)
        if not steps or not list(directory.rglob("step-*")):
            raise ConfigError(
                "train_fn has not passed its options on: def train_fn(**options): ... return "
                "train_loop(..., **options)."
            )
        trace = {"steps": steps, "end": _describe_end(result), "rest": _digest_rest(given)}
    except (Exception, SystemExit) as error:
        trace = {"error": traceback.format_exc()}
        if at is not None and getattr(error, "code", None) == 128 + signal.SIGTERM:
            trace = {"steps": steps}  # the update was saved; what the signal stands for came after
    path.write_text(json.dumps(trace))


def _digest_rest(given: Iterator[Window], num_batches: int = 8) -> list[str]:
    """Read the first batches after the last step."""
    found: list[str] = []
    with suppress(Exception):  # of the loader: that it comes at the same batch is compared as well
        rest = (batch for window in given for batch in window.batches)
        found.extend(map(_digest, islice(rest, num_batches)))
    return found


def _describe_end(result: Any) -> dict[str, str]:
    """Describe what a run leaves behind.

    The position is left out: it also holds random states that nothing draws from, and differ from
    process to process. It is right if the batches that follow are.
    """
    state = result.state.state_dict()
    state = {name: part for name, part in state.items() if name not in ("position", "generators")}
    for name, part in list(state.items()):
        if isinstance(part, list):  # a state of each optimizer
            state |= {f"{name} {number}": own for number, own in enumerate(part)}
    parts = {
        f"{name} {key}": value
        for name, part in state.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    parts |= {"history": result.history, "metrics": result.metrics}
    return {name: _digest(value) for name, value in parts.items()}


def _digest(value: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            # A copy, since a view of one number may have any stride.
            value = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(type(value).__name__.encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()[:16]
