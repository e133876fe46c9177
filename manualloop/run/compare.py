"""Compare two runs by the files they wrote, without running them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from manualloop.checkpoint.contract import contract_differences
from manualloop.checkpoint.folders import local_folder
from manualloop.checkpoint.manifest import find_folders
from manualloop.errors import CheckpointError
from manualloop.run.history_file import read_history
from manualloop.types import Record


@dataclass(frozen=True, slots=True)
class RunComparison:
    """The first difference between two runs. It prints as text.

    Attributes:
        step: The first step whose records differ, or None.
        names: Names of the values that differ there, such as ``["loss"]``; all of them if only one
            run has the record.
        first: The record of the first run at that step; None if it has none.
        second: The record of the second run.
        settings: Settings of the newest checkpoints that differ: "seed: 1 -> 2".
        num_records: Number of records that are the same in both, from the start.
    """

    step: int | None
    names: list[str]
    first: Record | None = field(repr=False)
    second: Record | None = field(repr=False)
    settings: list[str]
    num_records: int

    @property
    def is_same(self) -> bool:
        """Whether the records are the same to the last bit."""
        return self.step is None

    def __str__(self) -> str:
        if self.is_same:
            text = f"The same in all {self.num_records} records."
        else:
            values = ", ".join(
                f"{name} {(self.first or {}).get(name, 'none')!r} -> "
                f"{(self.second or {}).get(name, 'none')!r}"
                for name in self.names
            )
            are = "record that is" if self.num_records == 1 else "records that are"
            text = f"Different from step {self.step} on, after {self.num_records} {are} the same: "
            text += f"{values}."
        return "\n".join([text, *(f"- {setting}" for setting in self.settings)])

    __repr__ = __str__


def compare_runs(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> RunComparison:
    """Find the first step at which two runs differ, and in what they were set up differently.

    Args:
        a: ``checkpoint_dir`` of a run: its ``history.jsonl`` and its newest checkpoint are read.
        b: That of another.

    Raises:
        CheckpointError: One of them holds no run.

    >>> import tempfile, torch
    >>> from manualloop import train_loop
    >>> def run(folder, lr):
    ...     model = torch.nn.Linear(1, 1)
    ...     torch.nn.init.ones_(model.weight)
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    ...     train_loop(model, [torch.ones(2, 1)] * 4, optimizer, num_epochs=1, log_every=1,
    ...                loss_fn=lambda model, batch: model(batch).square().mean(),
    ...                checkpoint_dir=folder, progress_bar=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run(folder + "/a", lr=0.1)
    ...     run(folder + "/b", lr=0.2)
    ...     comparison = compare_runs(folder + "/a", folder + "/b")
    >>> comparison.step, comparison.settings
    (1, ['lr: 0.1 -> 0.2'])
    """
    records, contracts = [], []
    for directory in (local_folder(a, "a"), local_folder(b, "b")):
        manifests = [entry.manifest for entry in find_folders(directory) if entry.manifest]
        records.append(read_history(directory))
        contracts.append((manifests[0]["contract"] if manifests else None) or {})
        if not records[-1] and not manifests:
            raise CheckpointError(f"{directory} holds no run: no history.jsonl, no checkpoint.")
    settings = contract_differences(*contracts)
    for number, (first, second) in enumerate(zip_longest(*records)):
        if names := _differing(first or {}, second or {}):
            step = (first or second)["step"]
            return RunComparison(step, names, first, second, settings, number)
    return RunComparison(None, [], None, None, settings, len(records[0]))


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    # By repr: NaN is NaN, and 0.0 is not -0.0.
    names = dict.fromkeys((*first, *second))
    return [name for name in names if repr(first.get(name)) != repr(second.get(name))]
