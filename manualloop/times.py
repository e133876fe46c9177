"""Times: where the time of a run went, and how times are written in arguments."""

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

_OFF = 0.2  # share of the time or of the tokens above which advice is given
_LONG_ENOUGH = 30.0  # seconds after which a run gets advice


@dataclass(slots=True)
class Times:
    """The time that this process spent on each part of a run, and the tokens it trained on.

    Times are measured on the host, in seconds. With an accelerator the host only launches work, and
    waits for it where it first needs a result, such as a loss that is logged.

    Attributes:
        data: Time spent waiting for the next batch.
        copy: Time spent copying batches to the device.
        update: Time of the whole updates, copies and optimizer included.
        optimizer: Time of clipping, optimizer and schedule.
        evaluation: Time of ``evaluate``.
        checkpoint: Time spent saving.
        num_tokens: Number of tokens in this process's batches according to their attention masks; 0
            without masks.
        num_places: Number of tokens, padding included.
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
        """Time of forward and backward passes, in seconds."""
        return max(self.update - self.copy - self.optimizer, 0.0)

    @property
    def total(self) -> float:
        """Sum of all times, in seconds."""
        return self.data + self.update + self.evaluation + self.checkpoint

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of training, without padding; 0.0 if there was no attention mask."""
        seconds = self.data + self.update
        return self.num_tokens / seconds if seconds else 0.0

    @property
    def padding(self) -> float:
        """Share of padding in the batches; 0.0 if there was no attention mask."""
        return 1 - self.num_tokens / self.num_places if self.num_places else 0.0

    def count_tokens(self, batches: Sequence[Any]) -> None:
        """Count the tokens of a window, if the host can do so without waiting."""
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if mask is None and isinstance(batch, Mapping) and "position_ids" in batch:
                mask = batch.get("input_ids")  # of a pack, which has no padding
                number = mask.numel() if isinstance(mask, Tensor) else 0
                self.num_tokens += number
                self.num_places += number
                continue
            if not isinstance(mask, Tensor) or mask.device.type != "cpu":
                continue
            if mask.ndim == 2 and not mask.is_floating_point():  # others are added to the scores
                tokens: Any = mask.sum().tolist()  # no .item(): it counts as a wait
                self.num_tokens += tokens
                self.num_places += mask.numel()

    def as_dict(self) -> dict[str, float]:
        """Return all times and rates by name."""
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
        return f"{self.total:.1f} s" + (f": {', '.join(parts)}" if parts else "")

    def advice(self, num_workers: int | None, *, may_group: bool) -> str | None:
        """Return a line on the largest avoidable cost and its remedy; None if there is none.

        Args:
            num_workers: Number of workers of the training loader; None if it cannot have any.
            may_group: Whether the loader is a prepared one whose rows are not grouped by length.
        """
        if self.total < _LONG_ENOUGH:
            return None
        workers = f"Try num_workers={2 * (num_workers or 1)}"
        if num_workers is None:  # such as a list, or an iterator of one's own
            workers = "A DataLoader with num_workers=2 would read while the model computes"
        found = {
            f"waiting for data. {workers}": self.data / self.total,
            "saving checkpoints. Try a larger checkpoint_every": self.checkpoint / self.total,
        }
        if may_group:
            share = (self.update - self.optimizer) / self.total
            found["computing padding. Try group_by_length=True"] = self.padding * share
        text, share = max(found.items(), key=lambda item: item[1])
        return f"{share:.0%} of the time went to {text}." if share > _OFF else None


def parse_seconds(name: str, time: float | str | None) -> float | None:
    """Convert a time to seconds. It is a number of seconds, ``"30 s"``, ``"10 min"`` or ``"2 h"``.

    Raises:
        ConfigError: The time cannot be parsed, or is not above 0.

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
