"""What a script begins with: the settings of the call, the model, the rows, and their batches."""

from __future__ import annotations

from typing import Any

import torch

from manualloop.data.preparation import Preparation
from manualloop.script.job import Job, source_of
from manualloop.script.loading import FILL_IN
from manualloop.script.text import Call, Line, Note, Part, code, literal, when
from manualloop.script.trial import is_learned, is_stored, stored_tokenizer


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


def process() -> Part:
    """The settings of torch that are not those of a new process, and change numbers."""
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    cudnn = torch.backends.cudnn
    lines: list[Line] = [
        *when(precision != "highest", f'torch.set_float32_matmul_precision("{precision}")'),
        *when(dtype != torch.float32, f"torch.set_default_dtype({dtype})"),
        *when(
            torch.are_deterministic_algorithms_enabled(),
            "torch.use_deterministic_algorithms(True)",
        ),
        *when(cudnn.benchmark, "torch.backends.cudnn.benchmark = True"),
        *when(cudnn.deterministic, "torch.backends.cudnn.deterministic = True"),
    ]
    return Part(lines, ("import torch",) if lines else ())


def _seed(job: Job) -> int:
    return 42 if job.preparation is None else int(job.loader.batch_sampler.seed)


def given(job: Job) -> Part:
    """The model, the tokenizer and the rows."""
    loading = job.loading
    rows_lines, rows_imports = _rows(job)
    title = "A model and data. The seed comes first, as a new head draws random numbers."
    lines = ["torch.manual_seed(SEED)", *loading.lines, *rows_lines]
    return Part(lines, ("import torch", *loading.imports, *rows_imports), title)


def _rows(job: Job) -> tuple[list[Line], list[str]]:
    made = job.preparation
    if made is None:
        return _own_loaders(job), []
    lines: list[Line] = []
    imports: list[str] = []
    tokenizer = getattr(job.loader, "tokenizer", None)
    if tokenizer is not None:
        lines += _tokenizer(job, made, tokenizer)
        imports.append("from transformers import AutoTokenizer")
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


def _tokenizer(job: Job, made: Preparation, tokenizer: Any) -> list[Line]:
    """The lines that load the tokenizer, and set what was set after it was loaded."""
    where, stored = getattr(tokenizer, "name_or_path", "") or None, stored_tokenizer(tokenizer)
    is_there = where is not None and (stored is None or is_stored(tokenizer, stored))
    folder = 'tokenizer.save_pretrained("path/to/model")'
    side = "right" if is_learned(job, made) else tokenizer.padding_side
    sides = {"padding_side": side, "truncation_side": tokenizer.truncation_side}
    no_pad = stored is None or stored.pad_token != tokenizer.pad_token
    return [
        *when(not is_there, Note(f"{FILL_IN} the folder of the tokenizer: {folder}.")),
        Call(
            "tokenizer = AutoTokenizer.from_pretrained(",
            [literal(where if where is not None and is_there else "path/to/model")],
        ),
        *when(
            no_pad
            and tokenizer.pad_token is not None
            and tokenizer.pad_token == tokenizer.eos_token,
            "tokenizer.pad_token = tokenizer.eos_token  # it has no other",
        ),
        *(
            f"tokenizer.{name} = {literal(value)}"
            for name, value in sides.items()
            if value != getattr(stored, name, "right")
        ),
    ]


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
    title = "From texts to numbers. Padding comes later, to the longest row of a batch."
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
                *_labels(job, made),
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


def _labels(job: Job, made: Preparation) -> list[Line]:
    if made.classes is not None:
        is_known = made.classes == job.loading.names
        return [
            *when(not is_known, Call("classes = [", map(literal, made.classes), "]")),
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
    collate = None if job.preparation is None else job.preparation.collate_fn
    for function in dict.fromkeys((job["loss_fn"], job["terms"], collate)):
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
