"""What ``preflight`` returns: a report that prints as lines, and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape

from manualloop.forecast.chance import Chance
from manualloop.forecast.passes import LargestBatch
from manualloop.forecast.sizes import Parameters
from manualloop.forecast.splits import SplitSummary
from manualloop.tasks.made import counted, share_of

_NUM_CLASSES_SHOWN = 12


@dataclass(frozen=True, slots=True, repr=False)
class PreflightReport:
    """What a run will train, found out before it. Prints as lines, in a notebook as a table.

    Attributes:
        model: Name of the model's class.
        parameters: Its parameters, counted in numbers: ``num_all``, ``num_trainable``,
            ``num_shared``, ``dtypes``, and the names of those that are ``left_alone``.
        without_gradient: Names of trainable parameters that got no gradient from the batches tried.
        optimizer: Name of the optimizer, with its learning rate.
        device: Device of the run.
        precision: Precision of its forward passes.
        world_size: Number of processes.
        num_steps: Number of updates.
        num_epochs: Number of epochs; None if ``max_steps`` ends the run.
        num_steps_per_epoch: Number of updates in an epoch; None for a stream.
        rows_per_step: Most rows of an update; None if batches have no fixed number of rows.
        splits: Rows, batches, truncation, padding and classes of each split.
        train: Name of the split that is trained on.
        loss: Mean loss of the first batches, in training mode; None if no pass was made.
        chance: The loss of guessing; None where nobody knows it.
        seconds: Least and most time of all forward and backward passes; None if unknown.
        num_timed: Number of batches that were timed.
        largest: The pass of the largest batch; None if no pass was made.
        optimizer_bytes: Size of the optimizer's state once it is there; None if unknown.
        checkpoint_bytes: Size of a checkpoint; None if unknown.
        num_checkpoints: Most checkpoints that are on disk at once; 0 without a ``checkpoint_dir``.
        free_bytes: Free space on the disk of ``checkpoint_dir``; None if unknown.
        notes: What is worth a second look, in a sentence each.
    """

    model: str
    parameters: Parameters
    without_gradient: tuple[str, ...]
    optimizer: str
    device: str
    precision: str
    world_size: int
    num_steps: int
    num_epochs: int | None
    num_steps_per_epoch: int | None
    rows_per_step: int | None
    splits: Mapping[str, SplitSummary]
    train: str
    loss: float | None
    chance: Chance | None
    seconds: tuple[float, float] | None
    num_timed: int
    largest: LargestBatch | None
    optimizer_bytes: int | None
    checkpoint_bytes: int | None
    num_checkpoints: int
    free_bytes: int | None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = list(lines_of(self))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cell = '<td style="text-align: left; white-space: pre-wrap">'
        head = '<th scope="row" style="text-align: left; vertical-align: top">'
        rows = "".join(
            f"<tr>{head}{escape(name)}</th>{cell}{escape(text)}</td></tr>"
            for name, text in lines_of(self)
        )
        return f"<table><caption>Preflight</caption>{rows}</table>"


def lines_of(report: PreflightReport) -> Iterator[tuple[str, str]]:
    """Give the lines of a report: a name, and what there is to know."""
    yield "model", f"{report.model}: {_parameters(report.parameters)}"
    ranks = f", {report.world_size} processes" if report.world_size > 1 else ""
    precision = "" if report.precision == "no" else f", {report.precision}"
    yield "runs on", f"{report.device}{precision}{ranks}; {report.optimizer}"
    yield "updates", _updates(report)
    if report.seconds is not None:
        yield "time", _time(report)
    for name, split in report.splits.items():
        yield from _lines_of_split(name, split)
    if report.loss is not None:
        yield "first loss", _loss(report.loss, report.chance)
    if report.largest is not None:
        yield "largest batch", _largest(report.largest, report.optimizer_bytes)
    if report.num_checkpoints:
        yield "checkpoints", _checkpoints(report)
    for number, note in enumerate(report.notes):
        yield "" if number else "look at", note


def _parameters(found: Parameters) -> str:
    frozen = found.num_all - found.num_trainable
    parts = [f"{found.num_trainable:,} of {found.num_all:,} parameters are trained"]
    if frozen:
        parts.append(f"{frozen:,} are frozen")
    if found.num_shared:
        parts.append(f"{found.num_shared:,} are shared")
    return f"{', '.join(parts)}; {' and '.join(found.dtypes)}"


def _updates(report: PreflightReport) -> str:
    parts = [f"{report.num_steps:,}"]
    if report.num_epochs is not None:
        epochs = f"{report.num_epochs} epochs" if report.num_epochs > 1 else "1 epoch"
        parts = [f"{report.num_steps:,} in {epochs}"]
    if report.num_epochs != 1 and report.num_steps_per_epoch is not None:
        parts.append(f"{report.num_steps_per_epoch:,} in an epoch")
    if report.rows_per_step is not None:
        parts.append(f"of {report.rows_per_step} rows")
    return ", ".join(parts)


def _time(report: PreflightReport) -> str:
    least, most = report.seconds or (0.0, 0.0)
    low, high = duration(least), duration(most)
    span = low if low == high else f"{low} to {high}"
    batches = f"{report.num_timed} batches" if report.num_timed != 1 else "1 batch"
    return (
        f"{span} for the forward and backward passes, by the least and the most of {batches}; "
        "reading, optimizer, evaluation and saving come on top"
    )


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> [duration(seconds) for seconds in (0.02, 8.2, 190, 9000)]
    ['under 1 s', '8 s', '3 min', '2.5 h']
    """
    if seconds < 1:
        return "under 1 s"
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5940 else f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    """Return a number of bytes in words.

    >>> size(1_200), size(5.25e9)
    ('1.2 kB', '5.2 GB')
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1000
        del units[0]
    places = 0 if num_bytes >= 99.5 or units[0] == "B" else 1
    return f"{num_bytes:.{places}f} {units[0]}"


def _lines_of_split(name: str, split: SplitSummary) -> Iterator[tuple[str, str]]:
    rows = None if split.num_rows is None else counted(split.num_rows, "row")
    batches = counted(split.num_batches, "batch", "batches") if split.num_batches else None
    parts = [" in ".join(filter(None, (rows, batches))) or "a stream"]
    if split.num_cut is not None:
        share = share_of(split.num_cut, max(split.num_texts, 1)) if split.num_cut else "none"
        parts.append(f"{share} of the texts cut off at {split.max_length} tokens")
    if split.padding is not None:
        parts.append(f"{share_of(split.padding, 1)} padding")
    yield name, ", ".join(parts)
    if split.labels is not None:
        mean, variance = split.labels
        yield (
            "",
            f"labels with a mean of {mean:.4g} and a standard deviation of {variance**0.5:.4g}",
        )
    if split.classes:
        yield "", _classes(split)


def _classes(split: SplitSummary) -> str:
    total = sum(split.classes.values()) or 1
    by_size = sorted(split.classes.items(), key=lambda found: -found[1])
    shown = [
        f"{name} {count:,} ({share_of(count, total)})"
        for name, count in by_size[:_NUM_CLASSES_SHOWN]
    ]
    more = len(by_size) - len(shown)
    shown += [f"... ({more} more)"] if more else []
    of = "" if split.num_counted == split.num_rows else f" (of {split.num_counted} rows)"
    return f"{', '.join(shown)}{of}"


def _loss(loss: float, chance: Chance | None) -> str:
    if chance is None:
        return f"{loss:.4g}"
    shares = ""
    if chance.of_shares is not None and abs(chance.of_shares - chance.loss) > 0.01:
        shares = f", by the shares of the classes {chance.of_shares:.4g}"
    return f"{loss:.4g}; guessing gives {chance.loss:.4g} ({chance.name}){shares}"


def _largest(batch: LargestBatch, optimizer_bytes: int | None) -> str:
    tokens = "" if batch.num_tokens is None else f" of {batch.num_tokens} tokens"
    what = f"{counted(batch.num_rows, 'row')}{tokens}"
    if not batch.fits:
        return f"{what}: out of memory, of {size(batch.device_bytes or 0)}"
    seconds = batch.seconds
    what += f": {seconds:.2g} s" if seconds < 10 else f": {duration(seconds)}"
    device = "" if batch.device_bytes is None else f" of {size(batch.device_bytes)}"
    if batch.peak_bytes is not None:
        more = f"; the optimizer adds {size(optimizer_bytes)}" if optimizer_bytes else ""
        return f"{what}, at most {size(batch.peak_bytes)}{device} in use{more}"
    if batch.process_bytes is not None:
        return f"{what}; this process has used at most {size(batch.process_bytes)}{device} so far"
    return what


def _checkpoints(report: PreflightReport) -> str:
    free = "" if report.free_bytes is None else f"; {size(report.free_bytes)} are free"
    if report.checkpoint_bytes is None:
        return f"up to {report.num_checkpoints} at once, of a size that is not known before{free}"
    total = size(report.checkpoint_bytes * report.num_checkpoints)
    one = size(report.checkpoint_bytes)
    return f"{one} each, up to {report.num_checkpoints} at once: {total}{free}"
