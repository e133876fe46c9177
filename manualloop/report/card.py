"""``write_model_card``: the README.md that a model hub expects beside weights."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from manualloop.errors import ConfigError
from manualloop.models import model_name, unwrap_model
from manualloop.notices import say
from manualloop.report.curves import classes_in, scalars_of
from manualloop.report.data import data
from manualloop.report.facts import (
    Parameters,
    Result,
    all_times,
    best_metric_of,
    libraries,
    num_epochs,
    precision,
    summary,
)
from manualloop.report.page import check_result, on_first_rank, write_file
from manualloop.report.parts import Cell, Facts, Table
from manualloop.report.text import clean, duration, number, short
from manualloop.run.table import ends_of_intervals

_MARK = "<!-- Written by manualloop; digest of the rest: {} -->"
_MARKED = re.compile(r"<!-- Written by manualloop; digest of the rest: ([0-9a-f]{16}) -->\n")
_TASKS = {
    "ForSequenceClassification": ("text-classification", "Text Classification"),
    "ForTokenClassification": ("token-classification", "Token Classification"),
    "ForQuestionAnswering": ("question-answering", "Question Answering"),
    "ForCausalLM": ("text-generation", "Text Generation"),
    "LMHeadModel": ("text-generation", "Text Generation"),
    "ForMaskedLM": ("fill-mask", "Fill-Mask"),
    "ForMultipleChoice": ("multiple-choice", "Multiple Choice"),
    "ForImageClassification": ("image-classification", "Image Classification"),
    "ForSemanticSegmentation": ("image-segmentation", "Image Segmentation"),
    "ForObjectDetection": ("object-detection", "Object Detection"),
}
_LIMITATIONS = """\
Nobody has written this section yet, and it cannot be computed. Write here what the model is meant
for, for whom it works worse, and what it must not be used for. The scores above hold for rows like
those that they were measured on, and for no others."""


def write_model_card(
    result: Result,
    folder: str | os.PathLike[str],
    *,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write the model card of a run: ``README.md`` with the metadata that a hub reads.

    It tells what the model is, on what and how it was trained, its scores with their intervals, how
    to load it, and the versions. What no program knows is left to you: the section on limitations,
    and the arguments below. A card that was edited is not replaced. With several processes rank 0
    writes.

    Args:
        result: What ``train_loop`` returned.
        folder: Folder of the weights, such as ``result.best_checkpoint`` or what
            ``save_pretrained`` has written; it is made if it does not exist.
        license: License as the hub names it, such as ``"apache-2.0"``; None leaves it out.
        language: Language of the texts, such as ``"en"``, or several; None leaves it out.
        dataset: Name of the dataset on the hub, such as ``"nyu-mll/glue"``; None takes the one that
            the data were loaded from, if that is known.
        base_model: Name of the model on the hub that the run began from; None takes that of the
            model's config, if it is one.

    Returns:
        The path of the card.

    Raises:
        ConfigError: An argument is not what it should be, or the folder has another README.md.
    """
    check_result(result)
    given = {"license": license, "dataset": dataset, "base_model": base_model}
    _check_arguments(folder, language, given)
    file = Path(os.path.expanduser(folder)).absolute() / "README.md"
    _require_ours(file)
    metadata = _metadata(result, file.parent.name, license, language, dataset, base_model)
    body = _body(result, file.parent, metadata)
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body}"
    if on_first_rank():
        mark = _MARK.format(_digest(text))
        write_file(file, f"---\n{metadata.to_yaml()}\n---\n\n{mark}\n{body}")
        missing = [n for n, value in (("license", license), ("language", language)) if not value]
        missing += [] if metadata.datasets else ["dataset"]
        rest = f"; not in it, because nobody gave it: {', '.join(missing)}" if missing else ""
        say(f"the model card is in {file}{rest}")
    return file


