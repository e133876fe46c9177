"""A few forward and backward passes on real batches: their loss, their time, their memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from manualloop.batches import num_rows
from manualloop.checks import EXPLAINED, explain, explain_loss
from manualloop.forecast.splits import places_of, tokens_of
from manualloop.models import call_own_train, is_sharded, without_ranks
from manualloop.reading.sources import Source
from manualloop.strategy.base import Strategy, altered
from manualloop.types import LossFn, Terms
from manualloop.update import accumulate_gradients

NUM_TIMED = 3
"""Number of passes that are timed, after one that is not."""


class Passes(NamedTuple):
    """What some passes have shown.

    Attributes:
        loss: Mean loss over the items of all batches.
        rates: Seconds for each place (token, or row) of the timed batches, least and most.
        seconds: Seconds for each of the timed batches, least and most.
        num_timed: Number of timed batches.
        without_gradient: Names of trainable parameters that got no gradient in any pass.
        counts_tokens: Whether a place is a token.
    """

    loss: float
    rates: tuple[float, float]
    seconds: tuple[float, float]
    num_timed: int
    without_gradient: tuple[str, ...]
    counts_tokens: bool


class LargestBatch(NamedTuple):
    """The pass of the largest batch.

    Attributes:
        num_rows: Its number of rows.
        num_tokens: Tokens of each row, padding included; None without tokens.
        seconds: Time of forward and backward pass.
        peak_bytes: Most memory of the device in use during the pass; None on a CPU.
        device_bytes: Memory of the device; of a CPU that of the machine. None if it is unknown.
        process_bytes: Most memory that this process has used so far; None if it is unknown.
        fits: Whether memory was enough.
    """

    num_rows: int
    num_tokens: int | None
    seconds: float
    peak_bytes: int | None
    device_bytes: int | None
    process_bytes: int | None
    fits: bool


Pass = Callable[[Any, int], tuple[float, float, float]]
"""A forward and backward pass of a batch, and the rows before it: loss, items, and seconds."""


def passes_of(
    model: nn.Module,
    strategy: Strategy,
    source: Source,
    loss_fn: LossFn | None,
    terms: Terms | None,
) -> Pass:
    """Return the function that runs a batch forward and backward as training does, on this rank.

    The ranks exchange no gradients, unless the model is sharded over them.
    """
    model = without_ranks(model)
    alone = strategy if is_sharded(model) else altered(strategy, world_size=1, rank=0)
    find = explain if loss_fn is None else explain_loss

    def run(batch: Any, start: int) -> tuple[float, float, float]:
        if not model.training:
            model.train()
        call_own_train(model)
        _wait(strategy.device)
        begin = perf_counter()
        try:
            update = accumulate_gradients(
                model, [batch], loss_fn=loss_fn, terms=terms, strategy=alone
            )
        except EXPLAINED as error:
            find(error, model, [batch], source.place, [start])
            raise
        loss = float(update.loss)
        _wait(strategy.device)
        return loss, float(update.num_items), perf_counter() - begin

    return run


def run_passes(model: nn.Module, run: Pass, batches: Sequence[Any]) -> Passes:
    """Run batches forward and backward, the first one twice and untimed at first."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = dict.fromkeys(trainable)
    losses, items, times, rates, start = 0.0, 0.0, [], [], 0
    run(batches[0], 0)
    for batch in batches:
        model.zero_grad()
        loss, num_items, seconds = run(batch, start)
        losses, items = losses + loss * num_items, items + num_items
        times.append(seconds)
        rates.append(seconds / max(places_of(batch), 1))
        start += num_rows(batch)
        for name in [name for name in without if trainable[name].grad is not None]:
            del without[name]
    model.zero_grad()
    timed = times[:NUM_TIMED]
    return Passes(
        losses / items if items else 0.0,
        (min(rates[:NUM_TIMED]), max(rates[:NUM_TIMED])),
        (min(timed), max(timed)),
        len(timed),
        tuple(without),
        tokens_of(batches[0]) is not None,
    )


def run_largest(model: nn.Module, run: Pass, batch: Any, device: torch.device) -> LargestBatch:
    """Run the largest batch forward and backward, and measure the memory that it takes."""
    model.zero_grad()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, fits = 0.0, True
    try:
        _, _, seconds = run(batch, 0)
    except torch.OutOfMemoryError:
        fits = False
    model.zero_grad()
    if is_cuda and not fits:
        torch.cuda.empty_cache()
    return LargestBatch(
        num_rows(batch),
        tokens_of(batch),
        seconds,
        torch.cuda.max_memory_allocated(device) if is_cuda and fits else None,
        _memory_of(device),
        _most_memory(),
        fits,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cpu":
        return
    module: Any = getattr(torch, device.type, None)
    if module is not None and hasattr(module, "synchronize"):
        module.synchronize()


def _memory_of(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    with suppress(AttributeError, OSError, ValueError):
        import os

        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _most_memory() -> int | None:
    """Return the most memory that this process has used; None where that is not known."""
    with suppress(ImportError):  # not on Windows
        from resource import RUSAGE_SELF, getrusage

        most = getrusage(RUSAGE_SELF).ru_maxrss
        return int(most) if sys.platform == "darwin" else int(most) * 1024
    return None
