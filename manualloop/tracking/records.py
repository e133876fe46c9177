"""What trackers have in common: the names of metrics, and packages that may be missing."""

from __future__ import annotations

from importlib import import_module
from numbers import Real
from typing import Any

from manualloop.notices import say
from manualloop.types import Record, is_training

_OF_TRAINING = {"lr": "learning_rate"}
STEP = "train/global_step"


class Numbers:
    """Takes the numbers out of records, by the names that the Trainer gives them.

    What is no number is left out, and reported once by its name.

    Args:
        tracker: Name of the tracker, for the message.

    >>> numbers = Numbers("wandb")
    >>> numbers({"step": 8, "epoch": 0.5, "loss": 0.7, "lr": 1e-5, "num_items": 64})
    {'train/epoch': 0.5, 'train/loss': 0.7, 'train/learning_rate': 1e-05, 'train/num_items': 64}
    >>> numbers({"step": 8, "epoch": 0.5, "eval_f1": 0.9})
    {'eval/f1': 0.9}
    """

    def __init__(self, tracker: str) -> None:
        self._tracker = tracker
        self._left_out: set[str] = set()

    def __call__(self, record: Record) -> dict[str, float]:
        """Return the numbers of a record by name, without its step."""
        found, left_out = {}, []
        of_training = is_training(record)
        for name, value in record.items():
            if name == "step" or (name == "epoch" and not of_training):
                continue
            if isinstance(value, Real):
                number = int(value) if isinstance(value, bool) else value
                found[_name(name, of_training=of_training)] = number
            elif name not in self._left_out:
                left_out.append(name)
        if left_out:
            self._left_out.update(left_out)
            say(
                f"{self._tracker} takes numbers alone: {', '.join(left_out)} "
                f"{'is' if len(left_out) == 1 else 'are'} left out there, and kept in the history."
            )
        return found  # type: ignore[return-value]  # a Real

    def row(self, record: Record) -> dict[str, float]:
        """Return the numbers of a record with its step and epoch, for backends that keep rows."""
        return {STEP: record["step"], "train/epoch": record["epoch"], **self(record)}


def _name(name: str, *, of_training: bool) -> str:
    if of_training:
        return f"train/{_OF_TRAINING.get(name, name)}"
    return f"eval/{name.removeprefix('eval_')}"


def load(module: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        ImportError: It cannot be imported; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"The tracker {extra} needs {module.split('.')[0]}, which cannot be imported "
            f'({error}). Install it: pip install "manualloop[{extra}]".'
        ) from error
