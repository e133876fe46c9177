"""What was trained on what: model, data, settings, times, versions, and how to have it again."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from manualloop.checkpoint.contract import LIBRARIES
from manualloop.checkpoint.manifest import metric_name
from manualloop.models import model_name, unwrap_model
from manualloop.report.parts import Cell, Code, Details, Facts, Part, Section, Table, Text, Tile
from manualloop.report.text import amount, duration, number, percent, short, shorten
from manualloop.run.history_file import read_times
from manualloop.run.table import ends_of_intervals
from manualloop.state import TrainState
from manualloop.times import Times
from manualloop.types import Record, flat


class Result(Protocol):
    """The part of a ``TrainResult`` that a report reads."""

    @property
    def state(self) -> TrainState: ...  # noqa: D102
    @property
    def metrics(self) -> dict[str, float]: ...  # noqa: D102
    @property
    def best_metrics(self) -> dict[str, float]: ...  # noqa: D102
    @property
    def history(self) -> list[Record]: ...  # noqa: D102
    @property
    def stopped_by(self) -> str: ...  # noqa: D102
    @property
    def best_step(self) -> int | None: ...  # noqa: D102
    @property
    def best_checkpoint(self) -> Path | None: ...  # noqa: D102
    @property
    def last_checkpoint(self) -> Path | None: ...  # noqa: D102


class Parameters:
    """The parameters of a model, counted.

    Args:
        model: The model.

    Attributes:
        total: Number of parameters.
        trainable: Number of those that are trained.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = list(unwrap_model(model, adapters=False).parameters())
        self.total = sum(parameter.numel() for parameter in parameters)
        self.trainable = sum(p.numel() for p in parameters if p.requires_grad)


def best_metric_of(result: Result) -> str | None:
    """Return the name of the metric that decides which evaluation is the best; None without one."""
    given = _contract(result).get("observed", {}).get("best_metric")
    return metric_name(given) if isinstance(given, str) else None


def _contract(result: Result) -> dict[str, Any]:
    return result.state.contract or {}


def num_epochs(result: Result) -> float:
    """Return the number of epochs that a run has made; a fraction inside an epoch."""
    last = max((record.get("epoch", 0.0) for record in result.history), default=0.0)
    return float(max(last, result.state.progress.epoch))


def num_training_rows(result: Result) -> int | None:
    """Return the number of rows of the training data; None if nobody knows it."""
    rows = _contract(result).get("same", {}).get("num_rows")
    return rows if isinstance(rows, int) else None


def summary(result: Result) -> str:
    """Return a sentence on a run."""
    steps = result.state.progress.num_steps
    epochs = num_epochs(result)
    rows = num_training_rows(result)
    on = "" if rows is None else f" on {rows:,} rows"
    passes = f" in {short(epochs)} epoch{'s' * (epochs != 1)}" if epochs else ""
    return f"Trained{on} with {steps:,} update{'s' * (steps != 1)}{passes}."


def tiles(result: Result) -> list[Tile]:
    """Return the numbers at the top of the page."""
    shown = []
    name, metrics = best_metric_of(result), result.best_metrics or result.metrics
    scalars = [n for n, v in metrics.items() if isinstance(v, int | float)]
    first = name if name in metrics else next((n for n in scalars if n != "loss"), None)
    at = result.best_step if result.best_metrics else None
    for metric in dict.fromkeys(m for m in (first, "loss") if m in scalars):
        ends = ends_of_intervals(metrics).get(metric)
        notes = [] if at is None else [f"best, update {at:,}"]
        if ends is not None:
            notes.insert(0, f"{number(metrics[ends[0]])} to {number(metrics[ends[1]])}")
        title = f"evaluation {metric}" if metric == "loss" else metric
        shown.append(
            Tile(shorten(title, 60), number(metrics[metric]), ", ".join(notes), metric == first)
        )
    losses = [record["loss"] for record in result.history if record.get("loss") is not None]
    if losses:
        shown.append(Tile("training loss", number(losses[-1]), f"at first {number(losses[0])}"))
    counted = Parameters(result.state.model)
    shown.append(Tile("parameters", amount(counted.total), f"{amount(counted.trainable)} trained"))
    if (seconds := sum(times.total for times in all_times(result))) > 0:
        shown.append(Tile("time", duration(seconds), "data, updates, evaluation, saving"))
    return shown


