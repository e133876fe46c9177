"""Plain data that the modules exchange."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch: TypeAlias = Mapping[str, Any]
"""What a loader yields: column name to tensor, the first axis being the rows."""

LossFn: TypeAlias = "Callable[[nn.Module, Any], Tensor | tuple[Tensor, float | Tensor]]"
"""``loss_fn(model, batch)`` returns a mean loss, or ``(mean_loss, num_items)``.

With class weights the items are the sum of the rows' weights. A tensor of items is waited for.
"""

Terms: TypeAlias = "Callable[[Any, Any], Sequence[tuple[Tensor, float | Tensor]]]"
"""``terms(outputs, batch)`` returns the loss as means, each with the number of items it is over.

The loss is the sum of the means. A tensor of items is waited for.
"""


@dataclass(slots=True)  # not frozen: that takes three times as long to make
class Window:
    """The micro-batches of one update.

    Attributes:
        batches: At least one, at most ``gradient_accumulation_steps`` of them, as the loader gave
            them (on the CPU, unless the loader itself puts them elsewhere).
        num_samples: Rows in the window, on all ranks.
        ends_epoch: Whether the loader has nothing after it.
        starts: Rows of the epoch before each batch.
    """

    batches: list[Any]
    num_samples: int
    ends_epoch: bool
    starts: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Update:
    """What one call of a ``step_fn`` did.

    Attributes:
        loss: 0-d, detached, on the device: the mean over all items of the window.
        num_items: Items the mean is over: rows, tokens or elements, by task; a fraction only if
            ``loss_fn`` returned one.
        grad_norm: 0-d norm before clipping, or None where none was computed.
        applied: False if the weights were left as they were: nothing to learn from in the
            window, an fp16 overflow, or a loss or norm that is not finite.
        is_finite: Whether loss and gradient norm are: a bool if the host knows, else a 0-d flag on
            the device, by which the update was guarded; None where nobody watches them.
    """

    loss: Tensor
    num_items: float
    grad_norm: Tensor | None = None
    applied: bool = True
    is_finite: bool | Tensor | None = None


@dataclass(slots=True, eq=False, repr=False)
class Step:
    """One optimizer update that was applied.

    It holds Python numbers and detached 0-d tensors, so that keeping all of them is cheap, and
    nothing in it waits for the device: ``float(step.loss)`` is yours to call.

    Attributes:
        index: Updates applied so far, this one included: counts from 1.
        epoch: The epoch it belongs to: counts from 0.
        num_steps: Updates that the whole run will have made, as far as the epoch at hand tells.
        loss: Mean loss over the window's items before the update; 0-d, on the device.
        lr: Learning rate of the first parameter group that this update used; NaN if it has none.
        grad_norm: Gradient norm before clipping, 0-d, or None unless ``max_grad_norm`` is set.
        num_items: Items in the window: rows, tokens or elements, by task.
        ends_epoch: Whether this is the epoch's last update. Where that was skipped, no step is.
        is_last: Whether the run ends with it.
        num_skipped: Updates left out so far in the run.
    """

    index: int
    epoch: int
    num_steps: int
    loss: Tensor
    lr: float
    grad_norm: Tensor | None
    num_items: float
    ends_epoch: bool
    is_last: bool
    num_skipped: int = 0

    def every(self, n: int) -> bool:
        """Tell whether this is the n-th, 2n-th, ... update."""
        return self.index % n == 0

    def __repr__(self) -> str:
        # No tensor in it: printing one would wait for the device.
        end = ", ends_epoch" if self.ends_epoch else ""
        return f"Step({self.index}/{self.num_steps}, epoch={self.epoch}, lr={self.lr:.3g}{end})"


class Matrix(NamedTuple):
    """A table of numbers with a name for each row and column, which prints aligned.

    Attributes:
        values: The numbers, ``(rows, columns)``; counts are integers.
        rows: Names of the rows.
        columns: Names of the columns.
        title: Meaning of rows and columns.

    >>> import numpy as np
    >>> names = ("no", "yes")
    >>> print(Matrix(np.array([[12, 3], [0, 105]]), names, names, "true, predicted"))
    true, predicted  no  yes
    no               12    3
    yes               0  105
    """

    values: NDArray[Any]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    title: str = ""

    def __str__(self) -> str:
        columns = [_cells(column) for column in self.values.T.tolist()]
        cells = [list(row) for row in zip(*columns, strict=True)]
        table = [[self.title, *self.columns]]
        table += [[name, *row] for name, row in zip(self.rows, cells, strict=True)]
        widths = [max(map(num_cells, column)) for column in zip(*table, strict=True)]
        lines = []
        for first, *others in table:
            padded = [first + " " * (widths[0] - num_cells(first))]
            for text, width in zip(others, widths[1:], strict=True):
                padded.append(" " * (width - num_cells(text)) + text)
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)


def _cells(column: list[float]) -> list[str]:
    """Return the numbers of a column as text; counts have no digits after the point."""
    are_counts = max(column, default=0) > 1 and all(float(value).is_integer() for value in column)
    if are_counts or all(isinstance(value, int) for value in column):
        return [str(int(value)) for value in column]
    return [f"{value:.4f}" for value in column]


def _number(value: float) -> str:
    """Return a score as text, of which four digits after the point may show nothing.

    >>> [_number(value) for value in (0.5, 0.0, 3.2e-06, -1.5e9, float("nan"))]
    ['0.5000', '0.0000', '3.20e-06', '-1.50e+09', 'nan']
    """
    is_usual = value == 0 or 0.001 <= abs(value) < 1e7 or not math.isfinite(value)
    return f"{value:.4f}" if is_usual else f"{value:.2e}"


def num_cells(text: str) -> int:
    """Return the width of a text in a terminal: wide characters take two cells, accents none."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


