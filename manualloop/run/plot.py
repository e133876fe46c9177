"""The curves of runs, drawn with matplotlib: ``pip install manualloop[plot]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from typing import Any, NamedTuple

from manualloop.errors import ConfigError
from manualloop.run.table import choose_metrics, ends_of_intervals
from manualloop.types import Record, metrics_of

# Of Okabe and Ito, which are told apart with any colour vision. Lines and markers differ as well,
# so that curves can be told apart in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")
_STAR = {"marker": "*", "markersize": 14, "markeredgecolor": "black"}
_MOST_PANELS = 4  # of scores, where several runs are drawn


class _Run(NamedTuple):
    """The history of a run, by what its records are of."""

    label: str
    training: list[Record]
    evaluations: list[Record]
    best_step: int | None


class _Style(NamedTuple):
    """How a curve is drawn."""

    color: str
    marker: str
    linestyle: str


def plot_history(*results: Any, labels: Sequence[str] | None = None) -> Any:
    """Draw the losses, the scores and the learning rate of one or several runs over their steps.

    One run has its losses in one panel and its scores in another. Several runs have a panel for
    each loss and score, in which they can be compared. Vertical lines or stars mark the best step,
    shades the intervals of scores. Colours differ for any colour vision, and lines in print.

    Args:
        results: Results of ``train_loop``, or their histories.
        labels: Names of the runs, in the same order; None takes the names of their
            ``checkpoint_dir``, or numbers them.

    Returns:
        A figure of matplotlib. A notebook shows it if it is the last value of a cell, and
        ``figure.savefig("curves.pdf")`` writes it to a file.

    Raises:
        ConfigError: There is no result, something else was passed, or labels are missing.
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install manualloop[plot]") from error

    class Curves(Figure):
        def _repr_png_(self) -> bytes:  # without pyplot a notebook cannot show a Figure
            with BytesIO() as file:
                self.savefig(file, format="png", dpi=144)
                return file.getvalue()

    runs = _read(results, labels)
    draw = _draw_one if len(runs) == 1 else _draw_several
    panels = _panels(runs)
    figure = Curves(figsize=(6.4, 0.6 + 2.0 * len(panels)), layout="constrained")
    axes = dict(zip(panels, figure.subplots(len(panels), sharex=True), strict=True))
    draw(runs, axes)
    for panel, axis in axes.items():
        axis.set_ylabel(_plain(panel))
        axis.grid(alpha=0.3)
        if panel == panels[0] or panel == "scores":
            named, _ = axis.get_legend_handles_labels()
            if named:
                axis.legend(fontsize="small")
    axes["learning rate"].set_xlabel("step (optimizer update)")
    return figure


def _read(results: Sequence[Any], labels: Sequence[str] | None) -> list[_Run]:
    if not results:
        raise ConfigError("There is nothing to plot. Pass results: plot_history(result).")
    is_list = isinstance(labels, Sequence) and not isinstance(labels, str)
    if labels is not None and not (is_list and len(labels) == len(results)):
        found = f"{len(labels)} labels" if is_list else f"labels={labels!r:.60}"
        raise ConfigError(
            f"There are {len(results)} results and {found}. Give each result one: "
            "plot_history(first, second, labels=['first', 'second'])."
        )
    runs = []
    for place, result in enumerate(results):
        history = getattr(result, "history", result)
        if not isinstance(history, Sequence) or not all(
            isinstance(record, Mapping) and "step" in record for record in history
        ):
            raise ConfigError(
                f"plot_history got a {type(result).__name__} as argument {place + 1}, which is "
                "neither a result of train_loop nor its history. Pass each result on its own: "
                "plot_history(*results)."
            )
        folder = getattr(result, "last_checkpoint", None)
        label = f"run {place + 1}" if folder is None else folder.parent.name
        runs.append(
            _Run(
                label if labels is None else str(labels[place]),
                [record for record in history if "loss" in record],
                [record for record in history if "loss" not in record],
                getattr(result, "best_step", None),
            )
        )
    return runs


def _scores(runs: Sequence[_Run]) -> list[str]:
    """Return the scores to draw, without those of single classes where there are many."""
    metrics = [metrics_of(record) for run in runs for record in run.evaluations]
    names, _ = choose_metrics(metrics, None)
    return [name for name in names if any(_points(run.evaluations, f"eval_{name}") for run in runs)]


def _panels(runs: Sequence[_Run]) -> list[str]:
    scores = _scores(runs)
    if len(runs) == 1:
        return ["loss", *(["scores"] if scores else []), "learning rate"]
    has_loss = any(_points(run.evaluations, "eval_loss") for run in runs)
    losses = ["training loss", *(["evaluation loss"] if has_loss else [])]
    return [*losses, *scores[:_MOST_PANELS], "learning rate"]


def _draw_one(runs: Sequence[_Run], axes: Mapping[str, Any]) -> None:
    (run,) = runs
    styles = _styles()
    _curve(axes["loss"], run.training, "loss", "training", next(styles)._replace(marker=""))
    _curve(axes["loss"], run.evaluations, "eval_loss", "evaluation", next(styles))
    styles = _styles()
    for name in _scores(runs):
        _curve(axes["scores"], run.evaluations, f"eval_{name}", name, next(styles))
    _curve(axes["learning rate"], run.training, "lr", "lr", _Style(_COLOURS[0], "", "-"))
    if run.best_step is not None:
        for place, axis in enumerate(axes.values()):
            label = "" if place else f"best: step {run.best_step}"
            axis.axvline(run.best_step, color="0.35", linestyle=(0, (1, 1)), label=label or None)


def _draw_several(runs: Sequence[_Run], axes: Mapping[str, Any]) -> None:
    for run, style in zip(runs, _styles(), strict=False):
        for panel, axis in axes.items():
            if panel in ("training loss", "learning rate"):
                name = "loss" if panel == "training loss" else "lr"
                _curve(axis, run.training, name, run.label, style._replace(marker=""))
                continue
            name = "eval_loss" if panel == "evaluation loss" else f"eval_{panel}"
            _curve(axis, run.evaluations, name, run.label, style)
            best = [point for point in _points(run.evaluations, name) if point[0] == run.best_step]
            if best:
                axis.plot(*best[-1], **_STAR, color=style.color)
    if any(run.best_step is not None for run in runs):
        axes["training loss"].plot([], [], **_STAR, color="0.7", linestyle="", label="best step")


def _styles() -> Any:
    return map(_Style, cycle(_COLOURS), cycle(_MARKERS), cycle(_LINES))


def _curve(axis: Any, records: Sequence[Record], name: str, label: str, style: _Style) -> None:
    if not (points := _points(records, name)):
        return
    axis.plot(*zip(*points, strict=True), label=_plain(label), markersize=5, **style._asdict())
    intervals = ends_of_intervals({name for record in records for name in record})
    if name in intervals and (bands := _points(records, *intervals[name])):
        axis.fill_between(*zip(*bands, strict=True), alpha=0.2, color=style.color)


def _plain(name: str) -> str:
    """Return a name as matplotlib shows it, which reads formulae between two signs of dollar."""
    return name.replace("$", r"\$")


def _points(records: Sequence[Record], *names: str) -> list[list[Any]]:
    """Return the steps and values of records; an evaluation may return texts and lists."""
    rows = [[record.get(name) for name in ("step", *names)] for record in records]
    return [row for row in rows if all(isinstance(value, int | float) for value in row)]