def _check_arguments(folder: Any, language: Any, names: Mapping[str, Any]) -> None:
    problems = []
    path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(path, str) or not path.strip() or "\0" in path or "://" in path:
        problems.append(f'folder={folder!r:.100} is no folder. Name one, such as "runs/mrpc".')
    for name, value in names.items():
        if value is not None and not (isinstance(value, str) and value.strip()):
            problems.append(f"{name} must be a name of the hub, got {value!r:.60}.")
    languages = language if isinstance(language, list | tuple) else [language]
    if language is not None and not all(isinstance(one, str) and one.strip() for one in languages):
        problems.append(f'language must be such as "en", or a list of these, got {language!r:.60}.')
    if problems:
        raise ConfigError("\n".join(problems))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _require_ours(file: Path) -> None:
    """Refuse to replace a card that somebody has written or edited."""
    if not os.path.lexists(file):
        return
    old = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    marked = _MARKED.search(old)
    if marked is None or _digest(old[: marked.start()] + old[marked.end() :]) != marked[1]:
        reason = "was edited since it was written" if marked else "is not from here"
        raise ConfigError(
            f"{file} {reason}, so it is not replaced. Write the card to another folder, and take "
            "over by hand what you need; or remove the file."
        )


def _metadata(
    result: Result,
    name: str,
    license: str | None,
    language: str | Sequence[str] | None,
    dataset: str | None,
    base_model: str | None,
) -> Any:
    from huggingface_hub import ModelCardData

    model = unwrap_model(result.state.model)
    source = _source(result)
    found = dataset or (source[0] if source else None)
    has_adapter = hasattr(model, "peft_config")
    is_known = type(model).__module__.startswith("transformers.")
    tags = ["manualloop", *(["lora"] if has_adapter else [])]
    results = _results(result, found, source[1] if source and not dataset else None)
    return ModelCardData(
        base_model=base_model or _base_model(model),
        datasets=[found] if found else None,
        language=[language] if isinstance(language, str) else list(language or ()) or None,
        library_name="peft" if has_adapter else "transformers" if is_known else "pytorch",
        license=license,
        metrics=[entry.metric_type for entry in results if entry.metric_type != "loss"] or None,
        eval_results=results or None,
        model_name=clean(name, 96) if results else None,
        pipeline_tag=(_task(model) or (None,))[0],
        tags=tags,
    )


def _source(result: Result) -> tuple[str, str | None] | None:
    found = {notes.source for notes in result.state.splits.values() if notes.source is not None}
    return found.pop() if len(found) == 1 else None