def the_run(result: Result) -> Section:
    """Show what was trained on what."""
    state, contract = result.state, _contract(result)
    counted = Parameters(state.model)
    share = counted.trainable / counted.total if counted.total else 0.0
    ends, settings = contract.get("ends", {}), contract.get("settings", {})
    groups = contract.get("groups") or [{}]
    planned = f" of {ends['num_steps']:,} planned" if "num_steps" in ends else ""
    facts = {
        "Model": type(unwrap_model(state.model)).__name__,
        "Begun from": _name_or_path(state.model),
        "Parameters": f"{counted.total:,}",
        "Trained": f"{counted.trainable:,} ({percent(share)})",
        "Frozen": f"{counted.total - counted.trainable:,}",
        "Optimizer": contract.get("same", {}).get("optimizer"),
        "Learning rate": groups[0].get("lr"),
        "Schedule": settings.get("lr_scheduler"),
        "Updates": f"{state.progress.num_steps:,}{planned}",
        "Updates that were skipped": state.progress.num_skipped or None,
        "Epochs": short(num_epochs(result)),
        "Ended by": result.stopped_by,
        "Best evaluation": None if result.best_step is None else f"update {result.best_step:,}",
        "Precision": precision(settings.get("mixed_precision"), state.model),
        "Device": contract.get("exact", {}).get("device"),
        "Processes": contract.get("exact", {}).get("world_size"),
    }
    shown = {name: shorten(value, 300) for name, value in facts.items() if value is not None}
    return Section("run", "What was trained", [Facts(shown)])


def precision(mixed: str | None, model: nn.Module) -> str:
    """Return the precision of the weights of a run, and that of its passes if it is another."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    weights = ", ".join(sorted(dtypes))
    return weights if mixed in (None, "no") else f"{mixed}, weights in {weights}"


def _name_or_path(model: nn.Module) -> str | None:
    name = getattr(getattr(unwrap_model(model), "config", None), "name_or_path", None)
    return name if isinstance(name, str) and name else None


def all_times(result: Result) -> list[Times]:
    """Return where the time went of every process of a run that could tell."""
    return _all_times(result)[0]


def _all_times(result: Result) -> tuple[list[Times], int]:
    own = [result.state.times] if result.state.times.total else []
    if result.last_checkpoint is None:
        return own, 1
    found, num_processes = read_times(result.last_checkpoint.parent)
    return found or own, num_processes


def where_the_time_went(result: Result) -> Section:
    """Show the time of each part of a run."""
    processes, num_opened = _all_times(result)
    total = sum(times.total for times in processes)
    if not total:
        return Section("time", "Where the time went", [])
    names = {
        "waiting for data": "data",
        "copies to the device": "copy",
        "forward and backward passes": "forward_backward",
        "clipping, optimizer, schedule": "optimizer",
        "evaluation": "evaluation",
        "checkpoints": "checkpoint",
    }
    rows: list[list[str | Cell]] = []
    for title, name in names.items():
        seconds = sum(getattr(times, name) for times in processes)
        if seconds:
            share = seconds / total
            rows.append([title, duration(seconds), Cell(percent(share), share=share)])
    rows.append([Cell("total", is_strong=True), Cell(duration(total), is_strong=True), ""])
    note = f"Measured in {len(processes)} of {num_opened} processes of the run."
    if len(processes) < num_opened:
        note += " One that was killed, or had nothing to do, leaves no times."
    note = note if num_opened > 1 else ""
    parts: list[Part] = [
        Table("Time by part of the run", ["part", "time", "share"], rows, note=note)
    ]
    tokens, places = (sum(getattr(t, n) for t in processes) for n in ("num_tokens", "num_places"))
    if places:
        seconds = sum(times.data + times.update for times in processes)
        rate = f"{tokens / seconds:,.0f}" if seconds else ""
        parts.append(
            Text(
                f"{amount(tokens)} tokens were trained on, {rate} a second. "
                f"{percent(1 - tokens / places)} of the positions in the batches were padding."
            )
        )
    return Section("time", "Where the time went", parts)


def how_to_have_it_again(result: Result) -> Section:
    """Show how to load the model and how to resume the run, in lines that run."""
    parts: list[Part] = []
    best, last = result.best_checkpoint, result.last_checkpoint
    if last is None:
        text = (
            "The run had no checkpoint_dir, so its weights are in the process that made it, and "
            "nowhere else. With checkpoint_dir= the same call saves, and resumes if it is "
            "interrupted."
        )
        return Section("again", "Load and resume", [Text(text)])
    folder = best or last
    which = "best" if best is not None else "last"
    parts.append(Code(f"Load the {which} weights", load_lines(result, folder, which)))
    text = (
        "To resume, run the script of this run again: train_loop finds the newest checkpoint in "
        f"{last.parent} by itself. A finished run returns its result at once, and one with a "
        "larger num_epochs or max_steps continues."
    )
    lines = (
        "from manualloop import find_checkpoint\n\n"
        f"find_checkpoint({str(last.parent)!r})  # {last.name}\n"
    )
    parts += [Text(text), Code("Find the newest checkpoint", lines)]
    return Section("again", "Load and resume", parts)


def load_lines(result: Result, folder: Path, which: str) -> str:
    """Return the lines that load the weights of a checkpoint."""
    model = unwrap_model(result.state.model)
    kind = type(model)
    is_known = kind.__module__.startswith("transformers.") and (folder / "config.json").is_file()
    if is_known and not hasattr(model, "peft_config"):
        names = [kind.__name__]
        lines = [f"model = {kind.__name__}.from_pretrained({str(folder)!r})"]
        if (folder / "tokenizer_config.json").is_file():
            names.append("AutoTokenizer")
            lines.append(f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})")
        return f"from transformers import {', '.join(sorted(names))}\n\n" + "\n".join(lines) + "\n"
    return (
        "from manualloop import load_checkpoint\n\n"
        f"# model: a {kind.__name__}, built as in the script of the run\n"
        f"load_checkpoint({str(folder.parent)!r}, model, which={which!r})\n"
    )


def settings(result: Result) -> Section:
    """Show all settings that the numbers of a run depend on."""
    contract = _contract(result)
    groups = {
        "Length": contract.get("ends", {}),
        "Data": _data_of(contract.get("same", {})),
        "Arguments": _plain(contract.get("settings", {})),
        "Evaluation": _data_of(contract.get("observed", {})),
        "Schedule": contract.get("schedule", {}),
        "Seeds": contract.get("seeds", {}),
    }
    groups |= _optimizer_groups(contract.get("groups") or [])
    parts: list[Part] = [
        Facts(shown, title) for title, facts in groups.items() if (shown := _facts_of(facts))
    ]
    nested = {
        "Config of the model": contract.get("settings", {}).get("config", {}),
        "Adapters": contract.get("settings", {}).get("adapters", {}),
    }
    parts += [
        Details(title, [Facts(shown)])
        for title, facts in nested.items()
        if (shown := _facts_of(facts))
    ]
    return Section("settings", "Configuration", parts)


def _data_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Name digests as such, and leave out what the optimizer's section has."""
    left_out = ("rows", "optimizer", "class of lr_scheduler")
    return {
        f"digest of {name}" if name.endswith(" rows") else name: value
        for name, value in facts.items()
        if name not in left_out
    }


