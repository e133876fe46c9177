"""What of a report is worth a second look, in a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from manualloop.forecast.chance import doubt_about_start
from manualloop.forecast.report import PreflightReport, size
from manualloop.forecast.splits import missing_classes
from manualloop.tasks.made import share_of


def doubts_about(report: PreflightReport) -> Iterator[str]:
    """Give a sentence on each thing that is worth a second look."""
    train = report.splits[report.train]
    others = [split.classes for name, split in report.splits.items() if name != report.train]
    if train.classes and (missing := missing_classes(train.classes, others)):
        yield (
            f"No row of {report.train} has the classes {', '.join(missing[:5])}, which other "
            "splits have: they cannot be learned. Split the rows anew: "
            'dataset.train_test_split(0.1, stratify_by_column="label").'
        )
    empty = [name for name, count in train.classes.items() if not count]
    if train.num_counted == train.num_rows and (left := [n for n in empty if n not in missing]):
        yield f"The model has classes of which {report.train} has no row: {', '.join(left[:5])}."
    for name, split in report.splits.items():
        if split.num_in_train:
            share = share_of(split.num_in_train, split.num_rows or split.num_in_train)
            yield (
                f"{split.num_in_train} rows of {name} ({share}) have the tokens of a row of "
                f"{report.train}: their scores say little about new texts."
            )
    if report.loss is not None:
        yield from filter(None, [doubt_about_start(report.loss, report.chance, train)])
    if names := report.without_gradient:
        yield (
            f"{len(names)} trainable parameters got no gradient, the first of them {names[0]}: the "
            "loss does not depend on them. Freeze them: parameter.requires_grad_(False)."
        )
    if report.largest is not None and not report.largest.fits:
        yield (
            f"Memory runs out with the largest batch, of {report.largest.num_rows} rows. Use a "
            "smaller batch_size and gradient_accumulation_steps: the update is the same."
        )
    if report.checkpoint_bytes and report.num_checkpoints and report.free_bytes is not None:
        needed = report.checkpoint_bytes * report.num_checkpoints
        if needed > report.free_bytes:
            yield (
                f"Checkpoints need {size(needed)}, and {size(report.free_bytes)} are free. Free "
                "some space, or keep fewer: keep_checkpoints=1."
            )