def _task(model: Any) -> tuple[str, str] | None:
    name = type(model).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def _base_model(model: Any) -> str | None:
    """Return the name on the hub that a model was loaded by; None for a folder, and for none."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    is_name = isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
    return name if is_name and name and not os.path.exists(name) else None


def _results(result: Result, dataset: str | None, config: str | None) -> list[Any]:
    """Return the scores as the hub takes them; none if it would not know of which data.

    The hub has no place for an interval, so it stands in the name that is shown.
    """
    from huggingface_hub import EvalResult

    scores, task = result.best_metrics or result.metrics, _task(unwrap_model(result.state.model))
    if dataset is None or task is None:
        return []
    splits = {n: notes for n, notes in result.state.splits.items() if not n.startswith("train")}
    labelled = [name for name, notes in splits.items() if notes.label is not None] or [*splits]
    split = labelled[0] if len(labelled) == 1 else None  # of several nobody knows which it was
    return [
        EvalResult(
            task_type=task[0],
            task_name=task[1],
            dataset_type=dataset,
            dataset_name=dataset.rpartition("/")[2],
            dataset_config=config,
            dataset_split=split,
            metric_type=name,
            metric_value=round(float(scores[name]), 6),
            metric_name=_shown_name(name, scores),
        )
        for name in scalars_of(scores)
        if isinstance(scores[name], Real) and math.isfinite(scores[name])
    ]


def _shown_name(name: str, scores: Mapping[str, Any]) -> str:
    ends = ends_of_intervals(scores).get(name)
    return name if ends is None else f"{name} ({' to '.join(number(scores[end]) for end in ends)})"


def _body(result: Result, folder: Path, metadata: Any) -> str:
    counted, names = Parameters(result.state.model), result.state.class_names
    base = metadata.base_model
    began = f", begun from [{base}](https://huggingface.co/{base})" if base else ""
    about = [
        f"A `{model_name(result.state.model)}` with {counted.total:,} parameters"
        f"{began}, of which {counted.trainable:,} were trained. {summary(result)}"
    ]
    if names:
        about.append(f"Classes: {', '.join(_escaped(name) for name in names[:100])}.")
    sections = {
        "": "\n\n".join(about),
        "How to use": _use(result, has_weights=metadata.library_name == "transformers"),
        "Data": "\n\n".join(
            _table(t) for t in data(result.state.splits, names).parts if isinstance(t, Table)
        ),
        "Training": _table(_training(result)),
        "Results": _result_text(result),
        "Limitations": _LIMITATIONS.replace("\n", " "),
        "Versions": _table(_as_table(Facts(libraries(result)))),
    }
    shown = [f"# {_escaped(folder.name)}"]
    for title, text in sections.items():
        shown += [f"## {title}", text] if title and text else [text] if text else []
    return "\n\n".join(shown) + "\n"


def _use(result: Result, *, has_weights: bool) -> str:
    """Return the lines that load the model from the folder of the card, or from a hub."""
    if not has_weights:
        return ""
    kind = type(unwrap_model(result.state.model)).__name__
    with_tokenizer = hasattr(result.state.tokenizer, "encode")
    names = ["AutoTokenizer", kind] if with_tokenizer else [kind]
    lines = [
        f"from transformers import {', '.join(names)}",
        "",
        'name = "."  # this folder, or the name of its repository on the hub',
        *(["tokenizer = AutoTokenizer.from_pretrained(name)"] if with_tokenizer else []),
        f"model = {kind}.from_pretrained(name)",
    ]
    return "\n".join(["```python", *lines, "```"])


def _training(result: Result) -> Table:
    contract = result.state.contract or {}
    settings, group = contract.get("settings", {}), (contract.get("groups") or [{}])[0]
    seconds = sum(times.total for times in all_times(result))
    facts = {
        "optimizer": contract.get("same", {}).get("optimizer"),
        "learning rate": group.get("lr"),
        "betas": group.get("betas"),
        "weight decay": group.get("weight_decay"),
        "schedule": settings.get("lr_scheduler"),
        "batch size": settings.get("batch_size"),
        "tokens per batch": settings.get("max_tokens"),
        "batches per update": settings.get("gradient_accumulation_steps"),
        "clipping to norm": settings.get("max_grad_norm"),
        "epochs": short(num_epochs(result)),
        "updates": f"{result.state.progress.num_steps:,}",
        "seed of the order": settings.get("seed"),
        "precision": precision(settings.get("mixed_precision"), result.state.model),
        "processes": contract.get("exact", {}).get("world_size"),
        "time": duration(seconds) if seconds else None,
    }
    shown = {name: str(value) for name, value in facts.items() if value is not None}
    return _as_table(Facts(shown), "setting")


def _result_text(result: Result) -> str:
    best = result.best_metrics
    scores = best or result.metrics
    if not scores:
        return "The run made no evaluation."
    by = best_metric_of(result)
    which = "of the last evaluation"
    if best and result.best_step is not None:
        which = f"of the evaluation after update {result.best_step:,}, the best one by {by}"
    intervals = ends_of_intervals(scores)
    rows = []
    for name in scalars_of(scores):
        ends = intervals.get(name)
        interval = "" if ends is None else " to ".join(number(scores[end]) for end in ends)
        rows.append([name, number(scores[name]), interval])
    columns = ["metric", "value", "interval"][: 3 if intervals else 2]
    table = Table("", columns, [row[: len(columns)] for row in rows])
    by_class = classes_in(scores)
    more = ""
    if by_class:
        keys = ("precision", "recall", "f1-score")
        of_classes = [[c, *(number(scores[f"{c}_{key}"]) for key in keys)] for c in by_class]
        more = "\n\n" + _table(Table("", ["class", *keys], of_classes))
    return f"Scores {which}.\n\n{_table(table)}{more}"


def _as_table(facts: Facts, title: str = "package") -> Table:
    rows = [[name, value] for name, value in facts.facts.items()]
    return Table("", [title, "value" if title == "setting" else "version"], rows)


def _table(table: Table) -> str:
    """Return a table in Markdown."""
    columns = [_escaped(column) for column in table.columns]
    ends = ["---" if n in table.texts else "---:" for n in range(len(columns))]
    lines = [columns, ends, *([_escaped(_text(cell)) for cell in row] for row in table.rows)]
    title = f"{table.caption}:\n\n" if table.caption else ""
    note = f"\n\n{table.note}" if table.note else ""
    return title + "\n".join(f"| {' | '.join(line)} |" for line in lines) + note


def _text(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


def _escaped(text: str) -> str:
    r"""Return a text that Markdown shows as it is, in a line.

    >>> print(_escaped("<b>a|b</b>\n*c*"))
    &lt;b&gt;a\|b&lt;/b&gt; \*c\*
    """
    line = " ".join(clean(text, 300).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", line)