class Scores(dict[str, float]):
    """Scores by name; beside them is what is not one number.

    Attributes:
        matrices: Confusion matrices and scores by class, by the name of the metric.
        texts: Texts among the results of metrics, by key.
        names: Names of the classes; None where nobody knows them.
        model: Weak reference to the model that was scored; None if there is none.
        sample: Some numbers of its weights at that time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.matrices: dict[str, Matrix] = {}
        self.texts: dict[str, str] = {}
        self.names: tuple[str, ...] | None = None
        self.model: Callable[[], nn.Module | None] | None = None
        self.sample: Tensor | None = None

    def add(self, scores: Mapping[str, float], prefix: str = "") -> None:
        """Add the scores of a metric or of a loader, with what is beside them.

        Args:
            scores: Scores by name.
            prefix: Beginning of their keys here.
        """
        self.update({prefix + name: value for name, value in scores.items()})
        if isinstance(scores, Scores):
            self.matrices |= {prefix + name: matrix for name, matrix in scores.matrices.items()}
            self.texts |= {prefix + name: text for name, text in scores.texts.items()}
            self.names = self.names or scores.names

    def report(self) -> str:
        """Return all of it as text: the scores, then each matrix and text under its name."""
        found: list[tuple[str, object]] = [*self.matrices.items(), *self.texts.items()]
        shown = {
            f"{prefix}{row}_{column}"
            for name, matrix in self.matrices.items()
            for prefix in (name.removesuffix("classification_report"),)
            for row in matrix.rows
            for column in matrix.columns
        }
        bounds = {f"{name}_{bound}" for name in self for bound in ("low", "high")} & self.keys()
        alone = [name for name in self if name not in shown | bounds]
        width = max(map(num_cells, alone), default=0)
        lines = [f"{name}{' ' * (width - num_cells(name))}  {self._text(name)}" for name in alone]
        parts = ["\n".join(lines)] if lines else []
        return "\n\n".join([*parts, *(f"{name}\n{str(part).rstrip()}" for name, part in found)])

    def _text(self, name: str) -> str:
        """Return a score, and its interval if there is one."""
        interval = [self.get(f"{name}_{bound}") for bound in ("low", "high")]
        if interval[0] is None or interval[1] is None:
            return _number(self[name])
        return f"{_number(self[name])}  ({_number(interval[0])} to {_number(interval[1])})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Elsewhere there is no such model.
        return _restored, (dict(self), self.matrices, self.texts, self.names)


def _restored(
    scores: dict[str, float],
    matrices: dict[str, Matrix],
    texts: dict[str, str],
    names: tuple[str, ...] | None,
) -> Scores:
    """Make a copy of ``Scores``, of which no model is known."""
    copied = Scores(scores)
    copied.matrices, copied.texts, copied.names = matrices, texts, names
    return copied


Record: TypeAlias = dict[str, Any]
"""What the history of a run holds: a record of training, or of an evaluation."""


def is_training(record: Mapping[str, Any]) -> bool:
    """Tell whether a record is of training; the others are of evaluations."""
    return "lr" in record


def metrics_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics in a record of an evaluation, by the names that ``evaluate`` gave them.

    >>> metrics_of({"step": 8, "epoch": 0.5, "eval_f1": 0.9})
    {'f1': 0.9}
    """
    return {name[5:]: value for name, value in record.items() if name.startswith("eval_")}


