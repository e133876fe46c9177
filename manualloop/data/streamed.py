"""Random transforms of streams: the number of a row is its place in the stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from manualloop.data.transform import TransformedRows
from manualloop.errors import ConfigError


class TransformedStream(IterableDataset[dict[str, Any]]):
    """A stream whose rows are transformed when they are read, and are numbered as they come.

    Args:
        rows: A stream of ``datasets``.
        by_row: The transform.

    Attributes:
        streamed_rows: As ``rows``.
        by_row: As the argument.
        epoch: Epoch in which the rows are read.
        epoch_of_rows: Epoch that the rows are transformed for; None means ``epoch``.
    """

    def __init__(self, rows: Any, by_row: TransformedRows) -> None:
        self.streamed_rows, self.by_row = rows, by_row
        self.epoch = 0
        self.epoch_of_rows: int | None = None
        self._begin, self._num_read = 0, 0

    @property
    def makes_labels(self) -> bool:
        """Whether the transform was seen to return other labels than the row's."""
        return self.by_row.makes_labels

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch
        self.streamed_rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the transformed rows from the place that was loaded, or from the first.

        Raises:
            ConfigError: Another process reads them, as one of several.
        """
        if get_worker_info() is not None:
            raise ConfigError(workers_message(self.by_row.split))
        begin, self._begin = self._begin, 0
        self._num_read = begin
        for row in self.streamed_rows:
            self.streamed_rows.load_state_dict({})  # the next pass begins at the start
            number = self._num_read
            self._num_read = number + 1
            epoch = self.epoch if self.epoch_of_rows is None else self.epoch_of_rows
            yield self.by_row.transformed([row], [row], [number], epoch)[0]
        self.streamed_rows.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the pass under way."""
        return {"rows": self.streamed_rows.state_dict(), "num_read": self._num_read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass begin at a place that ``state_dict`` returned."""
        self.streamed_rows.load_state_dict(state["rows"])
        self._begin = self._num_read = state["num_read"]


def require_one_process(rows: Any, num_workers: int) -> None:
    """Refuse a transformed stream that workers would read.

    Raises:
        ConfigError: It is one.
    """
    if isinstance(rows, TransformedStream) and num_workers:
        raise ConfigError(workers_message(rows.by_row.split))


def workers_message(split: str) -> str:
    """Return the message about a transform of a stream that several processes read."""
    return (
        f"transform= draws for each row by its number, and nobody knows the numbers of the rows of "
        f"{split}, a stream that workers read. Read it with num_workers=0, or give the rows "
        "numbers: datasets.Dataset.from_list(list(dataset))."
    )
