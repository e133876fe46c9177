"""The record of a run: losses gathered on the device, read late, averaged by items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from manualloop.errors import ConfigError
from manualloop.types import Step

Record: TypeAlias = dict[str, Any]
_NUM_UNSTACKED = 256  # a 0-d CUDA tensor occupies 512 bytes


class LateTensor:
    """A tensor on its way to the host; nothing waits for it until ``read``.

    From CUDA the copy goes to pinned memory on the current stream, and an event tells when it has
    landed. Elsewhere the copy is made when it is read.

    Attributes:
        tells: Whether ``has_landed`` knows.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tells = tensor.is_cuda or tensor.device.type == "cpu"
        self._tensor = tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor
        self._event: Any = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def has_landed(self) -> bool:
        """Tell whether reading it would not wait for the work of this moment, or nothing tells."""
        return self._event is None or bool(self._event.query())

    def read(self) -> list[float]:
        """Return the numbers, waiting for them if they are still on their way."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._tensor.tolist()
        return values


class History:
    """Collects steps and evaluations into records.

    A record of training holds ``step``, ``epoch`` (a fraction), ``loss`` (the mean over all items
    since the record before), ``lr``, ``grad_norm`` (of its step; only with ``max_grad_norm``) and
    ``num_items``; one of an evaluation ``step``, ``epoch`` and ``eval_...`` for each metric.

    Attributes:
        records: In the order of the run.
        last_loss: The loss of the newest record that has reached the host; None before.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.last_loss: float | None = None
        self._read: list[float] = []  # losses that a checkpoint brought along
        self._losses: list[Tensor] = []
        self._num_items: list[float] = []
        self._pending: list[tuple[Record, LateTensor | None, list[float], list[float]]] = []

    def add(self, step: Step) -> None:
        """Remember a step's loss, where it is."""
        loss = step.loss.detach() if step.loss.requires_grad else step.loss  # by a step_fn
        self._losses.append(loss)
        self._num_items.append(step.num_items)
        if len(self._losses) >= _NUM_UNSTACKED:
            self._losses = [torch.cat([loss.reshape(-1) for loss in self._losses])]

    def has_open_interval(self) -> bool:
        """Tell whether there were steps since the last record of training."""
        return bool(self._num_items)

    def close_interval(self, step: Step, epoch: float) -> None:
        """Make a record of the steps since the last one. Its loss is filled in when it lands."""
        record: Record = {"step": step.index, "epoch": epoch, "loss": None, "lr": float(step.lr)}
        late = [loss.reshape(-1) for loss in self._losses]
        if step.grad_norm is not None:
            record["grad_norm"] = None
            late.append(step.grad_norm.reshape(-1))
        record["num_items"] = sum(self._num_items)
        self.records.append(record)
        landing = LateTensor(torch.cat(late)) if late else None
        self._pending.append((record, landing, self._read, self._num_items))
        self._read, self._losses, self._num_items = [], [], []
        self.collect(wait=False)

    def add_evaluation(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Make a record of an evaluation after so many updates."""
        values = {f"eval_{name}": value for name, value in metrics.items()}
        self.records.append({"step": step, "epoch": epoch, **values})

    def open_interval(self) -> dict[str, list[float]]:
        """Return the losses and items since the last record of training, waiting for them."""
        losses = [value for loss in self._losses for value in loss.reshape(-1).tolist()]
        return {"losses": [*self._read, *losses], "num_items": list(self._num_items)}

    def restore(self, records: list[Record], interval: Mapping[str, list[float]]) -> None:
        """Go on from records, and from what ``open_interval`` returned."""
        self.records = records
        self._read, self._num_items = list(interval["losses"]), list(interval["num_items"])

    def collect(self, *, wait: bool) -> None:
        """Fill in the losses that have landed; with ``wait`` all of them."""
        while self._pending and (
            wait or self._pending[0][1] is None or self._pending[0][1].has_landed()
        ):
            record, late, read, num_items = self._pending.pop(0)
            values = read + (late.read() if late else [])
            if "grad_norm" in record:
                record["grad_norm"] = values.pop()
            total = sum(loss * items for loss, items in zip(values, num_items, strict=True))
            mean = total / record["num_items"] if record["num_items"] else math.nan
            record["loss"] = self.last_loss = mean


def best_of(evaluations: Sequence[Mapping[str, float]], best_metric: str | None) -> int:
    """Return which evaluation is the best so far: the first of equals, and NaN is the worst.

    Args:
        evaluations: At least one, oldest first.
        best_metric: As in ``train_loop``; None: the newest is the best.

    Raises:
        ConfigError: The metric is not among the results.

    >>> best_of([{"loss": 0.7}, {"loss": 0.4}, {"loss": float("nan")}], "-loss")
    1
    """
    if best_metric is None:
        return len(evaluations) - 1
    name = best_metric.removeprefix("-")
    if name not in evaluations[-1]:
        raise ConfigError(
            f"best_metric={best_metric!r}, and evaluate returned no {name!r}: "
            f"{', '.join(evaluations[-1]) or 'nothing'}. Name one of its results."
        )
    sign = -1 if best_metric.startswith("-") else 1
    values = [sign * metrics[name] for metrics in evaluations]
    return max(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])