Tracker: TypeAlias = Callable[[Record], object]
"""A function that is called with each record of a run; see ``docs/tracking.md``."""


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their names, joined by dots.

    >>> flat({"config": {"dropout": 0.1}, "lr": 1e-3})
    {'config.dropout': 0.1, 'lr': 0.001}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        is_nested, name = isinstance(value, Mapping), f"{path}{name}"
        found |= flat(value, f"{name}.") if is_nested else {name: value}
    return found


class TrackedRun(NamedTuple):
    """What a tracker is told of a run before its first record.

    Attributes:
        id: Text that tells this run from all others, the same in all its processes.
        name: Name of the folder of its checkpoints; None without one.
        records: Records of the run so far, oldest first: those that its checkpoint knows.
        config: Settings of the run by name, numbers and texts; ``model_config`` is a dict.
    """

    id: str
    name: str | None
    records: list[Record]
    config: dict[str, Any]


class Plan(NamedTuple):
    """How long a run is.

    Attributes:
        num_steps: Updates in the run, if none is skipped.
        num_epochs: Epochs after which it ends; None if ``max_steps`` ends it.
        num_steps_per_epoch: None for data without a length.
    """

    num_steps: int
    num_epochs: int | None
    num_steps_per_epoch: int | None


OnNonfinite: TypeAlias = Literal["raise", "skip", "ignore"]
"""The reaction to a loss or a gradient norm that is NaN or infinite; see ``train_steps``."""


class Origin(NamedTuple):
    """Where the labels of a loader come from.

    Attributes:
        column: Their column in the user's dataset.
        key: Key of the split, as code; None if there is no mapping.
        keys: Keys of all splits that have labels.
        hidden: The forms in which they are hidden; None if they are not.
        maker: Name of the argument whose function returns them; None for those of the dataset.
        cut: Call that cuts rows at "{room}" tokens, of the function that made them; None: the
            tokenizer did.
    """

    column: str = "labels"
    key: str | None = None
    keys: tuple[str | None, ...] = (None,)
    hidden: str | None = None
    maker: str | None = None
    cut: str | None = None


class SplitNotes(NamedTuple):
    """What ``prepare_dataloaders`` notes about a split beside its rows, as plain data.

    What nobody knows, such as the number of rows of a stream, is None.

    Attributes:
        names: Name of each class, by its number in ``labels``; None if the data have no names.
        num_cut: Number of texts that were cut off; None if nobody knows.
        num_texts: Number of texts.
        max_length: Number of tokens at which they are cut off; None if they are not.
        num_rows: Number of rows.
        columns: Columns of the dataset, or those that ``preprocess`` has made of them.
        texts: Those of them that are tokenized.
        label: The one that holds the labels; None if there is none.
        num_per_class: Number of labels of each class, by its number; None for other tasks.
        quantiles: Labels that are values: the least, the quartiles and the greatest.
        lengths: Tokens of a row: the least, the median, the 95th percentile and the greatest.
        source: Name of the dataset on the hub, and of its configuration; None if it is not known
            to be from there.
    """

    names: tuple[str, ...] | None = None
    num_cut: int | None = None
    num_texts: int = 0
    max_length: int | None = None
    num_rows: int | None = None
    columns: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    label: str | None = None
    num_per_class: tuple[int, ...] | None = None
    quantiles: tuple[float, ...] | None = None
    lengths: tuple[int, ...] | None = None
    source: tuple[str, str | None] | None = None


class Place(NamedTuple):
    """Where a batch and its rows come from, in words.

    Attributes:
        find_batch: Function that returns the name of the batch. It may have to order all rows of
            an epoch, so it is called for a message alone.
        row: Function from a row's number in the batch to the row's name.
        origin: Where its labels come from.
    """

    find_batch: Callable[[], str]
    row: Callable[[int], str]
    origin: Origin = Origin()

    @property
    def batch(self) -> str:
        """Name of the batch, such as ``"train batch 7"``."""
        return self.find_batch()


class LoaderFacts(NamedTuple):
    """Facts about a loader that a resumed run is compared by.

    Attributes:
        same: Facts about the data, which must not change.
        exact: Settings that may change, though the run is then not bit-exact.
    """

    same: dict[str, Any]
    exact: dict[str, Any]
