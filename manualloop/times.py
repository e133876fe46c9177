"""Where the time of a run went."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from manualloop.errors import ConfigError

SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600}
TIME_OR_EPOCHS = re.compile(r"(?:(\d+(?:\.\d+)?) ?)?(epochs?|s|sec|min|h)")

_OFF = 0.2  # of the time, or of the tokens, above which something is said
_LONG_ENOUGH = 30.0  # seconds that a run takes before anything is said


@dataclass(slots=True)
class Times:
    """Seconds of this process by what they went to, and the tokens that it trained on.

    They are the host's: on an accelerator it only hands out work, and waits for it wherever it
    first needs a result, such as a loss that is logged.

    Attributes:
        data: Waiting for the next batch.
        copy: Copying batches to the device.
        update: All of the updates, copies and optimizer included.
        optimizer: Clipping, optimizer and schedule.
        evaluation: In ``evaluate``.
        checkpoint: Saving.
        num_tokens: That an attention mask shows, of this process's batches. 0 without masks.
        num_places: Tokens and padding together.
    """

    data: float = 0.0
    copy: float = 0.0
    update: float = 0.0
    optimizer: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0
    num_tokens: int = 0
    num_places: int = 0

    @property
    def forward_backward(self) -> float:
        """Seconds in forward and backward passes."""
        return max(self.update - self.copy - self.optimizer, 0.0)

    @property
    def total(self) -> float:
        """Seconds of all that is measured."""
        return self.data + self.update + self.evaluation + self.checkpoint

    @property
    def tokens_per_second(self) -> float:
        """Tokens, without padding, that were trained on in a second of training; 0.0: none seen."""
        seconds = self.data + self.update
        return self.num_tokens / seconds if seconds else 0.0

    @property
    def padding(self) -> float:
        """Share of padding in the batches; 0.0 if there was no attention mask."""
        return 1 - self.num_tokens / self.num_places if self.num_places else 0.0

    def count_tokens(self, batches: Sequence[Any]) -> None:
        """Take note of a window's tokens, where the host can count them without waiting."""
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if not isinstance(mask, Tensor) or mask.device.type != "cpu":
                continue
            if mask.ndim == 2 and not mask.is_floating_point():  # others are added to scores
                tokens: Any = mask.sum().tolist()  # no .item(): it counts as a wait
                self.num_tokens += tokens
                self.num_places += mask.numel()

    def as_dict(self) -> dict[str, float]:
        """Return all of it by name."""
        return {
            **asdict(self),
            "forward_backward": self.forward_backward,
            "tokens_per_second": self.tokens_per_second,
            "padding": self.padding,
        }

    def __str__(self) -> str:
        total = self.total or 1.0
        names = ("data", "copy", "forward_backward", "optimizer", "evaluation", "checkpoint")
        seconds = {name: getattr(self, name) for name in names}
        parts = [f"{name} {value / total:.0%}" for name, value in seconds.items() if value]
        if self.num_tokens:
            parts += [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.padding:.0%} padding"]
        return f"{self.total:.1f} s: {', '.join(parts)}"

    def advice(self, num_workers: int, *, may_group: bool) -> str | None:
        """Say what is off, and what to do about it: the largest share; None: nothing is.

        Args:
            num_workers: Of the training loader.
            may_group: Whether it is a prepared one whose rows are not grouped by length.
        """
        if self.total < _LONG_ENOUGH:
            return None
        found = {
            f"waiting for data: num_workers={2 * num_workers or 2}": self.data / self.total,
            "saving: checkpoint_every a larger number": self.checkpoint / self.total,
        }
        if may_group:
            share = (self.update - self.optimizer) / self.total
            found["computing padding: group_by_length=True"] = self.padding * share
        text, share = max(found.items(), key=lambda item: item[1])
        return f"{share:.0%} of the time went to {text}." if share > _OFF else None


def parse_seconds(name: str, time: float | str | None) -> float | None:
    """Turn a time into seconds: a number of them, ``"30 s"``, ``"10 min"`` or ``"2 h"``.

    Raises:
        ConfigError: It cannot be read, or is not above 0.

    >>> parse_seconds("max_time", "1.5 h")
    5400.0
    """
    if time is None:
        return None
    parts = TIME_OR_EPOCHS.fullmatch(time) if isinstance(time, str) else None
    seconds = 0.0
    if parts is not None and parts[2] in SECONDS:
        seconds = float(Fraction(parts[1] or 1) * SECONDS[parts[2]])
    elif isinstance(time, int | float) and not isinstance(time, bool):
        seconds = float(time)
    if not seconds > 0:
        raise ConfigError(
            f'{name}={time!r} is not a time. Write seconds (600), or "30 s", "10 min", "2 h".'
        )
    return seconds
