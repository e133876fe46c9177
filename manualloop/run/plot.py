"""The curves of a run, drawn with matplotlib: ``pip install manualloop[plot]``."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from manualloop.run.report import ends_of_intervals
from manualloop.types import Record


def plot_history(history: Sequence[Record]) -> Any:
    """Draw loss, evaluations and learning rate over the steps.

    Args:
        history: Records of a run, as in ``TrainResult.history``.

    Returns:
        A figure of matplotlib. A notebook shows it if it is the last value of a cell.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install manualloop[plot]") from error

    class Curves(Figure):
        def _repr_png_(self) -> bytes:  # without pyplot a notebook cannot show a Figure
            with BytesIO() as file:
                self.savefig(file, format="png")
                return file.getvalue()

    training = [record for record in history if "loss" in record]
    evaluations = [record for record in history if "loss" not in record]
    scores = sorted({name for record in evaluations for name in record if name[:5] == "eval_"})
    intervals = ends_of_intervals(scores)
    ends = {end for pair in intervals.values() for end in pair}
    scores = [name for name in scores if name != "eval_loss" and name not in ends]
    panels = ["loss", *(["scores"] if scores else []), "learning rate"]
    figure = Curves(figsize=(6.4, 2.4 * len(panels)), layout="constrained")
    axes = dict(zip(panels, figure.subplots(len(panels), sharex=True), strict=True))

    def numbers(records: Sequence[Record], *names: str) -> list[list[Any]]:
        # An evaluation may return texts and lists.
        rows = [[record.get(name) for name in ("step", *names)] for record in records]
        return [row for row in rows if all(isinstance(value, int | float) for value in row)]

    def curve(panel: str, records: Sequence[Record], name: str, label: str, marker: str) -> None:
        if not (points := numbers(records, name)):
            return
        (line,) = axes[panel].plot(*zip(*points, strict=True), marker=marker, label=label)
        if name in intervals and (bands := numbers(records, *intervals[name])):
            axes[panel].fill_between(*zip(*bands, strict=True), alpha=0.2, color=line.get_color())

    curve("loss", training, "loss", "training", "")
    curve("loss", evaluations, "eval_loss", "evaluation", "o")
    for name in scores:
        curve("scores", evaluations, name, name.removeprefix("eval_"), "o")
    curve("learning rate", training, "lr", "lr", "")
    for panel, axis in axes.items():
        axis.set_ylabel(panel)
        axis.grid(alpha=0.3)
        if panel != "learning rate" and axis.lines:
            axis.legend()
    axes["learning rate"].set_xlabel("step (optimizer update)")
    return figure
