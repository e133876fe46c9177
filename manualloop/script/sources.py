"""What a script begins with: the settings of the call, the model, the rows, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from manualloop.data.batching import LEARNED
from manualloop.data.preparation import Preparation
from manualloop.script.job import Job, source_of
from manualloop.script.text import Call, Line, Note, Part, code, literal, when

FILL_IN = "FILL IN"
"""What marks a line that nobody but the user can complete."""


def settings(job: Job) -> Part:
    """The numbers of the call, under names."""
    lines: list[Line] = [f"SEED = {_seed(job)}"]
    if job["max_steps"] is not None:
        lines.append(f"MAX_STEPS = {job['max_steps']}")
    else:
        lines.append(f"NUM_EPOCHS = {job['num_epochs'] or 3}")
    if job.preparation is not None:
        lines.append(f"BATCH_SIZE = {job.loader.batch_sampler.batch_size}")
    if job.accumulates:
        lines.append(f"ACCUMULATION = {job['gradient_accumulation_steps']}  # batches per update")
    return Part(lines)


def _seed(job: Job) -> int:
    return 42 if job.preparation is None else int(job.loader.batch_sampler.seed)


def given(job: Job) -> Part:
    """The model, the tokenizer and the rows."""
    model_lines, model_imports = _model(job)
    rows_lines, rows_imports = _rows(job)
    title = (
        "What you have: a model and data. A new head and dropout draw from torch's generator, "
        "which is seeded before either exists."
    )
    lines = ["torch.manual_seed(SEED)", *model_lines, *rows_lines]
    return Part(lines, ("import torch", *model_imports, *rows_imports), title)


def _model(job: Job) -> tuple[list[Line], list[str]]:
    model: Any = job.model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return _adapted(model)
    kind, is_known = type(model), type(model).__module__.startswith("transformers.")
    if not is_known or not hasattr(model, "save_pretrained"):
        return [
            f"model = ...  # {FILL_IN}: the {kind.__name__} as it was before the training",
            *_freezing(model),
        ], []
    return [*_loaded("model", model), *_freezing(model)], [
        f"from transformers import {kind.__name__}"
    ]


def _loaded(name: str, model: Any) -> list[Line]:
    config, arguments = model.config, []
    where = getattr(config, "name_or_path", "") or ""
    if type(model).__name__.endswith("Classification"):
        arguments.append(f"num_labels={config.num_labels}")
    if getattr(config, "problem_type", None) == "multi_label_classification":
        arguments.append('problem_type="multi_label_classification"')
    if (dtype := str(model.dtype)) != "torch.float32":
        arguments.append(f"dtype={dtype}")
    begin = f"{name} = {type(model).__name__}.from_pretrained("
    if where:
        return [Call(begin, [literal(where), *arguments, *_changes_of(config, where)])]
    return [
        Note(f'{FILL_IN} the folder: model.save_pretrained("path/to/model"), before the training.'),
        Call(begin, ['"path/to/model"', *arguments]),
    ]


def _changes_of(config: Any, where: str) -> list[str]:
    """Return the settings of a config that differ from those on this disk, as arguments."""
    try:
        stored = type(config).from_pretrained(where, local_files_only=True).to_dict()
    except (OSError, ValueError):
        return []
    return [
        f"{name}={literal(value)}"
        for name, value in config.to_dict().items()
        if (value is None or isinstance(value, bool | int | float | str))
        and name not in _SET_ELSEWHERE
        and stored.get(name) != value
    ]


_SET_ELSEWHERE = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "num_labels", "problem_type"),
    "transformers_version",
)


def _adapted(model: Any) -> tuple[list[Line], list[str]]:
    base = model.get_base_model()
    return [
        *_loaded("base", base),
        Note(
            f"{FILL_IN} the folder of the adapter: "
            'model.save_pretrained("path/to/adapter"), before the training.'
        ),
        'model = PeftModel.from_pretrained(base, "path/to/adapter", is_trainable=True)',
    ], [f"from transformers import {type(base).__name__}", "from peft import PeftModel"]


def _freezing(model: nn.Module) -> list[Line]:
    lines: list[Line] = []
    for names, kind in (
        (list(_frozen(model, "")), "submodule"),
        (_frozen_alone(model), "parameter"),
    ):
        if names:
            lines += [
                "# These parts stay as they are: they get no gradient.",
                Call("frozen = [", map(literal, names), "]"),
                "for name in frozen:",
                [f"model.get_{kind}(name).requires_grad_(False)"],
            ]
    return lines


def _frozen(module: nn.Module, name: str) -> Iterator[str]:
    """Yield the names of the outermost modules whose parameters are all frozen."""
    parameters = list(module.parameters())
    if not parameters:
        return
    if not any(parameter.requires_grad for parameter in parameters):
        yield name
        return
    for child, inner in module.named_children():
        yield from _frozen(inner, f"{name}.{child}" if name else child)


def _frozen_alone(model: nn.Module) -> list[str]:
    """Return frozen parameters that stand beside others which are trained."""
    names = tuple(f"{name}." for name in _frozen(model, ""))
    return [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and not name.startswith(names or ("\0",))
    ]


def _rows(job: Job) -> tuple[list[Line], list[str]]:
    made = job.preparation
    if made is None:
        return _own_loaders(job), []
    lines: list[Line] = []
    imports: list[str] = []
    tokenizer = getattr(job.loader, "tokenizer", None)
    if tokenizer is not None:
        where = getattr(tokenizer, "name_or_path", "") or "path/to/model"
        lines.append(Call("tokenizer = AutoTokenizer.from_pretrained(", [literal(where)]))
        imports.append("from transformers import AutoTokenizer")
        if tokenizer.pad_token is not None and tokenizer.pad_token == tokenizer.eos_token:
            lines.append("tokenizer.pad_token = tokenizer.eos_token  # it has no other")
        if tokenizer.padding_side == "left":
            is_learned = made.task in LEARNED and "labels" in job.loader.dataset.column_names
            lines.append(f"tokenizer.padding_side = {literal('right' if is_learned else 'left')}")
        if tokenizer.truncation_side == "left":
            lines.append('tokenizer.truncation_side = "left"')
    if is_tokenized(job):
        source, maker = _raw(job, made)
        imports.append(f"from datasets import {maker}")
        return [*lines, *source, *_own_eval_loader(job)], imports
    return [
        *lines,
        Note(
            f"{FILL_IN} the folder of the prepared rows: save them once, "
            "datasets.DatasetDict({name: loader.dataset for name, loader in loaders.items()})"
            '.save_to_disk("path/to/rows").'
        ),
        'datasets = load_from_disk("path/to/rows")',
        *_own_eval_loader(job),
    ], [*imports, "from datasets import load_from_disk"]


def _raw(job: Job, made: Preparation) -> tuple[list[Line], str]:
    """Return the lines that load the raw datasets, and the name that they import."""
    parts: dict[Any, str | None] = {made.split: made.source}
    if job.evaluation is not None and job.evaluation.preparation is not None:
        parts[job.evaluation.preparation.split] = job.evaluation.preparation.source
    if made.is_of_file:
        files = [f"{literal(split)}: {source}" for split, source in parts.items()]
        return [Call("raw_datasets = {", files, "}")], "Dataset"
    source, *others = {*parts.values()}
    if source is None or others:
        return [f'raw_datasets = load_dataset("path/to/data")  # {FILL_IN}'], "load_dataset"
    return [f"raw_datasets = {source}"], "load_dataset"


def _own_loaders(job: Job) -> list[Line]:
    return [
        f"train_dataloader = ...  # {FILL_IN}: your loader, built as before",
        *_own_eval_loader(job),
    ]


def _own_eval_loader(job: Job) -> list[Line]:
    is_own = job.evaluation is not None and not job.makes_eval_loader
    return when(is_own, f"eval_dataloader = ...  # {FILL_IN}: the loader that evaluate reads")


def is_tokenized(job: Job) -> bool:
    """Tell whether a script can make the rows itself, from raw texts."""
    made = [job.preparation]
    if job.evaluation is not None and job.makes_eval_loader:
        made.append(job.evaluation.preparation)
    ways = {
        (one.texts, one.label, str(one.options), one.classes, one.is_of_file) if one else None
        for one in made
    }
    return len(ways) == 1 and all(one is not None and one.is_tokenized for one in made)


def rows(job: Job) -> Part:
    """The function that tokenizes a split, and the splits."""
    made = job.preparation
    if made is None:
        return Part([])
    names = {"train_dataset": made.split}
    if job.evaluation is not None and job.evaluation.preparation is not None:
        names["eval_dataset"] = job.evaluation.preparation.split
    if not is_tokenized(job):
        kept = sorted(made.kept & set(job.loader.dataset.column_names))
        without = f".remove_columns({literal(kept)})" if kept else ""
        return Part(
            [f"{name} = datasets[{literal(split)}]{without}" for name, split in names.items()]
        )
    columns = [n for n in job.loader.dataset.column_names if n not in made.kept]
    texts = [f"rows[{literal(name)}]" for name in made.texts]
    options = [f"{name}={value!r}" for name, value in made.options.items() if value is not None]
    title = (
        "From texts to numbers. Nothing is padded yet: a batch is padded to its own longest row, "
        "and not to the longest of all."
    )
    lines: list[Line] = [
        "def tokenize(rows):",
        [Call("return tokenizer(", [*texts, *options])],
    ]
    return Part(
        [
            *lines,
            "",
            "",
            "def prepare(split):",
            [
                "rows = raw_datasets[split].map(tokenize, batched=True)",
                *_labels(made),
                "# The model is called with these columns by name; any other would be an error.",
                Call("columns = [", map(literal, columns), "]"),
                "return rows.select_columns(columns)",
            ],
            "",
            "",
            ", ".join(names)
            + " = "
            + ", ".join(f"prepare({literal(split)})" for split in names.values()),
        ],
        title=title,
    )


def _labels(made: Preparation) -> list[Line]:
    if made.classes is not None:
        return [
            Call("classes = [", map(literal, made.classes), "]"),
            "# A class is the number of an output of the model.",
            Call(
                "rows = rows.map(",
                [f'lambda row: {{"labels": classes.index(row[{literal(made.label)}])}}'],
            ),
        ]
    if made.label in (None, "labels"):
        return []
    return [f'rows = rows.rename_column({literal(made.label)}, "labels")']


def functions(job: Job) -> Part:
    """The user's functions: imported, or copied where they stand in the script that runs."""
    lines: list[Line] = []
    imports: list[str] = []
    for function in dict.fromkeys((job["loss_fn"], job["terms"])):
        if function is None:
            continue
        if function.__module__ == "__main__":
            source = source_of(function) or ""
            lines.append(code(source))
            imports += [line for name, line in _IMPORTED.items() if f"{name}." in source]
        else:
            imports.append(f"from {function.__module__} import {function.__name__}")
    return Part(lines, tuple(imports))


_IMPORTED = {
    "torch": "import torch",
    "nn": "from torch import nn",
    "F": "import torch.nn.functional as F",
}
