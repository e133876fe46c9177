"""``write_report``: a run as one page of HTML, which needs nothing beside itself."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

import manualloop
from manualloop.errors import ConfigError
from manualloop.evaluation.predictions import Predictions
from manualloop.notices import say
from manualloop.report.curves import curves, scores
from manualloop.report.data import data
from manualloop.report.facts import (
    Result,
    best_metric_of,
    how_to_have_it_again,
    model_title,
    settings,
    summary,
    the_run,
    tiles,
    versions,
    where_the_time_went,
)
from manualloop.report.parts import Section
from manualloop.report.predicted import predicted
from manualloop.report.text import clean

_GENERATOR = "manualloop report"
_LOOKED_AT = 2_000


def write_report(
    result: Result,
    path: str | os.PathLike[str],
    predictions: Predictions | None = None,
    *,
    rows: Any = None,
) -> Path:
    """Write a report of a run: one page of HTML that needs neither network nor other files.

    It has the sections that apply: what was trained, curves, metrics with intervals, confusions,
    calibration, the rows that are most wrong, data, times, settings, how to load and resume, and
    versions. Texts of rows come from the columns that were kept, or from the dataset of the loader
    that was predicted, as long as that loader exists. docs/report.md explains each section.

    The file is there at once, or not at all. An older report is replaced; any other file is not.
    With several processes rank 0 writes.

    Args:
        result: What ``train_loop`` returned.
        path: Path of the file, such as ``"report.html"``. Missing folders are made.
        predictions: What ``predict_loop`` returned for data with labels.
        rows: The dataset that was predicted, in which texts are looked up by the numbers of rows: a
            ``datasets.Dataset``, a ``pandas.DataFrame``, or a list of texts or dicts. None takes
            the texts that are at hand.

    Returns:
        The absolute path of the file.

    Raises:
        ConfigError: An argument is not what it should be, or there is another file.

    >>> import tempfile, torch
    >>> from manualloop import train_loop
    >>> result = train_loop(torch.nn.Linear(1, 1), [torch.ones(2, 1)] * 4, num_epochs=1,
    ...                     loss_fn=lambda model, batch: model(batch).square().mean(),
    ...                     progress_bar=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(result, folder + "/report.html").name
    'report.html'
    """
    _check_arguments(result, path, predictions, rows)
    file = _free_path(path)
    page = _page(result, predictions, rows)
    if on_first_rank():
        write_file(file, page)
        say(f"the report is in {file}")
    return file


def on_first_rank() -> bool:
    """Tell whether this is the process that writes."""
    return os.environ.get("RANK", "0") == "0"


def check_result(result: Any) -> None:
    """Refuse what is no result of a run.

    Raises:
        ConfigError: It is something else.
    """
    if not hasattr(result, "history") or not hasattr(result, "state"):
        raise ConfigError(
            f"result is a {type(result).__name__}. Pass what train_loop returned: "
            'result = train_loop(...); write_report(result, "report.html").'
        )


def _check_arguments(result: Any, path: Any, predictions: Any, rows: Any) -> None:
    check_result(result)
    problems = []
    if predictions is not None and not isinstance(predictions, Predictions):
        problems.append(
            f"predictions is a {type(predictions).__name__}. Pass what predict_loop returned: "
            'predictions=predict_loop(model, loaders["validation"]).'
        )
    can_be_looked_up = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
    if rows is not None and (isinstance(rows, str | bytes) or not can_be_looked_up):
        problems.append(
            f"rows is a {type(rows).__name__}. Pass the dataset that was predicted, or a list of "
            'texts: rows=dataset["validation"].'
        )
    is_path = isinstance(path, str | os.PathLike) and isinstance(os.fspath(path), str)
    if not is_path or not os.fspath(path).strip() or "\0" in os.fspath(path):
        problems.append(f'path={path!r:.100} is no path. Name a file, such as "report.html".')
    elif "://" in os.fspath(path):
        problems.append(f'path={path!r} is a URL. Write to a local file, such as "report.html".')
    if problems:
        raise ConfigError("\n".join(problems))


def _free_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file that may be written.

    Raises:
        ConfigError: There is another file, or a folder.
    """
    file = Path(os.path.expanduser(path)).absolute()
    if file.is_dir():
        raise ConfigError(f"{file} is a folder. Name a file in it: {str(file / 'report.html')!r}.")
    if file.exists() and not (file.is_file() and _is_report(file)):
        raise ConfigError(
            f"{file} exists and is no report, so it is not replaced. Remove it, or name another "
            f"file, such as {str(file.with_name('report.html'))!r}."
        )
    return file


def _is_report(file: Path) -> bool:
    with open(file, "rb") as opened:
        start = opened.read(_LOOKED_AT)
    return not start or f'content="{_GENERATOR}"'.encode() in start


def write_file(file: Path, text: str) -> None:
    """Write a file that is there at once, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "x", encoding="utf-8", newline="\n") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(aside, file)
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()


def _sections(result: Result, predictions: Predictions | None, rows: Any) -> list[Section]:
    state, best_metric = result.state, best_metric_of(result)
    of_run = [metrics.get("accuracy") for metrics in (result.best_metrics, result.metrics)]
    accuracies = [accuracy for accuracy in of_run if isinstance(accuracy, float)]
    of_predictions = []
    if predictions is not None:
        of_predictions = predicted(predictions, rows, state.tokenizer, accuracies)
    found = [
        the_run(result),
        curves(result.history, result.best_step, best_metric),
        scores(result.history, result.metrics, result.best_metrics, result.best_step, best_metric),
        *of_predictions,
        data(state.splits, state.class_names),
        where_the_time_went(result),
        settings(result),
        how_to_have_it_again(result),
        versions(result),
    ]
    return [section for section in found if section.parts]


def _page(result: Result, predictions: Predictions | None, rows: Any) -> str:
    now = datetime.now(timezone.utc)
    environment = Environment(
        loader=PackageLoader("manualloop.report", "templates"),
        autoescape=True,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return (
        environment.get_template("report.html.jinja")
        .render(
            generator=_GENERATOR,
            title=model_title(result),
            lead=summary(result),
            tiles=tiles(result),
            sections=_sections(result, predictions, rows),
            version=manualloop.__version__,
            written=now.isoformat(timespec="seconds"),
            written_shown=f"{now:%Y-%m-%d %H:%M} UTC",
        )
        .lstrip()
    )


def _finalize(value: Any) -> Any:
    """Clean what the template prints, whatever it is; pictures are clean already."""
    return value if isinstance(value, Markup) else clean(value)