def _optimizer_groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    if len(groups) == 1:
        return {"Optimizer": groups[0]}
    return {f"Optimizer, group {place}": group for place, group in enumerate(groups)}


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of the settings what a reader cannot use: digests, code, and what is nested."""
    return {
        name: value
        for name, value in facts.items()
        if not isinstance(value, Mapping)
        and not name.startswith(("code of ", "places of ", "names of ", "contents of "))
    }


def _facts_of(facts: Mapping[str, Any]) -> dict[str, str]:
    return {
        shorten(name, 100): shorten(_as_text(value), 300)
        for name, value in flat(facts).items()
        if value is not None
    }


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
    return str(value)


def versions(result: Result) -> Section:
    """Show with which versions a run was made, and on what."""
    exact = _contract(result).get("exact", {})
    surroundings = {
        name: value for name, value in exact.items() if name not in ("python", *LIBRARIES)
    }
    surroundings["platform of this report"] = platform.platform()
    parts = [Facts(_facts_of(libraries(result))), Facts(_facts_of(surroundings), "Surroundings")]
    return Section("versions", "Versions", parts)


def libraries(result: Result) -> dict[str, Any]:
    """Return the versions of the libraries that a run was made with."""
    try:
        own = version("manualloop")
    except PackageNotFoundError:
        own = "not installed"
    exact = _contract(result).get("exact", {})
    names = ("python", *LIBRARIES)
    return {"manualloop": own} | {name: exact[name] for name in names if name in exact}


def model_title(result: Result) -> str:
    """Return the name of a run's model for a heading."""
    return shorten(model_name(result.state.model), 120)
